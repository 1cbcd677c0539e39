"""The junction of a model: where its forks are made, and its losses find the forks they came from."""

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtlwrap.aliases import each_its_own
from mtlwrap.balancers.base import Balancer
from mtlwrap.balancers.equal import EqualWeighting
from mtlwrap.connection import connect, visible_tensors
from mtlwrap.decision import decide
from mtlwrap.exact import Exact, Schedule
from mtlwrap.heads import Heads
from mtlwrap.losses import Losses, checked_auxiliary, collect
from mtlwrap.nodes import ForkNode, ForkState, LossesNode, ScalarNode, vector_of
from mtlwrap.origins import Found, Origins
from mtlwrap.outcome import Report
from mtlwrap.passes import Order
from mtlwrap.probe import check_repeatable, check_whole
from mtlwrap.processes import NOTHING_TO_TRAIN, Peers
from mtlwrap.safeguard import Safeguard, Watched, has_float16
from mtlwrap.state import is_sharded, whole_parameters
from mtlwrap.step import current_scope
from mtlwrap.structure import differentiable_tensors
from mtlwrap.surroundings import autocasts_to_float16, opaque, transforming

# Backward passes, none of them balanced, after which that cannot be meant.
_PATIENCE = 100


class Junction:
    """What all forks of one model have in common: the tasks, which forks are alive, what the last backward left.

    It does not know the model.
    """

    def __init__(self, tasks: Sequence[str], weigh_heads: bool = False, peers: Peers | None = None) -> None:
        self.tasks = tuple(tasks)
        self.weigh_heads = weigh_heads
        self.peers = Peers() if peers is None else peers
        self.report = Report()
        self._origins = Origins(self, self.peers)
        # Tasks whose heads take part in each other's backward passes across the processes.
        self._communicating: frozenset[int] = frozenset()
        # Of a total of no losses.
        self._device, self._dtype = torch.device("cpu"), torch.float32
        # Whether float16 was seen in this training; the backward passes that are being watched then.
        self._is_float16 = False
        self._watched: Watched = weakref.WeakValueDictionary()
        # Backward passes so far that were plain sums; None once losses were scalarized.
        self._plain_passes: int | None = 0
        # Whether the graph of exact gradients was looked at.
        self._seen_exact = False

    def __getstate__(self) -> dict[str, Any]:
        # Forks belong to graphs, and a copy of a model has none yet.
        return {"tasks": self.tasks, "weigh_heads": self.weigh_heads, "peers": self.peers, "report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tasks"], state["weigh_heads"], state.get("peers"))  # type: ignore[misc]
        self.report = state["report"]

    @opaque
    def fork(
        self,
        representation: Any,
        balancer: Balancer,
        tasks: Sequence[int],
        exact: Exact | None = None,
        *,
        lazily: bool = False,
    ) -> Iterable[Any]:
        """An alias of the representation for each of ``tasks``: the same values, safe from each other's writes.

        If lazily, each is made as it is asked for, which is to be just before its head runs.
        """
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
        if balancer.transforms and forked and forked[0] is not tensors[0]:
            raise ValueError(
                f"{type(balancer).__name__} rotates the representation's first tensor, but that one does not require "
                "grad and another one does. Expected first the one that the backbone trains."
            )
        self._device = tensors[0].device
        if not self._is_float16 and torch.is_grad_enabled():
            self._is_float16 = autocasts_to_float16(self._device.type) or any(t.dtype is torch.float16 for t in tensors)
        dtype = tensors[0].dtype
        self._dtype = torch.promote_types(dtype.to_real() if dtype.is_complex else dtype, torch.float32)
        own, shared = self._through_node(forked, balancer, tuple(tasks), exact)
        aliases = each_its_own(representation, tensors[0], own, balancer, tasks, shared)
        return aliases if lazily else list(aliases)

    def _through_node(
        self, tensors: list[Tensor], balancer: Balancer, tasks: tuple[int, ...], exact: Exact | None
    ) -> tuple[list[dict[int, Tensor]], dict[int, Tensor]]:
        """The fork's outputs, by the id of what they stand for: those of each task, and those that all share."""
        if not tensors:
            if torch.is_grad_enabled():
                self._origins.note(None)
            return [{} for _ in tasks], {}
        if balancer.training and not transforming():
            balancer.prepare(tensors) if exact is None else exact.prepare(balancer)
        parameters = {name: p for name, p in balancer.named_parameters() if p.requires_grad}
        if any(map(is_sharded, parameters.values())):
            raise ValueError(
                f"The parameters of {type(balancer).__name__} are sharded by themselves. Call fully_shard on the "
                "model, not on its balancer: that has no forward of its own which could gather them."
            )
        # Once each task was seen to read its own head: what the outputs tell apart is needed for that check.
        together = not balancer.sees_gradients and current_scope() is None and self._origins.trusts(tasks)
        state = ForkState(self, balancer, tasks, tensors, parameters, together, exact)
        # Among the inputs, behind the representation, is whatever else gets its gradient from here; so whoever searches
        # the graph of the predictions for the parameters in use (DDP) finds it.
        others = (*parameters.values(), *(() if exact is None else exact.parameters))
        outputs = ForkNode.apply(state, *tensors, *others)
        self._origins.note(state)
        keys = [id(tensor) for tensor in tensors]
        if state.copies < len(tasks):
            return [{} for _ in tasks], dict(zip(keys, outputs, strict=True))
        count = len(tensors)
        own = [
            dict(zip(keys, outputs[position * count : (position + 1) * count], strict=True))
            for position in range(len(tasks))
        ]
        return own, {}

    def note_plain_pass(self, balancer: Balancer) -> None:
        """Warn, once, where a balancer is there and never asked."""
        if self._plain_passes is None or isinstance(balancer, EqualWeighting):
            return
        self._plain_passes += 1
        if self._plain_passes == _PATIENCE:
            warnings.warn(
                f"{_PATIENCE} backward passes came through the model, and none was that of scalarize(losses): "
                f"{type(balancer).__name__} balances nothing. Call model.backward(losses), or hand "
                "model.scalarize(losses) to your trainer; leave the balancer out if a plain sum is meant.",
                UserWarning,
                stacklevel=2,
            )

    @opaque
    def meet(self, model: nn.Module | None = None) -> None:
        """Find the processes that train the model together; before a forward under gradients, if there are several."""
        self.peers.meet(model)
        if model is not None and self.peers.is_sharded and _constrain not in model._forward_pre_hooks.values():
            # Before the hook with which fully_shard makes them whole: what is written to those is not kept.
            model.register_forward_pre_hook(_constrain, prepend=True)

    @opaque
    def connect(self, predictions: dict[int, Any], balancer: Balancer, heads: Heads) -> dict[int, Any]:
        """With several processes, the predictions connected: whichever losses a process has, it runs every head."""
        if self.peers.ranks is None or not torch.is_grad_enabled():
            return predictions
        found = visible_tensors(predictions)
        self._communicating = frozenset(task for task in range(len(self.tasks)) if _communicates(heads[task]))
        others = [p for p in balancer.parameters() if p.requires_grad]
        for task in predictions.keys() - found.keys():
            out_of_sight = [p for p in heads[task].parameters() if p.requires_grad]
            if out_of_sight and self.peers.is_sharded:
                raise TypeError(
                    f"The head of task {self.tasks[task]!r} returned a {type(predictions[task]).__name__}, which hides "
                    "its tensors. With sharded parameters every process has to run every head backward: return "
                    "tensors, in containers that can be rebuilt, and make the object of them in the loss."
                )
            others += out_of_sight
        connected, connection, token = connect(predictions, found, others)
        if connection is not None and token is not None:
            self._origins.note_connection(predictions.keys(), connection, token)
        return connected

    @opaque
    def scalarize(
        self, losses: Losses, balancer: Balancer, auxiliary: Tensor | None = None, model: nn.Module | None = None
    ) -> Tensor:
        """The total to call ``backward`` on, with the order to balance attached."""
        if not torch.is_grad_enabled():
            return self._value(collect(losses, self.tasks), balancer, checked_auxiliary(auxiliary))
        if self._plain_passes is not None:  # the first total
            self._plain_passes = None
            self._is_float16 = self._is_float16 or (model is not None and has_float16(model))
        with self._telling_others():
            given, auxiliary = collect(losses, self.tasks), checked_auxiliary(auxiliary)
            here = tuple(loss is not None and loss.requires_grad for loss in given)
            is_idle = not any(here) and any(loss is not None for loss in given)
            if is_idle and self.peers.ranks is None:
                raise ValueError(NOTHING_TO_TRAIN)
            self.peers.check()
            self.peers.check_first_step(here)
            found = self._origins.find(given, here)
            self._check_exact(found.forks)
            is_mixed, read = self._read_by(auxiliary, found.forks, balancer)
            aside = auxiliary if is_mixed and balancer.sees_gradients else None
            if aside is not None:
                self.peers.check_runs_ahead()
            if any(here) and not found.forks:
                self.report.fill(None, None, None)  # nothing is balanced
        chosen = [loss for loss, present in zip(given, here, strict=True) if loss is not None and present]
        several = self.peers.ranks is not None  # one alone decides it in the backward pass
        passes_on = several and (aside is not None or any(fork.is_looked_at for fork in found.forks))
        order = self._order(here, chosen, found, balancer, model, read=read, passes_on=passes_on, is_idle=is_idle)
        order.is_mixed = is_mixed and aside is None
        found = found.taking_part(order.taking_part)
        order.num_forks = len(found.forks)
        is_early = self._is_early(found, balancer, aside)  # where it raises, it does so in all processes
        if is_early:
            order.decide = partial(
                decide,
                losses=given,
                forks=found.forks,
                balancer=balancer,
                auxiliary=aside,
                weigh_heads=self.weigh_heads,
            )
        total = self._total(chosen, found, order, balancer, model)
        return total if auxiliary is None else total + auxiliary

    def _value(self, losses: Sequence[Tensor | None], balancer: Balancer, auxiliary: Tensor | None) -> Tensor:
        """The total without a graph."""
        chosen = [loss for loss in losses if loss is not None]
        present = [loss is not None for loss in losses]
        if chosen and any(map(is_sharded, balancer.parameters())):
            raise ValueError(
                f"The parameters of {type(balancer).__name__} are sharded at this point, so without gradients one "
                "process alone cannot know the total. Add the losses up, or call scalarize right after a forward."
            )
        total = torch.zeros((), device=self._device)
        if chosen:
            total = balancer.scalarize(vector_of(chosen), _positions(present))
        return total if auxiliary is None else total + auxiliary

    @contextmanager
    def _telling_others(self) -> Iterator[None]:
        """Have the other processes raise too if this one does, before they wait for its part in the decision."""
        try:
            yield
        except Exception:
            if self.peers.ranks is not None:
                self.peers.ranks.refuse(len(self.tasks), self._device)
            raise

    def _order(
        self,
        here: tuple[bool, ...],
        chosen: list[Tensor],
        found: Found,
        balancer: Balancer,
        model: nn.Module | None,
        *,
        read: Sequence[bool],
        passes_on: bool,
        is_idle: bool,
    ) -> Order:
        """Who takes part, and the losses: in all processes, if there are several."""
        ranks = self.peers.ranks
        self._is_float16 = self._is_float16 or any(loss.dtype is torch.float16 for loss in chosen)
        if ranks is None:
            is_guarded = self._is_float16 and _keeps_state(balancer, found.forks)
            return Order(here, here, vector_of(chosen) if chosen else torch.zeros(0), is_guarded=is_guarded)
        # The same form of message whichever losses there are, and wherever they lie.
        values = (vector_of(chosen) if chosen else torch.zeros(0)).to(self._device, self._dtype)
        # With gradients averaged by hand a process may stand aside.
        is_out = not any(here) and not any(connection.tasks for connection in found.connections) and self.peers.waits
        agreed = ranks.agree(
            here,
            values,
            self._form(found, balancer),
            read=read,
            passes_on=passes_on,
            is_float16=self._is_float16,
            keeps_state=_keeps_state(balancer, found.forks),
            gradients_differ=not self._is_float16 or model is None or self.peers.gradients_differ(model.parameters()),
            is_idle=is_idle,
            is_out=is_out,
        )
        for station in found.stations:
            station.is_ordered = True
        return Order(
            agreed.taking_part,
            here,
            agreed.losses,
            ranks,
            self._communicating,
            agreed.read,
            agreed.passes_on,
            is_guarded=agreed.is_float16 and agreed.keeps_state,
            gradients_differ=agreed.gradients_differ,
        )

    def _form(self, found: Found, balancer: Balancer) -> str:
        """What the processes' steps must have in common, in words."""
        again = any(station.is_ordered for station in found.stations)
        words = [f"tasks {self.tasks}", f"losses of a forward that {'was' if again else 'was not'} scalarized before"]
        if self.peers.is_sharded:
            tasks = sorted({self.tasks[task] for connection in found.connections for task in connection.tasks})
            words.append(f"{len(found.connections)} forwards, through the heads of {tasks}")
        if balancer.sees_gradients:
            words.append(f"representations in {[fork.dtypes() for fork in found.forks]}")
            words.append(f"gradients on the representations of {len(found.forks)} forwards")
            words.append(f"state of the balancer in the shapes {[list(buffer.shape) for buffer in balancer.buffers()]}")
            if found.is_joint and found.forks[0].exact is None:
                words.append(
                    f"representations of the shapes {[list(s) for s in found.forks[0].feature_shapes()]} a sample"
                )
        return "; ".join(words)

    def _total(
        self, chosen: list[Tensor], found: Found, order: Order, balancer: Balancer, model: nn.Module | None
    ) -> Tensor:
        if not any(order.taking_part):  # a batch without a label: backward works and does nothing
            total = sum(found.tokens, torch.zeros((), device=self._device, requires_grad=True))
            # Heads that an auxiliary loss reads elsewhere run here too.
            return cast("Tensor", ScalarNode.apply(order, found.connections, total)) if any(order.running) else total
        vector = LossesNode.apply(order, len(found.tokens), *found.tokens, *chosen)
        if balancer.training and not transforming():
            balancer.constrain()
        order.safeguard = self._safeguard(found, order, balancer, model)
        with whole_parameters(balancer):
            total = balancer.scalarize(vector, _positions(order.taking_part))
        if order.safeguard is not None:
            order.safeguard.note_scalarized()
        if not isinstance(total, Tensor) or total.dim() != 0:
            shape = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise ValueError(f"{type(balancer).__name__}.scalarize: expected to return a 0-dim tensor, got {shape}.")
        return cast("Tensor", ScalarNode.apply(order, found.stations, total))

    def _safeguard(self, found: Found, order: Order, balancer: Balancer, model: nn.Module | None) -> Safeguard | None:
        """What takes back a step whose gradients overflow, where a GradScaler may skip it: in float16.

        None if the processes would have to tell each other in a backward pass that none of them needs to make.
        """
        waits = order.ranks is None or self.peers.waits_now or (balancer.sees_gradients and bool(found.forks))
        if not order.is_guarded or (order.gradients_differ and not waits):
            return None
        keepers: list[Balancer | Schedule] = [balancer] if found.forks else []
        keepers += {fork.exact.schedule for fork in found.forks if fork.exact and fork.exact.schedule}
        return Safeguard(
            model,
            balancer.undo_scalarize(),
            [keeper.undo_weigh for keeper in keepers],
            self._watched,
            order.ranks if order.gradients_differ else None,
            self._device,
        )

    def _read_by(
        self, auxiliary: Tensor | None, forks: Sequence[ForkState], balancer: Balancer
    ) -> tuple[bool, list[bool]]:
        """Whether the auxiliary loss sends gradients to where someone looks at those of the tasks; what it reads.

        That is, for each task, whether it reads its prediction: known, and of use, with several processes only.
        """
        looks = balancer.sees_gradients or any(fork.scope is not None for fork in forks)
        if auxiliary is None or not auxiliary.requires_grad or not (looks or self.peers.ranks is not None):
            return False, [False] * len(self.tasks)
        reaches, read = self._origins.reads(auxiliary, forks)
        return looks and reaches, [task in read for task in range(len(self.tasks))]

    def _is_early(self, found: Found, balancer: Balancer, aside: Tensor | None) -> bool:
        """Whether the decision is made before the backward pass comes to the heads."""
        several = balancer.sees_gradients and found.forks and (found.is_joint or self.weigh_heads)
        if not several and aside is None:
            return False
        self.peers.check_runs_ahead()
        return True

    def _check_exact(self, forks: Sequence[ForkState]) -> None:
        """Refuse what cannot be run backward once per task; once, for the graphs of a training are all alike."""
        for fork in () if self._seen_exact else forks:
            if fork.exact is not None:
                check_whole(fork.exact.parameters, bool(self.peers.is_sharded))
                check_repeatable(fork.edges)
                self._seen_exact = True


def _constrain(model: Any, _: object) -> None:
    if model.balancer.training and torch.is_grad_enabled():
        model.balancer.constrain()


def _keeps_state(balancer: Balancer, forks: Sequence[ForkState]) -> bool:
    """Whether anything but parameters moves in this step, in the balancer or in the schedule of exact gradients."""
    if not balancer.training or transforming():
        return False
    return balancer.keeps_state or any(fork.exact is not None and fork.exact.schedule is not None for fork in forks)


def _communicates(head: nn.Module) -> bool:
    """Whether its backward pass exchanges gradients with other processes; torch's SyncBatchNorm and its imitations."""
    return any("SyncBatchNorm" in type(module).__name__ for module in head.modules())


def _positions(taking_part: Sequence[bool]) -> list[int] | None:
    """Which tasks take part; None for all, which need no selection."""
    return None if all(taking_part) else [task for task, present in enumerate(taking_part) if present]
