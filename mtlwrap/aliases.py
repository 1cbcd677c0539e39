"""Aliases of a representation: the same values, safe from each other's writes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mtlwrap.balancers.base import Balancer
from mtlwrap.structure import differentiable_tensors, replace_tensors
from mtlwrap.surroundings import transforming

# Neither is public: without the first an alias is a copy, without the second a subclass makes its copies itself.
_lazy_clone = getattr(torch, "_lazy_clone", None)
_without_subclass = getattr(torch._C, "DisableTorchFunctionSubclass", nullcontext)


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
    return with_aliases(representation, {})


def without_fork(representation: Any, balancer: Balancer, tasks: Sequence[int]) -> list[Any]:
    """What the heads of ``tasks`` get where nothing is balanced: every tensor aliased, gradients pass through."""
    tensors = differentiable_tensors(representation) if balancer.transforms else []
    own: list[dict[int, Tensor]] = [{} for _ in tasks]
    return list(each_its_own(representation, tensors[0] if tensors else None, own, balancer, tasks))


def each_its_own(
    representation: Any,
    first: Tensor | None,
    own: list[dict[int, Tensor]],
    balancer: Balancer,
    tasks: Sequence[int],
    shared: Mapping[int, Tensor] = MappingProxyType({}),
) -> Iterator[Any]:
    """For each task the representation with its own aliases, the first tensor as the balancer transforms it.

    An alias is made as it is asked for. Made between two heads, it also comes between them in the backward pass: its
    gradient is added to the others as soon as it is there, instead of waiting until all are.

    Args:
        representation: what the backbone returned.
        first: the tensor in it that a balancer transforms.
        own: for each task its aliases that there are already, by the id of what they stand for.
        balancer: the balancer.
        tasks: the tasks.
        shared: what to alias instead of a tensor of the representation, by the tensor's id.
    """
    if balancer.transforms and first is not None:
        given = [known.get(id(first)) for known in own]
        changed = balancer.transform([alias(first) if a is None else a for a in given], tasks)
        for known, tensor in zip(own, changed, strict=True):
            known[id(first)] = tensor
    return (with_aliases(representation, known, shared) for known in own)


def with_aliases(
    representation: Any, known: Mapping[int, Tensor], shared: Mapping[int, Tensor] = MappingProxyType({})
) -> Any:
    """The representation with ``known`` tensors, by the id of those they stand for, and aliases of the others."""
    known = dict(known)

    def substitute(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = alias(shared.get(id(tensor), tensor))
        return known[id(tensor)]

    return replace_tensors(representation, substitute)
