"""GradNorm: learned weights that give every task's gradient the norm its progress calls for."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlwrap.balancers.base import GradientBalancer, constant, select, unbound
from mtlwrap.balancers.first_losses import FirstLosses
from mtlwrap.balancers.norm_objective import logit_gradients, pulls, relative_rates
from mtlwrap.checks import at_least_zero, is_number, ordered
from mtlwrap.gradients import TaskGradients
from mtlwrap.state import Undo
from mtlwrap.vectors import widest


class GradNorm(GradientBalancer):
    r"""Learned loss weights that bring the norms of the tasks' gradients together, faster learners lower.

    Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks
    <https://arxiv.org/abs/1711.02257>`_ (ICML 2018), Eq. 1-2, Algorithm 1. The total is :math:`\sum_k w_k L_k`, for
    heads and backbone alike. With :math:`G_k = \lVert w_k \nabla_z L_k \rVert`, the progress :math:`\tilde L_k = L_k /
    L_k^0` and :math:`r_k = \tilde L_k / \operatorname{mean}_j \tilde L_j`, the weights minimise, everything else
    constant,

    .. math:: \sum_k \left| G_k - \operatorname{mean}_j (G_j) \, r_k^\alpha \right|

    Its gradient is known in closed form and needs no second backward pass.

    Differences: the norms are those on the representation, not on the weights of its last layer. The weights are
    :math:`w = T \operatorname{softmax}(p)`, which keeps their sum at T (the number of tasks that take part) without
    the paper's renormalisation, and keeps them positive. LibMTL has the same, but does not weigh the heads.

    The paper learns w by Adam with 0.025, and the network with 2e-5 to 1e-3:
    ``model.param_groups(lr=1e-3, balancer_lr=0.025)``.

    Args:
        alpha: :math:`\alpha \ge 0`, how strongly a task that has learned more is held back; 0 makes all norms equal.
            The paper finds 1.5 on NYUv2, 0.12 on tasks that are alike, and up to 3 to help.
        initial_losses: :math:`L^0`, one number per task, where it is known (:math:`\log C` for C classes); None for
            the first loss of each task.

    Raises:
        TypeError, ValueError: an argument is not of the stated kind or range.

    Shape:
        alone, ``matrix``: ``[T, n]``, the gradient of each *weighted* loss per row; the result is their sum, ``[n]``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mtlwrap import MultiTaskModel
        >>> model = MultiTaskModel(nn.Linear(4, 6), [nn.Linear(6, 1), nn.Linear(6, 2)], GradNorm(alpha=1.5))
        >>> first, second = model(torch.randn(8, 4))
        >>> model.backward([first.square().mean(), second.square().mean()])
        >>> model.balancer.weights().tolist()
        [1.0, 1.0]
    """

    logits: nn.Parameter
    first_losses: FirstLosses

    def __init__(self, alpha: float = 1.5, initial_losses: Sequence[float] | None = None) -> None:
        super().__init__()
        self.alpha = at_least_zero("alpha", alpha)
        self.initial_losses = None if initial_losses is None else _checked_losses(initial_losses)
        self.first_losses = FirstLosses()
        self.register_parameter("logits", None)
        if self.initial_losses is not None:
            self.bind(len(self.initial_losses))

    def bind(self, num_tasks: int) -> None:
        """See :meth:`Balancer.bind`; here the weights are made."""
        super().bind(num_tasks)
        if self.logits is None:
            self.logits = nn.Parameter(torch.zeros(num_tasks))
            self.first_losses.allocate(num_tasks)

    def reset(self) -> None:
        """Weights of one, no memory of losses. An optimizer's memory of the weights is the optimizer's to clear."""
        self.first_losses.allocate(self.num_tasks or 0)
        if self.logits is not None:
            with torch.no_grad():
                self.logits.zero_()

    def weights(self, tasks: Sequence[int] | None = None) -> Tensor:
        """The weights of these tasks, ``[len(tasks)]``, detached; they sum to their number.

        Raises:
            ValueError: the number of tasks is not known yet.
        """
        if self.logits is None:
            raise unbound(self)
        logits = select(self.logits.detach(), tasks)
        return len(logits) * logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)

    @property
    def scales_losses(self) -> bool:
        """Heads see the weights too."""
        return True

    def undo_scalarize(self) -> Undo | None:
        """None: the losses are kept by :meth:`weigh`."""
        return None

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The weighted sum of the losses."""
        return (losses * self.weights(tasks).to(losses.device)).sum()

    def weigh(self, gradients: TaskGradients) -> Tensor:
        """One for each task that takes part, as the losses are weighted; see :meth:`Balancer.weigh`."""
        self.first_losses.take(gradients)
        return widest(gradients.active)

    def own_gradients(self, gradients: TaskGradients) -> dict[str, Tensor]:
        """The gradient of the objective on the logits of the weights; zero for a task that takes no part."""
        count = gradients.active.sum()
        progress = gradients.losses / self._initial(gradients)
        pull = pulls(gradients.norms, gradients.norms.sum() / count, relative_rates(progress, gradients, self.alpha))
        return {"logits": logit_gradients(pull, self.logits, gradients)}

    def extra_repr(self) -> str:
        """The options."""
        known = "" if self.initial_losses is None else f", initial_losses={self.initial_losses}"
        return f"alpha={self.alpha:g}{known}"

    def _initial(self, gradients: TaskGradients) -> Tensor:
        if self.initial_losses is not None:
            return constant(tuple(self.initial_losses), gradients.losses)
        return self.first_losses.after(gradients)


def _checked_losses(losses: Sequence[float]) -> list[float]:
    values = ordered("initial_losses", losses, "numbers")
    if not all(map(is_number, values)):
        raise TypeError(f"initial_losses: expected a sequence of numbers, one per task, got {losses!r}.")
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError(f"initial_losses: expected one positive finite number per task, got {values}.")
    return list(map(float, values))
