"""Gradients with respect to the shared parameters themselves, rather than the representation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlwrap.balancers.base import Balancer
from mtlwrap.factored import FactoredRows, linear_layers
from mtlwrap.probe import pull_back, pull_back_together
from mtlwrap.rows import Rows
from mtlwrap.state import Undo, WideBuffers


@dataclass(frozen=True)
class Parameters:
    """Balance the tasks' gradients with respect to the shared parameters: ``MultiTaskModel(gradients=Parameters())``.

    These are the gradients that the papers of gradient balancers speak of, and that TorchJD takes. Each step that
    weighs anew runs the backbone's backward once per task, within the one ordinary backward pass, and holds T
    gradients of the size of the shared parameters, and one more in passing. ``gradients="parameters"`` is short for it.

    On a CPU the gradients on the weights of linear layers with more inputs than the batch has rows are not made, where
    the weights and what they sum up to can be had for less: of each task only the gradient on the layer's output is
    held. A balancer that asks for whole gradients, as ``ExcessMTL`` does, has them made. Layers whose weights are used
    more than once, checkpointed ones, and those under autocast are left as they are.

    The ``.grad`` of several parameters may lie in one piece of memory, side by side: it is freed with the last of them.
    A hook of a tensor inside the backbone is called for each task with its gradient, and then once more with None, for
    which it is to return None; one on the node of a wide linear layer (``y.grad_fn.register_hook``) does not see what
    is not made. With nothing to train in the backbone the gradients are those on the representation.

    Args:
        refresh_every: weigh anew in every k-th step only, and whenever a task comes that had no part in the last
            weighing; the steps between use the last weights, at the cost of a plain backward. After each weighing the
            host waits once, to learn whether it came to finite weights. Needs a balancer that returns weights. A new
            ``model.balancer`` begins anew; after ``balancer.reset()`` call ``model.schedule.reset()``.
        vectorize: run the backbone's backward once for all tasks together, by ``torch.vmap``. It takes about half the
            time where there are four tasks or more and many small layers, none where layers are large, and twice the
            memory. Not every backbone allows it (no sparse embeddings, no compiled layers); then the backward raises
            an error. Hooks of tensors inside the backbone see the gradients of all tasks in one tensor, which cannot
            be kept, so ``retain_grad`` there does not work. Of no effect with batches of their own per task,
            ``weigh_heads`` or an auxiliary loss that reads predictions.

    Raises:
        TypeError, ValueError: ``refresh_every`` is no positive int, or ``vectorize`` no bool; from the model, if its
            balancer rotates the representation.

    Example:
        >>> from torch import nn
        >>> from mtlwrap import MultiTaskModel
        >>> heads = [nn.Linear(3, 1), nn.Linear(3, 1)]
        >>> model = MultiTaskModel(nn.Linear(2, 3), heads, "imtl-g", gradients=Parameters(refresh_every=10))
    """

    refresh_every: int = 1
    vectorize: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.refresh_every, bool) or not isinstance(self.refresh_every, int):
            raise TypeError(f"refresh_every: expected an int, got {self.refresh_every!r}.")
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every: expected at least 1, got {self.refresh_every}.")
        if not isinstance(self.vectorize, bool):
            raise TypeError(f"vectorize: expected a bool, got {self.vectorize!r}.")


class Schedule(WideBuffers):
    """When to weigh anew, and the weights until then: state of a training, though not of the balancer.

    The host decides, so it keeps a copy of what the buffers say, which it reads again after they were loaded.

    Attributes:
        weights: ``[T]``, ones before the first weighing.
        known: which tasks had a part in the last weighing, ``[T]``.
        steps: how many steps ago that was; 0 before the first.
        sound: whether it came to finite weights; the next step reads this, the one time that the host waits.
    """

    weights: Tensor
    known: Tensor
    steps: Tensor
    sound: Tensor

    def __init__(self, num_tasks: int, refresh_every: int) -> None:
        super().__init__()
        self.refresh_every = refresh_every
        self.register_buffer("weights", torch.ones(num_tasks))
        self.register_buffer("known", torch.zeros(num_tasks, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sound", torch.ones((), dtype=torch.bool))
        self._on_host: tuple[int, tuple[bool, ...]] | None = None
        self.register_load_state_dict_post_hook(_forget)

    def reset(self) -> None:
        """Weigh anew in the next step."""
        with torch.no_grad():
            self.weights.fill_(1.0)
            self.known.fill_(False)
            self.steps.zero_()
            self.sound.fill_(True)
        self._on_host = None

    def is_due(self, taking_part: Sequence[bool]) -> bool:
        """Whether this step weighs anew."""
        if self._on_host is None:
            self._on_host = int(self.steps), tuple(self.known.tolist())
        steps, known = self._on_host
        strangers = any(present and not k for present, k in zip(taking_part, known, strict=True))
        # A weighing in a step that a GradScaler skips is none.
        return steps == 0 or steps >= self.refresh_every or strangers or (steps == 1 and not bool(self.sound))

    def undo_weigh(self) -> Undo:
        """What takes a weighing back; see :meth:`Balancer.undo_weigh`."""
        return _Weighing(self)

    def keep(self, weights: Tensor, taking_part: Sequence[bool]) -> None:
        """Note a weighing; after one that is not finite the next step weighs anew."""
        weights = weights.detach().to(self.weights)
        self.sound.copy_(weights.isfinite().all())
        self.weights.copy_(torch.where(self.sound, weights, self.weights))
        for task, present in enumerate(taking_part):
            self.known[task] = present  # a fill on the device
        self.steps.fill_(1)
        self._on_host = 1, tuple(taking_part)

    def reuse(self, active: Tensor) -> Tensor:
        """The weights of the last weighing, for the tasks that take part."""
        steps, known = self._on_host or (int(self.steps), tuple(self.known.tolist()))
        self._on_host = steps + 1, known
        self.steps.add_(1)
        return torch.where(active, self.weights.to(active.device), 0.0)


class _Weighing(Undo):
    """Has a weighing made anew in the next step, and the weights before it back until then.

    That a step was made with the weights there are stays noted, for the host counts those.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._weights = schedule.weights.clone()

    def __call__(self, spoiled: Tensor, *_: object) -> None:
        weights = self._schedule.weights
        spoiled = spoiled.to(weights.device)
        self._schedule.sound.logical_and_(~spoiled)
        torch.where(spoiled, self._weights, weights, out=weights)


