"""A backward pass in float16 whose gradients overflow moves no state: a GradScaler skips its step."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from mtlwrap.probe import nodes_behind
from mtlwrap.processes import Ranks
from mtlwrap.state import Mark, Place, Undo, is_sharded, sharding_groups

# Has a function called when the running backward pass has ended; not public. Without it nobody knows when that is, and
# nothing is taken back.
_queue = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "queue_callback", None)
# How often to go to the end of the line of those who wait for that. DistributedDataParallel and fully_shard put
# gradients in their place in such calls, which ask for others: once more than was ever seen to be needed.
_TURNS = 3

# A gradient, by what it belongs to.
Gradients = dict[int, Tensor]


class Undos(list[Undo]):
    """What is to be undone after a backward pass, last things first. It goes with the pass, also where that fails."""


# By the number of the pass.
Watched = weakref.WeakValueDictionary[int, Undos]


class Safeguard:
    """Takes back what one step has changed in a balancer, if the backward pass makes a gradient that is not finite.

    A balancer lets losses and gradients alone that are not finite. Others are made after it has decided, in the
    backbone, or where it does not look, in a head: whether these are finite is known when the pass has ended, and to
    the device alone, for the host does not wait. Those of the model's own parameters count, that this very pass has
    spoiled: a gradient that nobody sets to zero would hold the state forever.

    Args:
        model: what has gradients; None for what the graph leads to.
        undo: puts back what ``scalarize`` has moved.
        to_undo: each asked, as the backward pass begins, for what puts back what that will move.
        watched: the backward passes that are being watched, shared by all that guard one balancer.
        ranks: the processes, where the gradients of each are its own.
        device: that of the model.
    """

    def __init__(
        self,
        model: nn.Module | None,
        undo: Undo | None,
        to_undo: Sequence[Callable[[], Undo | None]],
        watched: Watched,
        ranks: Ranks | None,
        device: torch.device,
    ) -> None:
        self._model = None if model is None else weakref.ref(model)  # a total that is kept holds no model
        self._undo = undo
        self._to_undo = to_undo
        self._watched = watched
        self._ranks = ranks
        self._device = device

    def note_scalarized(self) -> None:
        """Called once ``scalarize`` has moved what it moves."""
        if self._undo is not None:
            self._undo.settle()

    def watch(self, node: Node, task: int) -> None:
        """Called at the node where a backward pass comes in, with its number."""
        made = [make() for make in self._to_undo]
        undos = Undos(undo for undo in (*made, self._undo) if undo is not None and undo)
        self._undo = None  # another pass over the same losses is not what they moved the state for
        others = self._watched.get(task)
        if others is not None:  # several totals in one pass: the last one comes first
            others += undos
        elif (undos or self._ranks is not None) and _queue is not None:
            self._watched[task] = undos
            gradients = partial(of_leaves, leaves(node)) if self._model is None else partial(of_model, self._model)
            _at_the_end(partial(self._look, undos, gradients, _known(gradients())))

    def _look(self, undos: Undos, gradients: Callable[[], Gradients], known: dict[int, Tensor]) -> None:
        made = gradients()
        spoiled = _spoiled(made, known) if made else torch.zeros((), dtype=torch.bool, device=self._device)
        if self._ranks is not None:
            spoiled = self._ranks.any(spoiled)
        restored: dict[Place, Mark] = {}
        for undo in undos:
            undo.settle()  # what the pass has moved; nothing for what scalarize has, which was noted then
            undo(spoiled, restored)


def _at_the_end(function: Callable[[], None], turns: int = _TURNS) -> None:
    """Have a function called once the running backward pass has ended, and every gradient is in its place."""
    _queue(function if turns == 1 else partial(_at_the_end, function, turns - 1))  # type: ignore[misc]


def _known(gradients: Gradients) -> dict[int, Tensor]:
    """Which of the gradients are finite, as bools of no dimension."""
    return dict(zip(gradients, are_finite(list(gradients.values())).unbind(), strict=True)) if gradients else {}


@torch.no_grad()
def _spoiled(gradients: Gradients, known: dict[int, Tensor]) -> Tensor:
    """Whether any is not finite that was so, or was not there, before."""
    finite = are_finite(list(gradients.values()))
    if known:
        sound = torch.ones_like(finite[0])
        finite = finite | ~torch.stack([known.get(key, sound).to(finite.device) for key in gradients])
    return ~finite.all()


@torch.no_grad()
def are_finite(gradients: list[Tensor]) -> Tensor:
    """For each gradient, whether all of it is finite; on the device of the first that is not on the host."""
    norms = torch._foreach_norm(gradients, torch.inf)
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), norms[0].device)
    return torch.stack([norm.to(device) for norm in norms]).isfinite()


def of_model(model: "weakref.ref[nn.Module]") -> Gradients:
    """The gradients of a model's parameters, as far as this process has them."""
    found: Gradients = {}
    whole = model()
    for module in () if whole is None else whole.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                _note(found, id(parameter), parameter.grad)
        for sharded in _sharded_by(module):
            # Of the two the module has the one or the other; and whole gradients may be accumulated, which it has not.
            for parameter in (sharded.sharded_param, getattr(sharded, "_unsharded_param", None)):
                if parameter is not None:
                    _note(found, id(parameter), parameter.grad)
            _note(found, id(sharded), getattr(sharded, "unsharded_accumulated_grad", None))
    return found


def has_float16(model: nn.Module) -> bool:
    """Whether a part of a model computes in float16 by itself, be it for ``fully_shard``."""
    sharded = (part for module in model.modules() for part in _sharded_by(module))
    return any(parameter.dtype is torch.float16 for parameter in model.parameters()) or any(
        getattr(part, "param_dtype", None) is torch.float16 for part in sharded
    )


def of_leaves(tensors: Iterable[Tensor]) -> Gradients:
    """The gradients of these tensors."""
    found: Gradients = {}
    for tensor in tensors:
        _note(found, id(tensor), tensor.grad)
    return found


def leaves(node: Node) -> list[Tensor]:
    """The tensors whose gradients a backward pass from this node adds to."""
    found = (getattr(behind, "variable", None) for behind in nodes_behind([GradientEdge(node, 0)]))
    return [leaf for leaf in found if isinstance(leaf, Tensor)]  # a function of the user's may call anything so


def _sharded_by(module: nn.Module) -> list[Any]:
    """What ``fully_shard`` keeps of each parameter that it was called for on this module."""
    return [sharded for group in sharding_groups(module) for sharded in group.fsdp_params]


def _note(found: Gradients, key: int, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if is_sharded(gradient):
        gradient = gradient.to_local()  # type: ignore[attr-defined]
    if gradient.layout != torch.strided:
        gradient = gradient._values() if gradient.layout == torch.sparse_coo else gradient.values()
    if gradient.numel():
        found[key] = gradient
