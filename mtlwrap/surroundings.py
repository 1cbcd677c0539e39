"""What our code may be running inside of: torch.compile, a transform of torch.func, autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def opaque(function: _Function) -> _Function:
    """Run ``function`` as it is inside compiled code: traced, its Python state would be that of the first step."""
    return cast("_Function", torch.compiler.disable(function))


def transforming() -> bool:
    """Whether a transform of torch.func is running, under which nothing may be written in place."""
    stack = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
    return stack() is not None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast must not take a decision down to half precision; some devices, such as meta, have no autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
