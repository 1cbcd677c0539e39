"""The command line: train with every balancer, then print a row for each."""

import argparse
from collections.abc import Sequence
from contextlib import suppress

import torch
from rich.console import Console
from rich.table import Table

from example.data import load
from example.training import BALANCERS, TASKS, Result, fit


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the example with these command-line arguments; returns what the table shows."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    results: list[Result] = []
    with suppress(KeyboardInterrupt):  # the table then shows what there is
        try:
            training, validation = (part.to(options.device) for part in load(options.rows, options.seed))
        except (ModuleNotFoundError, ValueError) as error:
            parser.error(str(error))
        settings = {"epochs": options.epochs, "batch_size": options.batch_size, "seed": options.seed}
        for name in options.balancers:
            results.append(fit(name, training, validation, **settings))
            if results[-1].interrupted:
                break
    console = Console()
    console.print(metrics_table(results, options.epochs))
    console.print(weights_table(results))
    return results


def argument_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser("python -m example", description="Four tasks on flights, under every balancer.")
    parser.add_argument(
        "--balancers",
        nargs="+",
        choices=BALANCERS,
        default=list(BALANCERS),
        metavar="NAME",
        help=f"which to compare, by default all: {', '.join(BALANCERS)}",
    )
    parser.add_argument("--epochs", type=positive, default=5, help="by default %(default)s")
    parser.add_argument("--batch-size", type=positive, default=512, help="by default %(default)s")
    parser.add_argument("--rows", type=positive, default=100_000, help="flights to sample, by default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of sample, initial weights and order")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="by default %(default)s")
    return parser


def positive(text: str) -> int:
    """An option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def metrics_table(results: Sequence[Result], epochs: int) -> Table:
    """How well each balancer did on each task."""
    table = Table("balancer", title="On the validation part")
    for name, task in TASKS.items():
        table.add_column(f"{name}\n{task.metric.__name__}", justify="right")
    table.add_column("ms a step", justify="right")
    for result in results:
        unfinished = f" ({result.epochs} of {epochs} epochs)" if result.interrupted else ""
        scores = [f"{result.metrics[task]:.3f}" if task in result.metrics else "-" for task in TASKS]
        table.add_row(result.name + unfinished, *scores, f"{1000 * result.seconds_per_step:.2f}")
    return table


def weights_table(results: Sequence[Result]) -> Table:
    """With what weight each task's gradient entered the shared gradient in the last step."""
    table = Table("balancer", title="Task weights in the last step")
    for name in TASKS:
        table.add_column(name, justify="right")
    for result in results:
        weights = result.model.task_weights
        table.add_row(result.name, *(["-"] * len(TASKS) if weights is None else [f"{w:.3f}" for w in weights.tolist()]))
    return table


if __name__ == "__main__":
    # As fast as two for steps as small as these; on a busy machine two are far slower.
    torch.set_num_threads(1)
    main()
