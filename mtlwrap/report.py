"""A report on what the tasks of a training did to each other: ``python -m mtlwrap.report RUN_FOLDER``.

A run folder holds ``statistics.csv``, as :class:`Recorder` or :class:`mtlwrap.ignite.CSVLogger` with
:class:`mtlwrap.ignite.BalancerStatistics` writes it, and, if there is more to tell, ``run.json``: a recorder notes
there what it knows, the rest is yours to tell, by :meth:`Run.save` or by hand; see :class:`Run` for the entries. The
page is one HTML file that loads nothing; it says the findings first, and shows the figures below. Figures need
matplotlib, ``mtlwrap[plot]``.
"""

import argparse
import base64
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from mtlwrap.recorder import Recorder
from mtlwrap.records import Recorded, Records, mean, signed
from mtlwrap.run_folder import DETAILS, PAGE, STATISTICS, Run

__all__ = ["Recorder", "Run", "findings", "main", "report", "write_report"]

# A mean cosine this close to 0 is neither agreement nor conflict.
_NEUTRAL = 0.05
# A conflict below that is still one if it is there in so many of the records.
_STEADY = 0.75
# And if it is no smaller than this, and there are so many records.
_FAINT = 0.002
_MANY = 3
# From this ratio on the longest gradient drowns the shortest.
_FAR_APART = 10
_PARTS = ("first", "second", "last")
# With respect to what the tasks' gradients are.
_WHERE = {
    "representation": "on the representation that the tasks share",
    "parameters": "on the parameters that the tasks share",
    None: 'on what the tasks share: the representation or, with gradients="parameters", the parameters of the backbone',
}


def findings(records: Recorded, run: Run | None = None) -> dict[str, list[str]]:
    r"""What the statistics say, as sentences under headings.

    Two tasks conflict where the cosine of their gradients on what they share is below 0: what helps one then harms the
    other. Who disagrees most is the pair of the lowest mean cosine over the training; when, that third of it
    in which their mean is lowest.

    Args:
        records: rows, columns, a DataFrame or :class:`~mtlwrap.records.Records`.
        run: what else is known.

    Raises:
        TypeError, ValueError: as :meth:`~mtlwrap.records.Records.of` does.

    Example:
        >>> rows = [{"step": s, "weight/a": 1.0, "weight/b": 0.5, "cosine/a/b": -s / 10} for s in (1, 2, 3)]
        >>> findings(rows)["Which tasks disagree, and when"][1]
        'It was lowest in the last third, steps 3 to 3; from third to third it went from -0.10 to -0.20 to -0.30.'
    """
    known, details = Records.of(records), run or Run()
    wrong = _wrong(known)
    return ({"What went wrong": wrong} if wrong else {}) | {
        "Which tasks disagree, and when": _disagreement(known),
        f"What {details.balancer} did about it": _decision(known),
        "What a step cost": _cost(details),
        "Against each task trained alone": _alone(details),
    }


def report(records: Recorded, run: Run | None = None, *, title: str = "What the tasks did to each other") -> str:
    """The page, as one string of HTML: :func:`findings`, then tables and the figures of :mod:`mtlwrap.plotting`.

    Args:
        records: rows, columns, a DataFrame or :class:`~mtlwrap.records.Records`.
        run: what else is known.
        title: of the page.

    Raises:
        TypeError, ValueError: as :func:`findings` does.
        ImportError: matplotlib is not installed.

    Example:
        >>> page = report([{"step": 1, "weight/a<b>": 1.0, "weight/c": 0.5}])
        >>> "a&lt;b&gt;" in page, "a<b>" in page
        (True, False)
    """
    known, details = Records.of(records), run or Run()
    sentences = "\n".join(
        f"<h2>{escape(heading)}</h2>\n" + "\n".join(f"<p>{escape(text)}</p>" for text in texts)
        for heading, texts in findings(known, details).items()
    )
    about = (
        f"{details.balancer}; {len(known.tasks)} tasks: {', '.join(known.tasks)}; {known.steps[-1]:g} steps in "
        f"{len(known.steps)} records, each the mean of its steps."
    )
    return _TEMPLATE.substitute(
        title=escape(title),
        about=escape(about),
        sentences=sentences,
        tables=_pairs_table(known) + _metrics_table(details),
        figures="\n".join(_figures(known)),
        where=escape(_WHERE.get(details.gradients, _WHERE[None])),
    )


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Read a run folder and write its page, by default ``report.html`` in it; returns where.

    Raises:
        OSError: the folder has no ``statistics.csv``, or the page cannot be written.
        ValueError: what is in it cannot be read.
    """
    folder = Path(folder)
    if not (folder / STATISTICS).exists():
        what = "" if folder.is_dir() else " There is no such folder."
        raise FileNotFoundError(f"no {STATISTICS} in {folder}; mtlwrap.report.Recorder writes it.{what}")
    page = report(Records.read(folder / STATISTICS), Run.load(folder))
    target = folder / PAGE if output is None else Path(output)
    target.write_text(page, encoding="utf-8")
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m mtlwrap.report``."""
    parser = argparse.ArgumentParser("python -m mtlwrap.report", description="A report on a training's conflicts.")
    parser.add_argument(
        "folder",
        metavar="RUN_FOLDER",
        help=f"with {STATISTICS} and, if there is more, {DETAILS}; a Recorder writes both",
    )
    parser.add_argument("--output", metavar="FILE", help=f"by default {PAGE} in the folder")
    options = parser.parse_args(arguments)
    try:
        print(f"The report is {write_report(options.folder, options.output)}.")
    except (OSError, TypeError, ValueError, ImportError) as error:
        parser.error(str(error))


