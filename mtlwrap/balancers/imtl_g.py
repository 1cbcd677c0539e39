"""IMTL-G, the gradient balance of impartial multi-task learning."""

import torch
from torch import Tensor

from mtlwrap.balancers.base import GradientBalancer
from mtlwrap.checks import flag
from mtlwrap.gradients import TaskGradients
from mtlwrap.min_norm import min_norm_weights

# The share of cancellation up to which the paper's weights are kept: below it the step shrinks instead of exploding.
_CANCELLATION = 0.1
# There is a direction with equal projections if they differ by no more than this share of the largest, and if that is
# no less than this, of the 1 that was asked for.
_INEQUALITY = 1e-3
_LEAST = 1e-2
# Rounds of iterated Tikhonov regularisation: what the ridge takes from a sound direction is given back.
_REFINEMENTS = 3


class IMTLG(GradientBalancer):
    r"""Gradient balance: a shared gradient with the same projection onto every task's gradient.

    Liu et al., `Towards Impartial Multi-task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_ (ICLR 2021),
    §3.1, Eq. 1-2: :math:`g = \sum_t \alpha_t g_t` with :math:`\sum_t \alpha_t = 1` and :math:`\langle g, u_1 \rangle
    = \dots = \langle g, u_T \rangle` for the unit gradients :math:`u_t = g_t / \lVert g_t \rVert`. Instead of the
    paper's formula its equivalent on the cosines :math:`C_{st} = \langle u_s, u_t \rangle` is solved,

    .. math:: C w = 1, \qquad v_t = w_t / \lVert g_t \rVert, \qquad \alpha_t = \frac{v_t}{\sum_s v_s}

    which is impartial to 1e-5 in float32 however different the norms are, where the inverse or pseudo-inverse of the
    raw Gramian (LibMTL, TorchJD) fails from a ratio of 1000.

    The paper's :math:`\sum_s v_s` can be zero or negative; then the weights explode, or the step *ascends* on every
    task. Here, by default, :math:`\alpha_t = v_t / \max(\sum_s v_s, 0.1 \sum_s |v_s|)`: the paper's weights wherever
    they cancel by less than 90 %, and otherwise the same impartial direction, downhill for all tasks, with a shorter
    step. Where no impartial direction exists (opposing gradients, more tasks than dimensions) all weights are zero
    and the backbone is not updated in that step; the heads are.

    A task whose gradient is zero gets no weight. Equal or parallel gradients share one. Single weights can be
    negative: that is right for the shared gradient, and heads never see them. A gradient that is not finite makes
    every weight NaN, so that a ``GradScaler`` skips the step.

    Args:
        nonneg: take the shortest vector in the *convex* hull of the unit gradients: no weight is negative,
            they sum to 1, and the projections are equal among the tasks with a weight and larger on the others. The
            same as without wherever no weight is negative; it runs 24 rounds of a solver for the T x T system, which
            costs several milliseconds on a CPU.
        strict: the paper to the letter, :math:`\alpha = v / \sum v`, ascent and explosion included.

    Raises:
        TypeError, ValueError: an option is no bool, or both are set.

    Shape:
        alone, ``matrix``: ``[T, n]``, a task's gradient per row; the result is ``[n]``.

    Example:
        >>> import torch
        >>> IMTLG()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # weights 3/4 and 1/4
        tensor([0.7500, 0.7500])
    """

    def __init__(self, *, nonneg: bool = False, strict: bool = False) -> None:
        super().__init__()
        self.nonneg = flag("nonneg", nonneg)
        self.strict = flag("strict", strict)
        if nonneg and strict:
            raise ValueError("nonneg and strict exclude each other: the paper's weights may be negative.")

    def weigh(self, gradients: TaskGradients) -> Tensor:  # noqa: D102 - see the base
        norms = gradients.norms
        usable = norms > 0
        ridge = _ridge(gradients.precision)
        if self.nonneg:
            # With the ridge, gradients that are parallel but for their rounding share a weight.
            identity = torch.eye(gradients.num_tasks, dtype=norms.dtype, device=norms.device)
            w = min_norm_weights(gradients.cosines + ridge * identity, usable)
        else:
            w = _solution(gradients.cosines, usable, ridge)
        v = w * _relative_inverse(norms, usable)
        weights = v / self._divisor(v)
        if not (self.strict or self.nonneg):
            weights = torch.where(_has_impartial_direction(gradients.cosines, usable, w), weights, 0.0)
        return torch.where(gradients.finite, weights, torch.nan)

    def extra_repr(self) -> str:
        """The options that are set."""
        return ", ".join(f"{name}=True" for name in ("nonneg", "strict") if getattr(self, name))

    def _divisor(self, v: Tensor) -> Tensor:
        size = v.abs().sum()
        divisor = v.sum() if self.strict else torch.maximum(v.sum(), _CANCELLATION * size)
        return torch.where(size > 0, divisor, 1.0)  # with a gradient of zero in every task


def _ridge(precision: torch.dtype) -> float:
    """What is added to the cosines' diagonal: enough that rounding in the gradients tells no two tasks apart."""
    return {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 3e-3}.get(precision, 1e-2)


def _relative_inverse(norms: Tensor, usable: Tensor) -> Tensor:
    """The inverse of each norm times the smallest, so that it neither overflows nor vanishes for all."""
    smallest = torch.where(usable, norms, torch.inf).amin()
    return torch.where(usable, smallest / norms, 0.0)


def _inverse(cosines: Tensor, usable: Tensor, ridge: float) -> Tensor:
    """The inverse of the regularised cosines of the usable tasks; zero in the rows and columns of the others."""
    pairs = usable[:, None] & usable[None, :]
    identity = torch.eye(usable.shape[0], dtype=cosines.dtype, device=cosines.device)
    matrix = torch.where(pairs, cosines, identity).nan_to_num(0.0) + ridge * identity
    factor, _ = torch.linalg.cholesky_ex(matrix)  # without a check, which would synchronise with the host
    return torch.where(pairs, torch.cholesky_inverse(factor), 0.0)


def _solution(cosines: Tensor, usable: Tensor, ridge: float) -> Tensor:
    """The w with C w = 1 on the usable tasks and 0 elsewhere."""
    inverse = _inverse(cosines, usable, ridge)
    w = inverse.sum(1)
    for _ in range(_REFINEMENTS):
        w = w + inverse @ (1.0 - cosines @ w)
    return w


def _has_impartial_direction(cosines: Tensor, usable: Tensor, w: Tensor) -> Tensor:
    """Whether the projections of the solution are equal, and more than what the ridge has left of nothing."""
    along = cosines @ w
    largest = torch.where(usable, along, -torch.inf).amax()
    smallest = torch.where(usable, along, torch.inf).amin()
    return (largest - smallest <= _INEQUALITY * largest) & (largest >= _LEAST)
