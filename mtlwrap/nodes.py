"""The fork: one autograd node at which the gradients of all tasks meet, and the nodes that tell it when to balance.

A balanced step, forward: the backbone's representation passes through :class:`ForkNode`, which hands every head an
alias of its own; the heads make predictions, the user makes losses; :meth:`Junction.scalarize` passes them through
:class:`LossesNode`, the balancer's scalar through :class:`ScalarNode`. Backward, in this order: the scalar node
notes what the total was multiplied with and leaves an order at the forks that the losses came from; the losses node
notes each loss's factor; the heads run; the fork, once every head has sent its gradient, finds the order and
balances. A fork that finds none is a plain sum: in a backward pass that did not come through ``scalarize`` the
wrapper is not there.
"""

import inspect
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mtlwrap.aliases import alias
from mtlwrap.balancers.base import Balancer
from mtlwrap.connection import Connection, zeros_of
from mtlwrap.exact import Exact
from mtlwrap.factored import FactoredRows
from mtlwrap.gradients import TaskGradients
from mtlwrap.outcome import Report
from mtlwrap.passes import Decision, Order, Pass, graph_task_id, keeps_graph, remember
from mtlwrap.probe import wants_the_pass
from mtlwrap.rows import Rows
from mtlwrap.step import current_scope
from mtlwrap.surroundings import opaque, without_autocast
from mtlwrap.vectors import completed, plain, plain_sum, summed_over_batches, widest


class Owner(Protocol):
    """Whose fork it is: it knows the tasks, and keeps what the backward leaves."""

    tasks: tuple[str, ...]
    report: Report

    def note_plain_pass(self, balancer: Balancer) -> None:
        """A backward pass came through that no ``scalarize`` has to do with."""


class Station(Protocol):
    """What a balanced backward pass comes by, and is told of beforehand: a fork, or the connection of predictions."""

    def leave(self, running: Pass) -> None:
        """In the backward pass that is running, follow its order."""


