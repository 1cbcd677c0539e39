"""The study's tables, as Markdown, and its figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from example.study.methods import BASELINES, BUDGET, configurations
from example.study.problem import Problem
from example.study.verdict import verdict
from mtlwrap.plotting import delta_m_figure

# More tasks than this are not shown one by one.
SHOWN = 5

INTRODUCTION = """# The study

Δm: by how much the metrics on the test part are better than with a network per task, relative, in percent, mean over
the tasks; ± is the standard error over {seeds} seeds, SD the standard deviation. A seed draws initial weights and the
order of the samples; the data are the same. Rank: the place among the methods, mean over tasks and seeds. Time: the
processor's for a step, over that with equal weights; of all networks together where there are several.

Each method tried {budget} configurations from a seed of its own and was given the one that did best on the validation
part. "Better" and "worse" are by more than two standard errors of the difference, seed by seed. With {seeds} seeds and
so many methods one or two such differences are to be expected by chance: those of two or three errors are hints, not
findings.
"""


def problem_table(problem: Problem, summary: pd.DataFrame, chosen: Mapping[str, int]) -> pd.DataFrame:
    """A problem's table, as text."""
    table = pd.DataFrame(index=summary.index)
    table["chosen"] = [configurations(problem, method)[chosen[method]].label for method in summary.index]
    if len(problem.tasks) <= SHOWN:
        for task, kind in problem.tasks.items():
            table[f"{task} ({kind.metric_name})"] = summary[task].map("{:.3f}".format)
    else:
        name = next(iter(problem.tasks.values())).metric_name
        table[f"mean {name}"] = summary[list(problem.tasks)].mean(axis="columns").map("{:.3f}".format)
    table["Δm in %"] = mean_and_error(summary)
    table["SD"] = summary["deviation"].map("{:.1f}".format)
    table["rank"] = summary["rank"].map("{:.1f}".format)
    table["time"] = summary["time"].map("{:.2f}".format)
    return table


def mean_and_error(summary: pd.DataFrame) -> "pd.Series[str]":
    """Δm with its standard error."""
    return summary["change"].map("{:+.1f}".format) + " ± " + summary["error"].map("{:.1f}".format)


def overview_table(summaries: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """All problems side by side: Δm of every method, and its mean rank and time."""
    table = pd.DataFrame({name: mean_and_error(summary) for name, summary in summaries.items()})
    for column, form in (("rank", "{:.1f}"), ("time", "{:.2f}")):
        values = pd.DataFrame({name: summary[column] for name, summary in summaries.items()})
        table[column] = values.mean(axis="columns").map(form.format)
    return table


def tuning_table(
    problems: Mapping[str, Problem], tried: Mapping[str, Mapping[str, "pd.Series[float]"]]
) -> pd.DataFrame:
    """Δm on the validation part of everything that was tried, by multiple of the problem's learning rate."""
    rows = [
        {"method": method, "setting": configuration.setting.label, "lr": f"{configuration.multiple:g}", name: score}
        for name, of_problem in tried.items()
        for method, scores in of_problem.items()
        for configuration, score in zip(configurations(problems[name], method), scores, strict=True)
    ]
    table = pd.DataFrame(rows).groupby(["method", "setting", "lr"], sort=False).first()
    return table.map("{:+.1f}".format).replace("+nan", "").reset_index().set_index("method")


def write_report(
    folder: Path,
    problems: Mapping[str, Problem],
    summaries: Mapping[str, pd.DataFrame],
    chosen: Mapping[str, Mapping[str, int]],
    changes: Mapping[str, pd.DataFrame],
    tried: Mapping[str, Mapping[str, "pd.Series[float]"]],
    seeds: Sequence[int],
) -> str:
    """Write ``table.md`` and a figure per problem; returns the text of the table."""
    sections = [INTRODUCTION.format(seeds=len(seeds), budget=BUDGET)]
    if len(summaries) > 1:
        sections.append(f"## All problems: Δm in %\n\n{overview_table(summaries).to_markdown(disable_numparse=True)}\n")
    for name, summary in summaries.items():
        table = problem_table(problems[name], summary, chosen[name]).to_markdown(disable_numparse=True)
        sections.append(f"## {name}\n\n{problems[name].schedule}\n\n{table}\n")
        if len(seeds) > 1 and set(BASELINES) < set(summary.index):
            sections.append("\n".join(f"- {sentence}" for sentence in verdict(changes[name])) + "\n")
        figure = delta_m_figure({str(m): list(row) for m, row in changes[name].iterrows()}, title=f"Δm on {name}")
        figure.savefig(folder / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    table = tuning_table(problems, tried).to_markdown(disable_numparse=True)
    sections.append(f"## What was tried: Δm in % on the validation part, one seed\n\n{table}\n")
    text = "\n".join(sections)
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text
