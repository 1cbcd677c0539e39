"""The flights of the plain example: one rare class and three regressions, with labels missing where none can be."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from example.data import load as load_flights
from example.study.problem import BINARY, REGRESSION, Data, MissingDataError, Part, Problem

ROWS, SAMPLE_SEED, WIDTH = 40_000, 0, 64


@cache
def load() -> Data:
    """80 % to learn from, the rest in two halves. The flights of one day are in all three.

    Raises:
        MissingDataError: the package with the flights is not installed.
    """
    try:
        training, rest = load_flights(ROWS, SAMPLE_SEED)
    except ModuleNotFoundError as error:
        raise MissingDataError(str(error)) from error
    remaining = Part(rest.features, rest.labels)
    halves = torch.arange(len(remaining)).chunk(2)
    return Data(Part(training.features, training.labels), *(remaining[half] for half in halves))


def backbone() -> nn.Module:
    """Two linear layers; the first finds out how many features there are."""
    return nn.Sequential(nn.LazyLinear(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())


def rare_class_up(_: Part) -> Sequence[Sequence[float]]:
    """Cancelled flights are rare, which makes their loss small."""
    return [[weight, 1.0, 1.0, 1.0] for weight in (3.0, 10.0)]


_TASKS = {"cancelled": BINARY, "dep_delay": REGRESSION, "arr_delay": REGRESSION, "air_time": REGRESSION}
FLIGHTS = Problem("flights", _TASKS, load, backbone, WIDTH, 4, 1024, 1e-2, rare_class_up)
