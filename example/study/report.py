"""The study's tables, as Markdown, and its figures."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from example.study.methods import BASELINES, BUDGET, configurations
from example.study.summary import Findings, changes, summarise
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
so many methods one or two such differences are to be expected by chance: below five errors they are hints."""


def problem_table(findings: Findings) -> pd.DataFrame:
    """A problem's table, as text."""
    problem, summary = findings.problem, summarise(findings)
    table = pd.DataFrame(index=summary.index)
    table["chosen"] = [configurations(problem, method)[findings.chosen[method]].label for method in summary.index]
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


def overview_table(findings: Mapping[str, Findings]) -> pd.DataFrame:
    """All problems side by side: Δm of every method, and its mean rank and time."""
    summaries = {name: summarise(of_problem) for name, of_problem in findings.items()}
    table = pd.DataFrame({name: mean_and_error(summary) for name, summary in summaries.items()})
    for column, form in (("rank", "{:.1f}"), ("time", "{:.2f}")):
        values = pd.DataFrame({name: summary[column] for name, summary in summaries.items()})
        table[column] = values.mean(axis="columns").map(form.format)
    return table.reindex(next(iter(summaries.values())).index)


def tuning_table(findings: Mapping[str, Findings]) -> pd.DataFrame:
    """Δm on the validation part of everything that was tried, by multiple of the problem's learning rate."""
    rows = [
        {"method": method, "setting": configuration.setting.label, "lr": f"{configuration.multiple:g}", name: score}
        for name, of_problem in findings.items()
        for method, scores in of_problem.tried.items()
        for configuration, score in zip(configurations(of_problem.problem, method), scores, strict=True)
    ]
    table = pd.DataFrame(rows).groupby(["method", "setting", "lr"], sort=False).first()
    return table.map("{:+.1f}".format).reset_index().set_index("method")


def section(findings: Findings, num_seeds: int) -> str:
    """A problem's heading, table and verdict."""
    problem = findings.problem
    lines = [
        f"## {problem.name}",
        f"{problem.schedule}. In a new network the largest of the tasks' gradients on z has {findings.norm_ratio:.1f} "
        "times the norm of the smallest.",
        problem_table(findings).to_markdown(disable_numparse=True),
    ]
    if num_seeds > 1 and set(BASELINES) < set(findings.chosen):
        lines.append("\n".join(f"- {sentence}" for sentence in verdict(changes(findings.metrics))))
    return "\n\n".join(lines)


def write_report(folder: Path, findings: Mapping[str, Findings], num_seeds: int) -> str:
    """Write ``table.md`` and a figure per problem; returns the text of the table."""
    overview = overview_table(findings).to_markdown(disable_numparse=True)
    tuning = tuning_table(findings).to_markdown(disable_numparse=True)
    parts = [
        INTRODUCTION.format(seeds=num_seeds, budget=BUDGET),
        f"## All problems: Δm in %\n\n{overview}",
        *(section(of_problem, num_seeds) for of_problem in findings.values()),
        f"## What was tried: Δm in % on the validation part, one seed\n\n{tuning}",
    ]
    for name, of_problem in findings.items():
        of_methods = {str(method): list(row) for method, row in changes(of_problem.metrics).iterrows()}
        figure = delta_m_figure(of_methods, title=f"Δm on {name}")
        figure.savefig(folder / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    text = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text
