"""Accelerate: ``prepare``, ``accumulate``, ``backward``."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs

from tests.common import DEVICE
from tests.trainers.problem import (
    BATCHES,
    Feature,
    Objective,
    Result,
    make_loader,
    make_model,
    make_optimizer,
    result_of,
)


def train(balancer: str, feature: Feature, batches: Sequence[int] = BATCHES) -> Result:
    accelerator = make_accelerator(feature)
    model = make_model(balancer)
    optimizer = make_optimizer(model)
    objective, optimizer, loader = accelerator.prepare(Objective(model), optimizer, make_loader(batches))
    for batch in loader:
        with accelerator.accumulate(objective):
            accelerator.backward(objective(*batch)["loss"])
            if feature.clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(objective.parameters(), feature.clip)
            optimizer.step()
            optimizer.zero_grad()
    return result_of(model, None if accelerator.scaler is None else accelerator.scaler.get_scale())


def make_accelerator(feature: Feature) -> Accelerator:
    precision = {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[feature.autocast]
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=feature.accumulate,
        cpu=DEVICE.type == "cpu",
        kwargs_handlers=[] if feature.init_scale is None else [GradScalerKwargs(init_scale=feature.init_scale)],
    )
