"""What is decided before the backward pass comes to the heads: from gradients asked for through the heads alone."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlwrap.balancers.base import Balancer, select
from mtlwrap.gradients import TaskGradients
from mtlwrap.nodes import (
    ForkState,
    decided_weights,
    needed,
    raw_weights,
    scaled_own,
    shared_gradient,
    weighed_exactly,
    where_read,
)
from mtlwrap.passes import Decision, Pass
from mtlwrap.probe import pull_back
from mtlwrap.rows import Rows
from mtlwrap.vectors import plain_sum, summed_over_batches


def decide(
    upstream: Tensor,
    running: Pass,
    losses: Sequence[Tensor | None],
    forks: Sequence[ForkState],
    balancer: Balancer,
    auxiliary: Tensor | None,
    weigh_heads: bool,
) -> Decision:
    """Decide before the backward pass comes to the heads, from gradients that are asked for through the heads alone.

    Several batches meet nowhere in the graph, heads cannot be weighed before the weights are known, and what an
    auxiliary loss sends through the heads must be told apart.

    Args:
        upstream: the gradient on the losses of the tasks that take part.
        running: the backward pass.
        losses: the losses of all tasks.
        forks: the forks that they came from.
        balancer: the balancer.
        auxiliary: an auxiliary loss that reads predictions.
        weigh_heads: whether the weights reach the heads.
    """
    if torch.is_grad_enabled():
        raise ValueError(
            "create_graph=True: second derivatives are not known with batches of their own per task, weigh_heads=True "
            "or an auxiliary loss that reads predictions."
        )
    taking_part = running.order.taking_part
    here = [task for task, is_here in enumerate(running.order.here) if is_here]
    arrived = {fork: fork.by_task([None] * (len(fork.tasks) * fork.num_tensors)) for fork in forks}
    for task, gradient in zip(here, running.order.only_here(upstream.unbind()), strict=True):
        loss = cast("Tensor", losses[task])
        at = [(fork, index, edge) for fork in forks for index, edge in enumerate(fork.outputs_of(task))]
        found = _probed([loss], [gradient.to(loss)], [edge for _, _, edge in at])
        for (fork, index, _), on_output in zip(at, found, strict=True):
            arrived[fork][index][task] = on_output
    on_z = {fork: running.task_gradients(fork.completed(parts, taking_part)) for fork, parts in arrived.items()}
    weights, gradients = _weigh_jointly(arrived, on_z, running, balancer)
    if gradients is not None and weights is None and len(forks) == 1 and not weigh_heads and forks[0].exact is None:
        combined = {forks[0]: shared_gradient(balancer, gradients, None)}
    else:
        weights = needed(weights, balancer, "a decision before the backward pass")
        combined = {fork: own.scaled_sum(weights) for fork, own in on_z.items()}
    shared = {fork: _read(combined[fork], parts, running) for fork, parts in arrived.items()}
    if auxiliary is not None:
        for fork in forks:
            _add_auxiliary(auxiliary, running.scale, fork, shared[fork])
    head_factors = None
    if weigh_heads and weights is not None and balancer.sees_gradients:
        # Never a negative weight on a loss of a head, which would train it uphill.
        present = [task for task, is_present in enumerate(taking_part) if is_present]
        head_factors = select(weights.detach().clamp(min=0.0), present)
    own_gradients = {} if gradients is None else scaled_own(balancer, gradients, running.scale)
    if gradients is not None:
        gradients.part()
    raw = raw_weights(weights, next(iter(on_z.values())))
    return Decision(shared, own_gradients, raw, gradients, head_factors)


def _weigh_jointly(
    arrived: dict[ForkState, list[list[Tensor | None]]],
    on_z: dict[ForkState, TaskGradients],
    running: Pass,
    balancer: Balancer,
) -> tuple[Tensor | None, TaskGradients | None]:
    """The balancer's weights for gradients from one batch or several, and the gradients that it saw."""
    (first, seen), taking_part = next(iter(on_z.items())), running.order.taking_part
    exact = first.exact
    if exact is None:
        if len(on_z) > 1:
            summed, ranks = _checked_sums(arrived), running.order.ranks
            if ranks is not None:
                summed = ranks.mean_parts(summed, first.offsets())
            seen = running.task_gradients(summed, of_all=True)
        return decided_weights(balancer, seen), seen
    if exact.schedule is not None and not exact.is_due(balancer, taking_part):
        return exact.schedule.reuse(seen.active), None
    rows = Rows(exact.parameters, taking_part)
    arrived = {fork: fork.with_zeros(parts, running) for fork, parts in arrived.items()}
    for task in (task for task, is_present in enumerate(taking_part) if is_present):
        found = [
            _probed(fork.edges, [part[task] for part in parts], exact.parameters) for fork, parts in arrived.items()
        ]
        rows.add([plain_sum(of_parameter) for of_parameter in zip(*found, strict=True)])
    return weighed_exactly(exact, balancer, rows, running)


def _read(shared: list[Tensor], parts: Sequence[Sequence[Tensor | None]], running: Pass) -> list[Tensor | None]:
    # Which tensors are read here says nothing about the other processes, where the same must run.
    return where_read(shared, parts) if running.order.ranks is None else [*shared]


def _probed(
    outputs: Sequence[Tensor | GradientEdge],
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor | GradientEdge],
) -> list[Tensor | None]:
    try:
        return pull_back(outputs, gradients, inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            "Batches of their own per task, weigh_heads=True and an auxiliary loss that reads predictions need the "
            f"gradients before the backward pass, which the heads do not allow: {error}"
        ) from error


def _add_auxiliary(auxiliary: Tensor, scale: Tensor, fork: ForkState, shared: list[Tensor | None]) -> None:
    """Add the gradient that an auxiliary loss sends through the heads, as it is."""
    edges = [edge for task in fork.tasks for edge in fork.outputs_of(task)]
    found = _probed([auxiliary], [scale.to(auxiliary)], edges)
    for index in range(fork.num_tensors):
        shared[index] = plain_sum([*found[index :: fork.num_tensors], shared[index]])


def _checked_sums(arrived: dict[ForkState, list[list[Tensor | None]]]) -> list[list[Tensor | None]]:
    """The tasks' gradients of several batches, summed over each: those on an offset of the representation.

    Raises:
        ValueError: the batches' representations differ in more than the number of samples.
    """
    forms = {tuple(tuple(form) for form in fork.feature_shapes()): fork for fork in arrived}
    if len(forms) > 1:
        listed = "; ".join(
            f"{', '.join(repr(fork.names[task]) for task in fork.tasks)}: {list(form)}" for form, fork in forms.items()
        )
        raise ValueError(
            f"To balance batches jointly their representations must agree in all but the number of samples, got "
            f"{listed}."
        )
    return summed_over_batches(list(arrived.values()))
