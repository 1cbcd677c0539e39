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
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from mtlwrap.balancers.base import Balancer
from mtlwrap.gradients import TaskGradients
from mtlwrap.losses import Losses, checked_auxiliary, collect
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


class _Order:
    """What one ``scalarize`` tells the forks: who takes part, and the losses' values."""

    def __init__(self, taking_part: tuple[bool, ...]) -> None:
        self.taking_part = taking_part
        self.losses: Tensor | None = None
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
        self._forms = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        self.scope = current_scope()
        self.spent = False
        self.node: weakref.ref[Any] | None = None
        self._passes: dict[int, _Pass] = {}

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
        return [*gradients, *[None] * len(self.parameters)]

    def balance(self, parts: list[list[Tensor | None]], running: _Pass) -> list[Tensor | None]:
        """As the balancer decides, the gradient of each tensor of the representation, then of each own parameter."""
        order = running.order
        gradients = TaskGradients.from_parts(
            self._completed(parts, order.taking_part),
            order.taking_part,
            order.spread(order.losses, torch.nan),
            running.scale,
            order.spread(running.loss_factors, 0.0),
        )
        with torch.no_grad():
            weights = self.balancer.weigh(gradients)
        if weights is not None and not isinstance(weights, Tensor):
            raise TypeError(
                f"{type(self.balancer).__name__}.weigh: expected to return a tensor of shape [{self.num_tasks}] or "
                f"None, got {type(weights).__name__}."
            )
        if weights is None:
            shared = gradients.scaled(self.balancer.combine(gradients))
        else:
            shared = gradients.scaled_sum(weights)
        # With what factor each *raw* loss's gradient entered: the balancer's weight times the loss's own factor.
        raw = None if weights is None else weights.detach() * gradients.loss_factors.to(weights.device)
        self.report.fill(raw, gradients, self.scope)
        with torch.no_grad():
            own = {name: g * running.scale.to(g) for name, g in self.balancer.own_gradients(gradients).items()}
        read = [any(g is not None for g in part) for part in parts]
        return [*(s if r else None for s, r in zip(shared, read, strict=True)), *map(own.get, self.parameters)]

    def _completed(self, parts: list[list[Tensor | None]], taking_part: tuple[bool, ...]) -> list[list[Tensor | None]]:
        """With zeros for a tensor that no task reads, so that the gradients' length is always the representation's."""
        completed = []
        for part, (shape, dtype, device) in zip(parts, self._forms, strict=True):
            if not any(present and g is not None for g, present in zip(part, taking_part, strict=True)):
                part = list(part)
                part[taking_part.index(True)] = torch.zeros((), dtype=dtype, device=device).expand(shape)
            completed.append(part)
        return completed


