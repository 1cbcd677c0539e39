"""One run: train the network or networks of a method on a problem from a seed, and measure every task."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from example.study.methods import Configuration, groups
from example.study.problem import Part, Problem
from mtlwrap import Balancer, EqualWeighting, MultiTaskModel, cached


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        metrics: of each task, higher is better.
        seconds_per_step: the median; of all its networks together.
    """

    metrics: Mapping[str, float]
    seconds_per_step: float


def run(problem: Problem, method: str, configuration: Configuration, seed: int, part: str) -> Outcome:
    """Train on the training part, and measure on the one named ``part``."""
    data = problem.load()
    measured: Part = getattr(data, part)
    metrics: dict[str, float] = {}
    seconds = 0.0
    for tasks in groups(problem, method):
        model, steps = fit(problem, tasks, data.training, configuration, seed)
        metrics |= evaluate(problem, model, measured)
        seconds += median(steps)
    return Outcome(metrics, seconds)


def norm_ratio(problem: Problem, seed: int) -> float:
    """By how much the tasks' gradients on the representation differ in norm in a new network: largest over smallest."""
    training = problem.load().training
    torch.manual_seed(seed)
    model = network(problem, list(problem.tasks), EqualWeighting(), training.features[:1])
    with cached():
        batch = training[torch.arange(min(problem.batch_size, len(training)))]
        model.backward(losses(problem, model(batch.features), batch.labels))
        gradients = model.task_gradients
        if gradients is None:
            raise RuntimeError("No gradients were balanced.")
        norms = gradients.norms
        return float(norms.max() / norms.min())


def network(problem: Problem, tasks: Sequence[str], balancer: Balancer, example: Tensor) -> MultiTaskModel:
    """A new backbone with a linear head for each of the tasks."""
    backbone = problem.backbone()
    with torch.no_grad():
        backbone(example)  # a lazy layer is made by what it sees
    heads = {task: nn.Linear(problem.width, problem.tasks[task].outputs) for task in tasks}
    return MultiTaskModel(backbone, heads, balancer)


def fit(
    problem: Problem, tasks: Sequence[str], training: Part, configuration: Configuration, seed: int
) -> tuple[MultiTaskModel, list[float]]:
    """A trained network, and the seconds of every step: of the processor, which others on the machine do not prolong.

    Samples without a label of these tasks are left out, and the batch shrinks with them: so a task that is trained
    alone takes as many steps, each with as many of its labels, as among the others.
    """
    known = torch.stack([~training.labels[task].isnan() for task in tasks]).any(dim=0)
    rows = known.nonzero().squeeze(1)
    batch_size = math.ceil(problem.batch_size * len(rows) / len(training))
    torch.manual_seed(seed)
    balancer = configuration.setting.balancer(problem, training)
    model = network(problem, tasks, balancer, training.features[:1])
    lr = configuration.lr
    own = configuration.setting.balancer_lr(lr)
    optimizer = torch.optim.Adam(model.param_groups(lr=lr, balancer_lr=own), fused=True)
    generator = torch.Generator().manual_seed(seed)
    order = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(problem.epochs)]
    batches = [batch for epoch in order for batch in epoch.split(batch_size)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    seconds = []
    model.train()
    for chosen in batches:
        batch = training[chosen]
        start = time.process_time()
        optimizer.zero_grad()
        model.backward(losses(problem, model(batch.features), batch.labels))
        optimizer.step()
        seconds.append(time.process_time() - start)
        schedule.step()
    return model, seconds


def losses(
    problem: Problem, predictions: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """The loss of each task over its labelled samples; None where there are none: it takes no part."""
    found: dict[str, Tensor | None] = {}
    for task, prediction in predictions.items():
        known = labelled(labels[task])
        some = len(known) > 0
        found[task] = problem.tasks[task].loss(prediction[known], labels[task][known]) if some else None
    return found


def labelled(labels: Tensor) -> Tensor:
    """Which samples have a label."""
    return (~labels.isnan()).nonzero().squeeze(1)


@torch.no_grad()
def evaluate(problem: Problem, model: MultiTaskModel, part: Part) -> dict[str, float]:
    """The metric of every task of the model over its labelled samples; a network that diverged predicts nothing."""
    model.eval()
    batches = [model(features) for features in part.features.split(2048)]
    metrics = {}
    for task in model.tasks:
        known = labelled(part.labels[task])
        predictions = torch.cat([batch[task] for batch in batches])[known].nan_to_num(0.0, 0.0, 0.0)
        kind = problem.tasks[task]
        metric = kind.metric()
        metric.update((predictions if kind.outputs > 1 else predictions.squeeze(1), part.labels[task][known]))
        metrics[task] = float(metric.compute())
    return metrics
