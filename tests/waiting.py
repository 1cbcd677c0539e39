"""Counts where a step would make the host wait for the device: what reads a value, or copies between the two."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or the size of it, the host must know; and the checks of a solver's result.
_READING = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
    "repeat_interleave.Tensor",
    "_linalg_check_errors",
    "_linalg_eigh",
    "linalg_eig",
    "linalg_lstsq",
    "_linalg_svd",
)
# What Python calls that reads a value; and what makes a tensor of the host's numbers, to be copied to the device.
_METHODS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "is_nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__complex__",
    "__contains__",
    "__array__",
    "__repr__",
    "__format__",
)
_MAKERS = ("tensor", "as_tensor", "asarray", "from_numpy")


class _Calls:
    """Counts calls of Python. Not a ``TorchFunctionMode``: that is off in a backward pass."""

    def __init__(self, found: Counter[str]) -> None:
        self.found = found
        self.wrapped = [(Tensor, name, self.counting) for name in (*_METHODS, "new_tensor")]
        self.wrapped += [(torch, name, self.counting) for name in _MAKERS]
        self.wrapped += [(Tensor, name, self.counting_lists) for name in ("__getitem__", "__setitem__")]
        self.own: list[tuple[Any, str, bool, Any]] = []

    def __enter__(self) -> None:
        for where, name, wrapper in self.wrapped:
            function = getattr(where, name)
            self.own.append((where, name, name in vars(where), function))
            setattr(where, name, wrapper(name, function))

    def __exit__(self, *_: object) -> None:
        for where, name, is_own, function in self.own:
            setattr(where, name, function) if is_own else delattr(where, name)

    def counting(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.found[name] += 1
            return function(*args, **kwargs)

        return counted

    def counting_lists(self, name: str, function: Any) -> Any:
        def counted(tensor: Tensor, index: Any, *value: Any) -> Any:
            self.found.update([f"{name} with a list"] if _has_list(index) else [])
            return function(tensor, index, *value)

        return counted


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        if name.removesuffix(".default") in _READING or name.split(".")[0] in _READING:
            self.found[name.removesuffix(".default")] += 1
        if name.split(".")[0].startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in _indices(args)):
            self.found["index by a mask"] += 1
        if len({t.device for t in _copied(name, args, result)}) > 1:
            self.found["copy between devices"] += 1
        return result


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))


def _indices(args: Any) -> list[Tensor]:
    return [t for t in args[1] if isinstance(t, Tensor)] if len(args) > 1 and isinstance(args[1], list | tuple) else []


def _copied(name: str, args: Any, result: Any) -> list[Tensor]:
    """Where an operator copies from and to; it is another matter that a kernel may be handed a number by the host."""
    if name.split(".")[0] not in ("_to_copy", "copy_", "_copy_from"):
        return []
    return [t for t in (*args[:2], result) if isinstance(t, Tensor)]


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Inside it all of these are counted by name, also in a backward pass, if it is run by this thread.

    ``item`` is seen twice, as the method and as the operator ``_local_scalar_dense``; so is ``bool``.
    """
    found: Counter[str] = Counter()
    with _Operators(found), _Calls(found):
        yield found
