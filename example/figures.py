"""The figures; without pyplot, which keeps every figure in a global list and may want a display."""

import math
from itertools import cycle
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from example.methods import METHODS
from example.training import TASKS
from mtlwrap import plotting
from mtlwrap.plotting import band, finish

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
    curves: dict[str, dict[str, Any]] = {}
    for (method, task), rows in scores.groupby(["method", "task"], sort=False):
        values = rows.pivot(index="seed", columns="epoch", values="score")
        curves.setdefault(str(method), {})[str(task)] = values.to_numpy().tolist()
    ordered = {method: {task: of[task] for task in TASKS if task in of} for method, of in curves.items()}
    units = {name: task.metric_name for name, task in TASKS.items()}
    title = "Metric on validation flights after each epoch, higher is better"
    return plotting.curves_figure(ordered, units=units, order=list(METHODS), title=title)


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
            values = smooth.loc[method, task].unstack("seed")
            band(axes, values.T.to_numpy().tolist(), values.index.tolist(), label=task, **TASK_STYLES[task])
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
