"""FAMO, fast adaptive multitask optimization."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlwrap.balancers.base import constant, select
from mtlwrap.balancers.loss_state import LossStateBalancer, learns, wide, write
from mtlwrap.checks import at_least_zero, one_or_each

# What the official code adds to a loss before its logarithm.
_EPSILON = 1e-8


class FAMO(LossStateBalancer):
    r"""Steers all losses to fall at the same rate, by the logarithms of their values alone; it takes its time.

    Liu et al., `FAMO: Fast Adaptive Multitask Optimization <https://arxiv.org/abs/2306.03792>`_ (NeurIPS 2023),
    Algorithm 1. With the learned ``logits`` :math:`\xi`, and :math:`b` a lower bound of the losses,

    .. math:: c \sum_i z_i \log(L_i - b_i), \qquad z = \mathrm{softmax}(\xi), \qquad
        c = \Big( \sum_i \frac{z_i}{L_i - b_i} \Big)^{-1}

    where c is taken for a constant, so that the weights :math:`c z_i / (L_i - b_i)` of the losses sum to 1. By how much
    each loss fell decides on the logits' gradient,

    .. math:: d = J_z(\xi)^\top \delta + \gamma \xi, \qquad
        \delta_i = \log(L_i^\mathrm{old} - b_i) - \log(L_i^\mathrm{new} - b_i)

    so the weight moves to the tasks that fell behind. :math:`10^{-8}` is added to each :math:`L_i - b_i`, as in the
    official code. The logits start at zero.

    **They are learned by your optimizer**, as the official code learns them with an Adam of their own: take Adam, and
    ``model.param_groups(lr=..., balancer_lr=0.025)``. Leave the weight decay of that group at 0, as it is:
    :math:`\gamma` is already in the gradient, which for Adam is the same. (AdamW's decay would be another thing.)

    Differences from the official code, and LibMTL's:

    - They evaluate the batch a second time after the step, for :math:`L^\mathrm{new}`. Here it is the loss of the next
      batch, at no cost, and the logits move in that next step: one later. That a batch is harder than the one before
      enters :math:`\delta`, but with the opposite sign in the step after; the sum over the steps stays right. Where
      losses differ much from batch to batch, take a smaller ``balancer_lr``.
    - The first step has no loss to compare with, and a gradient of zero.
    - A task that takes no part has neither a weight nor a gradient, and the softmax is over the others. When it is
      back, its loss is compared with its last one.
    - The official code clips the norm of the shared gradient to 1; do so if you want to compare. Its class has
      :math:`\gamma` = 0.01, the paper's Algorithm 2 and LibMTL 0.001.

    A loss must not be below its bound: its logarithm makes the total and the losses' gradients NaN, as does a loss that
    is not finite. Such a step leaves the state alone and gives the logits no gradient. A loss that is exactly at its
    bound has nearly all the weight, in the formula too; where that happens, give ``min_losses`` a little below.

    Args:
        num_tasks: T; None leaves it to the model.
        gamma: :math:`\gamma \ge 0`, how strongly the logits are drawn to 0, which stands for equal z.
        min_losses: :math:`b`, one for all or one per task.

    Raises:
        TypeError, ValueError: an argument is not of the stated kind or range; in use, the number of tasks is not known
            or another one.

    Shape:
        ``values``: ``[T]``; the result is 0-dim, in float32 or wider.

    Example:
        >>> import torch
        >>> balancer = FAMO(2)
        >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> balancer(losses).backward()
        >>> losses.grad  # z is equal, and the weights are as 1 / L
        tensor([0.8000, 0.2000])
    """

    logits: nn.Parameter
    log_losses: Tensor

    def __init__(
        self, num_tasks: int | None = None, *, gamma: float = 0.01, min_losses: float | Sequence[float] = 0.0
    ) -> None:
        bounds = _checked_bounds(min_losses)
        super().__init__(num_tasks)
        if isinstance(bounds, tuple) and num_tasks is None:
            self.bind(len(bounds))
        if isinstance(bounds, tuple) and len(bounds) != self.num_tasks:
            raise ValueError(f"min_losses: expected one number, or {num_tasks}, got {len(bounds)}.")
        self.gamma = at_least_zero("gamma", gamma)
        self.min_losses = bounds

    def reset(self) -> None:
        """Equal weights, no losses seen. An optimizer's memory of the logits is the optimizer's to clear."""
        if self.num_tasks is not None:
            with torch.no_grad():
                self.logits.zero_()
                self.log_losses.fill_(torch.inf)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:  # noqa: D102 - see the base
        self._check(losses, tasks)
        logits = wide(select(self.logits, tasks)).to(losses.device)
        gaps = wide(losses) - self._bounds(losses, tasks) + _EPSILON
        logs = gaps.log()
        sound = logs.detach().isfinite().all()
        shares = logits.detach().softmax(0)
        factors = shares / (shares / gaps.detach()).sum()
        # An infinite loss would have a gradient of zero in the formula, and be hidden from a GradScaler.
        total = (torch.where(sound, factors, torch.nan) * logs).sum()
        # Zero, with the gradient d on the logits.
        total = (
            total + (self._direction(logits.detach(), logs.detach(), sound, tasks) * (logits - logits.detach())).sum()
        )
        if learns(self):
            write(self.log_losses, logs.detach(), tasks, sound)
        return total

    def extra_repr(self) -> str:
        """The options."""
        bounds = list(self.min_losses) if isinstance(self.min_losses, tuple) else f"{self.min_losses:g}"
        return f"num_tasks={self.num_tasks}, gamma={self.gamma:g}, min_losses={bounds}"

    def _direction(self, logits: Tensor, logs: Tensor, sound: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """The gradient d of the logits, zero for a task that there is nothing to compare with."""
        fell = select(self.log_losses, tasks).to(logs.device) - logs
        # In a step with a loss that is not finite nothing moves.
        moves = fell.isfinite() & sound
        fell = torch.where(moves, fell, 0.0)
        shares = torch.where(moves, torch.where(moves, logits, -torch.inf).softmax(0), 0.0)
        return shares * (fell - (shares * fell).sum()) + torch.where(moves, self.gamma * logits, 0.0)

    def _bounds(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor | float:
        if not isinstance(self.min_losses, tuple):
            return self.min_losses
        return select(constant(self.min_losses, losses), tasks)

    def _allocate(self, num_tasks: int) -> None:
        # log_losses [T]: log(L - b) of each task's last step, inf where there was none yet.
        self.logits = nn.Parameter(torch.zeros(num_tasks))
        self.register_buffer("log_losses", wide(torch.zeros(num_tasks)))


def _checked_bounds(min_losses: float | Sequence[float]) -> float | tuple[float, ...]:
    bounds = one_or_each("min_losses", min_losses)
    for bound in bounds if isinstance(bounds, list) else [bounds]:
        if not math.isfinite(bound):
            raise ValueError(f"min_losses: expected finite numbers, got {bound}.")
    return tuple(bounds) if isinstance(bounds, list) else bounds
