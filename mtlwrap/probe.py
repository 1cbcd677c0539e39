"""Gradients of a part of a graph, asked for before or in the middle of the one backward pass."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from mtlwrap.state import is_sharded


def pull_back(
    outputs: Sequence[Tensor | GradientEdge],
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor | GradientEdge],
) -> list[Tensor | None]:
    """The gradients on ``inputs`` for those on ``outputs``; nothing is accumulated, the graph is kept.

    Raises:
        RuntimeError: the graph cannot be run more than once.
    """
    given = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    if not given or not inputs:
        return [None] * len(inputs)
    found = torch.autograd.grad(
        cast("Sequence[Tensor]", [output for output, _ in given]),
        cast("Sequence[Tensor]", inputs),
        [gradient for _, gradient in given],
        retain_graph=True,
        allow_unused=True,
    )
    return list(found)


def pull_back_together(
    outputs: Sequence[GradientEdge], gradients: Sequence[Sequence[Tensor | None]], inputs: Sequence[Tensor]
) -> list[Tensor | None] | None:
    """The same for several gradients on each output, in one pass: those on each input, stacked.

    None if some of the gradients on an output are missing: a function that divides by the norm of its gradient would
    make of the zeros in their place what is not a number.

    Raises:
        ValueError: a part of the graph cannot be run for several gradients at once.
    """
    missing = [[gradient is None for gradient in several] for several in gradients]
    if any(any(several) and not all(several) for several in missing) or all(map(all, missing)):
        return None
    given = [(output, several) for output, several in zip(outputs, gradients, strict=True) if several[0] is not None]
    try:
        found = torch.autograd.grad(
            cast("Sequence[Tensor]", [output for output, _ in given]),
            inputs,
            [torch.stack(cast("list[Tensor]", list(several))) for _, several in given],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"vectorize=True: the backbone's backward cannot be run for all tasks at once. {error}"
        ) from error
    return list(found)


def wants_the_pass(edges: Sequence[GradientEdge], parameters: Sequence[Tensor]) -> bool:
    """Whether the graph behind ``edges`` must be run backward once more, though its parameters have their gradient.

    It ends at something else that wants a gradient, or someone looks on: a hook of a parameter or a module, or a
    function written in Python, which would be handed a gradient of nothing.
    """
    if any(parameter._backward_hooks for parameter in parameters):
        return True
    known = {id(parameter) for parameter in parameters}
    for node in nodes_behind(edges):
        leaf = getattr(node, "variable", None)
        if (leaf is not None and id(leaf) not in known) or hasattr(type(node), "_forward_cls"):
            return True
    return False


def check_repeatable(edges: Sequence[GradientEdge]) -> None:
    """Refuse a graph that can be run backward only once.

    Raises:
        ValueError: it holds a reentrant checkpoint, or a compiled part that gives its buffers away.
    """
    for node in nodes_behind(edges):
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                'gradients="parameters" runs the backbone backward once per task, which a reentrant checkpoint does '
                "not allow. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        if _gives_buffers_away(node):
            raise ValueError(
                'gradients="parameters" runs the backbone backward once per task, which a compiled backbone does not '
                "allow while it gives its buffers away. Set torch._functorch.config.donated_buffer = False before "
                "compiling, or do not compile the backbone."
            )


def check_whole(parameters: Sequence[Tensor], of_shards: bool) -> None:
    """Refuse parameters of which this process holds a part.

    Raises:
        ValueError: one is sharded.
    """
    if of_shards or any(map(is_sharded, parameters)):
        raise ValueError(
            'gradients="parameters" needs whole parameters; these are sharded over several processes (FSDP, tensor '
            'parallelism). Use gradients="representation".'
        )


def nodes_behind(edges: Sequence[GradientEdge]) -> list[Node]:
    """All nodes that a backward pass from ``edges`` visits."""
    stack = [edge.node for edge in edges]
    visited: dict[Node, None] = {}
    while stack:
        node = stack.pop()
        if node not in visited:
            visited[node] = None
            stack.extend(following for following, _ in node.next_functions if following is not None)
    return list(visited)


def _gives_buffers_away(node: Node) -> bool:
    """Whether a compiled part reuses what it saved for its backward, so that it can run but once."""
    metadata = getattr(getattr(type(node), "_forward_cls", None), "metadata", None)
    return bool(getattr(metadata, "bw_donated_idxs", None))
