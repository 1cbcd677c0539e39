"""A trainable rotation per task: orthogonal matrices that an ordinary optimizer moves."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from mtlwrap.surroundings import without_autocast

# Of a step of the angles, as a vector.
_LONGEST = 1e3


class Rotations(nn.Module):
    r"""T rotations of m dimensions, ``[T, m, m]``, which start at the identity.

    What the optimizer moves are angles, the entries below the diagonal of a skew-symmetric :math:`A_k`. Around the
    rotation :math:`Q_k` at which the angles were :math:`A_k^0` the rotation is

    .. math:: R_k = Q_k \left(I - \tfrac12 \Delta\right)^{-1} \left(I + \tfrac12 \Delta\right),
        \qquad \Delta = A_k - A_k^0

    the Cayley map, which is a rotation for every :math:`\Delta` and agrees with the exponential map to second order.
    :meth:`settle`, before each training step, moves :math:`Q_k` to where the rotation is: then :math:`\Delta` is one
    step of the optimizer and no more, and the gradient of a function f of :math:`R_k` with respect to the angles is
    just :math:`P = R_k^\top \partial f / \partial R_k` minus its transpose, with no map to differentiate through.
    (Elsewhere, as in evaluation mode, where nothing is moved, P is to be replaced by
    :math:`(I - \tfrac12 \Delta)^{-1} P \, (I - \tfrac12 \Delta)^{-\top}`.) The angles themselves are not touched:
    nothing is taken from under an optimizer, an average of weights or a sharding. One Newton-Schulz step removes what
    rounding adds up to over a training.

    Attributes:
        angles: ``[T, m (m - 1) / 2]``, learned.
        base: :math:`Q`, ``[T, m, m]``.
        anchor: :math:`A^0`, as ``angles``.
    """

    base: Tensor
    anchor: Tensor

    def __init__(self, num_tasks: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.angles = nn.Parameter(torch.zeros(num_tasks, size * (size - 1) // 2))
        self.register_buffer("base", torch.eye(size).repeat(num_tasks, 1, 1))
        self.register_buffer("anchor", torch.zeros_like(self.angles))

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the identity."""
        self.angles.zero_()
        self.anchor.zero_()
        self.base.copy_(torch.eye(self.size, dtype=self.base.dtype, device=self.base.device))

    @torch.no_grad()
    def settle(self) -> None:
        """Take the rotations of now as the base for the next step."""
        # In place: a CUDA graph reads and writes where they were when it was captured.
        self.base.copy_(self.matrices())
        self.anchor.copy_(self.angles)

    @torch.no_grad()
    def matrices(self) -> Tensor:
        """The rotations, ``[T, m, m]``; autocast, which a forward runs under, would make them rotations no more."""
        with without_autocast(self.base.device.type):
            return self._turned()

    def _turned(self) -> Tensor:
        delta = self._delta()
        moved = 2.0 * self._halfway(delta, self.base) - self.base
        moved = torch.baddbmm(moved, moved, moved.mT @ moved, beta=1.5, alpha=-0.5)
        # To the bit the same where nothing moved: several forwards to a step, a task that is absent.
        moves = (delta != 0).any(1) & moved.isfinite().all(2).all(1)
        return torch.where(moves[:, None, None], moved, self.base)

    def _delta(self) -> Tensor:
        """How far the angles are from where the base is."""
        delta: Tensor = self.angles.to(self.base.dtype) - self.anchor
        # A step that long is none, and would not leave a rotation.
        bounded: Tensor = delta * (_LONGEST / delta.norm(dim=1, keepdim=True).clamp(min=_LONGEST))
        return bounded

    def _halfway(self, delta: Tensor, matrices: Tensor) -> Tensor:
        """The matrices, times the inverse of I - A/2 from the right."""
        identity = torch.eye(self.size, dtype=self.base.dtype, device=self.base.device)
        # solve_ex: without a check of the result, for which the host would have to wait. It cannot fail: the
        # eigenvalues of I - A/2 have a real part of one.
        solved: Tensor = torch.linalg.solve_ex(identity - 0.5 * self._skew(delta), matrices, left=False).result
        return solved

    @torch.no_grad()
    def angle_gradients(self, products: Tensor, *, at_base: bool = True) -> Tensor:
        r"""The gradient on the angles.

        Args:
            products: :math:`R_k^\top \partial f / \partial R_k`, ``[T, m, m]``.
            at_base: whether the rotations are where they were settled, which spares solving for the way from there.
        """
        if not at_base:
            back = -self._delta()
            # From the right, and from the left by way of the transpose.
            products = self._halfway(back, self._halfway(back, products.to(back)).mT).mT
        rows, columns = _below_diagonal(self.size, products.device)
        return (products - products.mT)[:, rows, columns]

    def _skew(self, angles: Tensor) -> Tensor:
        rows, columns = _below_diagonal(self.size, angles.device)
        lower = angles.new_zeros(angles.shape[0], self.size, self.size)
        lower[:, rows, columns] = angles
        return lower - lower.mT


@lru_cache(maxsize=32)
def _below_diagonal(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The positions below the diagonal; kept, for index tensors are not to be copied to a device in every step."""
    with torch.inference_mode(False):
        rows, columns = torch.tril_indices(size, size, -1, device=device)
    return rows, columns
