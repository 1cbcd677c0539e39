"""The evaluator: an ignite engine with metrics per task, over the rows that have a label of it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from torch import nn

from mtlwrap.ignite.common import autocast, check_amp_mode, in_order, labelled_rows, prepare_batch, unwrapped
from mtlwrap.ignite.masking import IGNORED, masking


def _predictions_and_targets(_x: Any, targets: Any, predictions: Any) -> tuple[Any, Any]:
    return predictions, targets


def create_multitask_evaluator(
    model: nn.Module,
    metrics: Mapping[str, Mapping[str, Metric]] | None = None,
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., tuple[Any, Any]] = prepare_batch,
    output_transform: Callable[[Any, Any, Any], Any] = _predictions_and_targets,
    amp_mode: str | None = None,
    model_fn: Callable[[Any, Any], Any] = lambda model, x: model(x),
    ignore_index: int | Sequence[int] = IGNORED,
) -> Engine:
    r"""An engine that evaluates every task, as ignite's ``create_supervised_evaluator`` evaluates one.

    The model is in evaluation mode, without gradients. Each metric sees the predictions :math:`h_t(b(x))[M_t]` and
    targets :math:`y_t[M_t]` of the rows :math:`M_t` that have a label of its task, chosen as in
    :func:`create_multitask_trainer`, and no batch without one.

    Args:
        model: a :class:`~mtlwrap.MultiTaskModel`, or one in ``DistributedDataParallel``.
        metrics: ignite's metrics, by task and then by name; they come to ``state.metrics`` as ``task/name``. A metric's
            ``output_transform`` gets the pair ``(prediction, target)`` of its task.
        device: where batches are moved to.
        non_blocking: whether they are moved without waiting.
        prepare_batch: from ``(batch, device=..., non_blocking=...)`` to ``(x, targets)``.
        output_transform: from ``(x, targets, predictions)`` to the engine's output; the metrics do not depend on it.
        amp_mode: ``"amp"`` runs the model under ``torch.autocast``.
        model_fn: from ``(model, x)`` to the predictions.
        ignore_index: the integers that are no label, in integer targets; in others it is NaN.

    Returns:
        The engine. After each batch ``state.labelled`` has the pair of each task with a label, by name.

    Raises:
        TypeError: the model is none, or what is given as a metric is none.
        ValueError: metrics are given for a task that there is not, or an option has no such value.
        NotComputableError: at the end of an epoch: a metric saw no label; the task is named.

    Example:
        >>> import torch
        >>> from ignite.metrics import Accuracy, MeanSquaredError
        >>> from torch import nn
        >>> from mtlwrap import MultiTaskModel
        >>> model = MultiTaskModel(nn.Linear(8, 16), {"kind": nn.Linear(16, 3), "size": nn.Linear(16, 1)})
        >>> metrics = {"kind": {"accuracy": Accuracy()}, "size": {"error": MeanSquaredError()}}
        >>> evaluator = create_multitask_evaluator(model, metrics)
        >>> x, kind, size = torch.randn(8, 8), torch.randint(3, (8,)), torch.randn(8, 1)
        >>> size[5:] = torch.nan
        >>> state = evaluator.run([(x, {"kind": kind, "size": size})])
        >>> sorted(state.metrics)
        ['kind/accuracy', 'size/error']
    """
    inner = unwrapped(model)
    check_amp_mode(amp_mode)
    labels = masking(inner.tasks, ignore_index)
    prepare = partial(prepare_batch, device=device, non_blocking=non_blocking)

    @torch.no_grad()
    def evaluate(engine: Engine, batch: Any) -> Any:
        model.eval()
        x, y = prepare(batch)
        targets, rows = labelled_rows(labels, batch, y, prepare.func)
        with autocast(amp_mode, device, inner):
            predictions = model_fn(model, x)
        ordered = in_order(predictions, inner)
        engine.state.labelled = {  # type: ignore[attr-defined]
            task: labels.take(number, ordered[number], targets[number], rows[number])
            for number, task in enumerate(inner.tasks)
            if rows[number].present
        }
        return output_transform(x, y, predictions)

    evaluator = Engine(evaluate)
    for task, chosen in _checked(metrics or {}, inner.tasks).items():
        _TaskMetrics(task, chosen).attach(evaluator)
    return evaluator


class _TaskMetrics:
    """The metrics of one task, on an engine of their own that runs only where the task has a label.

    Metrics take what an engine's output is, in each iteration; so the task has an engine whose iterations these are.
    """

    def __init__(self, task: str, metrics: Mapping[str, Metric]) -> None:
        self.task = task
        self.engine = Engine(lambda _engine, _batch: None)
        for name, metric in metrics.items():
            metric.attach(self.engine, f"{task}/{name}")

    def attach(self, evaluator: Engine) -> None:
        for event in (Events.STARTED, Events.EPOCH_STARTED, Events.COMPLETED):
            evaluator.add_event_handler(event, self.pass_on, event)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.completed)

    def pass_on(self, _evaluator: Engine, event: Events) -> None:
        self.engine.fire_event(event)

    def update(self, evaluator: Engine) -> None:
        labelled = evaluator.state.labelled  # type: ignore[attr-defined]
        if self.task in labelled:
            self.engine.state.output = labelled[self.task]
            self.engine.fire_event(Events.ITERATION_STARTED)
            self.engine.fire_event(Events.ITERATION_COMPLETED)
            self.engine.state.output = None

    def completed(self, evaluator: Engine) -> None:
        try:
            self.engine.fire_event(Events.EPOCH_COMPLETED)
        except NotComputableError as error:
            raise NotComputableError(f"A metric of task {self.task!r}: {error}") from error
        evaluator.state.metrics.update(self.engine.state.metrics)


def _checked(metrics: Mapping[str, Mapping[str, Metric]], tasks: Sequence[str]) -> Mapping[str, Mapping[str, Metric]]:
    for task, chosen in metrics.items():
        if task not in tasks:
            raise ValueError(f"metrics: there is no task called {task!r}; the tasks are {list(tasks)}.")
        if not isinstance(chosen, Mapping):
            raise TypeError(f"metrics: expected those of task {task!r} by name, got {type(chosen).__name__}.")
        for name, metric in chosen.items():
            if not isinstance(metric, Metric):
                raise TypeError(f"metrics: expected an ignite Metric for '{task}/{name}', got {type(metric).__name__}.")
    return metrics
