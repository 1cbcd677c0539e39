"""The fork: one autograd node at which the gradients of all tasks meet, and the node that tells it when to balance.

A balanced step, forward: the backbone's representation passes through :class:`_ForkNode`, which hands every head an
alias of its own; the heads make predictions, the user makes losses; :meth:`Junction.scalarize` passes them through
:class:`_LossesNode`, the balancer's scalar through :class:`_ScalarNode`. Backward, in this order: the scalar node
notes what the total was multiplied with and leaves an order at the forks that the losses came from; the losses node
notes each loss's factor; the heads run; the fork, once every head has sent its gradient, finds the order and
balances. A fork that finds none is a plain sum: in a backward pass that did not come through ``scalarize`` the
wrapper is not there.

Nothing outside this file knows autograd's internals. The names of torch used here that are not public each have a
fall-back.
"""

import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from mtlwrap.balancers.base import Balancer, select
from mtlwrap.exact import Exact
from mtlwrap.gradients import TaskGradients
from mtlwrap.losses import Losses, checked_auxiliary, collect
from mtlwrap.probe import check_repeatable, check_whole, leads_elsewhere, pull_back
from mtlwrap.step import Scope, current_scope
from mtlwrap.structure import differentiable_tensors, replace_tensors
from mtlwrap.surroundings import opaque, transforming, without_autocast

_lazy_clone = getattr(torch, "_lazy_clone", None)
_without_subclass = getattr(torch._C, "DisableTorchFunctionSubclass", nullcontext)


def _unknown_graph_task() -> int:
    return 0


# The number of the running backward pass. Without it an order that was never taken could be taken by a later pass.
_graph_task_id = getattr(torch._C, "_current_graph_task_id", _unknown_graph_task)
# Whether the running backward pass keeps the graph. Without it a spent fork counts as alive until it is collected.
_keeps_graph = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", lambda: True)


# Nodes through which autograd.grad cannot be asked for a part of the gradient.
_OPAQUE_NODES = {"CompiledFunctionBackward", "CheckpointFunctionBackward"}


class Report:
    """What the last balanced backward of a model leaves behind for its user."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self._gradients: TaskGradients | None = None
        self._scope: Scope | None = None

    @property
    def gradients(self) -> TaskGradients | None:
        """The task gradients, while the step's scope is open."""
        return self._gradients if self._scope is not None and self._scope.is_open else None

    def fill(self, weights: Tensor | None, gradients: TaskGradients | None, scope: Scope | None) -> None:
        """Note the outcome of a balanced backward; the gradients only if a scope will free them."""
        self.weights = weights
        self._gradients, self._scope = None, scope
        if scope is not None and scope.is_open and gradients is not None:
            self._gradients = gradients
            scope.add(gradients)
            scope.add(self)

    def release(self) -> None:
        """Called as a scope closes, though perhaps not the one of the gradients held now."""
        if self._scope is not None and not self._scope.is_open:
            self._gradients = self._scope = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model, or a pickle, is no part of the step that is running.
        return {"weights": self.weights, "_gradients": None, "_scope": None}


# Backward passes that may be running at once through one total; older ones that never arrived are forgotten.
_MOST_PASSES = 64


@dataclass
class _Decision:
    """What a balancer decided before the backward pass, for the forks to carry out.

    Attributes:
        shared: for each fork the gradient of each tensor of its representation.
        own: the gradients of the balancer's own parameters, by name; the first fork returns them.
        weights: the factor of each task's raw-loss gradient, ``[T]``.
        gradients: what was weighed.
        head_factors: with what factor each present task's loss enters its head, if not 1.
    """

    shared: "dict[_ForkState, list[Tensor | None]]"
    own: dict[str, Tensor]
    weights: Tensor | None
    gradients: TaskGradients
    head_factors: Tensor | None


class _Order:
    """What one ``scalarize`` tells the forks: who takes part, the losses' values, what is decided already."""

    def __init__(self, taking_part: tuple[bool, ...]) -> None:
        self.taking_part = taking_part
        self.losses: Tensor | None = None
        self.decision: _Decision | None = None
        # By graph task: several threads may run backward through one total.
        self.passes: dict[int, _Pass] = {}

    def spread(self, values: Tensor | None, absent: float) -> Tensor | None:
        """Values of the tasks that take part, at their places among all tasks."""
        if values is None or all(self.taking_part):
            return values
        remaining = iter(values.unbind())
        filler = torch.full_like(values[0], absent)
        return torch.stack([next(remaining) if present else filler for present in self.taking_part])


class _Pass:
    """An order in one backward pass: what the total was multiplied with, and with what factor each loss came."""

    def __init__(self, order: _Order, scale: Tensor) -> None:
        self.order = order
        self.scale = scale
        self.loss_factors: Tensor | None = None


def _remember(passes: dict[int, _Pass], running: _Pass) -> None:
    passes[_graph_task_id()] = running
    while len(passes) > _MOST_PASSES:
        passes.pop(next(iter(passes)))


