"""RotateOnly, the rotations of RotoGrad: what it and RotoGradNorm have in common."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtlwrap.balancers.base import GradientBalancer, unbound
from mtlwrap.balancers.first_losses import FirstLosses
from mtlwrap.checks import flag, integer, is_integer
from mtlwrap.gradients import TaskGradients
from mtlwrap.rotations import Rotations
from mtlwrap.state import Kept, Undo
from mtlwrap.vectors import widest


class RotateOnly(GradientBalancer):
    r"""A learned rotation of the representation in front of every head, which brings the tasks' gradients together.

    Javaloy and Valera, `RotoGrad: Gradient Homogenization in Multitask Learning <https://arxiv.org/abs/2103.02631>`_
    (ICLR 2022), §3.2, Algorithm 1. Head k sees :math:`r_k = R_k z`, so that :math:`g_k = R_k^\top \nabla_{r_k} L_k`
    is its gradient on the representation. The backbone gets :math:`\sum_k g_k`; heads get their own losses. The
    rotations are not trained by the losses, but by an objective of their own in the same backward pass,

    .. math:: \min_{R_k} \left\lVert R_k \bar v - \nabla_{r_k} L_k \right\rVert^2, \qquad
        \bar v = \Big\lVert \tfrac1K \sum_j g_j \Big\rVert \; \tfrac1K \sum_j \frac{g_j}{\lVert g_j \rVert}

    with norms over the whole batch and everything but :math:`R_k` constant: it turns each task's gradient towards the
    mean direction. It is the paper's :math:`-\langle R_k^\top \tilde g_k, v \rangle`, times
    :math:`2 \lVert \tfrac1K \sum_j g_j \rVert`, as in rotograd 0.1.6.

    The rotations are parameters of the balancer and start at the identity. Let them learn more slowly than the
    network: the paper finds half its learning rate best, here a tenth was better on each of five problems,
    ``model.param_groups(lr=1e-3, balancer_lr=1e-4)``.

    Differences from the package ``rotograd``: the objective's gradient is summed over all samples and positions also
    with a ``post_shape`` (there it is their mean), and does not depend on a loss scale; a task may be absent; a first
    loss of zero is waited out; the state is in the ``state_dict``; the heads are not wrapped. The rotations follow
    the Cayley map from where they are, which has the same gradient as the exponential map from there, at a fraction of
    its cost: see :class:`~mtlwrap.rotations.Rotations`.

    Args:
        rotation_shape: the size of what is rotated, m: the features of a representation ``[..., m]``. If it has more,
            the first m are rotated and the others left as they are (the cost of a step grows like :math:`T m^3`). A
            shape of several dimensions is rotated as one.
        post_shape: the trailing dimensions that are not rotated: ``RotateOnly(channels, post_shape=(height, width))``
            rotates the channels of a map ``[B, channels, height, width]``. Only their number counts.
        normalize_losses: divide each loss by its first value, for heads and backbone.
        burn_in_period: after so many calls the first value is taken anew.

    Raises:
        TypeError, ValueError: an argument is not of the stated kind or range; in the forward, the representation has
            fewer dimensions or features.

    Shape:
        alone, ``matrix``: ``[T, n]``, a task's gradient per row; the result is ``[n]``, without any rotation.

    Note:
        If the representation holds several tensors, the first is rotated.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mtlwrap import MultiTaskModel
        >>> model = MultiTaskModel(nn.Linear(4, 6), [nn.Linear(6, 1), nn.Linear(6, 2)], RotateOnly(6))
        >>> model.balancer.rotations.matrices().shape
        torch.Size([2, 6, 6])
        >>> len(model.param_groups(lr=1e-3, balancer_lr=5e-4))
        2
    """

    rotations: Rotations | None
    first_losses: FirstLosses

    def __init__(
        self,
        rotation_shape: int | Sequence[int],
        *,
        post_shape: Sequence[int] = (),
        normalize_losses: bool = False,
        burn_in_period: int = 20,
    ) -> None:
        super().__init__()
        self.rotation_shape = _checked_shape("rotation_shape", rotation_shape)
        if not self.rotation_shape:
            raise ValueError("rotation_shape: expected at least one dimension, got none.")
        self.post_shape = _checked_shape("post_shape", post_shape)
        self.normalize_losses = flag("normalize_losses", normalize_losses)
        self.burn_in_period = integer("burn_in_period", burn_in_period, least=0)
        self.rotations = None
        # Whether the next transform is of the forward that settled the rotations, and whether the last one was.
        self._settled = False
        self._at_base = True
        self.first_losses = FirstLosses(burn_in_period)

    def bind(self, num_tasks: int) -> None:
        """See :meth:`Balancer.bind`; here the rotations are made."""
        super().bind(num_tasks)
        if self.rotations is None:
            self.rotations = Rotations(num_tasks, math.prod(self.rotation_shape))
            self._allocate()

    def reset(self) -> None:
        """No rotation, and no memory of losses. An optimizer's memory of the angles is the optimizer's to clear."""
        if self.rotations is not None:
            self.rotations.reset()
        self._allocate()

    def prepare(self, representation: Sequence[Tensor]) -> None:
        """See :meth:`Balancer.prepare`; the rotations take the optimizer's last step."""
        if self.rotations is not None:
            self._check(representation[0])
            self.rotations.settle()
            self._settled = True

    @property
    def transforms(self) -> bool:
        """Heads get the rotated representation."""
        return True

    def transform(self, tensors: Sequence[Tensor], tasks: Sequence[int]) -> list[Tensor]:
        """The rotated representation of each task."""
        if self.rotations is None:
            raise unbound(self)
        self._check(tensors[0])
        # Only right after prepare is the base where the optimizer has taken the rotations. A copy, for the next step
        # writes there, perhaps before this one has run backward.
        matrices = self.rotations.base.clone() if self._settled else self.rotations.matrices()
        self._at_base, self._settled = self._settled, False
        return [self._rotated(tensor, matrices[task]) for tensor, task in zip(tensors, tasks, strict=True)]

    @property
    def scales_losses(self) -> bool:
        """Only if they are normalised."""
        return self.normalize_losses

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The sum of the losses, each divided by its first value if that is asked for."""
        return (losses / self.first_losses.of(losses, tasks)).sum() if self.normalize_losses else losses.sum()

    def weigh(self, gradients: TaskGradients) -> Tensor:
        """One for each task that takes part; see :meth:`Balancer.weigh`."""
        self.first_losses.take(gradients)
        return widest(gradients.active)

    def undo_scalarize(self) -> Undo | None:
        """None: normalised losses are read, and kept by :meth:`weigh`."""
        return None

    def undo_weigh(self) -> Undo | None:
        """All buffers but for the rotations', which the forward moves to where the optimizer has taken them."""
        return Kept(self, self.rotations)

    def own_gradients(self, gradients: TaskGradients) -> dict[str, Tensor]:
        """The gradient of the rotation objective on the angles; zero for a task that takes no part."""
        if self.rotations is None:
            return {}
        pull = self._planar(gradients.weighted_sum_on(self._mean_direction(gradients)))
        products = torch.zeros_like(self.rotations.base)
        for task in range(gradients.num_tasks):
            gradient = gradients.on_tensor(task)
            if gradient is not None:
                products[task] = torch.einsum("bip,bjp->ij", self._planar(gradient), pull)
        products = gradients.pooled(products)
        on_angles = self.rotations.angle_gradients(-2.0 * products, at_base=self._at_base)
        return {"rotations.angles": on_angles.to(self.rotations.angles.dtype)}

    def extra_repr(self) -> str:
        """The options that are set."""
        shown = [str(self.rotation_shape[0] if len(self.rotation_shape) == 1 else self.rotation_shape)]
        shown += [f"post_shape={self.post_shape}"] if self.post_shape else []
        shown += [f"normalize_losses=True, burn_in_period={self.burn_in_period}"] if self.normalize_losses else []
        return ", ".join(shown)

    def _mean_direction(self, gradients: TaskGradients) -> Tensor:
        """The weights that make the target direction of the tasks' gradients, ``[T]``."""
        active, norms = gradients.active, gradients.norms
        count = active.sum()
        mean = (gradients.gramian.sum().clamp(min=0.0)).sqrt() / count
        return torch.where(norms > 0, mean / (count * torch.where(norms > 0, norms, 1.0)), norms * 0.0)

    def _planar(self, gradient: Tensor) -> Tensor:
        """What is rotated of a tensor, as ``[B, m, positions]``."""
        size = math.prod(self.rotation_shape)
        return self._flat(gradient)[..., :size, :].flatten(end_dim=-3)

    def _flat(self, tensor: Tensor) -> Tensor:
        """A tensor as ``[..., features, positions]``."""
        post, rotated = len(self.post_shape), len(self.rotation_shape)
        leading = tensor.shape[: tensor.dim() - post - rotated]
        positions = math.prod(tensor.shape[tensor.dim() - post :])
        # Without a batch dimension there is one sample.
        features = math.prod(tensor.shape[len(leading) : tensor.dim() - post])
        return tensor.reshape(*(leading or (1,)), features, positions)  # not -1, for a batch can be empty

    def _rotated(self, tensor: Tensor, matrix: Tensor) -> Tensor:
        flat, size = self._flat(tensor), math.prod(self.rotation_shape)
        matrix = matrix.to(tensor.dtype)
        if flat.shape[-1] == 1:
            turned = flat[..., :size, 0] @ matrix.mT
            turned = turned[..., None]
        else:
            turned = matrix @ flat[..., :size, :]
        if size < flat.shape[-2]:
            turned = torch.cat([turned, flat[..., size:, :].to(turned.dtype)], dim=-2)
        return turned.reshape(tensor.shape)

    def _check(self, tensor: Tensor) -> None:
        size, post, rotated = math.prod(self.rotation_shape), len(self.post_shape), len(self.rotation_shape)
        features = math.prod(tensor.shape[max(0, tensor.dim() - post - rotated) : tensor.dim() - post])
        if tensor.dim() < post + rotated or features < size or (rotated > 1 and features != size):
            raise ValueError(
                f"{type(self).__name__}: expected a representation of at least {size} features in the shape [..., "
                f"{', '.join(map(str, self.rotation_shape + self.post_shape))}], got {tuple(tensor.shape)}."
            )
        if tensor.dim() > 3 and post == 0 and tensor.shape[-1] != size == tensor.shape[1]:
            raise ValueError(
                f"{type(self).__name__}: a representation of shape {tuple(tensor.shape)} would be rotated along its "
                f"last dimension. For its {size} channels give the dimensions behind them: "
                f"post_shape={tuple(tensor.shape[2:])}."
            )
        if tensor.is_complex():
            raise ValueError(f"{type(self).__name__}: expected a real representation, got {tensor.dtype}.")

    def _allocate(self) -> None:
        self.first_losses.allocate(self.num_tasks or 0)


def _checked_shape(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else shape
    if not isinstance(sizes, Sequence) or not all(map(is_integer, sizes)):
        raise TypeError(f"{name}: expected an int or a sequence of ints, got {shape!r}.")
    if any(size < 1 for size in sizes):
        raise ValueError(f"{name}: expected sizes of at least 1, got {shape!r}.")
    return tuple(sizes)
