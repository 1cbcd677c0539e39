"""A logger that writes a table."""

import csv
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from ignite.engine import Engine, Events
from ignite.handlers.base_logger import BaseLogger, BaseOutputHandler
from torch.optim import Optimizer

from mtlwrap.run_folder import whole_lines


class CSVLogger(BaseLogger):
    """Writes metrics, and outputs, of engines into a CSV file: a row per event, a column per number.

    It is attached as ignite's other loggers are, with ``attach_output_handler(engine, event_name, tag, metric_names,
    output_transform, global_step_transform)``. The columns are ``step``, then ``tag/name`` in the order in which they
    came; a number that a row has not is left empty. When a column is new, the file is written anew, with the column; so
    rows of trainer and evaluator may share a file. Each row is on disk at once. With several processes make it in the
    first alone.

    Args:
        path: the file; its folder must exist.
        append: whether rows go to the end of a file that is there, as for a training that is resumed; if not, it is
            replaced.

    Raises:
        OSError: the file cannot be written.
        ValueError: with ``append``: the file's first column is not ``step``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ignite.engine import Engine, Events
        >>> from mtlwrap.ignite import CSVLogger
        >>> trainer = Engine(lambda engine, batch: batch)
        >>> with tempfile.TemporaryDirectory() as folder, CSVLogger(Path(folder) / "log.csv") as logger:
        ...     _ = logger.attach_output_handler(
        ...         trainer, Events.ITERATION_COMPLETED(every=2), tag="training", output_transform=lambda x: {"x": x}
        ...     )
        ...     _ = trainer.run([0.5, 1.5, 2.5, 3.5])
        ...     print((Path(folder) / "log.csv").read_text())
        step,training/x
        2,1.5
        4,3.5
        <BLANKLINE>
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = Path(path)
        self.columns = ["step"]
        rows = self._read() if append and self.path.exists() else []
        self._file: TextIO | None = None
        self._write_all(rows)

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            ValueError: the logger was closed.
        """
        if self._file is None:
            raise ValueError(f"The logger of {self.path} was closed: expected rows before that.")
        new = [name for name in numbers if name not in self.columns]
        if new:
            rows = self._read()
            self.columns += new
            self._write_all(rows)
        self._writer.writerow({"step": step, **numbers})
        self._file.flush()

    def close(self) -> None:
        """Close the file; no row can be written after that."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> list[dict[str, Any]]:
        reader = csv.DictReader(StringIO(whole_lines(self.path), newline=""))
        columns = list(reader.fieldnames or ["step"])
        if columns[0] != "step":
            raise ValueError(f"path: expected a file whose first column is 'step', got {columns[0]!r}.")
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(
                    f"path: expected {len(columns)} columns in line {reader.line_num} of {self.path}, got more."
                )
            rows.append(row)
        self.columns = columns
        return rows

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.close()
        # Beside the file first, and then in its place: whenever this is interrupted, one of them is whole.
        beside = self.path.with_name(f"{self.path.name}.new")
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if len(self.columns) > 1:
                writer.writeheader()
            writer.writerows(rows)
        beside.replace(self.path)
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self.columns)

    def _create_output_handler(self, *args: Any, **kwargs: Any) -> "_OutputHandler":
        return _OutputHandler(*args, **kwargs)

    def _create_opt_params_handler(self, *args: Any, **kwargs: Any) -> "_OptimizerHandler":
        return _OptimizerHandler(*args, **kwargs)


class _OutputHandler(BaseOutputHandler):
    """Takes metrics and outputs of the engine, as in ignite's other loggers."""

    def __call__(self, engine: Engine, logger: CSVLogger, event_name: str | Events) -> None:
        numbers = self._setup_output_metrics_state_attrs(engine, key_tuple=False)
        logger.write(self.global_step_transform(engine, event_name), numbers)


class _OptimizerHandler:
    """Takes an option of an optimizer's groups, the learning rate unless another is named."""

    def __init__(self, optimizer: Optimizer, param_name: str = "lr", tag: str | None = None) -> None:
        self.optimizer = optimizer
        self.name = f"{tag}/{param_name}" if tag else param_name

    def __call__(self, engine: Engine, logger: CSVLogger, event_name: str | Events) -> None:
        option = self.name.rpartition("/")[2]
        groups = self.optimizer.param_groups
        numbers = {f"{self.name}/group_{number}": float(group[option]) for number, group in enumerate(groups)}
        logger.write(engine.state.get_event_attrib_value(event_name), numbers)
