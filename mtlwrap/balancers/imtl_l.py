"""IMTL-L, the loss balance of impartial multi-task learning."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlwrap.balancers.log_scale import Init, LogScaleBalancer


class IMTLL(LogScaleBalancer):
    r"""Loss balance: every loss is scaled to about 1 by a learned factor.

    Liu et al., `Towards Impartial Multi-task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_ (ICLR 2021),
    §3.2, Eq. 3-6 with base e:

    .. math:: \sum_i \left( e^{s_i} L_i - s_i \right)

    - :math:`L_i` is the :math:`i`-th value, typically a task's loss, positive;
    - :math:`s_i` is its learned log-scale, ``log_scale``. The scalar is convex in it, with its minimum at
      :math:`e^{s_i} L_i = 1`.

    It equals twice :class:`UW` with :math:`s` negated. A negative value is allowed here, but has no minimum:
    its :math:`s_i` climbs to ``bound``.

    The paper learns :math:`s` with the step size of the network and does not state its initial value; zeros make the
    first step a plain sum. A loss far from 1 moves its log-scale by far more than 1 in a first SGD step (a loss of
    1000 at a step size of 0.1 switches the task off for hundreds of steps): give it a smaller learning rate, Adam,
    or ``init="first_losses"``. LibMTL lets weight decay pull :math:`s` to 0; ``model.param_groups()`` does not.

    Args:
        shape: the shape of the values, an int ``n`` for ``(n,)``; None leaves it to the model.
        init: the initial log-scales, one number or one per value; None for zeros; ``"first_losses"`` for
            :math:`-\ln L_i` of the first positive loss of each task, to which ``log_scale``, from zero, is added.
            Take that where losses are far from 1: until the scales have found them the shared network is trained as by
            a plain sum.
        bound: log-scales are kept within ``[-bound, bound]``. The default lets losses from 2e-9 to 5e8 be scaled to 1.

    Shape:
        ``values``: ``shape``; the result is 0-dim.

    Raises:
        TypeError, ValueError: an argument is not of the stated kind or range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network, balance = nn.Linear(3, 2), IMTLL(2)
        >>> optimizer = torch.optim.SGD([*network.parameters(), *balance.parameters()], lr=0.1)
        >>> losses = network(torch.randn(8, 3)).square().mean(dim=0)
        >>> balance(losses).backward()
        >>> optimizer.step()
    """

    log_scale: nn.Parameter
    _parameter = "log_scale"

    def __init__(
        self,
        shape: int | Sequence[int] | None = None,
        *,
        init: Init = None,
        bound: float = 20.0,
    ) -> None:
        super().__init__(shape, init, bound)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:  # noqa: D102 - see the base
        scales = self.log_scales(losses, tasks)
        return (torch.exp(scales) * losses - scales).sum()

    def _fitting(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor:
        return -losses.log()
