"""The figures hold the data that they were given, whatever is missing in it."""

import io
import math
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from mtlwrap import plotting
from mtlwrap.records import Records, signed

TASKS = ("a", "b/c", "$<d>$")
OVER_STEPS = [(plotting.weights_figure, "weight"), (plotting.norms_figure, "norm")]
BY_RECORDS = [plotting.weights_figure, plotting.norms_figure, plotting.cosines_figure, plotting.conflicts_figure]


def rows(tasks=TASKS, count=6):
    made = []
    for step in range(1, count + 1):
        row = {"step": 10 * step, "conflicts": 0.5, "nonfinite": 0.0}
        for position, task in enumerate(tasks):
            row |= {f"{what}/{task}": 0.1 + position + step / 10 for what in ("loss", "weight", "norm")}
        for position, (a, b) in enumerate(combinations(tasks, 2)):
            row[f"cosine/{a}/{b}"] = math.cos(position + step)
        made.append(row)
    return made


def column(name, of=None):
    return [row[name] for row in of or rows()]


def drawn(figure):
    """As pixels, so that everything was really drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=40)
    return buffer.getvalue()


@pytest.mark.parametrize(("make", "what"), OVER_STEPS)
def test_lines_are_the_columns(make, what):
    figure = make(rows())
    (axes,) = figure.axes
    for line, task in zip(axes.lines, TASKS, strict=True):
        assert list(line.get_xdata()) == column("step")
        assert list(line.get_ydata()) == column(f"{what}/{task}")
    assert axes.get_xlabel() == "training step"
    assert what in axes.get_ylabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a", "b/c", r"\$<d>\$"]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len({look[1] for look in looks}) == len({look[2] for look in looks}) == 3  # not by colour alone


def test_heat_map_is_symmetric_and_the_change_that_of_the_thirds():
    figure = plotting.cosines_figure(rows())
    mean, change = (axes.images[0].get_array().filled(math.nan) for axes in figure.axes[:2])
    for (i, a), (j, b) in combinations(enumerate(TASKS), 2):
        values = column(f"cosine/{a}/{b}")
        assert mean[i, j] == mean[j, i] == pytest.approx(sum(values) / 6)
        assert change[i, j] == pytest.approx(sum(values[4:]) / 2 - sum(values[:2]) / 2)
    assert math.isnan(mean[0, 0])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert signed(mean[0, 1]) in texts  # the numbers, not colours alone
    assert drawn(figure)


def test_histogram_counts_every_record_once_and_the_worst_pair_comes_first():
    figure = plotting.conflicts_figure(rows(), num_pairs=2)
    means = {pair: sum(column("cosine/{}/{}".format(*pair))) for pair in combinations(TASKS, 2)}
    worst = min(means, key=means.get)
    assert figure.axes[0].get_title().startswith(plotting.plain(", ".join(worst)))
    assert len(figure.axes) == 2
    values = column("cosine/{}/{}".format(*worst))
    bars = figure.axes[0].patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100)
    below = sum(bar.get_height() for bar in bars if bar.get_hatch())
    assert below == pytest.approx(100 * sum(value < 0 for value in values) / len(values))


def test_curves_are_the_means_and_bands_the_deviations():
    curves = {"equal": {"x": [[1.0, 2.0], [3.0, 6.0]], "y": [[0.5, math.nan], [0.5, 1.0]]}, "uw": {"x": [5.0, 6.0]}}
    figure = plotting.curves_figure(curves, units={"x": "AUC"})
    x, y = figure.axes
    assert [axes.get_title() for axes in (x, y)] == ["x", "y"]
    assert [axes.get_ylabel() for axes in (x, y)] == ["AUC", "metric"]
    assert [list(line.get_ydata()) for line in x.lines] == [[2, 4], [5, 6]]
    assert list(y.lines[0].get_ydata()) == [0.5, 1.0]
    box = x.collections[0].get_paths()[0].get_extents()
    assert (box.ymin, box.ymax) == pytest.approx((2 - math.sqrt(2), 4 + math.sqrt(8)))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["equal", "uw"]
    assert "2 seeds" in figure.get_suptitle()
    drawn(figure)


@pytest.mark.parametrize("made", [list, np.array, torch.tensor, lambda values: [*map(torch.tensor, values)]])
def test_curves_of_numbers_that_are_tensors(made):
    (axes,) = plotting.curves_figure({"equal": {"x": made([0.25, 0.5])}}).axes[:1]
    assert list(axes.lines[0].get_ydata()) == [0.25, 0.5]


def test_a_hundred_lines_are_all_different():
    looks = plotting.styles(str(number) for number in range(100)).values()
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in looks}) == 100
    # In black and white too, as long as there are markers.
    assert len({(look["marker"], look["linestyle"]) for look in list(looks)[:30]}) == 30


def test_a_balancer_looks_the_same_whoever_else_is_drawn():
    every = {name: {"x": [1.0]} for name in ("a", "b", "c")}

    def looks(figure):
        return {line.get_label(): (line.get_color(), line.get_marker()) for line in figure.axes[0].lines}

    order = list(every)
    some = looks(plotting.curves_figure({"b": every["b"], "new": every["a"]}, order=order))
    assert some["b"] == looks(plotting.curves_figure(every, order=order))["b"]
    assert some["new"] not in looks(plotting.curves_figure(every, order=order)).values()


def test_delta_m():
    figure = plotting.delta_m_figure({"equal": [-1.0, -3.0], "one": 2.0, "none": [math.nan]})
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [
        "equal: -2.0 ± 1.4 %",
        "one: +2.0 %",
        "none: none",
    ]
    points = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    assert points == [[-1.0, -3.0], [2.0]]
    assert "%" in axes.get_xlabel()
    drawn(figure)


@pytest.mark.parametrize("make", BY_RECORDS)
def test_a_single_step_and_thirty_tasks(make):
    drawn(make(rows(count=1)))
    figure = make(rows([f"task {number}" for number in range(30)], count=2))
    drawn(figure)
    if figure.legends:
        looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in figure.axes[0].lines}
        assert len(looks) == 30
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("make", BY_RECORDS)
def test_what_is_absent_is_left_out(make):
    holes = rows()
    for row in holes:
        for name in row:
            if "b/c" in name:
                row[name] = math.nan
    holes[0]["weight/a"] = None
    del holes[1]["norm/a"]
    drawn(make(holes))
    known = Records.of(holes)
    assert list(known.weights) == list(known.norms) == ["a", "$<d>$"]
    assert list(known.cosines) == [("a", "$<d>$")]
    assert math.isnan(known.weights["a"][0])
    assert math.isnan(known.norms["a"][1])


@pytest.mark.parametrize("make", BY_RECORDS)
def test_deterministic_and_opaque_and_without_pyplot(make):
    first = drawn(make(rows()))
    assert first == drawn(make(rows()))
    assert set(first[3::4]) == {255}
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_rows_columns_frames_and_files_are_the_same(tmp_path):
    expected = Records.of(rows())
    columns = {name: column(name) for name in rows()[0]}
    assert Records.of(columns) == expected
    tagged = [{("step" if name == "step" else f"training/{name}"): v for name, v in row.items()} for row in rows()]
    assert Records.of(tagged) == expected
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows())
    assert Records.of(frame) == expected
    pandas.DataFrame(tagged).assign(other="text").to_csv(tmp_path / "log.csv", index=False)
    assert Records.read(tmp_path / "log.csv") == expected
    assert expected.tasks == TASKS
    assert len(expected.cosines) == 3


def test_rows_of_an_evaluator_in_the_same_file_are_left_out(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text("step,training/weight/a,training/weight/b,validation/score\n1,0.5,0.5,\n2,,,0.9\n3,0.4,0.6,\n")
    records = Records.read(file)
    assert records.steps == [1, 3]
    assert records.weights == {"a": [0.5, 0.4], "b": [0.5, 0.6]}


@pytest.mark.parametrize(
    ("make", "given", "error", "message"),
    [
        (plotting.weights_figure, 5, TypeError, "got int"),
        (plotting.weights_figure, [], ValueError, "at least one row"),
        (plotting.weights_figure, [{"weight/a": 1.0}], ValueError, "'step'"),
        (plotting.weights_figure, [{"step": 1, "accuracy": 1.0}], ValueError, "'weight/<task>'"),
        (plotting.weights_figure, [{"step": 1, "weight/a": "much"}], ValueError, "'weight/a', got 'much'"),
        (plotting.weights_figure, {"step": [1, 2], "weight/a": [1.0]}, ValueError, "one length"),
        (
            plotting.weights_figure,
            [{"step": 1, "norm/a": 1.0}],
            ValueError,
            "'weight/<task>', got none, for",
        ),
        (plotting.norms_figure, [{"step": 1, "weight/a": 1.0}], ValueError, "'norm/<task>'"),
        (plotting.cosines_figure, [{"step": 1, "weight/a": 1.0}], ValueError, "cosine/<a>/<b>"),
        (plotting.conflicts_figure, [{"step": 1, "weight/a": 1.0}], ValueError, "cosine/<a>/<b>"),
        (plotting.curves_figure, [1.0], TypeError, "balancer to task"),
        (plotting.curves_figure, {}, ValueError, "got none"),
        (plotting.curves_figure, {"m": {"x": []}}, ValueError, "'x' under 'm'"),
        (plotting.curves_figure, {"m": {"x": [[1.0], [1.0, 2.0]]}}, ValueError, r"got \[1, 2\]"),
        (plotting.delta_m_figure, [1.0], TypeError, "got list"),
        (plotting.delta_m_figure, {"m": [math.nan]}, ValueError, "at least one balancer"),
    ],
)
def test_refuses(make, given, error, message):
    with pytest.raises(error, match=message):
        make(given)


@pytest.mark.parametrize("num", [0, True, 1.5])
def test_number_of_pairs(num):
    with pytest.raises(ValueError, match="num_pairs"):
        plotting.conflicts_figure(rows(), num_pairs=num)
