"""What is measured of the steps of a training: the tasks' losses, weights, gradients' norms and cosines."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from mtlwrap.gradients import TaskGradients
from mtlwrap.vectors import widest_dtype


class Measures:
    """Sums over steps, on the device; whoever asks for ``sums`` decides when the host waits for them.

    Args:
        tasks: the tasks' names, in order.

    Attributes:
        names: what is measured: ``loss/<task>``, ``weight/<task>``, ``norm/<task>``, ``cosine/<a>/<b>``,
            ``conflicts``, ``nonfinite``.
        sums: the sums, and how many numbers are in each, ``[2, names]``; None before a step.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self.names = [f"{what}/{task}" for what in ("loss", "weight", "norm") for task in tasks]
        self.names += [f"cosine/{a}/{b}" for a, b in combinations(tasks, 2)]
        self.names += ["conflicts", "nonfinite"]
        self.sums: Tensor | None = None
        self._pairs: Tensor | None = None

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], weights: Tensor | None, gradients: TaskGradients | None) -> None:
        """Add a step.

        Args:
            losses: those of the tasks that have a label in this process; at least one.
            weights: the factors of the raw gradients, ``[T]``, where there are any.
            gradients: the tasks' gradients, where they are known.
        """
        numbers, counted = self._step(losses, weights, gradients)
        if self.sums is None:
            self.sums = numbers.new_zeros(2, len(self.names))
        # Not by multiplication: what is left out may be NaN.
        self.sums += torch.stack([torch.where(counted, numbers, 0.0), counted.to(numbers)])

    def means(self, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
        """The means by name, from the host's copy of ``sums``; NaN for what did not occur."""
        found = zip(self.names, sums, counts, strict=True)
        return {name: total / count if count else float("nan") for name, total, count in found}

    def nothing(self, like: Tensor) -> Tensor:
        """What ``sums`` are after no step, on the device of a tensor."""
        return torch.zeros(2, len(self.names), dtype=widest_dtype(like.device), device=like.device)

    def _step(
        self, losses: Mapping[str, Tensor], weights: Tensor | None, gradients: TaskGradients | None
    ) -> tuple[Tensor, Tensor]:
        """The numbers of one step, and which of them count."""
        example = next(iter(losses.values()))
        absent = torch.zeros((), dtype=widest_dtype(example.device), device=example.device)
        numbers = torch.stack([losses.get(task, absent).to(absent) for task in self._tasks])
        # From the host, where it is known, without waiting.
        known = torch.tensor([task in losses for task in self._tasks])
        active = known.to(example.device, non_blocking=True)
        weights = torch.full_like(numbers, torch.nan) if weights is None else weights.to(absent)
        parts = [
            (numbers, active),
            (weights, active & weights.isfinite()),
            *self._of_gradients(gradients, active, absent),
        ]
        return torch.cat([n.to(absent) for n, _ in parts]), torch.cat([c.to(example.device) for _, c in parts])

    def _of_gradients(
        self, gradients: TaskGradients | None, labelled: Tensor, absent: Tensor
    ) -> Sequence[tuple[Tensor, Tensor]]:
        count = len(self._tasks)
        if gradients is None:
            nothing = absent.new_zeros(count + count * (count - 1) // 2 + 2)
            return [(nothing, torch.zeros_like(nothing, dtype=torch.bool))]
        # A task that takes part in another process only has no gradient here.
        active, finite = gradients.active & labelled.to(gradients.active.device), gradients.finite
        if self._pairs is None or self._pairs.device != active.device:
            self._pairs = torch.triu_indices(count, count, 1, device=active.device)
        first, second = self._pairs
        cosines = gradients.cosines[first, second]
        conflict = (cosines < 0).any()  # that of a task that takes no part is 0
        always = torch.ones_like(finite)
        return [
            (gradients.norms, active & finite),
            (cosines, active[first] & active[second] & finite),
            (torch.stack([conflict, ~finite]), torch.stack([finite, always])),
        ]
