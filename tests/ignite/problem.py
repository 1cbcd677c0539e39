"""Three tasks of tests.common with labels that are missing in every way, and the training loop written out by hand."""

from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

from mtlwrap import MultiTaskModel
from mtlwrap.ignite import create_multitask_trainer
from tests.common import BALANCERS, DEVICE, make_input, make_model

LOSSES = {"a": mse_loss, "b": cross_entropy, "c": l1_loss}


def make_batch(step: int, rows: int = 6) -> tuple[Tensor, dict[str, Tensor]]:
    """Regression with NaN, classes with both of the numbers that are none, and batches without any label of a task."""
    generator = torch.Generator().manual_seed(1000 + step)
    a = torch.randn(rows, 1, generator=generator)
    b = torch.randint(2, (rows,), generator=generator)
    c = 30 * torch.randn(rows, 3, generator=generator)
    a[torch.rand(rows, generator=generator) < 0.3] = torch.nan
    b[torch.rand(rows, generator=generator) < 0.2] = -1
    b[torch.rand(rows, generator=generator) < 0.2] = -100
    if step % 7 == 3:
        c[:] = torch.nan
    if step % 10 == 4:
        b[:] = -1
    if step % 25 == 20:
        a[:], b[:], c[:] = torch.nan, -100, torch.nan
    return make_input(step, rows, torch.float32), {"a": a.to(DEVICE), "b": b.to(DEVICE), "c": c.to(DEVICE)}


def make_training(name: str) -> tuple[MultiTaskModel, torch.optim.Optimizer]:
    model = make_model(BALANCERS[name](), torch.float32)
    return model, torch.optim.AdamW(model.param_groups(lr=0.01, balancer_lr=0.02, weight_decay=0.01))


def losses_by_hand(predictions: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor | None]:
    a, b, c = targets["a"], targets["b"], targets["c"]
    known_a, known_b, known_c = ~a[:, 0].isnan(), b >= 0, ~c.isnan().all(1)
    return {
        "a": mse_loss(predictions["a"][known_a], a[known_a]) if known_a.any() else None,
        "b": cross_entropy(predictions["b"][known_b], b[known_b]) if known_b.any() else None,
        "c": l1_loss(predictions["c"][known_c], c[known_c]) if known_c.any() else None,
    }


def trainer_on_steps(model: MultiTaskModel, optimizer: torch.optim.Optimizer, **options: Any) -> Engine:
    """A trainer whose batch follows from the number of the iteration: run it without data."""
    trainer = create_multitask_trainer(model, optimizer, LOSSES, **options)

    @trainer.on(Events.ITERATION_STARTED)
    def load(engine: Engine) -> None:
        engine.state.batch = make_batch(engine.state.iteration)

    return trainer
