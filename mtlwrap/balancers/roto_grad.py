"""RotoGrad: gradients of the same direction and the same magnitude."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlwrap.balancers.rotate_only import RotateOnly
from mtlwrap.gradients import TaskGradients


class RotoGrad(RotateOnly):
    r"""Rotations as in :class:`RotateOnly`, and every task's gradient on the representation at the same norm.

    Javaloy and Valera, `RotoGrad: Gradient Homogenization in Multitask Learning <https://arxiv.org/abs/2103.02631>`_
    (ICLR 2022), §3.1, Eq. 1-4:

    .. math:: g = C \sum_k \frac{g_k}{\lVert g_k \rVert}, \qquad C = \sum_k \alpha_k \lVert g_k \rVert, \qquad
        \alpha_k = \frac{\lVert g_k \rVert / \lVert g_k^0 \rVert}{\sum_j \lVert g_j \rVert / \lVert g_j^0 \rVert}

    The tasks that have converged less, compared with their first gradient :math:`g_k^0`, set the size of the step.
    A task with a gradient of zero has no weight; its first gradient is its first that is not zero. (In the package
    ``rotograd`` one whose first gradient is zero decides on the step alone until the burn-in is over.)

    Args:
        rotation_shape: as for :class:`RotateOnly`.
        post_shape: as for :class:`RotateOnly`.
        normalize_losses: as for :class:`RotateOnly`; the first value of the losses changes nothing else.
        burn_in_period: after so many calls the first gradients (and losses) are taken anew, as in the package; the
            paper takes those of the first call.

    Raises:
        TypeError, ValueError: as :class:`RotateOnly`.

    Shape:
        alone, ``matrix``: ``[T, n]``, a task's gradient per row; the result is ``[n]``, without any rotation.

    Example:
        >>> import torch
        >>> RotoGrad(2)(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # at first the mean of the norms, twice
        tensor([2., 2.])
    """

    initial_norms: Tensor

    def __init__(
        self,
        rotation_shape: int | Sequence[int],
        *,
        post_shape: Sequence[int] = (),
        normalize_losses: bool = False,
        burn_in_period: int = 20,
    ) -> None:
        super().__init__(
            rotation_shape, post_shape=post_shape, normalize_losses=normalize_losses, burn_in_period=burn_in_period
        )
        self.register_buffer("initial_norms", torch.zeros(0))

    def weigh(self, gradients: TaskGradients) -> Tensor:
        """The weights, C over the norm of each gradient, and an update of the state; see :meth:`Balancer.weigh`."""
        norms = gradients.norms
        again = self.first_losses.take(gradients)
        initial = self._take_norms(norms, again).to(norms)
        ratios = torch.where(initial > 0, norms / torch.where(initial > 0, initial, 1.0), 0.0)
        total = ratios.sum()
        size = (ratios * norms).sum() / torch.where(total > 0, total, 1.0)
        weights = torch.where(norms > 0, size / torch.where(norms > 0, norms, 1.0), 0.0)
        return torch.where(gradients.finite, weights, torch.nan)

    def _take_norms(self, norms: Tensor, again: Tensor) -> Tensor:
        """The first norms, with these where they are the first; they are kept in training."""
        known = self.initial_norms
        if len(known) == 0:
            known = known.new_zeros(len(norms))
        norms = norms.to(known)
        fresh = norms.isfinite().all() & ((known == 0) | again) & (norms > 0)
        updated = torch.where(fresh, norms, known)
        if self.training:
            self.initial_norms = known.copy_(updated)
        return updated

    def _allocate(self) -> None:
        super()._allocate()
        self.initial_norms = torch.zeros_like(self.first_losses.values)
