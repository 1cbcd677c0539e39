"""State that is kept over a training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# Where a buffer is: its module and its name. What is there: which tensor, how often written to.
Place = tuple[nn.Module, str]
Mark = tuple[Tensor | None, int]


class Undo:
    """Made before a state moves, it puts back what was there, on the word of a device."""

    def settle(self) -> None:
        """Called once the state has moved. Neutral: nothing."""

    def __call__(self, spoiled: Tensor, restored: dict[Place, Mark]) -> None:
        """Put back what was there.

        Args:
            spoiled: only if this is true; a bool of no dimension, on any device.
            restored: what was put back, by those that were made after this one, as what it is now as good as: of two
                totals in one pass the second has kept what the first one left, which then tells that it may go on.
        """
        raise NotImplementedError


class Kept(Undo):
    """What the buffers of a module hold; none that nobody has written to, or that others have since, is touched.

    Args:
        module: whose buffers, and those of its parts.
        without: parts that do not count.
    """

    def __init__(self, module: nn.Module, *without: nn.Module | None) -> None:
        left_out = {part for whole in without if whole is not None for part in whole.modules()}
        owners = [part for part in module.modules() if part._buffers and part not in left_out]
        self._kept = [
            ((owner, name), (buffer, buffer._version), buffer.clone())
            for owner in owners
            for name, buffer in owner._buffers.items()
            if buffer is not None and buffer.numel() and buffer.layout is torch.strided and not buffer.is_inference()
        ]
        # What has moved: where, what was there, what is there now, and the numbers that were there.
        self._moved: list[tuple[Place, Mark, Mark, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._kept or self._moved)

    def settle(self) -> None:
        """Note what has been written to, or replaced, by a tensor of the same form."""
        for place, was, before in self._kept:
            now = _mark(place)
            if not _same(now, was) and now[0] is not None and now[0].shape == before.shape:
                self._moved.append((place, was, now, before))
        self._kept = []

    @torch.no_grad()
    def __call__(self, spoiled: Tensor, restored: dict[Place, Mark]) -> None:
        """See :meth:`Undo.__call__`."""
        for place, was, moved, before in self._moved:
            if not _same(restored.get(place, _mark(place)), moved):
                continue
            owner, name = place
            buffer = cast("Tensor", owner._buffers[name])
            spoiled, before = spoiled.to(buffer.device), before.to(buffer)
            if was[0] is moved[0]:
                # In place, and so again: a CUDA graph reads and writes where it did. Past autograd, for nothing has
                # changed if nothing is put back.
                torch.where(spoiled, before, buffer, out=buffer.data)
            else:
                owner._buffers[name] = torch.where(spoiled, before, buffer)
            restored[place] = was


def _mark(place: Place) -> Mark:
    buffer = place[0]._buffers.get(place[1])
    return buffer, 0 if buffer is None else buffer._version


def _same(one: Mark, other: Mark) -> bool:
    return one[0] is other[0] and one[1] == other[1]


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


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only, as with ``fully_shard``."""
    return hasattr(tensor, "device_mesh")


def sharding_groups(module: nn.Module) -> list[Any]:
    """The groups of parameters that ``fully_shard`` was called for on this very module; not public."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    return list(getattr(state, "_fsdp_param_groups", ()))


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
