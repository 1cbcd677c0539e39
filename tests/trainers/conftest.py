"""Quiet trainers, and none of their global state left for the next test."""

import logging
from collections.abc import Iterator

import pytest

from tests.processes.pool import PRELOADED
from tests.trainers import processes

PRELOADED.append("tests.trainers.matrix")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    processes.reset_accelerate()


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True, scope="session")
def _no_process_is_left() -> Iterator[None]:
    yield
    processes.close()
