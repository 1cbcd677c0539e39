"""Equal weighting is the sum."""

import copy
import pickle

import pytest
import torch

from mtlwrap import EqualWeighting
from tests.balancers import zoo
from tests.common import DEVICE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_is_the_sum(shape, dtype):
    values = torch.randn(shape).to(device=DEVICE, dtype=dtype).requires_grad_()
    total = EqualWeighting()(values)
    assert total.shape == ()
    assert total.dtype == dtype
    assert torch.equal(total, values.sum())
    total.backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def test_hand_worked():
    assert EqualWeighting()(torch.tensor([1.0, -2.5, 8.0], device=DEVICE)).item() == 6.5


def test_is_the_gradient_of_the_summed_losses():
    def gradients(total):
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 3).to(DEVICE)
        losses = network(zoo.normal(5, 4, gen=zoo.generator(0)).float().to(DEVICE)).square().mean(dim=0)
        total(losses).backward()
        return [parameter.grad for parameter in network.parameters()]

    for ours, plain in zip(gradients(EqualWeighting()), gradients(lambda losses: sum(losses)), strict=True):
        assert torch.equal(ours, plain)


def test_a_subset_of_the_tasks():
    balancer = EqualWeighting()
    balancer.bind(3)
    assert balancer.scalarize(torch.tensor([1.0, 4.0], device=DEVICE), [2, 0]).item() == 5.0


@pytest.mark.parametrize(("values", "kind"), [([1.0], "list"), (torch.tensor([1]), "torch.int64"), (2.0, "float")])
def test_values_of_another_type(values, kind):
    with pytest.raises(TypeError, match=f"EqualWeighting: expected a floating-point tensor of values, got {kind}"):
        EqualWeighting()(values)


def test_bind():
    balancer = EqualWeighting()
    for wrong in (2.0, "2", True, None):
        with pytest.raises(TypeError, match="num_tasks: expected an int, got"):
            balancer.bind(wrong)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="num_tasks: expected at least 1, got"):
            balancer.bind(wrong)
    balancer.bind(3)
    balancer.bind(3)
    with pytest.raises(ValueError, match="EqualWeighting was made for 3 tasks, but the model has 2 heads"):
        balancer.bind(2)


def test_no_state_and_it_survives_copies():
    balancer = EqualWeighting()
    assert not balancer.state_dict()
    assert not list(balancer.parameters())
    assert repr(balancer) == "EqualWeighting()"
    values = torch.tensor([1.0, 2.0], device=DEVICE)
    balancer.reset()
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert twin(values).item() == 3.0
