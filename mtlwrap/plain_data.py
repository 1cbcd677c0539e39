"""Values of any kind as plain data that ``torch.load(weights_only=True)`` reads, and back; copies, comparisons."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_array(value: Any) -> bool:
    """Whether it is an array of numpy, which need not be installed."""
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same with ``fn`` applied to the tensors in it; containers and arrays are copied, all else is shared."""
    if isinstance(value, Tensor):
        return fn(value)
    if type(value) in (list, tuple):
        return type(value)(mapped(entry, fn) for entry in value)
    if type(value) is dict:
        return {key: mapped(entry, fn) for key, entry in value.items()}
    return value.copy() if is_array(value) else value


def same(one: Any, other: Any) -> bool:
    """Whether nothing but the device or the precision of tensors has changed."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.is_meta or other.is_meta or one.shape != other.shape:
            return one.shape == other.shape
        mine, others = one.detach().cpu(), other.detach().cpu()
        return torch.equal(mine, others.to(mine.dtype)) or torch.equal(mine.to(others.dtype), others)
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if is_array(one):
        return one.shape == other.shape and bool((one == other).all())
    return isinstance(one, _PLAIN) and bool(one == other)


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_ARRAY, _OPTIMIZER = "numpy.ndarray", "torch.optim.Adam"


def encoded(value: Any) -> Any:
    """As data that ``torch.load(weights_only=True)`` reads.

    Raises:
        TypeError: it is none.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(encoded(entry) for entry in value)
    if type(value) is dict:
        return {key: encoded(entry) for key, entry in value.items()}
    if is_array(value):
        return {_ARRAY: torch.as_tensor(value.copy())}
    if type(value) is torch.optim.Adam:
        return {_OPTIMIZER: value.state_dict()}
    raise TypeError(f"{type(value).__name__} is no plain data.")


def decoded(value: Any, module: nn.Module) -> Any:
    """What was encoded; an optimizer in it is one of the module's own parameters."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(decoded(entry, module) for entry in value)
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {_ARRAY}:
        return value[_ARRAY].numpy().copy()
    if value.keys() == {_OPTIMIZER}:
        optimizer = torch.optim.Adam(module.parameters(recurse=False))
        optimizer.load_state_dict(value[_OPTIMIZER])
        return optimizer
    return {key: decoded(entry, module) for key, entry in value.items()}
