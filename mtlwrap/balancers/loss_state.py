"""What DWA, FAMO, GLS and RLW share: arithmetic in float32 or wider, and state that follows the losses."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mtlwrap.balancers.base import LossBalancer, unbound
from mtlwrap.surroundings import transforming


class LossStateBalancer(LossBalancer):
    """A loss balancer whose state has an entry per task, of a size that :meth:`bind` or the constructor tells.

    Derived classes make their buffers in ``_allocate`` and say in ``reset`` what is in them at first.
    """

    def __init__(self, num_tasks: int | None) -> None:
        super().__init__()
        if num_tasks is not None:
            self.bind(num_tasks)

    def bind(self, num_tasks: int) -> None:
        """See :meth:`Balancer.bind`; a balancer that was made without a number of tasks gets its state here."""
        unbound = self.num_tasks is None
        super().bind(num_tasks)
        if unbound:
            with torch.inference_mode(False):  # an inference tensor could not be written to in training
                self._allocate(num_tasks)
            self.reset()

    @abstractmethod
    def _allocate(self, num_tasks: int) -> None:
        """Make the buffers and parameters; :meth:`reset` fills them."""

    def _check(self, losses: Tensor, tasks: Sequence[int] | None) -> None:
        """Refuse losses that are not one for each task that takes part."""
        name = type(self).__name__
        if self.num_tasks is None:
            raise unbound(self)
        expected = (self.num_tasks if tasks is None else len(tasks),)
        if losses.shape != expected:
            raise ValueError(f"{name}: expected values of shape {expected}, got {tuple(losses.shape)}.")


def learns(balancer: LossBalancer) -> bool:
    """Whether the state follows: in training, under gradients, and not under a transform of torch.func."""
    if not (balancer.training and torch.is_grad_enabled()):
        return False
    return torch.compiler.is_compiling() or not transforming()


def wide(values: Tensor) -> Tensor:
    """The values in float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def write(state: Tensor, values: Tensor, tasks: Sequence[int] | None, sound: Tensor) -> None:
    """Write the entries of ``tasks`` into a buffer where ``sound``, of each or of all; None stands for all tasks."""
    if tasks is None:
        state.copy_(torch.where(sound, values, state.to(values.device)))
        return
    sound = sound.expand(values.shape)
    for position, task in enumerate(tasks):  # an index tensor would synchronise with the host
        state[task].copy_(torch.where(sound[position], values[position], state[task].to(values.device)))
