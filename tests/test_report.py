"""The report says what the records hold, in one page that loads nothing."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from mtlwrap import IMTLG, UW, Compose, FixedWeights, MultiTaskModel, Parameters, cached
from mtlwrap.records import Records
from mtlwrap.report import Recorder, Run, findings, main, report, write_report
from tests.processes.pool import Pool
from tests.waiting import waits

WRONG, DECISION = "What went wrong", "What the balancer did about it"
DISAGREE, COST, ALONE = "Which tasks disagree, and when", "What a step cost", "Against each task trained alone"
EVIL = "<script>alert(1)</script>&\"'"


def rows(first="a", second="b", count=9):
    """The first two agree less and less; the third minds nobody."""
    return [
        {"step": 10 * i, "conflicts": 0.25}
        | {f"weight/{first}": 1.0, f"weight/{second}": 3.0, "weight/c": 2.0}
        | {f"norm/{first}": 1.0, f"norm/{second}": 5.0, "norm/c": 2.0}
        | {f"cosine/{first}/{second}": 0.2 - 0.1 * i, f"cosine/{first}/c": 0.5, f"cosine/{second}/c": 0.4}
        for i in range(1, count + 1)
    ]


RUN = Run(
    "IMTL-G",
    metrics={"a": {"AUC": 0.9}, "b": {"error": 2.0}},
    single={"a": {"AUC": 0.75}, "b": {"error": 1.6}},
    higher_is_better={"AUC": True, "error": False},
    seconds_per_step=0.006,
    plain_seconds_per_step=0.004,
)


class Page(HTMLParser):
    """The tags that are open, which must close in order, and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_findings():
    found = findings(rows(), RUN)
    disagreement = " ".join(found[DISAGREE])
    assert "“a” and “b” conflict most: the mean cosine of their gradients is -0.30" in disagreement
    assert "below 0 in 78 % of the 9 records" in disagreement
    assert "the last third, steps 61 to 90; from third to third it went from 0 to -0.30 to -0.60" in disagreement
    assert "“a” and “c” agree best (+0.50)" in disagreement
    assert "In 25 % of the steps" in disagreement
    decision = " ".join(found["What IMTL-G did about it"])
    assert "It gave “b” the largest weight, 3 on average, and “a” the smallest, 1." in decision
    assert "“b” had the longest gradient on average, 5 times that of “a”" in decision
    assert found[COST][0] == "A step took 6 ms, 1.50 times the 4 ms of a plain sum of the losses."
    alone = " ".join(found[ALONE])
    assert "Δm = -2.5 %" in alone
    assert "“a”: AUC 0.9 here, 0.75 alone, 20.0 % better." in alone
    assert "“b”: error 2 here, 1.6 alone, 25.0 % worse." in alone


def test_what_is_not_known_is_said():
    found = findings([{"step": 1, "loss/a": 1.0}])
    texts = " ".join(text for texts in found.values() for text in texts)
    assert "No cosines" in texts
    assert "No weights" in texts
    assert "not recorded" in texts
    assert "no results of single-task training" in texts
    assert "<img" not in report([{"step": 1, "loss/a": 1.0}])


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (-0.5, "conflict most"),
        (-0.01, "weakly but steadily"),
        (-0.001, "No two tasks conflict clearly"),
        (0.0, "No two tasks conflict clearly"),
        (0.5, "The tasks agree"),
    ],
)
def test_it_does_not_make_up_conflicts(cosine, words):
    text = findings([{"step": step, "weight/a": 1.0, "weight/b": 1.0, "cosine/a/b": cosine} for step in (1, 2, 3)])
    assert words in text[DISAGREE][0]
    assert "of the 3 records" in text[DISAGREE][0]
    assert "Nothing: every task's gradient had the weight 1" in text["What the balancer did about it"][0]


def test_one_record_makes_nothing_steady():
    (text, *_) = findings([{"step": 7, "cosine/a/b": -0.01}])[DISAGREE]
    assert "No two tasks conflict clearly" in text
    assert "below 0 in 100 % of the one record" in text


