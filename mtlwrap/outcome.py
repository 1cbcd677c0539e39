"""What the last balanced backward of a model left behind."""

from typing import Any

from torch import Tensor

from mtlwrap.gradients import TaskGradients
from mtlwrap.step import Scope


class Report:
    """What the last balanced backward of a model leaves behind for its user."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self._gradients: TaskGradients | None = None
        self._scope: Scope | None = None

    @property
    def was_watched(self) -> bool:
        """Whether the last backward had a scope that is open still: without gradients then, there are none to show."""
        return self._scope is not None and self._scope.is_open

    @property
    def gradients(self) -> TaskGradients | None:
        """The task gradients, while the step's scope is open."""
        return self._gradients if self.was_watched else None

    def fill(self, weights: Tensor | None, gradients: TaskGradients | None, scope: Scope | None) -> None:
        """Note the outcome of a balanced backward; the gradients only if a scope will free them."""
        self.weights = weights
        self._gradients, self._scope = None, scope
        if scope is not None and scope.is_open and gradients is not None:
            self._gradients = gradients
            scope.add(gradients)
            scope.add(self)

    def release(self) -> None:
        """Called as a scope closes, though perhaps not the one of the gradients held now."""
        if self._scope is not None and not self._scope.is_open:
            self._gradients = self._scope = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model, or a pickle, is no part of the step that is running.
        return {"weights": self.weights, "_gradients": None, "_scope": None}
