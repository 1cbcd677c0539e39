"""Finding and replacing the tensors of a structured representation.

A backbone may return a tensor, a tuple, a dict, a dataclass, a Hugging Face ``ModelOutput``, or any nesting of
these. The fork needs two things of it: the floating-point tensors inside, and the same structure with other
tensors in their place.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import islice
from typing import Any

from torch import Tensor, nn

# Values of these types are passed on without a look inside.
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, range)
# How far an unknown object is searched for tensors that it hides: levels of attributes, items of a collection.
_SEARCH_DEPTH = 3
_SEARCH_ITEMS = 1000


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a tensor can carry a gradient at all: floating point or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def replace_tensors(representation: Any, substitute: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild ``representation`` with ``substitute(tensor)`` in the place of each floating-point or complex tensor.

    Every container is copied, never changed; integers, strings and other leaves are passed on as they are.

    Raises:
        TypeError: an object of unknown type holds floating-point tensors, which would escape the fork.
    """
    return _replace(representation, substitute, "representation")


def differentiable_tensors(representation: Any) -> list[Tensor]:
    """The floating-point and complex tensors of ``representation``, in order, each once however often it occurs."""
    found: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        found.setdefault(id(tensor), tensor)
        return tensor

    replace_tensors(representation, remember)
    return list(found.values())


def _replace(value: Any, substitute: Callable[[Tensor], Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        return substitute(value) if is_differentiable(value) else value
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return _replace_mapping(value, substitute, where)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replace(item, substitute, f"{where}[{i}]") for i, item in enumerate(value)))
    if isinstance(value, list | tuple):
        return _replace_sequence(value, substitute, where)
    if dataclasses.is_dataclass(value):
        return _replace_dataclass(value, substitute, where)
    if _hides_tensors(value, _SEARCH_DEPTH):
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which holds floating-point tensors "
            "in a way that mtlwrap cannot see through; expected a tensor, tuple, list, mapping or dataclass of "
            "tensors (any nesting). Return its tensors from the backbone and rebuild the object in the heads."
        )
    return value


def _replace_sequence(value: Any, substitute: Callable[[Tensor], Tensor], where: str) -> Any:
    items = [_replace(item, substitute, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is list or isinstance(value, tuple):
        return type(value)(items)
    rebuilt = copy.copy(value)
    _replace_attributes(rebuilt, substitute, where)
    rebuilt[:] = items
    return rebuilt


def _replace_attributes(rebuilt: Any, substitute: Callable[[Tensor], Tensor], where: str) -> None:
    """The tensors that a container holds as attributes too, beside its items or fields."""
    attributes = getattr(rebuilt, "__dict__", {})
    for name, item in list(attributes.items()):
        attributes[name] = _replace(item, substitute, f"{where}.{name}")


def _replace_mapping(value: Mapping[Any, Any], substitute: Callable[[Tensor], Tensor], where: str) -> Any:
    # A copy and assignments, not the constructor: defaultdict, OrderedDict, ModelOutput all disagree on theirs.
    items = {key: _replace(item, substitute, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) is dict:
        return items
    rebuilt = copy.copy(value)
    if not hasattr(rebuilt, "__setitem__"):
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, a mapping that cannot be assigned "
            "to; expected a dict or another mutable mapping."
        )
    originals = dict(value.items())
    # Attributes first: a mapping that keeps its items in a dict of its own would share that dict with its copy.
    _replace_attributes(rebuilt, substitute, where)
    for key, item in items.items():
        rebuilt[key] = item
    if any(value[key] is not original for key, original in originals.items()):
        for key, original in originals.items():
            value[key] = original  # type: ignore[index]
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, a mapping whose copies share their "
            "items with it; expected a dict, or a mapping that copy.copy copies."
        )
    return rebuilt


def _replace_dataclass(value: Any, substitute: Callable[[Tensor], Tensor], where: str) -> Any:
    # Not dataclasses.replace: it runs __init__ and __post_init__ again, and refuses fields with init=False.
    rebuilt = copy.copy(value)
    _replace_attributes(rebuilt, substitute, where)
    for field in dataclasses.fields(value):
        item = _replace(getattr(value, field.name), substitute, f"{where}.{field.name}")
        object.__setattr__(rebuilt, field.name, item)
    return rebuilt


def _hides_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, Tensor):
        return is_differentiable(value)
    if depth == 0 or isinstance(value, (*_PLAIN, nn.Module)) or inspect.isroutine(value):
        return False
    inside: list[Any] = list(vars(value).values()) if hasattr(value, "__dict__") else []
    inside += [getattr(value, name, None) for name in _slots(type(value))]
    if isinstance(value, Mapping):
        inside += islice(value.values(), _SEARCH_ITEMS)
    elif isinstance(value, Sequence | Set):  # not any iterable: looking into an iterator would use it up
        inside += islice(value, _SEARCH_ITEMS)
    return any(_hides_tensors(item, depth - 1) for item in inside)


def _slots(cls: type) -> list[str]:
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]
