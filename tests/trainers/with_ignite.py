"""ignite: ``create_supervised_trainer`` with a loss function that scalarizes."""

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import create_supervised_trainer
from torch import Tensor

from tests.common import DEVICE
from tests.trainers.problem import (
    BATCHES,
    Feature,
    Result,
    losses_of,
    make_loader,
    make_model,
    make_optimizer,
    result_of,
)


def train(balancer: str, feature: Feature, batches: Sequence[int] = BATCHES) -> Result:
    model = make_model(balancer)
    optimizer = make_optimizer(model)
    if feature.clip is not None:
        # ignite has no option for it, but a scaler unscales before the optimizer's step, and so before this.
        optimizer.register_step_pre_hook(lambda *_: _clip(optimizer, feature.clip))
    scaler = None if feature.init_scale is None else torch.amp.GradScaler(DEVICE.type, feature.init_scale)

    def run(model: torch.nn.Module, x: Tensor) -> Any:
        # ignite's own autocast is one of CUDA and float16.
        with torch.autocast(DEVICE.type, feature.autocast, enabled=feature.autocast is not None):
            return model(x)

    trainer = create_supervised_trainer(
        model,
        optimizer,
        lambda predictions, labels: model.scalarize(losses_of(predictions, labels)),
        device=DEVICE,
        prepare_batch=_prepare,
        amp_mode=None if scaler is None else "amp",
        scaler=scaler or False,
        gradient_accumulation_steps=feature.accumulate,
        model_fn=run,
    )
    trainer.run(make_loader(batches))
    return result_of(model, None if scaler is None else scaler.get_scale())


def _prepare(batch: Sequence[Tensor], device: torch.device, non_blocking: bool) -> tuple[Tensor, list[Tensor]]:
    x, *labels = (column.to(device, non_blocking=non_blocking) for column in batch)
    return x, labels


def _clip(optimizer: torch.optim.Optimizer, norm: float) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm)
