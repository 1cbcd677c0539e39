"""Statistics of the tasks, against gradients by brute force, and where they are logged."""

import csv
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar, TensorboardLogger
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import IMTLG, MultiTaskModel, Parameters
from mtlwrap.ignite import BalancerStatistics, CSVLogger, MultitaskEvents, create_multitask_trainer
from tests.common import TASKS, make_backbone, make_heads
from tests.ignite.problem import LOSSES, losses_by_hand, make_batch, make_training, trainer_on_steps


class ByBruteForce:
    """The same statistics of each step, from one autograd.grad per task."""

    def __init__(self, model: MultiTaskModel) -> None:
        self.model = model
        self.rows: list[dict[str, float]] = []

    def look(self, engine: Engine) -> None:
        x, targets = make_batch(engine.state.iteration)
        z = self.model.backbone(x)
        losses = losses_by_hand({task: self.model.heads[task](z.clone()) for task in TASKS}, targets)
        present = {task: loss for task, loss in losses.items() if loss is not None}
        if not present:
            return
        g = {t: torch.autograd.grad(loss, z, retain_graph=True)[0].flatten().double() for t, loss in present.items()}
        row = {f"loss/{task}": loss.item() for task, loss in present.items()}
        row |= {f"norm/{task}": g[task].norm().item() for task in g}
        cosines = {f"cosine/{s}/{t}": torch.cosine_similarity(g[s], g[t], 0).item() for s, t in combinations(g, 2)}
        row |= cosines | {"conflicts": float(any(c < 0 for c in cosines.values())), "nonfinite": 0.0}
        weights = self.model.task_weights
        assert weights is not None
        row |= {f"weight/{task}": weights[TASKS.index(task)].item() for task in present}
        self.rows.append(row)

    def means(self) -> dict[str, float]:
        names = {name for row in self.rows for name in row}
        found = {name: [row[name] for row in self.rows if name in row] for name in names}
        self.rows = []
        return {name: sum(numbers) / len(numbers) for name, numbers in found.items()}


@pytest.mark.parametrize("name", ["imtl-g", "equal", "excess-mtl", "gls"])
def test_means_are_those_of_brute_force(name: str) -> None:
    model, optimizer = make_training(name)
    trainer = trainer_on_steps(model, optimizer)
    BalancerStatistics(model).attach(trainer, every=10)
    expected = ByBruteForce(model)
    # Before the optimizer's step, as the statistics are.
    trainer.add_event_handler(MultitaskEvents.BACKWARD_COMPLETED, expected.look)
    conflicts = []

    @trainer.on(Events.ITERATION_COMPLETED(every=10))
    def compare() -> None:
        means = expected.means()
        if name == "gls":  # the balancer sees the gradients of scaled losses
            means = {key: mean for key, mean in means.items() if not key.startswith("norm")}
        found = {key: trainer.state.metrics[key] for key in means}
        assert_close(found, means, rtol=1e-4, atol=1e-6)
        conflicts.append(trainer.state.metrics["conflicts"])

    trainer.run(epoch_length=30)
    assert len(conflicts) == 3
    assert any(0 < fraction < 1 for fraction in conflicts)


def test_the_device_is_read_only_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_training("imtl-g")
    trainer = create_multitask_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), LOSSES)
    BalancerStatistics(model).attach(trainer, every=5)
    reads = []
    inside = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        original = getattr(Tensor, name)

        def read(tensor: Tensor, original: Any = original) -> Any:
            if inside:
                reads.append(trainer.state.iteration)
            return original(tensor)

        monkeypatch.setattr(Tensor, name, read)
    trainer.add_event_handler(Events.STARTED, inside.append, True)
    x, _ = make_batch(1)
    # Targets without anything to look at, so that whatever is read is read by the statistics.
    trainer.run([(x, {"b": torch.zeros(6, dtype=torch.uint8), "a": None, "c": None})] * 10)
    late = [iteration for iteration in reads if iteration > 1]  # the first step checks what each loss reads
    assert late == [5, 10]


