"""The two kinds of balancer, and what the model asks of either."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from mtlwrap.checks import integer
from mtlwrap.gradients import TaskGradients
from mtlwrap.state import Kept, Undo, WideBuffers
from mtlwrap.surroundings import transforming
from mtlwrap.vectors import widest


class Balancer(WideBuffers, ABC):
    """What a multi-task model asks of a balancer: a scalar to call ``backward`` on, and weights for the gradients.

    Each half is neutral here, a plain sum. Derive from :class:`LossBalancer` or :class:`GradientBalancer`, which
    leave one half to you, and not from this class.

    What the user's optimizer learns is a ``Parameter``; what the balancer itself updates is a buffer; what lives for
    one step is a plain attribute.

    In evaluation mode a backward pass decides as always, but no state moves: a derived class writes to its buffers only
    if ``self.training``. Whoever trains a network in evaluation mode, for the sake of its batch statistics, calls
    ``model.balancer.train()`` after ``model.eval()``, and the state follows.
    """

    num_tasks: int | None = None

    def bind(self, num_tasks: int) -> None:
        """Tell the balancer how many tasks it balances; the model does this when it is wrapped.

        Raises:
            TypeError, ValueError: ``num_tasks`` is no positive int, or the balancer was made for another number.
        """
        integer("num_tasks", num_tasks, least=1)
        if self.num_tasks is not None and self.num_tasks != num_tasks:
            raise ValueError(
                f"{type(self).__name__} was made for {self.num_tasks} tasks, but the model has {num_tasks} heads."
            )
        self.num_tasks = num_tasks

    def reset(self) -> None:
        """Make the balancer as good as new; one without state has nothing to do."""

    def prepare(self, representation: Sequence[Tensor]) -> None:
        """Allocate state whose size the representation decides; called in each training forward. Neutral: nothing.

        Args:
            representation: its tensors that carry a gradient, batch first; with ``gradients="parameters"`` the shared
                parameters instead, each detached and as one row, ``[1, n]``.

        Raises:
            ValueError: the state has another size already.
        """

    @property
    def sees_gradients(self) -> bool:
        """Whether :meth:`weigh` is more than a sum; if not, the tasks' gradients are added up as they arrive."""
        return True

    @property
    def transforms(self) -> bool:
        """Whether the heads get something else than the representation itself; neutral: no."""
        return False

    def transform(self, tensors: Sequence[Tensor], tasks: Sequence[int]) -> list[Tensor]:
        """What the heads get instead of the representation's first tensor, if :attr:`transforms`. Neutral: itself.

        Args:
            tensors: that tensor, once for each of ``tasks``; in training its gradient is the one that is balanced.
            tasks: which tasks these are.
        """
        return list(tensors)

    @property
    def scales_losses(self) -> bool:
        """Whether :meth:`scalarize` of a *gradient* balancer is more than a sum; then it stands alone. Neutral: no."""
        return False

    def own_gradients(self, gradients: TaskGradients) -> dict[str, Tensor]:
        """The gradient of the balancer's own objective on its parameters, by name. Neutral: none.

        Called after :meth:`weigh`, in the same backward pass. What a loss balancer learns gets its gradient from the
        scalar and does not appear here.
        """
        return {}

    def constrain(self) -> None:
        """Put learned parameters back to where they may be; called before each training step. Neutral: nothing."""

    @property
    def keeps_state(self) -> bool:
        """Whether the balancer itself updates anything; neutral: if it has a buffer."""
        return next(self.buffers(), None) is not None

    def undo_scalarize(self) -> Undo | None:
        """Made before :meth:`scalarize`, what puts back the state that it moves; neutral: it moves none.

        Asked for in training with float16, and used where gradients overflow, so that a GradScaler skips the step.
        """
        return None

    def undo_weigh(self) -> Undo | None:
        """Likewise for what :meth:`weigh` and :meth:`own_gradients` move, made as the backward pass begins."""
        return None

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The scalar to call ``backward`` on. Neutral: the sum of the losses.

        Args:
            losses: the losses of the tasks that take part, ``[len(tasks)]``; alone, of any shape.
            tasks: which tasks these are; None for all of them, in order.
        """
        return losses.sum()

    def weigh(self, gradients: TaskGradients) -> Tensor | None:
        """The weight of each task's gradient in the shared gradient, ``[T]``. Neutral: one for each that takes part.

        None says that the shared gradient is no weighting of the tasks' gradients; then :meth:`combine` makes it.
        """
        return widest(gradients.active)

    def combine(self, gradients: TaskGradients) -> Tensor:
        """The shared gradient, ``[n]``, from the tasks' gradients. Override it for what is no weighting."""
        weights = self.weigh(gradients)
        if weights is None:
            raise TypeError(f"{type(self).__name__}.weigh returned None, so the class must override combine.")
        return gradients.weighted_sum(weights)