def _wrong(known: Records) -> list[str]:
    """What has to be mended before anything else is worth reading."""
    spoilt = _not_finite(known)
    if not (known.weights or known.norms or known.cosines):
        return spoilt or [
            "No balanced backward was seen: there are losses, but neither weights nor gradients of the tasks. Was "
            "model.backward(losses) called, and not sum(losses).backward()? With a frozen backbone there is nothing to "
            "balance."
        ]
    share = _standstill(known)
    if not share:
        return spoilt
    return [
        *spoilt,
        f"The shared part was not trained in {100 * share:.3g} % of the records: every task's gradient had the weight "
        "0. IMTLG does that where the gradients oppose each other so that no direction serves all tasks alike. "
        "IMTLG(strict=True) moves there as its paper does; or take another balancer.",
    ]


def _not_finite(known: Records) -> list[str]:
    """In which steps gradients were no numbers; nothing else is to be said of these."""
    share = mean(known.nonfinite)
    if not math.isfinite(share) or share == 0:
        return []
    first = next(step for step, of in zip(known.steps, known.nonfinite, strict=True) if of > 0)
    return [
        f"Some task's gradient was not finite in {100 * share:.3g} % of the steps, for the first time up to step "
        f"{first:g}. With a GradScaler a few such steps are ordinary, and skipped. Else the training broke down there: "
        "what follows is of the other steps only."
    ]


def _standstill(known: Records) -> float:
    """In what share of the records with weights all of these are 0."""
    columns = zip(*known.weights.values(), strict=True)
    rows = [present for row in columns if (present := [weight for weight in row if math.isfinite(weight)])]
    return mean([not any(row) for row in rows]) if rows else 0.0


def _disagreement(known: Records) -> list[str]:
    if not known.cosines:
        return ["No cosines of the tasks' gradients were recorded, so nothing can be said about conflicts."]
    means = {pair: mean(values) for pair, values in known.cosines.items()}
    pairs = sorted(means, key=means.__getitem__)
    values = known.cosines[pairs[0]]
    names, lowest = _pair(pairs[0]), means[pairs[0]]
    finite = [value for value in values if math.isfinite(value)]
    share = mean([value < 0 for value in finite])
    numbers = f"the mean cosine of their gradients is {signed(lowest)}, and it was below 0 in {100 * share:.0f} % of "
    numbers += f"the {len(finite)} records" if len(finite) > 1 else "the one record"
    if lowest < -_NEUTRAL:
        texts = [f"{names} conflict most: {numbers}."]
    elif lowest < -_FAINT and share >= _STEADY and len(finite) >= _MANY:
        texts = [
            f"{names} conflict most, weakly but steadily: {numbers}. Gradients so close to a right angle hardly hold "
            "each other up: it is not for their directions that one would balance them, though perhaps for their "
            "lengths."
        ]
    elif lowest < _NEUTRAL:
        texts = [f"No two tasks conflict clearly. {names} agree least: {numbers}."]
    else:
        texts = [f"The tasks agree. Even {names} do, who agree least: {numbers}."]
    texts += _when(known.steps, values)
    texts += [f"After them come {_pair(pair)} ({signed(means[pair])})." for pair in pairs[1:2]]
    if len(pairs) > 1:
        texts.append(f"{_pair(pairs[-1])} agree best ({signed(means[pairs[-1]])}).")
    # Around a right angle some cosine of many is always below 0, which says nothing.
    sizes = [mean([abs(value) for value in of]) for of in known.cosines.values()]
    if math.isfinite(mean(known.conflicts)) and max(sizes) >= _NEUTRAL:
        texts.append(
            f"In {100 * mean(known.conflicts):.0f} % of the steps at least two tasks pulled against each other, "
            "however little."
        )
    return texts


