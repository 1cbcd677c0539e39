"""Notices mistakes that train on silently: balancer parameters that never move, processes that do not agree."""

import warnings

import torch.distributed
from torch import nn

# Backward passes without a movement before it is said: more than anyone accumulates for one optimizer step.
_PATIENCE = 200


class MovementWatch:
    """Counts backward passes, and warns once if a parameter was never written to in all of them.

    It compares version counters, which live on the host, and not values.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._processes_checked = False
        self._start: dict[str, tuple[int, int]] = {}

    def look(self, balancer: nn.Module) -> None:
        """Called once for each balanced total."""
        self._look_at_processes()
        if self._passes > _PATIENCE:
            return
        marks = {name: (id(p), p._version) for name, p in balancer.named_parameters() if p.requires_grad}
        if self._passes == 0:
            self._start = marks
        self._passes += 1
        if self._passes > _PATIENCE:
            still = sorted(name for name, mark in marks.items() if self._start.get(name) == mark)
            if still:
                warnings.warn(
                    f"{type(balancer).__name__}: {', '.join(still)} did not change in {_PATIENCE} backward passes, so "
                    "the balancer is not learning. Put model.balancer_parameters() into the optimizer, best by "
                    "model.param_groups(...); or freeze them with requires_grad_(False) if that is meant.",
                    UserWarning,
                    stacklevel=3,
                )

    def _look_at_processes(self) -> None:
        if self._processes_checked:
            return
        self._processes_checked = True
        # torch.distributed can be missing from a build, and then has no is_initialized.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            count = torch.distributed.get_world_size()
            if count > 1:
                warnings.warn(
                    f"There are {count} processes: each balances the gradients of its own batch, and they do not "
                    "agree on the weights. The gradients of the processes are averaged as usual.",
                    UserWarning,
                    stacklevel=4,
                )
