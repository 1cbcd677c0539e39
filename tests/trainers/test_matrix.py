"""Every trainer with every feature: the same training as the plain loop's, and as one without mtlwrap."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.common import DEVICE
from tests.trainers import reference
from tests.trainers.matrix import IMPOSSIBLE, TRAINERS, is_possible, train
from tests.trainers.problem import BAD, BAD_IN_ONE, BALANCERS, BATCHES, FEATURES, Feature, Result, make_model, result_of

PLAIN = "plain loop"
HALF = "fp16 + scaler"
CELLS = [(trainer, feature) for trainer in TRAINERS for feature in FEATURES if is_possible(trainer, feature)]
SCALED = [(trainer, feature) for trainer, feature in CELLS if feature == HALF]
# Together, for trainers that have each of them.
TOGETHER = Feature(autocast=torch.bfloat16, accumulate=2, clip=0.5)
EVERYTHING = Feature(autocast=torch.float16, init_scale=2.0**12, accumulate=2, clip=0.5)
# Several processes with more than that, each under a balancer.
DDP = FEATURES["DDP"]
CLIPPED = replace(DDP, accumulate=2, clip=0.5)
SEVERAL: dict[str, tuple[str, Feature]] = {
    **{f"clipped sums, {balancer}": (balancer, CLIPPED) for balancer in BALANCERS},
    "unused parameters": ("RotoGrad", replace(DDP, unused=True)),
    "unused parameters, clipped sums": ("IMTL", replace(CLIPPED, unused=True)),
    "bf16": ("IMTL", replace(TOGETHER, processes=2)),
    HALF: ("IMTL", replace(EVERYTHING, processes=2)),
}

# Lightning asks for workers and an interval of logging; ignite's own autocast is one of CUDA.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported. Disabling autocast"),
]


@cache
def by_plain_loop(balancer: str, feature: Feature) -> Result:
    return train(PLAIN, balancer, feature)


@cache
def by_reference(balancer: str, feature: Feature) -> dict[str, Tensor]:
    return reference.train(balancer, feature)


def assert_same(found: Result, expected: Result) -> None:
    """To the bit."""
    assert_close(found.state, expected.state, rtol=0, atol=0)
    assert_close(found.weights, expected.weights, rtol=0, atol=0)
    assert found.scale == expected.scale


def assert_as_reference(found: Result, balancer: str, feature: Feature) -> None:
    """In float32 to 1e-6 of a tensor's largest entry; under autocast, one rounding of its type in the update."""
    before = result_of(make_model(balancer)).state
    values = found.state | {"task_weights": found.weights}
    expected = by_reference(balancer, feature)
    assert {name.split(".")[0] for name in expected} >= {"backbone", "heads", "task_weights"}
    for name, value in expected.items():
        error = values[name].double() - value.double()
        if feature.autocast is None:
            assert error.abs().max() <= 1e-6 * value.abs().max(), name
        else:
            update = value.double() - before.get(name, torch.zeros_like(value)).double()
            assert error.norm() <= torch.finfo(feature.autocast).eps * update.norm(), name


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize(("trainer", "feature"), CELLS)
def test_cell(trainer: str, feature: str, balancer: str) -> None:
    asked = FEATURES[feature]
    found = train(trainer, balancer, asked)
    assert_as_reference(found, balancer, asked)
    assert_same(found, by_plain_loop(balancer, asked))
    assert found.scale == asked.init_scale  # that there was a scaler, and that no step was skipped


@pytest.mark.parametrize("balancer", BALANCERS)
def test_features_differ(balancer: str) -> None:
    """A trainer that overlooks a feature would not come to the same."""
    results = {name: by_plain_loop(balancer, feature).state for name, feature in FEATURES.items()}
    for name, state in results.items():
        for other, its_state in results.items():
            assert name == other or not torch.equal(state["backbone.0.weight"], its_state["backbone.0.weight"])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_features_together(trainer: str) -> None:
    found = train(trainer, "IMTL", TOGETHER)
    assert_as_reference(found, "IMTL", TOGETHER)
    assert_same(found, by_plain_loop("IMTL", TOGETHER))


@pytest.mark.parametrize(("trainer", "feature"), SCALED)
def test_all_with_a_scaler(trainer: str, feature: str) -> None:
    found = train(trainer, "IMTL", EVERYTHING)
    assert_as_reference(found, "IMTL", EVERYTHING)
    assert_same(found, by_plain_loop("IMTL", EVERYTHING))


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize(("trainer", "feature"), SCALED)
def test_a_step_that_overflows_is_skipped(trainer: str, feature: str, balancer: str) -> None:
    """Nothing moves but the scale, which is halved; what comes after is as if the batch had not been there."""
    asked = FEATURES[feature]
    before, after = train(trainer, balancer, asked, (0, 1)), train(trainer, balancer, asked, (0, 1, BAD))
    assert_close(after.state, before.state, rtol=0, atol=0)
    assert (before.scale, after.scale) == (asked.init_scale, asked.init_scale / 2)
    spoiled = train(trainer, balancer, asked, (*BATCHES[:2], BAD, *BATCHES[2:]))
    assert_as_reference(spoiled, balancer, asked)
    assert spoiled.scale == asked.init_scale / 2


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize(("trainer", "feature"), SCALED)
def test_a_first_step_that_overflows_leaves_no_trace(trainer: str, feature: str, balancer: str) -> None:
    """To the bit the same as without it, at the scale that it leaves: another one rounds otherwise near zero."""
    asked = FEATURES[feature]
    spoiled = train(trainer, balancer, asked, (BAD, *BATCHES))
    assert_same(spoiled, train(trainer, balancer, replace(asked, init_scale=asked.init_scale / 2), BATCHES))


@pytest.mark.parametrize(("trainer", "feature"), IMPOSSIBLE)
def test_an_impossible_cell_still_is(trainer: str, feature: str) -> None:
    refusal = IMPOSSIBLE[trainer, feature]
    if refusal.device != DEVICE.type:
        pytest.skip(f"impossible on a {refusal.device} only, and tested above")
    assert refusal.holds()


@pytest.mark.parametrize(
    ("trainer", "case"),
    [(trainer, case) for trainer in TRAINERS for case in SEVERAL if case != HALF or is_possible(trainer, HALF)],
)
def test_processes_with_other_features(trainer: str, case: str) -> None:
    balancer, asked = SEVERAL[case]
    found = train(trainer, balancer, asked)
    assert_as_reference(found, balancer, asked)
    # ignite averages the gradients of each batch, the others once in a step: that rounds otherwise.
    if trainer != "ignite" or asked.accumulate == 1:
        assert_same(found, by_plain_loop(balancer, asked))


@pytest.mark.parametrize("balancer", BALANCERS)
def test_an_overflow_in_one_process_skips_the_step_of_all(balancer: str) -> None:
    asked = replace(FEATURES[HALF], processes=2)
    before, after = train(PLAIN, balancer, asked, (0, 1)), train(PLAIN, balancer, asked, (0, 1, BAD_IN_ONE))
    assert_close(after.state, before.state, rtol=0, atol=0)
    assert (before.scale, after.scale) == (asked.init_scale, asked.init_scale / 2)
