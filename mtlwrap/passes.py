"""One backward pass: what ``scalarize`` tells the forks, and how a fork knows that it was told in this very pass.

The names of torch used here that are not public each have a fall-back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlwrap.gradients import TaskGradients


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
    """What one ``scalarize`` tells the forks: who takes part, the losses' values, whether to decide ahead of them."""

    def __init__(self, taking_part: tuple[bool, ...]) -> None:
        self.taking_part = taking_part
        self.losses: Tensor | None = None
        # Makes a decision, given the gradients on the losses, in a pass; None leaves it to the fork.
        self.decide: Callable[[Tensor, Pass], Decision] | None = None
        # By graph task: several threads may run backward through one total.
        self.passes: dict[int, Pass] = {}

    def spread(self, values: Tensor | None, absent: float) -> Tensor | None:
        """Values of the tasks that take part, at their places among all tasks."""
        if values is None or all(self.taking_part):
            return values
        remaining = iter(values.unbind())
        filler = torch.full_like(values[0], absent)
        return torch.stack([next(remaining) if present else filler for present in self.taking_part])


class Pass:
    """An order in one backward pass: what the total was multiplied with, and with what factor each loss came."""

    def __init__(self, order: Order, scale: Tensor) -> None:
        self.order = order
        self.scale = scale
        self.loss_factors: Tensor | None = None
        self.decision: Decision | None = None

    def task_gradients(self, parts: Sequence[Sequence[Tensor | None]], *, has_batch: bool = True) -> TaskGradients:
        """Gradients that arrived in this pass, for each task, with what is known of the tasks' losses."""
        order = self.order
        return TaskGradients.from_parts(
            parts,
            order.taking_part,
            order.spread(order.losses, torch.nan),
            self.scale,
            order.spread(self.loss_factors, 0.0),
            has_batch=has_batch,
        )


def remember(passes: dict[int, Pass], running: Pass) -> None:
    """Note what belongs to the running backward pass."""
    passes[graph_task_id()] = running
    while len(passes) > _MOST_PASSES:
        passes.pop(next(iter(passes)))
