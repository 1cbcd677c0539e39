"""IMTL-G against the paper's closed form, hand-worked values, exhaustive search and its own promises."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd import aggregation as torchjd_aggregation

from mtlwrap import IMTLG, TaskGradients
from tests.balancers import zoo
from tests.common import DEVICE

MODES = {"default": {}, "nonneg": {"nonneg": True}, "strict": {"strict": True}}
SAFE = ["default", "nonneg"]


def weights_of(matrix: Tensor, dtype: torch.dtype = torch.float64, **options: bool) -> Tensor:
    return IMTLG(**options).weigh(TaskGradients(matrix.to(device=DEVICE, dtype=dtype))).cpu()


def gradient_of(matrix: Tensor, dtype: torch.dtype = torch.float64, **options: bool) -> Tensor:
    return IMTLG(**options)(matrix.to(device=DEVICE, dtype=dtype)).cpu().double()


def rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """What the balancer is given in that precision, in float64."""
    return matrix.to(dtype).double()


# ------------------------------------------------------------------------------------------------------- impartial


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("tasks", [2, 3, 8, 16])
def test_impartial_to_1e5_in_float32_whatever_the_norms(mode, tasks, ratio):
    worst = 0.0
    for seed in range(10):
        matrix = zoo.with_ratio(tasks, 1000, ratio, zoo.generator(seed)).float()
        combined = gradient_of(matrix, torch.float32, **MODES[mode])
        along = zoo.projections(combined, matrix)
        assert (along > 0).all()
        worst = max(worst, zoo.spread(along))
    assert worst <= 1e-5


@pytest.mark.parametrize("ratio", [1.0, 1e6, 1e12])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_impartial_to_rounding_in_float64(tasks, ratio):
    for seed in range(5):
        matrix = zoo.with_ratio(tasks, 200, ratio, zoo.generator(seed))
        assert zoo.spread(zoo.projections(gradient_of(matrix), matrix)) <= 1e-11


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision(mode, dtype, tolerance):
    # The weights are better than that; the shared gradient is rounded to half precision, which the projections show.
    for seed in range(5):
        matrix = zoo.with_ratio(3, 300, 100.0, zoo.generator(seed)).to(dtype)
        result = IMTLG(**MODES[mode])(matrix.to(DEVICE))
        assert result.dtype == dtype
        assert zoo.spread(zoo.projections(result, matrix)) <= tolerance
        exact = weights_of(matrix, dtype, **MODES[mode]) @ matrix.double()
        # In the convex hull they are regularised by what rounding does to the gradients.
        assert zoo.spread(zoo.projections(exact, matrix)) <= (torch.finfo(dtype).eps if mode == "nonneg" else 1e-5)


# -------------------------------------------------------------------------------------------- the paper's weights


@pytest.mark.parametrize("mode", MODES)
def test_two_tasks_closed_form(mode):
    # alpha = (n2, n1) / (n1 + n2), whatever the angle.
    for angle in (0.01, 0.5, 1.5, math.pi / 2, 2.5, 3.1):
        for norms in ((1.0, 1.0), (2.0, 3.0), (1e-3, 40.0)):
            matrix = torch.tensor(
                [[norms[0], 0.0], [norms[1] * math.cos(angle), norms[1] * math.sin(angle)]], dtype=torch.float64
            )
            expected = torch.tensor([norms[1], norms[0]], dtype=torch.float64) / sum(norms)
            torch.testing.assert_close(weights_of(matrix, **MODES[mode]), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("cosine", [-0.2, 0.0, 0.3, 0.95])
@pytest.mark.parametrize("mode", MODES)
def test_equal_angles_weigh_by_the_inverse_norm(mode, cosine):
    # The paper's Theorem 1.
    tasks = 5
    cosines = torch.full((tasks, tasks), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    norms = torch.tensor([0.1, 2.0, 0.7, 30.0, 1.0], dtype=torch.float64)
    expected = 1 / norms / (1 / norms).sum()
    actual = weights_of(zoo.from_cosines(cosines, norms), **MODES[mode])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)


def _draws(count: int = 60):
    for seed in range(count):
        gen = zoo.generator(seed)
        tasks = 2 + seed % 6
        rows = (
            zoo.normal(tasks, tasks + seed % 4, gen=gen),
            zoo.one_factor(tasks, 40, gen),
            zoo.units(zoo.normal(tasks, 30, gen=gen)),
        )[seed % 3]
        yield zoo.log_normal(rows, gen)


def test_equals_the_papers_closed_form_unless_its_weights_cancel():
    compared = 0
    for matrix in _draws():
        if zoo.cancellation(matrix) < 0.1001 or torch.linalg.cond(zoo.units(matrix)) > 30:
            continue
        compared += 1
        torch.testing.assert_close(weights_of(matrix), zoo.paper_weights(matrix), rtol=1e-8, atol=1e-10)
    assert compared >= 35


def _cancelling():
    """Gradients for which the paper's weights cancel by more than 90 %, with a sound direction all the same."""
    for matrix in [zoo.demand(0.4), zoo.demand(0.495), zoo.demand(0.505), zoo.near_coplanar(0.5)]:
        yield matrix
    for seed in range(300):
        gen = zoo.generator(seed)
        tasks = 3 + seed % 4
        matrix = zoo.log_normal(zoo.normal(tasks, tasks, gen=gen), gen, sigma=2.0)
        if torch.linalg.cond(zoo.units(matrix)) < 30 and zoo.cancellation(matrix) < 0.0999:
            yield matrix


