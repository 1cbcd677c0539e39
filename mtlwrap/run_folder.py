"""The files of a run folder, and what is known of a training besides its statistics."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

STATISTICS, DETAILS, PAGE = "statistics.csv", "run.json", "report.html"
# The entry of DETAILS that belongs to a recorder: what stands beside it is the user's, and counts.
_RECORDED = "recorded"


@dataclass(frozen=True)
class Run:
    """What is known of a training besides its statistics; all of it can be left out.

    Balancer, gradients and seconds are noted by :class:`~mtlwrap.report.Recorder`; what is saved, or written into
    ``run.json`` by hand, counts more.

    Attributes:
        balancer: what balanced the tasks, in words.
        metrics: each task's metrics at the end, by task and then by name.
        single: the same of each task trained alone.
        higher_is_better: for each metric's name whether higher is better; one of which it is not said is shown, but not
            compared.
        seconds_per_step: the time of a step.
        plain_seconds_per_step: the time of a step under a plain sum of the losses.
        gradients: with respect to what the tasks' gradients were taken, "representation" or "parameters".

    Raises:
        TypeError: metrics are not mappings by task of mappings by name of numbers.
        ValueError: a time is not positive.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Run("PCGrad", metrics={"a": {"AUC": 0.9}}).save(folder)
        ...     Run.load(folder).metrics
        {'a': {'AUC': 0.9}}
    """

    balancer: str = "the balancer"
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    single: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    seconds_per_step: float | None = None
    plain_seconds_per_step: float | None = None
    gradients: str | None = None

    def __post_init__(self) -> None:
        for field_name in ("metrics", "single"):
            given = getattr(self, field_name)
            if not isinstance(given, Mapping) or not all(map(_has_numbers, given.values())):
                raise TypeError(
                    f"{field_name}: expected numbers by task and then by name, {{'seg': {{'accuracy': 0.9}}}}, got "
                    f"{given!r:.100}."
                )
        for field_name in ("seconds_per_step", "plain_seconds_per_step"):
            given = getattr(self, field_name)
            if given is not None and (not _is_number(given) or not given > 0):
                raise ValueError(f"{field_name}: expected a positive number or None, got {given!r:.100}.")

    def save(self, folder: str | Path) -> None:
        """Write what is known into a run folder; what a recorder noted there stays.

        Raises:
            ValueError: there is a ``run.json`` that cannot be read.
        """
        noted = _entries(folder).get(_RECORDED, {})
        unknown = asdict(Run())
        entries = {k: v for k, v in asdict(self).items() if v not in (unknown[k], noted.get(k))}
        _write(folder, entries | ({_RECORDED: noted} if noted else {}))

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Read it from a run folder; nothing is known where there is none.

        Raises:
            ValueError: it is no JSON object, or has other entries.
        """
        entries = _entries(folder)
        return cls(**(entries.pop(_RECORDED, {}) | entries))


def _has_numbers(of_task: object) -> bool:
    return isinstance(of_task, Mapping) and all(map(_is_number, of_task.values()))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def whole_lines(path: Path) -> str:
    """What is in a file, without a last line that a process began as it was ended; nothing if there is none."""
    if not path.exists():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    return text[: text.rfind("\n") + 1]


def note(folder: str | Path, **recorded: Any) -> None:
    """Write what a recorder knows into a run folder, instead of what it knew before; the user's entries stay.

    Raises:
        ValueError: there is a ``run.json`` that cannot be read.
    """
    _write(folder, _entries(folder) | {_RECORDED: recorded})


def noted(folder: str | Path) -> dict[str, Any]:
    """What a recorder has noted.

    Raises:
        ValueError: there is a ``run.json`` that cannot be read.
    """
    return dict(_entries(folder).get(_RECORDED, {}))


def _write(folder: str | Path, entries: Mapping[str, Any]) -> None:
    (Path(folder) / DETAILS).write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")


def _entries(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / DETAILS
    if not file.exists():
        return {}
    wanted = f"{file}: expected a JSON object with entries of {', '.join(Run.__dataclass_fields__)}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{wanted}; {error}.") from error
    recorded = found.get(_RECORDED, {}) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(recorded, dict):
        raise ValueError(f"{wanted}, got {found!r:.100}.")
    strangers = [name for name in (*found, *recorded) if name not in Run.__dataclass_fields__ and name != _RECORDED]
    if strangers:
        raise ValueError(f"{wanted}, got {', '.join(map(repr, strangers))}.")
    return found