@pytest.mark.parametrize(("ratio", "said"), [(9.0, False), (11.0, True)])
def test_lengths_far_apart_are_worth_balancing(ratio, said):
    rows = [{"step": step, "norm/a": 1.0, "norm/b": ratio, "cosine/a/b": -0.01} for step in (1, 2, 3)]
    texts = findings(rows)["What the balancer did about it"]
    assert any(f"{ratio:g} times that of “a”" in text for text in texts)
    assert any("drowns the shortest under a plain sum" in text for text in texts) is said


def test_metrics_are_compared_only_where_the_better_is_known():
    given = {"metrics": {"a": {"mae": 2.0, "AUC": 0.9}}, "single": {"a": {"mae": 1.0, "AUC": 0.9}}}
    texts = findings([{"step": 1, "loss/a": 1.0}], Run(**given))[ALONE]
    assert texts == ["Whether higher is better was not said of mae, AUC: see higher_is_better of Run."]
    texts = findings([{"step": 1, "loss/a": 1.0}], Run(**given, higher_is_better={"mae": False}))[ALONE]
    assert "Δm = -100.0 %" in texts[0]
    assert any("not said of AUC" in text for text in texts)
    page = report([{"step": 1, "loss/a": 1.0}], Run(**given))
    assert "<td>mae</td><td>2</td><td>1</td><td>-</td>" in page


@pytest.mark.parametrize("given", [{"a": 0.5}, [0.5], 0.5])
def test_metrics_of_another_form_are_refused(given):
    for name in ("metrics", "single"):
        with pytest.raises(TypeError, match=f"{name}: expected numbers by task and then by name"):
            Run(**{name: given})


@pytest.mark.parametrize(("below", "words"), [(3, "weakly but steadily"), (2, "No two tasks conflict clearly")])
def test_a_weak_conflict_is_one_from_three_records_in_four(below, words):
    cosines = [-0.04] * below + [0.01] * (4 - below)
    given = [{"step": step, "cosine/a/b": cosine} for step, cosine in enumerate(cosines, 1)]
    assert words in findings(given)[DISAGREE][0]


@pytest.mark.parametrize(("size", "said"), [(0.04, False), (0.06, True)])
def test_steps_with_a_conflict_are_counted_only_where_cosines_are_not_all_neutral(size, said):
    given = [
        {"step": step, "conflicts": 0.72, "cosine/a/b": size * (-1) ** step, "cosine/a/c": 0.01, "cosine/b/c": 0.0}
        for step in (1, 2, 3, 4)
    ]
    texts = findings(given)[DISAGREE]
    assert "No two tasks conflict" in texts[0]
    assert any("In 72 % of the steps" in text for text in texts) is said


def test_no_third_is_worst_where_all_are_the_same():
    given = [{"step": step, "cosine/a/b": -0.95 + step / 10_000} for step in (1, 2, 3)]
    assert "third" not in " ".join(findings(given)[DISAGREE])
    given[2]["cosine/a/b"] = -0.97
    assert "from -0.95 to -0.95 to -0.97" in " ".join(findings(given)[DISAGREE])


@pytest.mark.parametrize("stopped", [0, 1, 4])
def test_a_balancer_that_stops_the_shared_part_comes_first(stopped):
    weights = [0.0] * stopped + [0.5] * (4 - stopped)
    given = [
        {"step": step, "weight/a": weight, "weight/b": weight, "weight/c": None, "cosine/a/b": -0.99}
        for step, weight in enumerate(weights, 1)
    ]
    found = findings(given)
    assert (WRONG in found) is (stopped > 0)
    if stopped:
        assert next(iter(found)) == WRONG
        assert f"not trained in {25 * stopped} % of the records" in found[WRONG][0]
        assert "IMTLG(strict=True)" in found[WRONG][0]
    assert ("the shared part was not trained" in found[DECISION][0]) is (stopped == 4)
    assert ("Nothing" in found[DECISION][0]) is (stopped < 4)


