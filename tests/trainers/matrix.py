"""The matrix of trainers and features, and the cells that are impossible, each with its reason and its proof."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator

from tests.common import DEVICE
from tests.trainers import plain, processes, with_accelerate, with_ignite, with_lightning, with_transformers
from tests.trainers.problem import BATCHES, FEATURES, Feature, Result


class Train(Protocol):
    """What a file of a trainer has; in one of several processes it is called in each."""

    def __call__(self, balancer: str, feature: Feature, batches: Sequence[int] = ...) -> Result: ...


TRAINERS: dict[str, Train] = {
    "plain loop": plain.train,
    "Lightning": with_lightning.train,
    "Accelerate": with_accelerate.train,
    "Hugging Face Trainer": with_transformers.train,
    "ignite": with_ignite.train,
}


def train(trainer: str, balancer: str, feature: Feature, batches: Sequence[int] = BATCHES) -> Result:
    """The result of a training, in as many processes as the feature says; they must agree.

    Raises:
        ValueError: the processes came to different results.
    """
    if feature.processes == 1:
        return TRAINERS[trainer](balancer, feature, batches)
    first, *others = processes.train(trainer, balancer, feature, batches)
    for other in others:
        same = first.state | {"task_weights": first.weights}, other.state | {"task_weights": other.weights}
        different = [name for name, value in same[0].items() if not _equal(value, same[1][name])]
        if different:
            raise ValueError(f"{trainer}: the processes differ in {', '.join(different)}.")
    return first


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the bit; weights are NaN in a step that overflows."""
    return torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


@dataclass(frozen=True)
class Refusal:
    """Why a cell is impossible.

    Attributes:
        reason: what the README says.
        device: the type of device on which it is so.
        holds: whether it is still so; asks the trainer itself.
    """

    reason: str
    device: str
    holds: Callable[[], bool]


def _accelerate_has_no_half_precision() -> bool:
    return _trains_in_float32(with_accelerate.make_accelerator(FEATURES["fp16 + scaler"]))


def _transformers_has_no_half_precision() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return _trains_in_float32(with_transformers.make_trainer("UW", FEATURES["fp16 + scaler"], folder).accelerator)


def _trains_in_float32(accelerator: Accelerator) -> bool:
    """Asked for float16, it says so, but makes no scaler and leaves autocast off."""
    return accelerator.mixed_precision == "fp16" and accelerator.scaler is None and not accelerator.native_amp


IMPOSSIBLE: dict[tuple[str, str], Refusal] = {
    ("Accelerate", "fp16 + scaler"): Refusal(
        'Accelerate has no fp16 on a CPU: with `mixed_precision="fp16"` it makes no scaler there and trains in fp32, '
        "without a word. On a GPU it has.",
        "cpu",
        _accelerate_has_no_half_precision,
    ),
    ("Hugging Face Trainer", "fp16 + scaler"): Refusal(
        "The `Trainer` leaves precision to Accelerate, so `fp16=True` trains in fp32 on a CPU. On a GPU it does not.",
        "cpu",
        _transformers_has_no_half_precision,
    ),
}


def is_possible(trainer: str, feature: str, device: str = DEVICE.type) -> bool:
    refusal = IMPOSSIBLE.get((trainer, feature))
    return refusal is None or refusal.device != device