def _when(steps: Sequence[float], values: Sequence[float]) -> list[str]:
    """In which third of the training a pair is worst; nothing where all are the same, or there are fewer records."""
    if len(steps) < len(_PARTS):
        return []
    cuts = [round(len(steps) * part / len(_PARTS)) for part in range(len(_PARTS) + 1)]
    thirds = [mean(values[start:end]) for start, end in pairwise(cuts)]
    if not all(map(math.isfinite, thirds)) or len(set(map(signed, thirds))) == 1:
        return []
    worst = min(range(len(thirds)), key=thirds.__getitem__)
    start = steps[cuts[worst] - 1] + 1 if cuts[worst] else 1
    course = " to ".join(map(signed, thirds))
    where = f"in the {_PARTS[worst]} third, steps {start:g} to {steps[cuts[worst + 1] - 1]:g}"
    return [f"It was lowest {where}; from third to third it went from {course}."]


def _decision(known: Records) -> list[str]:
    texts = []
    weights = {task: mean(values) for task, values in known.weights.items()}
    if len(weights) < 2:
        texts.append("No weights of several tasks were recorded: its decision may be no weighting of gradients.")
    elif _standstill(known) == 1:
        texts.append("It gave every task's gradient the weight 0: the shared part was not trained.")
    elif max(weights.values()) - min(weights.values()) <= 1e-6 * max(map(abs, weights.values())):
        texts.append(f"Nothing: every task's gradient had the weight {max(weights.values()):.3g} on average.")
    else:
        most, least = max(weights, key=weights.__getitem__), min(weights, key=weights.__getitem__)
        texts.append(
            f"It gave “{most}” the largest weight, {weights[most]:.3g} on average, and “{least}” the smallest, "
            f"{weights[least]:.3g}."
        )
        texts += [_course(task, known.weights[task]) for task in (most, least) if len(known.steps) > 2]
    norms = {task: mean(values) for task, values in known.norms.items()}
    if len(norms) > 1:
        most, least = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
        ratio = norms[most] / norms[least] if norms[least] > 0 else math.nan
        times = f", {ratio:.3g} times that of “{least}”" if norms[least] > 0 else ""
        texts.append(
            "With the losses as the balancer scaled them, if it did, and before it weighed gradients, "
            f"“{most}” had the longest gradient on average{times}."
        )
        if ratio >= _FAR_APART:
            texts.append(
                "So far apart, the longest drowns the shortest under a plain sum: standardise its target, or balance "
                "the lengths."
            )
    return texts


