"""What trainer and evaluator have in common: models that are wrapped, batches, mixed precision."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from ignite.utils import convert_tensor
from torch import Tensor, nn

from mtlwrap.ignite.masking import Masking, Rows
from mtlwrap.model import MultiTaskModel


def unwrapped(model: nn.Module) -> MultiTaskModel:
    """The multi-task model itself, also inside ``DistributedDataParallel`` or ``torch.compile``.

    Raises:
        TypeError: there is none inside, or it is replicated by ``DataParallel``.
    """
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "model: expected a MultiTaskModel or one in DistributedDataParallel, got one in DataParallel, whose "
            "replicas cannot be balanced together."
        )
    inner: Any = model
    while isinstance(inner, nn.Module) and not isinstance(inner, MultiTaskModel):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if not isinstance(inner, MultiTaskModel):
        raise TypeError(
            f"model: expected a MultiTaskModel or one in DistributedDataParallel, got {type(model).__name__}."
        )
    return inner


def prepare_batch(
    batch: Sequence[Any], device: str | torch.device | None = None, non_blocking: bool = False
) -> tuple[Any, Any]:
    """The batch ``(x, targets)`` on the device; a target may be None.

    Raises:
        ValueError: the batch is no pair.
    """
    x, targets = pair(batch)
    return _moved(x, device, non_blocking), _moved(targets, device, non_blocking)


def pair(batch: Sequence[Any]) -> tuple[Any, Any]:
    """The two things in a batch.

    Raises:
        ValueError: it is no pair.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        what = f"{len(batch)} things" if isinstance(batch, list | tuple) else type(batch).__name__
        raise ValueError(f"batch: expected a pair (x, targets), got {what}; prepare_batch can make one of it.")
    return batch[0], batch[1]


def in_order(predictions: Any, model: MultiTaskModel) -> list[Any]:
    """The predictions in the tasks' order; None for a task that was not predicted."""
    return [predictions.get(task) for task in model.tasks] if model.heads.named else list(predictions)


def labelled_rows(masking: Masking, batch: Any, targets: Any, prepare: Any) -> tuple[list[Any], list[Rows]]:
    """Each task's target, and which of its rows have a label.

    Where the batch is only moved, the targets are looked at before: on the host looking costs no wait.
    """
    moved = masking.split(targets)
    seen = masking.split(pair(batch)[1]) if prepare is prepare_batch else moved
    return moved, masking.rows(seen)


def autocast(
    amp_mode: str | None, device: str | torch.device | None, model: MultiTaskModel
) -> AbstractContextManager[object]:
    """Mixed precision if it is asked for, for the type of the device; else what surrounds the training."""
    return torch.autocast(device_type(device, model)) if amp_mode == "amp" else nullcontext()


def device_type(device: str | torch.device | None, model: MultiTaskModel) -> str:
    """``"cuda"``, say: that of the batch, or of the model where the batch is left where it is."""
    if device is not None:
        return torch.device(device).type
    example = next(model.parameters(), None)
    return "cpu" if example is None else example.device.type


def check_amp_mode(amp_mode: str | None) -> None:
    """Refuse what is no mode.

    Raises:
        ValueError: it is none.
    """
    if amp_mode not in (None, "amp"):
        raise ValueError(f"amp_mode: expected None or 'amp' (torch.autocast), got {amp_mode!r}.")


def _moved(value: Any, device: str | torch.device | None, non_blocking: bool) -> Any:
    """With its tensors on the device; what holds none is left alone."""
    if device is None or value is None:
        return value
    if isinstance(value, Tensor):
        return convert_tensor(value, device, non_blocking)
    if type(value) is dict:
        return {key: _moved(item, device, non_blocking) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device, non_blocking) for item in value)
    return convert_tensor(value, device, non_blocking) if isinstance(value, Mapping | Sequence) else value
