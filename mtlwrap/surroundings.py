"""What our code may be running inside of: torch.compile, a transform of torch.func, autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Neither is public. The first hides a function from the compiler as torch.compiler.disable does, but imports the
# compiler, which takes longer than torch itself, no sooner than it is needed. The second is None where none looks on.
_hidden = getattr(torch, "_disable_dynamo", torch.compiler.disable)
_frame_hooks = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_looking_on = getattr(_frame_hooks, "get_eval_frame_callback", lambda: True)


def opaque(function: _Function) -> _Function:
    """Run ``function`` as it is inside compiled code: traced, its Python state would be that of the first step.

    Where no compiler looks on, it is called without the detour, which takes longer than many of these functions.
    """
    hidden = _hidden(function)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Code that is being compiled never comes past the first condition. The second is a safeguard: for a frame that
        # the compiler gave up, while it looks at whatever is called from there.
        if torch.compiler.is_compiling() or _looking_on() is not None:
            return hidden(*args, **kwargs)
        return function(*args, **kwargs)

    return cast("_Function", run)


def transforming() -> bool:
    """Whether a transform of torch.func is running, under which nothing may be written in place."""
    return _interpreter() is not None


def autocasts_to_float16(device_type: str) -> bool:
    """Whether autocast is on, and makes float16 of what it can."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return False
    return torch.get_autocast_dtype(device_type) is torch.float16


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast must not take a decision down to half precision; some devices, such as meta, have no autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


# Not public either; without it nothing is being transformed, as far as is known.
_interpreter = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
