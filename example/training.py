"""The pattern to copy: tasks, network, the training step, and ignite's trainer and evaluator around them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from statistics import median
from typing import Literal

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar, Timer
from ignite.metrics import ROC_AUC, Metric, RunningAverage
from ignite.metrics.regression.r2_score import R2Score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from example.data import Batch, Flights
from mtlwrap import IMTL, IMTLG, UW, Balancer, Compose, EqualWeighting, FixedWeights, MultiTaskModel, cached


@dataclass(frozen=True)
class Task:
    """What makes a task: its loss, its metric, and the likelihood that uncertainty weighting assumes."""

    loss: Callable[[Tensor, Tensor], Tensor]
    metric: type[Metric]
    likelihood: Literal["classification", "regression"]


TASKS: dict[str, Task] = {
    "cancelled": Task(binary_cross_entropy_with_logits, ROC_AUC, "classification"),
    "dep_delay": Task(mse_loss, R2Score, "regression"),
    "arr_delay": Task(mse_loss, R2Score, "regression"),
    "air_time": Task(mse_loss, R2Score, "regression"),
}
LIKELIHOODS = [task.likelihood for task in TASKS.values()]

BALANCERS: dict[str, Callable[[], Balancer]] = {
    "equal": EqualWeighting,
    "fixed": lambda: FixedWeights([5.0, 1.0, 1.0, 1.0]),  # cancelled flights are rare, which makes their loss small
    "uw": lambda: UW(likelihood=LIKELIHOODS),
    "imtl-l": lambda: IMTL(method="loss"),
    "imtl-g": IMTLG,
    "imtl-g-nonneg": lambda: IMTLG(nonneg=True),
    "imtl": IMTL,
    "uw+imtl-g": lambda: Compose(loss=UW(likelihood=LIKELIHOODS), gradient=IMTLG()),
}


@dataclass
class Result:
    """What one balancer's training came to; after an interruption, as of the last whole epoch."""

    name: str
    model: MultiTaskModel
    metrics: Mapping[str, float]
    epochs: int
    seconds_per_step: float
    interrupted: bool


def network(num_features: int, balancer: Balancer, width: int = 128) -> MultiTaskModel:
    """A shared perceptron with a linear head per task, whose prediction is [B]."""
    backbone = nn.Sequential(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    heads = {task: nn.Sequential(nn.Linear(width, 1), nn.Flatten(0)) for task in TASKS}
    return MultiTaskModel(backbone, heads, balancer)


def labelled(output: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], task: str) -> tuple[Tensor, Tensor]:
    """A task's predictions and labels for the samples that have a label of it."""
    predictions, labels = output
    known = ~labels[task].isnan()
    return predictions[task][known], labels[task][known]


def task_losses(predictions: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The loss of each task over its labelled samples; None where the batch has none: the task takes no part."""
    pairs = {task: labelled((predictions, labels), task) for task in TASKS}
    return {task: TASKS[task].loss(p, y) if y.numel() else None for task, (p, y) in pairs.items()}


def create_trainer(model: MultiTaskModel, optimizer: torch.optim.Optimizer) -> Engine:
    """An engine that takes a balanced step per batch and keeps a running average of every task's loss."""

    def step(engine: Engine, batch: Batch) -> dict[str, float]:
        model.train()
        features, labels = batch
        optimizer.zero_grad()
        with cached():
            predictions = model(features)
            losses = task_losses(predictions, labels)
            model.backward(losses)
        optimizer.step()
        # A task that took no part repeats its running average, which leaves the average where it is.
        averages = engine.state.metrics
        return {task: averages.get(task, 0.0) if loss is None else loss.item() for task, loss in losses.items()}

    trainer = Engine(step)
    for task in model.tasks:
        RunningAverage(output_transform=itemgetter(task)).attach(trainer, task)
    return trainer


def create_evaluator(model: MultiTaskModel) -> Engine:
    """An engine that computes every task's metric over its labelled samples."""

    @torch.no_grad()
    def predict(_: Engine, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.eval()
        features, labels = batch
        return model(features), labels

    evaluator = Engine(predict)
    for name, task in TASKS.items():
        task.metric(output_transform=partial(labelled, task=name)).attach(evaluator, name)
    return evaluator


def fit(name: str, training: Flights, validation: Flights, *, epochs: int, batch_size: int, seed: int) -> Result:
    """Train a new network with the balancer of that name, and evaluate it after every epoch."""
    torch.manual_seed(seed)
    model = network(training.features.shape[1], BALANCERS[name]()).to(training.features.device)
    optimizer = torch.optim.Adam(model.param_groups(lr=3e-3, balancer_lr=1e-2))
    trainer, evaluator = create_trainer(model, optimizer), create_evaluator(model)
    result = Result(name, model, metrics={}, epochs=0, seconds_per_step=float("nan"), interrupted=False)

    # The median, because the first steps of all are slow: torch imports parts of itself there.
    timer, seconds = Timer(), list[float]()
    timer.attach(trainer, start=Events.ITERATION_STARTED, pause=Events.ITERATION_COMPLETED)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seconds.append(timer.value()))
    # Drawing the bar in every step would take longer than the step; disable=None: none where there is no terminal.
    ProgressBar(desc=name, disable=None).attach(trainer, list(TASKS), event_name=Events.ITERATION_COMPLETED(every=10))

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        evaluator.run(validation.batches(4096))
        result.metrics, result.epochs = dict(evaluator.state.metrics), engine.state.epoch
        result.seconds_per_step = median(seconds)

    try:
        trainer.run(training.batches(batch_size, shuffle_seed=seed), max_epochs=epochs)
    except KeyboardInterrupt:
        result.interrupted = True
    return result
