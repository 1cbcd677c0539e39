"""The bookkeeping: what the trainings came to, as data frames, and each method's summary over the seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import pandas as pd
import torch

from example.methods import BASELINE
from example.training import TASKS, Trained


@dataclass(frozen=True)
class Run:
    """One network that was trained to the end: for which method, from which seed, and what came of it."""

    method: str
    seed: int
    trained: Trained


def final_metrics(run: Run) -> dict[str, dict[str, float]]:
    """The metrics after the last epoch, by task and then by name."""
    return {task: {TASKS[task].metric_name: score} for task, score in run.trained.scores[-1].items()}


def scores_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per method, seed, task and epoch, with the metric and the network's median time for a step.

    ``network`` names the tasks that shared the network.
    """
    columns = ["method", "seed", "network", "task", "epoch", "score", "seconds_per_step"]
    rows = [
        (run.method, run.seed, "+".join(run.trained.model.tasks), task, epoch, score, median(run.trained.seconds))
        for run in runs
        for epoch, scores in enumerate(run.trained.scores, start=1)
        for task, score in scores.items()
    ]
    return pd.DataFrame(rows, columns=columns)


def weights_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per method, seed and step, with each task's weight; a task alone in its network is not weighed."""
    frames = [pd.DataFrame(columns=["method", "seed", "step", *TASKS])]
    for run in runs:
        tasks, weights = run.trained.model.tasks, run.trained.weights
        if len(tasks) > 1 and weights:
            # One transfer from the device, after the training.
            frame = pd.DataFrame(torch.stack(weights).cpu().numpy(), columns=list(tasks))
            frames.append(frame.assign(method=run.method, seed=run.seed, step=frame.index + 1))
    # The empty one is there for when it is the only one; it has no types.
    return pd.concat(frames[1:] or frames, ignore_index=True).reindex(columns=frames[0].columns)


def final_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """The metrics after the last epoch: a row per method and seed, in the order they came, a column per task."""
    last = scores[scores["epoch"] == scores["epoch"].max()]
    order = pd.MultiIndex.from_frame(last[["method", "seed"]].drop_duplicates())
    table: pd.DataFrame = last.pivot(index=["method", "seed"], columns="task", values="score")
    return table.reindex(index=order, columns=list(TASKS))


def relative_change(final: pd.DataFrame) -> "pd.Series[float]":
    r"""Δm in percent: how much better than trained alone the tasks are on average; a number per method and seed.

    :math:`\Delta m = \frac{1}{T} \sum_t (M_t - S_t) / |S_t|`, for metrics that are better when higher. Method and
    single-task training are compared under the same seed, for a seed also draws the flights. NaN where that seed has
    no single-task training.
    """
    alone = final[final.index.get_level_values("method") == BASELINE].droplevel("method")
    reference = alone.reindex(final.index.get_level_values("seed")).set_axis(final.index)
    return 100 * ((final - reference) / reference.abs()).mean(axis="columns", skipna=False)


def step_seconds(scores: pd.DataFrame) -> "pd.Series[float]":
    """The time for a step of all networks of a method, each the median over the seeds."""
    networks = scores.drop_duplicates(["method", "seed", "network"])
    medians = networks.groupby(["method", "network"])["seconds_per_step"].median()
    return medians.groupby("method").sum()


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """A row per method, in the order they came: mean metrics, mean and deviation of Δm, seconds per step, seeds.

    The deviation is that of a sample, and NaN for one seed.
    """
    final = final_scores(scores)
    change = relative_change(final).groupby("method")
    summary = final.groupby("method", sort=False).mean()
    return summary.assign(
        change=change.mean(), deviation=change.std(), seconds=step_seconds(scores), seeds=change.size()
    )
