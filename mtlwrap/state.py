"""State that is kept over a training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# Puts a state back to what it was where it is told to, by a bool of no dimension on any device.
Undo = Callable[[Tensor], None]


class WideBuffers(nn.Module):
    """A module whose buffers stay in float32 when it is made ``half()``: what sums up over a training needs that."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {module: dict(module._buffers) for module in self.modules()}
        super()._apply(fn, recurse)
        for module, buffers in before.items():
            for name, buffer in buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = _widened(buffer, module._buffers[name])
        return self


def putting_back(buffers: Iterable[Tensor]) -> Undo | None:
    """What puts these buffers back to what they are now; None if there is nothing in them."""
    kept = [(buffer, buffer.clone()) for buffer in buffers if buffer.numel()]

    @torch.no_grad()
    def put_back(spoiled: Tensor) -> None:
        for buffer, before in kept:
            torch.where(spoiled.to(buffer.device), before, buffer, out=buffer)

    return put_back if kept else None


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only, as with ``fully_shard``."""
    return hasattr(tensor, "device_mesh")


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Parameters that are sharded over several processes are whole, plain tensors here; all processes come by.

    ``fully_shard`` makes them so for the forward of the module that it was called on, not for what is computed of them
    after it. The gradients that arrive here are the same in all processes, so each keeps its shard of them.
    """
    sharded = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    for owner, name, parameter in sharded:
        owner._parameters[name] = cast("Any", parameter).full_tensor()
    try:
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter


def beside(tensor: Tensor, parameter: Any) -> Tensor:
    """A tensor that all processes have alike, sharded as the parameter is, if it is; then in its type."""
    tensor = tensor.to(parameter.dtype)
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate  # not every build of torch has it

    replicated = DTensor.from_local(tensor, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim)
    return replicated.redistribute(placements=parameter.placements)


def _widened(before: Tensor, after: Tensor | None) -> Tensor | None:
    """What became of a buffer, unless it became narrower than float32."""
    if after is None or torch.promote_types(after.dtype, torch.float32) == after.dtype:
        return after
    wide = torch.promote_types(before.dtype, torch.float32)
    return before.to(device=after.device, dtype=wide)
