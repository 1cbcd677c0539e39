"""The comparison: train with every method from every seed, then print a table and draw the figures."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console

from example.data import Flights, load
from example.figures import curves_figure, weights_figure
from example.methods import BASELINE, METHODS
from example.options import argument_parser
from example.results import Run, final_metrics, scores_frame, summarise, weights_frame
from example.tables import results_table
from example.training import fit
from mtlwrap.report import Run as Details
from mtlwrap.report import write_report

CAPTION = (
    "Metrics: mean over the seeds, higher is better. Δm: by how much the metrics are better than under single-task "
    "training from the same seed, relative, mean over the tasks; SD: its standard deviation over the seeds. "
    "ms a step: median; of all its networks together for single-task training."
)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the example with these command-line arguments; returns what the table and the figures show."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    # Ctrl-C is no error, but ignite would log it as one. Whatever else goes wrong is raised all the same.
    logging.getLogger("ignite").addHandler(logging.NullHandler())
    console = Console(highlight=False)
    runs: list[Run] = []
    try:
        for seed in dict.fromkeys(options.seeds):
            training, validation = flights(parser, options, seed)
            # In this order, what the others are measured against comes first, whatever is interrupted.
            for name in METHODS:
                if name in options.balancers:
                    runs += train(name, seed, training, validation, options)
    except KeyboardInterrupt:
        console.print("Interrupted. What follows is of the trainings that were finished.")
    report(runs, options.output, console)
    if options.report:
        write_reports([run for run in runs if run.seed == options.seeds[0]], options, console)
    return runs


def flights(parser: argparse.ArgumentParser, options: argparse.Namespace, seed: int) -> list[Flights]:
    """The training part and the validation part, on the device."""
    try:
        return [part.to(options.device) for part in load(options.rows, seed)]
    except (ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))


def train(name: str, seed: int, training: Flights, validation: Flights, options: argparse.Namespace) -> list[Run]:
    """Train all networks of one method from one seed."""
    method = METHODS[name]
    runs = []
    for number, tasks in enumerate(method.groups, start=1):
        trained = fit(
            tasks,
            method.balancer(),
            training,
            validation,
            balancer_lr=method.balancer_lr,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=seed,
            description=f"seed {seed}, {name} {number}/{len(method.groups)}",
            folder=run_folder(options, name) if options.report and seed == options.seeds[0] else None,
        )
        runs.append(Run(name, seed, trained))
    return runs


def run_folder(options: argparse.Namespace, method: str) -> Path | None:
    """Where a balancer's statistics go; a task that is trained alone disagrees with nobody."""
    folder: Path = options.output / "runs" / method
    return None if method == BASELINE else folder


def write_reports(runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """A page for each balancer, in its run folder."""
    single = {task: of for run in runs if run.method == BASELINE for task, of in final_metrics(run).items()}
    plain = next((median(run.trained.seconds) for run in runs if run.method == "equal"), None)
    for run in runs:
        folder = run_folder(options, run.method)
        if folder is not None:
            balancer = f"{run.method} ({type(run.trained.model.balancer).__name__})"
            metrics, seconds = final_metrics(run), median(run.trained.seconds)
            higher_is_better = {name: True for of_task in metrics.values() for name in of_task}
            Details(balancer, metrics, single, higher_is_better, seconds, plain).save(folder)
            console.print(
                f"What the tasks did to each other under {run.method}: {write_report(folder)}", soft_wrap=True
            )


def report(runs: Sequence[Run], output: Path, console: Console) -> None:
    """Print the table, write the numbers and draw the figures."""
    if not runs:
        console.print("No training was finished: there is nothing to show.")
        return
    scores, weights = scores_frame(runs), weights_frame(runs)
    summary = summarise(scores)
    console.print(results_table(summary), CAPTION)
    if summary["change"].isna().any():
        console.print(f"There is no Δm, because single-task training ('{BASELINE}') was not chosen or not finished.")
    scores.to_csv(output / "results.csv", index=False)
    weights.to_csv(output / "weights.csv", index=False)
    curves_figure(scores).savefig(output / "curves.png")
    (output / "weights.png").unlink(missing_ok=True)  # it could be an earlier run's
    if len(weights):
        weights_figure(weights).savefig(output / "weights.png")
    console.print(f"Figures and numbers are in {output}.", soft_wrap=True)
