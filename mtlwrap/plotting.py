"""Figures of what the tasks do to each other; matplotlib is in the extra ``mtlwrap[plot]``.

Each function returns a new :class:`matplotlib.figure.Figure` and keeps no state: ``figure.savefig("weights.png")``.
They are drawn in dark ink on an opaque white ground, for light and dark pages; no line or cell is told by its colour
alone. ``records`` are what :class:`mtlwrap.ignite.BalancerStatistics` and loggers leave behind: rows, columns, a
DataFrame, or :class:`~mtlwrap.records.Records`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from statistics import stdev
from typing import Any

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"mtlwrap.plotting needs matplotlib: pip install 'mtlwrap[plot]'. ({error})") from error

from mtlwrap.records import Recorded, Records, mean, signed

# Black, then after Paul Tol's "muted" colours, which colour-blind readers tell apart too; lines differ in dashes and
# markers as well. No two of their numbers, 11, 10 and 3, have a common divisor: 330 lines are all different.
COLOURS = ["#000000", "#CC6677", "#332288", "#DDAA33", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499"]
COLOURS += ["#E8601C"]
MARKERS = "osD^vP*X<>"
# The broken lines are above the solid ones, so that of two in the same place both are seen.
DASHES: list[tuple[Any, int]] = [("-", 2), ("--", 3), (":", 4)]
# Up to so many tasks the cells of a heat-map hold their numbers.
NUMBERED = 10


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour, marker and line style for each name, by its place: the same names look the same in every figure.

    Example:
        >>> styles(["a", "b"])["b"]
        {'color': '#CC6677', 'marker': 's', 'linestyle': '--', 'zorder': 3}
    """
    looks = zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False)
    return {
        name: {"color": colour, "marker": marker, "linestyle": dashes, "zorder": order}
        for name, (colour, marker, (dashes, order)) in zip(names, looks, strict=False)
    }


def weights_figure(
    records: Recorded, *, title: str = "Weight of each task's gradient in the shared gradient"
) -> Figure:
    r"""The tasks' weights over the steps: with what factor each raw loss's gradient entered the shared one.

    Args:
        records: with ``weight/<task>``.
        title: above the figure.

    Raises:
        TypeError, ValueError: no records, or none of weights.

    Example:
        >>> rows = [{"step": s, "weight/a": 0.5, "weight/b": s / 10} for s in (1, 2, 3)]
        >>> figure = weights_figure(rows)
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['a', 'b']
    """
    known = Records.of(records)
    return _over_steps(known, known.weights, "weight/<task>", title, "weight (factor)")


def norms_figure(records: Recorded, *, title: str = "Norm of each task's gradient") -> Figure:
    r"""The norms :math:`\lVert g_t \rVert` of the tasks' gradients over the steps, as the balancer saw them.

    Args:
        records: with ``norm/<task>``.
        title: above the figure.

    Raises:
        TypeError, ValueError: no records, or none of norms.

    Example:
        >>> figure = norms_figure({"step": [1, 2], "norm/a": [1.0, 2.0]})
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [1.0, 2.0]
    """
    known = Records.of(records)
    return _over_steps(known, known.norms, "norm/<task>", title, "gradient norm")


def cosines_figure(records: Recorded, *, title: str = "Cosine of the tasks' gradients") -> Figure:
    r"""Heat-maps of the cosines of every two tasks' gradients: their mean, and the change from first to last third.

    Below 0 two tasks conflict. The change is the mean over the last third of the records minus that over the first;
    there is none of less than two records.

    Args:
        records: with ``cosine/<a>/<b>``.
        title: above the figure.

    Raises:
        TypeError, ValueError: no records, or none of cosines.

    Example:
        >>> figure = cosines_figure({"step": [1, 2], "cosine/a/b": [-0.5, 0.25]})
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['mean over the training', 'change, last third minus first']
    """
    known = Records.of(records)
    if not known.cosines:
        raise ValueError(_missing("cosine/<a>/<b>", known))
    tasks, length = known.tasks, len(known.steps)
    third = max(1, length // 3)
    shown = {"mean over the training": {pair: mean(values) for pair, values in known.cosines.items()}}
    if length > 1:
        shown["change, last third minus first"] = {
            pair: mean(values[-third:]) - mean(values[:third]) for pair, values in known.cosines.items()
        }
    limit = _limit(value for values in shown.values() for value in values.values())
    side = max(3.8, 0.34 * len(tasks) + 1.6)
    figure = Figure(figsize=(side * len(shown) + 1.2, side + 0.3), dpi=120, layout="constrained", facecolor="white")
    for axes, (name, values) in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown.items(), strict=True):
        image = _heat_map(axes, tasks, values, limit)
        axes.set_title(name)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8)
    bar.set_label("cosine; below 0 the two conflict" if length == 1 else "cosine (below 0: conflict), or its change")
    figure.suptitle(title)
    return figure


