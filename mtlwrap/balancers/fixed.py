"""Fixed weights, chosen by hand."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from mtlwrap.balancers.base import LossBalancer, constant, select
from mtlwrap.checks import at_least_zero, ordered


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
        given = ordered("weights", weights, "numbers")
        if not given:
            raise ValueError("weights: expected one number per task, got none.")
        self.num_tasks = len(given)
        self.weights = tuple(at_least_zero(f"weights[{task}]", weight) for task, weight in enumerate(given))

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
