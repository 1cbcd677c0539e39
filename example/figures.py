"""The figures; without pyplot, which keeps every figure in a global list and may want a display."""

import math
from itertools import cycle
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from example.methods import METHODS
from example.training import TASKS

# Black, then after Paul Tol's "muted" colours, which colour-blind readers tell apart too; the markers help further.
COLOURS = ["#000000", "#CC6677", "#332288", "#DDAA33", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499"]
COLOURS += ["#E8601C"]
MARKERS = "osD^vP*X<>h"
# The broken lines are above the solid ones, so that of two in the same place both are seen.
DASHES = [("-", 2), ("--", 3), (":", 4)]
# By its place among all: a method looks the same in every figure, whichever others are drawn.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    method: {"color": colour, "marker": marker, "linestyle": dashes, "zorder": order}
    for method, colour, marker, (dashes, order) in zip(
        METHODS, cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False
    )
}
# Okabe and Ito's colours, for the same reason; the dashes let a line be seen below another.
TASK_STYLES: dict[str, dict[str, Any]] = {
    task: {"color": colour, "linestyle": dashes}
    for task, (colour, dashes) in zip(
        TASKS, cycle([("#000000", "-"), ("#E69F00", "--"), ("#0072B2", ":"), ("#CC79A7", "-.")]), strict=False
    )
}
# Weights jump from step to step: a point of their curves is the mean over one of about so many parts of the training.
STRETCHES = 30


def curves_figure(scores: pd.DataFrame) -> Figure:
    """Each task's metric on the validation part after every epoch: a panel per task, a line per method.

    Args:
        scores: of :func:`~example.results.scores_frame`.
    """
    figure = Figure(figsize=(9, 7.5), dpi=150, layout="constrained")
    grid = figure.subplots(2, math.ceil(len(TASKS) / 2), sharex=True)
    for axes, (name, task) in zip(grid.flat, TASKS.items(), strict=True):
        for method, rows in scores[scores["task"] == name].groupby("method", sort=False):
            values = rows.pivot(index="epoch", columns="seed", values="score")
            draw(axes, values, label=str(method), **METHOD_STYLES[str(method)])
        axes.set(title=name, ylabel=task.metric_name)
        axes.locator_params("x", integer=True, min_n_ticks=1)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    finish(figure, "Metric on validation flights after each epoch, higher is better", scores["seed"].nunique())
    return figure


def weights_figure(weights: pd.DataFrame) -> Figure:
    """With what factor each task's gradient entered the shared gradient: a panel per method, a line per task.

    Args:
        weights: of :func:`~example.results.weights_frame`, not empty.
    """
    length = math.ceil(weights["step"].max() / STRETCHES)
    middle = (weights["step"] - 1) // length * length + (length + 1) / 2
    smooth = weights.groupby(["method", "seed", middle])[list(TASKS)].mean()
    methods = list(weights["method"].unique())
    columns = min(3, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(9, 1.5 + 2.2 * rows), dpi=150, layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, method in zip(panels, methods, strict=False):
        for task in TASKS:
            draw(axes, smooth.loc[method, task].unstack("seed"), label=task, **TASK_STYLES[task])
        axes.set_title(method)
        axes.set_yscale("symlog", linthresh=0.01, subs=range(2, 10))  # IMTL-G's weights can be negative
        axes.yaxis.set_major_formatter("{x:g}")
    for axes in panels[len(methods) :]:
        axes.remove()
    for axes in panels[: len(methods)][-columns:]:
        axes.set_xlabel("training step")
        axes.tick_params("x", labelbottom=True)
    for axes in panels[: len(methods) : columns]:
        axes.set_ylabel("weight (log scale)")
    title = f"Weight of each task's gradient in the shared gradient, averaged over {length} steps"
    finish(figure, title, weights["seed"].nunique())
    return figure


def draw(axes: Axes, values: pd.DataFrame, **style: Any) -> None:
    """The mean over the columns, which are seeds, and a band of one standard deviation around it."""
    mean, deviation = values.mean(axis="columns"), values.std(axis="columns")
    axes.plot(mean.index, mean, linewidth=1.5, markersize=5, **style)
    if len(values.columns) > 1:
        axes.fill_between(mean.index, mean - deviation, mean + deviation, color=style["color"], alpha=0.08, linewidth=0)


def finish(figure: Figure, title: str, num_seeds: int) -> None:
    """What the figures have in common; the legend goes below the panels, where it covers nothing."""
    spread = f"mean over {num_seeds} seeds, band: ± 1 standard deviation" if num_seeds > 1 else "one seed"
    figure.suptitle(f"{title}\n{spread}")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