def test_strict_is_the_papers_closed_form_ascent_included():
    compared = negative = 0
    for matrix in [*_draws(), *_cancelling()]:
        if torch.linalg.cond(zoo.units(matrix)) > 1000 or abs(zoo.cancellation(matrix)) < 1e-3:
            continue
        compared += 1
        negative += zoo.cancellation(matrix) < 0
        torch.testing.assert_close(weights_of(matrix, strict=True), zoo.paper_weights(matrix), rtol=1e-7, atol=1e-9)
    assert compared >= 40
    assert negative >= 20


def test_where_the_papers_weights_cancel_the_direction_is_the_same_and_downhill():
    compared = 0
    for matrix in _cancelling():
        share = zoo.cancellation(matrix)
        compared += 1
        paper = zoo.paper_weights(matrix)
        actual = weights_of(matrix)
        # The same weights up to their scale, whose sign is the one that goes down; |alpha| sums to 10, not more.
        torch.testing.assert_close(actual, math.copysign(10.0, share) * paper / paper.abs().sum(), rtol=1e-6, atol=1e-8)
        assert (zoo.projections(actual @ matrix, matrix) > 0).all()
    assert compared >= 15


def test_equals_torchjd_on_well_conditioned_gradients():
    compared = 0
    for seed in range(40):
        gen = zoo.generator(seed)
        matrix = zoo.one_factor(2 + seed % 5, 60, gen) * zoo.uniform(2 + seed % 5, 1, gen=gen, low=0.2, high=5.0)
        if zoo.cancellation(matrix) < 0.11:
            continue
        compared += 1
        expected = torchjd_aggregation.IMTLG()(matrix.to(DEVICE)).cpu()
        torch.testing.assert_close(gradient_of(matrix), expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(gradient_of(matrix, strict=True), expected, rtol=1e-8, atol=1e-10)
    assert compared >= 30


@pytest.mark.parametrize("mode", MODES)
def test_weights_sum_to_one_where_none_is_negative(mode):
    for seed in range(20):
        matrix = zoo.with_ratio(2 + seed % 7, 100, 50.0, zoo.generator(seed))
        weights = weights_of(matrix, torch.float32, **MODES[mode])
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_hand_worked():
    # Cosines (.8, .8, .4): C w = 1 has w = (5/3, -5/3, 5/3). Norms (1, .4, 1): v = (5/3, -25/6, 5/3), sum v = -5/6,
    # sum |v| = 7.5. The paper: alpha = (-2, 5, -2), projection 1 / sum v = -1.2 on every task: uphill.
    matrix = zoo.demand(0.4)
    exact = {"rtol": 1e-7, "atol": 0}
    torch.testing.assert_close(weights_of(matrix, strict=True), torch.tensor([-2.0, 5.0, -2.0]).double(), **exact)
    along = zoo.projections(gradient_of(matrix, strict=True), matrix)
    torch.testing.assert_close(along, torch.full((3,), -1.2, dtype=torch.float64), **exact)
    # Here: v / .75 = (20/9, -50/9, 20/9), projection 1 / .75.
    torch.testing.assert_close(weights_of(matrix), torch.tensor([20.0, -50.0, 20.0]).double() / 9, **exact)
    along = zoo.projections(gradient_of(matrix), matrix)
    torch.testing.assert_close(along, torch.full((3,), 4 / 3, dtype=torch.float64), **exact)
    # In the convex hull the middle one, which the other two carry along, gets nothing.
    torch.testing.assert_close(
        weights_of(matrix, nonneg=True), torch.tensor([0.5, 0.0, 0.5]).double(), rtol=0, atol=1e-9
    )
    along = zoo.projections(gradient_of(matrix, nonneg=True), matrix)
    torch.testing.assert_close(along, torch.tensor([0.7, 0.8, 0.7]).double(), **exact)


def test_a_negative_weight_is_kept_where_the_weights_do_not_cancel():
    # Cosines (.8, .8, .4) with equal norms: w = (5/3, -5/3, 5/3) sums to 5/3, alpha = (1, -1, 1), projection .6.
    matrix = zoo.demand(1.0)
    torch.testing.assert_close(weights_of(matrix), torch.tensor([1.0, -1.0, 1.0]).double(), rtol=1e-9, atol=0)
    along = zoo.projections(gradient_of(matrix), matrix)
    torch.testing.assert_close(along, torch.full((3,), 0.6, dtype=torch.float64), rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------------ equivariance


@pytest.mark.parametrize("mode", MODES)
def test_permutation_of_the_tasks(mode):
    for seed in range(20):
        gen = zoo.generator(seed)
        tasks = 2 + seed % 7
        matrix = zoo.log_normal(zoo.one_factor(tasks, 30, gen), gen)
        order = torch.randperm(tasks, generator=gen)
        before, after = weights_of(matrix, **MODES[mode]), weights_of(matrix[order], **MODES[mode])
        torch.testing.assert_close(after, before[order], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("factor", [1e-10, 1e-3, 7.0, 1e15])
@pytest.mark.parametrize("mode", MODES)
def test_weights_do_not_depend_on_a_common_scale(mode, factor):
    for seed in range(10):
        gen = zoo.generator(seed)
        matrix = zoo.log_normal(zoo.one_factor(2 + seed % 5, 30, gen), gen)
        before = weights_of(matrix, **MODES[mode])
        torch.testing.assert_close(weights_of(factor * matrix, **MODES[mode]), before, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("factor", [1e-4, 0.5, 3.0, 1e4])
@pytest.mark.parametrize("mode", SAFE)
def test_direction_does_not_depend_on_the_scale_of_one_loss_nor_does_its_sign(mode, factor):
    for seed in range(15):
        gen = zoo.generator(seed)
        tasks = 2 + seed % 5
        matrix = zoo.log_normal(zoo.normal(tasks, tasks + seed % 3, gen=gen), gen)
        scaled = matrix.clone()
        scaled[seed % tasks] *= factor
        directions = [zoo.units(gradient_of(m, **MODES[mode])[None])[0] for m in (matrix, scaled)]
        if any(direction.isnan().any() for direction in directions):  # no direction, in either case
            assert all(direction.isnan().any() for direction in directions)
            continue
        # A common direction loses digits where it hardly projects on the gradients.
        atol = 1e-9 if mode == "default" else 1e-6
        torch.testing.assert_close(directions[1], directions[0], rtol=0, atol=atol)


def test_rescaling_one_loss_flips_the_papers_direction_but_not_ours():
    before, after = zoo.demand(1.0), zoo.demand(0.4)  # only the second norm differs
    strict = [gradient_of(m, strict=True) for m in (before, after)]
    ours = [gradient_of(m) for m in (before, after)]
    assert torch.cosine_similarity(*strict, dim=0).item() == pytest.approx(-1.0, abs=1e-9)
    assert torch.cosine_similarity(*ours, dim=0).item() == pytest.approx(1.0, abs=1e-9)


# -------------------------------------------------------------------------------------------------- never uphill


def _hard(kind: str, seed: int) -> Tensor:
    gen = zoo.generator(seed)
    if kind.startswith("gauss"):
        tasks = int(kind.removeprefix("gauss"))
        rows = zoo.normal(tasks, tasks, gen=gen)
    else:
        rows = zoo.one_factor(10, 64, gen)
    return zoo.log_normal(rows, gen, sigma=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["gauss3", "gauss5", "gauss10", "one-factor"])
def test_never_uphill_and_bounded_on_random_gradients(kind, dtype):
    uphill_in_the_paper = no_direction = 0
    for seed in range(150):
        matrix = rounded(_hard(kind, seed), dtype)
        uphill_in_the_paper += zoo.cancellation(matrix) < 0
        weights = weights_of(matrix, dtype)
        assert weights.abs().sum() <= 10 * (1 + 1e-12)
        along = zoo.projections(weights @ matrix, matrix)
        if (weights == 0).all():
            no_direction += 1
            continue
        assert (along > 0).all()
        assert zoo.spread(along) <= 2e-3  # the residual up to which a direction counts as impartial
    assert uphill_in_the_paper > 0  # else the draws say nothing
    assert no_direction <= 3


@pytest.mark.parametrize("mode", SAFE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("third", [1.0, 0.8, 0.72, 0.708, 0.7071, math.sqrt(0.5), 0.70, 0.5, 0.1])
def test_never_uphill_on_the_sweep_of_near_coplanar_gradients(third, dtype, mode):
    matrix = rounded(zoo.near_coplanar(third), dtype)
    weights = weights_of(matrix, dtype, **MODES[mode])
    assert weights.abs().sum() <= 10 * (1 + 1e-12)
    along = zoo.projections(gradient_of(matrix, dtype, **MODES[mode]), matrix)
    assert (along > 0).all()
    if mode == "default":
        assert zoo.spread(along) <= 1e-3


@pytest.mark.parametrize("second", [1.0, 0.4, 0.495, 0.5, 0.505])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", SAFE)
def test_never_uphill_where_sum_v_is_negative_or_nearly_zero(second, dtype, mode):
    matrix = rounded(zoo.demand(second), dtype)
    assert (zoo.projections(gradient_of(matrix, dtype, **MODES[mode]), matrix) > 0.5).all()
    assert weights_of(matrix, dtype, **MODES[mode]).abs().sum() <= 10 * (1 + 1e-12)


# ------------------------------------------------------------------------------------------------- degenerate inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", SAFE)
@pytest.mark.parametrize("name", zoo.AWKWARD)
def test_finite_and_never_uphill_on_awkward_gradients(name, mode, dtype):
    given_ = zoo.AWKWARD[name]()
    matrix = rounded(given_, dtype)
    result = IMTLG(**MODES[mode])(given_.to(device=DEVICE, dtype=dtype))
    weights = weights_of(given_, dtype, **MODES[mode])
    assert result.shape == given_.shape[1:]
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert weights.isfinite().all()
    assert weights.abs().sum() <= 10 * (1 + 1e-12)
    assert (weights[matrix.norm(dim=1) == 0] == 0).all()
    some = matrix[matrix.norm(dim=1) > 0]
    if len(some):
        exact = weights @ matrix
        rounding = torch.finfo(dtype).eps * (weights.abs() * matrix.norm(dim=1)).sum()
        # Beyond rounding, only what regularisation leaves over where the answer is zero.
        left = 1e-4 if dtype == torch.bfloat16 else 1e-6 if dtype == torch.float32 else 1e-12
        tolerance = rounding + 2 * left * (weights.abs() * matrix.norm(dim=1)).sum()
        assert (zoo.projections(exact, some) >= -tolerance).all()


@pytest.mark.parametrize("mode", MODES)
def test_one_task_keeps_its_gradient(mode):
    matrix = torch.tensor([[3.0, -4.0, 1.0]])
    torch.testing.assert_close(gradient_of(matrix, torch.float32, **MODES[mode]), matrix[0].double(), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parallel_gradients_share_one_weight(mode, dtype):
    # x, 3x and y: in unit gradients, one half for x and 3x together, one half for y. The last time they are rounded,
    # and no longer quite parallel.
    for rows in (
        [[3.0, 4.0, 0.0], [9.0, 12.0, 0.0], [0.0, 0.0, 2.0]],
        [[3.0, 4.0, 0.0], [9.0, 12.0, 0.0], [0.0, 6.0, 8.0]],
        [[0.1, 0.7, 0.0], [0.3, 2.1, 0.0], [0.0, 0.0, 0.3]],
    ):
        matrix = rounded(torch.tensor(rows, dtype=torch.float64), dtype)
        weights = weights_of(matrix, dtype, **MODES[mode])
        shares = weights * matrix.norm(dim=1)
        shares = shares / shares.sum()
        assert (shares > 0.2).all()
        assert shares[2].item() == pytest.approx(0.5, rel=1e-6)
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("mode", SAFE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_step_along_parallel_gradients_does_not_hang_on_their_rounding(mode, dtype):
    # x, 3.3 x and y at an angle of about 60 degrees. x and 3.3 x have one weight between them, and as the weights are
    # normalised, the step's length depends on how they share it: between x alone and 3.3 x alone it varies twofold.
    for seed in range(20):
        gen = zoo.generator(seed)
        common, first, second = zoo.normal(3, 100, gen=gen)
        matrix = torch.stack([common + first, 3.3 * (common + first), common + second])
        expected = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64) / matrix.norm(dim=1)
        expected = expected / expected.sum() @ matrix
        actual = weights_of(matrix, dtype, **MODES[mode]) @ rounded(matrix, dtype)
        assert (actual.norm() / expected.norm()).item() == pytest.approx(1.0, abs=0.1), f"seed {seed}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_and_parallel_gradients_share_about_equally(mode, dtype):
    rows = torch.tensor([[1.0, -2.0, 0.5], [2.0, -4.0, 1.0]], dtype=torch.float64)  # exact in every precision
    weights = weights_of(rows, dtype, **MODES[mode])
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0]).double() / 3, rtol=1e-2, atol=0)
    weights = weights_of(rows[[0, 0, 0]], dtype, **MODES[mode])
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["opposed 1, 1", "opposed 1, 2"])
@pytest.mark.parametrize("mode", SAFE)
def test_opposed_gradients_give_no_shared_gradient(mode, name, dtype):
    matrix = zoo.AWKWARD[name]()
    result = gradient_of(matrix, dtype, **MODES[mode])
    # In the convex hull the weights are (2/3, 1/3), whose sum is zero up to rounding.
    atol = 0.0 if mode == "default" else torch.finfo(dtype).eps
    torch.testing.assert_close(result, torch.zeros(3, dtype=torch.float64), rtol=0, atol=atol)


def test_strict_has_weights_also_where_no_direction_is_impartial():
    # Two tasks' closed form does not depend on the angle; any weights of the paper sum to 1.
    weights = weights_of(zoo.AWKWARD["opposed 1, 2"](), torch.float32, strict=True)
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0]).double() / 3, rtol=1e-6, atol=0)
    for name in ("more tasks than dimensions", "rank 2 of 4"):
        weights = weights_of(zoo.AWKWARD[name](), torch.float32, strict=True)
        assert (weights != 0).all()
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-9)


