"""The trainer: an ignite engine that takes a balanced step per batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from ignite.engine import Engine, EventEnum
from torch import Tensor, nn

from mtlwrap.ignite.common import (
    autocast,
    check_amp_mode,
    device_type,
    in_order,
    labelled_rows,
    prepare_batch,
    unwrapped,
)
from mtlwrap.ignite.masking import IGNORED, Rows, masking
from mtlwrap.losses import Loss, collect
from mtlwrap.step import cached

TaskLoss = Callable[[Any, Any], Loss]


class MultitaskEvents(EventEnum):
    """The event of a trainer made by :func:`create_multitask_trainer`, beside ignite's own.

    ``BACKWARD_COMPLETED`` is fired after the backward pass and before the optimizer's step, in the scope of
    :func:`mtlwrap.cached`: gradients can be clipped here, and ``model.task_gradients`` can be asked. By then
    ``engine.state.losses`` has the detached loss of each task that takes part. The scope is only opened in a trainer
    that has a handler of this event, for it keeps the tasks' gradients until the event is over.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mtlwrap import MultiTaskModel
        >>> from mtlwrap.ignite import MultitaskEvents, create_multitask_trainer
        >>> model = MultiTaskModel(nn.Linear(3, 4), [nn.Linear(4, 1), nn.Linear(4, 1)], "imtl-g")
        >>> optimizer = torch.optim.SGD(model.param_groups(lr=0.1))
        >>> trainer = create_multitask_trainer(model, optimizer, [nn.MSELoss(), nn.L1Loss()])
        >>> @trainer.on(MultitaskEvents.BACKWARD_COMPLETED)
        ... def clip():
        ...     nn.utils.clip_grad_norm_(model.model_parameters(), 1.0)
        ...     print("cosines", tuple(model.task_gradients.cosines.shape))
        >>> _ = trainer.run([(torch.randn(8, 3), [torch.randn(8, 1), torch.randn(8, 1)])])
        cosines (2, 2)
    """

    BACKWARD_COMPLETED = "backward_completed"


def _losses_alone(_x: Any, _targets: Any, _predictions: Any, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return losses


def create_multitask_trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Sequence[TaskLoss] | Mapping[str, TaskLoss],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., tuple[Any, Any]] = prepare_batch,
    output_transform: Callable[[Any, Any, Any, dict[str, Tensor]], Any] = _losses_alone,
    amp_mode: str | None = None,
    scaler: "bool | torch.amp.GradScaler" = False,
    gradient_accumulation_steps: int = 1,
    model_fn: Callable[[Any, Any], Any] = lambda model, x: model(x),
    ignore_index: int | Sequence[int] = IGNORED,
) -> Engine:
    r"""An engine that takes a balanced step per batch, as ignite's ``create_supervised_trainer`` takes a plain one.

    For a batch :math:`(x, y_1, \dots, y_T)` with the labelled rows :math:`M_t` of each task, it runs

    .. math:: \text{scalarize}\big(L_t(h_t(b(x))[M_t],\, y_t[M_t]) \text{ for all } t \text{ with } M_t \ne
        \emptyset\big) \,/\, \text{gradient\_accumulation\_steps}

    backward; parameters are then those of the loop written by hand. A row of a floating-point target has no label where
    all its entries are NaN, one of an integer target where all are ``ignore_index``, by default -1 or -100. (Labels of
    0 and 1 for a binary cross-entropy are floating point: there NaN is none, and -1 a label.) Such rows are dropped
    from prediction and target; a task without a labelled row takes no part in the step, and where no task has one,
    nothing moves, not even the scaler. What follows:

    - *Dense targets*, ``[B, ...]``: a row is a sample, dropped if nothing in it is labelled. A sample labelled in part
      goes to the loss as it is, which must leave out the rest itself: by its own ``ignore_index``, or, for NaN, by
      choosing, ``lambda p, y: l1_loss(p[~y.isnan()], y[~y.isnan()])``.
    - *Integers that are labels at -1*, of hinge losses, say: give them as floating point, or ``ignore_index=()``.
    - *Predictions that are no tensor* may be tensors in tuples, lists and mappings, each with B rows or 0-dim. *Targets
      that are no tensor* (boxes per image, say) are labels as a whole, prediction and target go to the loss as they
      are, None is no label.
    - *Waiting for the device*: which rows to take is decided on the host. Targets that come from the host are looked at
      before they are moved, and nobody waits. With targets already on a device, or a ``prepare_batch`` of your own
      that moves them, the host waits once per batch, for all tasks together.

    Args:
        model: a :class:`~mtlwrap.MultiTaskModel`, or one in ``DistributedDataParallel``. Tasks may have no label in
            the batches of some processes, and a process may have none at all: a task takes part if it has a label in
            one of them. With ``find_unused_parameters=True`` the head of a task that has none in any of them keeps its
            gradient of None, as in a single process; else ``DistributedDataParallel`` gives it one of zeros.
        optimizer: best over ``model.param_groups(...)``, so that the balancer learns too.
        losses: a callable ``(prediction, target) -> 0-dim tensor`` for each task, in order or by task name; or one that
            returns a list of such tensors, which are added up.
        device: where batches are moved to; the model is left where it is.
        non_blocking: whether they are moved without waiting.
        prepare_batch: from ``(batch, device=..., non_blocking=...)`` to ``(x, targets)``. The targets are a mapping by
            task name (a task that is absent has no label; names of other tasks are ignored, unless a task is absent
            too), a sequence in order (None: no label), or a tensor ``[B, T]``.
        output_transform: from ``(x, targets, predictions, losses)`` to the engine's output. By default the losses, a
            dict of detached 0-dim tensors by task name, of the tasks that took part: what ``ProgressBar`` takes with
            ``output_transform=dict``, and ``RunningAverage`` with ``lambda losses: losses["kind"]`` for a task that is
            in every batch. For one that is not, :class:`BalancerStatistics` averages the loss over its steps.
        amp_mode: ``"amp"`` runs forward and losses under ``torch.autocast``, for the type of the device.
        scaler: a ``torch.amp.GradScaler``, or True for a new one; only with ``amp_mode="amp"``. It is
            ``trainer.state.scaler``, to be saved.
        gradient_accumulation_steps: the optimizer steps in every n-th iteration; each batch is balanced by itself.
        model_fn: from ``(model, x)`` to the predictions.
        ignore_index: the integers that are no label, in integer targets; in others it is NaN.

    Returns:
        The engine, with the event :attr:`MultitaskEvents.BACKWARD_COMPLETED`.

    Raises:
        TypeError: the model is none, a loss is not callable, or an option is of another type.
        ValueError: the losses do not fit the tasks, or an option has no such value. In a step: a target or a loss does
            not fit, see :meth:`mtlwrap.MultiTaskModel.scalarize`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mtlwrap import IMTL, MultiTaskModel
        >>> model = MultiTaskModel(nn.Linear(8, 16), {"kind": nn.Linear(16, 3), "size": nn.Linear(16, 1)}, IMTL())
        >>> optimizer = torch.optim.Adam(model.param_groups(lr=1e-2))
        >>> trainer = create_multitask_trainer(model, optimizer, {"kind": nn.CrossEntropyLoss(), "size": nn.MSELoss()})
        >>> x, kind, size = torch.randn(8, 8), torch.randint(3, (8,)), torch.randn(8, 1)
        >>> kind[:3] = -1
        >>> size[5:] = torch.nan
        >>> state = trainer.run([(x, {"kind": kind, "size": size})] * 10, max_epochs=2)
        >>> sorted(state.output), state.output["kind"].shape
        (['kind', 'size'], torch.Size([]))
    """
    inner = unwrapped(model)
    step = _Step(
        model,
        optimizer,
        _in_order(losses, inner.tasks),
        device,
        non_blocking,
        prepare_batch,
        output_transform,
        amp_mode,
        _checked_scaler(scaler, amp_mode, device_type(device, inner)),
        _checked_steps(gradient_accumulation_steps),
        model_fn,
        ignore_index,
    )
    trainer = Engine(step.update)
    # Counted by iterations, so that it can be filtered, and resumed, as ITERATION_COMPLETED is.
    trainer.register_events(*MultitaskEvents, event_to_attr={MultitaskEvents.BACKWARD_COMPLETED: "iteration"})
    if step.scaler is not None:
        trainer.state.scaler = step.scaler  # type: ignore[attr-defined]
    return trainer


class _Step:
    """One iteration of the trainer."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: Sequence[TaskLoss],
        device: str | torch.device | None,
        non_blocking: bool,
        prepare: Callable[..., tuple[Any, Any]],
        output_transform: Callable[[Any, Any, Any, dict[str, Tensor]], Any],
        amp_mode: str | None,
        scaler: "torch.amp.GradScaler | None",
        accumulation: int,
        model_fn: Callable[[Any, Any], Any],
        ignore_index: int | Sequence[int],
    ) -> None:
        self.model = model
        self.inner = unwrapped(model)
        self.optimizer = optimizer
        self.losses = losses
        self.prepare = partial(prepare, device=device, non_blocking=non_blocking)
        self.output_transform = output_transform
        self.autocast = partial(autocast, amp_mode, device, self.inner)
        self.scaler = scaler
        self.accumulation = accumulation
        self.model_fn = model_fn
        self.masking = masking(self.inner.tasks, ignore_index)

    def update(self, engine: Engine, batch: Any) -> Any:
        """The engine's process function."""
        if (engine.state.iteration - 1) % self.accumulation == 0:
            self.optimizer.zero_grad()
        self.model.train()
        x, y = self.prepare(batch)
        targets, rows = labelled_rows(self.masking, batch, y, self.prepare.func)
        with cached() if _is_asked(engine) else nullcontext():
            with self.autocast():
                predictions = self.model_fn(self.model, x)
                losses = collect(self._losses(in_order(predictions, self.inner), targets, rows), self.inner.tasks)
                total = self.inner.scalarize(losses)
                if self.accumulation > 1:
                    total = total / self.accumulation
            (total if self.scaler is None else self.scaler.scale(total)).backward()
            named = zip(self.inner.tasks, losses, strict=True)
            detached = {task: loss.detach() for task, loss in named if loss is not None}
            engine.state.losses = detached  # type: ignore[attr-defined]
            engine.fire_event(MultitaskEvents.BACKWARD_COMPLETED)
        if engine.state.iteration % self.accumulation == 0:
            self._move()
        return self.output_transform(x, y, predictions, detached)

    def _losses(self, predictions: Sequence[Any], targets: Sequence[Any], rows: Sequence[Rows]) -> list[Loss]:
        losses: list[Loss] = []
        for task, (prediction, target, row) in enumerate(zip(predictions, targets, rows, strict=True)):
            labelled = self.masking.take(task, prediction, target, row) if row.present else None
            losses.append(None if labelled is None else self.losses[task](*labelled))
        return losses

    def _move(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        elif any(p.grad is not None for p in self._optimized()):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # A scaler refuses a step in which it saw no gradient. Given its own scale, which nobody reads, it keeps it,
            # and forgets that a handler had it unscale.
            one = torch.ones((), device=next(self._optimized()).device)
            self.scaler.update(self.scaler.scale(one))

    def _optimized(self) -> Iterator[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])


