"""What a gradient balancer sees of a step: one gradient per task, and what follows from them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mtlwrap.gramian import add_gramian
from mtlwrap.processes import Ranks
from mtlwrap.surroundings import without_autocast
from mtlwrap.vectors import plain, weighted_sum, widest_dtype


class Unmade(Protocol):
    """Gradients that are made when they are asked for, and whose inner products are known without them."""

    @property
    def like(self) -> Tensor:
        """Of their type, on their device."""

    def parts(self) -> Sequence[Sequence[Tensor | None]]:
        """The gradients, as :meth:`TaskGradients.from_parts` takes them."""

    def short_parts(self) -> Sequence[Sequence[Tensor | None]]:
        """Others with the same inner products."""


class TaskGradients:
    r"""The gradients :math:`g_1, \dots, g_T` of the tasks' losses with respect to the shared representation.

    It is the only thing that a :class:`~mtlwrap.GradientBalancer` sees. Everything in it is computed when it is
    first asked for, once, without a graph, without autocast, and without synchronising with the host.

    The gradients are those of the losses as they entered the total: with the factor that a loss balancer gave them
    (``loss_factors``), which a gradient balancer is meant to see, but without what a trainer multiplied the total
    with (a loss scale, a division by accumulation steps). A task that takes no part in the step has a gradient of
    zero. Several tensors in the representation count as one long vector.

    Inner products are accumulated in float64 (float32 on devices that have no float64), whatever the gradients'
    own precision and whatever precision is allowed for matrix products elsewhere: a sum of squares of float32
    numbers then neither overflows nor loses the small ones.

    Args:
        matrix: the gradients as rows, ``[T, n]``, floating point.
        losses: the tasks' losses, ``[T]``, or None where they are not known.

    Raises:
        TypeError: ``matrix`` is not a floating-point tensor.
        ValueError: ``matrix`` is not two-dimensional or has no row, or ``losses`` has another length.

    Example:
        >>> import torch
        >>> gradients = TaskGradients(torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0]]))
        >>> gradients.norms.tolist()
        [3.0, 4.0, 5.0]
        >>> gradients.cosines[0].tolist()
        [1.0, 0.0, 0.6]
    """

    def __init__(self, matrix: Tensor, losses: Tensor | None = None) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"matrix: expected a floating-point tensor of shape [tasks, n], got {kind}.")
        if matrix.dim() != 2 or matrix.shape[0] == 0:
            raise ValueError(f"matrix: expected the shape [tasks, n] with a row per task, got {tuple(matrix.shape)}.")
        if losses is not None and losses.shape != matrix.shape[:1]:
            raise ValueError(f"losses: expected the shape [{matrix.shape[0]}], got {tuple(losses.shape)}.")
        self._fill([list(matrix.unbind())], [True] * matrix.shape[0], losses, None)
        self._has_batch = False

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[Sequence[Tensor | None]] | Unmade,
        taking_part: Sequence[bool],
        losses: Tensor | None = None,
        scale: Tensor | None = None,
        loss_factors: Tensor | None = None,
        *,
        has_batch: bool = True,
        ranks: Ranks | None = None,
    ) -> "TaskGradients":
        """From gradients as autograd hands them over.

        Args:
            parts: for each tensor of the representation, the gradient of each task, None where there is none; or what
                makes them.
            taking_part: for each task, whether it takes part in this step.
            losses: the tasks' losses, ``[T]``.
            scale: what the total was multiplied with, 0-dim; it is divided out of every answer.
            loss_factors: with what factor a loss balancer let each loss into the total, ``[T]``.
            has_batch: whether the first dimension of each part is the batch; if not, the parts are vectors.
            ranks: the processes whose batches make up the step with this one's, if there are several.
        """
        gradients = cls.__new__(cls)
        gradients._fill(parts, taking_part, losses, scale)
        gradients._ranks = ranks
        gradients._loss_factors = loss_factors
        gradients._has_batch = has_batch
        return gradients

    def _fill(
        self,
        parts: Sequence[Sequence[Tensor | None]] | Unmade,
        taking_part: Sequence[bool],
        losses: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        self._taking_part = tuple(taking_part)
        self._unmade = None if isinstance(parts, Sequence) else parts
        if isinstance(parts, Sequence):
            self._parts = self._read(parts)
            first = next((g for part in self._parts for g in part if g is not None), torch.zeros(0))
        else:
            first = parts.like
        self._like = torch.view_as_real(first) if first.is_complex() else first
        self._losses = losses
        self._scale = scale
        self._loss_factors: Tensor | None = None
        self._has_batch = True
        self._ranks: Ranks | None = None
        self._released = False

    @cached_property
    def _parts(self) -> list[list[Tensor | None]]:
        """The gradients, where they are made now."""
        parts = () if self._unmade is None else self._unmade.parts()
        return self._read(parts)

    @cached_property
    def _layouts(self) -> list["_Layout"]:
        return [_Layout(part, self._like) for part in self._parts]

    def _read(self, parts: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
        return [
            [plain(gradient) if present else None for gradient, present in zip(part, self._taking_part, strict=True)]
            for part in parts
        ]

    def __repr__(self) -> str:
        return f"TaskGradients(num_tasks={self.num_tasks}{', released' if self._released else ''})"

    @property
    def num_tasks(self) -> int:
        """The number of tasks, T."""
        return len(self._taking_part)

    @property
    def taking_part(self) -> tuple[bool, ...]:
        """For each task, whether it takes part in this step: known on the host, at no synchronisation."""
        return self._taking_part

    @property
    def precision(self) -> torch.dtype:
        """The floating-point type in which the gradients arrived."""
        return self._like.dtype

    @cached_property
    def active(self) -> Tensor:
        """For each task, whether it takes part in this step: boolean, ``[T]``, on the gradients' device."""
        mask = torch.ones(self.num_tasks, dtype=torch.bool, device=self._checked().device)
        for task, present in enumerate(self._taking_part):
            if not present:
                mask[task] = False  # a fill on the device; torch.tensor(..., device=...) would synchronise
        return mask

    @cached_property
    def losses(self) -> Tensor:
        """The tasks' losses as they were given, ``[T]``; NaN where a task takes no part or they are not known."""
        self._checked()
        if self._losses is None:
            return torch.full((self.num_tasks,), torch.nan, device=self._like.device)
        return self._losses.detach()

    @cached_property
    def loss_factors(self) -> Tensor:
        r"""With what factor a loss balancer let each loss into the total, ``[T]``: ones where there is none.

        The gradients here are those of the losses as they entered the total, :math:`e^{s_t} L_t` for IMTL; divide
        ``norms`` by these factors for the norms of the raw losses' gradients.
        """
        self._checked()
        return torch.ones_like(self.losses) if self._loss_factors is None else self._loss_factors

    @cached_property
    def gramian(self) -> Tensor:
        r"""All inner products :math:`\langle g_s, g_t \rangle`: float64, ``[T, T]``."""
        raw, divisor = self._products
        return raw / divisor.square()

    @cached_property
    def norms(self) -> Tensor:
        r"""The norms :math:`\lVert g_t \rVert_2`: float64, ``[T]``; zero for a task that takes no part."""
        raw, divisor = self._products
        return raw.diagonal().sqrt() / divisor.abs()

    @cached_property
    def cosines(self) -> Tensor:
        r"""The cosines :math:`\langle g_s, g_t \rangle / \lVert g_s \rVert \lVert g_t \rVert`: float64, ``[T, T]``.

        A gradient of zero has a cosine of 0 with every other, and of 1 with itself. They do not depend on how the
        losses are scaled.
        """
        raw, _ = self._products
        norms = raw.diagonal().sqrt()
        norms = torch.where(norms == 0, 1.0, norms)
        cosines = (raw / norms[:, None] / norms[None, :]).clamp(-1.0, 1.0)
        # Exactly one on the diagonal, also for zero gradients; adding a NaN's own would hide it.
        return torch.where(torch.eye(self.num_tasks, dtype=torch.bool, device=norms.device), 1.0, cosines)

    @cached_property
    def finite(self) -> Tensor:
        """Whether every gradient is finite: boolean, 0-dim."""
        raw, _ = self._products
        return raw.diagonal().isfinite().all()

    @cached_property
    def matrix(self) -> Tensor:
        """The gradients as rows, ``[T, n]``; the columns stand in the order in which the representation lies in memory.

        Asking for it takes the memory of a copy of all gradients; nothing else here does.
        """
        like = self._checked()
        if self._ranks is not None:
            raise ValueError(
                "With several processes the gradients on the representation are spread over them, each holding those "
                'on its own batch. For a balancer that needs whole gradients use gradients="parameters".'
            )
        with _plain_arithmetic(like):
            return self._unscaled(torch.stack([self._row(task) for task in range(self.num_tasks)]))

    def batch_sums(self, feature_dim: int | None = None, rows: slice = slice(None)) -> Tensor:
        """The gradients summed over the batch, ``[T, features]``, in float32 or wider.

        These are the gradients with respect to an offset that is added to the representation of every sample, whose
        number does not depend on the size of the batch. Rows of a matrix are taken as they are.

        Args:
            feature_dim: the one dimension that is left when all others are summed; None leaves all but the first.
                Several tensors in the representation come one after the other.
            rows: only these tasks.

        Raises:
            ValueError: the representation has no such dimension.
        """
        kept = feature_dim if self._has_batch else 0
        with _plain_arithmetic(self._checked()):
            wide = torch.promote_types(self.precision, torch.float32)
            sums = self._like.new_zeros(len(range(self.num_tasks)[rows]), self.num_features(feature_dim), dtype=wide)
            for row, task in zip(sums.unbind(), range(self.num_tasks)[rows], strict=True):
                start = 0
                for part, layout in zip(self._parts, self._layouts, strict=True):
                    piece = row[start : (start := start + num_features(layout.shape, layout.dtype, kept))]
                    if (gradient := part[task]) is not None:
                        piece.copy_(_summed(gradient, kept))
            sums = sums if self._scale is None else sums.div_(self._divisor(sums))
            return sums if self._ranks is None else self._ranks.mean(sums)

    def pooled(self, products: Tensor) -> Tensor:
        """Sums over the samples of products of two gradients, from this process's samples to those of all."""
        return products if self._ranks is None else self._ranks.mean(products) / self._ranks.size

    def part(self) -> None:
        """Called when the decision is made: what was not asked by then is answered from this process alone."""
        self._ranks = None

    def num_features(self, feature_dim: int | None = None) -> int:
        """How many features :meth:`batch_sums` has."""
        self._checked()
        kept = feature_dim if self._has_batch else 0
        return sum(num_features(layout.shape, layout.dtype, kept) for layout in self._layouts)

    def on_tensor(self, task: int, index: int = 0) -> Tensor | None:
        """A task's gradient on one tensor of the representation, in its shape, in float32 or wider; None for zero."""
        self._checked()
        gradient = self._parts[index][task]
        with _plain_arithmetic(self._like):
            return None if gradient is None else self._wide(gradient)

    def weighted_sum_on(self, weights: Tensor, index: int = 0) -> Tensor:
        """The weighted sum on one tensor of the representation, in its shape, in float32 or wider."""
        self._checked()
        with _plain_arithmetic(self._like):
            return self._wide(weighted_sum(self._parts[index], self._layouts[index].dtype, weights))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        r"""The vector :math:`\sum_t w_t g_t`, ``[n]``, over the tasks that take part, for weights of shape ``[T]``.

        Raises:
            ValueError: ``weights`` has another shape.
        """
        flat = [layout.flatten(p) for layout, p in zip(self._layouts, self.scaled_sum(weights), strict=True)]
        total = flat[0] if len(flat) == 1 else torch.cat(flat)
        return self._unscaled(total)

    def release(self) -> None:
        """Free all tensors; questions are refused from then on."""
        self._released = True
        self._parts, self._unmade = [], None
        self._losses = self._scale = self._loss_factors = None
        self._like = self._like.new_zeros(0)
        for name in (
            "active",
            "losses",
            "loss_factors",
            "gramian",
            "norms",
            "cosines",
            "finite",
            "matrix",
            "_products",
        ):
            self.__dict__.pop(name, None)

    def scaled_sum(self, weights: Tensor) -> list[Tensor]:
        """The weighted sum as autograd wants it back: a gradient for each tensor of the representation.

        It is *not* divided by what the total was multiplied with: a weighted sum carries that along by itself, and
        dividing and multiplying would only cost rounding.
        """
        self._checked()
        if weights.shape != (self.num_tasks,):
            raise ValueError(f"weights: expected the shape [{self.num_tasks}], got {tuple(weights.shape)}.")
        return [
            weighted_sum(part, layout.dtype, weights.detach()).to(layout.dtype)
            for part, layout in zip(self._parts, self._layouts, strict=True)
        ]

    def scaled(self, combined: Tensor) -> list[Tensor]:
        """A combined gradient ``[n]`` as autograd wants it back: in pieces, times what the total was multiplied by."""
        if self._scale is not None:
            # The scale is float32 or wider, and may be beyond half precision's range.
            combined = (combined * self._scale.reshape(1).to(combined.device)).to(combined.dtype)
        pieces = combined.split([layout.size for layout in self._layouts])
        return [layout.unflatten(piece) for layout, piece in zip(self._layouts, pieces, strict=True)]

    def _checked(self) -> Tensor:
        if self._released:
            raise ValueError(
                "These task gradients were freed when their step ended. Ask while the `with cached():` block in "
                "which the forward ran is still open, and keep the answers."
            )
        return self._like

    def _divisor(self, like: Tensor) -> Tensor:
        if self._scale is None:
            return torch.ones((), dtype=like.dtype, device=like.device)
        scale = self._scale.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        # A total that was multiplied with zero has gradients of zero, not of 0/0.
        return torch.where(scale == 0, 1.0, scale)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        if self._scale is None:
            return gradient
        # A divisor of one dimension takes a half-precision gradient to float32: the scale can be beyond half's range.
        return (gradient / self._divisor(gradient).reshape(1)).to(gradient.dtype)

    def _wide(self, gradient: Tensor) -> Tensor:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return wide if self._scale is None else wide / self._divisor(wide)

    def _row(self, task: int) -> Tensor:
        pieces = []
        for part, layout in zip(self._parts, self._layouts, strict=True):
            gradient = part[task]
            pieces.append(self._like.new_zeros(layout.size) if gradient is None else layout.flatten(gradient))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        """All inner products, and what to divide the gradients in them by."""
        raw = self._products_here()
        divisor = self._divisor(raw)
        return (
            (raw, divisor) if self._ranks is None else (self.pooled(raw / divisor.square()), torch.ones_like(divisor))
        )

    def _products_here(self) -> Tensor:
        like = self._checked()
        with _plain_arithmetic(like):
            total = torch.zeros(self.num_tasks, self.num_tasks, dtype=widest_dtype(like.device), device=like.device)
            parts, layouts = self._parts_of_products()
            for part, layout in zip(parts, layouts, strict=True):
                rows = [None if g is None else layout.flatten(g.detach()) for g in part]
                add_gramian(total, rows)
            # On some processors a product of a matrix with its own transpose is symmetric but for rounding. That would
            # tell parallel gradients apart.
            return (total + total.T) / 2

    def _parts_of_products(self) -> tuple[list[list[Tensor | None]], list["_Layout"]]:
        if self._unmade is None or "_parts" in vars(self):
            return self._parts, self._layouts
        parts = self._read(self._unmade.short_parts())
        return parts, [_Layout(part, self._like) for part in parts]


