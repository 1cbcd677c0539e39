"""mtlwrap: train one PyTorch network on several tasks, with the tasks balanced in one ordinary backward pass."""

from mtlwrap import balancers
from mtlwrap.balancers import *  # noqa: F403 - all of them, so that a new one is named in one place
from mtlwrap.exact import Parameters
from mtlwrap.gradients import TaskGradients
from mtlwrap.model import MultiTaskModel, SingleTaskModel
from mtlwrap.standalone import Fork, fork
from mtlwrap.step import cached

__version__ = "0.1.0"

__all__ = [
    "Fork",
    "MultiTaskModel",
    "Parameters",
    "SingleTaskModel",
    "TaskGradients",
    "cached",
    "fork",
]
__all__ += balancers.__all__
