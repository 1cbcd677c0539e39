"""A training that is saved through ignite's Checkpoint and resumed continues to the bit, wherever it was saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, DiskSaver
from torch.testing import assert_close

from mtlwrap.ignite import AccumulatedGradients
from tests.common import BALANCERS
from tests.ignite.problem import make_training, trainer_on_steps

EXACT = {"rtol": 0, "atol": 0}
EPOCH_LENGTH, MAX_EPOCHS = 5, 3

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "all": {"amp_mode": "amp", "scaler": True, "gradient_accumulation_steps": 4},
}


def make_objects(name: str, **options: Any) -> dict[str, Any]:
    model, optimizer = make_training(name)
    trainer = trainer_on_steps(model, optimizer, **options)
    objects = {"trainer": trainer, "model": model, "optimizer": optimizer, "gradients": AccumulatedGradients(model)}
    return {**objects, "scaler": trainer.state.scaler} if "scaler" in options else objects


def outcome(objects: dict[str, Any]) -> dict[str, Any]:
    return {name: saved.state_dict() for name, saved in objects.items() if name != "trainer"}


@pytest.mark.parametrize(
    ("name", "options", "saved_after"),
    # At the end of an epoch, within one, and for accumulated gradients at a step of the optimizer and between two.
    # In mixed precision a plain sum of gradients is rounded otherwise in a model's first step than later, so that only
    # balancers of gradients are compared there.
    [(name, "accumulation", 6) for name in BALANCERS]
    + [(name, options, n) for name in ("imtl", "rotograd") for options in OPTIONS for n in (5, 8, 11)],
)
def test_continues_to_the_bit(name: str, options: str, saved_after: int, tmp_path: Path) -> None:
    whole = make_objects(name, **OPTIONS[options])
    handler = Checkpoint(whole, DiskSaver(tmp_path, require_empty=False), n_saved=None)
    whole["trainer"].add_event_handler(Events.ITERATION_COMPLETED(once=saved_after), handler)
    whole["trainer"].run(epoch_length=EPOCH_LENGTH, max_epochs=MAX_EPOCHS)
    resumed = make_objects(name, **OPTIONS[options])
    file = tmp_path / handler.last_checkpoint
    Checkpoint.load_objects(resumed, torch.load(file, weights_only=True))
    first = []
    resumed["trainer"].on(Events.ITERATION_COMPLETED(once=saved_after + 1))(lambda: first.append(True))
    resumed["trainer"].run()
    assert first == [True]
    assert resumed["trainer"].state.iteration == EPOCH_LENGTH * MAX_EPOCHS
    assert_close(outcome(resumed), outcome(whole), **EXACT)


def test_without_the_accumulated_gradients_it_does_not(tmp_path: Path) -> None:
    whole = make_objects("equal", gradient_accumulation_steps=4)
    saved: dict[str, Any] = {}

    @whole["trainer"].on(Events.ITERATION_COMPLETED(once=6))
    def save() -> None:
        torch.save({name: x.state_dict() for name, x in whole.items() if name != "gradients"}, tmp_path / "saved.pt")

    whole["trainer"].run(epoch_length=EPOCH_LENGTH, max_epochs=MAX_EPOCHS)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = make_objects("equal", gradient_accumulation_steps=4)
    for name, state in saved.items():
        resumed[name].load_state_dict(state)
    resumed["trainer"].run()
    with pytest.raises(AssertionError):
        assert_close(outcome(resumed), outcome(whole), **EXACT)


def test_gradients_of_no_parameter() -> None:
    model, _ = make_training("equal")
    with pytest.raises(ValueError, match="no parameters 'x'"):
        AccumulatedGradients(model).load_state_dict({"x": torch.zeros(1)})
    with pytest.raises(TypeError, match="got Linear"):
        AccumulatedGradients(torch.nn.Linear(1, 1))
