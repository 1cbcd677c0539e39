"""Connects all predictions of a forward, so that a backward pass of several processes runs the same on each."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mtlwrap.aliases import alias
from mtlwrap.structure import differentiable_tensors, replace_tensors
from mtlwrap.surroundings import opaque, transforming


class PredictionsNode(torch.autograd.Function):
    """Forward: the predictions, and a zero, the token. Backward: zeros for predictions without a gradient.

    Only in a pass that comes through the token. Then every head runs, whichever losses there are, so that whoever
    counts on each parameter's gradient (DDP), or gathers parameters as they are needed (FSDP), does so in every
    process. The parameters among the inputs are those that the total reaches by other ways than a prediction.
    """

    @staticmethod
    def forward(num_predictions: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        predictions = tensors[:num_predictions]
        return (*(alias(tensor) for tensor in predictions), predictions[0].new_zeros((), dtype=torch.float32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        num_predictions = inputs[0]
        ctx.num_parameters = len(inputs) - 1 - num_predictions
        ctx.forms = [(t.shape, t.dtype, t.device) for t in inputs[1 : 1 + num_predictions]]
        ctx.set_materialize_grads(False)

    @staticmethod
    @opaque
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        *arrived, token = gradients
        if token is not None:
            arrived = [_zeros(*form) if g is None else g for g, form in zip(arrived, ctx.forms, strict=True)]
        return (None, *arrived, *[None] * ctx.num_parameters)


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Of one number: a head is not to be charged for a gradient that is nothing.
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


@opaque
def connect(predictions: dict[Any, Any], parameters: list[nn.Parameter]) -> tuple[dict[Any, Any], Tensor | None]:
    """The predictions, connected, and the token through which to reach all of them; None if none has a gradient.

    What a head returns in a container of unknown type stays as it is.
    """
    tensors: dict[int, Tensor] = {}
    visible = {task: found for task, prediction in predictions.items() if (found := _found(prediction)) is not None}
    for found in visible.values():
        tensors.update((id(tensor), tensor) for tensor in found if tensor.requires_grad)
    if not tensors or transforming():
        return predictions, None
    *outputs, token = PredictionsNode.apply(len(tensors), *tensors.values(), *parameters)
    connected = dict(zip(tensors, outputs, strict=True))

    def substitute(tensor: Tensor) -> Tensor:
        return cast("Tensor", connected.get(id(tensor), tensor))

    return {
        task: replace_tensors(prediction, substitute) if task in visible else prediction
        for task, prediction in predictions.items()
    }, token


def _found(prediction: Any) -> list[Tensor] | None:
    try:
        return differentiable_tensors(prediction)
    except TypeError:  # a container that cannot be rebuilt
        return None
