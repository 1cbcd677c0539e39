"""A loss balancer and a gradient balancer at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlwrap.balancers.base import Balancer, GradientBalancer, LossBalancer, described
from mtlwrap.balancers.equal import EqualWeighting
from mtlwrap.gradients import TaskGradients
from mtlwrap.state import Undo


class Compose(Balancer):
    r"""One balancer for the losses, another for the gradients that the balanced losses send back.

    The loss balancer makes the scalar :math:`S(L_1, \dots, L_T)`; heads, and its own parameters, see the gradient of
    that. The gradient balancer sees :math:`g_t = \partial S / \partial L_t \, \nabla_z L_t` and weighs these for the
    backbone alone. ``Compose(loss=IMTLL(), gradient=IMTLG())`` is Algorithm 1 of IMTL.

    Args:
        loss: a :class:`LossBalancer`; None adds the losses up.
        gradient: a :class:`GradientBalancer`; None adds the gradients up.

    Raises:
        TypeError: a part is not of its kind, ``loss`` weighs gradients too, or ``gradient`` scales the losses.
        ValueError: the parts were made for different numbers of tasks.

    Example:
        >>> from mtlwrap import IMTLG, UW
        >>> Compose(loss=UW(likelihood=["regression", "classification"]), gradient=IMTLG(nonneg=True))
        Compose(
          (loss): UW(likelihood=['regression', 'classification'], shape=(2,), bound=20)
          (gradient): IMTLG(nonneg=True)
        )
    """

    loss: Balancer
    gradient: Balancer

    def __init__(self, loss: LossBalancer | None = None, gradient: GradientBalancer | None = None) -> None:
        super().__init__()
        for name, part, kind in (("loss", loss, LossBalancer), ("gradient", gradient, GradientBalancer)):
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"{name}: expected a {kind.__name__} or None, got {described(part)}.")
        if loss is not None and loss.sees_gradients:
            raise TypeError(f"loss: {loss!r} weighs the gradients itself, so it stands alone.")
        if gradient is not None and gradient.scales_losses:
            raise TypeError(f"gradient: {gradient!r} scales the losses itself, so it stands alone.")
        self.loss = EqualWeighting() if loss is None else loss
        self.gradient = EqualWeighting() if gradient is None else gradient
        known = {part.num_tasks for part in (self.loss, self.gradient)} - {None}
        if len(known) > 1:
            raise ValueError(
                f"loss was made for {self.loss.num_tasks} tasks, gradient for {self.gradient.num_tasks}; "
                "expected the same number."
            )
        self.num_tasks = next(iter(known), None)

    def bind(self, num_tasks: int) -> None:
        """See :meth:`Balancer.bind`; it is passed on to both parts."""
        super().bind(num_tasks)
        self.loss.bind(num_tasks)
        self.gradient.bind(num_tasks)

    @property
    def sees_gradients(self) -> bool:
        """Whether there is a gradient balancer."""
        return self.gradient.sees_gradients

    @property
    def transforms(self) -> bool:
        """Whether the gradient balancer does."""
        return self.gradient.transforms

    def transform(self, tensors: Sequence[Tensor], tasks: Sequence[int]) -> list[Tensor]:
        """What the gradient balancer makes of the representation."""
        return self.gradient.transform(tensors, tasks)

    def own_gradients(self, gradients: TaskGradients) -> dict[str, Tensor]:
        """Those of the gradient balancer's parameters."""
        return {f"gradient.{name}": g for name, g in self.gradient.own_gradients(gradients).items()}

    def prepare(self, representation: Sequence[Tensor]) -> None:
        """Prepare both parts."""
        self.loss.prepare(representation)
        self.gradient.prepare(representation)

    def constrain(self) -> None:
        """Constrain both parts."""
        self.loss.constrain()
        self.gradient.constrain()

    def reset(self) -> None:
        """Reset both parts."""
        self.loss.reset()
        self.gradient.reset()

    @property
    def keeps_state(self) -> bool:
        """Whether one of the two does."""
        return self.loss.keeps_state or self.gradient.keeps_state

    def undo_scalarize(self) -> Undo | None:
        """The loss balancer's."""
        return self.loss.undo_scalarize()

    def undo_weigh(self) -> Undo | None:
        """The gradient balancer's."""
        return self.gradient.undo_weigh()

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The loss balancer's scalar."""
        return self.loss.scalarize(losses, tasks)

    def weigh(self, gradients: TaskGradients) -> Tensor | None:
        """The gradient balancer's weights."""
        return self.gradient.weigh(gradients)

    def combine(self, gradients: TaskGradients) -> Tensor:
        """The gradient balancer's shared gradient."""
        return self.gradient.combine(gradients)

    def forward(self, losses: Tensor, matrix: Tensor) -> Tensor:
        """The shared gradient, ``[n]``, for losses ``[T]`` and *their* gradients ``[T, n]``.

        Raises:
            TypeError, ValueError: as :class:`LossBalancer` and :class:`GradientBalancer` alone.
        """
        gradients = TaskGradients(matrix, losses)
        if self.num_tasks is not None and self.num_tasks != gradients.num_tasks:
            raise ValueError(
                f"{type(self).__name__} was made for {self.num_tasks} tasks, "
                f"got a matrix of {gradients.num_tasks} rows."
            )
        with torch.no_grad():  # for its checks of the losses; state that follows them shall move once
            self.loss(losses.detach())
        # In float32 or wider, for a factor can be beyond half precision's range.
        values = losses.detach().to(torch.promote_types(losses.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            (factors,) = torch.autograd.grad(self.loss(values), values)
        return self.gradient.combine(TaskGradients((factors[:, None] * matrix).to(matrix.dtype), losses))
