"""What makes a problem of the study: its tasks, its data in three parts, its network and how long it trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ignite.metrics import ROC_AUC, Accuracy, Metric
from ignite.metrics.regression.r2_score import R2Score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss


@dataclass(frozen=True)
class Task:
    """What makes a task.

    Attributes:
        outputs: how many numbers its head predicts.
        loss: of predictions and labels.
        metric: higher is better.
        metric_name: for tables.
        likelihood: what UW assumes.
    """

    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: type[Metric]
    metric_name: str
    likelihood: Literal["classification", "regression"]


def _squared(predictions: Tensor, labels: Tensor) -> Tensor:
    return mse_loss(predictions.squeeze(1), labels)


def _binary(predictions: Tensor, labels: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(predictions.squeeze(1), labels)


DIGIT = Task(10, cross_entropy, Accuracy, "accuracy", "classification")
BINARY = Task(1, _binary, ROC_AUC, "AUC", "classification")
REGRESSION = Task(1, _squared, R2Score, "R²", "regression")


@dataclass(frozen=True)
class Part:
    """Samples in memory.

    Attributes:
        features: ``[N, ...]``.
        labels: for each task ``[N]``, NaN where there is none.
    """

    features: Tensor
    labels: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor) -> "Part":
        return Part(self.features[rows], {task: labels[rows] for task, labels in self.labels.items()})


@dataclass(frozen=True)
class Data:
    """Networks learn from one part, configurations are chosen by the second, and the third is what is reported."""

    training: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        name: for the command line and tables.
        tasks: by name.
        load: its data; called in every process, so it should remember.
        backbone: a new one, whose representation is ``[B, width]``.
        width: the size of the representation, and of rotations.
        epochs: how often every sample is seen.
        batch_size: of the training.
        lr: the learning rate that those tried are multiples of.
        weights: what is tried for fixed weights: two vectors, each with one for every task, from the training part.
    """

    name: str
    tasks: Mapping[str, Task]
    load: Callable[[], Data]
    backbone: Callable[[], nn.Module]
    width: int
    epochs: int
    batch_size: int
    lr: float
    weights: Callable[[Part], Sequence[Sequence[float]]]

    @property
    def schedule(self) -> str:
        """What a result depends on besides method and seed; results of another schedule are not reused."""
        return f"{self.epochs} epochs, batches of {self.batch_size}"


class MissingDataError(Exception):
    """A problem's data are not installed."""


def package_folder(package: str, install: str) -> Path:
    """Where a package's files are; the package itself is not imported, for that may need more than is installed.

    Raises:
        MissingDataError: it is not installed.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        return Path(folder)
    raise MissingDataError(f"The data are in the package {package}. Install it: {install}")