def _course(task: str, values: Sequence[float]) -> str:
    third = max(1, len(values) // 3)
    first, last = mean(values[:third]), mean(values[-third:])
    return f"The weight of “{task}” went from {first:.3g} in the first third to {last:.3g} in the last."


def _cost(run: Run) -> list[str]:
    if run.seconds_per_step is None:
        return ["The time of a step was not recorded."]
    text = f"A step took {1000 * run.seconds_per_step:.3g} ms"
    with_all = "That is with the recording, and whatever else the loop and the machine had to do"
    if run.plain_seconds_per_step is None:
        return [f"{text}; there is no plain sum to compare it with.", f"{with_all}."]
    ratio = run.seconds_per_step / run.plain_seconds_per_step
    return [
        f"{text}, {ratio:.2f} times the {1000 * run.plain_seconds_per_step:.3g} ms of a plain sum of the losses.",
        f"{with_all}: below 1 it is chance.",
    ]


def _alone(run: Run) -> list[str]:
    rows = [row for row in _comparison(run) if math.isfinite(row[-1])]
    unclear = [name for name in _names(run) if name not in run.higher_is_better]
    texts = []
    if unclear:
        texts.append(f"Whether higher is better was not said of {', '.join(unclear)}: see higher_is_better of Run.")
    if not rows:
        return texts or ["There are no results of single-task training to compare with."]
    by_task: dict[str, list[float]] = {}
    for task, *_, change in rows:
        by_task.setdefault(task, []).append(change)
    total = mean([mean(changes) for changes in by_task.values()])
    word = "better" if total >= 0 else "worse"
    texts.insert(
        0,
        f"Trained together the tasks are {abs(total):.1f} % {word} than each alone, on average (Δm = {total:+.1f} %).",
    )
    for task, name, here, single, change in rows:
        word = "better" if change >= 0 else "worse"
        texts.append(f"“{task}”: {name} {here:.4g} here, {single:.4g} alone, {abs(change):.1f} % {word}.")
    texts.append(
        "This is one training, and another seed may say otherwise. Whether the balancer did better than a plain sum, "
        "the page of a plain sum tells."
    )
    return texts


def _comparison(run: Run) -> list[tuple[str, str, float, float, float]]:
    """Task, metric, here, alone, and how much better in percent."""
    rows = []
    for task, metrics in run.metrics.items():
        for name, here in metrics.items():
            single = run.single.get(task, {}).get(name, math.nan)
            is_known = name in run.higher_is_better and single
            change = 100 * (here - single) / abs(single) if is_known else math.nan
            change = change if run.higher_is_better.get(name, True) else -change
            rows.append((task, name, here, single, change))
    return rows


def _names(run: Run) -> list[str]:
    """The names of the metrics that can be compared."""
    return list(dict.fromkeys(name for task, metrics in run.metrics.items() for name in metrics if task in run.single))


def _pair(pair: tuple[str, str]) -> str:
    return f"“{pair[0]}” and “{pair[1]}”"


def _pairs_table(known: Records, most: int = 10) -> str:
    means = sorted((mean(values), pair) for pair, values in known.cosines.items())[:most]
    rows = [
        [*pair, signed(value), f"{100 * mean([v < 0 for v in known.cosines[pair] if math.isfinite(v)]):.0f} %"]
        for value, pair in means
    ]
    return _table("Pairs, most conflict first", ["task", "task", "mean cosine", "records below 0"], rows)


def _metrics_table(run: Run) -> str:
    rows = [
        [task, name, *("-" if math.isnan(number) else f"{number:.4g}" for number in (here, alone)), _percent(change)]
        for task, name, here, alone, change in _comparison(run)
    ]
    return _table("Metrics", ["task", "metric", "this run", "alone", "change"], rows)


def _percent(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:+.1f} %"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption>\n<tr>{head}</tr>\n{body}\n</table>\n"


def _figures(known: Records) -> list[str]:
    from mtlwrap import plotting  # here, so that findings and Recorder need no matplotlib

    wanted: list[tuple[bool, Callable[[Recorded], Any], str]] = [
        (bool(known.cosines), plotting.cosines_figure, "Cosines of every two tasks' gradients, and their change."),
        (bool(known.cosines), plotting.conflicts_figure, "How the cosines of the pairs that disagree most are spread."),
        (bool(known.weights), plotting.weights_figure, "The tasks' weights over the training steps."),
        (bool(known.norms), plotting.norms_figure, "The norms of the tasks' gradients over the training steps."),
    ]
    return [_image(make(known), caption) for there, make, caption in wanted if there]


def _image(figure: Any, caption: str) -> str:
    import matplotlib as mpl

    buffer = io.BytesIO()
    # Without a date and with names that are not drawn by chance: the same records make the same page.
    with mpl.rc_context({"svg.hashsalt": "mtlwrap"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'


_TEMPLATE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 17px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #ffffff; }
h1 { line-height: 1.2; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin: 1.6rem 0 0.3rem; }
p { margin: 0.3rem 0; }
.about { color: #555555; }
table { border-collapse: collapse; margin: 1.5rem 0; }
caption { text-align: left; font-weight: bold; padding: 0.3rem 0; }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid #bbbbbb; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; }
@media (prefers-color-scheme: dark) {
  body { color: #e8e8e8; background: #16181c; }
  .about { color: #aaaaaa; }
}
</style>
</head>
<body>
<h1>$title</h1>
<p class="about">$about</p>
$sentences
$tables
<h2>How to read the figures</h2>
<p>The gradients are those $where. A cosine of 1: the tasks want the
same; of 0: they do not mind each other; below 0: what helps one harms the other. Over a whole batch cosines are small
even where two tasks disagree on many samples: look at their signs, and compare the pairs.</p>
$figures
</body>
</html>
""")

if __name__ == "__main__":
    main()
