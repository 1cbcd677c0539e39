"""The command line's options, each refused at once if it cannot be."""

import argparse

import torch

from example.methods import BASELINE, METHODS
from example.output import folder


def argument_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m example",
        description="Four tasks on flights, under several balancers and each alone. Ctrl-C ends it with what it has.",
        epilog="python -m example toy: two tasks on a representation of two numbers, as an animation. "
        "python -m example study: every balancer on several problems, all tuned alike.",
    )
    add = parser.add_argument
    add(
        "--balancers",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"by default all: {', '.join(METHODS)}; '{BASELINE}' trains each task alone",
    )
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="SEED", help="by default 0 1 2")
    add("--epochs", type=positive, default=4, metavar="N", help="by default %(default)s")
    add("--batch-size", type=positive, default=512, metavar="N", help="by default %(default)s")
    add("--rows", type=positive, default=40_000, metavar="N", help="flights to draw, by default %(default)s")
    add("--device", type=device, default="cpu", help="by default %(default)s")
    add(
        "--output",
        type=folder,
        default="example-results",
        metavar="FOLDER",
        help="where curves.png, weights.png, results.csv and weights.csv go; by default %(default)s",
    )
    add(
        "--report",
        action="store_true",
        help="also write, of the first seed, a run folder per balancer, FOLDER/runs/NAME, with report.html: which "
        "tasks conflict, and what the balancer did; the time of a step then includes the statistics",
    )
    return parser


def positive(text: str) -> int:
    """A number of things."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def seed(text: str) -> int:
    """A seed that both torch and pandas take."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {2**32 - 1}, got {text}")
    return number


def device(text: str) -> torch.device:
    """A device that is there and computes."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has no one error for it
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise argparse.ArgumentTypeError(f"cannot compute on {text!r}: {reason}") from error
    return torch.device(text)
