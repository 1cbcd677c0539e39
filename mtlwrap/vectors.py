"""What is done with gradients one tensor at a time: dense, in a wide type, summed with weights."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(part: Sequence[Tensor | None], dtype: torch.dtype, weights: Tensor) -> Tensor:
    """The weighted sum of gradients of this type on one tensor, last task first: the order in which autograd adds."""
    # Half-precision gradients are summed in float32, where a weight beyond half's range is still a number.
    wide = torch.promote_types(dtype, torch.float32)
    columns = weights.to(_real(wide)).unbind()
    total: Tensor | None = None
    for gradient, weight in zip(reversed(part), reversed(columns), strict=True):
        if gradient is None:
            continue
        if total is None:
            total = gradient.to(wide) * weight
        else:
            total.addcmul_(gradient.to(wide), weight)
    return weights.new_zeros(0, dtype=wide) if total is None else total


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def widest(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in float32 on a device that has no float64."""
    return tensor.to(widest_dtype(tensor.device))


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float64 if has_float64(device) else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether a device has float64."""
    return device.type != "mps"


def plain(gradient: Tensor | None) -> Tensor | None:
    """Dense, and with its conjugation carried out, so that it can be read as it lies in memory."""
    if gradient is None:
        return None
    return (gradient if gradient.layout == torch.strided else gradient.to_dense()).resolve_conj()


def completed(
    part: Sequence[Tensor | None],
    taking_part: Sequence[bool],
    shape: Sequence[int],
    like: tuple[torch.dtype, torch.device],
) -> list[Tensor | None]:
    """The tasks' gradients on one tensor; if there is none, with zeros for a task, so that the length is known."""
    filled = list(part)
    if not any(present and gradient is not None for gradient, present in zip(part, taking_part, strict=True)):
        dtype, device = like
        filled[list(taking_part).index(True)] = torch.zeros((), dtype=dtype, device=device).expand(*shape)
    return filled


def plain_sum(part: Sequence[Tensor | None]) -> Tensor | None:
    """What autograd itself would have added up, in the order in which it does: the last task first."""
    total: Tensor | None = None
    for gradient in reversed(part):
        if gradient is not None:
            total = gradient if total is None else total + gradient
    return total


def summed_over_batches(batches: Sequence[Sequence[Sequence[Tensor | None]]]) -> list[list[Tensor | None]]:
    """The tasks' gradients of several batches, by tensor and task, summed over each: those on an offset of it."""
    return [
        [plain_sum([_batch_sum(gradient) for gradient in of_task]) for of_task in zip(*of_tensor, strict=True)]
        for of_tensor in zip(*batches, strict=True)
    ]


def _batch_sum(gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or gradient.dim() == 0 else gradient.sum(0, keepdim=True)