class _ForkNode(torch.autograd.Function):
    """Forward: an alias of each tensor for each task. Backward: one gradient for each tensor."""

    @staticmethod
    def forward(state: _ForkState, *tensors: Tensor) -> tuple[Tensor, ...]:
        # The balancer's parameters are among the inputs, behind the representation, so that whoever searches the
        # graph of the predictions for the parameters in use (DDP) finds them.
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
            return (None, *map(_plain_sum, parts), *[None] * len(state.parameters))

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

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
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

    def __getstate__(self) -> dict[str, Any]:
        # Forks belong to graphs, and a copy of a model has none yet.
        return {"tasks": self.tasks, "report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tasks"])  # type: ignore[misc]
        self.report = state["report"]

    @opaque
    def fork(self, representation: Any, balancer: Balancer, tasks: Sequence[int]) -> list[Any]:
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
        own = self._through_node(forked, balancer, tuple(tasks))
        if torch.is_grad_enabled():
            self._forked = bool(forked)
        return _each_its_own(representation, tensors[0], own, balancer, tasks)

    def _through_node(
        self, tensors: list[Tensor], balancer: Balancer, tasks: tuple[int, ...]
    ) -> list[dict[int, Tensor]]:
        if not tensors:
            return [{} for _ in tasks]
        if balancer.training and not transforming():
            balancer.prepare(tensors)
        parameters = {name: p for name, p in balancer.named_parameters() if p.requires_grad}
        # Once each task was seen to read its own head: what the outputs tell apart is needed for that check.
        together = not balancer.sees_gradients and current_scope() is None and self._trusted.issuperset(tasks)
        state = _ForkState(self, balancer, tasks, tensors, parameters, together)
        outputs = _ForkNode.apply(state, *tensors, *parameters.values())
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
        forks = self._forks_of(losses, taking_part)
        if auxiliary is not None:
            self._check_auxiliary(auxiliary, forks)
        if balancer.training and not transforming():
            balancer.constrain()
        order = _Order(taking_part)
        total = balancer.scalarize(_LossesNode.apply(order, *chosen), tasks)
        if not isinstance(total, Tensor) or total.dim() != 0:
            shape = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise ValueError(f"{type(balancer).__name__}.scalarize: expected to return a 0-dim tensor, got {shape}.")
        total = cast("Tensor", _ScalarNode.apply(order, forks, total))
        return total if auxiliary is None else total + auxiliary

    def _living(self) -> list[_ForkState]:
        """The forks whose graph can still be run backward."""
        with self._lock:
            states = [state for reference in self._alive if (state := reference()) is not None]
            self._alive = [weakref.ref(state) for state in states]
        return [state for state in states if not state.spent and state.node is not None and state.node() is not None]

    def _forks_of(self, losses: Sequence[Tensor | None], taking_part: tuple[bool, ...]) -> list[_ForkState]:
        """The forks that these losses came from.

        Usually a single fork is alive, and the first loss leads to it: then it is that one. Where several are alive,
        or a task comes for the first time, the graph is walked from every loss.
        """
        living = self._living()
        present = [task for task, present in enumerate(taking_part) if present]
        unknown = [task for task in present if task not in self._trusted]
        if len(living) == 1 and not unknown and _Walk(losses[present[0]], self, to_first=True).reached:
            return living
        walks = {task: _Walk(losses[task], self) for task in present}
        forks = self._common_forks(walks)
        for task in unknown:
            self._check_reads_own_head(task, losses[task], walks[task])
        self._trusted.update(unknown)
        return forks

    def _common_forks(self, walks: "dict[int, _Walk]") -> list[_ForkState]:
        for task, walk in walks.items():
            if walk.foreign and not walk.reached:
                raise ValueError(
                    f"The loss of task {self.tasks[task]!r} was computed from the representation of another model."
                )
        reached = {task: frozenset(walk.reached) for task, walk in walks.items() if walk.reached}
        if not reached:
            # A frozen backbone, or only heads that detach: nothing to balance, the losses still are.
            if self._forked is False or self._detached.issuperset(walks):
                return []
            raise ValueError(
                "No loss depends on a representation of this model: scalarize and backward need losses computed from "
                "the predictions of a forward with gradients enabled. "
                + ("There was no such forward yet." if self._forked is None else "Were all predictions detached?")
                + " (A forward inside torch.no_grad, inference_mode or a reentrant checkpoint does not count.)"
            )
        self._detached.update(walks.keys() - reached.keys())
        first_task, first = next(iter(reached.items()))
        for task, forks in reached.items():
            if forks != first:
                raise ValueError(
                    f"The losses come from different forwards: that of task {self.tasks[first_task]!r} and that of "
                    f"task {self.tasks[task]!r} do not depend on the same one. Expected the losses of one call of "
                    "scalarize to come from the same forward (or, added up, from the same forwards); to compare two "
                    "batches in a loss, concatenate them into one forward, or detach one side."
                )
        return list(first)

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

    def _check_auxiliary(self, auxiliary: Tensor, forks: Sequence[_ForkState]) -> None:
        # One that comes from another forward is added there as it is.
        if auxiliary.requires_grad and not _Walk(auxiliary, self).reached.keys().isdisjoint(forks):
            raise ValueError(
                "auxiliary depends on the representation through the heads, where its gradient would be balanced as "
                "if it were the tasks'. Expected a term that does not (a penalty on parameters, say); add this one to "
                "the loss of the task whose prediction it reads."
            )


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


def _vector(losses: Sequence[Tensor]) -> Tensor:
    """The losses as one detached vector, in float32 or wider, on the device of the first."""
    wide = torch.float32
    for loss in losses:
        wide = torch.promote_types(wide, loss.dtype)
    return torch.stack([loss.detach().to(device=losses[0].device, dtype=wide) for loss in losses])


def _device_type(gradients: Sequence[Tensor | None]) -> str:
    return next((g.device.type for g in gradients if g is not None), "cpu")
