"""Fixed weights are a dot product."""

import copy
import math
import pickle

import pytest
import torch

from mtlwrap import FixedWeights
from tests.balancers import zoo
from tests.common import DEVICE


def test_hand_worked():
    balancer = FixedWeights([0.5, 2.0, 0.0]).to(DEVICE)
    losses = torch.tensor([4.0, -1.5, 7.0], device=DEVICE, requires_grad=True)
    total = balancer(losses)
    assert total.shape == ()
    assert total.item() == -1.0
    total.backward()
    assert losses.grad.tolist() == [0.5, 2.0, 0.0]


def test_is_the_dot_product():
    gen = zoo.generator(0)
    for count in (1, 2, 5):
        weights, losses = zoo.uniform(count, gen=gen, high=3.0), zoo.normal(count, gen=gen)
        expected = sum(w * x for w, x in zip(weights.tolist(), losses.tolist(), strict=True))
        total = FixedWeights(weights.tolist()).to(device=DEVICE, dtype=torch.float64)(losses.to(DEVICE))
        assert total.item() == pytest.approx(expected, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("given", [[1, 2.5], (1, 2.5), torch.tensor([1.0, 2.5]), iter([1, 2.5])])
def test_weights_in_any_sequence(given):
    assert FixedWeights(given).weights == (1.0, 2.5)


def test_the_users_list_is_left_alone():
    given = [1.0, 2.0]
    balancer = FixedWeights(given)
    given[0] = 7.0
    assert balancer.weights == (1.0, 2.0)
    tensor = torch.tensor([1.0, 2.0])
    balancer = FixedWeights(tensor)
    tensor[0] = 7.0
    assert balancer.weights == (1.0, 2.0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_the_wider_type_wins(dtype, expected):
    total = FixedWeights([1e5, 1.0]).to(DEVICE)(torch.tensor([3.0, 0.5], dtype=dtype, device=DEVICE))
    assert total.dtype == expected
    assert total.item() == 300000.5  # beyond half precision's range


def test_a_subset_of_the_tasks():
    balancer = FixedWeights([0.5, 2.0, 3.0, 5.0]).to(DEVICE)
    assert balancer.scalarize(torch.tensor([1.0, 10.0], device=DEVICE), [3, 1]).item() == 25.0
    with pytest.raises(ValueError, match=r"FixedWeights: expected values of shape \(2,\), got \(4,\)"):
        balancer.scalarize(torch.ones(4), [3, 1])


def test_the_losses_may_be_on_another_device_than_the_weights():
    assert FixedWeights([2.0, 3.0])(torch.tensor([1.0, 4.0], device=DEVICE)).item() == 14.0


@pytest.mark.parametrize("weight", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
def test_a_weight_out_of_range(weight):
    with pytest.raises(ValueError, match=r"weights\[1\]: expected a finite number of at least 0, got"):
        FixedWeights([1.0, weight])


@pytest.mark.parametrize("weight", ["1", None, True, [1.0], 1j])
def test_a_weight_that_is_no_number(weight):
    with pytest.raises(TypeError, match=r"weights\[0\]: expected a number, got"):
        FixedWeights([weight, 1.0])


def test_no_weights():
    with pytest.raises(ValueError, match="weights: expected one number per task, got none"):
        FixedWeights([])


@pytest.mark.parametrize("given", [1.0, torch.tensor(1.0), None])
def test_weights_that_are_no_sequence(given):
    with pytest.raises(TypeError, match="weights: expected"):
        FixedWeights(given)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_values_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"FixedWeights: expected values of shape \(3,\), got \("):
        FixedWeights([1.0, 2.0, 3.0])(torch.ones(shape))


def test_values_of_another_type():
    with pytest.raises(TypeError, match=r"FixedWeights: expected a floating-point tensor of values, got torch\.int64"):
        FixedWeights([1.0])(torch.tensor([1]))


def test_bind():
    balancer = FixedWeights([1.0, 2.0, 3.0])
    balancer.bind(3)
    with pytest.raises(ValueError, match="FixedWeights was made for 3 tasks, but the model has 2 heads"):
        balancer.bind(2)


def test_weights_are_options_not_state_and_survive_copies():
    balancer = FixedWeights([0.5, 2.0])
    assert not balancer.state_dict()
    assert not list(balancer.parameters())
    assert repr(balancer) == "FixedWeights([0.5, 2.0])"
    balancer.reset()
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert twin(torch.tensor([2.0, 4.0], device=DEVICE)).item() == 9.0
    twin = FixedWeights([1.0, 1.0])
    twin.load_state_dict(balancer.state_dict())
    assert twin.weights == (1.0, 1.0)
