"""The runs of the study, in several processes, each written down as it ends; what is written down is not run again."""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from rich.progress import track

from example.study.methods import configurations
from example.study.problem import Problem
from example.study.training import Outcome, run

# Used to choose configurations, and for nothing else.
TUNING_SEED = 1000


class Key(NamedTuple):
    """What tells runs apart."""

    problem: str
    schedule: str
    method: str
    configuration: str
    seed: int
    part: str


@dataclass(frozen=True)
class Job:
    """A run to do: the configuration by its number, for only plain data go to another process."""

    problem: Problem
    method: str
    number: int
    seed: int
    part: str

    @property
    def key(self) -> Key:
        """How its result is found again."""
        label = configurations(self.problem, self.method)[self.number].label
        return Key(self.problem.name, self.problem.schedule, self.method, label, self.seed, self.part)


class Results:
    """The results so far, and the file that holds them: a row per run, complete at every moment.

    Args:
        file: read if it exists.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: dict[Key, Outcome] = {}
        if file.exists():
            for row in pd.read_csv(file).to_dict("records"):
                key = Key(*(row[field] for field in Key._fields))
                self.outcomes[key] = Outcome(json.loads(row["metrics"]), row["seconds_per_step"])

    def add(self, key: Key, outcome: Outcome) -> None:
        """Write a result down."""
        self.outcomes[key] = outcome
        rows = [
            {**key._asdict(), "seconds_per_step": known.seconds_per_step, "metrics": json.dumps(known.metrics)}
            for key, known in self.outcomes.items()
        ]
        # A new file takes the old one's place at once: whenever the study is stopped, one of them is whole.
        new = self.file.with_suffix(".new")
        pd.DataFrame(rows).to_csv(new, index=False)
        new.replace(self.file)

    def of(self, job: Job) -> Outcome:
        """The result of a job that is done."""
        return self.outcomes[job.key]


def complete(jobs: Iterable[Job], results: Results, pool: Executor, description: str) -> None:
    """Do what is not done yet.

    Raises:
        MissingDataError: a problem's data are not installed.
    """
    missing = [job for job in jobs if job.key not in results.outcomes]
    futures = {pool.submit(execute, job): job for job in missing}
    try:
        for future in track(as_completed(futures), description, total=len(futures), disable=not futures):
            results.add(futures[future].key, future.result())
    finally:
        for future in futures:
            future.cancel()


def execute(job: Job) -> Outcome:
    """What another process is asked to do."""
    configuration = configurations(job.problem, job.method)[job.number]
    return run(job.problem, job.method, configuration, job.seed, job.part)


def tuning_jobs(problem: Problem, methods: Sequence[str]) -> list[Job]:
    """Every configuration of every method, on the validation part."""
    return [
        Job(problem, method, number, TUNING_SEED, "validation")
        for method in methods
        for number in range(len(configurations(problem, method)))
    ]


def test_jobs(problem: Problem, chosen: Mapping[str, int], seeds: Sequence[int]) -> list[Job]:
    """The chosen configuration of each method, from every seed, on the test part."""
    return [Job(problem, method, number, seed, "test") for method, number in chosen.items() for seed in seeds]
