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

from mtlwrap import IMTLG, MultiTaskModel, cached
from mtlwrap.records import Records
from mtlwrap.report import Recorder, Run, findings, main, report, write_report

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
    higher_is_better={"error": False},
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
    assert "below 0 in 78 % of the records" in disagreement
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
        (-0.001, "No two tasks conflict on average"),
        (0.0, "No two tasks conflict on average"),
        (0.5, "The tasks agree"),
    ],
)
def test_it_does_not_make_up_conflicts(cosine, words):
    text = findings([{"step": 1, "weight/a": 1.0, "weight/b": 1.0, "cosine/a/b": cosine}])
    assert words in text[DISAGREE][0]
    assert "Nothing: every task's gradient had the weight 1" in text["What the balancer did about it"][0]


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


def test_folder_without_statistics(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "statistics.csv" in capsys.readouterr().err


@pytest.mark.parametrize(("every", "complaint"), [(0, "got 0"), (True, "got True"), (1.5, "got 1.5")])
def test_recorder_refuses(every, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        Recorder(tmp_path, model_of("a"), every=every)
    with pytest.raises(TypeError, match="got Linear"):
        Recorder(tmp_path, nn.Linear(1, 1))


def test_the_package_and_its_recorder_need_no_matplotlib():
    code = "import sys, mtlwrap, mtlwrap.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
