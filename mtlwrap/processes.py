"""Several processes that train one model: who they are, and what they must agree on in a step.

The law: a training with W processes equals that of one process which minimises the mean over them of their losses, an
absent loss counting 0. The gradients of its losses on the representation are then those of the W processes, one after
the other, each divided by W: their inner products are sums over the processes, divided by W squared.

All must come to the same points: ``scalarize`` and its backward. Where one raises before, the others wait for it until
the time-out of the process group that they were given or found, and then raise too.
"""

import math
import struct
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtlwrap.state import is_sharded, sharding_groups

NOTHING_TO_TRAIN = (
    "None of the losses requires grad: there is nothing to train. Was the forward run under torch.no_grad, or were the "
    "predictions detached?"
)


class Agreement(NamedTuple):
    """What the processes have told each other about a step.

    Attributes:
        taking_part: for each task, whether it takes part in any process.
        read: for each task, whether an auxiliary loss reads its prediction in any process.
        passes_on: whether any process has to run its backbone backward by the ordinary pass.
        losses: the means of the losses that take part, a vector.
        is_float16: whether any process trains in float16.
        keeps_state: whether the balancer of every process keeps something in this step.
        gradients_differ: whether those on the parameters can differ between the processes after the backward pass.
    """

    taking_part: tuple[bool, ...]
    read: tuple[bool, ...]
    passes_on: bool
    losses: Tensor
    is_float16: bool
    keeps_state: bool
    gradients_differ: bool


class Ranks:
    """The processes that train together, in a group of their own: nothing else comes between its messages.

    Made by all of them at the same point of their programs. Whoever waits for one that never comes gives up after the
    time-out of the group that this one stands beside.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.size = dist.get_world_size(group)
        _level(group)
        members = dist.get_process_group_ranks(group)
        backend = str(dist.distributed_c10d.get_backend_config(group))
        self._group = _beside(group, members, backend)
        # Who takes part is told from host to host, so that no host waits for its accelerator.
        self._hosts = self._group if "cpu:" in backend else _beside(group, members, "gloo")

    def agree(
        self,
        present: Sequence[bool],
        losses: Tensor,
        form: str = "",
        *,
        read: Sequence[bool],
        passes_on: bool = False,
        is_float16: bool = False,
        keeps_state: bool = False,
        gradients_differ: bool = False,
        is_idle: bool = False,
        is_out: bool = False,
    ) -> Agreement:
        """Which tasks take part on any rank, and the mean of their losses over all ranks, an absent one counting 0.

        Args:
            present: for each task, whether it takes part here.
            losses: the losses of these, a vector, on the device and in the dtype that all ranks use.
            form: what must be the same on every rank, in words.
            read: for each task, whether an auxiliary loss reads its prediction here.
            passes_on: whether the backbone must be run backward here by the ordinary pass.
            is_float16: whether this process trains in float16.
            keeps_state: whether its balancer keeps something in this step.
            gradients_differ: whether those on the parameters are not averaged over all processes in the backward pass.
            is_idle: whether there are losses here, but none that can be trained.
            is_out: whether there is nothing here to run backward.

        Raises:
            ValueError: on every rank: the form is not that of the others, one of them refuses or is out, or all are
                idle.
        """
        remaining = iter(losses.detach().double().unbind())
        nothing = losses.new_zeros((), dtype=torch.float64)
        spread = torch.stack([next(remaining) if here else nothing for here in present])
        words = [passes_on, is_float16, keeps_state, gradients_differ, is_out, is_idle, False]
        flags = [*present, *read, *_bits(form), *words]
        counts, spread = self._told(flags, spread)
        *tasks, passing, half, keeping, differing, out, idle, refusing = (round(count) for count in counts)
        first, second = len(present), 2 * len(present)
        anywhere, reading, digits = tasks[:first], tasks[first:second], tasks[second:]
        if refusing:
            raise ValueError("Another process refuses its losses; its own error says why.")
        if any(0 < digit < self.size for digit in digits):
            raise ValueError(f"The processes do not make the same step. Expected the same in each as here: {form}.")
        if idle == self.size:
            raise ValueError(NOTHING_TO_TRAIN)
        if out and any(anywhere):
            raise ValueError(
                "A process has nothing to run backward, and the others would wait for it: it made no forward for this "
                "step, or its predictions hide their tensors and none of them has a loss. "
                + ("It is this one." if is_out else "It is another one.")
            )
        taking_part = [value for value, count in zip(spread.unbind(), anywhere, strict=True) if count]
        means = torch.stack(taking_part).to(losses.dtype) if taking_part else losses
        return Agreement(
            taking_part=tuple(map(bool, anywhere)),
            read=tuple(map(bool, reading)),
            passes_on=passing > 0,
            losses=means,
            is_float16=half > 0,
            keeps_state=keeping == self.size,
            gradients_differ=differing > 0,
        )

    def refuse(self, num_tasks: int, device: torch.device) -> None:
        """Tell the others, who call :meth:`agree`, that this process raises instead."""
        nothing = torch.zeros(num_tasks, dtype=torch.float64, device=device)
        self._told([*[False] * (2 * num_tasks), *_bits(""), *[False] * 6, True], nothing, refusing=True)

    def _told(self, flags: Sequence[bool], losses: Tensor, *, refusing: bool = False) -> tuple[list[float], Tensor]:
        """How many ranks say yes to each, and the mean of the losses."""
        said = torch.tensor(flags, dtype=torch.float64)
        if losses.device.type == "cpu":  # one message for both
            padded = torch.nn.functional.pad(losses, (0, len(said) - len(losses)))
            shares, padded = self.mean(torch.stack([said, padded])).unbind()
            return (shares * self.size).tolist(), padded[: len(losses)]
        dist.all_reduce(said, group=self._hosts)
        # Who hears of a refusal raises, and sends no more.
        return said.tolist(), losses if refusing or said[-1] else self.mean(losses)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks of tensors of the same shape and dtype."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        if total.dtype == torch.float16:  # a sum may be beyond its range
            dist.all_reduce(total.div_(self.size), group=self._group)
            return total
        dist.all_reduce(total, group=self._group)
        return total.div_(self.size)

    def any(self, flag: Tensor) -> Tensor:
        """Whether it is true on any rank: a bool of no dimension, on the device."""
        return self.mean(flag.float()) > 0

    def mean_parts(self, parts: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """The means of what is sorted by tensor, in each an entry for each task; what is missing on a rank counts 0.

        Args:
            parts: for each tensor and task a gradient in its shape, or None.
            like: the tensors.
        """
        means: list[list[Tensor | None]] = []
        for part, zero in zip(parts, like, strict=True):
            filled = [torch.zeros_like(zero) if gradient is None else gradient for gradient in part]
            means.append([*self.mean(torch.stack(filled)).unbind()])
        return means


def _bits(form: str) -> list[bool]:
    """A form's check sum, bit by bit: counted over the ranks, these tell whether it is the same on each."""
    return [bool(zlib.crc32(form.encode()) >> position & 1) for position in range(32)]


