"""The shortest vector in the convex hull of some vectors, from their Gramian alone, without looking at a value."""

import torch
from torch import Tensor

# Interior-point rounds, and what each leaves of the gap: it ends below 1e-12, degenerate cases included.
_ROUNDS = 24
_CENTERING = 0.1
_STEP = 0.99
# Keeps the factorisation sound when vectors coincide; it only bends the path, not where it ends.
_RIDGE = 1e-13


def min_norm_weights(gramian: Tensor, usable: Tensor) -> Tensor:
    r"""The :math:`w \ge 0` with :math:`\sum_t w_t = 1` of least :math:`w^\top G w`, over the usable vectors.

    A primal-dual interior-point method (Wright, Primal-Dual Interior-Point Methods, SIAM 1997) from a feasible start,
    with a fixed number of rounds and every choice made on the device. Unlike an active-set method it cannot cycle, and
    it gives coinciding vectors equal weights.

    Args:
        gramian: the inner products of vectors of length about 1, ``[T, T]``, float64 where the device has it.
        usable: which vectors take part, boolean, ``[T]``; the others get a weight of zero.

    Returns:
        the weights, ``[T]``; all zero if no vector is usable.
    """
    member = usable.to(gramian.dtype)
    identity = torch.eye(usable.shape[0], dtype=gramian.dtype, device=gramian.device)
    pairs = usable[:, None] & usable[None, :]
    # A vector that takes no part is decoupled, with a cost of its own that drives its weight to zero.
    quadratic = torch.where(pairs, gramian, identity).nan_to_num(0.0)
    weights = torch.where(usable, 1.0 / member.sum().clamp(min=1.0), 1.0)
    price = (quadratic @ weights).amin() - 1.0
    slack = quadratic @ weights + (1.0 - member) - price * member
    for _ in range(_ROUNDS):
        weights, slack = _round(quadratic, member, weights, slack)
    return torch.where(usable, weights, 0.0)


def _round(quadratic: Tensor, member: Tensor, weights: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """One Newton step towards w y = 0 for w, y > 0; that y = G w + c - p e for some p and sum w = 1 holds already."""
    target = _CENTERING * (weights @ slack) / weights.shape[0]
    ratio = slack / weights
    factor, _ = torch.linalg.cholesky_ex(quadratic + torch.diag(ratio + _RIDGE))
    by_price, by_target = torch.cholesky_solve(torch.stack([member, target / weights - slack], 1), factor).unbind(1)
    price_step = -(member @ by_target) / (member @ by_price).clamp(min=1e-300)
    weights_step = by_target + by_price * price_step
    slack_step = quadratic @ weights_step - price_step * member
    length = torch.minimum(_longest(weights, weights_step), _longest(slack, slack_step))
    length = (_STEP * length).clamp(max=1.0)
    # At the end of the path rounding breaks factorisations in float32; then this round is none.
    sound = length.isfinite() & weights_step.isfinite().all() & slack_step.isfinite().all()
    weights = torch.where(sound, weights + length * weights_step, weights).clamp(min=1e-40)
    slack = torch.where(sound, slack + length * slack_step, slack).clamp(min=1e-40)
    return weights, slack


def _longest(values: Tensor, step: Tensor) -> Tensor:
    """How far along a step positive values stay positive."""
    return torch.where(step < 0, -values / step, torch.inf).amin()
