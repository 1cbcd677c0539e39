"""A backward pass that makes gradients which are not finite moves no state: a trainer skips its step."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from mtlwrap.processes import Ranks
from mtlwrap.state import Undo, is_sharded

# Has a function called when the running backward pass has ended; not public. Without it nobody knows when that is, and
# nothing is taken back.
_queue = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "queue_callback", None)


class Safeguard:
    """Takes back what a step changed in a balancer, where any gradient is not finite after its backward pass.

    A balancer looks at losses and at gradients on what is shared, and lets those alone that are not finite. Others are
    made after it has decided, in the backbone, or where it does not look, in a head. Whether they are finite is known
    when the pass has ended, and to the device alone: the host does not wait for it.

    Only gradients that this pass has spoiled count: one that nobody sets to zero would hold the state forever.

    Args:
        model: what has gradients; None for what the graph leads to.
        undo: puts back what ``scalarize`` has moved.
        before_backward: asked as the backward pass begins for what puts back what it will move.
        ranks: the processes, where the gradients of each are its own.
    """

    def __init__(
        self,
        model: nn.Module | None,
        undo: Undo | None,
        before_backward: Sequence[Callable[[], Undo | None]],
        ranks: Ranks | None,
    ) -> None:
        self._model = model
        self._undo = undo
        self._before_backward = before_backward
        self._ranks = ranks

    def watch(self, node: Node) -> None:
        """Called at the node where the backward pass begins."""
        undos = [undo for undo in (*(before() for before in self._before_backward), self._undo) if undo is not None]
        self._undo = None  # another pass over the same losses is not what they moved the state for
        if undos and _queue is not None:
            parameters = leaves(node) if self._model is None else parameters_of(self._model)
            _at_the_end(partial(self._look, undos, parameters, are_finite(parameters)))

    def _look(self, undos: Sequence[Undo], parameters: list[Tensor], before: Tensor | None) -> None:
        if self._model is not None and self._ranks is not None:  # those that fully_shard has put in place since
            parameters = parameters_of(self._model)
        after = are_finite(parameters)
        if after is None:  # none were asked for
            after = torch.ones((), dtype=torch.bool, device=next((p.device for p in parameters), None))
        spoiled = ~after if before is None else before.to(after.device) & ~after
        if self._ranks is not None:
            spoiled = self._ranks.any(spoiled)
        for undo in undos:
            undo(spoiled)


def _at_the_end(function: Callable[[], None], turns: int = 3) -> None:
    """Have a function called once the running backward pass has ended, and every gradient is in its place.

    DistributedDataParallel and fully_shard put them there in calls like this one, which may ask for another: it goes to
    the end of the line once more than was ever seen to be needed.
    """
    _queue(function if turns == 1 else partial(_at_the_end, function, turns - 1))  # type: ignore[misc]


@torch.no_grad()
def are_finite(parameters: Iterable[Tensor]) -> Tensor | None:
    """Whether all gradients of these parameters are finite, of no dimension; None where there are none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [g if type(g) is Tensor and g.layout is torch.strided else _values(g) for g in gradients]
    if not gradients:
        return None
    elsewhere = [gradient for gradient in gradients if gradient.device.type != "cpu"]
    if elsewhere:  # all in a few launches
        on_host = [gradient for gradient in gradients if gradient.device.type == "cpu"]
        filled = [gradient for gradient in elsewhere + on_host if gradient.numel()]
        return torch.nn.utils.get_total_norm(filled, torch.inf).isfinite()
    dtype = torch.float32
    for kind in {gradient.dtype for gradient in gradients}:
        dtype = torch.promote_types(dtype, kind)
    # On a CPU a sum takes a tenth of the time of a largest value.
    return torch.stack([gradient.sum(dtype=dtype) for gradient in gradients]).isfinite().all()


def parameters_of(model: nn.Module) -> list[Tensor]:
    """All parameters of a model, a shared one perhaps twice: as ``model.parameters()``, in a third of its time."""
    found: list[Tensor] = []
    visited: set[nn.Module] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None and module not in visited:
            visited.add(module)
            found += [parameter for parameter in module._parameters.values() if parameter is not None]
            stack += module._modules.values()
    return found


def leaves(node: Node) -> list[Tensor]:
    """The tensors whose gradients a backward pass from this node adds to."""
    found: list[Tensor] = []
    visited: set[Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.append(leaf)
        following = {behind for behind, _ in node.next_functions if behind is not None} - visited
        visited |= following
        stack.extend(following)
    return found


def _values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient that this process has."""
    if is_sharded(gradient):
        gradient = gradient.to_local()  # type: ignore[attr-defined]
    return gradient._values() if gradient.layout == torch.sparse_coo else gradient
