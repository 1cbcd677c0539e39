"""GradNorm: learned weights that give every task's gradient the norm its progress calls for."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlwrap.balancers.base import GradientBalancer, constant, select
from mtlwrap.balancers.first_losses import FirstLosses
from mtlwrap.gradients import TaskGradients


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
        self.alpha = checked_alpha(alpha)
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
        """The weights of these tasks, ``[len(tasks)]``, detached; they sum to their number."""
        logits = select(self.logits.detach(), tasks)
        return len(logits) * logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)

    @property
    def scales_losses(self) -> bool:
        """Heads see the weights too."""
        return True

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The weighted sum of the losses."""
        if self.logits is None:
            raise ValueError("GradNorm does not know the number of tasks: hand it to a MultiTaskModel, or call bind.")
        return (losses * self.weights(tasks).to(losses.device)).sum()

    def weigh(self, gradients: TaskGradients) -> Tensor:
        """One for each task that takes part, as the losses are weighted; see :meth:`Balancer.weigh`."""
        self.first_losses.take(gradients)
        return gradients.active.double()

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


def relative_rates(progress: Tensor, gradients: TaskGradients, alpha: float) -> Tensor:
    r"""The relative inverse training rates :math:`r^\alpha`, ``[T]``: progress over its mean; 1 where all are 0."""
    active = gradients.active
    progress = torch.where(active, progress.to(gradients.norms).clamp(min=0.0), 0.0)
    mean = progress.sum() / active.sum()
    return torch.where(mean > 0, progress / torch.where(mean > 0, mean, 1.0), 1.0) ** alpha


def pulls(norms: Tensor, reference: Tensor, rates: Tensor) -> Tensor:
    r"""The derivative of :math:`|G_k - \text{target}_k|` by :math:`\log w_k`, ``[T]``, with the target constant."""
    return torch.sign(norms - reference * rates) * norms


def logit_gradients(pull: Tensor, logits: Tensor, gradients: TaskGradients) -> Tensor:
    r"""From derivatives by :math:`\log w` to those by p, where :math:`w \propto \operatorname{softmax}(p)`."""
    masked = torch.where(gradients.active, logits.detach().to(pull), -torch.inf)
    return torch.where(gradients.active, pull - masked.softmax(0) * pull.sum(), 0.0).to(logits)


def checked_alpha(alpha: float) -> float:
    """Alpha, if it is a finite number of at least zero."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha: expected a number, got {alpha!r}.")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a finite number of at least 0, got {alpha}.")
    return float(alpha)


def _checked_losses(losses: Sequence[float]) -> list[float]:
    values = [float(loss) for loss in losses]
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError(f"initial_losses: expected one positive finite number per task, got {list(losses)}.")
    return values