def _is_asked(engine: Engine) -> bool:
    """Whether the event has a handler, for which the step keeps the tasks' gradients."""
    handlers: Any = getattr(engine, "_event_handlers", None)
    return handlers is None or bool(handlers.get(MultitaskEvents.BACKWARD_COMPLETED))


def _in_order(losses: Sequence[TaskLoss] | Mapping[str, TaskLoss], tasks: Sequence[str]) -> list[TaskLoss]:
    if isinstance(losses, Mapping | nn.ModuleDict):
        if set(losses.keys()) != set(tasks):
            raise ValueError(f"losses: expected one for each of the tasks {list(tasks)}, got those of {list(losses)}.")
        chosen = [losses[task] for task in tasks]
    elif isinstance(losses, Sequence | nn.ModuleList) and not isinstance(losses, str):
        if len(losses) != len(tasks):
            raise ValueError(f"losses: expected {len(tasks)}, one for each of {list(tasks)}, got {len(losses)}.")
        chosen = list(losses)
    else:
        raise TypeError(f"losses: expected a sequence or a mapping by task name, got {type(losses).__name__}.")
    for task, loss in zip(tasks, chosen, strict=True):
        if not callable(loss):
            raise TypeError(f"The loss of task {task!r}: expected a callable, got {type(loss).__name__}.")
    return chosen


def _checked_scaler(
    scaler: "bool | torch.amp.GradScaler", amp_mode: str | None, device: str
) -> "torch.amp.GradScaler | None":
    check_amp_mode(amp_mode)
    if isinstance(scaler, bool):
        made = torch.amp.GradScaler(device) if scaler else None
    elif isinstance(scaler, torch.amp.GradScaler):
        made = scaler
    else:
        raise TypeError(f"scaler: expected True, False or a torch.amp.GradScaler, got {type(scaler).__name__}.")
    if made is not None and amp_mode != "amp":
        raise ValueError(f"scaler: one needs amp_mode='amp', got amp_mode={amp_mode!r}.")
    return made


def _checked_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"gradient_accumulation_steps: expected an int, got {steps!r}.")
    if steps < 1:
        raise ValueError(f"gradient_accumulation_steps: expected at least 1, got {steps}.")
    return steps