class Peers:
    """Finds the processes that train a model together, in its first forward under gradients.

    Args:
        process_group: "auto" for the group of the DistributedDataParallel or the device mesh that the model is in;
            a group; or None, where each process decides by itself.
    """

    def __init__(self, process_group: Any = "auto") -> None:
        is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group: expected a group that this process is in, got one of others.")
        if process_group not in ("auto", None) and not is_group:
            raise TypeError(f"process_group: expected 'auto', a ProcessGroup or None, got {process_group!r}.")
        self._setting = process_group
        self._ranks: Ranks | None = None
        self._met: Any = None  # the group that these stand beside
        self._world: Any = None  # and all processes at that time
        self._ddp_found: weakref.ref[Any] | None = None
        self._is_replicated = False
        # Whether DDP averages gradients in the backward pass of this forward.
        self._is_averaged = False
        # Whether each process holds a part of the parameters only; None before a forward.
        self.is_sharded: bool | None = None
        self._has_trained = False

    def __getstate__(self) -> dict[str, Any]:
        # Processes are no part of a copy or a pickle; it finds its own.
        return {"_setting": None if self._setting is None else "auto"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_setting"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Peers":
        return Peers(self._setting)

    @property
    def _ddp(self) -> Any:
        """The DistributedDataParallel around the model, or None."""
        return None if self._ddp_found is None else self._ddp_found()

    @property
    def ranks(self) -> Ranks | None:
        """The processes, once they have met; None after their group was destroyed, when this one goes on alone."""
        return self._ranks if self._ranks is not None and _world() is self._world else None

    @property
    def are_apart(self) -> bool:
        """Whether there are several processes that nobody said anything about."""
        return self._setting == "auto" and self.ranks is None and is_distributed() and dist.get_world_size() > 1

    def meet(self, model: nn.Module | None = None) -> None:
        """Called in each forward under gradients, which all processes make."""
        self._is_replicated = self._is_replicated or bool(getattr(model, "_is_replica", False))
        if not self.is_sharded and not self._has_trained:  # it may be sharded after a first forward
            self.is_sharded = model is not None and _is_sharded(model)
        if self._setting is None or not is_distributed():
            return
        ddp = _enclosing_ddp()
        is_new = ddp is not None and ddp is not self._ddp
        if is_new:
            self._ddp_found = weakref.ref(ddp)
        self._is_averaged = bool(getattr(ddp, "require_backward_grad_sync", False))  # not under no_sync
        if self.ranks is not None and not (is_new and self._setting == "auto"):
            return
        group = self._setting if self._setting != "auto" else _group_of(ddp, model)
        if group is not None and dist.get_world_size(group) > 1 and (self.ranks is None or group is not self._met):
            self._ranks, self._met, self._world = _ranks_beside(group), group, _world()

    def check(self) -> None:
        """Refuse a training in which the processes do not make the same steps.

        Raises:
            ValueError: the model is in a ``DataParallel``, or in ``join()`` of a ``DistributedDataParallel``.
        """
        self._has_trained = True
        if self._is_replicated:
            raise ValueError(
                "torch.nn.DataParallel copies the model in each step, and its copies cannot be balanced jointly. Use "
                "torch.nn.parallel.DistributedDataParallel, one process per device."
            )
        config = getattr(self._ddp, "_join_config", None)
        if self.ranks is not None and getattr(config, "enable", False):
            raise ValueError(
                "DistributedDataParallel.join() stands in for a process without batches, but cannot take its part in "
                "the balancing. Give every process as many batches (a DistributedSampler does), or hand over losses "
                "of None where one has none left."
            )

    def check_first_step(self, here: Sequence[bool]) -> None:
        """Refuse a first step without a loss where DDP would not notice that it is run backward.

        Raises:
            ValueError: the enclosing ``DistributedDataParallel`` learns its static graph in this step.
        """
        ddp = self._ddp
        learns = not getattr(ddp, "_static_graph_delay_allreduce_enqueued", True)
        if getattr(ddp, "static_graph", False) and learns and not any(here) and _enclosing_ddp() is None:
            raise ValueError(
                "DistributedDataParallel(static_graph=True) wants a loss in every process in the first step. Begin "
                "with a batch that has one, or leave static_graph out."
            )

    def check_several_forwards(self) -> None:
        """Refuse several forwards to one backward pass where the first of them would end it.

        Raises:
            ValueError: the enclosing ``DistributedDataParallel`` looks for unused parameters.
        """
        if getattr(self._ddp, "find_unused_parameters", False):
            raise ValueError(
                "DistributedDataParallel(find_unused_parameters=True) takes the heads that a forward does not run for "
                "unused in the whole backward pass, so tasks cannot have batches of their own. Leave it out: with "
                "several processes mtlwrap runs every head in each backward pass."
            )

    @property
    def is_one_forward(self) -> bool:
        """Whether only the last forward can be run backward, for DDP looks for unused parameters in each."""
        return bool(getattr(self._ddp, "find_unused_parameters", False))

    def gradients_differ(self, parameters: Iterable[Tensor]) -> bool:
        """Whether those of these parameters can differ between the processes after the backward pass.

        Those that are there already may, and whatever is averaged with them; so may what DDP was told to leave alone,
        and what a communication hook makes of it.
        """
        ddp = self._ddp
        if not self._is_averaged or ddp is None or ddp.parameters_to_ignore or getattr(ddp, "_comm_hooks", True):
            return True
        return any(parameter.grad is not None for parameter in parameters)

    @property
    def waits_now(self) -> bool:
        """Whether the backward pass of the last forward waits for that of the others, all the way."""
        return bool(self.is_sharded) or self._is_averaged

    @property
    def waits(self) -> bool:
        """Whether a backward pass waits for that of the others."""
        return bool(self.is_sharded) or isinstance(self._ddp, nn.parallel.DistributedDataParallel)

    @property
    def may_run_ahead(self) -> bool:
        """Whether a process may run a part of the graph backward by itself, before the backward pass."""
        return self._bars_running_ahead is None

    @property
    def _bars_running_ahead(self) -> str | None:
        if self.is_sharded:
            return "sharded parameters (fully_shard) do"
        if getattr(self._ddp, "static_graph", False):
            return "DistributedDataParallel(static_graph=True) does"
        return None

    def check_runs_ahead(self) -> None:
        """Refuse gradients ahead of the backward pass where the heads must not be run backward twice.

        Raises:
            ValueError: parameters are sharded, or DDP counts on a static graph.
        """
        what = self._bars_running_ahead
        if what is not None:
            raise ValueError(
                "Batches of their own per task with a gradient balancer, weigh_heads=True and an auxiliary loss that "
                f"reads predictions run the heads backward twice, which {what} not allow. Use a plain "
                "DistributedDataParallel, or a loss balancer."
            )


# One for all models that train in a group: each group has threads that never rest.
_ranks: "weakref.WeakKeyDictionary[Any, Ranks]" = weakref.WeakKeyDictionary()


def _ranks_beside(group: "dist.ProcessGroup") -> Ranks:
    known = _ranks.get(group)
    if known is None:
        known = _ranks[group] = Ranks(group)
    return known


@contextmanager
def drawing_alike(losses: Tensor | None) -> Iterator[None]:
    """With several processes, have torch draw the same random numbers in each, from a seed made of the losses.

    These are the means over the processes, the same in all of them, and others in the next step. The host reads them.
    What torch draws otherwise stays as it is; with one process nothing is done.
    """
    several = is_distributed() and dist.get_world_size() > 1
    values = losses.detach().flatten().tolist() if several and losses is not None else []
    if all(map(math.isnan, values)):  # nothing to make a seed of
        yield
        return
    seed = int.from_bytes(blake2b(struct.pack(f"{len(values)}d", *values), digest_size=8).digest(), "little")
    device = cast("Tensor", losses).device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


def is_distributed() -> bool:
    """Whether this is one of several processes; torch.distributed can be missing from a build."""
    return dist.is_available() and dist.is_initialized()


def _world() -> Any:
    return dist.group.WORLD if is_distributed() else None


def _enclosing_ddp() -> Any:
    """The DistributedDataParallel whose forward is running, if any."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def _group_of(ddp: Any, model: nn.Module | None) -> "dist.ProcessGroup | None":
    if ddp is not None:
        return ddp.process_group  # type: ignore[no-any-return]
    meshes = [] if model is None else _meshes(model)
    if not meshes:
        return None
    if len(set(meshes)) > 1 or meshes[0].ndim > 1:
        raise ValueError(
            "process_group='auto': the parameters lie on several device meshes, or on one of several dimensions: "
            f"{', '.join(map(str, dict.fromkeys(meshes)))}. Expected process_group=..., the group of the processes "
            "that have different batches."
        )
    return meshes[0].get_group()  # type: ignore[no-any-return]


def _is_sharded(model: nn.Module) -> bool:
    """Whether it has parameters that are sharded, or whole for the moment only."""
    shards = any(map(is_sharded, model.parameters()))
    return shards or any(hasattr(module, "_get_fsdp_state") for module in model.modules())


def _meshes(model: nn.Module) -> list[Any]:
    """The device meshes of sharded parameters, and of those that fully_shard has made whole by now."""
    found = [cast("Any", p).device_mesh for p in model.parameters() if is_sharded(p)]
    groups = [group for module in model.modules() for group in sharding_groups(module)]
    return [*found, *(group.mesh_info.mesh for group in groups)]


def _level(group: "dist.ProcessGroup") -> None:
    """Bring all members to the same number of groups, by groups of one.

    torch names a group that is made by its members alone after that number; under different names they would wait for
    each other in vain.
    """
    own = len(getattr(getattr(dist.distributed_c10d, "_world", None), "pg_names", ()))
    counts = [own] * dist.get_world_size(group)
    dist.all_gather_object(counts, own, group=group)
    for _ in range(own, max(counts)):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def _beside(group: "dist.ProcessGroup", members: list[int], backend: str) -> "dist.ProcessGroup":
    """Another group of the same processes, made by them alone."""
    made = dist.new_group(members, timeout=_timeout(group), backend=backend, use_local_synchronization=True)
    if not isinstance(made, dist.ProcessGroup):
        raise ValueError(f"process_group: expected a group that this process is in, got one of the ranks {members}.")
    return made


def _timeout(group: "dist.ProcessGroup") -> timedelta | None:
    """That of the group, where its backend tells; else torch's default."""
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None
