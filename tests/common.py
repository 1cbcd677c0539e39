"""What the tests share: a small asymmetric problem, and gradients by brute force."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
    Compose,
    EqualWeighting,
    ExcessMTL,
    FixedWeights,
    GradientBalancer,
    GradNorm,
    LossBalancer,
    MultiTaskModel,
    RotateOnly,
    RotoGrad,
    RotoGradNorm,
    balancers,
)

DEVICE = torch.device(os.environ.get("MTLWRAP_TEST_DEVICE", "cpu"))

# Every balancer that is exported, by its class name; the adapter of TorchJD is as many as TorchJD has, and has the same
# laws in its own test.
METHODS = [
    name
    for name in balancers.__all__
    if name not in ("Compose", "TorchJD") and getattr(balancers, name) not in (Balancer, GradientBalancer, LossBalancer)
]

# What those need that have options without a default, for three tasks on make_backbone's representation.
OPTIONS: dict[str, Callable[[], Balancer]] = {
    "DWA": lambda: DWA(steps_per_epoch=2),
    "FixedWeights": lambda: FixedWeights([0.5, 2.0, 3.0]),
    "RotateOnly": lambda: RotateOnly(8),
    "RotoGrad": lambda: RotoGrad(8),
    "RotoGradNorm": lambda: RotoGradNorm(8, alpha=1.5),
}

# Every balancer with the options that change its path, made anew for each test.
BALANCERS = {
    "none": lambda: None,
    "equal": EqualWeighting,
    "fixed": lambda: FixedWeights([0.5, 2.0, 3.0]),
    "uw": lambda: UW(init=[0.25, -0.5, 0.125]),
    "uw-likelihoods": lambda: UW(likelihood=["regression", "classification", "laplace"]),
    "imtl-l": lambda: IMTLL(init=[0.25, -0.5, 0.125]),
    "imtl-g": IMTLG,
    "imtl-g-nonneg": lambda: IMTLG(nonneg=True),
    "imtl-g-strict": lambda: IMTLG(strict=True),
    "imtl": lambda: IMTL(init=[0.25, -0.5, 0.125]),
    "imtl-first-losses": lambda: IMTL(init="first_losses"),
    "imtl-loss": lambda: IMTL(method="loss"),
    "imtl-gradient": lambda: IMTL(method="gradient"),
    "excess-mtl": lambda: ExcessMTL(robust_step_size=0.5),
    "rotate-only": lambda: RotateOnly(8),
    "rotograd": lambda: RotoGrad(8, burn_in_period=3),
    "rotograd-norm": lambda: RotoGradNorm(6, alpha=0.5, burn_in_period=3),
    "grad-norm": lambda: GradNorm(alpha=0.5),
    "dwa": lambda: DWA(steps_per_epoch=1),
    "famo": FAMO,
    "gls": GLS,
    "rlw": RLW,
    "compose": lambda: Compose(loss=UW(init=[0.25, -0.5, 0.125]), gradient=IMTLG(nonneg=True)),
}

# Those whose state follows the losses.
FOLLOW_LOSSES = ("dwa", "famo", "imtl-first-losses", "rlw")

TASKS = ("a", "b", "c")


def make_backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh())


def make_heads() -> dict[str, nn.Module]:
    """Three different heads; the first begins in place, which must disturb neither the others nor the backbone."""
    return {
        "a": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 1)),
        "b": nn.Linear(8, 2),
        "c": nn.Sequential(nn.Linear(8, 4), nn.Sigmoid(), nn.Linear(4, 3)),
    }


def make_model(balancer: Balancer | str | None = None, dtype: torch.dtype = torch.float64) -> MultiTaskModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MultiTaskModel(make_backbone(), make_heads(), balancer)
    return model.to(device=DEVICE, dtype=dtype)


def make_input(seed: int = 0, rows: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def make_losses(predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses of three kinds and sizes, for those of the tasks that have a prediction."""
    kinds = {
        "a": lambda p: p.square().mean(),
        "b": lambda p: (p - 3).abs().mean(),
        "c": lambda p: 100 * p.exp().mean(),
    }
    return {task: kinds[task](prediction) for task, prediction in predictions.items()}


def float16_losses(model: MultiTaskModel, x: Tensor) -> dict[str, Tensor]:
    """The losses of a model in training with autocast, as a GradScaler is made for."""
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        return make_losses({task: prediction.float() for task, prediction in model(x).items()})


def unwrapped_losses(model: MultiTaskModel, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The representation and the losses of the same modules, without the wrapper."""
    z = model.backbone(x)
    return z, make_losses({task: model.heads[task](z.clone()) for task in TASKS})


def task_gradients(losses: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each loss, its gradient on each of the tensors, by one autograd.grad per loss; zeros where it has none."""
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)])
    return rows


def grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


class Normalised(torch.autograd.Function):
    """What it passes back depends on all of the gradient: of nothing it is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm()
