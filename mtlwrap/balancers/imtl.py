"""IMTL, impartial multi-task learning: loss balance and gradient balance in one."""

from typing import Literal

from mtlwrap.balancers.compose import Compose
from mtlwrap.balancers.imtl_g import IMTLG
from mtlwrap.balancers.imtl_l import IMTLL
from mtlwrap.balancers.log_scale import Init

_METHODS = ("hybrid", "loss", "gradient")


class IMTL(Compose):
    r"""Impartial multi-task learning: every task's loss at the same scale, every task's gradient with the same say.

    Liu et al., `Towards Impartial Multi-task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_ (ICLR 2021),
    Algorithm 1. It is ``Compose(loss=IMTLL(num_tasks), gradient=IMTLG())``:

    1. the losses are scaled, :math:`\sum_t e^{s_t} L_t - s_t`, and heads and scales get the gradient of that;
    2. on the shared representation, :math:`g_t = \nabla_z e^{s_t} L_t` are weighed by :class:`IMTLG`'s
       :math:`\alpha_t`, which neither the heads nor the scales see.

    Where the paper leaves it open, gradients on the representation are compared sample by sample (flattened with the
    batch). LaMaster's module compares their means over the batch, starts the scales at 1, and sends
    :math:`\alpha` through the heads as well; none of that is done here.

    Args:
        num_tasks: the number of tasks; None leaves it to the model.
        method: ``"hybrid"`` for both, ``"loss"`` for :class:`IMTLL` alone, ``"gradient"`` for :class:`IMTLG` alone.
        init: the initial log-scales :math:`s_t`, one number or one per task; None for zeros; ``"first_losses"`` where
            losses are far from 1. As for :class:`IMTLL`.

    Raises:
        ValueError: ``method`` is unknown, or ``init`` is given though ``"gradient"`` has no scales, or it does not
            fit ``num_tasks``.

    Example:
        >>> import torch
        >>> balancer = IMTL(2)
        >>> balancer(torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.7500])
    """

    def __init__(
        self,
        num_tasks: int | None = None,
        method: Literal["hybrid", "loss", "gradient"] = "hybrid",
        init: Init = None,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}.")
        if method == "gradient" and init is not None:
            raise ValueError('init: method="gradient" has no scales to initialise.')
        super().__init__(
            loss=IMTLL(num_tasks, init=init) if method != "gradient" else None,
            gradient=IMTLG() if method != "loss" else None,
        )
        if num_tasks is not None:
            self.bind(num_tasks)