class _Layout:
    """How one tensor of the representation is read as a vector: in memory order, so that reading it copies nothing."""

    def __init__(self, part: Sequence[Tensor | None], like: Tensor) -> None:
        # Where no task sent a gradient there is nothing to read: a vector of length zero.
        example = next((gradient for gradient in part if gradient is not None), like.new_zeros(0))
        self.dtype = example.dtype
        self.shape = example.shape
        self.size = example.numel() * (2 if example.is_complex() else 1)
        self._order = tuple(sorted(range(example.dim()), key=example.stride, reverse=True))
        self._inverse = tuple(sorted(range(example.dim()), key=self._order.__getitem__))
        self._shape = example.permute(self._order).shape

    def flatten(self, gradient: Tensor) -> Tensor:
        flat = gradient.permute(self._order).reshape(-1)
        return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat

    def unflatten(self, flat: Tensor) -> Tensor:
        if self.dtype.is_complex:
            flat = torch.view_as_complex(flat.reshape(-1, 2))
        return flat.reshape(self._shape).permute(self._inverse)


def num_features(shape: Sequence[int], dtype: torch.dtype, feature_dim: int | None) -> int:
    """How many numbers are left of a tensor of the representation when its gradient is summed over the batch.

    Raises:
        ValueError: it has no dimension ``feature_dim``.
    """
    if feature_dim is not None and not -len(shape) <= feature_dim < len(shape):
        raise ValueError(f"feature_dim={feature_dim} is no dimension of a representation of shape {tuple(shape)}.")
    kept = math.prod(shape[1:]) if feature_dim is None else shape[feature_dim]
    return 2 * kept if dtype.is_complex else kept


def _summed(gradient: Tensor, feature_dim: int | None) -> Tensor:
    """The sum over all dimensions but one, or over the first; as real numbers, in one dimension."""
    count = gradient.dim()
    others = [0][:count] if feature_dim is None else [d for d in range(count) if d != feature_dim % count]
    wide = torch.promote_types(gradient.dtype, torch.float32)
    summed = (gradient.sum(others, dtype=wide) if others else gradient.to(wide)).reshape(-1)
    return torch.view_as_real(summed).reshape(-1) if summed.is_complex() else summed


@contextmanager
def _plain_arithmetic(like: Tensor) -> Iterator[None]:
    """Statistics carry no graph, and are in full precision."""
    with torch.no_grad(), without_autocast(like.device.type):
        yield
