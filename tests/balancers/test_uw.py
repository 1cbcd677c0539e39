"""Uncertainty weighting against its formulas, TorchJD, hand-worked values and its own promises."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchjd import scalarization

from mtlwrap import UW, MultiTaskModel
from tests.balancers import zoo
from tests.common import DEVICE

EXACT = {"rtol": 1e-13, "atol": 1e-13}
LIKELIHOODS = ["regression", "classification", "laplace"]


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def balancer_at(variances: Tensor, *args: object, **options: object) -> UW:
    """A float64 balancer at these log-variances."""
    balancer = UW(tuple(variances.shape), *args, **options).to(device=DEVICE, dtype=torch.float64)
    with torch.no_grad():
        balancer.log_variance.copy_(variances)
    return balancer


def density_objective(likelihood: str, s: float, loss: float) -> float:
    """Minus the log-likelihood as the paper has it, from sigma or b itself, without the constants."""
    if likelihood == "regression":  # Eq. 5 and 7: L / 2 sigma^2 + log sigma
        sigma = math.sqrt(math.exp(s))
        return loss / (2 * sigma**2) + math.log(sigma)
    if likelihood == "classification":  # Eq. 10: L / sigma^2 + log sigma
        sigma = math.sqrt(math.exp(s))
        return loss / sigma**2 + math.log(sigma)
    b = math.exp(s)  # |y - f| / b + log 2b
    return loss / b + math.log(2 * b) - math.log(2)


def test_hand_worked():
    # s = (0, ln 2, -ln 4), L = (3, .5, 8): half of e^-s L + s = (3, .25 + ln 2, 32 - ln 4).
    balancer = balancer_at(doubles(0.0, math.log(2), -math.log(4)))
    losses = doubles(3.0, 0.5, 8.0).requires_grad_()
    total = balancer(losses)
    assert total.shape == ()
    assert total.item() == pytest.approx((35.25 - math.log(2)) / 2, rel=1e-14)
    total.backward()
    torch.testing.assert_close(losses.grad, doubles(0.5, 0.25, 2.0), **EXACT)
    torch.testing.assert_close(balancer.log_variance.grad, doubles(-1.0, 0.375, -15.5), **EXACT)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_is_minus_the_log_likelihood(likelihood):
    gen = zoo.generator(0)
    for _ in range(20):
        variances, losses = zoo.normal(4, gen=gen), zoo.normal(4, gen=gen).exp()
        expected = sum(
            density_objective(likelihood, s, x) for s, x in zip(variances.tolist(), losses.tolist(), strict=True)
        )
        total = balancer_at(variances, likelihood)(losses.to(DEVICE))
        assert total.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_likelihood_per_task():
    variances, losses = doubles(0.5, -1.0, 0.25), doubles(2.0, 0.3, 4.0)
    for kinds in (LIKELIHOODS, tuple(reversed(LIKELIHOODS)), ["laplace", "laplace", "regression"]):
        total = balancer_at(variances, kinds)(losses)
        parts = zip(kinds, variances.tolist(), losses.tolist(), strict=True)
        assert total.item() == pytest.approx(sum(density_objective(*part) for part in parts), rel=1e-13)


def test_a_list_of_likelihoods_tells_the_number_of_tasks():
    balancer = UW(likelihood=["regression", "laplace"])
    assert balancer.log_variance.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"UW was made for values of shape \(2,\), but the model has 3 heads"):
        balancer.bind(3)


def test_classification_is_regression_shifted_by_ln_2():
    # cls(s + ln 2) - reg(s) = 1/2 ln 2 for every task, whatever s and L.
    gen = zoo.generator(1)
    for tasks in (1, 4):
        for _ in range(10):
            variances, losses = zoo.normal(tasks, gen=gen), zoo.normal(tasks, gen=gen).exp().to(DEVICE)
            regression = balancer_at(variances, "regression")(losses)
            classification = balancer_at(variances + math.log(2), "classification")(losses)
            assert (classification - regression).item() == pytest.approx(tasks * math.log(2) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("likelihood", "optimum", "weight"),
    [("regression", 1.0, 0.5), ("classification", 2.0, 0.5), ("laplace", 1.0, 1.0)],
)
def test_at_the_optimum(likelihood, optimum, weight):
    # e^s = L, 2L and L; the loss is then weighed by 1 / 2L, 1 / 2L and 1 / L.
    values = doubles(1e-5, 0.4, 7.0, 3e4)
    losses = values.clone().requires_grad_()
    balancer = balancer_at((optimum * values).log(), likelihood)
    balancer(losses).backward()
    torch.testing.assert_close(balancer.log_variance.grad, torch.zeros_like(values), rtol=0, atol=1e-12)
    torch.testing.assert_close(losses.grad, weight / values, rtol=1e-12, atol=0)
    for shift in (-0.1, 0.1):  # a minimum
        away = balancer_at((optimum * values).log() + shift, likelihood)
        assert away(values) > balancer(values)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_learns_the_optimum(likelihood):
    losses = doubles(0.02, 0.7, 30.0)
    balancer = balancer_at(torch.zeros(3), likelihood)
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.1)
    for _ in range(1000):
        optimizer.zero_grad()
        balancer(losses).backward()
        optimizer.step()
    factor = 2.0 if likelihood == "classification" else 1.0
    torch.testing.assert_close(balancer.log_variance.exp(), factor * losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [3, (3,), (2, 3), (), torch.Size([2, 1, 2])])
def test_equals_torchjd(shape, dtype, rtol):
    ours, theirs = (cls(shape).to(device=DEVICE, dtype=dtype) for cls in (UW, scalarization.UW))
    size = theirs.log_var.shape
    assert ours.log_variance.shape == size
    gen = zoo.generator(2)
    for _ in range(10):
        variances, values = (
            torch.randn(size, generator=gen, dtype=torch.float64),
            torch.randn(size, generator=gen, dtype=torch.float64).exp(),
        )
        answers = []
        for balancer, parameter in ((ours, ours.log_variance), (theirs, theirs.log_var)):
            with torch.no_grad():
                parameter.copy_(variances)
            losses = values.to(device=DEVICE, dtype=dtype).requires_grad_()
            balancer.zero_grad()
            total = balancer(losses)
            total.backward()
            answers.append((total.detach(), losses.grad, parameter.grad.clone()))
        for mine, other in zip(*answers, strict=True):
            torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol)


def test_trains_a_network_as_torchjd_does():
    def run(balancer: torch.nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 3).to(device=DEVICE, dtype=torch.float64)
        balancer = balancer.to(device=DEVICE, dtype=torch.float64)
        optimizer = torch.optim.SGD([*network.parameters(), *balancer.parameters()], lr=0.01, momentum=0.5)
        inputs = zoo.normal(8, 4, gen=zoo.generator(3)).to(DEVICE)
        for _ in range(40):
            optimizer.zero_grad()
            balancer((network(inputs) * doubles(1.0, 3.0, 0.2)).square().mean(dim=0)).backward()
            optimizer.step()
        return [*network.parameters(), *balancer.parameters()]

    for mine, other in zip(run(UW(3)), run(scalarization.UW(3)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------- start, reset, state


def test_starts_at_zero():
    values = torch.tensor([1.0, 2.5, -3.0], device=DEVICE)
    assert UW(3).log_variance.tolist() == [0.0, 0.0, 0.0]
    assert UW(3).to(DEVICE)(values).item() == 0.25  # half the sum
    assert UW(3, "classification").to(DEVICE)(values).item() == 0.5
    assert UW(3, "laplace").to(DEVICE)(values).item() == 0.5


@pytest.mark.parametrize(
    ("init", "expected"),
    [(-0.5, [-0.5, -0.5]), (5, [5.0, 5.0]), ([0.25, -1], [0.25, -1.0]), (torch.tensor([1.0, -3.0]), [1.0, -3.0])],
)
def test_init(init, expected):
    assert UW(2, init=init).log_variance.tolist() == expected
    assert UW(likelihood=["laplace", "regression"], init=init).log_variance.tolist() == expected
    bound_later = UW(init=init)
    bound_later.bind(2)
    assert bound_later.log_variance.tolist() == expected


@pytest.mark.parametrize("init", [20.5, [0.0, -25.0], math.nan, math.inf])
def test_init_out_of_range(init):
    with pytest.raises(ValueError, match=r"init: expected log-scales within \[-20, 20\], got"):
        UW(2, init=init)


@pytest.mark.parametrize("init", ["x", True, [[0.0], [1.0]]])
def test_init_that_is_no_number(init):
    with pytest.raises(TypeError, match="init: expected a number, one per task, or 'first_losses', got"):
        UW(2, init=init)


def test_init_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"init: expected one number, or 2 for the shape \(2,\), got 3"):
        UW(likelihood=["laplace", "regression"], init=[0.0, 1.0, 2.0])


@pytest.mark.parametrize("bound", [0, -1.0, math.inf, math.nan])
def test_bound_out_of_range(bound):
    with pytest.raises(ValueError, match="bound: expected a positive finite number, got"):
        UW(2, bound=bound)


@pytest.mark.parametrize("likelihood", [None, 2, {"a": "laplace", "b": "laplace"}])
def test_likelihoods_of_another_kind(likelihood):
    with pytest.raises(TypeError, match=r"likelihood: expected (a sequence of )?names"):
        UW(2, likelihood=likelihood)


def test_which_option_says_how_many_tasks_there_are():
    heads = [nn.Linear(2, 1) for _ in range(3)]
    for balancer, name in (
        (UW(likelihood=["laplace", "laplace"]), "likelihood with one entry, or with 3"),
        (UW(init=[0.0, 1.0]), "init with one entry, or with 3"),
        (UW(2, ["laplace", "laplace"]), "the shape 3, or none at all"),
    ):
        with pytest.raises(ValueError, match=rf"UW was made for values of shape \(2,\).* 3 heads; expected {name}\."):
            MultiTaskModel(nn.Linear(2, 2), heads, balancer)


@pytest.mark.parametrize("likelihood", ["gauss", ["regression", "l1"], ["Regression", "laplace"], [1, 2]])
def test_unknown_likelihood(likelihood):
    with pytest.raises(ValueError, match="likelihood: expected one of 'regression', 'classification', 'laplace', got"):
        UW(2, likelihood)


@pytest.mark.parametrize(("shape", "count"), [(2, 3), (3, 2), ((3, 1), 3), ((), 1)])
def test_likelihoods_of_the_wrong_number(shape, count):
    with pytest.raises(ValueError, match=r"likelihood: expected one, or one per value for shape \(.*\), got \d"):
        UW(shape, ["regression"] * count)


def test_likelihood_for_a_matrix_of_values():
    balancer = UW((2, 2), "laplace").to(DEVICE)
    assert balancer(torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=DEVICE)).item() == 11.0


@pytest.mark.parametrize("shape", [0, -1])
def test_shape_without_values(shape):
    with pytest.raises(ValueError, match="shape: expected sizes of at least 1, got"):
        UW(shape)


def test_the_log_variance_is_learned_and_the_options_are_not_saved():
    balancer = UW(likelihood=["laplace", "regression"], init=[0.5, -0.5], bound=10)
    assert [name for name, _ in balancer.named_parameters()] == ["log_variance"]
    assert list(balancer.state_dict()) == ["log_variance"]
    assert repr(balancer) == "UW(likelihood=['laplace', 'regression'], shape=(2,), bound=10)"


def _train(balancer: UW, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        balancer(torch.tensor([0.1 + step, 5.0], device=DEVICE)).backward()
        optimizer.step()


@pytest.mark.parametrize("init", [None, 0.25, [0.5, -0.5]])
def test_reset_equals_a_fresh_one(init):
    balancer = UW(2, init=init).to(DEVICE)
    parameter = balancer.log_variance
    _train(balancer, torch.optim.SGD(balancer.parameters(), lr=0.1), 3)
    fresh = UW(2, init=init).to(DEVICE)
    assert not torch.equal(balancer.log_variance, fresh.log_variance)
    balancer.reset()
    assert balancer.log_variance is parameter
    assert torch.equal(balancer.log_variance, fresh.log_variance)


@pytest.mark.parametrize(
    "make", [lambda: UW(2, init=0.5), lambda: UW(likelihood=["laplace", "classification"], init=[0.5, 0.25])]
)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_checkpoint(how, make):
    balancer = make().to(DEVICE)
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.1)
    _train(balancer, optimizer, 3)
    if how == "state_dict":
        twin = make().to(DEVICE)
        twin.load_state_dict(balancer.state_dict())
    else:
        twin = copy.deepcopy(balancer) if how == "deepcopy" else pickle.loads(pickle.dumps(balancer))
    assert torch.equal(twin.log_variance, balancer.log_variance)
    assert twin.log_variance is not balancer.log_variance
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(twin, twin_optimizer, 2)
    _train(balancer, optimizer, 2)
    assert torch.equal(twin.log_variance, balancer.log_variance)
    twin.reset()
    assert twin.log_variance.tolist() == make().log_variance.tolist()


# -------------------------------------------------------------------------------------------------------- the bound


def _steps(balancer: UW, optimizer: torch.optim.Optimizer, count: int, *losses: float) -> None:
    values = torch.tensor(losses, device=DEVICE)
    for _ in range(count):
        optimizer.zero_grad()
        balancer(values).backward()
        optimizer.step()


def test_a_loss_of_zero_stays_finite_and_finds_its_way_back_with_adam():
    balancer = UW(2).to(DEVICE)
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.125, foreach=False)
    _steps(balancer, optimizer, 4000, 0.0, 2.0)  # unbounded, the log-variance would go to -500
    stuck, other = balancer.log_variance.tolist()
    assert 20.0 <= -stuck <= 22.0  # at the bound, and not far beyond
    assert other == pytest.approx(math.log(2.0), abs=1e-3)
    assert balancer(torch.tensor([0.0, 2.0], device=DEVICE)).isfinite()
    # The first gradient after that, of e^20 / 4, stays in Adam's memory for long: the way back is slow, but taken.
    _steps(balancer, optimizer, 500, 0.5, 2.0)
    assert 0.0 < -balancer.log_variance[0].item() < 14.0


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_loss_of_zero_that_comes_back_is_soon_balanced_again_within_a_small_bound(optimizer):
    balancer = UW(2, bound=3.0).to(DEVICE)
    optimizer = optimizer(balancer.parameters(), lr=0.05)
    _steps(balancer, optimizer, 1000, 0.0, 2.0)
    assert 3.0 <= -balancer.log_variance[0].item() <= 4.0
    _steps(balancer, optimizer, 500, 0.5, 2.0)
    assert balancer.log_variance[0].item() == pytest.approx(-math.log(2.0), abs=0.05)


def test_neither_runs_away_nor_sticks_under_sgd():
    # At the bound (a loss was zero for long) the gradient is e^20 L: one step of SGD leads across the whole range. From
    # the other bound the way back is 1/2 per unit of step size: some 400 steps, unless it has left the range.
    balancer = UW(2, init=[-20.0, 0.0]).to(DEVICE)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
    _steps(balancer, optimizer, 800, 0.5, 2.0)
    assert balancer.log_variance[0].item() == pytest.approx(-math.log(2.0), abs=0.05)


@pytest.mark.parametrize("bound", [20.0, 3.0])
def test_acts_within_the_bound(bound):
    balancer = balancer_at(doubles(bound + 5, -bound - 7, 0.5), bound=bound)
    losses = doubles(2.0, 1e-3, 3.0).requires_grad_()
    total = balancer(losses)
    twice = 2 * math.exp(-bound) + bound + 1e-3 * math.exp(bound) - bound + 3 * math.exp(-0.5) + 0.5
    assert total.item() == pytest.approx(twice / 2, rel=1e-12)
    total.backward()
    expected = doubles(math.exp(-bound), math.exp(bound), math.exp(-0.5)) / 2
    torch.testing.assert_close(losses.grad, expected, **EXACT)


def test_a_step_beyond_the_bound_is_taken_back_when_training_goes_on():
    balancer = balancer_at(doubles(1e6, -1e6, 0.5), bound=3.0)
    parameter = balancer.log_variance
    with torch.no_grad():  # watching changes nothing, and sees what training would
        seen = balancer(doubles(0.5, 2.0, 1.0))
    assert parameter.tolist() == [1e6, -1e6, 0.5]
    assert torch.equal(balancer(doubles(0.5, 2.0, 1.0)), seen)
    assert parameter.tolist() == [3.0, -3.0, 0.5]
    assert balancer.log_variance is parameter


def test_in_evaluation_nothing_is_put_back():
    balancer = balancer_at(doubles(1e6, -1e6), bound=3.0).eval()
    seen = balancer(doubles(0.5, 2.0))
    assert balancer.log_variance.tolist() == [1e6, -1e6]
    assert torch.equal(balancer.train()(doubles(0.5, 2.0)), seen)
    assert balancer.log_variance.tolist() == [3.0, -3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_teaches_nothing(bad):
    balancer = balancer_at(doubles(0.5, -0.25))
    twin = copy.deepcopy(balancer)
    total = balancer(doubles(bad, 3.0))
    assert not total.isfinite()  # it is not hidden
    total.backward()
    twin(doubles(1.0, 3.0)).backward()
    assert balancer.log_variance.grad[0] == 0
    assert balancer.log_variance.grad[1] == twin.log_variance.grad[1]


def test_two_totals_may_wait_for_their_backward():
    values = doubles(1e6, 0.25, -1e6)
    together, apart = balancer_at(values, bound=3.0), balancer_at(values, bound=3.0)
    first, second = together(doubles(1.0, 2.0, 0.5)), together(doubles(0.1, 5.0, 3.0))
    second.backward()
    first.backward()
    for losses in (doubles(1.0, 2.0, 0.5), doubles(0.1, 5.0, 3.0)):
        apart(losses).backward()
    torch.testing.assert_close(together.log_variance.grad, apart.log_variance.grad, **EXACT)


@pytest.mark.parametrize("beyond", [0.0, 1.0])
def test_beyond_the_bound_only_the_way_back_is_open(beyond):
    high, low = 3.0 + beyond, -3.0 - beyond
    # The gradient is 1/2 (1 - e^-s L); a descent step moves against it.
    inward_down, outward_up = 1.0, 100.0  # at 1 - e^-3 L = .95 and -4
    outward_down, inward_up = 0.0, 1.0  # at 1 - e^3 L = 1 and -19
    balancer = balancer_at(doubles(high, high, low, low), bound=3.0)
    balancer(doubles(inward_down, outward_up, outward_down, inward_up)).backward()
    expected = doubles(1 - math.exp(-3), 0.0, 0.0, 1 - math.exp(3)) / 2
    torch.testing.assert_close(balancer.log_variance.grad, expected, **EXACT)


def test_a_negative_loss_goes_to_the_bound_and_no_further():
    balancer = balancer_at(torch.zeros(1), bound=4.0)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        total = balancer(doubles(-0.5))
        total.backward()
        optimizer.step()
    assert -8.0 < balancer.log_variance.item() <= -4.0
    assert total.item() == pytest.approx((-0.5 * math.exp(4) - 4) / 2, rel=1e-12)


def test_a_loss_that_is_not_finite_is_not_hidden():
    balancer = balancer_at(doubles(0.0, 0.0))
    assert balancer(doubles(math.nan, 1.0)).isnan()
    assert balancer(doubles(math.inf, 1.0)).isinf()


# ---------------------------------------------------------------------------------------------- types, shapes, tasks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses_are_scaled_in_float32(dtype):
    kinds = ["classification", "regression"]
    balancer = UW(likelihood=kinds, init=[-12.0, 12.0]).to(DEVICE)  # e^12 is beyond half precision's range
    total = balancer(torch.tensor([0.5, 3.0], dtype=dtype, device=DEVICE))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(0.5 * math.exp(12) - 6 + 1.5 * math.exp(-12) + 6, rel=1e-6)
    total.backward()
    expected = [0.5 - 0.5 * math.exp(12), 0.5 - 1.5 * math.exp(-12)]
    assert balancer.log_variance.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_half_precision_parameters_act_in_float32():
    balancer = UW(2, init=[-12.0, 0.0]).to(device=DEVICE, dtype=torch.bfloat16)
    total = balancer(torch.tensor([0.5, 3.0], dtype=torch.bfloat16, device=DEVICE))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx((0.5 * math.exp(12) - 12 + 3) / 2, rel=1e-6)


def test_double_losses_are_scaled_in_double():
    total = UW(1, "laplace").to(DEVICE)(doubles(1 + 1e-12))
    assert total.dtype == torch.float64
    assert total.item() == 1 + 1e-12


@pytest.mark.parametrize("likelihood", ["regression", ["regression", "regression"]])
def test_the_losses_may_be_on_another_device_than_the_log_variances(likelihood):
    balancer = UW(2, likelihood)
    balancer(torch.tensor([1.0, 3.0], device=DEVICE)).backward()
    assert balancer.log_variance.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_values_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"UW: expected values of shape \(3,\), got \("):
        UW(3)(torch.ones(shape))


@pytest.mark.parametrize(("values", "kind"), [([1.0, 2.0], "list"), (torch.tensor([1, 2]), "torch.int64")])
def test_values_of_another_type(values, kind):
    with pytest.raises(TypeError, match=f"UW: expected a floating-point tensor of values, got {kind}"):
        UW(2)(values)


def test_without_a_shape_it_says_what_to_do():
    with pytest.raises(ValueError, match=r"UW does not know the number of tasks.*bind\(num_tasks\)"):
        UW()(torch.ones(2))


def test_bind():
    balancer = UW(likelihood="laplace")
    assert balancer.log_variance is None
    balancer.bind(3)
    parameter = balancer.log_variance
    assert parameter.tolist() == [0.0, 0.0, 0.0]
    balancer.bind(3)
    assert balancer.log_variance is parameter
    assert balancer.to(DEVICE)(torch.tensor([1.0, 2.0, 4.0], device=DEVICE)).item() == 7.0
    with pytest.raises(TypeError, match=r"num_tasks: expected an int, got 3\.0"):
        balancer.bind(3.0)
    for made in (balancer, UW(3), UW(init=[0.0, 1.0, 2.0])):
        with pytest.raises(ValueError, match=r"UW was made for values of shape \(3,\), but the model has 2 heads"):
            made.bind(2)


@pytest.mark.parametrize("likelihood", ["laplace", ["regression", "classification", "regression", "laplace"]])
def test_a_subset_of_the_tasks(likelihood):
    kinds = [likelihood] * 4 if isinstance(likelihood, str) else likelihood
    variances = [0.5, -1.0, 0.25, 2.0]
    balancer = balancer_at(doubles(*variances), likelihood)
    losses = doubles(3.0, 0.5).requires_grad_()
    total = balancer.scalarize(losses, [3, 1])
    expected = density_objective(kinds[3], 2.0, 3.0) + density_objective(kinds[1], -1.0, 0.5)
    assert total.item() == pytest.approx(expected, rel=1e-13)
    total.backward()
    assert balancer.log_variance.grad[0] == 0
    assert balancer.log_variance.grad[2] == 0
    assert (balancer.log_variance.grad[[1, 3]] != 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(0, 1e8), st.sampled_from(LIKELIHOODS)), min_size=1, max_size=5))
def test_finite_and_pointed_inward_for_any_log_variance_and_loss(entries):
    variances, losses, kinds = zip(*entries, strict=True)
    balancer = balancer_at(doubles(*variances), list(kinds))
    balancer(doubles(*losses)).backward()
    for s, loss, kind, actual in zip(variances, losses, kinds, balancer.log_variance.grad.tolist(), strict=True):
        assert math.isfinite(actual)
        if abs(s) >= 20:
            assert actual * s >= 0
        else:
            a, c = {"regression": (0.5, 0.5), "classification": (1.0, 0.5), "laplace": (1.0, 1.0)}[kind]
            assert actual == pytest.approx(c - a * math.exp(-s) * loss, rel=1e-11, abs=1e-11)