def _forget(schedule: Schedule, _: object) -> None:
    schedule._on_host = None


class Exact:
    """What a fork needs to balance the gradients on the shared parameters, rather than those on the representation."""

    def __init__(
        self, parameters: Sequence[Tensor], schedule: Schedule | None, vectorize: bool = False, *, whole: bool = False
    ) -> None:
        self.parameters = tuple(parameters)
        self.whole = whole
        self.schedule = schedule
        self.vectorize = vectorize

    def rows(
        self, edges: Sequence[GradientEdge], parts: Sequence[Sequence[Tensor | None]], taking_part: Sequence[bool]
    ) -> Rows | FactoredRows:
        """The gradients of the tasks that take part, for those on the representation: by tensor, then by task."""
        present = [task for task, is_present in enumerate(taking_part) if is_present]
        if self.vectorize and len(present) > 1:
            rows = Rows(self.parameters, taking_part)
            stacked = pull_back_together(edges, [[part[task] for task in present] for part in parts], self.parameters)
            if stacked is not None:
                rows.fill(stacked)
                return rows
        layers = [] if self.whole else linear_layers(edges, self.parameters, len(present))
        if layers:
            factored = FactoredRows(self.parameters, taking_part, layers)
            factored.pull_back(edges, parts)
            return factored
        rows = Rows(self.parameters, taking_part)
        for task in present:
            rows.add(pull_back(edges, [part[task] for part in parts], self.parameters))
        return rows

    def is_due(self, balancer: Balancer, taking_part: Sequence[bool]) -> bool:
        """Whether this step weighs anew: as the schedule says; in evaluation mode, where that does not move, always."""
        return self.schedule is None or not balancer.training or self.schedule.is_due(taking_part)

    def prepare(self, balancer: Balancer) -> None:
        """Have the balancer allocate its state for gradients of this size, if it has any of that kind."""
        if type(balancer).prepare is Balancer.prepare:
            return  # hundreds of shapes in each step, for nothing
        balancer.prepare([parameter.detach().reshape(1, -1) for parameter in self.parameters])
