"""Notices mistakes that train on silently: balancer parameters that never move, processes that do not agree."""

import sys
import warnings
from itertools import islice

import torch
from torch import Tensor, nn

from mtlwrap.balancers import Balancer, GradientBalancer
from mtlwrap.processes import Peers
from mtlwrap.surroundings import opaque

# Backward passes after which something must have moved.
_PATIENCE = 100

# A parameter's value, and how often it had been written to.
_Mark = tuple[Tensor, int]


class Watch:
    """Looks on as a model trains, and warns once of what nobody would notice."""

    def __init__(self) -> None:
        self._passes = 0
        self._of_balancer: dict[str, _Mark] = {}
        # One parameter of the model: if it has not moved either, there was no optimizer step yet.
        self._of_model: dict[str, _Mark] = {}

    def __getstate__(self) -> dict[str, object]:
        # A copy starts afresh.
        return vars(Watch())

    @opaque
    def look(self, model: nn.Module, balancer: Balancer, peers: Peers) -> None:
        """Called once for each balanced total; the balancer is a part of the model."""
        if self._passes == 0:
            self._begin(model, balancer)
            _look_at_processes(balancer, peers)
        self._passes += 1
        if self._passes == _PATIENCE + 1:
            self._end(model, balancer)

    def _begin(self, model: nn.Module, balancer: Balancer) -> None:
        self._of_balancer = {name: _mark(p) for name, p in balancer.named_parameters() if p.requires_grad}
        own = {id(p) for p in balancer.parameters()}
        others = ((name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in own)
        self._of_model = {name: _mark(p) for name, p in islice(others, 1)}

    def _end(self, model: nn.Module, balancer: Balancer) -> None:
        still = _unmoved(balancer, self._of_balancer)
        if still and _unmoved(model, self._of_model):
            self._passes = 0  # gradients are accumulated over more passes than this
            return
        self._of_balancer, self._of_model = {}, {}
        if still:
            warnings.warn(
                f"{type(balancer).__name__}: {', '.join(still)} did not change in {_PATIENCE} backward passes, while "
                "the model did, so the balancer is not learning. Put model.balancer_parameters() into the optimizer, "
                "best by model.param_groups(...); or freeze them with requires_grad_(False) if that is meant.",
                UserWarning,
                stacklevel=_levels_to_caller(),
            )


def _levels_to_caller() -> int:
    """For ``warnings.warn``: how far up the line is that called this package, through whatever of torch is between."""
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("mtlwrap", "torch"):
        frame, levels = frame.f_back, levels + 1
    return levels


def _mark(parameter: Tensor) -> _Mark:
    return parameter.detach().clone(), parameter._version


def _unmoved(module: nn.Module, marks: dict[str, _Mark]) -> list[str]:
    """Which parameters are as they were marked. Values are compared, and the host waits, only if they seem so."""
    current = dict(module.named_parameters())
    return sorted(name for name, mark in marks.items() if name in current and not _moved(current[name], mark))


def _moved(parameter: Tensor, mark: _Mark) -> bool:
    value, version = mark
    if parameter._version != version or parameter.shape != value.shape:
        return True
    # Fused optimizers write without counting the version up.
    return not torch.equal(parameter.detach(), value.to(parameter))


def _look_at_processes(balancer: Balancer, peers: Peers) -> None:
    if peers.are_apart and any(isinstance(module, GradientBalancer) for module in balancer.modules()):
        warnings.warn(
            f"There are several processes, and {type(balancer).__name__} weighs gradients: each process decides by "
            "itself, from its own batch, for no forward came through a DistributedDataParallel and nothing is sharded. "
            "Call the wrapped model, ddp(x) and not model(x); or, to decide jointly without one, give MultiTaskModel a "
            "process_group. process_group=None says that this is meant.",
            UserWarning,
            stacklevel=_levels_to_caller(),
        )