def test_imtl_g_stops_where_gradients_oppose_each_other(tmp_path):
    model = MultiTaskModel(nn.Linear(3, 1), {"a": nn.Identity(), "b": nn.Identity()}, IMTLG())
    with Recorder(tmp_path, model) as recorder, cached():
        z = model(torch.randn(8, 3))
        losses = {"a": z["a"].mean(), "b": -2 * z["b"].mean()}
        model.backward(losses)
        recorder.record(losses)
    assert "not trained in 100 %" in findings(Records.read(tmp_path / "statistics.csv"))[WRONG][0]


def test_losses_alone_are_no_balanced_training():
    found = findings([{"step": 1, "loss/a": 1.0, "weight/a": None, "norm/a": None}])
    assert "No balanced backward was seen" in found[WRONG][0]
    assert "model.backward(losses)" in found[WRONG][0]


@pytest.mark.parametrize(
    ("gradients", "words"),
    [(None, "on what the tasks share:"), ("parameters", "on the parameters"), ("representation", "on the represent")],
)
def test_the_page_says_what_the_gradients_are_on(gradients, words):
    text = Page(report(rows(), Run(gradients=gradients))).text
    assert f"The gradients are those {words}" in text


def test_page_is_one_file_that_loads_nothing_and_names_are_text():
    page = report(rows(EVIL, "b$x$"), RUN, title="<b>")
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert EVIL in parsed.text
    assert "<b>" in parsed.text
    assert len(parsed.links) == 4
    assert all(link.startswith("data:image/svg+xml;base64,") for link in parsed.links)
    assert not re.search(r"https?://|url\(|@import", page)
    assert parsed.text.index("conflict most") < parsed.text.index("How to read the figures")


def test_the_same_again():
    assert report(rows(), RUN) == report(rows(), RUN)


@pytest.mark.parametrize(
    "given", [rows(count=1), [{**row, "cosine/a/b": math.nan, "weight/c": None} for row in rows()]]
)
def test_a_single_step_and_absent_tasks(given):
    text = Page(report(given)).text
    assert "nan" not in text.lower()


def model_of(*tasks):
    return MultiTaskModel(nn.Linear(3, 4), {task: nn.Linear(4, 1) for task in tasks}, IMTLG())


def test_recorder_writes_the_means(tmp_path):
    model = model_of("a", "b", "c")
    seen = {"loss": [], "norm": [], "cosine": [], "weight": []}
    with Recorder(tmp_path / "run", model, every=2) as recorder:
        for step in range(5):
            with cached():
                losses = {task: y.square().mean() for task, y in model(torch.randn(8, 3)).items()}
                losses["c"] = losses["c"] if step == 4 else None
                model.backward(losses)
                recorder.record(losses)
                gradients = model.task_gradients
                seen["loss"].append(losses["a"].item())
                seen["norm"].append(gradients.norms[1].item())
                seen["cosine"].append(gradients.cosines[0, 1].item())
                seen["weight"].append(model.task_weights[0].item())
    records = Records.read(tmp_path / "run" / "statistics.csv")
    assert records.steps == [2, 4, 5]
    found = records.losses["a"], records.norms["b"], records.cosines["a", "b"], records.weights["a"]
    for values, expected in zip(found, (seen[what] for what in ("loss", "norm", "cosine", "weight")), strict=True):
        means = [sum(expected[:2]) / 2, sum(expected[2:4]) / 2, expected[4]]
        assert values == pytest.approx(means, rel=1e-5)
    assert [math.isnan(value) for value in records.norms["c"]] == [True, True, False]
    assert all(share in (0, 0.5, 1) for share in records.conflicts)


def losses_of(model, absent=()):
    losses = {task: y.square().mean() for task, y in model(torch.randn(8, 3)).items()}
    return {task: None if task in absent else loss for task, loss in losses.items()}


def steps(recorder, count=1):
    for _ in range(count):
        with cached():
            losses = losses_of(recorder.model)
            recorder.model.backward(losses)
            recorder.record(losses)


