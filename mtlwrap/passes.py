"""One backward pass: what ``scalarize`` tells the forks, and how a fork knows that it was told in this very pass.

The names of torch used here that are not public each have a fall-back.
"""

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlwrap.gradients import TaskGradients, Unmade
from mtlwrap.processes import Ranks
from mtlwrap.safeguard import Safeguard
from mtlwrap.vectors import plain


def unknown_graph_task() -> int:
    """Where torch does not number backward passes, all are one."""
    return 0


# The number of the running backward pass. Without it an order that was never taken could be taken by a later pass.
graph_task_id = getattr(torch._C, "_current_graph_task_id", unknown_graph_task)
# Whether the running backward pass keeps the graph. Without it a spent fork counts as alive until it is collected.
keeps_graph = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", lambda: True)


# Backward passes that may be running at once through one total; older ones that never arrived are forgotten.
_MOST_PASSES = 64


@dataclass
class Decision:
    """What a balancer decided before the backward pass came to the heads, for the forks to carry out.

    Attributes:
        shared: for each fork the gradient of each tensor of its representation, as autograd wants it back.
        own: likewise those of the balancer's own parameters, by name; the first fork returns them.
        weights: the factor of each task's raw-loss gradient, ``[T]``.
        gradients: what was weighed, if it was weighed anew.
        head_factors: with what factor each present task's loss enters its head, if not 1.
    """

    shared: Mapping[Any, list[Tensor | None]]
    own: dict[str, Tensor]
    weights: Tensor | None
    gradients: TaskGradients | None
    head_factors: Tensor | None


class Order:
    """What one ``scalarize`` tells the forks: who takes part, the losses' values, whether to decide ahead of them.

    Args:
        taking_part: for each task, whether it takes part in any process.
        here: whether it does so in this one.
        losses: the values of the losses that take part, a vector; the means over the processes.
        ranks: the processes, if there are several.
        communicating: the tasks whose heads have a gradient from other processes too.
        read: for each task, whether an auxiliary loss reads its prediction in any process.
        passes_on: whether any process has to run its backbone backward by the ordinary pass.
        is_guarded: whether the balancer's state is put back where gradients overflow.
        gradients_differ: whether those on the parameters can differ between the processes after the backward pass.
    """

    def __init__(
        self,
        taking_part: tuple[bool, ...],
        here: tuple[bool, ...],
        losses: Tensor,
        ranks: Ranks | None = None,
        communicating: Collection[int] = (),
        read: Sequence[bool] = (),
        passes_on: bool = False,
        *,
        is_guarded: bool = False,
        gradients_differ: bool = False,
    ) -> None:
        self.taking_part = taking_part
        self.here = here
        # For each task, whether what arrives of it in this process counts.
        self.counted = tuple(
            is_here or (anywhere and task in communicating)
            for task, (is_here, anywhere) in enumerate(zip(here, taking_part, strict=True))
        )
        # Whether its head is to run backward, in all processes if it is in one.
        self.running = tuple(map(any, zip(taking_part, read, strict=True))) if read else taking_part
        self.passes_on = passes_on
        self.is_guarded = is_guarded
        self.gradients_differ = gradients_differ
        self.losses = losses
        self.ranks = ranks
        # Makes a decision, given the gradients on the losses, in a pass; None leaves it to the fork.
        self.decide: Callable[[Tensor, Pass], Decision] | None = None
        # Whether what arrives at the forks is not the tasks' alone, and so not for showing.
        self.is_mixed = False
        # How many forks the losses came from: several where tasks have batches of their own.
        self.num_forks = 1
        # Takes the balancer's step back where gradients overflow.
        self.safeguard: Safeguard | None = None
        # By graph task: several threads may run backward through one total. Stations know them weakly: a decision ahead
        # of the forks knows the graph, which must not be held by itself where a backward pass never arrives.
        self.passes: dict[int, Pass] = {}

    def only_here(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Of one entry for each task that takes part, those of this process."""
        present = [here for here, anywhere in zip(self.here, self.taking_part, strict=True) if anywhere]
        return [gradient for gradient, here in zip(gradients, present, strict=True) if here]

    def spread(self, values: Tensor | None, absent: float) -> Tensor | None:
        """Values of the tasks that take part, at their places among all tasks."""
        if values is None or all(self.taking_part):
            return values
        remaining = iter(values.unbind())
        filler = torch.full_like(values[0], absent)
        return torch.stack([next(remaining) if present else filler for present in self.taking_part])


class Pass:
    """An order in one backward pass: what the total was multiplied with, and with what factor each loss came."""

    def __init__(self, order: Order, scale: Tensor, num_stations: int) -> None:
        self.order = order
        self.scale = scale
        self._num_awaited = num_stations
        self.loss_factors: Tensor | None = None
        self.decision: Decision | None = None
        # What arrived where tasks have batches of their own, by fork, for showing.
        self.batches: dict[Any, list[list[Tensor | None]]] = {}

    def come_by(self) -> None:
        """Called at each station; after the last one nobody needs the pass any more."""
        self._num_awaited -= 1
        if self._num_awaited == 0:
            self.order.passes.pop(graph_task_id(), None)

    def arrived(self, parts: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
        """The gradients that count, dense: what arrives of a task that takes no part does not.

        With several processes a head without a loss here can have a gradient still, that of a SyncBatchNorm comes from
        all of them. From other heads it would be what they make of a gradient of zero.
        """
        counts = self.order.counted
        return [[plain(g) if is_in else None for g, is_in in zip(part, counts, strict=True)] for part in parts]

    def task_gradients(
        self, parts: Sequence[Sequence[Tensor | None]] | Unmade, *, has_batch: bool = True, of_all: bool = False
    ) -> TaskGradients:
        """Gradients that arrived in this pass, for each task, with what is known of the tasks' losses.

        Args:
            parts: the gradients, for each tensor of the representation, or what makes them.
            has_batch: whether their first dimension is the batch.
            of_all: whether they are those of all processes already.
        """
        order = self.order
        return TaskGradients.from_parts(
            parts,
            order.taking_part,
            order.spread(order.losses, torch.nan),
            self.scale,
            order.spread(self.loss_factors, 0.0),
            has_batch=has_batch,
            ranks=None if of_all else order.ranks,
        )


def remember(passes: MutableMapping[int, Pass], running: Pass) -> None:
    """Note what belongs to the running backward pass."""
    passes[graph_task_id()] = running
    while len(passes) > _MOST_PASSES:
        passes.pop(next(iter(passes)))
