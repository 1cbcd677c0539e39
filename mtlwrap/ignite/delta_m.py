"""Δm: how much better the tasks are than each trained alone."""

import math
from collections.abc import Mapping
from typing import Literal, get_args

from ignite.engine import Engine, Events

# By "task/name", as in an evaluator's metrics, or by task and then by name.
Results = Mapping[str, float] | Mapping[str, Mapping[str, float]]
Average = Literal["tasks", "metrics"]


def delta_m(
    results: Results, single: Results, higher_is_better: Mapping[str, bool], average: Average = "tasks"
) -> float:
    r"""The mean relative improvement on single-task training, in percent.

    .. math:: \Delta m = \frac{100}{T} \sum_t \frac{1}{K_t} \sum_k \pm \frac{M_{tk} - S_{tk}}{|S_{tk}|}

    for K metrics to a task, with a minus where lower is better. Positive is an improvement.

    Args:
        results: the metrics M, by ``task/name``, as an evaluator has them in ``state.metrics``, or by task and then by
            name. Others than those of ``single`` are ignored.
        single: those of the tasks trained alone, S, likewise.
        higher_is_better: for each metric whether higher is better, by ``task/name`` or by ``name`` for all tasks.
        average: ``"tasks"``: over each task's metrics first, so that the tasks count alike, as in the formula;
            ``"metrics"``: over all metrics at once, as in some papers' tables. The same if all tasks have as many.

    Raises:
        ValueError: a metric has no result or no direction, a result alone is 0 or not finite, or there is none.

    Example:
        >>> single = {"kind": {"accuracy": 0.8}, "size": {"error": 2.0}}
        >>> better_higher = {"accuracy": True, "error": False}
        >>> round(delta_m({"kind/accuracy": 0.84, "size/error": 2.4}, single, better_higher), 6)
        -7.5
    """
    found, alone = _flat(results), _checked(_flat(single))
    if average not in get_args(Average):
        raise ValueError(f"average: expected 'tasks' or 'metrics', got {average!r}.")
    groups: dict[str, list[float]] = {}
    for key, reference in alone.items():
        if key not in found:
            raise ValueError(f"results: there is none for {key!r}; there are {', '.join(map(repr, found)) or 'none'}.")
        sign = 1 if _direction(key, higher_is_better) else -1
        change = sign * (float(found[key]) - reference) / abs(reference)
        groups.setdefault(key.rpartition("/")[0] if average == "tasks" else "", []).append(change)
    return 100 * sum(sum(group) / len(group) for group in groups.values()) / len(groups)


class DeltaM:
    """:func:`delta_m` of an evaluator's metrics, as one more of them.

    Args:
        single: the metrics of the tasks trained alone; see :func:`delta_m`.
        higher_is_better: for each metric whether higher is better.
        average: over the tasks or over the metrics.

    Raises:
        ValueError: as :func:`delta_m` does.

    Example:
        >>> import torch
        >>> from ignite.metrics import MeanSquaredError
        >>> from torch import nn
        >>> from mtlwrap import MultiTaskModel
        >>> from mtlwrap.ignite import DeltaM, create_multitask_evaluator
        >>> model = MultiTaskModel(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        >>> evaluator = create_multitask_evaluator(model, {t: {"error": MeanSquaredError()} for t in model.tasks})
        >>> DeltaM({"a/error": 1.0, "b/error": 2.0}, {"error": False}).attach(evaluator)
        >>> state = evaluator.run([(torch.randn(8, 3), {"a": torch.randn(8, 1), "b": torch.randn(8, 1)})])
        >>> list(state.metrics)
        ['a/error', 'b/error', 'delta_m']
    """

    def __init__(self, single: Results, higher_is_better: Mapping[str, bool], average: Average = "tasks") -> None:
        self.single = _flat(single)
        self.higher_is_better = dict(higher_is_better)
        self.average: Average = average
        delta_m(self.single, self.single, self.higher_is_better, average)  # what is wrong is better said at once

    def attach(self, engine: Engine, name: str = "delta_m") -> None:
        """Compute it when an epoch of the evaluator ends, into ``engine.state.metrics[name]``."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.completed, name)

    def completed(self, engine: Engine, name: str) -> None:
        """Compute it of the metrics that the engine has."""
        engine.state.metrics[name] = delta_m(engine.state.metrics, self.single, self.higher_is_better, self.average)


def _flat(results: Results) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{name}": number for name, number in value.items()})
        else:
            flat[key] = value
    return flat


def _checked(single: dict[str, float]) -> dict[str, float]:
    if not single:
        raise ValueError("single: expected at least one metric, got none.")
    for key, value in single.items():
        if value == 0 or not math.isfinite(value):
            raise ValueError(f"single: expected a number to compare with for {key!r}, got {value}.")
    return single


def _direction(key: str, higher_is_better: Mapping[str, bool]) -> bool:
    name = key.rpartition("/")[2]
    for candidate in (key, name):
        if candidate in higher_is_better:
            return higher_is_better[candidate]
    given = ", ".join(map(repr, higher_is_better)) or "none"
    raise ValueError(f"higher_is_better: expected an entry for {key!r} or for {name!r}, got {given}.")
