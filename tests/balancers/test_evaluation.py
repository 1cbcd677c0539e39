"""In evaluation mode a backward pass decides as always, and leaves no trace in a balancer's state."""

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mtlwrap import Balancer, ExcessMTL, MultiTaskModel, Parameters
from tests.common import BALANCERS, TASKS, make_backbone, make_heads, make_input, make_losses, make_model

EXACT = {"rtol": 0, "atol": 0}
WITH_STATE = ("dwa", "excess-mtl", "famo", "grad-norm", "imtl-first-losses", "rlw", "rotate-only", "rotograd")


def step(model: MultiTaskModel, number: int) -> None:
    model.zero_grad()
    losses = make_losses(model(make_input(number)))
    model.backward({task: loss for task, loss in losses.items() if number % 3 != 2 or task != "b"})


def trained(balancer: Balancer | None, steps: int) -> MultiTaskModel:
    model = make_model(balancer)
    optimizer = torch.optim.Adam(model.param_groups(lr=0.01, balancer_lr=0.02))
    for number in range(steps):
        step(model, number)
        optimizer.step()
    return model


def state_of(model: MultiTaskModel) -> dict[str, Any]:
    return {key: value.clone() for key, value in model.balancer.state_dict().items()}


def gradients_of(model: MultiTaskModel) -> dict[str, Any]:
    # Not those of the angles, which in training are those around where the rotations were settled.
    return {name: p.grad for name, p in model.named_parameters() if not name.endswith("rotations.angles")}


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("steps", [0, 1, 3, 4])
def test_decisions_are_made_and_no_state_moves(name: str, steps: int) -> None:
    """In the first step, at the end of a burn-in or warm-up, with an absent task."""
    model = trained(BALANCERS[name](), steps)
    twin = copy.deepcopy(model)
    before = state_of(model)
    model.eval()
    for _ in range(2):
        step(model, steps)
        assert_close(state_of(model), before, **EXACT)
    step(twin, steps)
    assert_close(gradients_of(model), gradients_of(twin))
    assert_close(model.task_weights, twin.task_weights)
    if name in WITH_STATE and (steps == 0 or name != "imtl-first-losses"):  # what is compared is not nothing
        with pytest.raises(AssertionError):
            assert_close(state_of(twin), before, **EXACT)


@pytest.mark.parametrize("name", WITH_STATE)
def test_the_state_follows_where_only_the_network_is_in_evaluation_mode(name: str) -> None:
    model = trained(BALANCERS[name](), 1)
    twin = copy.deepcopy(model)
    model.eval().balancer.train()
    for each in (model, twin):
        step(each, 1)
    assert_close(state_of(model), state_of(twin), **EXACT)


def test_no_state_is_allocated_for_parameters_either() -> None:
    model = MultiTaskModel(make_backbone(), make_heads(), ExcessMTL(), gradients="parameters").double().eval()
    before = state_of(model)
    model.backward(make_losses(model(make_input().cpu())))
    assert_close(state_of(model), before, **EXACT)
    assert_close(model.task_weights, torch.full((len(TASKS),), 1 / len(TASKS), dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"weigh_heads": True}])
def test_the_weights_until_the_next_weighing_stay(options: dict[str, Any]) -> None:
    """A backward in evaluation mode weighs for itself, and training goes on with its own weights."""
    gradients = Parameters(refresh_every=3)
    model = MultiTaskModel(make_backbone(), make_heads(), "imtl-g", gradients=gradients, **options).double()
    twin = copy.deepcopy(model)
    for number in range(5):
        for each in (model, twin):
            each.zero_grad()
            each.backward(make_losses(each(make_input(number).cpu())))
        assert torch.equal(model.task_weights, twin.task_weights)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.eval()
        model.backward(make_losses(model(make_input(100 + number).cpu())))
        assert not torch.equal(model.task_weights, twin.task_weights)
        model.train()
        assert_close(model.state_dict(), before, **EXACT)
