"""The inner products of long vectors, added up in float64, at little more memory than the vectors take themselves."""

from collections.abc import Iterator, Sequence

from torch import Tensor

# Columns of the gradient matrix that are handled at once: small enough to stay in a processor's cache.
_BLOCK = 1 << 15


def add_gramian(total: Tensor, rows: Sequence[Tensor | None]) -> None:
    """Add the inner products of equally long vectors to ``total``, in blocks that are converted to its precision.

    Not in float32 first, however short the pieces: on some processors products of numbers of one sign are then so far
    off that parallel vectors seem not to be parallel.
    """
    row = next((row for row in rows if row is not None), None)
    if row is None:
        return
    block = total.new_zeros(len(rows), _width(len(rows), row))
    for piece in _blocks(rows, row.numel(), block):
        total.addmm_(piece, piece.T)


def _blocks(rows: Sequence[Tensor | None], length: int, block: Tensor) -> Iterator[Tensor]:
    """The vectors in pieces, ``[T, width]``; the same memory is used for each."""
    width = max(1, block.shape[1])
    matrix = _matrix(rows)
    sources: Sequence[tuple[int | slice, Tensor | None]] = list(enumerate(rows))
    if matrix is not None:  # all in one operation
        sources = [(slice(None), matrix)]
    for start in range(0, length, width):
        piece = block[:, : min(width, length - start)]
        for index, source in sources:
            if source is not None:
                piece[index].copy_(source[..., start : start + width])
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
