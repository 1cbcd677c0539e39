"""The tasks' gradients on the shared parameters, each as one long row: what is done with them is then done once."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from mtlwrap.processes import Ranks
from mtlwrap.vectors import plain, weighted_sum


class Rows:
    """A row for each task that takes part, in a matrix for each run of parameters of one type on one device.

    A network can have hundreds of parameters, and what costs microseconds for one of them costs more than the backward
    pass for all tasks and parameters. The columns stand in the parameters' order.

    Args:
        parameters: the shared parameters.
        taking_part: for each task, whether it takes part in this step.
    """

    def __init__(self, parameters: Sequence[Tensor], taking_part: Sequence[bool]) -> None:
        runs = groupby(parameters, key=lambda parameter: (parameter.dtype, parameter.device))
        self._runs = [_Run(list(run), sum(taking_part)) for _, run in runs]
        self._taking_part = tuple(taking_part)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy the gradients of the next task that takes part; None where it does not reach a parameter."""
        start = 0
        for run in self._runs:
            run.add(gradients[start : (start := start + len(run.parameters))])

    def fill(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy the gradients of all tasks that take part, stacked for each parameter."""
        start = 0
        for run in self._runs:
            run.fill(gradients[start : (start := start + len(run.parameters))])

    def average(self, ranks: Ranks) -> None:
        """Replace the rows by their means over the processes; what is missing in one counts 0 there."""
        for run in self._runs:
            run.average(ranks)

    def parts(self) -> list[list[Tensor | None]]:
        """For each run of parameters the gradient of each task, as a vector; None for a task that takes no part."""
        return [spread(run.matrix, self._taking_part) for run in self._runs]

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """The weighted sum of the rows, in the parameters' shapes; None for one that no task reaches."""
        sums = zip(self.parts(), self._runs, strict=True)
        return self.shaped([weighted_sum(part, run.matrix.dtype, weights).to(run.matrix.dtype) for part, run in sums])

    def shaped(self, shared: Sequence[Tensor]) -> list[Tensor | None]:
        """The shared gradient, a vector for each run, in the parameters' shapes; None for one that no task reaches."""
        return [gradient for run, vector in zip(self._runs, shared, strict=True) for gradient in run.shaped(vector)]


class _Run:
    """The rows of neighbouring parameters of one type on one device."""

    def __init__(self, parameters: Sequence[Tensor], num_rows: int) -> None:
        self.parameters = parameters
        self._sizes = [parameter.numel() for parameter in parameters]
        self.matrix = parameters[0].detach().new_empty(num_rows, sum(self._sizes))
        self._reached = [False] * len(parameters)
        # Of sparse gradients, how many of their dimensions are: an optimizer may want them back as they came.
        self._sparse: dict[int, int] = {}
        self._filled = 0

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        with torch.no_grad():
            pieces = [
                self.matrix.new_zeros(size) if (dense := plain(gradient)) is None else dense.reshape(-1)
                for gradient, size in zip(gradients, self._sizes, strict=True)
            ]
            torch.cat(pieces, out=self.matrix[self._filled])
        self._sparse |= {n: g.sparse_dim() for n, g in enumerate(gradients) if g is not None and g.is_sparse}
        self._filled += 1
        self._reached = [r or gradient is not None for r, gradient in zip(self._reached, gradients, strict=True)]

    def fill(self, gradients: Sequence[Tensor | None]) -> None:
        rows = self.matrix.shape[0]
        with torch.no_grad():
            pieces = [
                self.matrix.new_zeros(rows, size) if (dense := plain(gradient)) is None else dense.reshape(rows, -1)
                for gradient, size in zip(gradients, self._sizes, strict=True)
            ]
            torch.cat(pieces, 1, out=self.matrix)
        self._reached = [gradient is not None for gradient in gradients]

    def average(self, ranks: Ranks) -> None:
        self.matrix = ranks.mean(self.matrix)
        self._reached = [True] * len(self.parameters)  # in one of the processes, as far as is known here

    def shaped(self, shared: Tensor) -> list[Tensor | None]:
        pieces = zip(shared.split(self._sizes), self.parameters, self._reached, strict=True)
        found = [piece.view(parameter.shape) if reached else None for piece, parameter, reached in pieces]
        for position, dimensions in self._sparse.items():
            if (gradient := found[position]) is not None:
                found[position] = gradient.to_sparse(dimensions)
        return found


def spread(matrix: Tensor, taking_part: Sequence[bool]) -> list[Tensor | None]:
    """The rows, each at the place of its task; None for a task that takes no part."""
    rows = iter(matrix.unbind())
    return [next(rows) if present else None for present in taking_part]
