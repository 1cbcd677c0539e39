"""Compose: the loss balancer's factors on the gradients, the gradient balancer's weights on those."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from mtlwrap import IMTLG, IMTLL, UW, Compose, EqualWeighting, FixedWeights, TaskGradients
from mtlwrap.balancers import GradientBalancer
from tests.balancers import zoo
from tests.common import DEVICE


class Largest(GradientBalancer):
    """A shared gradient that is no weighting: of each column, the entry of largest magnitude."""

    def weigh(self, gradients: TaskGradients) -> None:
        return None

    def combine(self, gradients: TaskGradients) -> Tensor:
        matrix = gradients.matrix
        return matrix.gather(0, matrix.abs().argmax(dim=0, keepdim=True))[0]


class Shy(GradientBalancer):
    """It promises a combination, and has none."""

    def weigh(self, gradients: TaskGradients) -> None:
        return None


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def test_hybrid_equals_the_closed_form():
    # Algorithm 1 of IMTL: g_t = e^{s_t} grad L_t, weighed by the paper's formula for these.
    compared = 0
    for seed in range(20):
        gen = zoo.generator(seed)
        tasks = 2 + seed % 4
        matrix = zoo.log_normal(zoo.one_factor(tasks, 30, gen), gen)
        scales = zoo.normal(tasks, gen=gen)
        scaled = scales.exp()[:, None] * matrix
        if zoo.cancellation(scaled) < 0.11:
            continue
        compared += 1
        losses = zoo.uniform(tasks, gen=gen, low=0.1, high=5.0).to(DEVICE)
        balancer = Compose(IMTLL(init=scales.tolist()), IMTLG()).to(device=DEVICE, dtype=torch.float64)
        with torch.no_grad():
            balancer.loss.log_scale.copy_(scales)
        actual = balancer(losses, matrix.to(DEVICE)).cpu()
        torch.testing.assert_close(actual, zoo.paper_weights(scaled) @ scaled, rtol=1e-8, atol=1e-10)
    assert compared >= 15


def test_the_loss_scales_do_not_turn_the_impartial_direction():
    matrix = zoo.with_ratio(3, 40, 10.0, zoo.generator(0)).to(DEVICE)
    plain = IMTLG()(matrix)
    balancer = Compose(IMTLL(init=[2.0, -1.0, 0.5]), IMTLG()).to(device=DEVICE, dtype=torch.float64)
    hybrid = balancer(doubles(1.0, 2.0, 3.0), matrix)
    assert torch.cosine_similarity(plain, hybrid, dim=0).item() == pytest.approx(1.0, abs=1e-12)


def test_uw_and_imtl_g():
    # Regression: e^-s / 2, classification: e^-s. Orthogonal rows: alpha is the inverse norm, normalised.
    balancer = Compose(UW(likelihood=["regression", "classification"]), IMTLG()).to(DEVICE)
    with torch.no_grad():
        balancer.loss.log_variance.copy_(torch.tensor([0.0, -math.log(3.0)]))
    matrix = torch.tensor([[2.0, 0.0], [0.0, 1.0]], device=DEVICE)  # scaled: norms 1 and 3, weights 3/4 and 1/4
    result = balancer(torch.tensor([5.0, 0.5], device=DEVICE), matrix)
    torch.testing.assert_close(result, torch.tensor([0.75, 0.75], device=DEVICE))


def test_a_part_alone():
    gen = zoo.generator(1)
    losses, matrix = zoo.uniform(3, gen=gen).to(DEVICE), zoo.normal(3, 7, gen=gen).to(DEVICE)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(Compose()(losses, matrix), matrix.sum(dim=0), **exact)
    torch.testing.assert_close(Compose(gradient=IMTLG())(losses, matrix), IMTLG()(matrix), **exact)
    fixed = Compose(loss=FixedWeights([0.5, 2.0, 4.0])).to(DEVICE)
    torch.testing.assert_close(fixed(losses, matrix), doubles(0.5, 2.0, 4.0) @ matrix, **exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_of_the_gradients_type(dtype):
    matrix = zoo.normal(2, 5, gen=zoo.generator(2)).to(device=DEVICE, dtype=dtype)
    result = Compose(IMTLL(2), IMTLG()).to(DEVICE)(torch.ones(2, device=DEVICE), matrix)
    assert result.shape == (5,)
    assert result.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["x, 3x, y", "parallel 1, 2", "rank 2 of 4", "sum v is negative"])
def test_a_gradient_balancer_alone_and_composed_with_nothing_agree(name, dtype):
    # Also where the answer hangs on the precision in which the gradients came.
    matrix = zoo.AWKWARD[name]().to(device=DEVICE, dtype=dtype)
    composed = Compose(gradient=IMTLG())(torch.ones(len(matrix), device=DEVICE), matrix)
    torch.testing.assert_close(composed, IMTLG()(matrix))


def test_half_precision_losses_do_not_take_the_factors_out_of_range():
    # e^12 is beyond half precision's range, and a factor of e^12 on both tasks changes nothing but the step's size.
    matrix = torch.tensor([[1.0, 0.0], [0.0, 3.0]], device=DEVICE)
    losses = torch.tensor([0.5, 0.25], dtype=torch.float16, device=DEVICE)
    result = Compose(IMTLL(2, init=12.0), IMTLG()).to(DEVICE)(losses, matrix)
    torch.testing.assert_close(result, 0.75 * math.exp(12) * torch.ones(2, device=DEVICE), rtol=1e-4, atol=0)


def test_a_combination_that_is_no_weighting():
    matrix = torch.tensor([[1.0, -5.0, 2.0], [-3.0, 4.0, 2.5]], device=DEVICE)
    losses = torch.ones(2, device=DEVICE)
    assert Largest()(matrix).tolist() == [-3.0, -5.0, 2.5]
    assert Compose(gradient=Largest())(losses, matrix).tolist() == [-3.0, -5.0, 2.5]
    assert Compose(FixedWeights([4.0, 1.0]), Largest()).to(DEVICE)(losses, matrix).tolist() == [4.0, -20.0, 8.0]
    composed = Compose(gradient=Largest())
    gradients = TaskGradients(matrix)
    assert composed.weigh(gradients) is None
    assert composed.combine(gradients).tolist() == [-3.0, -5.0, 2.5]
    with pytest.raises(TypeError, match=r"Shy\.weigh returned None, so the class must override combine"):
        Compose(gradient=Shy())(losses, matrix)


def test_the_halves():
    balancer = Compose(IMTLL(init=[math.log(2.0), 0.0, math.log(3.0)]), IMTLG())
    balancer.bind(3)
    balancer.to(DEVICE)
    losses = torch.tensor([1.0, 5.0, 2.0], device=DEVICE)
    assert balancer.scalarize(losses).item() == pytest.approx(13.0 - math.log(6.0), rel=1e-6)
    assert balancer.scalarize(losses[[2, 0]], [2, 0]).item() == pytest.approx(8.0 - math.log(6.0), rel=1e-6)
    gradients = TaskGradients(torch.eye(3, device=DEVICE) * torch.tensor([[1.0], [2.0], [4.0]], device=DEVICE))
    expected = [4 / 7, 2 / 7, 1 / 7]
    assert balancer.weigh(gradients).tolist() == pytest.approx(expected, rel=1e-9)
    assert balancer.combine(gradients).tolist() == pytest.approx([4 / 7] * 3, rel=1e-5)
    equal = Compose(IMTLL(3))
    assert equal.weigh(gradients).tolist() == [1.0, 1.0, 1.0]
    assert equal.combine(gradients).tolist() == [1.0, 2.0, 4.0]
    half = TaskGradients.from_parts([[torch.ones(2), None, torch.ones(2)]], [True, False, True])
    assert equal.weigh(half).tolist() == [1.0, 0.0, 1.0]


def test_the_inputs_are_left_alone():
    balancer = Compose(IMTLL(2), IMTLG()).to(DEVICE)
    losses = torch.tensor([1.0, 2.0], device=DEVICE, requires_grad=True)
    matrix = zoo.normal(2, 4, gen=zoo.generator(0)).to(DEVICE)
    before = matrix.clone()
    with torch.no_grad():
        result = balancer(losses, matrix)
    assert result.isfinite().all()
    assert losses.grad is None
    assert balancer.loss.log_scale.grad is None
    assert torch.equal(matrix, before)


def test_a_part_of_the_wrong_kind():
    with pytest.raises(TypeError, match="loss: expected a LossBalancer or None, got IMTLG"):
        Compose(loss=IMTLG())
    with pytest.raises(TypeError, match="gradient: expected a GradientBalancer or None, got IMTLL"):
        Compose(gradient=IMTLL(2))
    with pytest.raises(TypeError, match="loss: expected a LossBalancer or None, got str"):
        Compose("uw")
    with pytest.raises(TypeError, match="gradient: expected a GradientBalancer or None, got EqualWeighting"):
        Compose(gradient=EqualWeighting())
    with pytest.raises(TypeError, match="loss: expected a LossBalancer or None, got Compose"):
        Compose(Compose())


def test_parts_for_different_numbers_of_tasks():
    gradient = IMTLG()
    gradient.bind(3)
    with pytest.raises(ValueError, match=r"loss was made for 2 tasks, gradient for 3; expected the same number"):
        Compose(IMTLL(2), gradient)
    assert Compose(IMTLL(3), gradient).num_tasks == 3


def test_bind():
    balancer = Compose(IMTLL(), IMTLG())
    assert balancer.num_tasks is None
    balancer.bind(3)
    assert (balancer.num_tasks, balancer.loss.num_tasks, balancer.gradient.num_tasks) == (3, 3, 3)
    assert balancer.loss.log_scale.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="Compose was made for 3 tasks, but the model has 2 heads"):
        balancer.bind(2)
    with pytest.raises(ValueError, match="Compose was made for 2 tasks, but the model has 4 heads"):
        Compose(FixedWeights([1.0, 2.0])).bind(4)


def test_losses_and_gradients_of_the_wrong_kind():
    balancer = Compose(IMTLL(2), IMTLG())
    with pytest.raises(ValueError, match=r"Compose was made for 2 tasks, got a matrix of 3 rows"):
        balancer(torch.ones(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"losses: expected the shape \[2\], got \(3,\)"):
        balancer(torch.ones(3), torch.eye(2))
    with pytest.raises(ValueError, match=r"UW: expected values of shape \(2, 1\), got \(2,\)"):
        Compose(UW((2, 1)))(torch.ones(2), torch.eye(2))
    with pytest.raises(TypeError, match="matrix: expected a floating-point tensor"):
        balancer(torch.ones(2), torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"losses: expected the shape \[3\], got \(1,\)"):
        Compose(gradient=IMTLG())(torch.ones(1), torch.eye(3))


def test_more_gradients_than_losses():
    with pytest.raises(ValueError, match=r"expected .* \[?[23]"):
        Compose(IMTLL(2), IMTLG())(torch.ones(2), torch.eye(3))


def test_losses_that_are_not_floating_point():
    with pytest.raises(TypeError, match=r"IMTLL: expected a floating-point tensor of values, got torch\.int64"):
        Compose(IMTLL(2), IMTLG())(torch.ones(2, dtype=torch.int64), torch.eye(2))


def test_state_reset_and_copies():
    balancer = Compose(IMTLL(2, init=[0.5, -0.5]), IMTLG(nonneg=True)).to(DEVICE)
    assert list(balancer.state_dict()) == ["loss.log_scale"]
    with torch.no_grad():
        balancer.loss.log_scale.add_(1.0)
    losses, matrix = torch.ones(2, device=DEVICE), zoo.normal(2, 6, gen=zoo.generator(4)).to(DEVICE)
    fresh = Compose(IMTLL(2), IMTLG(nonneg=True)).to(DEVICE)
    fresh.load_state_dict(balancer.state_dict())
    for twin in (fresh, copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert torch.equal(twin(losses, matrix), balancer(losses, matrix))
        assert torch.equal(twin.scalarize(losses), balancer.scalarize(losses))
    balancer.reset()
    assert balancer.loss.log_scale.tolist() == [0.5, -0.5]
