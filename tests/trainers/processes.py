"""The same training in several processes, started as torchrun would start them: by environment variables."""

import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from tests.processes.pool import Pool
from tests.trainers.problem import Feature, Result

# By name those that were begun, and that stay: what they run joins them itself.
_POOLS: dict[str, Pool] = {}


def run(name: str, count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, count, *args)`` returns in each of the processes of a name."""
    if name not in _POOLS:
        _POOLS[name] = Pool(count, partial(_as_torchrun, _free_port()))
    return _POOLS[name].run(function, *args)


def train(trainer: str, balancer: str, feature: Feature, batches: Sequence[int]) -> list[Result]:
    """The result of each process, in the order of their ranks."""
    return run(trainer, feature.processes, _train, trainer, balancer, feature, batches)


def close() -> None:
    """End all processes."""
    while _POOLS:
        _POOLS.popitem()[1].close()


def reset_accelerate() -> None:
    """Forget the global state of a training."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _train(rank: int, size: int, trainer: str, balancer: str, feature: Feature, batches: Sequence[int]) -> Result:
    from tests.trainers.matrix import TRAINERS

    reset_accelerate()
    return TRAINERS[trainer](balancer, feature, batches)


def _as_torchrun(port: int, rank: int, size: int, store: str) -> None:
    """What it puts into the environment; the trainers join the processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # By this Lightning recognises processes that it need not start itself.
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
