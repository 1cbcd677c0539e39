"""GLS, the geometric loss strategy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlwrap.balancers.base import LossBalancer
from mtlwrap.balancers.loss_state import wide
from mtlwrap.checks import positive


class GLS(LossBalancer):
    r"""The geometric mean of the losses, so that their units do not count.

    Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning
    <https://arxiv.org/abs/1904.08492>`_ (CVPR Workshops 2019), the geometric loss strategy:

    .. math:: G = \left( \prod_{i=1}^{T} L_i \right)^{1/T}, \qquad
        \frac{\partial G}{\partial L_i} = \frac{G}{T L_i}

    over the T losses that take part. The gradient is that of :math:`\tfrac1T \sum_i \log L_i` times G: each task counts
    by the *relative* decrease of its loss, and a loss in other units changes nothing but the length of the step. It is
    computed from logarithms, so that a product of many losses neither overflows nor underflows, as it does in LibMTL.
    The paper's focused variant, some losses twice in the product, is not here.

    Losses must not be negative:

    - one below ``floor``, zero included, counts as ``floor`` and gets no gradient. (In the formula it would get an
      infinite one.) The others' weights are small then, as G is: a task at zero stops the rest, which lies in the
      geometric mean. A larger ``floor`` stops them less.
    - one below zero makes the total and all gradients NaN: a product of losses says nothing then. Under a
      ``GradScaler`` such a step is skipped.

    Args:
        floor: what a smaller loss counts as, in the unit of the losses; positive.

    Raises:
        TypeError, ValueError: ``floor`` is no positive finite number.

    Shape:
        ``values``: any; the result is 0-dim, in float32 or wider.

    Example:
        >>> import torch
        >>> losses = torch.tensor([2.0, 8.0], requires_grad=True)
        >>> total = GLS()(losses)
        >>> total.backward()
        >>> round(total.item(), 4), losses.grad
        (4.0, tensor([1.0000, 0.2500]))
    """

    def __init__(self, *, floor: float = 1e-8) -> None:
        super().__init__()
        self.floor = positive("floor", floor)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:  # noqa: D102 - see the base
        values = wide(losses)
        # Only from zero on: the logarithm of a negative loss is NaN, forward and backward, and is meant to be.
        floor = max(self.floor, torch.finfo(values.dtype).tiny)
        return torch.where((values >= 0) & (values < floor), floor, values).log().mean().exp()

    def extra_repr(self) -> str:
        """The floor."""
        return f"floor={self.floor:g}"
