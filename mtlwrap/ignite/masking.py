"""Which rows of a batch have a label of which task, at one wait for the device at most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.utils import apply_to_tensor
from torch import Tensor

# What a batch brings for all tasks: by name, in order, or as the columns of a tensor.
Targets = Mapping[str, Any] | Sequence[Any] | Tensor

# That of a class in torch's own losses, and the one that is written by hand.
IGNORED = (-1, -100)


@dataclass(frozen=True)
class Rows:
    """Which rows have a label of a task.

    Attributes:
        present: whether any has.
        index: which they are, ``[n]``; None for all of them.
        total: how many rows there are.
    """

    present: bool
    index: Tensor | None = None
    total: int = 0


@dataclass(frozen=True)
class Masking:
    """What counts as no label: NaN in floating-point targets, 0 and 1 of a BCE among them, ``ignored`` in integer ones.

    Attributes:
        tasks: the tasks' names, in order.
        ignored: the integers that are no label.
    """

    tasks: tuple[str, ...]
    ignored: tuple[int, ...] = IGNORED

    def split(self, targets: Targets) -> list[Any]:
        """The target of each task, in order; None where there is none.

        Raises:
            TypeError: ``targets`` is no mapping, sequence or tensor.
            ValueError: its names, its length or its shape do not fit the tasks.
        """
        if isinstance(targets, Mapping):
            return self._by_name(targets)
        if isinstance(targets, Tensor):
            if targets.dim() < 2 or targets.shape[1] != len(self.tasks):
                raise ValueError(
                    f"targets: expected a tensor of shape [B, {len(self.tasks)}], a column for each of the tasks "
                    f"{_listed(self.tasks)}, got the shape {tuple(targets.shape)}."
                )
            return list(targets.unbind(1))
        if not isinstance(targets, Sequence) or isinstance(targets, str | bytes):
            raise TypeError(
                "targets: expected a mapping by task name, a sequence in the tasks' order or a tensor [B, T], got "
                f"{type(targets).__name__}."
            )
        if len(targets) != len(self.tasks):
            raise ValueError(
                f"targets: expected {len(self.tasks)}, one for each of the tasks {_listed(self.tasks)} (None for one "
                f"without a label), got {len(targets)}."
            )
        return list(targets)

    def rows(self, targets: Sequence[Any]) -> list[Rows]:
        """For the target of each task, which rows have a label.

        The numbers of rows come to the host together: for targets on a device it waits once, for those on the host
        never. A target that is no tensor, or one that is 0-dim, is a label as a whole; one of 0 rows is none.
        """
        known = {task: mask for task, target in enumerate(targets) if (mask := self._known(target)) is not None}
        if not known:
            return [Rows(_is_label(target)) for target in targets]
        device = next(iter(known.values())).device
        counts = torch.stack([mask.sum().to(device) for mask in known.values()]).tolist()
        found = {task: _rows(mask, count) for (task, mask), count in zip(known.items(), counts, strict=True)}
        return [found.get(task, Rows(_is_label(target))) for task, target in enumerate(targets)]

    def take(self, task: int, prediction: Any, target: Any, rows: Rows) -> tuple[Any, Any]:
        """Prediction and target of the rows that have a label; both as they are if all have.

        Raises:
            TypeError: rows are to be dropped from a prediction that holds something else than tensors.
            ValueError: a tensor of the prediction has another number of rows.
        """
        if rows.index is None:
            return prediction, target
        index, total, name = rows.index, rows.total, self.tasks[task]

        def chosen(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0:
                return tensor
            if tensor.shape[0] != total:
                raise ValueError(
                    f"The prediction of task {name!r} has a tensor of shape {tuple(tensor.shape)}, and the target "
                    f"{total} rows, some without a label: expected {total} rows to choose from. For a loss that "
                    "chooses by itself give the target in a tuple: then nothing is dropped."
                )
            # From the host to a device nobody waits; the other way round the numbers must have arrived.
            return tensor.index_select(0, index.to(tensor.device, non_blocking=index.is_cpu))

        try:
            return apply_to_tensor(prediction, chosen), chosen(target)
        except TypeError as error:
            raise TypeError(
                f"The prediction of task {name!r} is a {type(prediction).__name__}: expected a tensor, or tensors in "
                "tuples, lists and mappings, as rows without a label are to be dropped. For a loss that chooses by "
                "itself give the target in a tuple: then nothing is dropped."
            ) from error

    def _by_name(self, targets: Mapping[str, Any]) -> list[Any]:
        missing = [task for task in self.tasks if task not in targets]
        strangers = [name for name in targets if name not in self.tasks]
        # Labels of tasks that are not trained are no mistake, nor are tasks without a label; a misspelt task is both.
        if missing and strangers:
            raise ValueError(
                f"targets: there is none for the tasks {_listed(missing)}, and there are no tasks called "
                f"{_listed(strangers)}; the tasks are {_listed(self.tasks)}."
            )
        return [targets.get(task) for task in self.tasks]

    def _known(self, target: Any) -> Tensor | None:
        """Which rows have a label, ``[B]``; None if that is no question."""
        if not isinstance(target, Tensor) or target.dim() == 0 or target.is_nested:
            return None
        if target.is_floating_point() or target.is_complex():
            return _any_entry(~target.isnan())
        ignored = [value for value in self.ignored if _holds(target.dtype, value)]
        if not ignored:
            return None
        known = target != ignored[0]
        for value in ignored[1:]:
            known &= target != value
        return _any_entry(known)


def masking(tasks: Sequence[str], ignore_index: int | Sequence[int]) -> Masking:
    """A masking, checked.

    Raises:
        TypeError: ``ignore_index`` is no int, and no sequence of them.
    """
    values = (ignore_index,) if isinstance(ignore_index, int) else ignore_index
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str)
        or any(isinstance(value, bool) or not isinstance(value, int) for value in values)
    ):
        raise TypeError(f"ignore_index: expected an int or a sequence of them, got {ignore_index!r}.")
    return Masking(tuple(tasks), tuple(values))


def _is_label(target: Any) -> bool:
    return target is not None and not (isinstance(target, Tensor) and target.dim() > 0 and target.shape[0] == 0)


def _any_entry(known: Tensor) -> Tensor:
    """A row of several entries has a label if any of them is one."""
    return known if known.dim() == 1 else known.flatten(1).any(1)


def _rows(known: Tensor, count: int) -> Rows:
    total = known.shape[0]
    if count in (0, total):
        return Rows(count > 0, None, total)
    # The rows with a label first, in their order; nonzero would have to wait for their number once more.
    return Rows(True, (~known).to(torch.uint8).argsort(stable=True)[:count], total)


def _holds(dtype: torch.dtype, value: int) -> bool:
    """Whether an integer type has this value; compared with one that it has not, 255 is equal to -1."""
    return dtype != torch.bool and torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _listed(names: Sequence[object]) -> str:
    return ", ".join(repr(name) for name in names)
