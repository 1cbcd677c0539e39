"""From results to numbers: what is chosen, Δm, ranks and differences."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from example.study.methods import EQUAL, SINGLE
from example.study.problem import Problem
from example.study.runs import Job, Results, test_jobs, tuning_jobs


def change(metrics: pd.DataFrame, reference: "pd.Series[float]") -> "pd.Series[float]":
    """Δm in percent, for each row: by how much metrics that are better when higher are better; mean over the tasks."""
    return 100 * ((metrics - reference) / reference.abs()).mean(axis="columns")


def choose(problem: Problem, methods: Sequence[str], results: Results) -> dict[str, int]:
    """For each method the number of the configuration with the best Δm on the validation part.

    Δm is taken against the tasks trained alone, by the configuration with the best mean of the metrics.
    """
    return {method: int(scores.to_numpy().argmax()) for method, scores in tried(problem, methods, results).items()}


def tried(problem: Problem, methods: Sequence[str], results: Results) -> dict[str, "pd.Series[float]"]:
    """For each method Δm of every configuration on the validation part, by the configuration's number."""
    metrics = {method: validation_metrics(problem, method, results) for method in methods}
    alone = metrics[SINGLE]
    reference = alone.iloc[int(alone.mean(axis="columns").to_numpy().argmax())]
    return {method: change(of_method, reference) for method, of_method in metrics.items()}


def validation_metrics(problem: Problem, method: str, results: Results) -> pd.DataFrame:
    """A row per configuration that was tried, a column per task."""
    return pd.DataFrame([results.of(job).metrics for job in tuning_jobs(problem, [method])])


def metrics_frame(jobs: Sequence[Job], results: Results) -> pd.DataFrame:
    """A row per method and seed, a column per task."""
    index = pd.MultiIndex.from_tuples([(job.method, job.seed) for job in jobs], names=["method", "seed"])
    return pd.DataFrame([results.of(job).metrics for job in jobs], index=index)


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


def summarise(problem: Problem, chosen: Mapping[str, int], seeds: Sequence[int], results: Results) -> pd.DataFrame:
    """A row per method: mean metrics, Δm with standard deviation and error, rank, a step's time over equal's."""
    jobs = test_jobs(problem, chosen, seeds)
    metrics = metrics_frame(jobs, results)
    of_seeds = changes(metrics)
    seconds = pd.Series([results.of(job).seconds_per_step for job in jobs], index=metrics.index)
    medians = seconds.groupby("method").median()
    summary = metrics.groupby("method", sort=False).mean()
    return summary.assign(
        change=of_seeds.mean(axis=1),
        deviation=of_seeds.std(axis=1),
        error=of_seeds.sem(axis=1),
        rank=ranks(metrics),
        time=medians / medians.get(EQUAL, float("nan")),
    )
