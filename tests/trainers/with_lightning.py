"""Lightning: ``training_step`` returns the scalarized loss; the optimization is automatic."""

from collections.abc import Sequence

import lightning
import torch
from lightning.pytorch.plugins import MixedPrecision

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


class Module(lightning.LightningModule):
    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Sequence[torch.Tensor], index: int) -> torch.Tensor:
        x, *labels = batch
        return self.model.scalarize(losses_of(self.model(x), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model)


def train(balancer: str, feature: Feature, batches: Sequence[int] = BATCHES) -> Result:
    model = make_model(balancer)
    precision = _precision(feature)
    trainer = lightning.Trainer(
        accelerator=DEVICE.type,
        devices=feature.processes,
        strategy=_strategy(feature),
        use_distributed_sampler=False,
        max_epochs=1,
        accumulate_grad_batches=feature.accumulate,
        gradient_clip_val=feature.clip,
        plugins=[] if precision is None else [precision],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(model), make_loader(batches, feature.processes, own_rank(feature)))
    return result_of(model, None if feature.init_scale is None else precision.scaler.get_scale())


def _precision(feature: Feature) -> MixedPrecision | None:
    if feature.autocast is None:
        return None
    if feature.init_scale is None:
        return MixedPrecision("bf16-mixed", DEVICE.type)
    return MixedPrecision("16-mixed", DEVICE.type, torch.amp.GradScaler(DEVICE.type, feature.init_scale))


def _strategy(feature: Feature) -> str:
    if feature.processes == 1:
        return "auto"
    return "ddp_find_unused_parameters_true" if feature.unused else "ddp"
