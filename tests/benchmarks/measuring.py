"""Time and peak memory of the steps of several contenders on one problem."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.contenders import CannotRunError, Contender, Runner
from tests.benchmarks.problems import Problem

# A contender whose step takes this many times as long as the first one's runs in the first rounds only: there is no
# doubt about its ratio, and it would take most of the benchmark's time.
SLOW = 3.0
ROUNDS_OF_THE_SLOW = 2


@dataclass(frozen=True)
class Result:
    """What came out for a contender: either all of it, or the reason why there is nothing.

    Attributes:
        contender: the row.
        ours: whether it is a balancer of mtlwrap.
        num_tasks: the number of tasks.
        seconds: the times of its steps.
        ratios: those times over the baseline's of the same round.
        peak: bytes in use at the peak of a step, beyond what was in use when it began.
        extra: by how much that is more than the baseline's.
        gradient: bytes of the gradient of one task on z.
        reason: why it did not run.
    """

    contender: str
    ours: bool
    num_tasks: int
    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    peak: int = 0
    extra: int = 0
    gradient: int = 1
    reason: str | None = None

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the ratios lie between these."""
        if len(self.ratios) < 2:
            return self.ratio, self.ratio
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def copies(self) -> float:
        """The extra memory, in gradients of one task on z."""
        return self.extra / self.gradient

    @property
    def within_bar(self) -> bool:
        """Whether the extra memory is at most one such gradient per task, and a tenth."""
        return self.copies <= 1.1 * self.num_tasks


def measure(
    problem: Problem, contenders: Sequence[Contender], rounds: int, warmup: int, on_step: Callable[[], None]
) -> list[Result]:
    """One result per contender, in order; the first is the one that the others are compared with.

    Args:
        problem: what they run on.
        contenders: who runs.
        rounds: in each, every contender runs one step, in random order.
        warmup: rounds before these that do not count.
        on_step: called after each step that was timed, or left out.
    """
    runners, warm, reasons = _prepare(problem, contenders, warmup)
    baseline = contenders[0].name
    slow = {name for name, seconds in warm.items() if seconds > SLOW * warm[baseline]}
    times: dict[str, list[float]] = {name: [] for name in runners}
    shuffler = random.Random(problem.num_tasks)
    for number in range(rounds):
        order = list(runners)
        shuffler.shuffle(order)
        with _without_collector():
            for name in order:
                if number < ROUNDS_OF_THE_SLOW or name not in slow:
                    times[name].append(timed(runners[name], problem.device))
        for _ in contenders:
            on_step()
    peaks = {name: peak_memory(runner, problem.device) for name, runner in runners.items()}
    return [_result(problem, contender, baseline, times, peaks, reasons) for contender in contenders]


def _prepare(
    problem: Problem, contenders: Sequence[Contender], warmup: int
) -> tuple[dict[str, Runner], dict[str, float], dict[str, str]]:
    """Those that can run, the times of their last steps, and the reasons of those that cannot."""
    runners, warm, reasons = {}, {}, {}
    for contender in contenders:
        try:
            runner = contender.prepare(problem)
            for _ in range(warmup):
                warm[contender.name] = timed(runner, problem.device)
        except CannotRunError as reason:
            reasons[contender.name] = str(reason)
        except torch.OutOfMemoryError:
            reasons[contender.name] = "out of memory"
        else:
            runners[contender.name] = runner
    return runners, warm, reasons


def _result(
    problem: Problem,
    contender: Contender,
    baseline: str,
    times: dict[str, list[float]],
    peaks: dict[str, int],
    reasons: dict[str, str],
) -> Result:
    name = contender.name
    if name in reasons:
        return Result(name, contender.ours, problem.num_tasks, reason=reasons[name])
    ratios = tuple(own / plain for own, plain in zip(times[name], times[baseline], strict=False))
    extra = peaks[name] - peaks[baseline]
    seconds, gradient = tuple(times[name]), problem.gradient_bytes()
    return Result(name, contender.ours, problem.num_tasks, seconds, ratios, peaks[name], extra, gradient)


def timed(runner: Runner, device: torch.device) -> float:
    """The seconds that a step takes, from gradients of None; on an accelerator, until it is done."""
    seconds = 0.0
    for _ in range(runner.steps):
        runner.clear()
        _synchronize(device)
        start = time.perf_counter()
        runner.step()
        _synchronize(device)
        seconds += time.perf_counter() - start
    return seconds / runner.steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _without_collector() -> Iterator[None]:
    """The collector would run in the step of whoever happens to allocate the object that is one too many."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def peak_memory(runner: Runner, device: torch.device) -> int:
    """Bytes that torch has in use at the peak of a step, beyond those in use when it begins."""
    runner.clear()
    gc.collect()
    measured = _peak_on_cuda if device.type == "cuda" else _peak_on_cpu
    peak = measured(runner.step, device)
    runner.clear()
    return peak


def _peak_on_cuda(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(step: Callable[[], None], device: torch.device) -> int:
    """Exact: the profiler sees each allocation and each release of torch's allocator, to the byte.

    What libraries below torch allocate for themselves it does not see, nor the release of what was there before the
    step began; a step that replaces something old is charged with the new.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each start and stop of the profiler is announced on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # The profiler's own list: its tables attribute the bytes to operators, where the order is lost.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
