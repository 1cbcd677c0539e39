"""The pattern to copy: tasks, network, the training step, and ignite's trainer and evaluator around them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar, Timer
from ignite.metrics import ROC_AUC, Metric
from ignite.metrics.regression.r2_score import R2Score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from example.data import Batch, Flights
from mtlwrap import Balancer, MultiTaskModel, cached
from mtlwrap.report import Recorder


@dataclass(frozen=True)
class Task:
    """What makes a task: its loss, its metric (higher is better), and the likelihood that UW assumes."""

    loss: Callable[[Tensor, Tensor], Tensor]
    metric: type[Metric]
    metric_name: str
    likelihood: Literal["classification", "regression"]


WIDTH = 64
TASKS: dict[str, Task] = {
    "cancelled": Task(binary_cross_entropy_with_logits, ROC_AUC, "AUC", "classification"),
    "dep_delay": Task(mse_loss, R2Score, "R²", "regression"),
    "arr_delay": Task(mse_loss, R2Score, "R²", "regression"),
    "air_time": Task(mse_loss, R2Score, "R²", "regression"),
}


@dataclass
class Trained:
    """What the training of one network came to.

    Attributes:
        model: the network.
        scores: the metric of each of its tasks, after every epoch.
        seconds: the time that every step took.
        weights: the tasks' weights in every step, ``[T]`` each, on the model's device.
    """

    model: MultiTaskModel
    scores: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


def network(num_features: int, tasks: Sequence[str], balancer: Balancer, width: int = WIDTH) -> MultiTaskModel:
    """A shared perceptron with a linear head per task, whose prediction is [B]."""
    backbone = nn.Sequential(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    heads = {task: nn.Sequential(nn.Linear(width, 1), nn.Flatten(0)) for task in tasks}
    return MultiTaskModel(backbone, heads, balancer)


def labelled(output: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], task: str) -> tuple[Tensor, Tensor]:
    """A task's predictions and labels for the samples that have a label of it."""
    predictions, labels = output
    known = ~labels[task].isnan()
    return predictions[task][known], labels[task][known]


def task_losses(predictions: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The loss of each predicted task over its labelled samples; None where there are none: it takes no part."""
    pairs = {task: labelled((predictions, labels), task) for task in predictions}
    return {task: TASKS[task].loss(p, y) if y.numel() else None for task, (p, y) in pairs.items()}


def create_trainer(model: MultiTaskModel, optimizer: torch.optim.Optimizer, recorder: Recorder | None = None) -> Engine:
    """An engine that takes a balanced step per batch; its output is the losses of the tasks that took part."""

    def step(_: Engine, batch: Batch) -> dict[str, Tensor]:
        model.train()
        features, labels = batch
        optimizer.zero_grad()
        with cached():
            predictions = model(features)
            losses = task_losses(predictions, labels)
            model.backward(losses)
            if recorder is not None:
                recorder.record(losses)
        optimizer.step()
        # Tensors and not numbers: for each number the host would have to wait for the device once more.
        return {task: loss.detach() for task, loss in losses.items() if loss is not None}

    return Engine(step)


def create_evaluator(model: MultiTaskModel) -> Engine:
    """An engine that computes the metric of every task of the model over its labelled samples."""

    @torch.no_grad()
    def predict(_: Engine, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.eval()
        features, labels = batch
        return model(features), labels

    evaluator = Engine(predict)
    for task in model.tasks:
        TASKS[task].metric(output_transform=partial(labelled, task=task)).attach(evaluator, task)
    return evaluator


def fit(
    tasks: Sequence[str],
    balancer: Balancer,
    training: Flights,
    validation: Flights,
    *,
    balancer_lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    description: str | None = None,
    folder: Path | None = None,
) -> Trained:
    """Train a new network on these tasks and evaluate it after every epoch; the seed draws weights and order.

    With a folder, what the tasks do to each other is written there, for :mod:`mtlwrap.report`.
    """
    torch.manual_seed(seed)
    model = network(training.features.shape[1], tasks, balancer).to(training.features.device)
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-2, balancer_lr=balancer_lr), fused=True)
    batches = training.batches(batch_size, shuffle_seed=seed)
    # So short a training is mostly noise at its end unless the learning rate goes down to 0.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    recorder = None if folder is None else Recorder(folder, model)
    trainer, evaluator = create_trainer(model, optimizer, recorder), create_evaluator(model)
    trained, timer = Trained(model), Timer()
    timer.attach(trainer, start=Events.ITERATION_STARTED, pause=Events.ITERATION_COMPLETED)
    # Drawing the bar in every step would take longer than the step; disable=None: none where there is no terminal.
    bar = ProgressBar(desc=description, disable=None)
    bar.attach(trainer, output_transform=dict, event_name=Events.ITERATION_COMPLETED(every=10))

    @trainer.on(Events.ITERATION_COMPLETED)
    def record() -> None:
        trained.seconds.append(timer.value())
        schedule.step()
        # None as long as no batch had a label of any of these tasks.
        if model.task_weights is not None:
            trained.weights.append(model.task_weights)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        evaluator.run(validation.batches(4096))
        trained.scores.append(dict(evaluator.state.metrics))

    try:
        trainer.run(batches, max_epochs=epochs)
    finally:
        if recorder is not None:
            recorder.close()
    return trained
