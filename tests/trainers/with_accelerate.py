"""Accelerate: ``prepare``, ``accumulate``, ``backward``."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs

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
    loader = make_loader(batches, feature.processes)
    objective, optimizer, loader = accelerator.prepare(Objective(model), optimizer, loader)
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
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if feature.unused else []
    if feature.init_scale is not None:
        handlers.append(GradScalerKwargs(init_scale=feature.init_scale))
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=feature.accumulate,
        cpu=DEVICE.type == "cpu",
        kwargs_handlers=handlers,
    )
