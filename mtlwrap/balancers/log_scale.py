"""What UW and IMTL-L share: one learned logarithm of a scale per loss."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtlwrap.balancers.base import LossBalancer, select


class LogScaleBalancer(LossBalancer):
    """A loss balancer that learns one number per loss, the logarithm of its scale.

    The number is learned by the user's optimizer: put ``model.balancer_parameters()`` into it, without weight decay,
    which would pull the scales to 1. It is put back into ``[-bound, bound]`` whenever it is used in training, so it
    neither runs away (a loss of exactly zero would take it to infinity) nor sticks beyond the bound, as a number that
    is only clamped on the way into the formula does. At a bound, a gradient that leads outside is zero. A loss that was
    zero for long and comes back is met with the factor of the bound at first, and Adam remembers that gradient for
    thousands of steps: where that can happen, choose a smaller bound.

    Derived classes name the parameter in ``_parameter``.
    """

    _parameter: str

    def __init__(self, shape: int | Sequence[int] | None, init: float | Sequence[float] | None, bound: float) -> None:
        super().__init__()
        if not (isinstance(bound, int | float) and math.isfinite(bound) and bound > 0):
            raise ValueError(f"bound: expected a positive finite number, got {bound!r}.")
        self.bound = float(bound)
        self._init = _checked_init(init, self.bound)
        self.shape = _checked_shape(shape)
        if self.shape is None and isinstance(self._init, list):
            self.shape = (len(self._init),)
        self.register_parameter(self._parameter, None)
        if self.shape is not None:
            if len(self.shape) == 1:
                self.num_tasks = self.shape[0]
            self._allocate()

    def bind(self, num_tasks: int) -> None:
        """See :meth:`Balancer.bind`; a balancer that was made without a shape gets its parameter here."""
        if self.shape is None:
            self.shape = (num_tasks,)
            self._allocate()
        elif self.shape != (num_tasks,):
            raise ValueError(
                f"{type(self).__name__} was made for values of shape {self.shape}, but the model has {num_tasks} "
                f"heads; expected the shape {num_tasks}, or none at all."
            )
        super().bind(num_tasks)

    def constrain(self) -> None:
        """Put log-scales that an optimizer has taken beyond the bound back onto it."""
        parameter = self._parameters[self._parameter]
        if parameter is not None:
            # Through .data: no formula keeps the parameter itself for its backward, so another total that waits for
            # its own backward need not, and shall not, take this for a change of its inputs.
            parameter.data.clamp_(-self.bound, self.bound)

    def reset(self) -> None:
        """Set every log-scale to its initial value. An optimizer's memory of it is the optimizer's to clear."""
        parameter = self._parameters[self._parameter]
        if parameter is not None:
            with torch.no_grad():
                parameter.copy_(self._initial())

    @abstractmethod
    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The scalar, 0-dim; see :meth:`Balancer.scalarize`."""

    def extra_repr(self) -> str:
        """Shape and bound."""
        return f"shape={self.shape}, bound={self.bound:g}"

    def log_scales(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """The log-scales that belong to ``losses``, within the bound, in at least float32.

        Raises:
            ValueError: the balancer does not know its shape yet, or ``losses`` has another one.
        """
        parameter = self._parameters[self._parameter]
        if parameter is None:
            raise ValueError(
                f"{type(self).__name__} was made without a shape. Give it one, {type(self).__name__}(shape), or hand "
                "it to a MultiTaskModel, which tells it the number of tasks."
            )
        chosen = select(cast("Tensor", _Inward.apply(parameter, self.bound)[0]), tasks)
        if losses.shape != chosen.shape:
            raise ValueError(
                f"{type(self).__name__}: expected values of shape {tuple(chosen.shape)}, got {tuple(losses.shape)}."
            )
        wide = torch.promote_types(torch.promote_types(chosen.dtype, losses.dtype), torch.float32)
        return chosen.to(device=losses.device, dtype=wide)

    def _allocate(self) -> None:
        self.register_parameter(self._parameter, nn.Parameter(self._initial()))

    def _initial(self) -> Tensor:
        if self.shape is None:
            raise ValueError(f"{type(self).__name__} was made without a shape.")
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
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"shape: expected an int or a sequence of ints, got {shape!r}.")
        if size < 1:
            raise ValueError(f"shape: expected sizes of at least 1, got {shape!r}.")
    return sizes


def _checked_init(init: float | Sequence[float] | None, bound: float) -> float | list[float]:
    if init is None:
        return 0.0
    given = init.tolist() if isinstance(init, Tensor) else init
    values = list(given) if isinstance(given, Sequence) else [given]
    if not values:
        raise ValueError("init: expected one number, or one per task, got none.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"init: expected a number, or one per task, got {init!r}.")
        if not abs(value) <= bound:
            raise ValueError(f"init: expected log-scales within [-{bound:g}, {bound:g}], got {value}.")
    return [float(value) for value in values] if isinstance(given, Sequence) else float(values[0])