def test_recorder_replaces_statistics_or_goes_on_with_them(tmp_path):
    path = tmp_path / "statistics.csv"
    for append, expected in [(True, [2, 3]), (True, [2, 3, 4, 6]), (False, [2, 3])]:
        with Recorder(tmp_path, model_of("a", "b"), every=2, append=append) as recorder:
            steps(recorder, 3)
        assert Records.read(path).steps == expected
    with path.open("a") as file:
        file.write("4,0.1,0.")  # what a process was about to write as it was ended
    with Recorder(tmp_path, model_of("a", "b"), every=2, append=True) as recorder:
        steps(recorder)
    assert Records.read(path).steps == [2, 3, 4]
    assert Records.read(path).losses["a"][2] != 0.1


def test_recorder_does_not_append_to_other_statistics(tmp_path):
    Recorder(tmp_path, model_of("a", "b")).close()
    with pytest.raises(ValueError, match=r"the columns of this model.*loss/c.*append=False"):
        Recorder(tmp_path, model_of("a", "c"), append=True)
    with (tmp_path / "statistics.csv").open("a") as file:
        file.write("one,2\r\n")
    before = (tmp_path / "statistics.csv").read_bytes()
    with pytest.raises(ValueError, match=r"a step in the last row.*'one,2'"):
        Recorder(tmp_path, model_of("a", "b"), append=True)
    assert (tmp_path / "statistics.csv").read_bytes() == before


@pytest.mark.parametrize(
    "hand_over",
    [
        lambda losses: list(losses.values()),
        lambda losses: torch.stack(list(losses.values())),
        lambda losses: {task: [loss / 4, None, 3 * loss / 4] for task, loss in losses.items()},
    ],
)
def test_recorder_takes_what_backward_takes(hand_over, tmp_path):
    model = model_of("a", "b")
    with Recorder(tmp_path, model) as recorder, cached():
        losses = losses_of(model)
        given = hand_over(losses)
        model.backward(given)
        recorder.record(given)
    records = Records.read(tmp_path / "statistics.csv")
    for position, (task, loss) in enumerate(losses.items()):
        assert records.losses[task] == [pytest.approx(loss.item(), rel=1e-6)]
        assert records.weights[task] == [pytest.approx(model.task_weights[position].item())]


@pytest.mark.parametrize("balancer", [IMTLG, UW, lambda: None])
def test_recorder_refuses_what_is_no_step(balancer, tmp_path):
    model = MultiTaskModel(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}, balancer())
    recorder = Recorder(tmp_path, model, every=2)
    for _ in range(3):  # before there was any step, and after one
        with cached():
            losses = losses_of(model)
            with pytest.raises(ValueError, match="no balanced backward"):
                recorder.record(losses)
            model.backward(losses)
            recorder.record(losses)
            with pytest.raises(ValueError, match="no balanced backward"):
                recorder.record({task: loss.detach() for task, loss in losses.items()})
            losses = losses_of(model)
            sum(losses.values()).backward()
            with pytest.raises(ValueError, match="no balanced backward"):
                recorder.record(losses)
        with cached():
            losses = losses_of(model)
            model.backward(losses)
        with pytest.raises(ValueError, match=r"not there any more.*with cached"):
            recorder.record(losses)
        losses = losses_of(model)
        with cached():
            model.backward(losses)
            with pytest.raises(ValueError, match=r"not there any more.*with cached"):
                recorder.record(losses)
    with pytest.raises(ValueError, match="no task called 'c'"):
        recorder.record({"c": None})
    recorder.close()
    with pytest.raises(ValueError, match="after it"):
        recorder.record({})
    assert Records.read(tmp_path / "statistics.csv").steps == [2, 3]


