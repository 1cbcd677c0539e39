"""GLS against the geometric mean by hand, where losses are large, many, zero or negative."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchjd import scalarization

from mtlwrap import MultiTaskModel, TaskGradients
from mtlwrap.balancers.compose import Compose
from mtlwrap.balancers.gls import GLS
from mtlwrap.balancers.imtl_g import IMTLG
from tests.balancers.zoo import generator, normal
from tests.common import DEVICE, TASKS, grads, make_input, make_losses, make_model, task_gradients, unwrapped_losses

CLOSE = {"rtol": 1e-13, "atol": 0}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE, requires_grad=True)


def derivatives(values: list[float]) -> list[float]:
    """G / (T L) by hand."""
    return [statistics.geometric_mean(values) / (len(values) * value) for value in values]


@pytest.mark.parametrize("values", [[3.0], [2.0, 8.0], [1e-3, 7.0, 40.0], [0.1, 0.2, 0.3, 0.4, 1e6]])
def test_value_and_gradient_by_hand(values: list[float]) -> None:
    losses = doubles(*values)
    total = GLS()(losses)
    assert total.shape == ()
    assert total.item() == pytest.approx(statistics.geometric_mean(values), rel=1e-13)
    total.backward()
    assert losses.grad.tolist() == pytest.approx(derivatives(values), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchjd(dtype: torch.dtype) -> None:
    for seed in range(5):
        values = normal(4, gen=generator(seed)).exp().to(DEVICE, dtype)
        assert_close(GLS()(values), scalarization.GeometricMean()(values))


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(GLS(), doubles(0.5, 2.0, 30.0))
    assert torch.autograd.gradgradcheck(GLS(), doubles(0.5, 2.0, 30.0))


@pytest.mark.parametrize("exponent", [-6, 6])
def test_many_small_or_large_losses_in_float32(exponent: int) -> None:
    """A product of 40 of them is far outside of float32."""
    losses = torch.full((40,), 10.0**exponent, device=DEVICE, requires_grad=True)
    total = GLS()(losses)
    assert total.item() == pytest.approx(10.0**exponent, rel=1e-5)
    total.backward()
    assert_close(losses.grad, torch.full_like(losses, 1 / 40), rtol=1e-5, atol=0)


def test_units_change_only_the_length_of_the_gradient() -> None:
    losses, scaled = doubles(1.0, 4.0, 9.0), doubles(1.0, 4000.0, 9.0)
    GLS()(losses).backward()
    GLS()(scaled).backward()
    relative, expected = scaled.grad * scaled.detach(), losses.grad * losses.detach()
    assert_close(relative, expected * 1000 ** (1 / 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_values_of_any_shape(shape: tuple[int, ...]) -> None:
    values = normal(6, gen=generator(0))[: math.prod(shape)].reshape(shape).exp().to(DEVICE)
    assert GLS()(values).item() == pytest.approx(statistics.geometric_mean(values.flatten().tolist()), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    losses = torch.tensor([2.0, 8.0, 60000.0], dtype=dtype, device=DEVICE, requires_grad=True)
    total = GLS()(losses)
    assert total.dtype == torch.float32
    exact = losses.detach().double().log().mean().exp().item()
    assert total.item() == pytest.approx(exact, rel=1e-5)
    total.backward()
    assert losses.grad.dtype == dtype


# ------------------------------------------------------------------------------------------ zero, negative, not finite


@pytest.mark.parametrize("floor", [1e-8, 1e-2])
@pytest.mark.parametrize("small", [0.0, 1e-9])
def test_a_loss_below_the_floor_counts_as_the_floor(small: float, floor: float) -> None:
    losses = doubles(small, 4.0, 2.0)
    total = GLS(floor=floor)(losses)
    assert total.item() == pytest.approx(statistics.geometric_mean([floor, 4.0, 2.0]), rel=1e-12)
    total.backward()
    assert losses.grad.tolist() == pytest.approx([0.0, *derivatives([floor, 4.0, 2.0])[1:]], rel=1e-12)


def test_a_loss_at_the_floor_still_gets_its_gradient() -> None:
    losses = doubles(1e-2, 4.0)
    GLS(floor=1e-2)(losses).backward()
    assert losses.grad.tolist() == pytest.approx(derivatives([1e-2, 4.0]), rel=1e-12)


@pytest.mark.parametrize("values", [(0.0,), (0.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("floor", [1e-8, 1e-300])
def test_zeros_in_float32_give_finite_gradients(values: tuple[float, ...], floor: float) -> None:
    losses = torch.tensor(values, device=DEVICE, requires_grad=True)
    total = GLS(floor=floor)(losses)
    total.backward()
    assert 0 < total.item() < 1
    assert losses.grad.isfinite().all()
    assert losses.grad[0] == 0


@pytest.mark.parametrize("bad", [-1.0, -1e-12, math.nan, math.inf])
@pytest.mark.parametrize("others", [(), (2.0,), (2.0, 0.0)])
def test_a_negative_or_infinite_loss_is_not_hidden(bad: float, others: tuple[float, ...]) -> None:
    """No gradient is finite, so that a GradScaler sees it at whatever parameter it looks."""
    losses = doubles(bad, *others)
    total = GLS()(losses)
    assert not total.isfinite()
    total.backward()
    assert not losses.grad[0].isfinite()
    assert not losses.grad[losses.detach() > 0].isfinite().any()


# ---------------------------------------------------------------------------------------------------- in a model


def test_in_a_model_with_and_without_a_task() -> None:
    """Heads and backbone get the gradient of the geometric mean of those that take part."""
    for present in (TASKS, ("a", "c"), ("b",)):
        model, x = make_model(GLS()), make_input()
        _, losses = unwrapped_losses(model, x)
        chosen = [losses[task] for task in present]
        mean = torch.stack(chosen).prod() ** (1 / len(chosen))
        parameters = list(model.model_parameters())
        (expected,) = task_gradients([mean], parameters)
        found = make_losses(model(x))
        total = model.scalarize({task: found[task] for task in present})
        assert total.item() == pytest.approx(mean.item(), rel=1e-12)
        total.backward()
        assert_close(grads(parameters), expected, rtol=1e-10, atol=1e-13)
        weights = [mean.item() / (len(present) * losses[task].item()) if task in present else 0.0 for task in TASKS]
        assert model.task_weights.tolist() == pytest.approx(weights, rel=1e-12)


def test_trains_and_ignores_units() -> None:
    """With normalised steps the way does not depend on the unit of a loss."""
    ends = []
    for unit in (1.0, 1e4):
        parameter = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64, device=DEVICE))
        optimizer = torch.optim.Adam([parameter], lr=0.05, eps=0.0)
        for _ in range(100):
            optimizer.zero_grad()
            errors = (parameter - 1).square() + 0.1
            GLS()(torch.stack([errors[0], unit * errors[1]])).backward()
            optimizer.step()
        ends.append(parameter.detach().clone())
    assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)
    assert ((ends[0] - 1).abs() < 0.5).all()


def test_under_a_gradient_balancer() -> None:
    """IMTL-G sees the gradients with the factors G / (T L)."""
    losses = torch.tensor([2.0, 8.0], dtype=torch.float64, device=DEVICE)
    matrix = normal(2, 5, gen=generator(1)).to(DEVICE)
    factors = torch.tensor(derivatives([2.0, 8.0]), dtype=torch.float64, device=DEVICE)
    expected = IMTLG()(factors[:, None] * matrix)
    assert_close(Compose(loss=GLS(), gradient=IMTLG())(losses, matrix), expected, **CLOSE)


def test_torch_func_and_compile() -> None:
    balancer, values = GLS(), doubles(2.0, 8.0, 0.0).detach()
    expected = [*derivatives([2.0, 8.0, 1e-8])[:2], 0.0]
    assert torch.func.grad(balancer)(values).tolist() == pytest.approx(expected, rel=1e-12)
    batch = torch.stack([values, values + 1])
    assert_close(torch.func.vmap(balancer)(batch), torch.stack([balancer(row) for row in batch]))
    compiled = torch.compile(balancer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(values), balancer(values))


# ------------------------------------------------------------------------------------------- arguments and state


@pytest.mark.parametrize(
    ("floor", "error", "message"),
    [
        (0.0, ValueError, r"floor: expected a positive finite number, got 0\.0"),
        (-1, ValueError, "floor: expected a positive finite number, got -1"),
        (math.inf, ValueError, "floor: expected a positive finite number, got inf"),
        (math.nan, ValueError, "floor: expected a positive finite number, got nan"),
        ("1", TypeError, "floor: expected a number, got '1'"),
        (True, TypeError, "floor: expected a number, got True"),
    ],
)
def test_bad_arguments(floor: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GLS(floor=floor)


def test_bad_values() -> None:
    with pytest.raises(TypeError, match="GLS: expected a floating-point tensor of values, got torch"):
        GLS()(torch.tensor([1, 2]))


def test_it_has_no_state() -> None:
    balancer = GLS(floor=1e-4)
    balancer(doubles(1.0, 2.0)).backward()
    assert balancer.state_dict() == {}
    assert list(balancer.parameters()) == []
    assert repr(balancer) == "GLS(floor=0.0001)"
    model = MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1)], balancer)
    assert model.balancer.num_tasks == 1
    assert balancer.weigh(TaskGradients(torch.ones(1, 2))).tolist() == [1.0]  # a loss balancer weighs no gradients
