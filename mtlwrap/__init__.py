"""mtlwrap: train one PyTorch network on several tasks, with the tasks balanced in one ordinary backward pass."""

from mtlwrap.balancers import (
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
    RotateOnly,
    RotoGrad,
    RotoGradNorm,
    TorchJD,
)
from mtlwrap.exact import Parameters
from mtlwrap.gradients import TaskGradients
from mtlwrap.model import MultiTaskModel, SingleTaskModel
from mtlwrap.standalone import Fork, fork
from mtlwrap.step import cached

__version__ = "0.1.0"

__all__ = [
    "DWA",
    "FAMO",
    "GLS",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "RLW",
    "UW",
    "Balancer",
    "Compose",
    "EqualWeighting",
    "ExcessMTL",
    "FixedWeights",
    "Fork",
    "GradNorm",
    "GradientBalancer",
    "LossBalancer",
    "MultiTaskModel",
    "Parameters",
    "RotateOnly",
    "RotoGrad",
    "RotoGradNorm",
    "SingleTaskModel",
    "TaskGradients",
    "TorchJD",
    "cached",
    "fork",
]
