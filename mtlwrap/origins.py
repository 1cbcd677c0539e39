"""Where losses come from: which forwards of a model are alive, and which of them a loss was computed from."""

import threading
import weakref
from collections.abc import Collection, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mtlwrap.connection import Connection
from mtlwrap.nodes import ForkState, Owner
from mtlwrap.processes import Peers
from mtlwrap.walk import Walk


class Connected(NamedTuple):
    """A forward whose predictions are connected: of which tasks, how, by what token, from which fork, if any."""

    tasks: frozenset[int]
    connection: Connection
    token: Tensor
    fork: "weakref.ref[ForkState] | None"

    @property
    def is_spent(self) -> bool:
        """Whether a backward pass has freed its graph."""
        fork = None if self.fork is None else self.fork()
        return self.connection.is_spent or (fork is not None and fork.spent)


class Found(NamedTuple):
    """What a total is to run backward: the forks, the connections of forwards, their tokens.

    Attributes:
        is_joint: whether tasks have forwards of their own.
        reads_several: whether that is known from the losses of this process.
    """

    forks: list[ForkState]
    connections: list[Connection]
    tokens: list[Tensor]
    is_joint: bool
    reads_several: bool = False

    @property
    def stations(self) -> list[ForkState | Connection]:
        """All that a backward pass comes by."""
        return [*self.forks, *self.connections]

    def taking_part(self, anywhere: Sequence[bool]) -> "Found":
        """Without the forwards of tasks that take part nowhere: they are run backward, but decide nothing."""
        forks = [fork for fork in self.forks if any(anywhere[task] for task in fork.tasks)]
        if len(forks) == len(self.forks):
            return self
        is_joint = self.reads_several or any(fork.tasks != forks[0].tasks for fork in forks)
        return self._replace(forks=forks, is_joint=is_joint)


