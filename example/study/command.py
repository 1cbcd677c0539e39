"""``python -m example study``: its options, and its course."""

import argparse
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console

from example.options import positive, seed
from example.output import folder
from example.study.methods import SETTINGS, SINGLE
from example.study.problem import MissingDataError, Problem
from example.study.problems import PROBLEMS
from example.study.report import write_report
from example.study.runs import TUNING_SEED, Results, complete, test_jobs, tuning_jobs
from example.study.summary import Findings, choose, metrics_frame, seconds, tried
from example.study.training import norm_ratio


def argument_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m example study",
        description="Every balancer on five problems, tuned alike, from several seeds. It goes on where it stopped.",
    )
    add = parser.add_argument
    add("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME", help=_listed(PROBLEMS))
    add("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help=_listed(SETTINGS))
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED", help="by default 0 1 2 3 4")
    add("--workers", type=positive, default=2, metavar="N", help="processes of one thread, by default %(default)s")
    add(
        "--output",
        type=folder,
        default="study-results",
        metavar="FOLDER",
        help="where results.csv, table.md and the figures go, and what is done is found; by default %(default)s",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> str:
    """Run what is missing and write the report; returns its text."""
    options = argument_parser().parse_args(arguments)
    chosen = {name: PROBLEMS[name] for name in dict.fromkeys(options.problems)}
    # What the others are measured against is always there.
    methods = [method for method in SETTINGS if method in options.methods or method == SINGLE]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(options.workers, mp_context=context, initializer=one_thread) as pool:
            return study(chosen, methods, list(dict.fromkeys(options.seeds)), options.output, pool)
    except KeyboardInterrupt:
        print(f"Stopped. What is done is in {options.output}; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)  # as a shell says of what Ctrl-C ended


def one_thread() -> None:
    """What makes a run give the same numbers whenever and beside whatever it runs."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def study(
    problems: Mapping[str, Problem], methods: Sequence[str], seeds: Sequence[int], out: Path, pool: Executor
) -> str:
    """Tune, run and report problem by problem; a problem whose data are missing is left out, and said to be."""
    console = Console(highlight=False)
    results = Results(out / "results.csv")
    findings: dict[str, Findings] = {}
    text = "There is nothing to report."
    for name, problem in problems.items():
        try:
            findings[name] = investigate(problem, methods, seeds, results, pool)
        except MissingDataError as error:
            console.print(f"'{name}' is left out. {error}", soft_wrap=True, markup=False)
            continue
        # Again after every problem: what is finished can be read while the others run.
        text = write_report(out, findings, len(seeds))
    console.print(text, markup=False, soft_wrap=True)
    if findings:
        console.print(f"Table, figures and results are in {out}.", soft_wrap=True)
    return text


def investigate(
    problem: Problem, methods: Sequence[str], seeds: Sequence[int], results: Results, pool: Executor
) -> Findings:
    """Tune every method on a problem, then test it.

    Raises:
        MissingDataError: the problem's data are not installed.
    """
    complete(tuning_jobs(problem, methods), results, pool, f"{problem.name}: tuning")
    scores = tried(problem, methods, results)
    jobs = test_jobs(problem, choose(scores), seeds)
    complete(jobs, results, pool, f"{problem.name}: test")
    ratio = pool.submit(norm_ratio, problem, TUNING_SEED).result()
    return Findings(problem, scores, choose(scores), metrics_frame(jobs, results), seconds(jobs, results), ratio)


def _listed(names: Mapping[str, object]) -> str:
    return "by default all: " + "; ".join(names)
