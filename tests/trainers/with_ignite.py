"""ignite: ``create_supervised_trainer`` with a loss function that scalarizes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import create_supervised_trainer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mtlwrap import MultiTaskModel
from tests.common import DEVICE
from tests.trainers.problem import (
    BATCHES,
    Feature,
    Result,
    losses_of,
    make_loader,
    make_model,
    make_optimizer,
    own_rank,
    result_of,
)


def train(balancer: str, feature: Feature, batches: Sequence[int] = BATCHES) -> Result:
    model = make_model(balancer)
    optimizer = make_optimizer(model)
    if feature.clip is not None:
        # ignite has no option for it, but a scaler unscales before the optimizer's step, and so before this.
        optimizer.register_step_pre_hook(partial(_clip, model, feature.clip))
    scaler = None if feature.init_scale is None else torch.amp.GradScaler(DEVICE.type, feature.init_scale)
    options = {
        "device": DEVICE,
        "amp_mode": None if scaler is None else "amp",
        "scaler": scaler or False,
        "gradient_accumulation_steps": feature.accumulate,
    }
    if feature.processes > 1 and not torch.distributed.is_initialized():
        idist.initialize("gloo")
    trainer = create_supervised_trainer(
        idist.auto_model(model, find_unused_parameters=feature.unused) if feature.processes > 1 else model,
        optimizer,
        lambda predictions, labels: model.scalarize(losses_of(predictions, labels)),
        prepare_batch=_split,
        model_fn=partial(_run, feature.autocast),
        **options,
    )
    trainer.run(make_loader(batches, feature.processes, own_rank(feature)))
    return result_of(model, None if scaler is None else scaler.get_scale())


def _clip(model: MultiTaskModel, norm: float, *_: Any) -> None:
    clip_grad_norm_(model.parameters(), norm)


def _run(autocast: torch.dtype | None, model: torch.nn.Module, x: Tensor) -> Any:
    """The forward under autocast; ignite's own is one of CUDA and float16."""
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        return model(x)


def _split(batch: Sequence[Tensor], device: torch.device, non_blocking: bool) -> tuple[Tensor, list[Tensor]]:
    x, *labels = (column.to(device, non_blocking=non_blocking) for column in batch)
    return x, labels
