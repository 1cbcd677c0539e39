"""DWA, dynamic weight average."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlwrap.balancers.base import select
from mtlwrap.balancers.loss_state import LossStateBalancer, learns, wide, write
from mtlwrap.checks import integer, positive


class DWA(LossStateBalancer):
    r"""Dynamic weight average: more weight to the task whose loss fell less from one epoch to the next.

    Liu, Johns and Davison, `End-to-End Multi-Task Learning with Attention <https://arxiv.org/abs/1803.10704>`_
    (CVPR 2019), Eq. 7. In epoch t, with :math:`\bar L_i(t)` the average of task i's loss over epoch t,

    .. math:: \sum_i \lambda_i(t) L_i, \qquad
        \lambda_i(t) = T \, \frac{\exp(w_i / \tau)}{\sum_j \exp(w_j / \tau)}, \qquad
        w_i = \frac{\bar L_i(t-1)}{\bar L_i(t-2)}

    for T tasks and the temperature :math:`\tau`. The weights sum to T and are 1 in the first two epochs. They change
    once an epoch, and little: two tasks of which one halves its loss in an epoch while the other's stays are weighted
    0.88 and 1.12.

    The balancer is not told when an epoch ends, so it counts: ``steps_per_epoch`` training steps are one, usually
    ``len(loader)``. There is no default, for none is right: over a few steps the averages are noise, and the paper's
    are those of an epoch. (The code of Nash-MTL and FAMO compares windows of 25 steps instead: that is nearly
    ``steps_per_epoch=25``.) With gradient accumulation each micro-batch is a step, as in ``len(loader)``.

    A task that is absent from a step:

    - its averages do not change; an epoch's average is over the steps in which the task took part, and an epoch in
      which it never did is left out: its last two that count are compared;
    - T is the number of tasks that take part; the weight of one without two averages is 1, and the others share the
      rest. So it is where the older average is zero, where the formula has no value.

    Losses should be positive: the ratio of losses around zero says nothing. A step with a loss that is not finite is
    not counted. In a distributed training every process averages the same losses, the means over all of them.

    Args:
        steps_per_epoch: over how many training steps a loss is averaged, at least 1.
        temperature: :math:`\tau > 0`; the larger, the more equal the weights. The paper's is 2.
        num_tasks: T; None leaves it to the model.

    Raises:
        TypeError, ValueError: an argument is not of the stated kind or range; in use, the number of tasks is not known
            or another one.

    Shape:
        ``values``: ``[T]``; the result is 0-dim, in float32 or wider.

    Example:
        >>> import torch
        >>> balancer = DWA(steps_per_epoch=1, num_tasks=2)
        >>> for values in ([4.0, 4.0], [2.0, 4.0]):  # the first halves, the second stays
        ...     total = balancer(torch.tensor(values))
        >>> balancer(torch.ones(2, requires_grad=True) * torch.tensor([0.0, 1.0]))
        tensor(1.1244, grad_fn=<SumBackward0>)
    """

    step: Tensor
    epochs: Tensor
    counts: Tensor
    averages: Tensor

    def __init__(self, steps_per_epoch: int, temperature: float = 2.0, *, num_tasks: int | None = None) -> None:
        super().__init__(num_tasks)
        self.steps_per_epoch = integer("steps_per_epoch", steps_per_epoch, least=1)
        self.temperature = positive("temperature", temperature)

    def reset(self) -> None:
        """No step seen, no average known."""
        with torch.no_grad():
            for state in self._buffers.values():
                if state is not None:
                    state.zero_()

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:  # noqa: D102 - see the base
        self._check(losses, tasks)
        step, epochs, counts, averages = (
            select(state, tasks if state.dim() else None).to(losses.device) for state in self._state()
        )
        epoch = torch.div(step, self.steps_per_epoch, rounding_mode="floor")
        # Only when a task takes part again are its averages shifted: one that is absent keeps them as they are.
        ended = epochs < epoch
        counts = torch.where(ended, 0, counts)
        averages = torch.where(ended[:, None], torch.nn.functional.pad(averages[:, :2], (1, 0)), averages)
        if learns(self):
            self._count(losses.detach(), tasks, epoch, counts, averages)
        return (self._weights(averages[:, 1], averages[:, 2]) * losses).sum()

    def extra_repr(self) -> str:
        """The options."""
        return f"steps_per_epoch={self.steps_per_epoch}, temperature={self.temperature:g}"

    def _weights(self, newer: Tensor, older: Tensor) -> Tensor:
        """Eq. 7 among the tasks whose two averages are known, and 1 for the others."""
        known = older != 0
        # Within the range of the dtype, so that the softmax of a quotient that overflows is a number.
        rates = torch.nan_to_num(newer / torch.where(known, older, 1.0) / self.temperature)
        shares = torch.where(known, rates, -torch.inf).softmax(0)
        return torch.where(known, known.sum() * shares, 1.0)

    def _count(
        self, losses: Tensor, tasks: Sequence[int] | None, epoch: Tensor, counts: Tensor, averages: Tensor
    ) -> None:
        """Take these losses into the averages of this epoch, if all of them are finite."""
        counts = counts + 1
        current = (averages[:, 0] + (losses - averages[:, 0]) / counts).to(self.averages.dtype)
        sound = current.isfinite().all()
        write(self.averages, torch.cat([current[:, None], averages[:, 1:]], dim=1), tasks, sound)
        write(self.counts, counts, tasks, sound)
        write(self.epochs, epoch.expand_as(counts), tasks, sound)
        self.step.copy_(self.step + sound.to(self.step.device))

    def _state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.step, self.epochs, self.counts, self.averages

    def _allocate(self, num_tasks: int) -> None:
        # step, of all tasks, how many counted; epochs [T], the one that a task was last in, and counts [T], its losses
        # in that; averages [T, 3] over that one and the two before, 0 where there is none yet.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("epochs", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("averages", wide(torch.zeros(num_tasks, 3)))
