"""The problems that a step is timed on: a backbone, a head and a target per task, in a realistic and in a tiny size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rotation:
    """What a method that rotates z is to rotate: an axis of this size, the sizes of the axes behind it, in words."""

    size: int
    behind: tuple[int, ...]
    words: str


@dataclass(frozen=True)
class Problem:
    """What all contenders are given: the same modules, the same data.

    Attributes:
        backbone: the shared module; z is one tensor.
        heads: a module per task.
        criteria: a loss per task.
        inputs: a batch.
        targets: what each task is to predict for it.
        rotation: what is rotated by the methods that rotate.
    """

    backbone: nn.Module
    heads: Sequence[nn.Module]
    criteria: Sequence[Criterion]
    inputs: Tensor
    targets: Sequence[Tensor]
    rotation: Rotation

    @property
    def num_tasks(self) -> int:
        return len(self.heads)

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def losses(self, predictions: Sequence[Tensor]) -> list[Tensor]:
        """A loss for each task."""
        return [c(p, t) for c, p, t in zip(self.criteria, predictions, self.targets, strict=True)]

    def gradient_bytes(self) -> int:
        """The size of the gradient of one task on z."""
        with torch.no_grad():
            z = self.backbone(self.inputs)
        return z.numel() * z.element_size()


def build(name: str, num_tasks: int, device: torch.device, quick: bool = False) -> Problem:
    """The problem of this name; its weights and data depend on nothing but the name, the number of tasks and quick."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(num_tasks)
        # Made on the CPU and moved, so that every device has the same numbers.
        return PROBLEMS[name](num_tasks, device, quick)


def assemble(
    backbone: nn.Module, heads: Sequence[nn.Module], inputs: Tensor, device: torch.device, rotation: Rotation
) -> Problem:
    """A problem with random targets: regression by one number, classification by several."""
    backbone, inputs, heads = backbone.to(device), inputs.to(device), [head.to(device) for head in heads]
    with torch.no_grad():
        z = backbone(inputs)
        shapes = [head(z).shape for head in heads]
    criteria = [_criterion(task, shape) for task, shape in enumerate(shapes)]
    targets = [_target(shape).to(device) for shape in shapes]
    return Problem(backbone, heads, criteria, inputs, targets, rotation)


def _criterion(task: int, shape: torch.Size) -> Criterion:
    # Two losses for numbers, for otherwise the tasks' gradients would all be of one kind.
    return cross_entropy if shape[1] > 1 else (mse_loss, l1_loss)[task % 2]


def _target(shape: torch.Size) -> Tensor:
    """Classes stand in the second dimension, where cross_entropy expects them."""
    return torch.randn(shape) if shape[1] == 1 else torch.randint(shape[1], (shape[0], *shape[2:]))


# ------------------------------------------------------------------------------------------------------------ conv


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.past = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.past(x))


def _conv(num_tasks: int, device: torch.device, quick: bool) -> Problem:
    """A residual network on images; z is a vector for each of them."""
    widths = (4, 8) if quick else (32, 64, 128, 256)
    batch, side = (4, 8) if quick else (20, 32)
    stem = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    blocks = [_Residual(widths[0], widths[0], 1)]
    blocks += [_Residual(before, after, 2) for before, after in pairwise(widths)]
    backbone = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = [_mlp(widths[-1], 64, 1 if task % 2 else 10) for task in range(num_tasks)]
    rotation = Rotation(widths[-1], (), "the vector z")
    return assemble(backbone, heads, torch.randn(batch, 3, side, side), device, rotation)


def _mlp(before: int, hidden: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Linear(before, hidden), nn.ReLU(), nn.Linear(hidden, after))


# ----------------------------------------------------------------------------------------------------------- dense


def _dense(num_tasks: int, device: torch.device, quick: bool) -> Problem:
    """An encoder and a decoder of images; z is a map of 64 channels, 8.4 million numbers, as of a small SegNet."""
    batch, side, width = (1, 32, 8) if quick else (2, 256, 64)
    backbone = nn.Sequential(
        nn.Conv2d(3, width, 4, 4),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(width, 16 * width, 1),
        nn.PixelShuffle(4),
    )
    heads = [nn.Conv2d(width, 1 if task % 2 else 13, 3, 1, 1) for task in range(num_tasks)]
    rotation = Rotation(
        width,
        (side, side),
        "the channels of z, all places alike; a matrix over all that an image has in z would be impossible",
    )
    return assemble(backbone, heads, torch.randn(batch, 3, side, side), device, rotation)


# ----------------------------------------------------------------------------------------------------- transformer


class _PerToken(nn.Module):
    """A prediction for every token, ``[B, classes, L]`` as the losses expect it."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.layers = _mlp(width, 64, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens).transpose(1, 2)


def _transformer(num_tasks: int, device: torch.device, quick: bool) -> Problem:
    """A transformer encoder; z is all of its tokens, ``[B, L, d]``, and the heads predict for each token."""
    batch, length, width, layers = (2, 4, 8, 1) if quick else (16, 64, 128, 4)
    # Without dropout: the contenders are to compute the same.
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
    backbone = nn.TransformerEncoder(layer, layers)
    heads = [_PerToken(width, 1 if task % 2 else 10) for task in range(num_tasks)]
    return assemble(backbone, heads, torch.randn(batch, length, width), device, Rotation(width, (), "each token"))


# ------------------------------------------------------------------------------------------------------------ many


def _many(num_tasks: int, device: torch.device, quick: bool) -> Problem:
    """A small perceptron with linear heads, for up to a thousand tasks."""
    batch, width = (4, 8) if quick else (64, 64)
    backbone = nn.Sequential(_mlp(16, 128, width), nn.Tanh())
    heads = [nn.Linear(width, 1 if task % 2 else 3) for task in range(num_tasks)]
    return assemble(backbone, heads, torch.randn(batch, 16), device, Rotation(width, (), "the vector z"))


PROBLEMS: dict[str, Callable[[int, torch.device, bool], Problem]] = {
    "conv": _conv,
    "dense": _dense,
    "transformer": _transformer,
    "many": _many,
}