class ForkState:
    """One passage through the fork. It belongs to the graph; the model knows it weakly, so the model holds no graph."""

    def __init__(
        self,
        owner: Owner,
        balancer: Balancer,
        tasks: tuple[int, ...],
        tensors: Sequence[Tensor],
        parameters: Iterable[str],
        together: bool,
        exact: Exact | None,
    ) -> None:
        self.owner = weakref.ref(owner)
        self.balancer = balancer
        self.report = owner.report
        self.tasks = tasks
        self.names = owner.tasks
        self.num_tasks = len(owner.tasks)
        self.num_tensors = len(tensors)
        self.parameters = tuple(parameters)
        # Where nobody looks at the tasks' gradients they are added up as they arrive, at one output for all tasks.
        self.copies = 1 if together else len(tasks)
        self.exact = exact
        # The way from the representation to the backbone's parameters, without holding its values.
        self.edges = [get_gradient_edge(tensor) for tensor in tensors]
        self.hooked = any(tensor._backward_hooks or tensor.retains_grad for tensor in tensors)
        self._forms = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        self.scope = current_scope()
        self.spent = False
        # In several processes: the connection of the predictions, and whether a total was made of their losses.
        self.connection: Connection | None = None
        self.is_ordered = False
        self.node: weakref.ref[Any] | None = None
        self._passes: weakref.WeakValueDictionary[int, Pass] = weakref.WeakValueDictionary()

    @property
    def num_others(self) -> int:
        """How many inputs the fork has behind the representation."""
        return len(self.parameters) + (0 if self.exact is None else len(self.exact.parameters))

    def leave(self, running: Pass) -> None:
        """Called by the scalar node: in this backward pass the fork balances."""
        pending = self._passes.get(graph_task_id())
        if pending is not None and pending.order is not running.order:
            raise ValueError(
                "Two scalarized totals of the same forward met in one backward pass. Hand all losses of a forward "
                "to one call of scalarize, or run a backward pass for each total."
            )
        remember(self._passes, running)

    def take(self) -> Pass | None:
        """Called by the fork: what was left in this very backward pass, not in one around it or one before."""
        running = self._passes.pop(graph_task_id(), None)
        if running is not None:
            running.come_by()
        return running

    def by_task(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """The arriving gradients, sorted: for each tensor of the representation, one entry per task."""
        parts: list[list[Tensor | None]] = [[None] * self.num_tasks for _ in range(self.num_tensors)]
        for position, task in enumerate(self.tasks):
            for tensor in range(self.num_tensors):
                parts[tensor][task] = gradients[position * self.num_tensors + tensor]
        return parts

    def pass_on(self, gradients: Sequence[Tensor | None], running: Pass | None) -> list[Tensor | None]:
        """What autograd adds up by itself; the losses' factors are the weights."""
        if running is not None:
            factors = running.order.spread(running.loss_factors, 0.0)
            self.report.fill(None if factors is None else widest(factors), None, None)
        return [*gradients, *[None] * self.num_others]

    def balance(self, parts: list[list[Tensor | None]], running: Pass) -> list[Tensor | None]:
        """As the balancer decides, the gradients of the representation, of its own parameters, of shared parameters."""
        if running.decision is not None:
            return self._carry_out(running.decision)
        counted = running.arrived(parts)
        gradients = running.task_gradients(self.completed(counted, running.order.taking_part))
        if self.exact is not None:
            return self._balance_exactly(self.exact, counted, gradients, running)
        weights = decided_weights(self.balancer, gradients)
        own = self._own(gradients, running.scale)
        if self.balancer.sees_gradients:
            shared = where_read(shared_gradient(self.balancer, gradients, weights), parts)
        else:  # as autograd adds up half-precision gradients in the steps in which nobody looks at them
            shared = [plain_sum([plain(gradient) for gradient in part]) for part in parts]
        if running.order.is_mixed:
            self.report.fill(raw_weights(weights, gradients), None, self.scope)
        elif running.order.num_forks > 1:
            self._report_batches(weights, gradients, counted, running)
        else:
            self._report(weights, gradients)
        return [*shared, *own]

    def _balance_exactly(
        self, exact: Exact, parts: list[list[Tensor | None]], on_z: TaskGradients, running: Pass
    ) -> list[Tensor | None]:
        """The same with the gradients on the shared parameters: the backbone's backward runs here, once per task.

        Their weighted sum is handed to the parameters from here, unless the backbone's graph leads to something else
        that wants a gradient, or someone looks on there: then one more pass is left to autograd.
        """
        taking_part = running.order.taking_part
        nothing: list[Tensor | None] = [None] * len(exact.parameters)
        if exact.schedule is not None and not exact.is_due(self.balancer, taking_part):
            weights = exact.schedule.reuse(on_z.active)
            # Without gradients: those on the parameters are not known now, and others would be mistaken for them.
            self.report.fill(raw_weights(weights, on_z), None, self.scope)
            return [*where_read(on_z.scaled_sum(weights), parts), *[None] * len(self.parameters), *nothing]
        rows = exact.rows(self.edges, self.with_zeros(parts, running), taking_part)
        if self.scope is not None and isinstance(rows, FactoredRows):
            rows.keep_inputs()  # questions come until the scope ends
        chosen, gradients = weighed_exactly(exact, self.balancer, rows, running)
        own = self._own(gradients, running.scale)
        self._report(chosen, gradients)
        # With create_graph the derivative of the shared gradient is wanted, which these are not connected to.
        if torch.is_grad_enabled() or self._passes_on(running):
            weights = needed(chosen, self.balancer, "a backbone with hooks, or whose input wants a gradient,")
            return [*where_read(on_z.scaled_sum(weights), parts), *own, *nothing]
        if chosen is None:
            shared = rows.shaped(gradients.scaled(self.balancer.combine(gradients)))
        else:
            shared = rows.weighted_sum(chosen.detach())
        return [*[None] * self.num_tensors, *own, *shared]

    @property
    def is_looked_at(self) -> bool:
        """Whether gradients on shared parameters must come by the ordinary backward pass, for something sees it."""
        return self.exact is not None and (self.hooked or wants_the_pass(self.edges, self.exact.parameters))

    def _passes_on(self, running: Pass) -> bool:
        # All processes do the same: a mean of gradients is no addend to those of one process.
        return self.is_looked_at if running.order.ranks is None else running.order.passes_on

    def _carry_out(self, decision: Decision) -> list[Tensor | None]:
        own = decision.own if self is next(iter(decision.shared)) else {}
        self.report.fill(decision.weights, decision.gradients, self.scope)
        others = [None] * (self.num_others - len(self.parameters))
        return [*decision.shared[self], *map(own.get, self.parameters), *others]

    def _own(self, gradients: TaskGradients, scale: Tensor) -> list[Tensor | None]:
        return list(map(scaled_own(self.balancer, gradients, scale).get, self.parameters))

    def _report(self, weights: Tensor | None, gradients: TaskGradients) -> None:
        gradients.part()
        self.report.fill(raw_weights(weights, gradients), gradients, self.scope)

    def _report_batches(
        self, weights: Tensor | None, gradients: TaskGradients, parts: list[list[Tensor | None]], running: Pass
    ) -> None:
        """Where tasks have batches of their own, once all have come by: their gradients, summed over each batch."""
        weights = raw_weights(weights, gradients)
        self.report.fill(weights, None, self.scope)
        if self.scope is None:
            return
        running.batches[self] = parts
        # Representations that differ in more than the number of samples cannot be compared.
        if len(running.batches) == running.order.num_forks and self._are_alike(running.batches):
            gradients = running.task_gradients(summed_over_batches(list(running.batches.values())), of_all=True)
            self.report.fill(weights, gradients, self.scope)

    def _are_alike(self, forks: Iterable["ForkState"]) -> bool:
        return all(fork.feature_shapes() == self.feature_shapes() for fork in forks)

    def feature_shapes(self) -> list[torch.Size]:
        """The shape of each tensor of the representation but for the batch."""
        return [shape[1:] for shape, _, _ in self._forms]

    def dtypes(self) -> list[torch.dtype]:
        """The type of each tensor of the representation."""
        return [dtype for _, dtype, _ in self._forms]

    def offsets(self) -> list[Tensor]:
        """Zeros in the shape of an offset to each tensor, the same for every sample."""
        return [
            torch.zeros((1, *shape[1:]) if shape else (), dtype=dtype, device=device)
            for shape, dtype, device in self._forms
        ]

    def outputs_of(self, task: int) -> list[GradientEdge]:
        """Where the gradient of a task arrives, for each tensor of the representation."""
        node = None if self.node is None else self.node()
        if node is None or task not in self.tasks:
            return []
        first = self.tasks.index(task) * self.num_tensors if self.copies == len(self.tasks) else 0
        return [GradientEdge(node, first + index) for index in range(self.num_tensors)]

    def with_zeros(self, parts: list[list[Tensor | None]], running: Pass) -> list[list[Tensor | None]]:
        """With several processes, zeros for tasks that take part elsewhere: each runs the backbone backward as often.

        Its backward may wait for that of the others (SyncBatchNorm).
        """
        if running.order.ranks is None:
            return parts
        anywhere = running.order.taking_part
        return [
            [zeros_of(form) if g is None and is_in else g for g, is_in in zip(part, anywhere, strict=True)]
            for part, form in zip(parts, self._forms, strict=True)
        ]

    def completed(self, parts: list[list[Tensor | None]], taking_part: tuple[bool, ...]) -> list[list[Tensor | None]]:
        """With zeros for a tensor that no task reads, so that the gradients' length is always the representation's."""
        return [
            completed(part, taking_part, shape, (dtype, device))
            for part, (shape, dtype, device) in zip(parts, self._forms, strict=True)
        ]


def decided_weights(balancer: Balancer, gradients: TaskGradients) -> Tensor | None:
    """The balancer's weights, ``[T]``, or None where its decision is none."""
    with torch.no_grad():
        weights = balancer.weigh(gradients)
    if weights is not None and not isinstance(weights, Tensor):
        raise TypeError(
            f"{type(balancer).__name__}.weigh: expected to return a tensor of shape [{gradients.num_tasks}] or "
            f"None, got {type(weights).__name__}."
        )
    if weights is not None and weights.shape != (gradients.num_tasks,):
        raise ValueError(
            f"{type(balancer).__name__}.weigh: expected to return weights of shape [{gradients.num_tasks}], got "
            f"{tuple(weights.shape)}."
        )
    return weights


def shared_gradient(balancer: Balancer, gradients: TaskGradients, weights: Tensor | None) -> list[Tensor]:
    """What the balancer makes of the gradients, as autograd wants it back; ``weights`` are its own, if it has any."""
    return gradients.scaled(balancer.combine(gradients)) if weights is None else gradients.scaled_sum(weights)


def scaled_own(balancer: Balancer, gradients: TaskGradients, scale: Tensor) -> dict[str, Tensor]:
    """The gradients of the balancer's own parameters, by name, as autograd wants them back."""
    with torch.no_grad():
        return {name: own * scale.to(own) for name, own in balancer.own_gradients(gradients).items()}


def weighed_exactly(
    exact: Exact, balancer: Balancer, rows: Rows | FactoredRows, running: Pass
) -> tuple[Tensor | None, TaskGradients]:
    """The balancer's weights for gradients on the shared parameters; with several processes, for their means."""
    if running.order.ranks is not None:
        rows.average(running.order.ranks)
    made = rows.parts() if isinstance(rows, Rows) else rows
    gradients = running.task_gradients(made, has_batch=False, of_all=True)
    weights = decided_weights(balancer, gradients)
    if exact.schedule is not None:
        weights = needed(weights, balancer, "refresh_every")
        if balancer.training:
            exact.schedule.keep(weights, running.order.taking_part)
    return weights, gradients


def raw_weights(weights: Tensor | None, gradients: TaskGradients) -> Tensor | None:
    """With what factor each *raw* loss's gradient entered: the balancer's weight times the loss's own factor."""
    return None if weights is None else weights.detach() * gradients.loss_factors.to(weights.device)


def needed(weights: Tensor | None, balancer: Balancer, what: str) -> Tensor:
    """The weights, where a decision that is no weighting will not do.

    Raises:
        ValueError: there are none.
    """
    if weights is None:
        raise ValueError(f"{what} needs a balancer that returns weights, which {type(balancer).__name__} does not.")
    return weights


def where_read(shared: Sequence[Tensor], parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The gradient of each tensor of the representation, nothing for one that no task reads."""
    return [gradient if _any(part) else None for gradient, part in zip(shared, parts, strict=True)]


class ForkNode(torch.autograd.Function):
    """Forward: an alias of each tensor for each task. Backward: one gradient for each tensor."""

    @staticmethod
    def forward(state: ForkState, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(alias(tensor) for _ in range(state.copies) for tensor in tensors[: state.num_tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.state = inputs[0]
        ctx.state.node = weakref.ref(ctx)
        ctx.set_materialize_grads(False)

    @staticmethod
    @opaque
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        state: ForkState = ctx.state
        running = state.take()
        state.spent = not keeps_graph()
        if state.copies < len(state.tasks):
            return (None, *state.pass_on(gradients, running))
        parts = state.by_task(gradients)
        with without_autocast(_device_type(gradients)):
            if running is not None:
                return (None, *state.balance(parts, running))
            if (owner := state.owner()) is not None:
                owner.note_plain_pass(state.balancer)
            return (None, *map(plain_sum, parts), *[None] * state.num_others)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        own = tangents[1 : 1 + ctx.state.num_tensors]
        return tuple(None if t is None else t.clone() for _ in range(ctx.state.copies) for t in own)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], state: ForkState, *tensors: Tensor) -> tuple[Any, ...]:
        return ForkNode.apply(state, *tensors), in_dims[1 : 1 + state.num_tensors] * state.copies


# torch asks for it in each forward, and would make it anew.
ForkNode.forward.__signature__ = inspect.signature(ForkNode.forward)  # type: ignore[attr-defined]


class LossesNode(torch.autograd.Function):
    """Forward: the losses as one vector. Backward: notes the factor with which each enters the total.

    Its inputs are tokens, which get a gradient of zero, and behind them the losses of this process.
    """

    @staticmethod
    def forward(ctx: Any, order: Order, num_tokens: int, *inputs: Tensor) -> Tensor:
        ctx.order = order
        ctx.tokens = [(token.dtype, token.device) for token in inputs[:num_tokens]]
        ctx.like = [(loss.dtype, loss.device) for loss in inputs[num_tokens:]]
        return order.losses.clone()

    @staticmethod
    @opaque
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        running = ctx.order.passes.get(graph_task_id())
        if running is not None:
            running.loss_factors = gradient.detach() / torch.where(running.scale == 0, 1.0, running.scale)
            if running.order.decide is not None:
                with without_autocast(gradient.device.type):
                    running.decision = running.order.decide(gradient, running)
            if running.decision is not None and running.decision.head_factors is not None:
                gradient = gradient * running.decision.head_factors.to(gradient)
        returned = zip(ctx.order.only_here(gradient.unbind()), ctx.like, strict=True)
        nothing = [gradient.new_zeros((), dtype=dtype, device=device) for dtype, device in ctx.tokens]
        kind = gradient.dtype, gradient.device
        return None, None, *nothing, *(g if like == kind else g.to(like[1], like[0]) for g, like in returned)


class ScalarNode(torch.autograd.Function):
    """Forward: the total. Backward: leaves the order, with what the total was multiplied with, at the stations."""

    @staticmethod
    def forward(ctx: Any, order: Order, stations: Sequence[Station], total: Tensor) -> Tensor:
        ctx.order = order
        ctx.stations = stations
        return total.clone()

    @staticmethod
    @opaque
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        running = Pass(ctx.order, gradient.detach(), len(ctx.stations))
        for station in ctx.stations:
            station.leave(running)
        remember(ctx.order.passes, running)
        if ctx.order.safeguard is not None:
            ctx.order.safeguard.watch(ctx, graph_task_id())
        return None, None, gradient


def vector_of(losses: Sequence[Tensor]) -> Tensor:
    """The losses as one detached vector, in float32 or wider, on the device of the first."""
    device, wide = losses[0].device, torch.float32
    for dtype in {loss.dtype for loss in losses}:
        wide = torch.promote_types(wide, dtype)
    with torch.no_grad():
        return torch.stack(
            [loss if loss.dtype == wide and loss.device == device else loss.to(device, wide) for loss in losses]
        )


def _any(part: Sequence[Tensor | None]) -> bool:
    return any(gradient is not None for gradient in part)


def _device_type(gradients: Sequence[Tensor | None]) -> str:
    return next((g.device.type for g in gradients if g is not None), "cpu")
