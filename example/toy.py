"""Two tasks that pull one point in the plane apart, under several balancers: an animation, ``python -m example toy``.

After the toy problem of Javaloy and Valera, `RotoGrad <https://arxiv.org/abs/2103.02631>`_ (ICLR 2022), with functions
of our own. The representation z is two numbers and all that is trained, besides what the balancers learn; a head only
looks up its task's loss where it finds itself. The losses conflict in direction, for their minima lie apart and their
valleys run across each other, and in magnitude, for one is ten times the other; and they are not convex. The minima are
at one distance from the origin, so that rotations can bring them together, and nothing else can.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn

from example.output import folder
from mtlwrap import IMTL, IMTLG, IMTLL, Balancer, EqualWeighting, GradNorm, MultiTaskModel, RotoGrad

# Each with the learning rate of z; that of what a balancer learns is 0.03. IMTL takes the shortest steps.
METHODS: dict[str, tuple[Callable[[], Balancer], float]] = {
    "EqualWeighting": (EqualWeighting, 0.03),
    "IMTL-L": (IMTLL, 0.03),
    "IMTL-G": (IMTLG, 0.03),
    "IMTL": (IMTL, 0.1),
    "GradNorm": (lambda: GradNorm(alpha=1.5), 0.03),
    "RotoGrad": (lambda: RotoGrad(2), 0.03),
}
STARTS = [(-1.0, -2.5), (2.0, -2.0)]
STEPS = 500
# A task is learned when so much of its first loss is left.
REACHED = 0.05


class Landscape(nn.Module):
    r"""A head without parameters, whose prediction is its loss: a valley around a minimum, with ripples along it.

    With u along the valley and v across it, :math:`L = s \log(1 + (u / a)^2 + (v / b)^2 + 0.3 \sin^2 2u)`.

    Args:
        minimum: where the loss is 0.
        degrees: the direction of the valley.
        size: s, the magnitude of the loss and of its gradient.
        widths: a and b.
    """

    def __init__(
        self, minimum: tuple[float, float], degrees: float, size: float, widths: tuple[float, float] = (1.6, 0.8)
    ) -> None:
        super().__init__()
        angle = math.radians(degrees)
        self.minimum = torch.tensor(minimum, dtype=torch.float64)
        along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        self.turn = torch.tensor([along, across], dtype=torch.float64)
        self.widths = torch.tensor(widths, dtype=torch.float64)
        self.size = size

    def forward(self, z: Tensor) -> Tensor:
        """The losses at points ``[..., 2]``, ``[...]``."""
        turned = (z - self.minimum) @ self.turn.T
        bowl = (turned / self.widths).square().sum(-1)
        return self.size * torch.log1p(bowl + 0.3 * torch.sin(2 * turned[..., 0]).square())


class Point(nn.Module):
    """A backbone that knows one representation, ``[1, 2]``, whatever it is given."""

    def __init__(self, start: tuple[float, float]) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        """The point."""
        return self.z.clone()


def landscapes() -> dict[str, Landscape]:
    """The two tasks."""
    height, side = 1.0, math.sqrt(3.0)  # at a distance of 2 from the origin
    return {"A": Landscape((-side, height), 60.0, 1.0), "B": Landscape((side, height), -60.0, 10.0)}


@dataclass(frozen=True)
class Path2d:
    """Where one training led.

    Attributes:
        points: what each head got to see before every step and after the last, ``[steps + 1, tasks, 2]``; the same
            for all tasks unless the balancer rotates.
        left: each task's loss as a share of its first one, ``[steps + 1, tasks]``.
    """

    points: Tensor
    left: Tensor


class _Seen(nn.Module):
    """A head that notes what it is given."""

    def __init__(self, landscape: Landscape) -> None:
        super().__init__()
        self.landscape = landscape
        self.points: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.points.append(z.detach()[0].clone())
        loss: Tensor = self.landscape(z).sum()
        return loss


def follow(balancer: Balancer, start: tuple[float, float], lr: float, steps: int = STEPS) -> Path2d:
    """Train z from a starting point: gradient descent, its rate down to 0 along a cosine; nothing is random."""
    heads = {task: _Seen(landscape) for task, landscape in landscapes().items()}
    model = MultiTaskModel(Point(start), heads, balancer).double()
    optimizer = torch.optim.SGD(model.param_groups(lr=lr, balancer_lr=0.03))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    nothing, losses = torch.zeros(1), []
    for _ in range(steps):
        predictions = model(nothing)
        losses.append([loss.item() for loss in predictions.values()])
        optimizer.zero_grad()
        model.backward(predictions)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses.append([loss.item() for loss in model(nothing).values()])
    points = torch.stack([torch.stack(head.points) for head in heads.values()], dim=1)
    history = torch.tensor(losses, dtype=torch.float64)
    return Path2d(points, history / history[0])


def verdict(paths: Sequence[Path2d]) -> str:
    """What became of a method, from all its starting points, in a few words."""
    reached = {tuple((path.left[-1] < REACHED).tolist()) for path in paths}
    words = {(True, True): "reaches both", (True, False): "dragged to A", (False, True): "dragged to B"}
    if len(reached) == 1:
        return words.get(reached.pop(), "in between")
    return "one or the other" if reached == {(True, False), (False, True)} else "now this, now that"


# Okabe and Ito's blue and vermilion; the markers and line styles tell the starting points apart without them.
STYLES = [("#0072B2", "o", "-", "●"), ("#D55E00", "s", "--", "■")]
INK, GREEN, LIMIT = "#222222", "#00664B", 3.4


class Picture:
    """The figure: a column per method, a row per task, and a few words below each column.

    Args:
        paths: for each method, one path from every starting point.
    """

    def __init__(self, paths: Mapping[str, Sequence[Path2d]]) -> None:
        self.paths = paths
        self.steps = len(next(iter(paths.values()))[0].points) - 1
        self.figure = Figure(figsize=(12.0, 5.75), dpi=80, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self.moving: list[Artist] = []
        self.step = self._text(0.995, 0.895, "right", 13)
        panels = self.figure.subplots(2, len(paths), squeeze=False)
        self.figure.subplots_adjust(left=0.075, right=0.995, top=0.81, bottom=0.13, wspace=0.06, hspace=0.22)
        self._explain(panels)
        columns = [[self._panel(panels[row, column], row) for row in range(2)] for column in range(len(paths))]
        self.panels = dict(zip(paths, columns, strict=True))
        middles = [axes.get_position().x0 + axes.get_position().width / 2 for axes in panels[0]]
        self.verdicts = [self._text(x, 0.035, "center", 14, weight="bold") for x in middles]
        self.canvas.draw()
        # What does not move is drawn once: a frame is then a matter of milliseconds.
        self.ground = self.canvas.copy_from_bbox(self.figure.bbox)

    def frame(self, step: int) -> Image.Image:
        """What is known after so many steps; the verdicts at the end."""
        self.step.set_text(f"step {step} of {self.steps}")
        for (method, paths), words in zip(self.paths.items(), self.verdicts, strict=True):
            for task, (lines, heads, numbers) in enumerate(self.panels[method]):
                for path, line, head, number, (_, _, _, sign) in zip(paths, lines, heads, numbers, STYLES, strict=True):
                    x, y = path.points[: step + 1, task].unbind(-1)
                    line.set_data(x.numpy(), y.numpy())
                    head.set_data(x[-1:].numpy(), y[-1:].numpy())
                    number.set_text(f"{sign} {100 * path.left[step, task].item():.0f} %")
            text = verdict(paths) if step == self.steps else ""
            both = text == "reaches both"
            words.set(text=f"✓ {text}" if both else text, color=GREEN if both else INK)
        self.canvas.restore_region(self.ground)
        for artist in self.moving:
            self.figure.draw_artist(artist)
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())

    def _explain(self, panels: Any) -> None:
        title = "Two tasks share a representation z of two numbers. Who reaches both minima?"
        self.figure.text(0.535, 0.955, title, ha="center", va="center", size=17, weight="bold", color=INK)
        legend = "★ the task's minimum   dark: high loss   ●■ two starting points, and what is left of the loss"
        self.figure.text(0.075, 0.895, legend, ha="left", va="center", size=13, color=INK)
        for axes, method in zip(panels[0], self.paths, strict=True):
            shown = "Equal weights" if method == "EqualWeighting" else method
            axes.set_title(f"{shown}*" if method == "RotoGrad" else shown, size=15, weight="bold", color=INK, pad=7)
        panels[0, -1].text(0.97, 0.03, "*rotates z per task", ha="right", size=9.5, transform=panels[0, -1].transAxes)
        for axes, text in zip(panels[:, 0], ("task A", "task B\n10 times the loss"), strict=True):
            axes.set_ylabel(text, size=13, weight="bold", color=INK, labelpad=8)

    def _panel(self, axes: Axes, row: int) -> tuple[list[Line2D], list[Line2D], list[Text]]:
        draw_landscape(axes, list(landscapes().values())[row])
        lines, heads, numbers = [], [], []
        box = axes.get_position()
        for position, (colour, marker, dashes, _) in enumerate(STYLES):
            lines += axes.plot([], [], dashes, color=colour, linewidth=2.4, animated=True)
            heads += axes.plot([], [], marker, color=colour, markersize=9, markeredgecolor="white", animated=True)
            x = box.x0 + box.width * (0.27 + 0.48 * position)
            numbers.append(self._text(x, box.y0 - 0.03, "center", 13, color=colour, weight="bold"))
        self.moving += [*lines, *heads]
        return lines, heads, numbers

    def _text(self, x: float, y: float, ha: str, size: float, **style: Any) -> Text:
        style.setdefault("color", INK)
        text = self.figure.text(x, y, "", ha=ha, va="center", size=size, animated=True, **style)
        self.moving.append(text)
        return text


def draw_landscape(axes: Axes, landscape: Landscape) -> None:
    """The contours of a task's loss, its minimum, and nothing that distracts."""
    side = torch.linspace(-LIMIT, LIMIT, 121, dtype=torch.float64)
    y, x = torch.meshgrid(side, side, indexing="ij")
    values = landscape(torch.stack([x, y], dim=-1)) / landscape.size
    axes.contourf(x.numpy(), y.numpy(), values.numpy(), levels=9, cmap="Greys", vmin=-0.2, vmax=7.0)
    best = landscape.minimum.tolist()
    axes.plot(*best, "*", color="#F0E442", markersize=19, markeredgecolor="black", markeredgewidth=1.2)
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")


