"""What a training step costs, in time and in memory, over a plain ``sum(losses).backward()``.

Run it with ``python -m tests.benchmarks.step_time``; ``--help`` lists the options. A step is forward, losses and
backward. In each round every contender runs one step, in random order, and its time is divided by that of the plain
step of the same round; the table shows the median of these ratios. So what slows down the machine for a while slows
down both. Who takes more than 3 times as long as the plain step runs in 2 rounds only. Python's garbage collector is
off in a round. ``--baseline`` puts another in the plain step's place: ``--baseline torchjd:IMTLG --contenders
IMTLG-parameters`` compares the two ways to gradients on the shared parameters.

Memory is the peak of what torch allocates in a step, minus that of the plain step, in multiples of the gradient of one
task on the representation z. A gradient balancer must hold one of these per task at once; its bar is T and a tenth.
"""

import argparse
import csv
import gc
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tests.benchmarks.contenders import Contender, contenders
from tests.benchmarks.measuring import Result, measure
from tests.benchmarks.problems import PROBLEMS, build

_TASKS = (2, 4, 8, 16)
_MANY_TASKS = (2, 8, 32, 128, 1000)
_QUICK_TASKS = (3,)
# Fewer where a step is long.
_ROUNDS = {"conv": 7, "dense": 3, "transformer": 7, "many": 7}
_QUICK_ROUNDS = 2
_WIDTH = 180
_COLUMNS = (
    "problem",
    "tasks",
    "contender",
    "device",
    "threads",
    "torch",
    "rounds",
    "milliseconds",
    "ratio",
    "ratio_lower_quartile",
    "ratio_upper_quartile",
    "peak_bytes",
    "extra_bytes",
    "gradient_bytes",
    "extra_per_gradient",
    "reason",
)