def conflicts_figure(
    records: Recorded, *, num_pairs: int = 6, title: str = "How often the tasks' gradients oppose each other"
) -> Figure:
    """Histograms of the recorded cosines of the pairs of tasks that disagree most, those below 0 hatched.

    Args:
        records: with ``cosine/<a>/<b>``.
        num_pairs: how many pairs, those of the lowest mean first.
        title: above the figure.

    Raises:
        TypeError, ValueError: no records, none of cosines, or ``num_pairs`` is no positive int.

    Example:
        >>> figure = conflicts_figure({"step": [1, 2], "cosine/a/b": [-0.5, 0.25]})
        >>> figure.axes[0].get_title()
        'a, b: below 0 in 50 %'
    """
    known = Records.of(records)
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, int) or num_pairs < 1:
        raise ValueError(f"num_pairs: expected a positive int, got {num_pairs!r}.")
    if not known.cosines:
        raise ValueError(_missing("cosine/<a>/<b>", known))
    chosen = sorted(known.cosines, key=lambda pair: mean(known.cosines[pair]))[:num_pairs]
    limit = _limit(value for pair in chosen for value in known.cosines[pair])
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(
        figsize=(max(4.5, 3.2 * columns), 1.3 + 2.1 * rows), dpi=120, layout="constrained", facecolor="white"
    )
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (a, b) in zip(panels, chosen, strict=False):
        _histogram(axes, known.cosines[a, b], limit)
        share = mean([value < 0 for value in known.cosines[a, b] if math.isfinite(value)])
        axes.set_title(plain(f"{_short(a)}, {_short(b)}: below 0 in {100 * share:.0f} %"), fontsize=10)
    for axes in panels[len(chosen) :]:
        axes.remove()
    for position, axes in enumerate(panels[: len(chosen)]):
        if position % columns == 0:
            axes.set_ylabel("share of records (%)")
        if position + columns >= len(chosen):
            axes.set_xlabel("cosine")
            axes.tick_params("x", labelbottom=True)
    figure.suptitle(title + "\nhatched, left of 0: the two conflict")
    return figure


def curves_figure(
    curves: Mapping[str, Mapping[str, Any]],
    *,
    units: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    xlabel: str = "epoch",
    title: str = "Metric of each task",
) -> Figure:
    """Each task's metric, under several balancers side by side: a panel per task, a line per balancer.

    Args:
        curves: for each balancer, for each task, a number per epoch; or several such sequences, one per seed, whose
            mean is drawn with a band of one standard deviation. NaN, or a task that a balancer has not, is left out.
        units: for each task what is measured; the label of its axis.
        order: all balancers there are, drawn or not, so that each looks the same in every figure.
        xlabel: what is counted.
        title: above the figure.

    Raises:
        TypeError: ``curves`` is no mapping of mappings.
        ValueError: it is empty, or the seeds of a curve are not of one length.

    Example:
        >>> figure = curves_figure({"equal": {"a": [0.1, 0.2]}, "imtl": {"a": [[0.1, 0.3], [0.3, 0.5]]}})
        >>> [round(float(y), 6) for y in figure.axes[0].lines[1].get_ydata()]
        [0.2, 0.4]
    """
    seeds = {(name, task): _seeds(name, task, values) for name, of in _checked(curves) for task, values in of.items()}
    tasks = list(dict.fromkeys(task for _, task in seeds))
    looks = styles(order or curves)
    looks.update({name: look for name, look in styles([*looks, *curves]).items() if name not in looks})
    columns = min(max(2, math.ceil(math.sqrt(len(tasks)))), len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.5 * columns, 1.5 + 3 * rows), dpi=150, layout="constrained", facecolor="white")
    panels = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axes, task in zip(panels, tasks, strict=False):
        for name in curves:
            if (name, task) in seeds:
                band(axes, seeds[name, task], label=plain(name), **looks[name])
        axes.set(title=plain(task), ylabel=plain((units or {}).get(task, "metric")))
        axes.locator_params("x", integer=True, min_n_ticks=1)
    for axes in panels[len(tasks) :]:
        axes.remove()
    for axes in panels[: len(tasks)][-columns:]:
        axes.set_xlabel(xlabel)
        axes.tick_params("x", labelbottom=True)
    finish(figure, title, max(len(of) for of in seeds.values()))
    return figure


