"""Fixed weights, chosen by hand."""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from mtlwrap.balancers.base import LossBalancer, constant, select


class FixedWeights(LossBalancer):
    r"""The weighted sum :math:`\sum_t w_t L_t` with weights chosen by hand, for the backbone and the heads alike.

    Args:
        weights: one finite number :math:`w_t \ge 0` per task. They are an option, not state: they are not in the
            ``state_dict``.

    Raises:
        TypeError: a weight is no number.
        ValueError: there is no weight, or one is negative or not finite.

    Shape:
        ``values``: ``[T]``; the result is 0-dim.

    Example:
        >>> import torch
        >>> FixedWeights([1.0, 0.5])(torch.tensor([2.0, 4.0]))
        tensor(4.)
    """

    def __init__(self, weights: Iterable[float]) -> None:
        super().__init__()
        if not isinstance(weights, Iterable) or (isinstance(weights, Tensor) and weights.dim() != 1):
            raise TypeError(f"weights: expected a sequence of numbers, one per task, got {weights!r}.")
        given = weights.tolist() if isinstance(weights, Tensor) else list(weights)
        for task, weight in enumerate(given):
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise TypeError(f"weights[{task}]: expected a number, got {type(weight).__name__}.")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weights[{task}]: expected a finite number of at least 0, got {weight}.")
        if not given:
            raise ValueError("weights: expected one number per task, got none.")
        self.num_tasks = len(given)
        self.weights = tuple(float(weight) for weight in given)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:  # noqa: D102 - see the base
        weights = select(constant(self.weights, losses), tasks)
        if losses.shape != weights.shape:
            raise ValueError(
                f"FixedWeights: expected values of shape {tuple(weights.shape)}, got {tuple(losses.shape)}."
            )
        return (weights * losses).sum()

    def extra_repr(self) -> str:
        """The weights."""
        return f"{list(self.weights)}"
