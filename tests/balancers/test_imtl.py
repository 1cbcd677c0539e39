"""IMTL, Algorithm 1 of the paper, as a composition of its halves."""

import copy
import math
import pickle

import pytest
import torch

from mtlwrap import IMTL, IMTLG, IMTLL, Compose, EqualWeighting
from tests.balancers import zoo
from tests.common import DEVICE


def test_hand_worked():
    # s = (ln 2, 0), gradients (3, 0) and (0, 2): scaled (6, 0) and (0, 2), weights 1/4 and 3/4.
    balancer = IMTL(2, init=[math.log(2.0), 0.0]).to(DEVICE)
    matrix = torch.tensor([[3.0, 0.0], [0.0, 2.0]], device=DEVICE)
    losses = torch.tensor([5.0, 0.5], device=DEVICE)
    assert balancer(losses, matrix).tolist() == pytest.approx([1.5, 1.5], rel=1e-6)
    total = balancer.scalarize(losses)
    assert total.item() == pytest.approx(10.5 - math.log(2.0), rel=1e-6)
    total.backward()
    assert balancer.loss.log_scale.grad.tolist() == pytest.approx([9.0, -0.5], rel=1e-6)  # e^s L - 1, without alpha


@pytest.mark.parametrize("method", ["hybrid", "loss", "gradient"])
def test_methods(method):
    gen = zoo.generator(0)
    scales = [0.5, -1.0, 0.25]
    init = None if method == "gradient" else scales
    balancer = IMTL(3, method, init).to(device=DEVICE, dtype=torch.float64)
    matrix = zoo.with_ratio(3, 20, 10.0, gen)
    losses = zoo.uniform(3, gen=gen, low=0.1, high=5.0)
    factors = torch.ones(3, dtype=torch.float64) if method == "gradient" else torch.tensor(scales).double().exp()
    scaled = factors[:, None] * matrix
    weights = torch.ones(3, dtype=torch.float64) if method == "loss" else zoo.paper_weights(scaled)
    actual = balancer(losses.to(DEVICE), matrix.to(DEVICE)).cpu()
    torch.testing.assert_close(actual, weights @ scaled, rtol=1e-9, atol=1e-12)
    penalty = 0.0 if method == "gradient" else sum(scales)
    expected = (factors * losses).sum().item() - penalty
    assert balancer.scalarize(losses.to(DEVICE)).item() == pytest.approx(expected, rel=1e-12)


def test_is_a_composition():
    assert isinstance(IMTL(), Compose)
    for method, loss, gradient in (
        ("hybrid", IMTLL, IMTLG),
        ("loss", IMTLL, EqualWeighting),
        ("gradient", EqualWeighting, IMTLG),
    ):
        balancer = IMTL(method=method)
        assert type(balancer.loss) is loss
        assert type(balancer.gradient) is gradient
    assert not IMTL().gradient.nonneg
    assert not IMTL().gradient.strict


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_tasks": 2}, [0.0, 0.0]),
        ({"num_tasks": 2, "init": 0.5}, [0.5, 0.5]),
        ({"num_tasks": 2, "init": [0.5, -1.0]}, [0.5, -1.0]),
        ({"init": [0.5, -1.0]}, [0.5, -1.0]),
        ({"init": 0.5}, [0.5, 0.5]),
        ({"method": "loss", "init": [0.5, -1.0]}, [0.5, -1.0]),
    ],
)
def test_init(arguments, expected):
    balancer = IMTL(**arguments)
    balancer.bind(2)
    assert balancer.loss.log_scale.tolist() == expected
    balancer.reset()
    assert balancer.loss.log_scale.tolist() == expected


@pytest.mark.parametrize("method", ["both", "Hybrid", "", None, 1])
def test_unknown_method(method):
    with pytest.raises(ValueError, match="method: expected one of 'hybrid', 'loss', 'gradient', got"):
        IMTL(2, method)


@pytest.mark.parametrize("init", [0.0, [0.0, 0.0]])
def test_init_without_scales(init):
    with pytest.raises(ValueError, match='init: method="gradient" has no scales to initialise'):
        IMTL(2, "gradient", init)


def test_init_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"init: expected one number, or 3 for the shape \(3,\), got 2"):
        IMTL(3, init=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"init: expected log-scales within \[-20, 20\], got 30"):
        IMTL(2, init=30)


@pytest.mark.parametrize("method", ["hybrid", "loss", "gradient"])
def test_bind(method):
    balancer = IMTL(3, method)
    balancer.bind(3)
    with pytest.raises(ValueError, match="IMTL was made for 3 tasks, but the model has 2 heads"):
        balancer.bind(2)
    with pytest.raises(ValueError, match=r"made for 3 tasks|values of shape \(3,\)"):
        balancer(torch.ones(2), torch.eye(2))
    later = IMTL(method=method)
    later.bind(2)
    assert later.num_tasks == 2
    assert later.to(DEVICE)(torch.ones(2, device=DEVICE), torch.eye(2, device=DEVICE)).isfinite().all()


@pytest.mark.parametrize("method", ["hybrid", "loss", "gradient"])
@pytest.mark.parametrize("num_tasks", [0, -1])
def test_number_of_tasks_out_of_range(method, num_tasks):
    with pytest.raises(ValueError, match="at least 1"):
        IMTL(num_tasks, method)


def test_state_and_copies():
    balancer = IMTL(2, init=[0.5, -0.5]).to(DEVICE)
    assert list(balancer.state_dict()) == ["loss.log_scale"]
    losses, matrix = torch.ones(2, device=DEVICE), zoo.normal(2, 6, gen=zoo.generator(4)).to(DEVICE)
    fresh = IMTL(2).to(DEVICE)
    fresh.load_state_dict(balancer.state_dict())
    for twin in (fresh, copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert torch.equal(twin(losses, matrix), balancer(losses, matrix))
        assert torch.equal(twin.scalarize(losses), balancer.scalarize(losses))