def delta_m_figure(changes: Mapping[str, Any], *, title: str = "Δm, the change against single-task training") -> Figure:
    r"""Δm of several balancers with its spread: a point per seed, the mean and one standard deviation.

    Args:
        changes: for each balancer its Δm in percent, a number or one per seed; NaN where there is none.
        title: above the figure.

    Raises:
        TypeError: ``changes`` is no mapping.
        ValueError: there is no number in it.

    Example:
        >>> figure = delta_m_figure({"equal": [-1.0, -3.0], "imtl": [2.0, 2.5]})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['equal: -2.0 ± 1.4 %', 'imtl: +2.2 ± 0.4 %']
    """
    if not isinstance(changes, Mapping):
        raise TypeError(f"changes: expected a mapping from balancer to numbers, got {type(changes).__name__}.")
    known = {name: [value for value in _flat(values) if math.isfinite(value)] for name, values in changes.items()}
    if not any(known.values()):
        raise ValueError(f"changes: expected a number for at least one balancer, got {dict(changes)!r}.")
    figure = Figure(figsize=(8, 1.6 + 0.42 * len(known)), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots()
    labels = []
    for row, (name, values) in enumerate(known.items()):
        spread = stdev(values) if len(values) > 1 else 0.0
        labels.append(plain(f"{name}: {_mean_and_spread(values)}"))
        if values:
            axes.errorbar(
                mean(values), row, xerr=spread or None, fmt="D", color="#000000", markersize=7, capsize=5, zorder=3
            )
            axes.plot(values, [row] * len(values), "o", color="#CC6677", alpha=0.8, markersize=5, zorder=4)
    axes.axvline(0, color="#444444", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(known)), labels)
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_xlabel("Δm in % (right of 0: better than each task alone)")
    axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{title}\ndiamond: mean, bar: ± 1 standard deviation, circles: seeds")
    return figure


def band(axes: Axes, curves: Sequence[Sequence[float]], xs: Sequence[float] | None = None, **style: Any) -> None:
    """The mean of several curves, and a band of one standard deviation around it; x counts from 1 if not given."""
    at = list(range(1, len(curves[0]) + 1)) if xs is None else list(xs)
    columns = [[value for value in column if math.isfinite(value)] for column in zip(*curves, strict=True)]
    middle = [mean(column) for column in columns]
    axes.plot(at, middle, linewidth=1.5, markersize=5, **style)
    if len(curves) > 1:
        spread = [stdev(column) if len(column) > 1 else math.nan for column in columns]
        low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(at, low, high, color=style["color"], alpha=0.08, linewidth=0)


def finish(figure: Figure, title: str, num_seeds: int) -> None:
    """What figures of seeds have in common; the legend goes below the panels, where it covers nothing."""
    spread = f"mean over {num_seeds} seeds, band: ± 1 standard deviation" if num_seeds > 1 else "one seed"
    figure.suptitle(f"{title}\n{spread}")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    _legend(figure)


def plain(text: str) -> str:
    r"""Text as it is: without a meaning for dollar signs, which matplotlib would take for mathematics.

    Example:
        >>> print(plain("a$b$"))
        a\$b\$
    """
    return str(text).replace("$", r"\$")


