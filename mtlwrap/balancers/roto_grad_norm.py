"""RotoGradNorm: RotoGrad's rotations, with GradNorm's magnitudes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlwrap.balancers.norm_objective import logit_gradients, pulls, relative_rates
from mtlwrap.balancers.rotate_only import RotateOnly
from mtlwrap.checks import at_least_zero
from mtlwrap.gradients import TaskGradients
from mtlwrap.vectors import widest


class RotoGradNorm(RotateOnly):
    r"""Rotations as in :class:`RotateOnly`, and learned weights for the tasks' gradients as in :class:`GradNorm`.

    Javaloy and Valera, `RotoGrad: Gradient Homogenization in Multitask Learning <https://arxiv.org/abs/2103.02631>`_
    (ICLR 2022), and the class of that name in the package ``rotograd``. The shared gradient is :math:`\sum_k w_k g_k`
    with :math:`w = T \operatorname{softmax}(p)`; p minimises, with the target constant,

    .. math:: \sum_k \left| w_k \lVert g_k \rVert
        - \Big\lVert \tfrac1T \sum_j w_j g_j \Big\rVert \; r_k^\alpha \right|

    where :math:`r_k` is the progress :math:`L_k / L_k^0` over its mean. The reference is the norm of the mean gradient,
    as in the package, and not GradNorm's mean of the norms; under conflict it is much smaller. Heads get their own
    losses, unweighted.

    Args:
        rotation_shape: as for :class:`RotateOnly`.
        alpha: as for :class:`GradNorm`.
        post_shape: as for :class:`RotateOnly`.
        normalize_losses: as for :class:`RotateOnly`.
        burn_in_period: after so many calls :math:`L^0` is taken anew.

    Raises:
        TypeError, ValueError: as :class:`RotateOnly`; ``alpha`` is negative.

    Shape:
        alone, ``matrix``: ``[T, n]``, a task's gradient per row; the result is ``[n]``, without any rotation.

    Example:
        >>> from torch import nn
        >>> from mtlwrap import MultiTaskModel
        >>> model = MultiTaskModel(nn.Linear(4, 6), [nn.Linear(6, 1), nn.Linear(6, 2)], RotoGradNorm(6, alpha=0.12))
        >>> [name for name, _ in model.balancer.named_parameters()]
        ['logits', 'rotations.angles']
    """

    logits: nn.Parameter

    def __init__(
        self,
        rotation_shape: int | Sequence[int],
        *,
        alpha: float,
        post_shape: Sequence[int] = (),
        normalize_losses: bool = False,
        burn_in_period: int = 20,
    ) -> None:
        super().__init__(
            rotation_shape, post_shape=post_shape, normalize_losses=normalize_losses, burn_in_period=burn_in_period
        )
        self.alpha = at_least_zero("alpha", alpha)
        self.register_parameter("logits", None)

    def bind(self, num_tasks: int) -> None:
        """See :meth:`Balancer.bind`; here rotations and weights are made."""
        super().bind(num_tasks)
        if self.logits is None:
            self.logits = nn.Parameter(torch.zeros(num_tasks))

    def reset(self) -> None:
        """No rotation, weights of one, no memory of losses."""
        super().reset()
        if self.logits is not None:
            with torch.no_grad():
                self.logits.zero_()

    def weigh(self, gradients: TaskGradients) -> Tensor:
        """The weights of the tasks that take part; they sum to their number. See :meth:`Balancer.weigh`."""
        super().weigh(gradients)
        return torch.where(gradients.finite, self._weights(gradients), torch.nan)

    def own_gradients(self, gradients: TaskGradients) -> dict[str, Tensor]:
        """The gradients of the rotation objective on the angles, and of the norm objective on the logits."""
        weights, count = self._weights(gradients), gradients.active.sum()
        mean_norm = (weights @ gradients.gramian @ weights).clamp(min=0.0).sqrt() / count
        progress = gradients.losses / self.first_losses.after(gradients)
        pull = pulls(weights * gradients.norms, mean_norm, relative_rates(progress, gradients, self.alpha))
        return {**super().own_gradients(gradients), "logits": logit_gradients(pull, self.logits, gradients)}

    def extra_repr(self) -> str:
        """The options that are set."""
        return f"{super().extra_repr()}, alpha={self.alpha:g}"

    def _weights(self, gradients: TaskGradients) -> Tensor:
        if self.logits is None:
            return widest(gradients.active)
        masked = torch.where(gradients.active, self.logits.detach().to(gradients.norms), -torch.inf)
        return gradients.active.sum() * masked.softmax(0)
