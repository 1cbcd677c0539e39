"""The table for the terminal."""

import math

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from example.training import TASKS


def results_table(summary: pd.DataFrame) -> Table:
    """Each method's metrics, Δm and time for a step, of :func:`~example.results.summarise`."""
    # Narrow enough for a terminal of 80 columns.
    table = Table("method", title="Validation part, after the last epoch", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name, task in TASKS.items():
        table.add_column(f"{name}\n{task.metric_name}", justify="right")
    for header in ("Δm in %,\nmean ± SD", "ms a\nstep", "seeds"):
        table.add_column(header, justify="right")
    for method, row in summary.iterrows():
        scores = [f"{row[task]:.3f}" for task in TASKS]
        change = mean_and_deviation(row["change"], row["deviation"])
        table.add_row(str(method), *scores, change, f"{1000 * row['seconds']:.1f}", f"{row['seeds']:.0f}")
    return table


def mean_and_deviation(mean: float, deviation: float) -> str:
    """Both, or what there is: one seed has no deviation, and without single-task training there is no mean."""
    if math.isnan(mean):
        return "-"
    return f"{mean:+.1f}" if math.isnan(deviation) else f"{mean:+.1f} ± {deviation:.1f}"
