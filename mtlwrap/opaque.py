"""Keeping torch.compile out of functions whose state changes from step to step."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def opaque(function: _Function) -> _Function:
    """Run ``function`` as it is inside compiled code: traced, its Python state would be that of the first step."""
    return cast("_Function", torch.compiler.disable(function))