def test_opposed_gradients_in_the_convex_hull():
    weights = weights_of(zoo.AWKWARD["opposed 1, 2"](), nonneg=True)
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0]).double() / 3, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["more tasks than dimensions", "d = 1", "rank 2 of 4", "rank 1 of 3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_an_impartial_direction_nothing_moves(name, dtype):
    matrix = zoo.AWKWARD[name]()
    # Independent of the balancer: no vector has the same projection, 1, on all of them.
    closest = torch.linalg.pinv(zoo.units(matrix)) @ torch.ones(len(matrix), dtype=torch.float64)
    assert (zoo.units(matrix) @ closest - 1).abs().max() > 0.05
    if dtype == torch.bfloat16 and name == "rank 2 of 4":
        pytest.skip("rounding gives the rows a rank of 4")
    assert (weights_of(matrix, dtype) == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_tasks_of_one_sign_in_one_dimension_are_parallel(mode):
    weights = weights_of(zoo.AWKWARD["d = 1, same sign"](), torch.float32, **MODES[mode])
    torch.testing.assert_close(weights, torch.tensor([4.0, 2.0, 1.0]).double() / 7, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_zero_gradient_gets_no_weight_and_does_not_disturb_the_others(mode, dtype):
    matrix = rounded(zoo.AWKWARD["one of three zero"](), dtype)
    weights = weights_of(matrix, dtype, **MODES[mode])
    assert weights[1] == 0
    torch.testing.assert_close(weights[[0, 2]], weights_of(matrix[[0, 2]], dtype, **MODES[mode]), rtol=1e-12, atol=0)
    torch.testing.assert_close(weights[[0, 2]], zoo.paper_weights(matrix[[0, 2]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_zero_gradients_alone(mode):
    assert (weights_of(torch.zeros(3, 4), torch.float32, **MODES[mode]) == 0).all()
    assert (gradient_of(torch.zeros(3, 4), torch.float32, **MODES[mode]) == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2])
def test_a_gradient_that_is_not_finite_is_never_hidden(mode, dtype, bad, row):
    matrix = zoo.normal(3, 5, gen=zoo.generator(0))
    matrix[row, 1] = bad
    assert weights_of(matrix, dtype, **MODES[mode]).isnan().all()
    assert gradient_of(matrix, dtype, **MODES[mode]).isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_not_finite_beside_a_zero_gradient(mode):
    matrix = torch.tensor([[0.0, 0.0], [math.inf, 1.0], [1.0, 2.0]])
    assert weights_of(matrix, torch.float32, **MODES[mode]).isnan().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_norms_in_float32(mode, scale):
    matrix = (scale * zoo.with_ratio(3, 40, 10.0, zoo.generator(2))).float()
    assert zoo.spread(zoo.projections(gradient_of(matrix, torch.float32, **MODES[mode]), matrix)) <= 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda size: st.lists(
            st.lists(
                st.floats(-1e6, 1e6, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x), min_size=size, max_size=size
            ),
            min_size=1,
            max_size=6,
        )
    ),
    st.sampled_from(SAFE),
)
def test_properties_on_any_matrix(rows, mode):
    matrix = torch.tensor(rows, dtype=torch.float64)
    weights = weights_of(matrix, torch.float32, **MODES[mode])
    assert weights.isfinite().all()
    assert weights.abs().sum() <= 10 * (1 + 1e-12)
    norms = matrix.norm(dim=1)
    if mode == "nonneg":
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(1.0 if (norms > 0).any() else 0.0, abs=1e-12)
    some = matrix[norms > 0]
    if len(some):
        reach = (weights.abs() * norms).sum()
        assert (zoo.projections(weights @ matrix, some) >= -1e-5 * reach).all()


# ------------------------------------------------------------------------------------------------------------ nonneg


def test_nonneg_equals_the_default_wherever_no_weight_is_negative():
    compared = 0
    for seed in range(80):
        gen = zoo.generator(seed)
        tasks = 2 + seed % 7
        rows = zoo.normal(tasks, 3 * tasks, gen=gen) if seed % 2 else zoo.one_factor(tasks, 50, gen)
        matrix = zoo.log_normal(rows, gen)
        plain = weights_of(matrix)
        if (plain >= 0).all() and (plain > 0).any():
            compared += 1
            torch.testing.assert_close(weights_of(matrix, nonneg=True), plain, rtol=1e-8, atol=1e-10)
    assert compared >= 35


SIZES = [(2, 5), (3, 3), (4, 2), (5, 5), (6, 3), (8, 4), (8, 8), (10, 6), (10, 10)]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-6), (torch.float32, 2e-3)])
@pytest.mark.parametrize(("tasks", "size"), SIZES)
def test_nonneg_is_the_shortest_vector_of_the_convex_hull(tasks, size, dtype, atol):
    # |x|^2 is right to the regularisation, so x is right to its square root, at worst.
    for seed in range(6):
        gen = zoo.generator(1000 * tasks + 10 * size + seed)
        matrix = rounded(zoo.log_normal(zoo.normal(tasks, size, gen=gen), gen), dtype)
        weights = weights_of(matrix, dtype, nonneg=True)
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
        shares = weights * matrix.norm(dim=1)
        point = (shares / shares.sum()) @ zoo.units(matrix)
        torch.testing.assert_close(point, zoo.shortest_in_hull(matrix), rtol=0, atol=atol)


