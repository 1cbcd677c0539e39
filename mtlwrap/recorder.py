"""Writes the statistics of a training into a run folder, of which :mod:`mtlwrap.report` makes a page."""

import csv
import math
import weakref
from collections.abc import Callable, Mapping
from io import StringIO
from os import truncate
from pathlib import Path
from statistics import median
from time import perf_counter
from types import TracebackType

import torch.distributed as dist
from torch import Tensor

from mtlwrap.balancers.base import Balancer
from mtlwrap.exact import Parameters
from mtlwrap.gradients import TaskGradients
from mtlwrap.losses import Losses, collect
from mtlwrap.measures import Measures
from mtlwrap.model import MultiTaskModel
from mtlwrap.processes import is_distributed
from mtlwrap.run_folder import STATISTICS, note, noted, whole_lines
from mtlwrap.walk import Walk


class Recorder:
    """Writes a run folder's statistics from a training loop of one's own; in ignite's, its loggers do.

    The same columns as :class:`mtlwrap.ignite.BalancerStatistics`: means over n steps. The device's numbers are read
    all at once in every n-th step. ``run.json`` beside them gets the balancer's name and, as the recorder is closed,
    the time of a step: the median of the wall time from one reading to the next, over n, with all that the loop does.
    What you have written there yourself, or saved with :meth:`Run.save`, is kept, and counts more.

    With several processes make it in each, or in the first alone: only that of rank 0 writes. Losses are then those of
    its own batches, and so are norms and cosines, unless the balancer asked for them.

    Args:
        folder: the run folder, made if need be. Statistics that are in it are **replaced**, unless ``append``.
        model: the model.
        every: n.
        append: whether rows go to the end of the statistics that are there, as for a training that is resumed; steps
            are counted on from the last row.

    Raises:
        TypeError: ``model`` is no :class:`~mtlwrap.MultiTaskModel`.
        ValueError: ``every`` is no positive int; with ``append``: the statistics that are there have other columns, or
            are none; a ``run.json`` cannot be read.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from mtlwrap import IMTLG, MultiTaskModel, cached
        >>> from mtlwrap.records import Records
        >>> model = MultiTaskModel(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}, IMTLG())
        >>> with tempfile.TemporaryDirectory() as folder, Recorder(folder, model, every=2) as recorder:
        ...     for _ in range(4):
        ...         with cached():
        ...             losses = {task: y.square().mean() for task, y in model(torch.randn(8, 3)).items()}
        ...             model.backward(losses)
        ...             recorder.record(losses)
        ...     Records.read(recorder.folder / "statistics.csv").steps
        [2.0, 4.0]
    """

    def __init__(self, folder: str | Path, model: MultiTaskModel, every: int = 10, *, append: bool = False) -> None:
        if not isinstance(model, MultiTaskModel):
            raise TypeError(f"model: expected a MultiTaskModel, got {type(model).__name__}.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a positive int, got {every!r}.")
        self.folder, self.model, self.every = Path(folder), model, every
        self._measures = Measures(model.tasks)
        self._step = self._written = 0
        # The outcome of the backward that was recorded last: the gradients weakly, for their scope is to free them.
        self._weights, self._gradients = model.task_weights, _weakly(model.task_gradients)
        self._read_at: float | None = None
        self._seconds: list[float] = []
        self._is_closed = False
        self._writes = not is_distributed() or dist.get_rank() == 0
        if self._writes:
            self._open(append)

    def record(self, losses: Losses) -> None:
        """Note a step, after its backward and inside its :func:`~mtlwrap.cached`; absent tasks may be left out.

        Args:
            losses: as ``model.backward`` takes them.

        Raises:
            TypeError, ValueError: they are not what ``model.backward`` takes.
            ValueError: no balanced backward came since the last call; it was not in the :func:`~mtlwrap.cached` that
                is open here; or the recorder is closed.
        """
        if self._is_closed:
            raise ValueError("record: expected steps before close(), got one after it.")
        named = zip(self.model.tasks, collect(losses, self.model.tasks), strict=True)
        present = {task: loss for task, loss in named if loss is not None}
        weights, gradients = self._outcome(present)
        self._step += 1
        if self._writes and present:
            self._measures.add(present, weights, gradients)
        if self._writes and self._step % self.every == 0:
            self._write()
            self._clock()

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._writes and not self._is_closed:
            self._write()
            self._file.close()
            if self._seconds:
                note(self.folder, **noted(self.folder) | {"seconds_per_step": median(self._seconds)})
        self._is_closed = True

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, append: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, columns = self.folder / STATISTICS, ["step", *self._measures.names]
        kept = whole_lines(path) if append else ""
        if kept:
            self._step = self._written = _last_step(path, kept, columns)
        known = noted(self.folder) if append else {}
        known |= {"balancer": _named(self.model.balancer), "gradients": _kind_of_gradients(self.model)}
        note(self.folder, **known)
        if kept:
            truncate(path, len(kept.encode()))
        self._file = path.open("a" if kept else "w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        if not kept:
            self._writer.writerow(columns)
        self._file.flush()

    def _outcome(self, losses: Mapping[str, Tensor]) -> tuple[Tensor | None, TaskGradients | None]:
        """What the backward of this step left: nothing where there is nothing to balance, as with a frozen backbone.

        That the weights are those of another backward is seen from the object, without reading it.
        """
        weights, gradients = self.model.task_weights, self.model.task_gradients
        before, before_gradients = self._weights, self._gradients()
        self._weights, self._gradients = weights, _weakly(gradients)
        if not losses:
            return None, None
        is_new = weights is not None and weights is not before
        is_new = is_new or (gradients is not None and gradients is not before_gradients)
        if not is_new and (gradients is not None or self._meets_a_fork(losses)):
            raise ValueError(
                "record: no balanced backward came since the last call. Expected model.backward(losses), or the "
                "backward of model.scalarize(losses), once before each record(losses), in the same `with cached():`."
            )
        # There are none to show of a step with the weights of an earlier one, or where an auxiliary loss adds its own.
        if is_new and gradients is None and not self.model._junction.report.was_watched:
            raise ValueError(
                "record: the tasks' gradients of this step are not there any more. Expected forward, backward and "
                "record(losses) in the same `with cached():`."
            )
        return (weights, gradients) if is_new else (None, None)

    def _meets_a_fork(self, losses: Mapping[str, Tensor]) -> bool:
        return any(Walk(loss, self.model._junction, to_first=True).reached for loss in losses.values())

    def _write(self) -> None:
        if self._step == self._written:
            return
        sums = self._measures.sums
        means = {} if sums is None else self._measures.means(*sums.tolist())
        numbers = [means.get(name, math.nan) for name in self._measures.names]
        self._writer.writerow([self._step, *("" if math.isnan(number) else repr(number) for number in numbers)])
        self._file.flush()
        self._measures.sums, self._written = None, self._step

    def _clock(self) -> None:
        """The time since the last reading; between two readings the host may run ahead of the device."""
        now = perf_counter()
        if self._read_at is not None:
            self._seconds.append((now - self._read_at) / self.every)
        self._read_at = now


def _weakly(gradients: TaskGradients | None) -> Callable[[], TaskGradients | None]:
    return (lambda: None) if gradients is None else weakref.ref(gradients)


def _last_step(path: Path, text: str, columns: list[str]) -> int:
    header, *rows = csv.reader(StringIO(text, newline=""))
    if header != columns:
        raise ValueError(
            f"append: expected {path} to have the columns of this model, {', '.join(columns)}, got "
            f"{', '.join(header)}. Take another folder, or append=False to replace it."
        )
    if not rows:
        return 0
    if not rows[-1] or not rows[-1][0].isdecimal():
        raise ValueError(f"append: expected a step in the last row of {path}, got {','.join(rows[-1])!r}.")
    return int(rows[-1][0])


def _named(balancer: Balancer) -> str:
    """The balancer as it was made, where that is short; of several the names."""
    parts = [_named(part) for part in balancer.children() if isinstance(part, Balancer)]
    name = type(balancer).__name__
    if parts:
        return f"{name}({', '.join(parts)})" if name == "Compose" else name
    made = repr(balancer)
    return made.removesuffix("()") if len(made) <= 30 and "\n" not in made else name


def _kind_of_gradients(model: MultiTaskModel) -> str:
    exact = isinstance(model._exact, Parameters) and model.balancer.sees_gradients
    return "parameters" if exact else "representation"
