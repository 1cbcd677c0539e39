"""What is compared, and the whole of its tuning: every configuration that is tried is written down here.

Each method may try :data:`BUDGET` configurations on each problem, no more and no less, from one seed that is not used
again, and is judged by the validation part. A method with nothing of its own to set tries four learning rates; one that
has tries two settings, each at two learning rates. Those are multiples of the problem's. The grid was changed once, in
view of first results: log-scales got the start at the first losses, and the upper of the two learning rates came down.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from example.study.problem import Part, Problem
from mtlwrap import (
    DWA,
    FAMO,
    GLS,
    IMTL,
    IMTLG,
    IMTLL,
    RLW,
    UW,
    Balancer,
    EqualWeighting,
    ExcessMTL,
    FixedWeights,
    GradNorm,
    RotateOnly,
    RotoGrad,
    RotoGradNorm,
    TorchJD,
)

BUDGET = 4
# The multiples of the problem's learning rate, by the number of settings.
LEARNING_RATES = {1: (0.5, 1.0, 2.0, 4.0), 2: (1.0, 2.0)}

# What the others are measured against.
SINGLE, EQUAL, FIXED = "single", "equal", "fixed"
BASELINES = (SINGLE, EQUAL, FIXED)


@dataclass(frozen=True)
class Setting:
    """One setting of what is a method's own.

    Attributes:
        label: for tables; empty if there is nothing to set.
        balancer: makes it, for a problem and its training part.
        balancer_lr: the learning rate of what it learns, given the network's.
    """

    label: str
    balancer: Callable[[Problem, Part], Balancer]
    balancer_lr: Callable[[float], float] = lambda lr: lr


@dataclass(frozen=True)
class Configuration:
    """A setting at a learning rate."""

    setting: Setting
    lr: float
    multiple: float

    @property
    def label(self) -> str:
        """All that distinguishes it."""
        return f"lr={self.lr:g} {self.setting.label}".strip()


def fixed_rate(rate: float, _: float) -> float:
    """A learning rate of the balancer's own."""
    return rate


def share_of(share: float, lr: float) -> float:
    """A learning rate that is so much of the network's."""
    return share * lr


def log_scales(make: Callable[[Problem, Sequence[float] | None], Balancer]) -> list[Setting]:
    """Log-scales that start at zero, and at what the first losses ask for; made from the logarithms of those."""

    def from_zero(problem: Problem, _: Part) -> Balancer:
        return make(problem, None)

    def from_first_losses(problem: Problem, training: Part) -> Balancer:
        return make(problem, [math.log(loss) for loss in first_losses(problem, training)])

    rate = partial(fixed_rate, 0.1)
    return [
        Setting("balancer_lr=0.1", from_zero, rate),
        Setting("balancer_lr=0.1 init", from_first_losses, rate),
    ]


def first_losses(problem: Problem, training: Part) -> list[float]:
    """The losses of predicting zero, which is about what a new network does; of the tasks in their order."""
    losses = []
    for name, task in problem.tasks.items():
        labels = training.labels[name]
        known = labels[~labels.isnan()]
        losses.append(float(task.loss(torch.zeros(len(known), task.outputs), known)))
    return losses


def negated(logarithms: Sequence[float] | None) -> list[float] | None:
    """IMTL's scales are those by which losses are multiplied."""
    return None if logarithms is None else [-logarithm for logarithm in logarithms]


def turned_at(make: Callable[[Problem, Part], Balancer]) -> list[Setting]:
    """Rotations, slower than the network that follows them."""
    return [Setting(f"balancer_lr={share:g}lr", make, partial(share_of, share)) for share in (0.1, 0.5)]


def nothing_to_set(make: Callable[[], Balancer]) -> list[Setting]:
    """A method without options."""
    return [Setting("", lambda *_: make())]


def likelihoods(problem: Problem) -> list[str]:
    """What UW is to assume of each task."""
    return [task.likelihood for task in problem.tasks.values()]


def weighted(number: int, problem: Problem, training: Part) -> Balancer:
    """The problem's fixed weights of that number."""
    return FixedWeights(problem.weights(training)[number])


def excess(step: float, *_: object) -> Balancer:
    """One batch is too noisy a baseline, whence the warm-up."""
    return ExcessMTL(robust_step_size=step, n_warmup_steps=20)


def averaged(temperature: float, problem: Problem, training: Part) -> Balancer:
    """DWA over the problem's epochs."""
    return DWA(-(-len(training) // problem.batch_size), temperature=temperature)


def drawn(std: float, *_: object) -> Balancer:
    """RLW."""
    return RLW(std=std)


def grad_norm(alpha: float, *_: object) -> Balancer:
    """GradNorm."""
    return GradNorm(alpha=alpha)


def upgrad() -> Balancer:
    """UPGrad, of TorchJD, which is an extra of its own."""
    from torchjd.aggregation import UPGrad

    return TorchJD(UPGrad())


SETTINGS: dict[str, list[Setting]] = {
    SINGLE: nothing_to_set(EqualWeighting),
    EQUAL: nothing_to_set(EqualWeighting),
    FIXED: [Setting(f"weights {number + 1}", partial(weighted, number)) for number in range(2)],
    "uw": log_scales(lambda problem, logs: UW(likelihood=likelihoods(problem), init=logs)),
    "imtl-l": log_scales(lambda _, logs: IMTLL(init=negated(logs))),
    "imtl-g": nothing_to_set(IMTLG),
    "imtl": log_scales(lambda _, logs: IMTL(init=negated(logs))),
    "excess-mtl": [Setting(f"step={step:g}", partial(excess, step)) for step in (0.01, 1.0)],
    "dwa": [Setting(f"temperature={temperature:g}", partial(averaged, temperature)) for temperature in (1.0, 2.0)],
    "gls": nothing_to_set(GLS),
    "rlw": [Setting(f"std={std:g}", partial(drawn, std)) for std in (0.5, 1.0)],
    "famo": [Setting(f"balancer_lr={rate:g}", lambda *_: FAMO(), partial(fixed_rate, rate)) for rate in (0.025, 0.25)],
    "grad-norm": [
        Setting(f"alpha={alpha:g} balancer_lr={rate:g}", partial(grad_norm, alpha), partial(fixed_rate, rate))
        for alpha, rate in ((1.5, 0.025), (0.12, 0.1))
    ],
    "rotate-only": turned_at(lambda problem, _: RotateOnly(problem.width)),
    "rotograd": turned_at(lambda problem, _: RotoGrad(problem.width)),
    "rotograd-norm": turned_at(lambda problem, _: RotoGradNorm(problem.width, alpha=0.12)),
    "upgrad": nothing_to_set(upgrad),
}


def configurations(problem: Problem, method: str) -> list[Configuration]:
    """All that is tried for a method on a problem."""
    settings = SETTINGS[method]
    return [
        Configuration(setting, problem.lr * multiple, multiple)
        for setting in settings
        for multiple in LEARNING_RATES[len(settings)]
    ]


def groups(problem: Problem, method: str) -> list[Sequence[str]]:
    """The tasks that share a network, for each network."""
    return [[task] for task in problem.tasks] if method == SINGLE else [list(problem.tasks)]