def test_steps_without_gradients_are_steps(tmp_path):
    exact = MultiTaskModel(
        nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}, IMTLG(), gradients=Parameters(refresh_every=3)
    )
    with Recorder(tmp_path / "refreshed", exact, every=1) as recorder:
        steps(recorder, 4)
        losses = losses_of(exact)
        exact.backward(losses)
        with pytest.raises(ValueError, match="with cached"):
            recorder.record(losses)
    records = Records.read(tmp_path / "refreshed" / "statistics.csv")
    assert [math.isnan(value) for value in records.norms["a"]] == [False, True, True, False]
    assert not any(map(math.isnan, records.weights["a"]))
    model = model_of("a", "b")
    with Recorder(tmp_path / "unlabelled", model, every=1) as recorder, cached():
        steps(recorder)
        losses = losses_of(model, absent="ab")  # the gradients of the step before are there still
        model.backward(losses)
        recorder.record(losses)
    assert Records.read(tmp_path / "unlabelled" / "statistics.csv").steps == [1]
    frozen = model_of("a", "b")
    with Recorder(tmp_path / "frozen", frozen, every=1) as recorder:
        for trainable in (False, True, False):
            frozen.backbone.requires_grad_(trainable)
            steps(recorder)
        with cached():  # and nothing at all
            losses = losses_of(frozen, absent="ab")
            frozen.backward(losses)
            recorder.record(losses)
    records = Records.read(tmp_path / "frozen" / "statistics.csv")
    assert records.steps == [1, 2, 3]
    assert recorder._step == 4
    for values in (records.weights["a"], records.norms["a"], records.conflicts):  # none of an earlier step
        assert [math.isnan(value) for value in values] == [True, False, True]


def test_recorder_waits_for_the_device_in_every_nth_step_only(tmp_path):
    model = model_of("a", "b")
    recorder, waited = Recorder(tmp_path, model, every=3), []
    steps(recorder, 3)
    for _ in range(3):
        with cached():
            losses = losses_of(model)
            model.backward(losses)
            with waits() as seen:
                recorder.record(losses)
        seen.pop("tensor", None)  # a mask of the host's, moved without waiting
        waited.append(dict(seen))
    assert waited == [{}, {}, {"tolist": 1}]
    recorder.close()


def test_recorder_notes_what_it_knows_beside_what_the_user_said(tmp_path):
    with Recorder(tmp_path, model_of("a", "b"), every=2) as recorder:
        assert Run.load(tmp_path) == Run("IMTLG", gradients="representation")
        Run(metrics={"a": {"AUC": 0.9}}).save(tmp_path)
        steps(recorder, 8)
    first = Run.load(tmp_path)
    assert 0 < first.seconds_per_step < 10
    assert (first.balancer, first.metrics) == ("IMTLG", {"a": {"AUC": 0.9}})
    assert "A step took" in write_report(tmp_path).read_text(encoding="utf-8")
    first.save(tmp_path)  # what was not changed is the recorder's still
    # Another training in the same folder knows other things; one that is resumed has the time of the first.
    exact = MultiTaskModel(
        nn.Linear(3, 4), {t: nn.Linear(4, 1) for t in "ab"}, Compose(UW(), IMTLG(nonneg=True)), gradients="parameters"
    )
    Recorder(tmp_path, exact, append=True).close()
    expected = Run("Compose(UW, IMTLG(nonneg=True))", first.metrics, gradients="parameters")
    assert Run.load(tmp_path) == Run(
        expected.balancer, first.metrics, seconds_per_step=first.seconds_per_step, gradients="parameters"
    )
    Recorder(tmp_path, exact).close()
    assert Run.load(tmp_path) == expected
    # What the user says counts, and stays.
    Run("mine", seconds_per_step=1.0).save(tmp_path)
    with Recorder(tmp_path, MultiTaskModel(nn.Linear(3, 4), [nn.Linear(4, 1)] * 2, FixedWeights([1, 2]))) as recorder:
        pass
    assert Run.load(tmp_path) == Run("mine", seconds_per_step=1.0, gradients="representation")


def test_the_time_of_a_step_is_that_from_reading_to_reading(tmp_path, monkeypatch):
    readings = iter([0.0, 2.0, 4.0, 100.0, 102.0])  # an evaluation in between
    monkeypatch.setattr("mtlwrap.recorder.perf_counter", lambda: next(readings))
    with Recorder(tmp_path, model_of("a"), every=2) as recorder:
        steps(recorder, 11)
    assert Run.load(tmp_path).seconds_per_step == 1.0


