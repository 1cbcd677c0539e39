"""``init="first_losses"``: log-scales that begin where the first losses want them."""

import copy
import math

import pytest
import torch
from torch import Tensor

from mtlwrap import IMTL, IMTLL, UW, Balancer
from tests.common import DEVICE, TASKS, make_input, make_losses, make_model

EXACT = {"rtol": 1e-13, "atol": 1e-13}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def double(balancer: Balancer) -> Balancer:
    return balancer.to(device=DEVICE, dtype=torch.float64)


def test_the_first_losses_are_scaled_to_one():
    balancer = double(IMTLL(3, init="first_losses"))
    losses = doubles(1e-3, 2.0, 5e4).requires_grad_()
    total = balancer(losses)
    total.backward()
    # s = -ln L: sum of 1 + ln L, with gradients 1 / L on the losses and none on s.
    assert total.item() == pytest.approx(3 + math.log(1e-3) + math.log(2.0) + math.log(5e4), rel=1e-13)
    torch.testing.assert_close(losses.grad, 1 / losses.detach(), **EXACT)
    torch.testing.assert_close(balancer.log_scale.grad, torch.zeros_like(losses), **EXACT)
    # From then on it is the scale that these losses set, and what was learned since.
    with torch.no_grad():
        balancer.log_scale.copy_(doubles(0.0, 0.5, -1.0))
    later = doubles(3.0, 4.0, 5.0).requires_grad_()
    balancer(later).backward()
    torch.testing.assert_close(later.grad, doubles(0.0, 0.5, -1.0).exp() / losses.detach(), **EXACT)


def test_each_likelihood_starts_at_its_minimum():
    kinds = ["regression", "classification", "laplace"]
    balancer = double(UW(likelihood=kinds, init="first_losses"))
    losses = doubles(0.02, 3.0, 700.0).requires_grad_()
    balancer(losses).backward()
    torch.testing.assert_close(balancer.log_variance.grad, torch.zeros_like(losses), **EXACT)
    factors = [0.5, 1.0, 1.0], [0.5, 0.5, 1.0]
    variances = [a * loss / c for loss, a, c in zip(losses.tolist(), *factors, strict=True)]
    expected = [a / variance for a, variance in zip(factors[0], variances, strict=True)]
    torch.testing.assert_close(losses.grad, doubles(*expected), **EXACT)


@pytest.mark.parametrize(("bad", "other"), [(0.0, 4.0), (-1.0, 4.0), (math.nan, 16.0), (math.inf, 16.0)])
def test_a_loss_that_tells_nothing_leaves_it_to_a_later_one(bad, other):
    """One that is not finite leaves all of them: such a step is skipped."""
    balancer = double(IMTLL(2, init="first_losses"))
    balancer(doubles(bad, 4.0))
    losses = doubles(8.0, 16.0).requires_grad_()
    balancer(losses).backward()
    torch.testing.assert_close(losses.grad, doubles(1 / 8, 1 / other), **EXACT)


def test_a_task_starts_when_it_comes():
    balancer = double(IMTLL(3, init="first_losses"))
    balancer.scalarize(doubles(2.0), [1])
    balancer.scalarize(doubles(4.0, 10.0), [0, 1])
    losses = doubles(1.0, 1.0, 8.0).requires_grad_()
    balancer(losses).backward()
    torch.testing.assert_close(losses.grad, doubles(1 / 4, 1 / 2, 1 / 8), **EXACT)


def test_looking_on_starts_nothing():
    balancer = double(IMTLL(2, init="first_losses"))
    with torch.no_grad():
        assert balancer(doubles(4.0, 2.0)).item() == pytest.approx(2 + math.log(8.0))
    balancer.eval()
    balancer(doubles(4.0, 2.0))
    assert balancer.start.tolist() == [math.inf, math.inf]


def test_starts_and_stays_within_the_bound():
    balancer = double(IMTLL(3, init="first_losses", bound=2.0))
    losses = doubles(1e-9, 1e9, 2.0).requires_grad_()
    balancer(losses).backward()
    torch.testing.assert_close(losses.grad, doubles(math.exp(2), math.exp(-2), 0.5), **EXACT)
    with torch.no_grad():
        balancer.log_scale.copy_(doubles(1.0, -1.0, 1.0))
    later = doubles(1e-9, 1e9, 2.0).requires_grad_()
    balancer(later).backward()
    torch.testing.assert_close(later.grad, doubles(math.exp(2), math.exp(-2), 0.5 * math.e), **EXACT)
    torch.testing.assert_close(balancer.log_scale.detach(), doubles(0.0, 0.0, 1.0), **EXACT)


