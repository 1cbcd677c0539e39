"""What UW and IMTL-L share: one learned logarithm of a scale per loss."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtlwrap.balancers.base import LossBalancer, select, unbound
from mtlwrap.balancers.loss_state import learns, wide, write
from mtlwrap.checks import integer, is_integer, one_or_each, positive
from mtlwrap.state import beside

# What a log-scale may start at: numbers, or what fits the first losses, by this name.
FIRST_LOSSES = "first_losses"
Init = float | Sequence[float] | Literal["first_losses"] | None


class LogScaleBalancer(LossBalancer):
    """A loss balancer that learns one number per loss, the logarithm of its scale.

    The number is learned by the user's optimizer: put ``model.balancer_parameters()`` into it, without weight decay,
    which would pull the scales to 1. It is put back into ``[-bound, bound]`` whenever it is used in training, so it
    neither runs away (a loss of exactly zero would take it to infinity) nor sticks beyond the bound, as a number that
    is only clamped on the way into the formula does. At a bound, a gradient that leads outside is zero. A loss that was
    zero for long and comes back is met with the factor of the bound at first, and Adam remembers that gradient for
    thousands of steps: where that can happen, choose a smaller bound. (Where ``fully_shard`` was called on a module
    around the model only, and not on the model, what is put back is what is used, not what is stored.)

    With ``init="first_losses"`` the log-scale is the learned number, from zero, plus ``start``: what :meth:`_fitting`
    says for the first loss of each task. The number learned then says how far the task has come since.

    Derived classes name the parameter in ``_parameter``.

    Attributes:
        start: what is added to the learned numbers, in their shape, infinite where no loss came yet; None for numbers
            that start as they were given.
    """

    _parameter: str
    start: Tensor | None

    def __init__(self, shape: int | Sequence[int] | None, init: Init, bound: float) -> None:
        super().__init__()
        self.bound = positive("bound", bound)
        self._follows_losses = isinstance(init, str) and init == FIRST_LOSSES
        self._init = _checked_init(0.0 if self._follows_losses else init, self.bound)
        self.shape = _checked_shape(shape)
        # The option that says how many tasks there are.
        self._sized_by = "shape"
        if self.shape is None and isinstance(self._init, list):
            self.shape, self._sized_by = (len(self._init),), "init"
        self.register_parameter(self._parameter, None)
        self.register_buffer("start", None)
        if self.shape is not None:
            if len(self.shape) == 1:
                self.num_tasks = self.shape[0]
            self._allocate()

    def bind(self, num_tasks: int) -> None:
        """See :meth:`Balancer.bind`; a balancer that was made without a shape gets its parameter here."""
        integer("num_tasks", num_tasks, least=1)
        if self.shape is None:
            self.shape = (num_tasks,)
            self._allocate()
        elif self.shape != (num_tasks,):
            right = f"the shape {num_tasks}, or none at all"
            if self._sized_by != "shape":
                right = f"{self._sized_by} with one entry, or with {num_tasks}"
            raise ValueError(
                f"{type(self).__name__} was made for values of shape {self.shape}, but the model has {num_tasks} "
                f"heads; expected {right}."
            )
        super().bind(num_tasks)

    def constrain(self) -> None:
        """Put log-scales that an optimizer has taken beyond the bound back onto it."""
        parameter = self._parameters[self._parameter]
        if parameter is None:
            return
        # Through .data: no formula keeps the parameter itself for its backward, so another total that waits for
        # its own backward need not, and shall not, take this for a change of its inputs.
        if self.start is None:
            parameter.data.clamp_(-self.bound, self.bound)
        else:
            start = beside(torch.where(self.start.isfinite(), self.start, 0.0), parameter)
            parameter.data.clamp_(-self.bound - start, self.bound - start)

    def reset(self) -> None:
        """Set every log-scale to its initial value. An optimizer's memory of it is the optimizer's to clear."""
        parameter = self._parameters[self._parameter]
        with torch.no_grad():
            if parameter is not None:
                parameter.copy_(self._initial())
            if self.start is not None:
                self.start.fill_(torch.inf)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take numbers that were learned under another ``init`` for the log-scales that they were."""
        learned, start = prefix + self._parameter, prefix + "start"
        if learned in state_dict and self.start is not None and start not in state_dict:
            state_dict[start] = torch.zeros_like(self.start)
        if learned in state_dict and self.start is None and start in state_dict:
            begun = state_dict.pop(start)
            begun = torch.where(begun.isfinite(), begun, 0.0)
            state_dict[learned] = state_dict[learned] + beside(begun, state_dict[learned])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @abstractmethod
    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The scalar, 0-dim; see :meth:`Balancer.scalarize`."""

    @abstractmethod
    def _fitting(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """The log-scales at which the scalar is smallest for these losses."""

    def extra_repr(self) -> str:
        """Shape and bound, and where the log-scales start if that is not a number."""
        start = f", init={FIRST_LOSSES!r}" if self._follows_losses else ""
        return f"shape={self.shape}, bound={self.bound:g}{start}"

    def log_scales(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """The log-scales that belong to ``losses``, within the bound, in at least float32.

        Raises:
            ValueError: the balancer does not know its shape yet, or ``losses`` has another one.
        """
        parameter = self._parameters[self._parameter]
        if parameter is None:
            raise unbound(self)
        chosen = select(parameter, tasks)
        if losses.shape != chosen.shape:
            raise ValueError(
                f"{type(self).__name__}: expected values of shape {tuple(chosen.shape)}, got {tuple(losses.shape)}."
            )
        dtype = torch.promote_types(torch.promote_types(chosen.dtype, losses.dtype), torch.float32)
        chosen = chosen.to(device=losses.device, dtype=dtype)
        if self.start is not None:
            chosen = chosen + self._started(self.start, losses.detach(), tasks).to(chosen)
        clamped: Tensor = _Inward.apply(chosen, self.bound)[0]
        return clamped

    def _started(self, start: Tensor, losses: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """What to add to the learned numbers of ``tasks``; where it is not known yet, these losses say."""
        known = select(start, tasks).to(losses.device)
        fitting = self._fitting(wide(losses), tasks).to(known.dtype)
        # Not with a loss that is zero or negative, a later one will do; nor with one that is not finite.
        begins = ~known.isfinite() & fitting.isfinite() & losses.isfinite().all()
        fitting = fitting.clamp(-self.bound, self.bound)
        if learns(self):
            write(start, fitting, tasks, begins)
        return torch.where(begins, fitting, torch.where(known.isfinite(), known, 0.0))

    def _allocate(self) -> None:
        initial = self._initial()
        self.register_parameter(self._parameter, nn.Parameter(initial))
        if self._follows_losses:
            self.start = wide(torch.full_like(initial, torch.inf))

    def _initial(self) -> Tensor:
        if self.shape is None:
            raise unbound(self)
        if not isinstance(self._init, list):
            return torch.full(self.shape, self._init)
        if math.prod(self.shape) != len(self._init):
            raise ValueError(
                f"init: expected one number, or {math.prod(self.shape)} for the shape {self.shape}, "
                f"got {len(self._init)}."
            )
        return torch.tensor(self._init, dtype=torch.get_default_dtype()).reshape(self.shape)


class _Inward(torch.autograd.Function):
    """Clamp; at a bound, only a gradient passes whose descent step leads back inside.

    Nor does one that is not finite: the mean over an empty selection is NaN, and one such loss would make the
    log-scale NaN for good, where the network's own parameters get a gradient of zero from it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
        return values.clamp(-bound, bound), values >= bound, values <= -bound

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # Masks and not the values: the parameter itself may be projected before the backward.
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        upper, lower = ctx.saved_tensors
        gradient = gradients[0]
        outward = (upper & (gradient < 0)) | (lower & (gradient > 0))
        return torch.where(outward | ~gradient.isfinite(), 0.0, gradient), None


def _checked_shape(shape: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    if not isinstance(shape, int | Sequence):
        raise TypeError(f"shape: expected an int or a sequence of ints, got {shape!r}.")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    for size in sizes:
        if not is_integer(size):
            raise TypeError(f"shape: expected an int or a sequence of ints, got {shape!r}.")
        if size < 1:
            raise ValueError(f"shape: expected sizes of at least 1, got {shape!r}.")
    return sizes


def _checked_init(init: Init, bound: float) -> float | list[float]:
    if init is None:
        return 0.0
    values = one_or_each("init", init, f"a number, one per task, or {FIRST_LOSSES!r}")
    for value in values if isinstance(values, list) else [values]:
        if not abs(value) <= bound:
            raise ValueError(f"init: expected log-scales within [-{bound:g}, {bound:g}], got {value}.")
    return values