def _over_steps(known: Records, values: Mapping[str, Sequence[float]], wanted: str, title: str, label: str) -> Figure:
    if not values:
        raise ValueError(_missing(wanted, known))
    looks = styles(known.tasks)
    rows = math.ceil(len(values) / _legend_columns(values))
    figure = Figure(figsize=(9, 4 + 0.24 * rows), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots()
    every = max(1, len(known.steps) // 8)
    for position, (task, numbers) in enumerate(values.items()):
        # Each line's markers somewhere else, so that they do not hide each other.
        marks = (position * every // max(1, len(values)), every)
        axes.plot(known.steps, numbers, label=plain(_short(task, 24)), markevery=marks, markersize=6, **looks[task])
    finite = [number for numbers in values.values() for number in numbers if math.isfinite(number)]
    if min(finite) > 0 and max(finite) > 30 * min(finite):
        axes.set_yscale("log")
        label += ", log scale"
    axes.set(xlabel="training step", ylabel=label)
    axes.grid(alpha=0.3)
    figure.suptitle(title)
    _legend(figure)
    return figure


def _legend_columns(names: Iterable[str]) -> int:
    """As many as have room in nine inches."""
    longest = max(len(_short(name, 24)) for name in names)
    return max(1, min(6, int(9 / (0.085 * longest + 0.75))))


def _legend(figure: Figure) -> None:
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = _legend_columns(found)
    handles, labels = list(found.values()), list(found)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3)


def _heat_map(axes: Axes, tasks: Sequence[str], values: Mapping[tuple[str, str], float], limit: float) -> Any:
    size = len(tasks)
    places = {task: place for place, task in enumerate(tasks)}
    grid = [[math.nan] * size for _ in tasks]
    for (a, b), value in values.items():
        grid[places[a]][places[b]] = grid[places[b]][places[a]] = value
    axes.set_facecolor("#CCCCCC")  # where there is no cosine, as on the diagonal
    image = axes.imshow(grid, cmap="PuOr", vmin=-limit, vmax=limit)
    for row, column, value in ((r, c, grid[r][c]) for r in range(size) for c in range(size)):
        if math.isfinite(value):
            text = signed(value) if size <= NUMBERED else "-" if value < 0 else ""
            ink = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8, in_layout=False)
    names = [plain(_short(task)) for task in tasks]
    small = 10 if size <= NUMBERED else 7
    axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=small)
    axes.set_yticks(range(size), names, fontsize=small)
    return image


def _histogram(axes: Axes, cosines: Sequence[float], limit: float) -> None:
    finite = [value / limit for value in cosines if math.isfinite(value)]
    counts = [0] * 20
    for value in finite:
        counts[min(19, math.floor(10 * value) + 10)] += 1
    for place, count in enumerate(counts):
        look: dict[str, Any] = {"facecolor": "#88CCEE"} if place >= 10 else {"facecolor": "#E8601C", "hatch": "///"}
        axes.bar(
            limit * (place - 10) / 10, 100 * count / len(finite), limit / 10, align="edge", edgecolor="#333333", **look
        )
    axes.axvline(0, color="#000000", linewidth=1.2)
    axes.set_xlim(-limit, limit)
    axes.grid(axis="y", alpha=0.3)


def _limit(cosines: Iterable[float]) -> float:
    """A round number that none exceeds: on a wide representation cosines are small, and would all look like 0."""
    largest = max(map(abs, filter(math.isfinite, cosines)), default=0.0)
    return next((limit for limit in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if limit >= largest), 2.0)


def _missing(wanted: str, known: Records) -> str:
    return f"records: expected numbers in columns like {wanted!r}, got none, for the tasks {', '.join(known.tasks)}."


def _short(name: str, length: int = 16) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _checked(curves: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(curves, Mapping) or not all(isinstance(of, Mapping) for of in curves.values()):
        raise TypeError(f"curves: expected a mapping from balancer to task to numbers, got {curves!r:.100}.")
    if not any(curves.values()):
        raise ValueError("curves: expected the curve of at least one task, got none.")
    return list(curves.items())


def _seeds(name: str, task: str, values: Any) -> list[list[float]]:
    rows = list(values)
    curves = [[float(v) for v in row] for row in rows] if rows and _is_sequence(rows[0]) else [[float(v) for v in rows]]
    if len({len(curve) for curve in curves}) != 1 or not curves[0]:
        lengths = [len(curve) for curve in curves]
        raise ValueError(f"curves: expected seeds of one length, not 0, for {task!r} under {name!r}, got {lengths}.")
    return curves


def _is_sequence(value: Any) -> bool:
    # A tensor or an array of one number has a length too, which it does not tell.
    return hasattr(value, "__len__") and not isinstance(value, str) and getattr(value, "ndim", 1) > 0


def _flat(values: Any) -> list[float]:
    return [float(value) for value in values] if _is_sequence(values) else [float(values)]


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    return f"{mean(values):+.1f} %" if len(values) == 1 else f"{mean(values):+.1f} ± {stdev(values):.1f} %"
