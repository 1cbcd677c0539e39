"""Equal weighting: the sum of the losses."""

from collections.abc import Sequence

from torch import Tensor

from mtlwrap.balancers.base import LossBalancer


class EqualWeighting(LossBalancer):
    r"""The plain sum :math:`\sum_t L_t`: the baseline that every balancer has to beat.

    Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task Learning
    <https://arxiv.org/abs/2201.04122>`_ (2022), show how far it gets when regularised well. The gradients are those
    of ``sum(losses).backward()``. LibMTL calls it EW.

    Example:
        >>> import torch
        >>> EqualWeighting()(torch.tensor([1.0, 2.0]))
        tensor(3.)
    """

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:  # noqa: D102 - see the base
        return losses.sum()
