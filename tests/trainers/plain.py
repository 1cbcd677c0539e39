"""The loop by hand, with torch's own means."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.common import DEVICE
from tests.trainers.problem import (
    BATCHES,
    Feature,
    Objective,
    Result,
    make_loader,
    make_model,
    make_optimizer,
    own_rank,
    result_of,
)


def train(balancer: str, feature: Feature, batches: Sequence[int] = BATCHES) -> Result:
    model = make_model(balancer)
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler(DEVICE.type, feature.init_scale or 1.0, enabled=feature.init_scale is not None)
    objective = Objective(model)
    if feature.processes > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        objective = DistributedDataParallel(objective, find_unused_parameters=feature.unused)
    for number, batch in enumerate(make_loader(batches, feature.processes, own_rank(feature)), start=1):
        last = number % feature.accumulate == 0
        with nullcontext() if last or feature.processes == 1 else objective.no_sync():
            with torch.autocast(DEVICE.type, feature.autocast, enabled=feature.autocast is not None):
                total = objective(*(column.to(DEVICE) for column in batch))["loss"]
            scaler.scale(total / feature.accumulate).backward()
        if not last:
            continue
        scaler.unscale_(optimizer)
        if feature.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), feature.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return result_of(model, scaler.get_scale() if scaler.is_enabled() else None)
