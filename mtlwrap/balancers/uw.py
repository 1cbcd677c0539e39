"""UW, uncertainty weighting."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlwrap.balancers.base import constant, select
from mtlwrap.balancers.log_scale import Init, LogScaleBalancer
from mtlwrap.checks import ordered

# likelihood: the factor before the loss, and before the log-variance
_FACTORS: dict[str, tuple[float, float]] = {
    "regression": (0.5, 0.5),
    "classification": (1.0, 0.5),
    "laplace": (1.0, 1.0),
}


class UW(LogScaleBalancer):
    r"""Uncertainty weighting: every loss is divided by the learned variance of its task.

    Kendall, Gal and Cipolla, `Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics
    <https://arxiv.org/abs/1705.07115>`_ (CVPR 2018). With :math:`s_i` the learned ``log_variance`` of task :math:`i`:

    .. math:: \sum_i \left( a_i e^{-s_i} L_i + c_i s_i \right)

    - ``"regression"``: :math:`a = c = \tfrac12`, :math:`s = \log\sigma^2`, for a squared error (Eq. 5, 7);
      the formula of TorchJD, for every kind of loss;
    - ``"classification"``: :math:`a = 1, c = \tfrac12`, :math:`s = \log\sigma^2`, for a cross-entropy (Eq. 10);
    - ``"laplace"``: :math:`a = c = 1`, :math:`s = \log b`, for an absolute error, a Laplace likelihood of scale b.

    At the minimum over :math:`s` regression and classification both weigh a loss by :math:`1 / 2L`, Laplace by
    :math:`1 / L`. There the objective is negative where a loss is below :math:`1/e \approx 0.37` (classification:
    :math:`1 / 2e \approx 0.18`): that is normal, watch the losses themselves. A loss of zero takes its log-variance to
    ``-bound`` and no further.

    Zeros at the start, as in TorchJD (LibMTL: -0.5); the paper finds that any start from -2 to 5 converges.

    Args:
        shape: the shape of the values, an int ``n`` for ``(n,)``; None leaves it to the model.
        likelihood: one for all, or one per task.
        init: the initial log-variances, one number or one per value; None for zeros; ``"first_losses"`` for
            :math:`\ln(a_i L_i / c_i)` of the first positive loss of each task, where the sum is smallest, to which
            ``log_variance``, from zero, is added. Take that where losses are far from 1: until the variances have found
            them the shared network is trained as by a plain sum.
        bound: log-variances are kept within ``[-bound, bound]``.

    Shape:
        ``values``: ``shape``; the result is 0-dim.

    Raises:
        TypeError, ValueError: an argument is not of the stated kind or range.

    Example:
        >>> import torch
        >>> UW(2)(torch.tensor([1.0, 3.0]))  # at zero log-variance, half the sum
        tensor(2., grad_fn=<SumBackward0>)
        >>> UW(2, likelihood=["regression", "classification"])(torch.tensor([1.0, 3.0]))
        tensor(3.5000, grad_fn=<SumBackward0>)
    """

    log_variance: nn.Parameter
    _parameter = "log_variance"

    def __init__(
        self,
        shape: int | Sequence[int] | None = None,
        likelihood: str | Sequence[str] = "regression",
        *,
        init: Init = None,
        bound: float = 20.0,
    ) -> None:
        per_task = not isinstance(likelihood, str)
        kinds: list[str] = [likelihood] if isinstance(likelihood, str) else ordered("likelihood", likelihood, "names")
        for kind in kinds:
            if not isinstance(kind, str) or kind not in _FACTORS:
                raise ValueError(f"likelihood: expected one of {', '.join(map(repr, _FACTORS))}, got {kind!r}.")
        super().__init__(len(kinds) if per_task and shape is None else shape, init, bound)
        self._sized_by = "likelihood" if per_task and shape is None else self._sized_by
        if per_task and self.shape != (len(kinds),):
            raise ValueError(f"likelihood: expected one, or one per value for shape {self.shape}, got {len(kinds)}.")
        self.likelihood = likelihood
        self._factors = [_FACTORS[kind] for kind in kinds]

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:  # noqa: D102 - see the base
        scales = self.log_scales(losses, tasks)
        loss_factor, penalty_factor = self._factors_of(losses, tasks)
        return (loss_factor * torch.exp(-scales) * losses + penalty_factor * scales).sum()

    def _fitting(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor:
        loss_factor, penalty_factor = self._factors_of(losses, tasks)
        return (losses * loss_factor / penalty_factor).log()

    def _factors_of(self, losses: Tensor, tasks: Sequence[int] | None) -> tuple[Tensor | float, Tensor | float]:
        if len(self._factors) == 1:
            return self._factors[0]
        loss_factors, penalty_factors = zip(*self._factors, strict=True)
        return select(constant(loss_factors, losses), tasks), select(constant(penalty_factors, losses), tasks)

    def extra_repr(self) -> str:
        """The likelihood, and what is shown of every log-scale."""
        return f"likelihood={self.likelihood!r}, {super().extra_repr()}"