def train_in_a_process(rank, size, folder):
    """The last task has a label in the second process only."""
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(model_of("a", "b", "c"))
    with Recorder(f"{folder}/{rank}", model.module, every=2) as recorder:
        for _ in range(4):
            with cached():
                losses = {task: y.square().mean() for task, y in model(torch.randn(8, 3)).items()}
                losses["c"] = losses["c"] if rank else None
                model.module.backward(losses)
                recorder.record(losses)
    return model.module.task_weights.tolist()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_of_two_processes_the_first_writes_what_it_has_labels_of(tmp_path):
    pool = Pool(2)
    try:
        weights, others = pool.run(train_in_a_process, str(tmp_path))
    finally:
        pool.close()
    assert weights == others
    assert weights[2] != 0
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    records = Records.read(tmp_path / "0" / "statistics.csv")
    assert records.steps == [2, 4]
    assert [set(of) for of in (records.losses, records.weights, records.norms)] == [{"a", "b"}] * 3
    assert set(records.cosines) == {("a", "b")}


def test_recorder_changes_nothing(tmp_path):
    ends = []
    for record in (False, True):
        torch.manual_seed(0)
        model = model_of("a", "b")
        optimizer = torch.optim.SGD(model.param_groups(lr=0.1))
        recorder = Recorder(tmp_path, model)
        for _ in range(3):
            with cached():
                losses = {task: y.square().mean() for task, y in model(torch.randn(8, 3)).items()}
                optimizer.zero_grad()
                model.backward(losses)
                if record:
                    recorder.record(losses)
            optimizer.step()
        recorder.close()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_recorder_and_ignites_statistics_are_the_same(tmp_path):
    pytest.importorskip("ignite")
    from ignite.engine import Events

    from mtlwrap.ignite import BalancerStatistics, CSVLogger, MultitaskEvents, create_multitask_trainer

    model = model_of("a", "b")
    optimizer = torch.optim.SGD(model.param_groups(lr=0.1))
    trainer = create_multitask_trainer(model, optimizer, {"a": nn.MSELoss(), "b": nn.L1Loss()})
    BalancerStatistics(model).attach(trainer, every=2)
    recorder = Recorder(tmp_path, model, every=2)
    trainer.add_event_handler(MultitaskEvents.BACKWARD_COMPLETED, lambda engine: recorder.record(engine.state.losses))
    with CSVLogger(tmp_path / "log.csv") as logger:
        logger.attach_output_handler(trainer, Events.ITERATION_COMPLETED(every=2), tag="training", metric_names="all")
        trainer.run([(torch.randn(8, 3), {"a": torch.randn(8, 1), "b": torch.randn(8, 1)})] * 6)
    recorder.close()
    ours, theirs = Records.read(tmp_path / "statistics.csv"), Records.read(tmp_path / "log.csv")
    assert ours.tasks == theirs.tasks
    assert ours.steps == theirs.steps
    assert ours.conflicts == theirs.conflicts
    assert ours.cosines["a", "b"] == pytest.approx(theirs.cosines["a", "b"], abs=1e-6)
    for task in ours.tasks:
        assert ours.weights[task] == pytest.approx(theirs.weights[task], rel=1e-5)
        assert ours.norms[task] == pytest.approx(theirs.norms[task], rel=1e-5)


@pytest.fixture
def folder(tmp_path):
    header = list(rows()[0])
    lines = [",".join(header), *(",".join(str(row[name]) for name in header) for row in rows())]
    (tmp_path / "statistics.csv").write_text("\n".join(lines))
    RUN.save(tmp_path)
    return tmp_path


def test_command(folder, capsys):
    main([str(folder)])
    assert (folder / "report.html").read_text(encoding="utf-8") == report(rows(), RUN)
    assert "report.html" in capsys.readouterr().out
    assert write_report(folder, folder / "other.html").name == "other.html"
    assert Run.load(folder) == RUN


