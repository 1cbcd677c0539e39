import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("ignite")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tabulate")

import pandas as pd  # the extras may be missing
import torch
from torch import nn

from example.data import Flights
from example.study import command, digits, flights, molecules, runs, summary, training
from example.study.methods import BUDGET, SETTINGS, configurations
from example.study.problem import BINARY, REGRESSION, Data, MissingDataError, Part, Problem, package_folder
from example.study.problems import PROBLEMS
from example.study.runs import TUNING_SEED, Job, Key, Results
from example.study.training import Outcome
from example.study.verdict import verdict

METHODS, SEEDS = ["single", "equal", "fixed", "imtl"], [0, 1]
RUNS = len(METHODS) * (BUDGET + len(SEEDS))


def tiny_part(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    amount, kind = x[:, 0] + 0.1 * x[:, 1], (x[:, 2] > 0).float()
    amount[::3] = torch.nan
    return Part(x, {"amount": amount, "kind": kind})


def tiny_data():
    return Data(tiny_part(96, 0), tiny_part(60, 1), tiny_part(60, 2))


def tiny_backbone():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU())


def tiny_weights(training):
    return [[1.0, 2.0], [2.0, 1.0]]


def no_data():
    raise MissingDataError("The data are in the package nowhere.")


TINY = Problem("tiny", {"amount": REGRESSION, "kind": BINARY}, tiny_data, tiny_backbone, 8, 2, 32, 2e-2, tiny_weights)


@pytest.fixture
def study(tmp_path):
    def once(problems=(TINY,), methods=METHODS, seeds=SEEDS, out=tmp_path):
        with ThreadPoolExecutor(1) as pool:
            return command.study({problem.name: problem for problem in problems}, methods, seeds, out, pool)

    return once


