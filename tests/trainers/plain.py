"""The loop by hand, with torch's own means."""

from collections.abc import Sequence

import torch

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
    scaler = torch.amp.GradScaler(DEVICE.type, feature.init_scale or 1.0, enabled=feature.init_scale is not None)
    for number, batch in enumerate(make_loader(batches), start=1):
        x, *labels = (column.to(DEVICE) for column in batch)
        with torch.autocast(DEVICE.type, feature.autocast, enabled=feature.autocast is not None):
            total = model.scalarize(losses_of(model(x), labels))
        scaler.scale(total / feature.accumulate).backward()
        if number % feature.accumulate:
            continue
        scaler.unscale_(optimizer)
        if feature.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), feature.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return result_of(model, scaler.get_scale() if scaler.is_enabled() else None)
