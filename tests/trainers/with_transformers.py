"""The Hugging Face ``Trainer``: a model whose forward returns the scalarized loss."""

import tempfile
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

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


class InOrder(Trainer):
    """Takes the batches as they come; the ``Trainer`` would shuffle them."""

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(self.train_dataset)


def train(balancer: str, feature: Feature, batches: Sequence[int] = BATCHES) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(balancer, feature, folder, batches)
        if feature.init_scale is not None:  # the Trainer has no option for it
            trainer.accelerator.scaler = torch.amp.GradScaler(DEVICE.type, feature.init_scale)
        trainer.train()
    scaler = trainer.accelerator.scaler
    return result_of(trainer.model.model, None if scaler is None else scaler.get_scale())


def make_trainer(balancer: str, feature: Feature, folder: str, batches: Sequence[int] = BATCHES) -> Trainer:
    model = make_model(balancer)
    return InOrder(
        Objective(model),
        make_arguments(folder, feature),
        train_dataset=_named(make_loader(batches, feature.processes)),
        optimizers=(make_optimizer(model), None),
    )


def make_arguments(folder: str, feature: Feature) -> TrainingArguments:
    return TrainingArguments(
        folder,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        bf16=feature.autocast == torch.bfloat16,
        fp16=feature.autocast == torch.float16,
        gradient_accumulation_steps=feature.accumulate,
        max_grad_norm=feature.clip or 0.0,
        ddp_find_unused_parameters=None if feature.unused else False,  # True if nothing is said
        use_cpu=DEVICE.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _named(loader: DataLoader) -> DataLoader:
    """The same batches as dicts by the names of the forward's arguments."""
    names = ("x", "kind", "size", "age")
    rows = [dict(zip(names, row, strict=True)) for row in loader.dataset]
    return DataLoader(rows, batch_size=loader.batch_size)