@pytest.fixture
def done(monkeypatch):
    """The runs that are really run."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return training.run(*arguments)

    monkeypatch.setattr(runs, "run", counted)
    return calls


def metrics_of(folder):
    return {key: outcome.metrics for key, outcome in Results(folder / "results.csv").outcomes.items()}


# -------------------------------------------------------------------------------------------------- resuming, repeating


def test_what_is_done_is_not_run_again_and_gives_the_same_table(study, done, tmp_path):
    text = study()
    assert len(done) == RUNS == len(metrics_of(tmp_path))
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "tiny.png").exists()
    assert study() == text
    assert len(done) == RUNS


def test_a_stopped_study_goes_on_where_it_stopped(study, done, monkeypatch, tmp_path):
    text, whole = study(), metrics_of(tmp_path)
    done.clear()
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    counted, count = runs.run, itertools.count()

    def stops(*arguments):
        if next(count) == 10:
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(runs, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        study(out=stopped)
    kept = metrics_of(stopped)
    assert 0 < len(kept) <= 10
    done.clear()
    monkeypatch.setattr(runs, "run", counted)
    resumed = study(out=stopped)
    assert len(done) == RUNS - len(kept)
    assert metrics_of(stopped) == whole
    assert without_times(resumed) == without_times(text)


def without_times(text):
    """Times are the one thing that a second time is not the same."""
    return [line.rsplit("|", 2)[0] for line in text.splitlines() if line.startswith("|")]


def test_more_seeds_run_only_what_is_new(study, done):
    study(seeds=[0])
    first = len(done)
    study(seeds=[0, 1])
    assert len(done) == first + len(METHODS)


def test_results_of_another_schedule_are_not_used(study, done):
    study(methods=["single", "equal"])
    first = len(done)
    study(problems=[replace(TINY, epochs=3)], methods=["single", "equal"])
    assert len(done) == 2 * first


def test_numbers_come_back_from_the_file_to_the_bit(tmp_path):
    key, outcome = Key("p", "s", "m", "lr=0.1, a", 3, "test"), Outcome({"a": 0.1 + 0.2, "b": -1 / 3}, 2 / 3)
    Results(tmp_path / "results.csv").add(key, outcome)
    assert Results(tmp_path / "results.csv").outcomes == {key: outcome}


@pytest.mark.parametrize("method", [m for m in SETTINGS if m != "upgrad"])
def test_the_same_seed_gives_the_same_metrics_and_another_does_not(method):
    configuration = configurations(TINY, method)[-1]
    one, again, other = (training.run(TINY, method, configuration, seed, "test").metrics for seed in (5, 5, 6))
    assert one == again
    assert one != other


# -------------------------------------------------------------------------------------------------------------- missing


def test_a_problem_without_its_data_is_left_out_and_the_others_are_not(study, capsys):
    text = study(problems=[replace(TINY, name="absent", load=no_data), TINY])
    assert "## tiny" in text
    assert "absent" not in text
    printed = capsys.readouterr().out
    assert "'absent' is left out. The data are in the package nowhere." in printed


def test_nothing_at_all(study, tmp_path):
    assert study(problems=[replace(TINY, load=no_data)]) == "There is nothing to report."
    assert not (tmp_path / "table.md").exists()


def test_the_message_says_how_to_install_and_survives_the_way_between_processes():
    with pytest.raises(MissingDataError, match=r"in the package no_such_data\. Install it: pip install this") as caught:
        package_folder("no_such_data", "pip install this")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_molecules_of_another_version(monkeypatch, tmp_path):
    monkeypatch.setattr(molecules, "package_folder", lambda *_: tmp_path)
    with pytest.raises(MissingDataError, match=r"--no-deps MoleculeACE==3\.0\.0"):
        molecules.measured()


# ------------------------------------------------------------------------------------------------------ the same chance


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_method_has_the_same_budget(name):
    for method in SETTINGS:
        labels = [configuration.label for configuration in configurations(PROBLEMS[name], method)]
        assert len(set(labels)) == len(labels) == BUDGET


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_job_can_go_to_another_process(name):
    job = Job(PROBLEMS[name], "imtl", 0, 0, "test")
    assert pickle.loads(pickle.dumps(job)).key == job.key


def test_the_configuration_is_chosen_by_the_validation_part_and_its_own_seed_only(tmp_path):
    results = Results(tmp_path / "results.csv")
    for method, (number, good) in itertools.product(["single", "equal"], enumerate([0.1, 0.4, 0.3, 0.2])):
        validation = Job(TINY, method, number, TUNING_SEED, "validation")
        results.outcomes[validation.key] = Outcome({"amount": good, "kind": good}, 0.0)
        test = Job(TINY, method, number, 0, "test")
        results.outcomes[test.key] = Outcome({"amount": 1 - good, "kind": 1 - good}, 0.0)
    assert summary.choose(summary.tried(TINY, ["single", "equal"], results)) == {"single": 1, "equal": 1}
    jobs = runs.tuning_jobs(TINY, METHODS)
    assert {(job.part, job.seed) for job in jobs} == {("validation", TUNING_SEED)}
    assert {job.part for job in runs.test_jobs(TINY, {"equal": 1}, SEEDS)} == {"test"}


def test_a_task_alone_takes_as_many_steps_on_its_labelled_samples():
    configuration, data = configurations(TINY, "equal")[0], tiny_data()
    _, together = training.fit(TINY, ["amount", "kind"], data.training, configuration, 0)
    _, alone = training.fit(TINY, ["amount"], data.training, configuration, 0)
    assert len(together) == len(alone) == 6
    assert len(training.labelled(data.training.labels["amount"])) == 64


def test_a_network_that_diverged_is_no_better_than_chance():
    model, _ = training.fit(TINY, ["amount", "kind"], tiny_data().training, configurations(TINY, "equal")[0], 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    metrics = training.evaluate(TINY, model, tiny_data().test)
    assert metrics["kind"] == 0.5
    assert metrics["amount"] <= 0


# --------------------------------------------------------------------------------------------------------------- splits


def test_no_digit_is_in_two_parts(monkeypatch):
    parts = digits.split_digits()
    assert sorted(torch.cat(parts).tolist()) == list(range(5000))
    # Every image has one shade of its own, by which it is known again in the corners of the pairs.
    shades = torch.arange(1.0, 5001.0)[:, None, None].expand(-1, 28, 28)
    monkeypatch.setattr(digits, "_digits", lambda: (shades, torch.arange(5000) % 10))
    data = digits._pairs.__wrapped__((300, 100, 100))
    for part, chosen in zip((data.training, data.validation, data.test), parts, strict=True):
        first, second = part.features[:, 0, 0, 0], part.features[:, 0, -1, -1]
        assert torch.isin(torch.cat([first, second]).long() - 1, chosen).all()
        left, right = (first.long() - 1) % 10, (second.long() - 1) % 10
        assert torch.equal(part.labels["left"], left)
        assert torch.equal(part.labels["right"], right)
        assert torch.equal(part.labels["sum"], (left + right).float())
        assert torch.equal(part.labels["odd"], ((left * right) % 2 == 1).float())


def test_the_standardised_sum_is_the_same_sum_in_other_units(monkeypatch):
    part = Part(torch.zeros(4, 1), {"left": torch.tensor([1, 2, 3, 4]), "sum": torch.tensor([2.0, 4.0, 6.0, 8.0])})
    monkeypatch.setattr(digits, "_pairs", lambda _: Data(part, part, Part(part.features, {"sum": torch.ones(4)})))
    data = digits.load_standardised()
    assert data.training.labels["sum"].std().item() == pytest.approx(1.0)
    assert torch.allclose(data.test.labels["sum"], torch.full((4,), -4 / part.labels["sum"].std()))
    assert torch.equal(data.training.labels["left"], part.labels["left"])


@pytest.fixture
def measurements(monkeypatch, tmp_path):
    """As the package has them: each target measured on molecules of its own and on some that others were too."""
    monkeypatch.setattr(molecules, "package_folder", lambda *_: tmp_path)
    folder = tmp_path / "Data" / "benchmark_data"
    folder.mkdir(parents=True)
    for number, target in enumerate(molecules.TARGETS):
        chosen = [index for index in range(200) if (index + number) % 3]
        names = ["C" * (1 + index // 2) + "NO"[index % 2] for index in chosen]
        pd.DataFrame({"smiles": names, "y": [1.0 * index for index in chosen]}).to_csv(
            folder / f"{target}.csv", index=False
        )


@pytest.mark.usefixtures("measurements")
def test_no_molecule_is_in_two_parts():
    parts = molecules.split(molecules.measured())
    assert [len(part) for part in parts] == [120, 40, 40]
    assert len(set().union(*parts)) == 200


@pytest.mark.usefixtures("measurements")
def test_targets_are_standardised_on_the_training_part():
    data = molecules.load.__wrapped__()
    for labels in data.training.labels.values():
        known = labels[~labels.isnan()]
        assert 0 < len(known) < len(labels)
        assert known.mean().item() == pytest.approx(0.0, abs=1e-5)
        assert known.std().item() == pytest.approx(1.0, abs=1e-5)
    assert data.test.features.shape == (40, molecules.FEATURES)
    assert data.test.labels[molecules.TARGETS[0]][~data.test.labels[molecules.TARGETS[0]].isnan()].mean().abs() > 1e-3


def test_the_flights_that_are_kept_back_are_halved(monkeypatch):
    parts = [Flights(torch.arange(n, n + 6.0)[:, None], {"a": torch.arange(n, n + 6.0)}) for n in (0, 6)]
    monkeypatch.setattr(flights, "load_flights", lambda *_: parts)
    data = flights.load.__wrapped__()
    assert [part.labels["a"].tolist() for part in (data.training, data.validation, data.test)] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]


# ------------------------------------------------------------------------------------------------- numbers and verdicts


def changes_of(**rows):
    return pd.DataFrame(rows).T


def test_changes_and_differences_by_hand():
    index = pd.MultiIndex.from_product([["single", "a"], [0, 1]], names=["method", "seed"])
    metrics = pd.DataFrame({"x": [1.0, 3.0, 3.0, 4.0], "y": [-2.0, -2.0, -1.0, -2.0]}, index=index)
    changes = summary.changes(metrics)
    assert changes.loc["single"].tolist() == [-25.0, 25.0]
    assert changes.loc["a"].tolist() == [50.0, 50.0]  # x 3 and 4 over 2, y -1 and -2 over -2
    assert summary.difference(changes, "a", "single") == pytest.approx((50.0, 25.0))
    assert summary.ranks(metrics).to_dict() == pytest.approx({"single": 1.875, "a": 1.125})


def test_the_verdict_where_one_helps():
    changes = changes_of(
        single=[0.0, 0.1, -0.1],
        equal=[-9.0, -9.2, -8.8],
        fixed=[-5.0, -5.2, -4.8],
        good=[-2.0, -2.2, -1.8],
        bad=[-12.0, -12.3, -11.9],
    )
    sentences = verdict(changes)
    assert "Better than equal weights: good (+7.0 ± 0.0)." in sentences
    assert "Worse than equal weights: bad (-3.1 ± 0.0)." in sentences
    assert "Better than a network per task: none." in sentences
    assert sentences[-1] == "Balancing helps here: good is the best, +3.0 ± 0.0 against tuned fixed weights."


def test_the_verdict_where_none_helps_though_one_looks_better():
    changes = changes_of(
        single=[0.0, 0.1, -0.1], equal=[-9.0, -9.2, -8.8], fixed=[-5.0, -5.2, -4.8], noisy=[-9.0, -3.0, -1.0]
    )
    sentences = verdict(changes)
    assert "Better than tuned fixed weights: none." in sentences
    assert sentences[-1].startswith("Balancing does not help here: tuned fixed weights do as well as the best balancer")


def test_the_verdict_where_it_may_be_chance():
    changes = changes_of(single=[0.0] * 4, equal=[-3.0] * 4, fixed=[-4.0] * 4, some=[-2.5, -1.5, -2.5, -1.5])
    assert verdict(changes)[-1] == ("Balancing may help here, or it is chance: some, +1.0 ± 0.3 against equal weights.")


def test_two_standard_errors_decide():
    changes = changes_of(single=[0.0] * 4, equal=[0.0] * 4, fixed=[-1.0] * 4, some=[0.0, 2.0, 0.0, 2.0])
    mean, error = summary.difference(changes, "some", "equal")
    assert mean == 1.0
    assert mean < 2 * error
    assert "Better than equal weights: none." in verdict(changes)
    changes.loc["some"] = [0.5, 1.5, 0.5, 1.5]
    assert "Better than equal weights: some (+1.0 ± 0.3)." in verdict(changes)


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_refuses_what_there_is_not(capsys):
    with pytest.raises(SystemExit):
        command.main(["--problems", "weather"])
    assert "invalid choice: 'weather'" in capsys.readouterr().err