def trajectories(steps: int = STEPS) -> dict[str, list[Path2d]]:
    """The paths of every method from every starting point."""
    return {name: [follow(make(), start, lr, steps) for start in STARTS] for name, (make, lr) in METHODS.items()}


def animate(paths: Mapping[str, Sequence[Path2d]], file: Path, frames: int = 50) -> None:
    """Write the animation as a GIF: slower at first, where more happens, and the end held for some seconds."""
    picture = Picture(paths)
    shown = dict.fromkeys(round(picture.steps * (frame / (frames - 1)) ** 2) for frame in range(frames))
    images = [picture.frame(step) for step in shown]
    # One palette for all frames, of the last one, which has every colour: nothing flickers, and the file is small.
    palette = images[-1].quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    durations = [100] * len(others) + [5000]
    first.save(file, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def argument_parser() -> argparse.ArgumentParser:
    """The options of ``python -m example toy``."""
    parser = argparse.ArgumentParser(
        "python -m example toy", description="Two tasks on a representation of two numbers, as an animation."
    )
    parser.add_argument(
        "--output",
        type=folder,
        default="example-results",
        metavar="FOLDER",
        help="where toy.gif goes; by default %(default)s",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Path2d]]:
    """Train, say what became of each method, and write the animation; returns what it shows."""
    options = argument_parser().parse_args(arguments)
    paths = trajectories()
    for name, of_method in paths.items():
        losses = "; ".join(", ".join(f"{100 * left:.0f} %" for left in path.left[-1].tolist()) for path in of_method)
        print(f"{name}: {verdict(of_method)} (loss left of A, B, by starting point: {losses})")
    animate(paths, options.output / "toy.gif")
    print(f"The animation is {options.output / 'toy.gif'}.")
    return paths
