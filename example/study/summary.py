"""From results to numbers: what is chosen, Δm, ranks and differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from example.study.methods import EQUAL, SINGLE
from example.study.problem import Problem
from example.study.runs import Job, Results, tuning_jobs

# For each method Δm of every configuration on the validation part, by the configuration's number.
Scores = Mapping[str, "pd.Series[float]"]


@dataclass(frozen=True)
class Findings:
    """What came out for a problem.

    Attributes:
        problem: the problem.
        tried: of all configurations.
        chosen: for each method the number of its configuration.
        metrics: a row per method and seed, a column per task.
        seconds: of a step, for each method.
        norm_ratio: of the tasks' gradients in a new network.
    """

    problem: Problem
    tried: Scores
    chosen: Mapping[str, int]
    metrics: pd.DataFrame
    seconds: "pd.Series[float]"
    norm_ratio: float


def change(metrics: pd.DataFrame, reference: "pd.Series[float]") -> "pd.Series[float]":
    """Δm in percent, for each row: by how much metrics that are better when higher are better; mean over the tasks."""
    return 100 * ((metrics - reference) / reference.abs()).mean(axis="columns")


def tried(problem: Problem, methods: Sequence[str], results: Results) -> Scores:
    """Δm of what was tried, against the tasks trained alone by the configuration with the best mean of the metrics."""
    metrics = {
        method: pd.DataFrame([results.of(job).metrics for job in tuning_jobs(problem, [method])]) for method in methods
    }
    alone = metrics[SINGLE]
    reference = alone.iloc[int(alone.mean(axis="columns").to_numpy().argmax())]
    return {method: change(of_method, reference) for method, of_method in metrics.items()}


def choose(scores: Scores) -> dict[str, int]:
    """For each method the number of the best configuration."""
    return {method: int(of_method.to_numpy().argmax()) for method, of_method in scores.items()}


def metrics_frame(jobs: Sequence[Job], results: Results) -> pd.DataFrame:
    """A row per method and seed, a column per task."""
    return pd.DataFrame([results.of(job).metrics for job in jobs], index=_index(jobs))


def seconds(jobs: Sequence[Job], results: Results) -> "pd.Series[float]":
    """The time of each method's step, the median over the seeds."""
    steps = pd.Series([results.of(job).seconds_per_step for job in jobs], index=_index(jobs))
    return steps.groupby("method").median()


def _index(jobs: Sequence[Job]) -> pd.MultiIndex:
    return pd.MultiIndex.from_tuples([(job.method, job.seed) for job in jobs], names=["method", "seed"])


def changes(metrics: pd.DataFrame) -> pd.DataFrame:
    """Δm for each method (a row) and seed (a column), against the mean of single-task training over the seeds."""
    reference = metrics.groupby("method").mean().T[SINGLE]
    return change(metrics, reference).unstack("seed").reindex(metrics.index.unique("method"))


def difference(changes: pd.DataFrame, method: str, other: str) -> tuple[float, float]:
    """By how much a method's Δm exceeds another's, and its standard error, from the differences seed by seed."""
    differences = changes.loc[method].to_numpy() - changes.loc[other].to_numpy()
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return float(differences.mean()), float(error)


def ranks(metrics: pd.DataFrame) -> "pd.Series[float]":
    """Each method's place among all, 1 for the best; mean over tasks and seeds."""
    return metrics.groupby("seed").rank(ascending=False).groupby("method").mean().mean(axis="columns")


def summarise(findings: Findings) -> pd.DataFrame:
    """A row per method: mean metrics, Δm with standard deviation and error, rank, a step's time over equal's."""
    of_seeds = changes(findings.metrics)
    return (
        findings.metrics.groupby("method", sort=False)
        .mean()
        .assign(
            change=of_seeds.mean(axis="columns"),
            deviation=of_seeds.std(axis="columns"),
            error=of_seeds.sem(axis="columns"),
            rank=ranks(findings.metrics),
            time=findings.seconds / findings.seconds.get(EQUAL, math.nan),
        )
    )
