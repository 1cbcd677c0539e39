"""The law of the trainer: the parameters of the loop written by hand; and what it says to what does not fit."""

from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.metrics import RunningAverage
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import EqualWeighting, MultiTaskModel
from mtlwrap.ignite import MultitaskEvents, create_multitask_trainer
from tests.common import BALANCERS, DEVICE, TASKS, make_model
from tests.ignite.problem import LOSSES, losses_by_hand, make_batch, make_training, trainer_on_steps
from tests.waiting import waits

EXACT = {"rtol": 0, "atol": 0}
STEPS = 50


def plain_loop(
    model: MultiTaskModel,
    optimizer: torch.optim.Optimizer,
    accumulation: int = 1,
    amp: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> list[dict[str, float]]:
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False) if scaler is None else scaler
    history = []
    for step in range(1, STEPS + 1):
        x, targets = make_batch(step)
        if (step - 1) % accumulation == 0:
            optimizer.zero_grad()
        with torch.autocast(DEVICE.type, enabled=amp):
            losses = losses_by_hand(model(x), targets)
            total = model.scalarize(losses)
            if accumulation > 1:
                total = total / accumulation
        scaler.scale(total).backward()
        if step % accumulation == 0:
            scaler.step(optimizer)
            scaler.update()
        history.append({task: loss.item() for task, loss in losses.items() if loss is not None})
    return history


def make_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=1000)


def overflow_once(model: MultiTaskModel) -> None:
    """One gradient that is not finite, for which a scaler skips the step."""
    gradients: list[Tensor] = []

    def spoil(gradient: Tensor) -> Tensor:
        gradients.append(gradient)
        return gradient * torch.inf if len(gradients) == 8 else gradient

    model.backbone[0].weight.register_hook(spoil)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "amp": {"amp_mode": "amp"},
    "all": {"amp_mode": "amp", "scaler": make_scaler, "gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, "all") for name in BALANCERS]
    + [(name, options) for name in ("uw", "imtl", "rotograd", "famo") for options in ("plain", "accumulation", "amp")],
)
def test_same_parameters_as_the_loop_written_by_hand(name: str, options: str) -> None:
    chosen = {name: option() if callable(option) else option for name, option in OPTIONS[options].items()}
    model, optimizer = make_training(name)
    history = []
    trainer = trainer_on_steps(model, optimizer, **chosen)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        history.append({task: loss.item() for task, loss in trainer.state.output.items()})

    if "scaler" in chosen:
        overflow_once(model)
    trainer.run(epoch_length=STEPS // 2, max_epochs=2)
    expected, optimizer = make_training(name)
    scaler = None
    if "scaler" in chosen:
        scaler = make_scaler()
        overflow_once(expected)
    accumulation = chosen.get("gradient_accumulation_steps", 1)
    by_hand = plain_loop(expected, optimizer, accumulation, "amp_mode" in chosen, scaler)
    assert_close(model.state_dict(), expected.state_dict(), **EXACT)
    assert history == by_hand
    assert {} in history  # a batch without any label
    if scaler is not None:
        assert trainer.state.scaler.get_scale() == scaler.get_scale() == 2.0**9
    fresh = make_training(name)[0].state_dict()
    assert not torch.equal(model.state_dict()["backbone.0.weight"], fresh["backbone.0.weight"])


@pytest.mark.parametrize("name", ["imtl", "rotograd", "famo"])
def test_handlers_that_ask_change_nothing(name: str) -> None:
    model, optimizer = make_training(name)
    trainer = trainer_on_steps(model, optimizer)
    asked = []

    @trainer.on(MultitaskEvents.BACKWARD_COMPLETED(every=2))
    def ask(engine: Engine) -> None:
        gradients = model.task_gradients
        asked.append((engine.state.iteration, None if gradients is None else gradients.norms))
        if gradients is not None:
            assert [task in engine.state.losses for task in TASKS] == gradients.active.tolist()

    trainer.run(epoch_length=STEPS, max_epochs=1)
    expected, optimizer = make_training(name)
    plain_loop(expected, optimizer)
    assert_close(model.state_dict(), expected.state_dict(), **EXACT)
    assert [iteration for iteration, _ in asked] == list(range(2, STEPS + 1, 2))
    assert [iteration for iteration, norms in asked if norms is None] == [20]
    assert model.task_gradients is None


def test_no_scope_is_opened_where_nobody_asks() -> None:
    model, optimizer = make_training("imtl-g")
    seen = []
    trainer = trainer_on_steps(model, optimizer, output_transform=lambda *_: seen.append(model.task_gradients))
    trainer.run(epoch_length=1)
    assert seen == [None]


def test_gradients_can_be_clipped_between_backward_and_step() -> None:
    model, _ = make_training("equal")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = trainer_on_steps(model, optimizer, amp_mode="amp", scaler=torch.amp.GradScaler(DEVICE.type))

    @trainer.on(MultitaskEvents.BACKWARD_COMPLETED)
    def clip(engine: Engine) -> None:
        engine.state.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    trainer.run(epoch_length=1)
    moved = torch.stack([(p - q).norm() for p, q in zip(model.parameters(), before, strict=True)]).norm()
    assert_close(moved.item(), 1e-3, rtol=1e-2, atol=0)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_a_scaler_too_batches_without_any_label_do_nothing(accumulation: int, unscales: bool) -> None:
    model, _ = make_training("equal")
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.1))
    scaler = make_scaler()
    options: dict[str, Any] = {"amp_mode": "amp", "scaler": scaler, "gradient_accumulation_steps": accumulation}
    trainer = create_multitask_trainer(model, optimizer, LOSSES, **options)
    if unscales:  # which a scaler allows once before each update
        trainer.add_event_handler(MultitaskEvents.BACKWARD_COMPLETED(every=accumulation), scaler.unscale_, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unlabelled, labelled = make_batch(20), make_batch(1)
    with waits() as waited:
        trainer.run([unlabelled] * 4)
    assert trainer.state.output == {}
    assert_close(model.state_dict(), before, **EXACT)
    assert (scaler.get_scale(), scaler._get_growth_tracker()) == (2.0**10, 0)
    assert optimizer.state == {}
    assert "item" not in waited
    # Half of an accumulated step has a label: it is taken.
    trainer.run([unlabelled, labelled], epoch_length=2, max_epochs=1)
    assert not torch.equal(model.state_dict()["backbone.0.weight"], before["backbone.0.weight"])
    assert scaler._get_growth_tracker() == 1


def test_targets_in_order_or_in_a_tensor() -> None:
    outcomes = []
    x, y = torch.randn(8, 5), torch.randn(8, 2)
    y[:3, 0] = torch.nan
    for targets in (y, [y[:, 0], y[:, 1]], {"0": y[:, 0], "1": y[:, 1]}):
        torch.manual_seed(0)
        model = MultiTaskModel(nn.Linear(5, 4), [nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)) for _ in range(2)])
        trainer = create_multitask_trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), [nn.MSELoss(), nn.L1Loss()]
        )
        trainer.run([(x, targets)] * 3)
        outcomes.append(model.state_dict())
    assert_close(outcomes[1], outcomes[0], **EXACT)
    assert_close(outcomes[2], outcomes[0], **EXACT)


