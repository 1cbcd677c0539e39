"""RLW, random loss weighting."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtlwrap.balancers.base import LossBalancer, select
from mtlwrap.balancers.loss_state import learns, wide
from mtlwrap.checks import integer, positive
from mtlwrap.vectors import widest_dtype

_BITS = (1 << 64) - 1
# The constants of splitmix64: how far apart the counters are, and the two factors of its finalizer, as Stafford's
# variant 13 has them.
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


class RLW(LossBalancer):
    r"""Random loss weighting: new random weights in every step; the baseline that a method should beat.

    Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning
    <https://arxiv.org/abs/2111.10603>`_ (TMLR 2022), §3, with the normal distribution:

    .. math:: \sum_i \lambda_i L_i, \qquad \lambda = \mathrm{softmax}(n), \qquad n_i \sim \mathcal{N}(0, \sigma^2)

    The weights sum to **1** over the tasks that take part, as in the paper and in LibMTL, where those of
    :class:`EqualWeighting` sum to T: their mean is :math:`1/T` each. With a plain SGD step, compare at T times the
    learning rate; Adam hardly notices.

    The numbers are not drawn from torch's generators, which they neither read nor move: :math:`n_i` is a function of
    the seed, the step and the task (splitmix64 of these, then Box-Muller). So a resumed training goes on with the same
    weights, every process of a distributed training has the same, and so has a task whether or not another is absent.
    ``step``, the only state, counts the training steps; one with a loss that is not finite does not count and draws no
    new weights. In evaluation and under ``torch.no_grad`` the weights are those of the next training step.

    Args:
        seed: :math:`0 \le` seed :math:`< 2^{64}`. An option, not state: give the same one when you resume.
        std: :math:`\sigma > 0`; the paper's is 1. Small ones make the weights nearly equal, large ones leave one task.

    Raises:
        TypeError, ValueError: an argument is not of the stated kind or range.

    Shape:
        ``values``: any; the result is 0-dim, in float32 or wider.

    Example:
        >>> import torch
        >>> balancer = RLW(seed=1)
        >>> losses = torch.tensor([2.0, 2.0, 2.0], requires_grad=True)
        >>> total = balancer(losses)  # whatever the weights are, they sum to 1
        >>> round(total.item(), 4), balancer.step
        (2.0, tensor(1))
    """

    step: Tensor

    def __init__(self, seed: int = 0, std: float = 1.0) -> None:
        super().__init__()
        self.seed = integer("seed", seed)
        if not 0 <= seed <= _BITS:
            raise ValueError(f"seed: expected at least 0 and less than 2**64, got {seed}.")
        self.std = positive("std", std)
        with torch.inference_mode(False):
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Begin again at the first step."""
        with torch.no_grad():
            self.step.zero_()

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:  # noqa: D102 - see the base
        values = wide(losses).flatten()
        weights = (self.std * self._normals(values, tasks)).softmax(0).to(values.dtype)
        if learns(self):
            # Not in place: the count may be on another device than the losses.
            self.step.copy_(self.step + values.detach().isfinite().all())
        return (weights * values).sum()

    def _normals(self, values: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """A standard normal number for each value, as wide as the device has it, for the present step."""
        count = values.shape[0] if tasks is None else 1 + max(tasks, default=-1)
        # (2 t + 2) gamma for task t, wrapping around; not from arange, whose products inductor refuses to wrap.
        gammas = torch.full((count,), _signed(2 * _GAMMA & _BITS), dtype=torch.int64, device=values.device)
        offsets = select(gammas.cumsum(0), tasks)
        key = _mixed(_mixed_int(self.seed) + self.step.to(values.device) * _signed(_GAMMA))
        # Two counters for each task.
        first = _uniform(_mixed(key + offsets - _signed(_GAMMA)))
        second = _uniform(_mixed(key + offsets))
        # Box-Muller; 1 - u is in (0, 1], so its logarithm is finite.
        return (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)

    def extra_repr(self) -> str:
        """Seed and standard deviation."""
        return f"seed={self.seed}, std={self.std:g}"


def _mixed(bits: Tensor) -> Tensor:
    """splitmix64's finalizer on 64 bits, held in int64, whose products wrap around."""
    bits = (bits ^ _shifted(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_SECOND)
    return bits ^ _shifted(bits, 31)


def _mixed_int(bits: int) -> int:
    """The same for an int on the host."""
    bits = ((bits ^ (bits >> 30)) * _FIRST) & _BITS
    bits = ((bits ^ (bits >> 27)) * _SECOND) & _BITS
    return _signed(bits ^ (bits >> 31))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right with zeros; int64 alone would fill in its sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(bits: int) -> int:
    """The int64 of these 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits


def _uniform(bits: Tensor) -> Tensor:
    """The upper bits as a number in [0, 1), as many as it can hold without rounding."""
    dtype = widest_dtype(bits.device)
    kept = 53 if dtype == torch.float64 else 24
    return _shifted(bits, 64 - kept).to(dtype) * 2.0**-kept
