"""The same training in several processes, started as torchrun would start them: by environment variables."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import multiprocessing

from tests.trainers.problem import Feature, Result


def train(trainer: str, balancer: str, feature: Feature, batches: Sequence[int]) -> list[Result]:
    """The result of each process, in the order of their ranks."""
    # A server that has imported the trainers forks the processes: neither an import nor a fork of this one's threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainers.matrix"])
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rank}.pt" for rank in range(feature.processes)]
        port = _free_port()
        started = [
            context.Process(target=_run, args=(trainer, balancer, feature, batches, rank, port, path))
            for rank, path in enumerate(paths)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            process.kill()
        codes = [process.exitcode for process in started]
        if any(codes):
            raise RuntimeError(f"{trainer}: the processes ended with {codes}; their errors are on stderr.")
        return [Result(**torch.load(path, weights_only=True)) for path in paths]


def _run(
    trainer: str, balancer: str, feature: Feature, batches: Sequence[int], rank: int, port: int, path: Path
) -> None:
    from tests.trainers.matrix import TRAINERS

    torch.set_num_threads(1)
    count = str(feature.processes)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    # By this Lightning recognises processes that it need not start itself.
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"
    result = TRAINERS[trainer](balancer, feature, batches)
    torch.save(vars(result), path)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