class _ForkState:
    """One passage through the fork. It belongs to the graph; the model knows it weakly, so the model holds no graph."""

    def __init__(
        self,
        junction: "Junction",
        balancer: Balancer,
        tasks: tuple[int, ...],
        tensors: Sequence[Tensor],
        parameters: Iterable[str],
        together: bool,
        exact: Exact | None,
    ) -> None:
        self.owner = weakref.ref(junction)
        self.balancer = balancer
        self.report = junction.report
        self.tasks = tasks
        self.num_tasks = len(junction.tasks)
        self.num_tensors = len(tensors)
        self.parameters = tuple(parameters)
        # Where nobody looks at the tasks' gradients they are added up as they arrive, at one output for all tasks.
        self.copies = 1 if together else len(tasks)
        self.exact = exact
        # The way from the representation to the backbone's parameters, without holding its values.
        self.edges = [get_gradient_edge(tensor) for tensor in tensors]
        self._forms = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        self.scope = current_scope()
        self.spent = False
        self.node: weakref.ref[Any] | None = None
        self._passes: dict[int, _Pass] = {}

    @property
    def num_others(self) -> int:
        """How many inputs the fork has behind the representation."""
        return len(self.parameters) + (0 if self.exact is None else len(self.exact.parameters))

    def leave(self, running: _Pass) -> None:
        """Called by the scalar node: in this backward pass the fork balances."""
        pending = self._passes.get(_graph_task_id())
        if pending is not None and pending.order is not running.order:
            raise ValueError(
                "Two scalarized totals of the same forward met in one backward pass. Hand all losses of a forward "
                "to one call of scalarize, or run a backward pass for each total."
            )
        _remember(self._passes, running)

    def take(self) -> _Pass | None:
        """Called by the fork: what was left in this very backward pass, not in one around it or one before."""
        return self._passes.pop(_graph_task_id(), None)

    def by_task(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """The arriving gradients, sorted: for each tensor of the representation, one entry per task."""
        parts: list[list[Tensor | None]] = [[None] * self.num_tasks for _ in range(self.num_tensors)]
        for position, task in enumerate(self.tasks):
            for tensor in range(self.num_tensors):
                parts[tensor][task] = gradients[position * self.num_tensors + tensor]
        return parts

    def pass_on(self, gradients: Sequence[Tensor | None], running: _Pass | None) -> list[Tensor | None]:
        """What autograd adds up by itself; the losses' factors are the weights."""
        if running is not None:
            factors = running.order.spread(running.loss_factors, 0.0)
            self.report.fill(None if factors is None else factors.double(), None, None)
        return [*gradients, *[None] * self.num_others]

    def balance(self, parts: list[list[Tensor | None]], running: _Pass) -> list[Tensor | None]:
        """As the balancer decides, the gradients of the representation, of its own parameters, of shared parameters."""
        order = running.order
        if order.decision is not None:
            return self._carry_out(order.decision, running.scale)
        gradients = self._gradients(parts, running)
        if self.exact is not None:
            return self._balance_exactly(parts, gradients, running)
        weights = decided_weights(self.balancer, gradients)
        if weights is None:
            shared = gradients.scaled(self.balancer.combine(gradients))
        else:
            shared = gradients.scaled_sum(weights)
        self._report(weights, gradients)
        return [*_where_read(shared, parts), *self._own(gradients, running.scale)]

    def _balance_exactly(
        self, parts: list[list[Tensor | None]], on_z: TaskGradients, running: _Pass
    ) -> list[Tensor | None]:
        """The same with the gradients on the shared parameters: the backbone's backward runs here, once per task.

        Their weighted sum is handed to the parameters from here, unless the backbone's graph leads to something else
        that wants a gradient: then one more pass is left to autograd.
        """
        exact = cast("Exact", self.exact)
        schedule, taking_part = exact.schedule, running.order.taking_part
        nothing: list[Tensor | None] = [None] * len(exact.parameters)
        if schedule is not None and not schedule.is_due(taking_part):
            weights = schedule.reuse(on_z.active)
            self._report(weights, on_z)
            shared = _where_read(on_z.scaled_sum(weights), parts)
            return [*shared, *[None] * len(self.parameters), *nothing]
        rows = [
            pull_back(self.edges, [part[task] for part in parts], exact.parameters)
            for task in (task for task, present in enumerate(taking_part) if present)
        ]
        gradients = exact.gradients(rows, taking_part, on_z, running.scale)
        chosen = decided_weights(self.balancer, gradients)
        if schedule is not None:
            schedule.keep(_needed(chosen, self.balancer, "refresh_every"), taking_part)
        self._report(chosen, gradients)
        own = self._own(gradients, running.scale)
        # With create_graph the derivative of the shared gradient is wanted, which these are not connected to.
        if torch.is_grad_enabled() or leads_elsewhere(self.edges, exact.parameters):
            weights = _needed(chosen, self.balancer, "a backbone whose input wants a gradient")
            return [*_where_read(on_z.scaled_sum(weights), parts), *own, *nothing]
        if chosen is None:
            combined = gradients.scaled(self.balancer.combine(gradients))
        else:
            combined = gradients.scaled_sum(chosen)
        return [*[None] * self.num_tensors, *own, *exact.shaped(combined, rows)]

    def _carry_out(self, decision: _Decision, scale: Tensor) -> list[Tensor | None]:
        first = self is next(iter(decision.shared))
        own = {name: g * scale.to(g) for name, g in decision.own.items()} if first else {}
        shared = [None if g is None else (g * scale.to(g.device)).to(g.dtype) for g in decision.shared[self]]
        self.report.fill(decision.weights, decision.gradients, self.scope)
        return [*shared, *map(own.get, self.parameters), *[None] * (self.num_others - len(self.parameters))]

    def _gradients(self, parts: list[list[Tensor | None]], running: _Pass) -> TaskGradients:
        order = running.order
        return TaskGradients.from_parts(
            self.completed(parts, order.taking_part),
            order.taking_part,
            order.spread(order.losses, torch.nan),
            running.scale,
            order.spread(running.loss_factors, 0.0),
        )

    def _own(self, gradients: TaskGradients, scale: Tensor) -> list[Tensor | None]:
        with torch.no_grad():
            own = {name: g * scale.to(g) for name, g in self.balancer.own_gradients(gradients).items()}
        return list(map(own.get, self.parameters))

    def _report(self, weights: Tensor | None, gradients: TaskGradients) -> None:
        self.report.fill(raw_weights(weights, gradients), gradients, self.scope)

    def feature_shapes(self) -> list[torch.Size]:
        """The shape of each tensor of the representation but for the batch."""
        return [shape[1:] for shape, _, _ in self._forms]

    def outputs_of(self, task: int) -> list[GradientEdge]:
        """Where the gradient of a task arrives, for each tensor of the representation."""
        node = None if self.node is None else self.node()
        if node is None or task not in self.tasks:
            return []
        first = self.tasks.index(task) * self.num_tensors if self.copies == len(self.tasks) else 0
        return [GradientEdge(node, first + index) for index in range(self.num_tensors)]

    def completed(self, parts: list[list[Tensor | None]], taking_part: tuple[bool, ...]) -> list[list[Tensor | None]]:
        """With zeros for a tensor that no task reads, so that the gradients' length is always the representation's."""
        completed = []
        for part, (shape, dtype, device) in zip(parts, self._forms, strict=True):
            if not any(present and g is not None for g, present in zip(part, taking_part, strict=True)):
                part = list(part)
                part[taking_part.index(True)] = torch.zeros((), dtype=dtype, device=device).expand(shape)
            completed.append(part)
        return completed


def decided_weights(balancer: Balancer, gradients: TaskGradients) -> Tensor | None:
    """The balancer's weights, ``[T]``, or None where its decision is none."""
    with torch.no_grad():
        weights = balancer.weigh(gradients)
    if weights is not None and not isinstance(weights, Tensor):
        raise TypeError(
            f"{type(balancer).__name__}.weigh: expected to return a tensor of shape [{gradients.num_tasks}] or "
            f"None, got {type(weights).__name__}."
        )
    return weights


def raw_weights(weights: Tensor | None, gradients: TaskGradients) -> Tensor | None:
    """With what factor each *raw* loss's gradient entered: the balancer's weight times the loss's own factor."""
    return None if weights is None else weights.detach() * gradients.loss_factors.to(weights.device)


def _needed(weights: Tensor | None, balancer: Balancer, what: str) -> Tensor:
    if weights is None:
        raise ValueError(f"{what} needs a balancer that returns weights, which {type(balancer).__name__} does not.")
    return weights


def _where_read(shared: Sequence[Tensor], parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The gradient of each tensor of the representation, nothing for one that no task reads."""
    read = [any(gradient is not None for gradient in part) for part in parts]
    return [gradient if r else None for gradient, r in zip(shared, read, strict=True)]


class _ForkNode(torch.autograd.Function):
    """Forward: an alias of each tensor for each task. Backward: one gradient for each tensor."""

    @staticmethod
    def forward(state: _ForkState, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(alias(tensor) for _ in range(state.copies) for tensor in tensors[: state.num_tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.state = inputs[0]
        ctx.state.node = weakref.ref(ctx)
        ctx.set_materialize_grads(False)

    @staticmethod
    @opaque
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        state: _ForkState = ctx.state
        running = state.take()
        state.spent = not _keeps_graph()
        if state.copies < len(state.tasks):
            return (None, *state.pass_on(gradients, running))
        parts = state.by_task(gradients)
        with without_autocast(_device_type(gradients)):
            if running is not None:
                return (None, *state.balance(parts, running))
            return (None, *map(_plain_sum, parts), *[None] * state.num_others)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        own = tangents[1 : 1 + ctx.state.num_tensors]
        return tuple(None if t is None else t.clone() for _ in range(ctx.state.copies) for t in own)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], state: _ForkState, *tensors: Tensor) -> tuple[Any, ...]:
        return _ForkNode.apply(state, *tensors), in_dims[1 : 1 + state.num_tensors] * state.copies


class _LossesNode(torch.autograd.Function):
    """Forward: the losses as one vector. Backward: notes the factor with which each enters the total."""

    @staticmethod
    def forward(ctx: Any, order: _Order, *losses: Tensor) -> Tensor:
        ctx.order = order
        ctx.like = [(loss.dtype, loss.device) for loss in losses]
        order.losses = _vector(losses)
        return order.losses.clone()

    @staticmethod
    @opaque
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        running = ctx.order.passes.pop(_graph_task_id(), None)
        if running is not None:
            running.loss_factors = gradient.detach() / torch.where(running.scale == 0, 1.0, running.scale)
            decision = running.order.decision
            if decision is not None and decision.head_factors is not None:
                gradient = gradient * decision.head_factors.to(gradient)
        returned = zip(gradient.unbind(), ctx.like, strict=True)
        return (None, *(g.to(dtype=dtype, device=device) for g, (dtype, device) in returned))


class _ScalarNode(torch.autograd.Function):
    """Forward: the total. Backward: leaves the order, with what the total was multiplied with, at the forks."""

    @staticmethod
    def forward(ctx: Any, order: _Order, forks: Sequence[_ForkState], total: Tensor) -> Tensor:
        ctx.order = order
        ctx.forks = forks
        return total.clone()

    @staticmethod
    @opaque
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        running = _Pass(ctx.order, gradient.detach())
        for fork in ctx.forks:
            fork.leave(running)
        _remember(ctx.order.passes, running)
        return None, None, gradient


class Junction:
    """What all forks of one model have in common: the tasks, which forks are alive, what the last backward left.

    It does not know the model and holds no tensor of a graph.
    """

    def __init__(self, tasks: Sequence[str], weigh_heads: bool = False) -> None:
        self.tasks = tuple(tasks)
        self.weigh_heads = weigh_heads
        self.report = Report()
        # The last forward under gradients: True if it forked, False if its representation needed no gradient.
        self._forked: bool | None = None
        self._device = torch.device("cpu")
        self._alive: list[weakref.ref[_ForkState]] = []
        self._prune_at = 32
        self._lock = threading.Lock()
        # Tasks whose loss was seen to read no head but its own.
        self._trusted: set[int] = set()
        # Tasks whose head was seen to detach the representation, next to others that do not.
        self._detached: set[int] = set()
        # Whether the graph of exact gradients was looked at.
        self._seen_exact = False

    def __getstate__(self) -> dict[str, Any]:
        # Forks belong to graphs, and a copy of a model has none yet.
        return {"tasks": self.tasks, "weigh_heads": self.weigh_heads, "report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tasks"], state["weigh_heads"])  # type: ignore[misc]
        self.report = state["report"]

    @opaque
    def fork(
        self, representation: Any, balancer: Balancer, tasks: Sequence[int], exact: Exact | None = None
    ) -> list[Any]:
        """An alias of the representation for each of ``tasks``: the same values, safe from each other's writes."""
        tensors = differentiable_tensors(representation)
        if not tensors:
            raise TypeError(
                f"representation: expected floating-point tensors, found none in a {type(representation).__name__}."
            )
        if any(tensor.is_nested for tensor in tensors):
            raise TypeError(
                "representation: expected strided tensors, found a nested one. Return its values() and offsets() from "
                "the backbone and rebuild it in the heads."
            )
        forked = [t for t in tensors if t.requires_grad] if torch.is_grad_enabled() else []
        self._device = tensors[0].device
        own = self._through_node(forked, balancer, tuple(tasks), exact)
        if torch.is_grad_enabled():
            self._forked = bool(forked)
        return _each_its_own(representation, tensors[0], own, balancer, tasks)

    def _through_node(
        self, tensors: list[Tensor], balancer: Balancer, tasks: tuple[int, ...], exact: Exact | None
    ) -> list[dict[int, Tensor]]:
        if not tensors:
            return [{} for _ in tasks]
        if balancer.training and not transforming():
            balancer.prepare(tensors) if exact is None else exact.prepare(balancer)
        parameters = {name: p for name, p in balancer.named_parameters() if p.requires_grad}
        # Once each task was seen to read its own head: what the outputs tell apart is needed for that check.
        together = not balancer.sees_gradients and current_scope() is None and self._trusted.issuperset(tasks)
        state = _ForkState(self, balancer, tasks, tensors, parameters, together, exact)
        # Among the inputs, behind the representation, is whatever else gets its gradient from here; so whoever searches
        # the graph of the predictions for the parameters in use (DDP) finds it.
        others = (*parameters.values(), *(() if exact is None else exact.parameters))
        outputs = _ForkNode.apply(state, *tensors, *others)
        with self._lock:
            self._alive.append(weakref.ref(state))
            if len(self._alive) > self._prune_at:  # forwards that are never scalarized
                self._alive = [reference for reference in self._alive if reference() is not None]
                self._prune_at = max(32, 2 * len(self._alive))
        keys = [id(tensor) for tensor in tensors]
        if state.copies < len(tasks):
            return [dict(zip(keys, map(alias, outputs), strict=True)) for _ in tasks]
        count = len(tensors)
        return [
            dict(zip(keys, outputs[position * count : (position + 1) * count], strict=True))
            for position in range(len(tasks))
        ]

    @opaque
    def scalarize(self, losses: Sequence[Tensor | None], balancer: Balancer, auxiliary: Tensor | None = None) -> Tensor:
        """The total to call ``backward`` on, with the order to balance attached; ``losses`` has one entry per task."""
        tracking = torch.is_grad_enabled()
        taking_part = tuple(loss is not None and (loss.requires_grad or not tracking) for loss in losses)
        chosen = [loss for loss, present in zip(losses, taking_part, strict=True) if loss is not None and present]
        if not chosen and any(loss is not None for loss in losses):
            raise ValueError(
                "None of the losses requires grad: there is nothing to train. Was the forward run under "
                "torch.no_grad, or were the predictions detached?"
            )
        tasks = None if all(taking_part) else [t for t, present in enumerate(taking_part) if present]
        if not tracking:
            total = balancer.scalarize(_vector(chosen), tasks) if chosen else torch.zeros((), device=self._device)
            return total if auxiliary is None else total + auxiliary
        if not chosen:  # a batch without a label: backward works and does nothing
            total = torch.zeros((), device=self._device, requires_grad=True)
            return total if auxiliary is None else total + auxiliary
        forks, joint = self._forks_of(losses, taking_part)
        self._check_exact(forks)
        aside = auxiliary if auxiliary is not None and self._reaches(auxiliary, forks) else None
        if balancer.training and not transforming():
            balancer.constrain()
        order = _Order(taking_part)
        vector = _LossesNode.apply(order, *chosen)
        total = balancer.scalarize(vector, tasks)
        if not isinstance(total, Tensor) or total.dim() != 0:
            shape = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise ValueError(f"{type(balancer).__name__}.scalarize: expected to return a 0-dim tensor, got {shape}.")
        if (balancer.sees_gradients and forks and (joint or self.weigh_heads)) or aside is not None:
            (factors,) = torch.autograd.grad(total, vector, retain_graph=True)
            order.decision = self._decide(order, losses, factors, forks, balancer, aside)
        total = cast("Tensor", _ScalarNode.apply(order, forks, total))
        return total if auxiliary is None else total + auxiliary

    def _decide(
        self,
        order: _Order,
        losses: Sequence[Tensor | None],
        factors: Tensor,
        forks: Sequence[_ForkState],
        balancer: Balancer,
        auxiliary: Tensor | None,
    ) -> _Decision:
        """Decide before the backward pass, from gradients that are asked for through the heads alone.

        Several batches meet nowhere in the graph, heads cannot be weighed before the weights are known, and what an
        auxiliary loss sends through the heads must be told apart.
        """
        taking_part = order.taking_part
        present = [task for task, is_present in enumerate(taking_part) if is_present]
        arrived = {fork: fork.by_task([None] * (len(fork.tasks) * fork.num_tensors)) for fork in forks}
        for task, factor in zip(present, factors.detach().unbind(), strict=True):
            loss = cast("Tensor", losses[task])
            at = [(fork, index, edge) for fork in forks for index, edge in enumerate(fork.outputs_of(task))]
            found = _probed([loss], [factor.to(loss)], [edge for _, _, edge in at])
            for (fork, index, _), gradient in zip(at, found, strict=True):
                arrived[fork][index][task] = gradient
        known = (taking_part, order.spread(order.losses, torch.nan), None, order.spread(factors.detach(), 0.0))
        on_z = {
            fork: TaskGradients.from_parts(fork.completed(parts, taking_part), *known)
            for fork, parts in arrived.items()
        }
        weights, gradients = self._weigh_jointly(arrived, on_z, known, balancer)
        if weights is None:
            if len(forks) > 1 or self.weigh_heads or forks[0].exact is not None:
                _needed(weights, balancer, "a decision before the backward pass")
            combined = {forks[0]: gradients.scaled(balancer.combine(gradients))}
        else:
            combined = {fork: seen.scaled_sum(weights) for fork, seen in on_z.items()}
        shared = {fork: _where_read(combined[fork], parts) for fork, parts in arrived.items()}
        if auxiliary is not None:
            for fork in forks:
                _add_auxiliary(auxiliary, fork, shared[fork])
        head_factors = None
        if self.weigh_heads and balancer.sees_gradients:
            # Never a negative weight on a loss of a head, which would train it uphill.
            head_factors = select(cast("Tensor", weights).detach().clamp(min=0.0), present)
        with torch.no_grad():
            own = balancer.own_gradients(gradients)
        return _Decision(shared, own, raw_weights(weights, gradients), gradients, head_factors)

    def _weigh_jointly(
        self,
        arrived: dict[_ForkState, list[list[Tensor | None]]],
        on_z: dict[_ForkState, TaskGradients],
        known: tuple[tuple[bool, ...], Tensor | None, None, Tensor | None],
        balancer: Balancer,
    ) -> tuple[Tensor | None, TaskGradients]:
        """The balancer's weights for gradients from one batch or several, and the gradients that it saw."""
        (first, seen), taking_part = next(iter(on_z.items())), known[0]
        if first.exact is None:
            if len(on_z) > 1:
                seen = TaskGradients.from_parts(_summed_over_batches(arrived, self.tasks), *known)
            return decided_weights(balancer, seen), seen
        schedule = first.exact.schedule
        if schedule is not None and not schedule.is_due(taking_part):
            return schedule.reuse(seen.active), seen
        rows = []
        for task in (task for task, is_present in enumerate(taking_part) if is_present):
            found = [
                _probed(fork.edges, [part[task] for part in parts], first.exact.parameters)
                for fork, parts in arrived.items()
            ]
            rows.append([_plain_sum(of_parameter) for of_parameter in zip(*found, strict=True)])
        seen = first.exact.gradients(rows, taking_part, seen, None)
        weights = decided_weights(balancer, seen)
        if schedule is not None:
            schedule.keep(_needed(weights, balancer, "refresh_every"), taking_part)
        return weights, seen

    def _living(self) -> list[_ForkState]:
        """The forks whose graph can still be run backward."""
        with self._lock:
            states = [state for reference in self._alive if (state := reference()) is not None]
            self._alive = [weakref.ref(state) for state in states]
        return [state for state in states if not state.spent and state.node is not None and state.node() is not None]

    def _forks_of(
        self, losses: Sequence[Tensor | None], taking_part: tuple[bool, ...]
    ) -> tuple[list[_ForkState], bool]:
        """The forks that these losses came from, and whether different tasks came from different ones.

        Usually a single fork is alive, and the first loss leads to it: then it is that one. Where several are alive,
        or a task comes for the first time, the graph is walked from every loss.
        """
        living = self._living()
        present = [task for task, present in enumerate(taking_part) if present]
        unknown = [task for task in present if task not in self._trusted]
        if len(living) == 1 and not unknown and _Walk(losses[present[0]], self, to_first=True).reached:
            return living, False
        walks = {task: _Walk(losses[task], self) for task in present}
        forks, joint = self._common_forks(walks)
        for task in unknown:
            self._check_reads_own_head(task, losses[task], walks[task])
        self._trusted.update(unknown)
        return forks, joint

    def _common_forks(self, walks: "dict[int, _Walk]") -> tuple[list[_ForkState], bool]:
        for task, walk in walks.items():
            if walk.foreign and not walk.reached:
                raise ValueError(
                    f"The loss of task {self.tasks[task]!r} was computed from the representation of another model."
                )
        reached = {task: frozenset(walk.reached) for task, walk in walks.items() if walk.reached}
        if not reached:
            # A frozen backbone, or only heads that detach: nothing to balance, the losses still are.
            if self._forked is False or self._detached.issuperset(walks):
                return [], False
            raise ValueError(
                "No loss depends on a representation of this model: scalarize and backward need losses computed from "
                "the predictions of a forward with gradients enabled. "
                + ("There was no such forward yet." if self._forked is None else "Were all predictions detached?")
                + " (A forward inside torch.no_grad, inference_mode or a reentrant checkpoint does not count.)"
            )
        self._detached.update(walks.keys() - reached.keys())
        together = {fork: None for forks in reached.values() for fork in forks}  # in order, unlike a set
        self._check_batches(reached, list(together))
        return list(together), len(set(reached.values())) > 1

    def _check_batches(self, reached: dict[int, frozenset[_ForkState]], forks: Sequence[_ForkState]) -> None:
        """Refuse losses of different forwards, unless each forward ran just the heads of its own tasks."""
        for task, own in reached.items():
            for other, theirs in reached.items():
                missed = [fork for fork in forks if fork in theirs and fork not in own and task in fork.tasks]
                if not missed:
                    continue
                first, second = sorted((task, other))
                raise ValueError(
                    f"The losses come from different forwards: that of task {self.tasks[first]!r} and that of task "
                    f"{self.tasks[second]!r} do not depend on the same one, though both ran the head of "
                    f"{self.tasks[task]!r}. For tasks with batches of their own say which heads a forward is for, "
                    "model(x, tasks=...); to compare two batches in a loss, concatenate them into one forward, or "
                    "detach one side."
                )

    def _check_reads_own_head(self, task: int, loss: Tensor | None, walk: "_Walk") -> None:
        """Refuse a loss that has a gradient on the alias of another task.

        That it is connected to one says nothing yet (predictions that were stacked and unstacked again), so the
        gradient itself is asked for, through the heads alone, where the graph allows it.
        """
        others = walk.aliases_of_others(task)
        if not others or walk.opaque or loss is None:
            return
        edges = [edge for _, edge in others]
        gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        for (other, _), gradient in zip(others, gradients, strict=True):
            # NaN says nothing: 0 times NaN, from a loss next to this one, is NaN too.
            if gradient is not None and bool(gradient.nan_to_num(0.0).count_nonzero()):
                reads_own = task in walk.tasks()
                raise ValueError(
                    f"The loss of task {self.tasks[task]!r} reads the prediction of task {self.tasks[other]!r}: it "
                    "sends a gradient there. Expected each task's loss to depend on its own head only. "
                    + ("Detach the other prediction." if reads_own else f"Are the losses in order, {self.tasks}?")
                )

    def _reaches(self, auxiliary: Tensor, forks: Sequence[_ForkState]) -> bool:
        """Whether an auxiliary loss sends gradients through the heads of these forwards, if they are told apart."""
        if not auxiliary.requires_grad or all(fork.copies < len(fork.tasks) for fork in forks):
            return False
        return not _Walk(auxiliary, self).reached.keys().isdisjoint(forks)

    def _check_exact(self, forks: Sequence[_ForkState]) -> None:
        """Refuse what cannot be run backward once per task; once, for the graphs of a training are all alike."""
        if self._seen_exact or not any(fork.exact is not None for fork in forks):
            return
        for fork in forks:
            check_whole(cast("Exact", fork.exact).parameters)
            check_repeatable(fork.edges)
        self._seen_exact = True


class _Walk:
    """Which forks the graph of a loss leads to, and at which of their aliases it arrives."""

    def __init__(self, loss: Tensor | None, junction: Junction, *, to_first: bool = False) -> None:
        self.reached: dict[_ForkState, set[int]] = {}
        # Whether a fork of another model was met, and whether a node was met that mixes all it was compiled from.
        self.foreign = False
        self.opaque = False
        start = None if loss is None else loss.grad_fn
        stack: list[tuple[Node, int]] = [] if start is None or loss is None else [(start, loss.output_nr)]
        visited: set[Node] = set()
        while stack:
            node, output = stack.pop()
            state = node.state if getattr(type(node), "_forward_cls", None) is _ForkNode else None  # type: ignore[attr-defined]
            if state is not None and state.owner() is junction:
                self.reached.setdefault(state, set()).add(output)
                if to_first:
                    return
                continue  # what lies behind is the backbone's
            if node in visited:
                continue
            visited.add(node)
            self.foreign = self.foreign or state is not None
            self.opaque = self.opaque or node.name() in _OPAQUE_NODES
            stack.extend((following, nr) for following, nr in node.next_functions if following is not None)

    def tasks(self) -> set[int]:
        """The tasks at whose aliases the walk arrived."""
        return {state.tasks[o // state.num_tensors] for state, outputs in self.reached.items() for o in outputs}

    def aliases_of_others(self, task: int) -> list[tuple[int, GradientEdge]]:
        """The aliases of other tasks at which the walk arrived."""
        found = []
        for state, outputs in self.reached.items():
            node = state.node() if state.node is not None else None
            for output in sorted(outputs):
                other = state.tasks[output // state.num_tensors]
                if other != task and node is not None:
                    found.append((other, GradientEdge(node, output)))
        return found


class Fork:
    """One passage through a fork that stands on its own; :func:`fork` makes it.

    Attributes:
        aliases: the representation, once for each task.
    """

    def __init__(self, representation: Any, balancer: Balancer, junction: Junction) -> None:
        self._junction = junction
        self._balancer = balancer
        self.aliases: list[Any] = junction.fork(representation, balancer, range(len(junction.tasks)))

    def scalarize(self, losses: Losses, auxiliary: Tensor | None = None) -> Tensor:
        """The scalar, 0-dim, whose ``backward()`` is a balanced step; as :meth:`MultiTaskModel.scalarize`."""
        return self._junction.scalarize(
            collect(losses, self._junction.tasks), self._balancer, checked_auxiliary(auxiliary)
        )

    @property
    def task_weights(self) -> Tensor | None:
        """The factors of the raw gradients in the last balanced backward, ``[T]``; None before there was one."""
        return self._junction.report.weights

    @property
    def task_gradients(self) -> TaskGradients | None:
        """The gradients of the last balanced backward, inside :func:`~mtlwrap.cached`; else None."""
        return self._junction.report.gradients


# One junction for all forks of a balancer: it outlives the single step, as that of a model does.
_junctions: "weakref.WeakKeyDictionary[Balancer, Junction]" = weakref.WeakKeyDictionary()


@opaque
def fork(representation: Any, balancer: Balancer, num_tasks: int) -> Fork:
    """The fork itself, for a model that is not one backbone with heads (MMoE, MTAN, cross-stitch).

    Call it in each forward, where the shared part ends: ``aliases[t]`` is the representation for task t. The gradients
    that come back through the aliases are balanced in the backward of ``scalarize(losses)``, and only there.

    Args:
        representation: what the tasks share; a tensor, or tensors in any container that :class:`MultiTaskModel` takes.
        balancer: the same object in every step. Make it for ``num_tasks`` tasks, and put its parameters into your
            optimizer.
        num_tasks: the number of tasks.

    Raises:
        TypeError: ``balancer`` is no balancer, or the representation holds no floating-point tensor.
        ValueError: ``num_tasks`` is not positive, or not the number that the balancer was made for.

    Example:
        >>> import torch
        >>> from mtlwrap import IMTL, fork
        >>> experts = [torch.nn.Linear(4, 8) for _ in range(3)]
        >>> gates = [torch.nn.Linear(4, 3) for _ in range(2)]
        >>> balancer = IMTL(2)
        >>> x = torch.randn(16, 4)
        >>> shared = fork([expert(x) for expert in experts], balancer, 2)
        >>> mixed = [
        ...     sum(share * e for share, e in zip(gate(x).softmax(1).T.unsqueeze(2), own))
        ...     for gate, own in zip(gates, shared.aliases)
        ... ]
        >>> shared.scalarize([m.square().mean() for m in mixed]).backward()
        >>> shared.task_weights.shape
        torch.Size([2])
    """
    if not isinstance(balancer, Balancer):
        raise TypeError(f"balancer: expected a balancer of mtlwrap, got {type(balancer).__name__}.")
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(f"num_tasks: expected a positive int, got {num_tasks!r}.")
    known = _junctions.get(balancer)
    made_for = balancer.num_tasks if known is None else len(known.tasks)
    if made_for is not None and made_for != num_tasks:
        raise ValueError(f"num_tasks: {type(balancer).__name__} was made for {made_for} tasks, got {num_tasks}.")
    if known is None:
        known = _junctions[balancer] = Junction([str(task) for task in range(num_tasks)])
    return Fork(representation, balancer, known)


def alias(tensor: Tensor) -> Tensor:
    """The same values in a tensor of its own: copied when someone writes, as long as torch can tell; else at once."""
    if torch.compiler.is_compiling() or transforming():
        return tensor.clone()  # a compiler drops it where nobody writes
    if _lazy_clone is not None and type(tensor) in (Tensor, torch.nn.Parameter):
        try:
            aliased: Tensor = _lazy_clone(tensor)
        except (RuntimeError, NotImplementedError):  # sparse, quantized, under a transform of torch.func
            pass
        else:
            return aliased
    with _without_subclass():  # a subclass would be re-made as a view of the copy
        return tensor.clone()


def aliases(representation: Any) -> Any:
    """The representation with every tensor aliased, one that occurs twice only once; gradients pass through."""
    return _with_aliases(representation, {})


def without_fork(representation: Any, balancer: Balancer, tasks: Sequence[int]) -> list[Any]:
    """What the heads of ``tasks`` get where nothing is balanced: every tensor aliased, gradients pass through."""
    tensors = differentiable_tensors(representation) if balancer.transforms else []
    return _each_its_own(representation, tensors[0] if tensors else None, [{} for _ in tasks], balancer, tasks)


def _each_its_own(
    representation: Any, first: Tensor | None, own: list[dict[int, Tensor]], balancer: Balancer, tasks: Sequence[int]
) -> list[Any]:
    """For each task the representation with its own aliases, the first tensor as the balancer transforms it."""
    if balancer.transforms and first is not None:
        given = [known.get(id(first)) for known in own]
        changed = balancer.transform([alias(first) if a is None else a for a in given], tasks)
        for known, tensor in zip(own, changed, strict=True):
            known[id(first)] = tensor
    return [_with_aliases(representation, known) for known in own]


def _with_aliases(representation: Any, known: dict[int, Tensor]) -> Any:
    known = dict(known)

    def substitute(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = alias(tensor)
        return known[id(tensor)]

    return replace_tensors(representation, substitute)


def _plain_sum(part: Sequence[Tensor | None]) -> Tensor | None:
    """What autograd itself would have added up, in the order in which it does: the last task first."""
    total: Tensor | None = None
    for gradient in reversed(part):
        if gradient is not None:
            total = gradient if total is None else total + gradient
    return total


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


def _add_auxiliary(auxiliary: Tensor, fork: _ForkState, shared: list[Tensor | None]) -> None:
    """Add the gradient that an auxiliary loss sends through the heads, as it is."""
    edges = [edge for task in fork.tasks for edge in fork.outputs_of(task)]
    found = _probed([auxiliary], [torch.ones_like(auxiliary)], edges)
    for index in range(fork.num_tensors):
        shared[index] = _plain_sum([*found[index :: fork.num_tensors], shared[index]])


def _summed_over_batches(
    arrived: dict[_ForkState, list[list[Tensor | None]]], tasks: Sequence[str]
) -> list[list[Tensor | None]]:
    """The tasks' gradients of several batches, summed over each: those on an offset of the representation.

    Raises:
        ValueError: the batches' representations differ in more than the number of samples.
    """
    forms = {tuple(tuple(form) for form in fork.feature_shapes()): fork for fork in arrived}
    if len(forms) > 1:
        listed = "; ".join(
            f"{', '.join(repr(tasks[task]) for task in fork.tasks)}: {list(form)}" for form, fork in forms.items()
        )
        raise ValueError(
            f"To balance batches jointly their representations must agree in all but the number of samples, got "
            f"{listed}."
        )
    count = next(iter(arrived)).num_tensors
    return [
        [_plain_sum([_batch_sum(parts[index][task]) for parts in arrived.values()]) for task in range(len(tasks))]
        for index in range(count)
    ]


def _batch_sum(gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or gradient.dim() == 0 else gradient.sum(0, keepdim=True)


def _vector(losses: Sequence[Tensor]) -> Tensor:
    """The losses as one detached vector, in float32 or wider, on the device of the first."""
    wide = torch.float32
    for loss in losses:
        wide = torch.promote_types(wide, loss.dtype)
    return torch.stack([loss.detach().to(device=losses[0].device, dtype=wide) for loss in losses])


def _device_type(gradients: Sequence[Tensor | None]) -> str:
    return next((g.device.type for g in gradients if g is not None), "cpu")