@dataclass(frozen=True)
class Outcome:
    """What came out on one problem.

    Attributes:
        problem: its name.
        results: for each number of tasks, those of the contenders, in order.
        rotated: what of z the contenders that rotate it have rotated.
        baseline: who they were compared with.
    """

    problem: str
    results: dict[int, list[Result]]
    rotated: str
    baseline: str

    def rows(self) -> Iterable[tuple[str, list[Result]]]:
        """For each contender its name and its results, one per number of tasks."""
        for of_contender in zip(*self.results.values(), strict=True):
            yield of_contender[0].contender, list(of_contender)


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Run the benchmark with these command-line arguments; returns what the tables show."""
    options = _argument_parser().parse_args(arguments)
    console = Console()
    if console.width < _WIDTH:
        console = Console(width=_WIDTH)  # a log has no width of its own, and a table that is cut off is of no use
    console.print(_surroundings(options), highlight=False)
    outcomes: list[Outcome] = []
    with _settings(options.threads), suppress(KeyboardInterrupt):  # what is done stays done
        for name in options.problems:
            outcomes.append(_run(name, options))
            _show(console, outcomes[-1])
    if options.csv is not None:
        _write(options.csv, outcomes, options)
    return outcomes


@contextmanager
def _settings(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # What was imported is not looked through again in each of the many collections between the steps.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def _argument_parser() -> argparse.ArgumentParser:
    names = [contender.name for contender in contenders()]
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.step_time", description="Time and memory of a training step, over a plain sum."
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="by default %(default)s")
    parser.add_argument(
        "--rounds", type=_positive, help=f"by default {_by_problem(_ROUNDS)}; with --quick {_QUICK_ROUNDS}"
    )
    parser.add_argument("--warmup", type=_positive, default=1, help="rounds that do not count, by default %(default)s")
    parser.add_argument(
        "--tasks",
        type=_positive,
        nargs="+",
        metavar="T",
        help=f"by default {_listed(_TASKS)}, and {_listed(_MANY_TASKS)} for the problem many",
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="by default all")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"by default all: {_listed(names)}; the baseline always runs",
    )
    parser.add_argument(
        "--baseline", choices=names, default="plain", metavar="NAME", help="compared with whom, by default plain"
    )
    parser.add_argument("--threads", type=_positive, default=1, help="of torch on the CPU, by default %(default)s")
    parser.add_argument(
        "--csv",
        type=Path,
        nargs="?",
        const=Path("step_time.csv"),
        metavar="FILE",
        help="write all results there; without a name to %(const)s",
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that everything runs")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _by_problem(values: dict[str, object]) -> str:
    return _listed(f"{value} for {name}" for name, value in values.items())


def _surroundings(options: argparse.Namespace) -> str:
    device: torch.device = options.device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    libraries = ", ".join(f"{name} {_version(name)}" for name in ("torch", "mtlwrap", "torchjd", "rotograd"))
    return f"{libraries}; {device}: {on}; threads: {options.threads}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _run(name: str, options: argparse.Namespace) -> Outcome:
    chosen = _chosen(options.contenders, options.baseline)
    rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS[name])
    results = {}
    for num_tasks in options.tasks or (_QUICK_TASKS if options.quick else _MANY_TASKS if name == "many" else _TASKS):
        problem = build(name, num_tasks, options.device, options.quick)
        # disable=None: no bar where there is no terminal
        with tqdm(total=rounds * len(chosen), desc=f"{name}, T = {num_tasks}", disable=None, leave=False) as progress:
            results[num_tasks] = measure(problem, chosen, rounds, options.warmup, progress.update)
    return Outcome(name, results, problem.rotation.words, options.baseline)


def _chosen(names: Sequence[str], baseline: str) -> list[Contender]:
    """The baseline, then the others in the usual order."""
    known = {contender.name: contender for contender in contenders()}
    return [known[baseline], *(known[name] for name in known if name in names and name != baseline)]


# ----------------------------------------------------------------------------------------------------------- tables


def _show(console: Console, outcome: Outcome) -> None:
    console.print(f"\n{outcome.problem}: {PROBLEMS[outcome.problem].__doc__}", highlight=False, markup=False)
    over = f"over that of {outcome.baseline}"
    console.print(f"\n{outcome.problem}: time of a step {over}, median and quartiles, and median in ms")
    console.print(_table(outcome, _time))
    console.print(f"{outcome.problem}: peak memory {over}, in gradients on z, and the peak in bytes")
    console.print(_table(outcome, _memory))
    for line in _notes(outcome):
        console.print(line, highlight=False)


def _table(outcome: Outcome, cell: Callable[[Result], str]) -> Table:
    table = Table()
    table.add_column("contender", no_wrap=True)
    for num_tasks in outcome.results:
        table.add_column(f"T = {num_tasks}", justify="right", no_wrap=True)
    for name, results in outcome.rows():
        table.add_row(name, *("-" if result.reason else cell(result) for result in results))
    return table


def _time(result: Result) -> str:
    low, high = result.quartiles
    return f"{result.ratio:.2f} ({low:.2f}-{high:.2f}) {_short(result.milliseconds)} ms"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _memory(result: Result) -> str:
    over = "!" if result.ours and not result.within_bar else ""
    return f"{over}{result.copies:+.2f}  {result.peak:,} B"


def _notes(outcome: Outcome) -> list[str]:
    """What the tables do not say by themselves."""
    everything = [result for results in outcome.results.values() for result in results]
    sizes = _listed(f"{results[0].gradient:,} for T = {num_tasks}" for num_tasks, results in outcome.results.items())
    over = _listed(
        f"{r.contender} at T = {r.num_tasks}" for r in everything if r.ours and not r.reason and not r.within_bar
    )
    notes = [f"One gradient on z has these bytes: {sizes}.", f"Over the bar of 1.1 T (marked !): {over or 'none'}."]
    if any("Roto" in r.contender and not r.reason for r in everything):
        notes.append(f"RotoGrad rotates {outcome.rotated}.")
    reasons: dict[str, list[int]] = {}
    for result in everything:
        if result.reason:
            reasons.setdefault(f"{result.contender}: {result.reason}", []).append(result.num_tasks)
    notes += [f"- {reason} (T = {_listed(numbers)})" for reason, numbers in reasons.items()]
    return notes


# -------------------------------------------------------------------------------------------------------------- csv


def _write(path: Path, outcomes: Sequence[Outcome], options: argparse.Namespace) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for outcome in outcomes:
            for results in outcome.results.values():
                for result in results:
                    where = [outcome.problem, result.num_tasks, result.contender]
                    on = [options.device, options.threads, torch.__version__]
                    writer.writerow([*where, *on, *_numbers(result), result.reason])


def _numbers(result: Result) -> list[object]:
    if result.reason:
        return [""] * 9
    numbers: list[object] = [len(result.seconds), result.milliseconds, result.ratio, *result.quartiles]
    return [*numbers, result.peak, result.extra, result.gradient, result.copies]


if __name__ == "__main__":
    main()
