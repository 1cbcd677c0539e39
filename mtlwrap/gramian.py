"""The inner products of long vectors, added up in float64, at little more memory than the vectors take themselves."""

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

# Columns of the gradient matrix that are handled at once: small enough to stay in a processor's cache.
_BLOCK = 1 << 15
# How many products are added up in float32, on a CPU: few enough for rounding that does not cancel. And how many rows
# are multiplied at once: with more the same library adds up worse, and takes longer.
_SHORT = 512
_ROWS = 8


def add_gramian(total: Tensor, rows: Sequence[Tensor | None]) -> None:
    """Add the inner products of equally long vectors to ``total``, in blocks that are converted to its precision."""
    row = next((row for row in rows if row is not None), None)
    if row is not None and len(rows) > 3 and _suits_single_precision(row):
        _add_large(total, rows)
    elif row is not None:
        for piece in _blocks(rows, row, total.new_zeros(len(rows), _width(len(rows), row))):
            total.addmm_(piece, piece.T)


def _add_large(total: Tensor, rows: Sequence[Tensor | None]) -> None:
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