def _clustered(kind: str, tasks: int, size: int, seed: int) -> Tensor:
    gen = zoo.generator(seed)
    if kind == "gaussian":
        rows = zoo.normal(tasks, size, gen=gen)
    elif kind == "one-factor":
        rows = zoo.one_factor(tasks, size, gen)
    elif kind == "one-factor, both signs":
        rows = zoo.one_factor(tasks, size, gen, torch.sign(zoo.normal(tasks, gen=gen)) * 0.8)
    elif kind == "near duplicates":
        rows = zoo.normal(tasks // 2, size, gen=gen).repeat(2, 1) + 1e-4 * zoo.normal(tasks, size, gen=gen)
    elif kind == "duplicates":
        rows = zoo.normal(tasks // 2, size, gen=gen).repeat(2, 1)
    elif kind == "narrow cone":
        rows = 0.3 * zoo.normal(tasks, size, gen=gen) + zoo.units(zoo.normal(1, size, gen=gen)) * math.sqrt(size)
    else:
        rows = zoo.normal(tasks, tasks // 2, gen=gen) @ zoo.normal(tasks // 2, size, gen=gen)
    return zoo.log_normal(rows, gen)


KINDS = [
    "gaussian",
    "one-factor",
    "one-factor, both signs",
    "near duplicates",
    "duplicates",
    "narrow cone",
    "half the rank",
]


@pytest.mark.parametrize("size", [5, 12, 500])
@pytest.mark.parametrize("tasks", [10, 24, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_nonneg_solver_has_converged(kind, tasks, size):
    """The duality gap certifies the answer for as many tasks as one likes."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        gaps = []
        for seed in range(5 if tasks < 64 else 2):
            matrix = rounded(_clustered(kind, tasks, size, seed), dtype)
            gaps.append(zoo.hull_gap(weights_of(matrix, dtype, nonneg=True), matrix))
        assert max(gaps) <= tolerance, f"{sum(g > tolerance for g in gaps)} of {len(gaps)} draws: {max(gaps):.1e}"


@pytest.mark.parametrize("tasks", [3, 8, 16])
def test_nonneg_projections_are_equal_with_a_weight_and_larger_without(tasks):
    without = 0
    for seed in range(15):
        matrix = _clustered("one-factor", tasks, 40, seed)
        weights = weights_of(matrix, nonneg=True)
        along = zoo.projections(weights @ matrix, matrix)
        chosen = weights > 1e-9 * weights.max()
        without += (~chosen).sum().item()
        assert zoo.spread(along[chosen]) <= 1e-6
        assert (along[~chosen] >= along[chosen].max() * (1 - 1e-6)).all()
    assert without > 0 or tasks == 3


@pytest.mark.parametrize(("tasks", "size"), [(5, 2), (6, 3), (8, 4), (12, 5), (16, 8), (24, 12)])
def test_nonneg_gives_no_gradient_at_pareto_stationarity(tasks, size):
    # The last gradient is minus a positive combination of the others, so the hull contains zero.
    for seed in range(12):
        gen = zoo.generator(seed)
        rows = zoo.normal(tasks - 1, size, gen=gen)
        rows = torch.cat([rows, -zoo.uniform(1, tasks - 1, gen=gen, low=0.2) @ rows])
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            matrix = rounded(zoo.log_normal(rows, gen), dtype)
            weights = weights_of(matrix, dtype, nonneg=True)
            reach = (weights * matrix.norm(dim=1)).sum()
            assert (weights @ matrix).norm() <= tolerance * reach, f"seed {seed}, {dtype}"


@pytest.mark.parametrize("tasks", [3, 5, 10])
def test_nonneg_is_never_uphill_for_any_task(tasks):
    for seed in range(30):
        gen = zoo.generator(seed)
        matrix = zoo.log_normal(zoo.normal(tasks, 1 + seed % (2 * tasks), gen=gen), gen, sigma=2.0).float()
        weights = weights_of(matrix, torch.float32, nonneg=True)
        reach = (weights * matrix.double().norm(dim=1)).sum()
        assert (zoo.projections(weights @ matrix.double(), matrix) >= -2e-6 * reach).all(), f"seed {seed}"


# ----------------------------------------------------------------------------------------------------- as a module


def test_nonneg_and_strict_exclude_each_other():
    with pytest.raises(ValueError, match="nonneg and strict exclude each other"):
        IMTLG(nonneg=True, strict=True)
    with pytest.raises(TypeError, match="positional"):
        IMTLG(True)


def test_what_it_takes():
    with pytest.raises(TypeError, match=r"matrix: expected a floating-point tensor .* got torch.int64"):
        IMTLG()(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"matrix: expected a floating-point tensor .* got list"):
        IMTLG()([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"matrix: expected the shape \[tasks, n\] .* got \(3,\)"):
        IMTLG()(torch.ones(3))
    with pytest.raises(ValueError, match=r"matrix: expected the shape \[tasks, n\] with a row per task, got \(0, 3\)"):
        IMTLG()(torch.ones(0, 3))


def test_bind():
    balancer = IMTLG()
    balancer.bind(3)
    balancer.bind(3)
    with pytest.raises(ValueError, match="IMTLG was made for 3 tasks, but the model has 2 heads"):
        balancer.bind(2)
    with pytest.raises(ValueError, match="IMTLG was made for 3 tasks, got a matrix of 2 rows"):
        balancer(torch.eye(2))
    assert balancer(torch.eye(3, device=DEVICE)).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [({}, "IMTLG()"), ({"nonneg": True}, "IMTLG(nonneg=True)"), ({"strict": True}, "IMTLG(strict=True)")],
)
def test_no_state_and_it_survives_copies(options, text):
    balancer = IMTLG(**options)
    assert repr(balancer) == text
    assert not balancer.state_dict()
    assert not list(balancer.parameters())
    matrix = zoo.log_normal(zoo.one_factor(4, 20, zoo.generator(0)), zoo.generator(1)).to(DEVICE)
    expected = balancer(matrix)
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert torch.equal(twin(matrix), expected)
    balancer.reset()
    assert torch.equal(balancer(matrix), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_weights_carry_no_graph(mode):
    matrix = zoo.normal(3, 6, gen=zoo.generator(0)).to(DEVICE).requires_grad_()
    gradients = TaskGradients(matrix)
    weights = IMTLG(**MODES[mode]).weigh(gradients)
    assert not weights.requires_grad
    assert weights.dtype == torch.float64
    assert weights.device.type == DEVICE.type
    probe = torch.arange(1.0, 7.0, dtype=torch.float64, device=DEVICE)
    (IMTLG(**MODES[mode])(matrix) @ probe).backward()
    torch.testing.assert_close(matrix.grad, weights[:, None] * probe, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_input_is_left_alone(mode):
    matrix = zoo.normal(3, 6, gen=zoo.generator(0)).to(DEVICE)
    before = matrix.clone()
    IMTLG(**MODES[mode])(matrix)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_two_nearly_opposed_gradients_still_have_the_closed_form(dtype):
    # Two degrees from opposite there is an impartial direction, weighed as at every other angle: (n2, n1) / (n1 + n2).
    angle = math.radians(178)
    matrix = torch.tensor([[1.0, 0.0], [2 * math.cos(angle), 2 * math.sin(angle)]], dtype=torch.float64)
    norms = rounded(matrix, dtype).double().norm(dim=1)
    expected = norms.flip(0) / norms.sum()
    torch.testing.assert_close(weights_of(matrix, dtype), expected, rtol=1e-6, atol=0)