class Origins:
    """The forwards of a model that are alive, and what is known of its tasks' losses.

    It holds no graph; but with several processes the last forwards of each set of tasks, until others take their place,
    for a backward pass may have to come by them without a loss.

    Args:
        owner: whose forwards they are.
        peers: the processes that train it.
    """

    def __init__(self, owner: Owner, peers: Peers) -> None:
        self._owner = weakref.ref(owner)
        self._tasks = owner.tasks
        self._peers = peers
        # The last forward under gradients: True if it forked, False if its representation needed no gradient.
        self._forked: bool | None = None
        self._alive: list[weakref.ref[ForkState]] = []
        self._prune_at = 32
        self._lock = threading.Lock()
        # Tasks whose loss was seen to read no head but its own.
        self._trusted: set[int] = set()
        # Tasks whose head was seen to detach the representation, next to others that do not.
        self._detached: set[int] = set()
        # Forwards whose predictions are connected, until others take their place.
        self._connected: list[Connected] = []

    def trusts(self, tasks: Collection[int]) -> bool:
        """Whether the loss of each of these tasks was seen to read no head but its own."""
        return self._trusted.issuperset(tasks)

    def note(self, state: ForkState | None) -> None:
        """A forward under gradients was made; with a fork, if its representation needs a gradient."""
        self._forked = state is not None
        if state is None:
            return
        with self._lock:
            self._alive.append(weakref.ref(state))
            if len(self._alive) > self._prune_at:  # forwards that are never scalarized
                self._alive = [reference for reference in self._alive if reference() is not None]
                self._prune_at = max(32, 2 * len(self._alive))

    def note_connection(self, tasks: Collection[int], connection: Connection, token: Tensor) -> None:
        """The predictions of the last forward were connected."""
        fork = self._alive[-1] if self._forked else None
        if (state := None if fork is None else fork()) is not None:
            state.connection = connection
        with self._lock:
            # A forward that another one has replaced is not kept: its graph is to be freed.
            known = [] if self._peers.is_one_forward else self._connected
            self._connected = [other for other in known if not other.tasks <= set(tasks)]
            self._connected.append(Connected(frozenset(tasks), connection, token, fork))

    def find(self, losses: Sequence[Tensor | None], here: tuple[bool, ...]) -> Found:
        """What to run backward for these losses.

        With several processes these are the forwards that losses came from, and the others that are connected: their
        losses are in other processes.
        """
        forks, reads_several = self._forks_of(losses, here) if any(here) else ([], False)
        if self._peers.ranks is None:
            return Found(forks, [], [], reads_several)
        forwards = self._forwards(forks)
        found = dict.fromkeys(forks)
        for forward in forwards:
            fork = None if forward.fork is None else forward.fork()
            found |= {} if fork is None else {fork: None}
        forks = sorted(found, key=lambda fork: fork.tasks)
        is_joint = reads_several or any(fork.tasks != forks[0].tasks for fork in forks)
        if is_joint:
            self._peers.check_several_forwards()
        # Of a forward that another one has replaced, the loss that led to its fork leads to its connection too.
        connections = [fork.connection for fork in forks if fork.connection is not None]
        connections = list(dict.fromkeys([*connections, *(forward.connection for forward in forwards)]))
        return Found(forks, connections, [forward.token for forward in forwards], is_joint, reads_several)

    def _forwards(self, forks: Sequence[ForkState]) -> list[Connected]:
        """The connected forwards that lead to these forks, and those of tasks that these are not of."""
        covered = {task for fork in forks for task in fork.tasks}
        with self._lock:
            self._connected = [forward for forward in self._connected if not forward.is_spent]
            known = list(self._connected)
        own = [forward for forward in known if forward.fork is not None and forward.fork() in forks]
        others = [forward for forward in known if covered.isdisjoint(forward.tasks)]
        waiting = [forward for forward in others if not forward.connection.is_ordered]
        # Without any, this is a second total of what was scalarized before.
        return [*own, *(waiting if own or waiting else others)]

    def _living(self) -> list[ForkState]:
        """The forks whose graph can still be run backward."""
        with self._lock:
            states = [state for reference in self._alive if (state := reference()) is not None]
            self._alive = [weakref.ref(state) for state in states]
        return [state for state in states if not state.spent and state.node is not None and state.node() is not None]

    def _forks_of(self, losses: Sequence[Tensor | None], taking_part: tuple[bool, ...]) -> tuple[list[ForkState], bool]:
        """The forks that these losses came from, and whether different tasks came from different ones.

        Usually a single fork is alive, and the first loss leads to it: then it is that one. Where several are alive,
        or a task comes for the first time, the graph is walked from every loss.
        """
        living = self._living()
        present = [task for task, present in enumerate(taking_part) if present]
        unknown = [task for task in present if task not in self._trusted]
        if len(living) == 1 and not unknown and self._walk(losses[present[0]], to_first=True).reached:
            return living, False
        walks = {task: self._walk(losses[task]) for task in present}
        forks, joint = self._common_forks(walks)
        for task in unknown:
            self._check_reads_own_head(task, losses[task], walks[task])
        self._trusted.update(unknown)
        return forks, joint

    def _common_forks(self, walks: "dict[int, Walk]") -> tuple[list[ForkState], bool]:
        for task, walk in walks.items():
            if walk.foreign and not walk.reached:
                raise ValueError(
                    f"The loss of task {self._tasks[task]!r} was computed from the representation of another model."
                )
        reached = {task: frozenset(walk.reached) for task, walk in walks.items() if walk.reached}
        if not reached:
            # A frozen backbone, or only heads that detach: nothing to balance, the losses still are.
            if self._forked is False or self._detached.issuperset(walks):
                return [], False
            raise ValueError(
                "No loss depends on a representation of this model: scalarize and backward need losses computed from "
                "the predictions of a forward with gradients enabled. "
                + (
                    "There was no such forward yet."
                    if self._forked is None
                    else "Were all predictions detached, or made by a single-task model?"
                )
                + " (A forward inside torch.no_grad, inference_mode or a reentrant checkpoint does not count, nor does "
                "that of a single-task model, model[task]: call the model itself.)"
            )
        self._detached.update(walks.keys() - reached.keys())
        together = {fork: None for forks in reached.values() for fork in forks}  # in order, unlike a set
        self._check_batches(reached, list(together))
        return list(together), len(set(reached.values())) > 1

    def _check_batches(self, reached: dict[int, frozenset[ForkState]], forks: Sequence[ForkState]) -> None:
        """Refuse losses of different forwards, unless each forward ran just the heads of its own tasks."""
        for task, own in reached.items():
            for other, theirs in reached.items():
                missed = [fork for fork in forks if fork in theirs and fork not in own and task in fork.tasks]
                if not missed:
                    continue
                first, second = sorted((task, other))
                raise ValueError(
                    f"The losses come from different forwards: that of task {self._tasks[first]!r} and that of task "
                    f"{self._tasks[second]!r} do not depend on the same one, though both ran the head of "
                    f"{self._tasks[task]!r}. For tasks with batches of their own say which heads a forward is for, "
                    "model(x, tasks=...); to compare two batches in a loss, concatenate them into one forward, or "
                    "detach one side."
                )

    def _check_reads_own_head(self, task: int, loss: Tensor | None, walk: "Walk") -> None:
        """Refuse a loss that has a gradient on the alias of another task.

        That it is connected to one says nothing yet (predictions that were stacked and unstacked again), so the
        gradient itself is asked for, through the heads alone, where the graph allows it.
        """
        others = walk.aliases_of_others(task)
        if not others or walk.opaque or loss is None or not self._peers.may_run_ahead:
            return
        edges = [edge for _, edge in others]
        gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        for (other, _), gradient in zip(others, gradients, strict=True):
            # NaN says nothing: 0 times NaN, from a loss next to this one, is NaN too.
            if gradient is not None and bool(gradient.nan_to_num(0.0).count_nonzero()):
                reads_own = task in walk.tasks()
                raise ValueError(
                    f"The loss of task {self._tasks[task]!r} reads the prediction of task {self._tasks[other]!r}: it "
                    "sends a gradient there. Expected each task's loss to depend on its own head only. "
                    + ("Detach the other prediction." if reads_own else f"Are the losses in order, {self._tasks}?")
                )

    def reads(self, loss: Tensor, forks: Collection[ForkState]) -> tuple[bool, set[int]]:
        """Whether a loss was computed from one of these forks, and from which tasks' connected predictions."""
        walk = self._walk(loss)
        return not walk.reached.keys().isdisjoint(forks), walk.predicted

    def _walk(self, loss: Tensor | None, *, to_first: bool = False) -> Walk:
        return Walk(loss, cast("Owner", self._owner()), to_first=to_first)