class LossBalancer(Balancer):
    """A balancer that looks at the values of the losses: it makes one scalar of them, heads and backbone alike.

    Alone it is called on values of any shape.
    """

    @property
    def sees_gradients(self) -> bool:
        """No, unless a derived class weighs them too, or learns from them."""
        kind = type(self)
        return kind.weigh is not Balancer.weigh or kind.own_gradients is not Balancer.own_gradients

    def undo_scalarize(self) -> Undo | None:
        """All buffers; see :meth:`Balancer.undo_scalarize`."""
        return Kept(self)

    def undo_weigh(self) -> Undo | None:
        """All buffers, where it looks at the gradients; see :meth:`Balancer.undo_weigh`."""
        return Kept(self) if self.sees_gradients else None

    @abstractmethod
    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The scalar, 0-dim; see :meth:`Balancer.scalarize`."""

    def forward(self, values: Tensor) -> Tensor:
        """The scalar made of ``values``, 0-dim.

        Raises:
            TypeError: ``values`` is not a floating-point tensor.
            ValueError: its shape is not the one that the balancer was made for.
        """
        if not isinstance(values, Tensor) or not values.is_floating_point():
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"{type(self).__name__}: expected a floating-point tensor of values, got {kind}.")
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transforming():
            self.constrain()
        return self.scalarize(values)


class GradientBalancer(Balancer):
    """A balancer that looks at the tasks' gradients on the shared representation, and decides on the shared one.

    Heads keep the gradient of their own loss, unweighted. Alone it is called on a matrix ``[T, n]`` whose rows are
    the gradients, and returns the shared gradient ``[n]``.

    A gradient that is not finite must be neither hidden nor learned from: ``gradients.finite`` tells. With several
    processes each decides by itself, from the same numbers: the decision must follow from these and the state alone,
    so that a random one needs a generator that is seeded alike in all of them.
    """

    def undo_scalarize(self) -> Undo | None:
        """All buffers, where it looks at the losses; see :meth:`Balancer.undo_scalarize`."""
        return Kept(self) if type(self).scalarize is not Balancer.scalarize else None

    def undo_weigh(self) -> Undo | None:
        """All buffers; see :meth:`Balancer.undo_weigh`."""
        return Kept(self)

    @abstractmethod
    def weigh(self, gradients: TaskGradients) -> Tensor | None:
        """The weights, ``[T]``, or None; see :meth:`Balancer.weigh`."""

    def forward(self, matrix: Tensor) -> Tensor:
        """The shared gradient ``[n]`` for task gradients ``[T, n]``.

        Raises:
            TypeError: ``matrix`` is not a floating-point tensor.
            ValueError: it is not two-dimensional, or its number of rows is not the balancer's number of tasks.
        """
        gradients = TaskGradients(matrix)
        if self.num_tasks is not None and self.num_tasks != gradients.num_tasks:
            raise ValueError(
                f"{type(self).__name__} was made for {self.num_tasks} tasks, "
                f"got a matrix of {gradients.num_tasks} rows."
            )
        return self.combine(gradients)


def check_is_balancer(value: object, expected: str) -> None:
    """Refuse what is no balancer, or one that is only half made.

    Raises:
        TypeError: it is.
    """
    if not isinstance(value, Balancer):
        raise TypeError(f"balancer: expected {expected}, got {described(value)}.")
    if "_parameters" not in vars(value):
        raise TypeError(f"balancer: {type(value).__name__}.__init__ has to call super().__init__() first.")


def described(value: object) -> str:
    """What was given instead of a balancer, and how to make one of it."""
    kind = value if isinstance(value, type) else type(value)
    name, is_class = kind.__name__, kind is value
    if kind.__module__.split(".")[0] == "torchjd":
        return (
            f"the class {name} of torchjd; wrap an object: TorchJD({name}(...))"
            if is_class
            else (f"{name} of torchjd; wrap it: TorchJD(...)")
        )
    if not is_class:
        return name
    if not issubclass(kind, Balancer) or inspect.isabstract(kind):
        return f"the class {name}"
    return f"the class {name}; make one: {name}({'...' if needs_options(kind) else ''})"


def needs_options(kind: type[Balancer]) -> bool:
    """Whether a balancer has options without a default."""
    parameters = inspect.signature(kind).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def unbound(balancer: Balancer) -> ValueError:
    """The error of one that is used before it knows the number of tasks."""
    return ValueError(
        f"{type(balancer).__name__} does not know the number of tasks: hand it to a MultiTaskModel, or call "
        "bind(num_tasks)."
    )


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Options of a balancer as a tensor next to ``like``, in float32 or wider.

    Not a buffer: ``half()`` would round it, and ``to_empty()`` would leave it without a value. It is copied to a
    device once, for a copy in every step would synchronise with the host: give all of them, and :func:`select` those of
    the tasks that take part, for each choice of tasks would be one more to copy.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if torch.compiler.is_compiling() or transforming() or type(like) not in (Tensor, nn.Parameter):
        return torch.tensor(values, dtype=dtype, device=like.device)
    return _constant(values, dtype, like.device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor(values, dtype=dtype, device=device)


def select(values: Tensor, tasks: Sequence[int] | None) -> Tensor:
    """The entries of a vector that belong to ``tasks``, in their order; all of it for None.

    Not by an index tensor: making one on an accelerator would synchronise with the host.
    """
    return values if tasks is None else torch.stack([values[task] for task in tasks])
