"""A few processes that stay for the whole test session, joined by gloo on the loopback device."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A test that takes longer has met a hang; the start is slower, where many processes share few cores.
PATIENCE, PATIENCE_AT_START = 90, 300
# What a server imports, of which all processes are forked: importing torch takes longer than any test.
PRELOADED: list[str] = []


def join_gloo(rank: int, size: int, store: str, seconds: float = PATIENCE // 3) -> None:
    """Join the others; ``store`` is a file's name that all of them know, and nobody else."""
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)


def forkserver() -> Any:
    """Multiprocessing's context whose processes are forked of one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # heeded when the server starts, that is the first time
    return context


class Pool:
    """``size`` processes that run the same function, each with its rank.

    Args:
        size: how many.
        join: called in each process as it starts, with its rank, their number and the name of a file.
    """

    def __init__(self, size: int, join: Callable[[int, int, str], None] = join_gloo) -> None:
        self.size = size
        self._join = join
        self._workers: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, size, *args)`` returns in each process; it must lie at the top of a module."""
        outcomes = self.outcomes(function, *args, until_error=True)
        for rank, (_, error) in sorted(outcomes.items()):
            if error is not None:
                self.close()  # the others may wait for it
                raise AssertionError(f"rank {rank} of {self.size}:\n{error}")
        return [value for _, (value, _) in sorted(outcomes.items())]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, until_error: bool = False
    ) -> dict[int, tuple[Any, str | None]]:
        """The same by rank, with the traceback of a process that raised; of all, or until the first of these."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        awaited = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        outcomes: dict[int, tuple[Any, str | None]] = {}
        while awaited and not (until_error and any(error for _, error in outcomes.values())):
            ready = wait(list(awaited), PATIENCE)
            if not ready:
                self.close()
                raise AssertionError(f"ranks {sorted(awaited.values())} hang in {function.__name__}{args}")
            for pipe in ready:
                rank = awaited.pop(pipe)
                try:
                    outcomes[rank] = pipe.recv()
                except EOFError:
                    process, _ = self._workers[rank]
                    process.join()
                    self.close()  # the next test has new ones
                    message = f"rank {rank} ended in {function.__name__}{args}, with the exit code {process.exitcode}"
                    raise AssertionError(message) from None
        return outcomes

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = forkserver()
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(self._join, rank, self.size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for rank, (_, pipe) in enumerate(self._workers):
            if not pipe.poll(PATIENCE_AT_START):
                self.close()
                raise AssertionError(f"rank {rank} of {self.size} does not start")
            pipe.recv()


def _work(join: Callable[[int, int, str], None], rank: int, size: int, store: str, pipe: Any) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    join(rank, size, store)
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(rank, size, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
