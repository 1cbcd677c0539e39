"""Gradients in a checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtlwrap.ignite.common import unwrapped


class AccumulatedGradients:
    """The gradients of a model as something to save, for a checkpoint between two steps of the optimizer.

    A training that accumulates gradients over n iterations, and is saved after an iteration that is no multiple of n,
    continues to the bit only if what is accumulated so far is saved too. It is as large as the parameters.

    Args:
        model: the trainer's model.

    Raises:
        TypeError: it is no :class:`~mtlwrap.MultiTaskModel`, wrapped or not.

    Example:
        >>> from torch import nn
        >>> from mtlwrap import MultiTaskModel
        >>> model = MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1)])
        >>> to_save = {"model": model, "gradients": AccumulatedGradients(model)}
        >>> to_save["gradients"].state_dict()
        {}
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)

    def state_dict(self) -> dict[str, Tensor]:
        """The gradients there are, by the parameter's name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Give the parameters these gradients, and the others none.

        Raises:
            ValueError: there is no parameter of such a name.
        """
        parameters = dict(self.model.named_parameters())
        unknown = [name for name in state_dict if name not in parameters]
        if unknown:
            raise ValueError(f"state_dict: the model has no parameters {', '.join(map(repr, unknown))}.")
        for name, parameter in parameters.items():
            saved = state_dict.get(name)
            parameter.grad = None if saved is None else saved.to(parameter).clone()
