"""Notices a balancer whose parameters never move: the mistake of leaving them out of the optimizer."""

import warnings

from torch import nn

# Backward passes without a movement before it is said: more than anyone accumulates for one optimizer step.
_PATIENCE = 200


class MovementWatch:
    """Counts backward passes, and warns once if a parameter was never written to in all of them.

    It compares version counters, which live on the host, and not values.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._start: dict[str, tuple[int, int]] = {}

    def look(self, balancer: nn.Module) -> None:
        """Called once for each balanced total."""
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
