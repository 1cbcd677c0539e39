"""The first value of each task's loss, which several methods measure progress by."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlwrap.balancers.base import select
from mtlwrap.gradients import TaskGradients


class FirstLosses(nn.Module):
    """Remembers, for each task, the size of its first loss that is not zero. In evaluation mode nothing is kept.

    Attributes:
        values: ``[T]``, without the sign; 0 where there is none yet.
        calls: in how many balanced steps each task took part, ``[T]``.
    """

    values: Tensor
    calls: Tensor

    def __init__(self, burn_in_period: int | None = None) -> None:
        super().__init__()
        # After so many calls the losses are taken anew.
        self.burn_in_period = burn_in_period
        self.register_buffer("values", torch.zeros(0))
        self.register_buffer("calls", torch.zeros(0))

    def allocate(self, num_tasks: int) -> None:
        """Nothing remembered, for so many tasks."""
        self.values = torch.zeros(num_tasks, dtype=self.values.dtype, device=self.values.device)
        self.calls = torch.zeros_like(self.values)

    def of(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The first losses of ``tasks``, these very ``losses`` where this call is the first; 1 where both are 0."""
        values = self._with(losses, select(self.values, tasks), select(self.calls, tasks))
        return torch.where(values == 0, 1.0, values).to(losses.device)

    def after(self, gradients: TaskGradients) -> Tensor:
        """The first losses after :meth:`take`, those of this very step where they are; 1 where there is none."""
        # What was kept has these among them, and after a burn-in's last step that could not be told again.
        values = self.values if self.training else self._seen(gradients)[0]
        return torch.where(values == 0, 1.0, values).to(gradients.losses)

    def take(self, gradients: TaskGradients) -> Tensor:
        """Count a step and keep its losses where they are the first, unless it is not finite.

        Returns:
            for each task, whether its burn-in ends with this step.
        """
        values, counts, again = self._seen(gradients)
        if self.training:
            if len(self.calls) == 0:
                self.allocate(gradients.num_tasks)
            self.values.copy_(values)
            self.calls.add_(counts)
        return again

    def _seen(self, gradients: TaskGradients) -> tuple[Tensor, Tensor, Tensor]:
        """The first losses with those of a step, which tasks it counts for, and for which the burn-in ends with it."""
        known, calls = self.values, self.calls
        if len(calls) not in (0, gradients.num_tasks):
            raise ValueError(
                f"matrix: expected a row for each of {len(calls)} tasks, as before, got {gradients.num_tasks}; reset() "
                "starts afresh."
            )
        if len(calls) == 0:
            known = calls = torch.zeros(gradients.num_tasks, dtype=known.dtype, device=known.device)
        values = self._with(gradients.losses, known, calls)
        counts = (gradients.active & gradients.finite).to(calls.device)
        return torch.where(counts & values.isfinite(), values, known), counts, counts & self._burnt_in(calls)

    def _with(self, losses: Tensor, values: Tensor, calls: Tensor) -> Tensor:
        sizes = losses.detach().abs().to(values)
        return torch.where(((values == 0) | self._burnt_in(calls)) & (sizes > 0), sizes, values)

    def _burnt_in(self, calls: Tensor) -> Tensor:
        return calls == (-1 if self.burn_in_period is None else self.burn_in_period)
