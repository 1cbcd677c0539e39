"""Connects all predictions of a forward, so that a backward pass of several processes runs the same on each."""

import weakref
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtlwrap.aliases import alias
from mtlwrap.passes import Pass, graph_task_id, keeps_graph, remember
from mtlwrap.structure import differentiable_tensors, replace_tensors
from mtlwrap.surroundings import opaque, transforming


class Connection:
    """One forward whose predictions are connected; a part of its graph.

    Attributes:
        tasks: the task of each prediction that has a gradient.
        is_ordered: whether a total was made of its losses.
        is_spent: whether a backward pass has freed its graph.
    """

    def __init__(self, tasks: tuple[int, ...]) -> None:
        self.tasks = tasks
        self.is_ordered = False
        self.is_spent = False
        self._passes: weakref.WeakValueDictionary[int, Pass] = weakref.WeakValueDictionary()

    def leave(self, running: Pass) -> None:
        """Called by the scalar node: in this backward pass the heads run that have a loss in any process."""
        remember(self._passes, running)

    def awaited(self) -> list[bool]:
        """For each prediction, whether its head is to run in this backward pass though no loss here asks for it."""
        running = self._passes.pop(graph_task_id(), None)
        if running is not None:
            running.come_by()
        return [running is not None and running.order.running[task] for task in self.tasks]


class PredictionsNode(torch.autograd.Function):
    """Forward: the predictions, and a zero, the token. Backward: zeros for predictions that have a loss elsewhere only.

    Then a head runs in every process if it does so in one, whichever losses there are, as it must where each waits for
    the others: to average a parameter's gradient (DDP), or to gather parameters that are sharded (FSDP). The token
    leads here where there is no loss at all. The parameters among the inputs are those that the total reaches by other
    ways than a prediction.
    """

    @staticmethod
    def forward(connection: Connection, *tensors: Tensor) -> tuple[Tensor, ...]:
        predictions = tensors[: len(connection.tasks)]
        return (*(alias(tensor) for tensor in predictions), tensors[0].new_zeros((), dtype=torch.float32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        connection, *tensors = inputs
        ctx.connection = connection
        ctx.num_parameters = len(tensors) - len(connection.tasks)
        ctx.forms = [(t.shape, t.dtype, t.device) for t in tensors[: len(connection.tasks)]]
        ctx.set_materialize_grads(False)

    @staticmethod
    @opaque
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.connection.is_spent = not keeps_graph()
        found = zip(gradients, ctx.connection.awaited(), ctx.forms, strict=False)  # behind them is the token's
        returned = [zeros_of(form) if g is None and awaited else g for g, awaited, form in found]
        return (None, *returned, *[None] * ctx.num_parameters)


def zeros_of(form: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    """Zeros of a shape, type and device, in the memory of one number: nobody is to be charged for nothing."""
    shape, dtype, device = form
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


@opaque
def connect(
    predictions: dict[int, Any], visible: dict[int, list[Tensor]], parameters: list[nn.Parameter]
) -> tuple[dict[int, Any], Connection | None, Tensor | None]:
    """The predictions, connected, their connection and its token; neither if none has a gradient.

    Args:
        predictions: what the heads returned.
        visible: the tensors in them; what a head returned in a container of unknown type stays as it is.
        parameters: what else the backward pass must come by in every process.
    """
    tensors: dict[int, tuple[Tensor, int]] = {}
    for task, found in visible.items():
        for tensor in found:
            if tensor.requires_grad:
                tensors.setdefault(id(tensor), (tensor, task))
    if not (tensors or parameters) or transforming():
        return predictions, None, None
    connection = Connection(tuple(task for _, task in tensors.values()))
    *outputs, token = PredictionsNode.apply(connection, *(tensor for tensor, _ in tensors.values()), *parameters)
    connected = dict(zip(tensors, outputs, strict=True))

    def substitute(tensor: Tensor) -> Tensor:
        return cast("Tensor", connected.get(id(tensor), tensor))

    rebuilt = {
        task: replace_tensors(prediction, substitute) if task in visible else prediction
        for task, prediction in predictions.items()
    }
    return rebuilt, connection, token


def visible_tensors(predictions: dict[int, Any]) -> dict[int, list[Tensor]]:
    """The floating-point tensors of each prediction, but for those in a container that cannot be rebuilt."""
    visible = {}
    for task, prediction in predictions.items():
        with suppress(TypeError):
            visible[task] = differentiable_tensors(prediction)
    return visible