def test_the_rows_without_gradients_and_what_did_not_occur() -> None:
    model = MultiTaskModel(make_backbone(), make_heads(), IMTLG(), gradients=Parameters(refresh_every=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = create_multitask_trainer(model, optimizer, LOSSES)
    BalancerStatistics(model, cosines=False).attach(trainer, every=2)
    x, targets = make_batch(1)
    seen: list[dict[str, Any]] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(dict(trainer.state.metrics)))
    trainer.run([(x, {**targets, "c": None})] * 4)
    assert not any(name.startswith("cosine") for name in seen[1])
    assert seen[0] == {}
    assert seen[1]["norm/a"] == pytest.approx(seen[1]["norm/a"])
    assert math.isnan(seen[1]["norm/c"])
    assert math.isnan(seen[1]["loss/c"])
    assert seen[1]["weight/a"] + seen[1]["weight/b"] == pytest.approx(1, rel=1e-5)


def test_a_balancer_without_weights_has_none() -> None:
    model, optimizer = make_training("equal")
    for p in model.backbone.parameters():
        p.requires_grad_(False)
    trainer = trainer_on_steps(model, optimizer)
    BalancerStatistics(model).attach(trainer)
    metrics = trainer.run(epoch_length=2).metrics
    assert not any(name.startswith("weight") for name in metrics)
    assert metrics["loss/a"] > 0
    assert math.isnan(metrics["conflicts"])


def test_steps_that_are_not_finite_are_left_out() -> None:
    def means(bad_step: int) -> dict[str, float]:
        model, optimizer = make_training("imtl-g")
        factor = torch.ones(())
        losses = {**LOSSES, "a": lambda p, y: LOSSES["a"](p, y) * factor}
        # The optimizer moves nothing in so few.
        trainer = create_multitask_trainer(model, optimizer, losses, gradient_accumulation_steps=100)
        BalancerStatistics(model).attach(trainer, every=4)

        @trainer.on(Events.ITERATION_STARTED)
        def spoil() -> None:
            factor.fill_(torch.inf if trainer.state.iteration == bad_step else 1.0)

        return trainer.run([make_batch(6)] * 4).metrics

    found, expected = means(2), means(0)
    assert found.pop("nonfinite") == 0.25
    assert math.isinf(found.pop("loss/a"))
    assert expected["conflicts"] == 1
    assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize(
    ("every", "error", "message"),
    [(0, ValueError, "at least 1, got 0"), (True, TypeError, "an int, got True"), (1.5, TypeError, "got 1.5")],
)
def test_refuses(every: Any, error: type[Exception], message: str) -> None:
    model, optimizer = make_training("equal")
    with pytest.raises(error, match=message):
        BalancerStatistics(model).attach(create_multitask_trainer(model, optimizer, LOSSES), every=every)
    with pytest.raises(ValueError, match="create_multitask_trainer"):
        BalancerStatistics(model).attach(Engine(lambda *_: None))
    with pytest.raises(TypeError, match="got Linear"):
        BalancerStatistics(nn.Linear(1, 1))


def test_every_logger_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, optimizer = make_training("imtl")
    trainer = trainer_on_steps(model, optimizer)
    BalancerStatistics(model).attach(trainer, every=5)
    event = Events.ITERATION_COMPLETED(every=5)
    ProgressBar(persist=True).attach(trainer, "all", event_name=event)
    with TensorboardLogger(tmp_path / "board") as board, CSVLogger(tmp_path / "log.csv") as table:
        for logger in (board, table):
            logger.attach_output_handler(trainer, event, tag="training", metric_names="all")
        trainer.run(epoch_length=10, max_epochs=2)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10", "15", "20"]
    assert float(rows[-1]["training/cosine/a/b"]) == trainer.state.metrics["cosine/a/b"]
    board_events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [e.step for e in board_events.Scalars("training/weight/a")] == [5, 10, 15, 20]
    assert_close(board_events.Scalars("training/conflicts")[-1].value, trainer.state.metrics["conflicts"])
    assert "weight/a=" in capsys.readouterr().err


def test_csv_columns_come_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    engine = Engine(lambda engine, batch: {"x": batch} if engine.state.iteration < 3 else {"x": batch, "y": 2.0})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    with CSVLogger(path) as logger:
        logger.attach_output_handler(engine, Events.ITERATION_COMPLETED, tag="t", output_transform=lambda o: o)
        engine.run([0.5, 1.5, 2.5])
        logger.attach_opt_params_handler(engine, Events.ITERATION_COMPLETED, optimizer=optimizer)
        engine.run([9.0])
    with pytest.raises(ValueError, match="closed"):
        logger.write(1, {})
    assert path.read_text().splitlines() == [
        "step,t/x,t/y,lr/group_0", "1,0.5,,", "2,1.5,,", "3,2.5,2.0,", "1,9.0,,", "1,,,0.5",
    ]  # fmt: skip
    with CSVLogger(path, append=True) as logger:
        logger.write(7, {"t/y": 3.0})
    assert path.read_text().splitlines()[-2:] == ["1,,,0.5", "7,,3.0,"]
    with CSVLogger(path) as logger:
        pass
    assert path.read_text() == ""
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="'step', got 'a'"):
        CSVLogger(path, append=True)


def test_a_log_that_cannot_be_gone_on_with_stays_as_it_is(tmp_path: Path) -> None:
    path, text = tmp_path / "log.csv", "step,training/a\n1,0.5\n2,0.25,7\n"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected 2 columns in line 3 of"):
        CSVLogger(path, append=True)
    assert path.read_text() == text


def test_a_line_that_was_begun_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,training/a\n1,0.5\n2,0.2")
    with CSVLogger(path, append=True) as logger:
        logger.write(2, {"training/a": 0.25})
        logger.write(3, {"training/a": 0.125, "training/b": 1.0})
    assert path.read_text().split() == ["step,training/a,training/b", "1,0.5,", "2,0.25,", "3,0.125,1.0"]
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]
