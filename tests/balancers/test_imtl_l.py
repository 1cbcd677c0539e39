"""IMTL-L against its formula, TorchJD, UW, and its own promises."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd import scalarization

from mtlwrap import IMTLL, UW
from tests.balancers import zoo
from tests.common import DEVICE

EXACT = {"rtol": 1e-13, "atol": 1e-13}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def balancer_at(scales: Tensor, **options: float) -> IMTLL:
    """A float64 balancer at these log-scales."""
    balancer = IMTLL(tuple(scales.shape), **options).to(device=DEVICE, dtype=torch.float64)
    with torch.no_grad():
        balancer.log_scale.copy_(scales)
    return balancer


def test_hand_worked():
    # s = (0, ln 2, -ln 4), L = (3, .5, 8): e^s L = (3, 1, 2), minus sum s = ln 2 - ln 4 = -ln 2.
    balancer = balancer_at(doubles(0.0, math.log(2), -math.log(4)))
    losses = doubles(3.0, 0.5, 8.0).requires_grad_()
    total = balancer(losses)
    assert total.shape == ()
    assert total.item() == pytest.approx(6 + math.log(2), rel=1e-14)
    total.backward()
    torch.testing.assert_close(losses.grad, doubles(1.0, 2.0, 0.25), **EXACT)
    torch.testing.assert_close(balancer.log_scale.grad, doubles(2.0, 0.0, 1.0), **EXACT)


def test_formula_and_gradients():
    gen = zoo.generator(0)
    for _ in range(20):
        scales, losses = zoo.normal(4, gen=gen).to(DEVICE), zoo.normal(4, gen=gen).exp().to(DEVICE).requires_grad_()
        balancer = balancer_at(scales)
        total = balancer(losses)
        total.backward()
        expected = sum(math.exp(s) * x - s for s, x in zip(scales.tolist(), losses.tolist(), strict=True))
        assert total.item() == pytest.approx(expected, rel=1e-13)
        torch.testing.assert_close(balancer.log_scale.grad, scales.exp() * losses.detach() - 1, **EXACT)
        torch.testing.assert_close(losses.grad, scales.exp(), **EXACT)


def test_stationary_where_the_scaled_loss_is_one():
    losses = doubles(1e-6, 0.3, 1.0, 2e5)
    balancer = balancer_at(-losses.log())
    balancer(losses).backward()
    torch.testing.assert_close(balancer.log_scale.grad, torch.zeros_like(losses), rtol=0, atol=1e-12)


def test_learns_to_scale_every_loss_to_one():
    losses = doubles(0.02, 0.7, 30.0)
    balancer = balancer_at(torch.zeros(3))
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.1)
    for _ in range(1000):
        optimizer.zero_grad()
        balancer(losses).backward()
        optimizer.step()
    torch.testing.assert_close(balancer.log_scale.exp() * losses, torch.ones_like(losses), rtol=1e-6, atol=0)


def test_a_loss_k_times_as_large_shifts_the_log_scale_by_ln_k():
    # The scalar of k L at s - ln k is that of L at s, plus ln k.
    scales, losses, k = doubles(0.3, -0.7), doubles(0.5, 2.0), doubles(10.0, 1e-3)
    before, after = balancer_at(scales)(losses), balancer_at(scales - k.log())(k * losses)
    assert (after - before).item() == pytest.approx(math.log(10.0) + math.log(1e-3), rel=1e-12)


def test_equals_twice_uw_with_the_log_scale_negated():
    gen = zoo.generator(1)
    for _ in range(30):
        scales = 2 * zoo.normal(5, gen=gen).to(DEVICE)
        values = zoo.normal(5, gen=gen).exp().to(DEVICE)
        ours, twin = values.clone().requires_grad_(), values.clone().requires_grad_()
        imtl_l = balancer_at(scales)
        uw = UW(5).to(device=DEVICE, dtype=torch.float64)
        with torch.no_grad():
            uw.log_variance.copy_(-scales)
        first, second = imtl_l(ours), 2 * uw(twin)
        first.backward()
        second.backward()
        torch.testing.assert_close(first, second, **EXACT)
        torch.testing.assert_close(ours.grad, twin.grad, **EXACT)
        torch.testing.assert_close(imtl_l.log_scale.grad, -uw.log_variance.grad, **EXACT)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [3, (3,), (2, 3), (), torch.Size([2, 1, 2])])
def test_equals_torchjd(shape, dtype, rtol):
    ours, theirs = (cls(shape).to(device=DEVICE, dtype=dtype) for cls in (IMTLL, scalarization.IMTLL))
    size = theirs.log_scale.shape
    assert ours.log_scale.shape == size
    gen = zoo.generator(2)
    for _ in range(10):
        scales, values = (
            torch.randn(size, generator=gen, dtype=torch.float64),
            torch.randn(size, generator=gen, dtype=torch.float64).exp(),
        )
        with torch.no_grad():
            for balancer in (ours, theirs):
                balancer.log_scale.copy_(scales)
        answers = []
        for balancer in (ours, theirs):
            losses = values.to(device=DEVICE, dtype=dtype).requires_grad_()
            balancer.zero_grad()
            total = balancer(losses)
            total.backward()
            answers.append((total.detach(), losses.grad, balancer.log_scale.grad.clone()))
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

    for mine, other in zip(run(IMTLL(3)), run(scalarization.IMTLL(3)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------- start, reset, state


def test_starts_at_zero_which_is_the_plain_sum():
    balancer = IMTLL(3).to(DEVICE)
    assert balancer.log_scale.tolist() == [0.0, 0.0, 0.0]
    assert balancer(torch.tensor([1.0, 2.5, -3.0], device=DEVICE)).item() == 0.5


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (0.5, [0.5, 0.5]),
        (-2, [-2.0, -2.0]),
        ([0.25, -1], [0.25, -1.0]),
        ((1.5, 2.5), [1.5, 2.5]),
        (torch.tensor([1.0, -3.0]), [1.0, -3.0]),
        (20.0, [20.0, 20.0]),
    ],
)
def test_init(init, expected):
    assert IMTLL(2, init=init).log_scale.tolist() == expected
    bound_later = IMTLL(init=init)
    bound_later.bind(2)
    assert bound_later.log_scale.tolist() == expected


def test_init_of_a_matrix_of_values():
    assert IMTLL((2, 2), init=[0.0, 1.0, 2.0, 3.0]).log_scale.tolist() == [[0.0, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize("init", [20.5, -21, [0.0, 25.0], math.nan, math.inf, [0.0, -math.inf]])
def test_init_out_of_range(init):
    with pytest.raises(ValueError, match=r"init: expected log-scales within \[-20, 20\], got"):
        IMTLL(2, init=init)


def test_init_is_held_to_the_bound_that_is_set():
    assert IMTLL(1, init=30.0, bound=40.0).log_scale.item() == 30.0
    with pytest.raises(ValueError, match=r"init: expected log-scales within \[-1\.5, 1\.5\], got 2\.0"):
        IMTLL(1, init=2.0, bound=1.5)


@pytest.mark.parametrize("init", ["x", True, [True, False], [[0.0], [1.0]], [None, 1.0], object()])
def test_init_that_is_no_number(init):
    with pytest.raises(TypeError, match="init: expected a number, one per task, or 'first_losses', got"):
        IMTLL(2, init=init)


def test_init_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"init: expected one number, or 3 for the shape \(3,\), got 2"):
        IMTLL(3, init=[0.0, 1.0])


def test_init_without_a_number():
    with pytest.raises(ValueError, match="init: expected"):
        IMTLL(init=[])


@pytest.mark.parametrize("shape", [0, -1, (2, 0)])
def test_shape_without_values(shape):
    with pytest.raises(ValueError, match="shape: expected sizes of at least 1, got"):
        IMTLL(shape)


@pytest.mark.parametrize("shape", [True, "ab", (2, 1.0), 2.0, (None,)])
def test_shape_that_is_none(shape):
    with pytest.raises(TypeError, match="shape: expected an int or a sequence of ints, got"):
        IMTLL(shape)


@pytest.mark.parametrize("bound", [0, -1.0, math.inf, math.nan])
def test_bound_out_of_range(bound):
    with pytest.raises(ValueError, match="bound: expected a positive finite number, got"):
        IMTLL(2, bound=bound)


@pytest.mark.parametrize("bound", ["20", None, True])
def test_a_bound_that_is_no_number(bound):
    with pytest.raises(TypeError, match="bound: expected a number, got"):
        IMTLL(2, bound=bound)


def test_the_log_scale_is_learned_and_the_options_are_not_saved():
    balancer = IMTLL(2, init=[0.5, -0.5])
    assert [name for name, _ in balancer.named_parameters()] == ["log_scale"]
    assert list(balancer.state_dict()) == ["log_scale"]
    assert repr(balancer) == "IMTLL(shape=(2,), bound=20)"


def _train(balancer: IMTLL, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        balancer(torch.tensor([0.1 + step, 5.0], device=DEVICE)).backward()
        optimizer.step()


@pytest.mark.parametrize("init", [None, 0.25, [0.5, -0.5]])
def test_reset_equals_a_fresh_one(init):
    balancer = IMTLL(2, init=init).to(DEVICE)
    parameter = balancer.log_scale
    _train(balancer, torch.optim.SGD(balancer.parameters(), lr=0.1), 3)
    fresh = IMTLL(2, init=init).to(DEVICE)
    assert not torch.equal(balancer.log_scale, fresh.log_scale)
    balancer.reset()
    assert balancer.log_scale is parameter  # the one that the optimizer holds
    assert torch.equal(balancer.log_scale, fresh.log_scale)


def test_reset_before_the_shape_is_known():
    balancer = IMTLL(init=0.25)
    balancer.reset()
    assert balancer.shape is None
    balancer.bind(2)
    assert torch.equal(balancer.log_scale, torch.full((2,), 0.25))


@pytest.mark.parametrize("make", [lambda: IMTLL(2, init=0.5), lambda: IMTLL(init=[0.5, 0.25])])
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
    assert torch.equal(twin.log_scale, balancer.log_scale)
    assert twin.log_scale is not balancer.log_scale
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(twin, twin_optimizer, 2)
    _train(balancer, optimizer, 2)
    assert torch.equal(twin.log_scale, balancer.log_scale)
    twin.reset()
    assert twin.log_scale.tolist() == make().log_scale.tolist()


# -------------------------------------------------------------------------------------------------------- the bound


def _steps(balancer: IMTLL, optimizer: torch.optim.Optimizer, count: int, *losses: float) -> None:
    values = torch.tensor(losses, device=DEVICE)
    for _ in range(count):
        optimizer.zero_grad()
        balancer(values).backward()
        optimizer.step()


def test_a_loss_of_zero_stays_finite_and_finds_its_way_back_with_adam():
    balancer = IMTLL(2).to(DEVICE)
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.05, foreach=False)
    _steps(balancer, optimizer, 3_000, 0.0, 2.0)
    stuck, other = balancer.log_scale.tolist()
    assert 20.0 <= stuck <= 21.0  # at the bound, and not far beyond
    assert other == pytest.approx(-math.log(2.0), abs=1e-3)
    assert balancer(torch.tensor([0.0, 2.0], device=DEVICE)).isfinite()
    # The first gradient after that, of e^20 / 2, stays in Adam's memory for long: the way back is slow, but taken.
    _steps(balancer, optimizer, 500, 0.5, 2.0)
    assert 0.0 < balancer.log_scale[0].item() < 14.0


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_loss_of_zero_that_comes_back_is_soon_balanced_again_within_a_small_bound(optimizer):
    balancer = IMTLL(2, bound=3.0).to(DEVICE)
    optimizer = optimizer(balancer.parameters(), lr=0.05)
    _steps(balancer, optimizer, 1000, 0.0, 2.0)
    assert 3.0 <= balancer.log_scale[0].item() <= 4.0
    _steps(balancer, optimizer, 500, 0.5, 2.0)
    assert balancer.log_scale[0].item() == pytest.approx(math.log(2.0), abs=0.05)


def test_neither_runs_away_nor_sticks_under_sgd():
    # At the bound (a loss was zero for long) the gradient is e^20 L: one step of SGD leads across the whole range. From
    # the other bound the way back is 1 per unit of step size: some 200 steps, unless it has left the range.
    balancer = IMTLL(2, init=[20.0, 0.0]).to(DEVICE)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
    _steps(balancer, optimizer, 800, 0.5, 2.0)
    assert balancer.log_scale[0].item() == pytest.approx(math.log(2.0), abs=0.05)


@pytest.mark.parametrize("bound", [20.0, 3.0])
def test_acts_within_the_bound(bound):
    balancer = balancer_at(doubles(bound + 5, -bound - 7, 0.5), bound=bound)
    losses = doubles(1e-3, 2.0, 3.0).requires_grad_()
    total = balancer(losses)
    expected = 1e-3 * math.exp(bound) - bound + 2 * math.exp(-bound) + bound + 3 * math.exp(0.5) - 0.5
    assert total.item() == pytest.approx(expected, rel=1e-12)
    total.backward()
    torch.testing.assert_close(losses.grad, doubles(math.exp(bound), math.exp(-bound), math.exp(0.5)), **EXACT)


def test_a_step_beyond_the_bound_is_taken_back_when_training_goes_on():
    balancer = balancer_at(doubles(1e6, -1e6, 0.5), bound=3.0)
    parameter = balancer.log_scale
    with torch.no_grad():  # watching changes nothing, and sees what training would
        seen = balancer(doubles(0.5, 2.0, 1.0))
    assert parameter.tolist() == [1e6, -1e6, 0.5]
    assert torch.equal(balancer(doubles(0.5, 2.0, 1.0)), seen)
    assert parameter.tolist() == [3.0, -3.0, 0.5]
    assert balancer.log_scale is parameter


def test_in_evaluation_nothing_is_put_back():
    balancer = balancer_at(doubles(1e6, -1e6), bound=3.0).eval()
    seen = balancer(doubles(0.5, 2.0))
    assert balancer.log_scale.tolist() == [1e6, -1e6]
    assert torch.equal(balancer.train()(doubles(0.5, 2.0)), seen)
    assert balancer.log_scale.tolist() == [3.0, -3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_teaches_nothing(bad):
    balancer = balancer_at(doubles(0.5, -0.25))
    twin = copy.deepcopy(balancer)
    total = balancer(doubles(bad, 3.0))
    assert not total.isfinite()  # it is not hidden
    total.backward()
    twin(doubles(1.0, 3.0)).backward()
    assert balancer.log_scale.grad[0] == 0
    assert balancer.log_scale.grad[1] == twin.log_scale.grad[1]


def test_two_totals_may_wait_for_their_backward():
    values = doubles(1e6, 0.25, -1e6)
    together, apart = balancer_at(values, bound=3.0), balancer_at(values, bound=3.0)
    first, second = together(doubles(1.0, 2.0, 0.5)), together(doubles(0.1, 5.0, 3.0))
    second.backward()
    first.backward()
    for losses in (doubles(1.0, 2.0, 0.5), doubles(0.1, 5.0, 3.0)):
        apart(losses).backward()
    torch.testing.assert_close(together.log_scale.grad, apart.log_scale.grad, **EXACT)


@pytest.mark.parametrize("beyond", [0.0, 1.0])
def test_beyond_the_bound_only_the_way_back_is_open(beyond):
    high, low = 3.0 + beyond, -3.0 - beyond
    # A descent step moves against the gradient e^s L - 1: up where it is negative.
    outward_up, inward_down = 0.0, 1.0  # at e^3 L - 1 = -1 and 19
    outward_down, inward_up = 100.0, 1.0  # at e^-3 L - 1 = 4 and -.95
    balancer = balancer_at(doubles(high, high, low, low), bound=3.0)
    balancer(doubles(outward_up, inward_down, outward_down, inward_up)).backward()
    expected = doubles(0.0, math.exp(3) - 1, 0.0, math.exp(-3) - 1)
    torch.testing.assert_close(balancer.log_scale.grad, expected, **EXACT)


def test_a_negative_loss_climbs_to_the_bound_and_no_further():
    balancer = balancer_at(torch.zeros(1), bound=4.0)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        total = balancer(doubles(-0.5))
        total.backward()
        optimizer.step()
    assert 4.0 <= balancer.log_scale.item() < 8.0
    assert total.item() == pytest.approx(-0.5 * math.exp(4) - 4, rel=1e-12)


def test_negative_values_follow_the_formula():
    balancer = balancer_at(doubles(0.5, -1.0))
    losses = doubles(-2.0, -0.25)
    assert balancer(losses).item() == pytest.approx(-2 * math.exp(0.5) - 0.5 - 0.25 * math.exp(-1) + 1, rel=1e-14)


def test_a_loss_that_is_not_finite_is_not_hidden():
    balancer = balancer_at(doubles(0.0, 0.0))
    assert balancer(doubles(math.nan, 1.0)).isnan()
    assert balancer(doubles(math.inf, 1.0)).isinf()


# ---------------------------------------------------------------------------------------------- types, shapes, tasks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses_are_scaled_in_float32(dtype):
    balancer = IMTLL(2, init=[12.0, -12.0]).to(DEVICE)  # e^12 = 162755 is beyond half precision's range
    losses = torch.tensor([0.5, 3.0], dtype=dtype, device=DEVICE)
    total = balancer(losses)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(0.5 * math.exp(12) + 3 * math.exp(-12), rel=1e-6)
    total.backward()
    assert balancer.log_scale.grad.tolist() == pytest.approx([0.5 * math.exp(12) - 1, 3 * math.exp(-12) - 1], rel=1e-6)


def test_half_precision_parameters_act_in_float32():
    balancer = IMTLL(2, init=[12.0, 0.0]).to(device=DEVICE, dtype=torch.bfloat16)
    total = balancer(torch.tensor([0.5, 3.0], dtype=torch.bfloat16, device=DEVICE))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(0.5 * math.exp(12) - 12 + 3, rel=1e-6)
    total.backward()
    assert balancer.log_scale.grad.dtype == torch.bfloat16


def test_double_losses_are_scaled_in_double():
    total = IMTLL(1).to(DEVICE)(doubles(1 + 1e-12))
    assert total.dtype == torch.float64
    assert total.item() == 1 + 1e-12


def test_the_losses_may_be_on_another_device_than_the_log_scales():
    balancer = IMTLL(2)
    balancer(torch.tensor([1.0, 3.0], device=DEVICE)).backward()
    assert balancer.log_scale.grad.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_values_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"IMTLL: expected values of shape \(3,\), got \("):
        IMTLL(3)(torch.ones(shape))


@pytest.mark.parametrize(
    ("values", "kind"), [([1.0, 2.0], "list"), (torch.tensor([1, 2]), "torch.int64"), (1.0, "float")]
)
def test_values_of_another_type(values, kind):
    with pytest.raises(TypeError, match=f"IMTLL: expected a floating-point tensor of values, got {kind}"):
        IMTLL(2)(values)


def test_without_a_shape_it_says_what_to_do():
    with pytest.raises(ValueError, match=r"IMTLL does not know the number of tasks.*bind\(num_tasks\)"):
        IMTLL()(torch.ones(2))


def test_bind():
    balancer = IMTLL()
    assert balancer.log_scale is None
    balancer.bind(3)
    assert balancer.log_scale.tolist() == [0.0, 0.0, 0.0]
    parameter = balancer.log_scale
    balancer.bind(3)
    assert balancer.log_scale is parameter
    with pytest.raises(TypeError, match=r"num_tasks: expected an int, got 3\.0"):
        balancer.bind(3.0)
    for made in (balancer, IMTLL(3), IMTLL(init=[0.0, 1.0, 2.0])):
        with pytest.raises(ValueError, match=r"IMTLL was made for values of shape \(3,\), but the model has 2 heads"):
            made.bind(2)
    with pytest.raises(ValueError, match=r"IMTLL was made for values of shape \(2, 2\), but the model has 4 heads"):
        IMTLL((2, 2)).bind(4)


def test_a_subset_of_the_tasks():
    balancer = balancer_at(doubles(0.5, -1.0, 0.25, 2.0))
    losses = doubles(3.0, 0.5).requires_grad_()
    total = balancer.scalarize(losses, [3, 0])
    assert total.item() == pytest.approx(3 * math.exp(2) - 2 + 0.5 * math.exp(0.5) - 0.5, rel=1e-14)
    total.backward()
    torch.testing.assert_close(losses.grad, doubles(math.exp(2), math.exp(0.5)), **EXACT)
    gradient = balancer.log_scale.grad
    assert gradient[1] == 0
    assert gradient[2] == 0
    torch.testing.assert_close(gradient[[0, 3]], doubles(0.5 * math.exp(0.5) - 1, 3 * math.exp(2) - 1), **EXACT)


def test_a_subset_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"IMTLL: expected values of shape \(2,\), got \(3,\)"):
        IMTLL(3).scalarize(torch.ones(3), [0, 2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(0, 1e8)), min_size=1, max_size=5))
def test_finite_and_pointed_inward_for_any_scale_and_loss(pairs):
    scales, losses = (doubles(*column) for column in zip(*pairs, strict=True))
    balancer = balancer_at(scales)
    balancer(losses).backward()
    gradient = balancer.log_scale.grad
    assert gradient.isfinite().all()
    assert (gradient[scales >= 20] >= 0).all()
    assert (gradient[scales <= -20] <= 0).all()
    inside = scales.abs() < 20
    torch.testing.assert_close(gradient[inside], (scales.exp() * losses - 1)[inside], rtol=1e-12, atol=1e-12)