def test_values_of_any_shape():
    values = doubles(1.0, 2.0, 4.0, 8.0).reshape(2, 2).requires_grad_()
    balancer = double(IMTLL((2, 2), init="first_losses"))
    balancer(values).backward()
    torch.testing.assert_close(values.grad, 1 / values.detach(), **EXACT)


def test_half_precision_keeps_the_start():
    balancer = IMTLL(1, init="first_losses").to(device=DEVICE, dtype=torch.bfloat16)
    loss = torch.tensor([1000.0], device=DEVICE).requires_grad_()
    for _ in range(2):
        loss.grad = None
        balancer(loss).backward()
        assert loss.grad.item() == pytest.approx(1e-3, rel=1e-5)  # bfloat16 has steps of 1/32 at ln 1000


def test_a_start_of_half_precision_is_made_in_float32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert IMTLL(2, init="first_losses").start.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [IMTLL, UW, IMTL])
def test_reset_and_checkpoint(make):
    balancer, fresh = (make(2, init="first_losses").to(DEVICE) for _ in range(2))
    assert {name for name in balancer.state_dict() if name.endswith("start")}
    scales = balancer.loss if make is IMTL else balancer
    scales(torch.tensor([3.0, 0.2], device=DEVICE))
    assert scales.start.isfinite().all()
    fresh.load_state_dict(balancer.state_dict())
    twin = copy.deepcopy(balancer)
    expected = scales.start.clone()
    for other in (fresh, twin):
        assert torch.equal((other.loss if make is IMTL else other).start, expected)
    balancer.reset()
    assert scales.start.tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(("make", "sign"), [(IMTLL, 1.0), (UW, -1.0), (IMTL, 1.0)])
def test_a_checkpoint_of_another_init_is_taken_for_what_it_says(make, sign):
    """The same scales go on, whichever of the two an optimizer learned them under."""
    learned, at_first = make(2), make(2, init="first_losses")
    with torch.no_grad():
        next(learned.parameters()).copy_(torch.tensor([-3.0, 2.0]))
    at_first.load_state_dict(learned.state_dict())
    losses = torch.tensor([10.0, 20.0]).requires_grad_()
    expected = torch.tensor([-3.0, 2.0]).mul(sign).exp() * (0.5 if make is UW else 1.0)
    (got,) = torch.autograd.grad(at_first.scalarize(losses), losses)
    torch.testing.assert_close(got, expected)
    begun, back = make(2, init="first_losses"), make(2)
    begun.scalarize(torch.tensor([4.0, 8.0]), None)
    with torch.no_grad():
        next(begun.parameters()).add_(0.5)
    back.load_state_dict(begun.state_dict())
    (expected,) = torch.autograd.grad(begun.scalarize(losses), losses)
    (got,) = torch.autograd.grad(back.scalarize(losses), losses)
    torch.testing.assert_close(got, expected)


def test_what_it_learns_from_zero_has_no_other_state():
    assert list(IMTLL(2, init=0.5).state_dict()) == ["log_scale"]
    assert list(IMTLL(2, init="first_losses").state_dict()) == ["log_scale", "start"]
    assert repr(IMTLL(2, init="first_losses")) == "IMTLL(shape=(2,), bound=20, init='first_losses')"
    assert "init='first_losses'" in repr(UW(init="first_losses"))


def test_in_a_model_the_first_step_weighs_by_the_first_losses():
    model = make_model(IMTL(method="loss", init="first_losses"))
    losses = make_losses(model(make_input()))
    model.backward(losses)
    expected = torch.stack([1 / losses[task].detach() for task in TASKS])
    torch.testing.assert_close(model.task_weights, expected.to(model.task_weights), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [IMTLL, UW, IMTL])
def test_a_name_that_is_none(make):
    with pytest.raises(TypeError, match="init: expected a number, one per task, or 'first_losses', got 'first'"):
        make(2, init="first")