def test_the_default_output_suits_progress_bar_and_running_average(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = make_training("equal")
    trainer = trainer_on_steps(model, optimizer)
    RunningAverage(output_transform=lambda losses: losses["a"]).attach(trainer, "a")
    ProgressBar(persist=True).attach(trainer, ["a"], output_transform=dict)
    trainer.run(epoch_length=5)
    assert torch.isfinite(torch.as_tensor(trainer.state.metrics["a"]))
    assert "b=" in capsys.readouterr().err


def test_output_transform_prepare_batch_and_model_fn() -> None:
    model, optimizer = make_training("equal")
    x, targets = make_batch(1)
    trainer = create_multitask_trainer(
        model,
        optimizer,
        list(LOSSES.values()),
        prepare_batch=lambda batch, device, non_blocking: (batch["x"], batch["y"]),
        model_fn=lambda model, x: model(2 * x),
        output_transform=lambda x, y, predictions, losses: (x, y, predictions, losses),
    )
    with torch.no_grad():
        expected = model(2 * x)
    output = trainer.run([{"x": x, "y": targets}]).output
    assert output[0] is x
    assert output[1] is targets
    assert_close(output[2], expected)
    assert list(output[3]) == list(TASKS)
    assert not any(loss.requires_grad for loss in output[3].values())


def test_the_scaler_is_in_the_state() -> None:
    model, optimizer = make_training("equal")
    scaler = torch.amp.GradScaler("cpu")
    options: dict[str, Any] = {"amp_mode": "amp"}
    trainer = create_multitask_trainer(model, optimizer, LOSSES, scaler=scaler, **options)
    assert trainer.state.scaler is scaler
    assert isinstance(
        create_multitask_trainer(model, optimizer, LOSSES, scaler=True, **options).state.scaler, torch.amp.GradScaler
    )
    assert not hasattr(create_multitask_trainer(model, optimizer, LOSSES).state, "scaler")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "MultiTaskModel.*got Linear"),
        ({"model": nn.DataParallel(make_model())}, TypeError, "DataParallel"),
        ({"losses": {"a": nn.MSELoss()}}, ValueError, r"'a', 'b', 'c'.*got those of \['a'\]"),
        ({"losses": [nn.MSELoss()]}, ValueError, "expected 3.*got 1"),
        ({"losses": nn.MSELoss()}, TypeError, "sequence or a mapping.*got MSELoss"),
        ({"losses": {**LOSSES, "b": None}}, TypeError, "task 'b'.*callable.*NoneType"),
        ({"amp_mode": "apex"}, ValueError, "'amp'.*'apex'"),
        ({"scaler": True}, ValueError, "amp_mode='amp'"),
        ({"scaler": 1.0, "amp_mode": "amp"}, TypeError, "float"),
        ({"gradient_accumulation_steps": 0}, ValueError, "at least 1, got 0"),
        ({"gradient_accumulation_steps": 1.5}, TypeError, "an int, got 1.5"),
        ({"ignore_index": "-1"}, TypeError, "ignore_index"),
        ({"ignore_index": [0.5]}, TypeError, "ignore_index"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model, optimizer = make_training("equal")
    with pytest.raises(error, match=message):
        create_multitask_trainer(**{"model": model, "optimizer": optimizer, "losses": LOSSES, **arguments})


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(2), ValueError, "expected a pair.*got Tensor"),
        ((1, 2, 3), ValueError, "got 3 things"),
        ((torch.zeros(4, 5), torch.zeros(4, 2)), ValueError, r"\[B, 3\].*\(4, 2\)"),
        ((torch.zeros(4, 5), [None, None]), ValueError, "expected 3.*got 2"),
        ((torch.zeros(4, 5), 3), TypeError, "got int"),
        ((torch.zeros(4, 5), {"a": None, "B": None, "c": None}), ValueError, "for the tasks 'b'.*called 'B'"),
        ((torch.zeros(4, 5), {"a": torch.tensor([[0.0], [torch.nan]])}), ValueError, r"task 'a'.*\(4, 1\).*2 rows"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_refuses_batches(batch: Any, error: type[Exception], message: str) -> None:
    model, optimizer = make_training("equal")
    with pytest.raises(error, match=message):
        create_multitask_trainer(model, optimizer, LOSSES).run([batch])


def test_a_loss_that_is_not_0_dim_names_its_task() -> None:
    model, optimizer = make_training("equal")
    trainer = create_multitask_trainer(model, optimizer, {**LOSSES, "a": nn.MSELoss(reduction="none")})
    with pytest.raises(ValueError, match=r"task 'a'.*0-dim"):
        trainer.run([make_batch(1)])


def test_a_compiled_model_is_unwrapped_and_trains_as_the_plain_one() -> None:
    ends = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = make_model(EqualWeighting(), torch.float32)
        wrapped = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model.state_dict()["backbone.0.weight"].clone()
        output = create_multitask_trainer(wrapped, optimizer, LOSSES).run([make_batch(1)]).output
        assert set(output) == set(TASKS)
        assert not torch.equal(model.state_dict()["backbone.0.weight"], before)
        ends.append(model.state_dict())
    assert_close(ends[0], ends[1], **EXACT)


def test_without_a_mode_an_autocast_around_the_training_counts() -> None:
    model, optimizer = make_training("equal")
    trainer = trainer_on_steps(model, optimizer, output_transform=lambda x, y, predictions, losses: predictions)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert trainer.run(epoch_length=1).output["b"].dtype == torch.bfloat16


def test_a_task_may_have_several_losses() -> None:
    def several(prediction: Tensor, target: Tensor) -> list[Tensor]:
        return [(prediction - target).square().mean(), (prediction - target).abs().mean()]

    models = [make_model(EqualWeighting(), torch.float32) for _ in range(2)]
    x, targets = make_batch(0)
    targets = {"a": targets["a"].nan_to_num(0.5)}
    outputs = []
    for model, loss in zip(models, [several, lambda p, y: sum(several(p, y))], strict=True):
        optimizer = torch.optim.SGD(model.param_groups(lr=0.1))
        trainer = create_multitask_trainer(model, optimizer, LOSSES | {"a": loss})
        outputs.append(trainer.run([(x, targets)]).output)
    assert_close(models[0].state_dict(), models[1].state_dict())
    assert_close(outputs[0], outputs[1])
