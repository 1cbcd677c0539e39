"""What a gradient balancer sees of a step: one gradient per task, and what follows from them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Protocol

import torch
from torch import Tensor

from mtlwrap.processes import Ranks
from mtlwrap.surroundings import without_autocast

# Columns of the gradient matrix that are handled at once: small enough to stay in a processor's cache.
_BLOCK = 1 << 15
# How many products are added up in float32, on a CPU: few enough for rounding that does not cancel. And how many rows
# are multiplied at once: with more the same library adds up worse, and takes longer.
_SHORT = 512
_ROWS = 8


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
    numbers then neither overflows nor loses the small ones. On a CPU long float32 gradients of four tasks or more are
    multiplied in float32, brought to a size of about one, and every 512 products are added up in float64.

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
                _add_gramian(total, rows)
            return total

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


def _add_gramian(total: Tensor, rows: Sequence[Tensor | None]) -> None:
    """Add the inner products of equally long vectors to ``total``, in blocks that are converted to its precision."""
    row = next((row for row in rows if row is not None), None)
    if row is not None and len(rows) > 3 and _suits_single_precision(row):
        _add_large_gramian(total, rows)
    elif row is not None:
        for piece in _blocks(rows, row, total.new_zeros(len(rows), _width(len(rows), row))):
            total.addmm_(piece, piece.T)


def _add_large_gramian(total: Tensor, rows: Sequence[Tensor | None]) -> None:
    """The same for long float32 vectors: short products in float32, their sum in float64.

    A cosine is off by some 1e-6 at most, also where all entries have one sign and rounding does not cancel; whatever
    the norms, for each vector is brought to a size of about one.
    """
    row = next(row for row in rows if row is not None)
    sizes = _sizes([row.new_zeros(1) if r is None else r for r in rows])
    sums = torch.zeros_like(total)
    for piece in _blocks(rows, row, row.new_zeros(len(rows), 2 * _BLOCK), sizes.reciprocal()[:, None]):
        whole = piece.shape[1] // _SHORT * _SHORT
        short = piece[:, :whole].unflatten(1, (-1, _SHORT)).transpose(0, 1).split(_ROWS, 1)
        for first, second in combinations_with_replacement(range(len(short)), 2):
            products = torch.bmm(short[first], short[second].mT).sum(0, dtype=total.dtype)
            at = sums[first * _ROWS :, second * _ROWS :]
            at[: products.shape[0], : products.shape[1]].add_(products)
        rest = piece[:, whole:].to(total.dtype)
        sums.addmm_(rest, rest.T)
    sizes = sizes.to(total.dtype)
    # Only the products above the diagonal were made, and those of the rest of a block, which are all.
    sums = sums.triu().add_(sums.triu(1).T)
    total.add_(sums.mul_(sizes).mul_(sizes[:, None]))


def _blocks(
    rows: Sequence[Tensor | None], like: Tensor, block: Tensor, factors: Tensor | None = None
) -> Iterator[Tensor]:
    """The vectors in pieces, ``[T, width]``, times their factors, ``[T, 1]``; the same memory is used for each."""
    length, width = like.numel(), max(1, block.shape[1])
    matrix = _matrix(rows)
    sources: Sequence[tuple[int | slice, Tensor | None]] = list(enumerate(rows))
    if matrix is not None:  # all in one operation
        sources = [(slice(None), matrix)]
    for start in range(0, length, width):
        piece = block[:, : min(width, length - start)]
        for index, source in sources:
            if source is None:
                continue
            taken = source[..., start : start + width]
            if factors is None:
                piece[index].copy_(taken)
            else:
                torch.mul(taken, factors[index], out=piece[index])
        yield piece


def _matrix(rows: Sequence[Tensor | None]) -> Tensor | None:
    """The matrix that these are the rows of, if they are the rows of one."""
    base = None if rows[0] is None else rows[0]._base
    if base is None or base.dim() != 2 or base.shape[0] != len(rows):
        return None
    for index, row in enumerate(rows):
        if row is None or row._base is not base or row.shape != base.shape[1:] or row.stride() != base.stride()[1:]:
            return None
        if row.storage_offset() != base.storage_offset() + index * base.stride(0):
            return None
    return base.detach()


def _width(num_rows: int, row: Tensor) -> int:
    """How many columns are worked on at once: a fraction of long vectors, a megabyte of short ones."""
    length = row.numel()
    if row.device.type != "cpu":  # large blocks keep an accelerator busy; on a CPU small ones stay in the cache
        return min(length, max(_BLOCK, (_BLOCK << 9) // num_rows))
    return min(length, _BLOCK, max(length // 16, (1 << 17) // num_rows))


def _suits_single_precision(row: Tensor) -> bool:
    """Whether products in float32 do: on a CPU, where they are several times as fast, and are what they are called."""
    long = row.numel() >= 2 * _BLOCK
    return long and row.is_cpu and row.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _sizes(rows: Sequence[Tensor]) -> Tensor:
    """About the largest entry of each, ``[T]``; a power of two, so that dividing by it rounds nothing."""
    # Several times as fast as the norm of the same name, and as the same over a matrix.
    ends = [torch.aminmax(row) for row in rows]
    largest = torch.maximum(-torch.stack([end.min for end in ends]), torch.stack([end.max for end in ends]))
    _, exponent = torch.frexp(largest)
    return torch.where((largest > 0) & largest.isfinite(), torch.exp2(exponent.clamp(-126, 126)), 1.0)


def weighted_sum(part: Sequence[Tensor | None], dtype: torch.dtype, weights: Tensor) -> Tensor:
    """The weighted sum of gradients of this type on one tensor, last task first: the order in which autograd adds."""
    # Half-precision gradients are summed in float32, where a weight beyond half's range is still a number.
    wide = torch.promote_types(dtype, torch.float32)
    columns = weights.to(_real(wide)).unbind()
    total: Tensor | None = None
    for gradient, weight in zip(reversed(part), reversed(columns), strict=True):
        if gradient is None:
            continue
        if total is None:
            total = gradient.to(wide) * weight
        else:
            total.addcmul_(gradient.to(wide), weight)
    return weights.new_zeros(0, dtype=wide) if total is None else total


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def widest(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in float32 on a device that has no float64."""
    return tensor.to(widest_dtype(tensor.device))


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float64 if has_float64(device) else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether a device has float64."""
    return device.type != "mps"


def plain(gradient: Tensor | None) -> Tensor | None:
    """Dense, and with its conjugation carried out, so that it can be read as it lies in memory."""
    if gradient is None:
        return None
    return (gradient if gradient.layout == torch.strided else gradient.to_dense()).resolve_conj()


def completed(
    part: Sequence[Tensor | None],
    taking_part: Sequence[bool],
    shape: Sequence[int],
    like: tuple[torch.dtype, torch.device],
) -> list[Tensor | None]:
    """The tasks' gradients on one tensor; if there is none, with zeros for a task, so that the length is known."""
    filled = list(part)
    if not any(present and gradient is not None for gradient, present in zip(part, taking_part, strict=True)):
        dtype, device = like
        filled[list(taking_part).index(True)] = torch.zeros((), dtype=dtype, device=device).expand(*shape)
    return filled


@contextmanager
def _plain_arithmetic(like: Tensor) -> Iterator[None]:
    """Statistics carry no graph, and are in full precision."""
    with torch.no_grad(), without_autocast(like.device.type):
        yield
