"""What was recorded of a training: one row per interval of steps, in the columns of mtlwrap.ignite's statistics."""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

Columns: TypeAlias = Mapping[str, Sequence[float]]
# Rows, columns, or a table with columns (a pandas DataFrame).
Recorded: TypeAlias = "Records | Sequence[Mapping[str, Any]] | Columns | Any"
_PER_TASK = ("loss", "weight", "norm")
_SHARES = ("conflicts", "nonfinite")


@dataclass(frozen=True)
class Records:
    """The statistics of a training, as numbers; NaN for what an interval did not have.

    Rows have a ``step``, and what :class:`mtlwrap.ignite.BalancerStatistics` computes: ``loss/<task>``,
    ``weight/<task>``, ``norm/<task>``, ``cosine/<a>/<b>``, ``conflicts``. Any may be missing; a tag in front, as
    loggers write it (``training/loss/<task>``), is taken off; other columns are ignored.

    Attributes:
        steps: the last step of every interval.
        tasks: the tasks' names, in the order in which they came.
        losses, weights, norms: for each task that has any, a number per interval.
        cosines: for each pair of tasks that has any, likewise.
        conflicts: the fraction of each interval's steps in which some tasks' gradients opposed each other; or empty.
        nonfinite: the fraction in which some task's gradient was not finite; or empty.

    Example:
        >>> rows = [{"step": 1, "weight/a": 0.5, "weight/b": 0.5, "cosine/a/b": -0.25}]
        >>> records = Records.of(rows)
        >>> records.tasks, records.cosines
        (('a', 'b'), {('a', 'b'): [-0.25]})
    """

    steps: list[float]
    tasks: tuple[str, ...]
    losses: dict[str, list[float]]
    weights: dict[str, list[float]]
    norms: dict[str, list[float]]
    cosines: dict[tuple[str, str], list[float]]
    conflicts: list[float]
    nonfinite: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, recorded: Recorded) -> "Records":
        """From rows (a sequence of mappings), columns (a mapping of sequences), or a DataFrame.

        Raises:
            TypeError: it is none of these.
            ValueError: there is no row, no ``step``, no statistic of any task, or columns of different lengths.
        """
        if isinstance(recorded, Records):
            return recorded
        columns = _without_tag(_columns(recorded))
        tasks = _tasks(columns)
        # By the names of the tasks, for these may have a slash in them.
        pairs = {pair: columns.get(f"cosine/{pair[0]}/{pair[1]}") for pair in combinations(tasks, 2)}
        per_task = [{t: columns[f"{what}/{t}"] for t in tasks if f"{what}/{t}" in columns} for what in _PER_TASK]
        cosines = {pair: values for pair, values in pairs.items() if values is not None and _known(values)}
        losses, weights, norms = ({t: v for t, v in of.items() if _known(v)} for of in per_task)
        shares = (columns.get(name, []) for name in _SHARES)
        return cls(columns["step"], tasks, losses, weights, norms, cosines, *shares)

    @classmethod
    def read(cls, path: str | Path) -> "Records":
        """From a CSV file, as :class:`mtlwrap.ignite.CSVLogger` and :class:`mtlwrap.report.Recorder` write it.

        Raises:
            OSError: it cannot be read.
            ValueError: as :meth:`of` does.
        """
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        # A file that is shared with an evaluator has rows without any statistic.
        kept = [row for row in rows if any(value and _is_statistic(key) for key, value in row.items() if key != "step")]
        return cls.of(kept or rows)


def mean(values: Sequence[float]) -> float:
    """The mean of what is finite, NaN if nothing is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def signed(number: float) -> str:
    """A cosine in few digits, also where it is small.

    Example:
        >>> signed(-0.304), signed(0.00123), signed(1e-17)
        ('-0.30', '+0.001', '0')
    """
    if abs(number) < 1e-4:
        return "0"
    return f"{number:+.2f}" if abs(number) >= 0.01 else f"{number:+.1g}"


def _columns(recorded: Any) -> dict[str, list[float]]:
    if hasattr(recorded, "columns") and hasattr(recorded, "__getitem__"):
        columns = {str(name): list(recorded[name]) for name in recorded.columns}
    elif isinstance(recorded, Mapping):
        columns = {name: list(values) for name, values in recorded.items()}
    elif isinstance(recorded, Sequence) and all(isinstance(row, Mapping) for row in recorded):
        names = dict.fromkeys(name for row in recorded for name in row)
        columns = {name: [row.get(name) for row in recorded] for name in names}
    else:
        raise TypeError(
            f"records: expected rows (mappings), a mapping of columns or a DataFrame, got {type(recorded).__name__}."
        )
    wanted = {name: values for name, values in columns.items() if name == "step" or _is_statistic(name)}
    if not wanted.get("step"):
        raise ValueError("records: expected at least one row, with a 'step', got none.")
    lengths = {name: len(values) for name, values in wanted.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"records: expected columns of one length, got {lengths}.")
    return {name: [_number(name, value) for value in values] for name, values in wanted.items()}


def _is_statistic(name: Any) -> bool:
    parts = str(name).split("/")
    return parts[-1] in _SHARES or any(part in (*_PER_TASK, "cosine") for part in parts[:-1])


def _without_tag(columns: dict[str, list[float]]) -> dict[str, list[float]]:
    kinds = (*(f"{what}/" for what in _PER_TASK), "cosine/", *_SHARES)
    tags = Counter(name[: name.index(kind)] for name in columns for kind in kinds if f"/{kind}" in f"/{name}")
    # Metrics of a task called "weight" look like statistics with a tag of their own; but these are fewer.
    tag = min(tags, key=lambda tag: (-tags[tag], len(tag)), default="")
    return {name.removeprefix(tag): values for name, values in columns.items()}


def _tasks(columns: Mapping[str, Any]) -> tuple[str, ...]:
    found = [name.partition("/")[2] for name in columns if name.partition("/")[0] in _PER_TASK]
    pairs = [name.split("/")[1:] for name in columns if name.startswith("cosine/")] if not found else []
    tasks = tuple(dict.fromkeys([*found, *(task for pair in pairs for task in pair)]))
    if not tasks:
        raise ValueError("records: expected a column like 'weight/<task>' or 'norm/<task>', got none.")
    return tasks


def _known(values: Sequence[float]) -> bool:
    return any(math.isfinite(value) for value in values)


def _number(name: str, value: Any) -> float:
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"records: expected a number in {name!r}, got {value!r}.") from error