def test_command_without_details(folder):
    (folder / "run.json").unlink()
    assert "not recorded" in write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("details", "complaint"),
    [("{", "expected a JSON object"), (json.dumps({"speed": 1}), "speed"), ("[1]", "expected")],
)
def test_details_that_cannot_be_read(details, complaint, folder, capsys):
    (folder / "run.json").write_text(details)
    with pytest.raises(SystemExit):
        main([str(folder)])
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "missing"])
def test_folder_without_statistics(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / name)])
    said = capsys.readouterr().err
    assert f"no statistics.csv in {tmp_path / name}; mtlwrap.report.Recorder writes it." in said
    assert ("There is no such folder" in said) is (name == "missing")


@pytest.mark.parametrize(("every", "complaint"), [(0, "got 0"), (True, "got True"), (1.5, "got 1.5")])
def test_recorder_refuses(every, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        Recorder(tmp_path, model_of("a"), every=every)
    with pytest.raises(TypeError, match="got Linear"):
        Recorder(tmp_path, nn.Linear(1, 1))


def test_the_package_and_its_recorder_need_no_matplotlib():
    code = "import sys, mtlwrap, mtlwrap.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(("spoilt_from", "share"), [(0, 100), (3, 50)])
def test_gradients_that_are_not_finite_are_said_first(tmp_path, spoilt_from, share):
    model = MultiTaskModel(nn.Linear(4, 8), [nn.Linear(8, 1), nn.Linear(8, 1)], IMTLG())
    with Recorder(tmp_path, model, every=1) as recorder:
        for step in range(6):
            with cached():
                losses = [
                    p.square().mean() * (torch.nan if step >= spoilt_from else 1.0) for p in model(torch.randn(5, 4))
                ]
                model.backward(losses)
                recorder.record(losses)
    records = Records.read(tmp_path / "statistics.csv")
    assert len(records.steps) == 6
    (text,) = findings(records)["What went wrong"]
    assert f"not finite in {share} % of the steps, for the first time up to step {spoilt_from + 1}." in text


def test_two_things_that_went_wrong_are_both_said():
    rows = [{"step": s, "weight/a": 0.0, "weight/b": 0.0, "nonfinite": s == 2} for s in (1, 2, 3, 4)]
    first, second = findings(rows)["What went wrong"]
    assert "not finite in 25 % of the steps, for the first time up to step 2." in first
    assert "The shared part was not trained in 100 % of the records" in second


@pytest.mark.parametrize("balancer", [None, "uw", "imtl-g"])
def test_recorder_takes_an_auxiliary_loss_that_reads_predictions(tmp_path, balancer):
    model = MultiTaskModel(nn.Linear(4, 8), [nn.Linear(8, 1), nn.Linear(8, 1)], balancer)
    with Recorder(tmp_path, model) as recorder:
        for _ in range(3):
            with cached():
                predictions = model(torch.randn(5, 4))
                losses = [p.square().mean() for p in predictions]
                model.backward(losses, auxiliary=1e-3 * sum(p.square().mean() for p in predictions))
                recorder.record(losses)
    records = Records.read(tmp_path / "statistics.csv")
    assert set(records.weights) == set(records.losses) == {"0", "1"}
    # What arrives at a sum is that of the tasks and the auxiliary together.
    assert bool(records.norms) is (balancer == "imtl-g")


def test_a_task_may_have_the_name_of_a_statistic():
    row = {"step": 1, "training/loss/kind": 1.0, "training/loss/weight": 2.0, "training/weight/kind": 1.0}
    records = Records.of([row | {"training/weight/weight": 0.5, "val/weight/mse": 3.0, "val/loss/mse": 3.0}])
    assert records.tasks == ("kind", "weight")
    assert records.weights == {"kind": [1.0], "weight": [0.5]}


@pytest.mark.parametrize(
    "entries",
    [
        {"metrics": {"a": 0.5}},
        {"metrics": {"a": {"acc": None}}},
        {"single": {"a": {"acc": "0.9"}}},
        {"plain_seconds_per_step": 0},
        {"seconds_per_step": "fast"},
    ],
)
def test_details_of_another_kind_are_refused(tmp_path, capsys, entries):
    (tmp_path / "statistics.csv").write_text("step,loss/a\n1,0.5\n")
    (tmp_path / "run.json").write_text(json.dumps(entries))
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{next(iter(entries))}: expected" in capsys.readouterr().err
