"""State that is kept over a training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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


def _widened(before: Tensor, after: Tensor | None) -> Tensor | None:
    """What became of a buffer, unless it became narrower than float32."""
    if after is None or torch.promote_types(after.dtype, torch.float32) == after.dtype:
        return after
    wide = torch.promote_types(before.dtype, torch.float32)
    return before.to(device=after.device, dtype=wide)
