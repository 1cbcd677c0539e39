"""TaskGradients against brute force in float64."""

import contextlib
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlwrap import IMTLG, TaskGradients
from tests.balancers import zoo
from tests.common import DEVICE

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [*HALVES, torch.float32, torch.float64]


def on_device(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.to(device=DEVICE, dtype=dtype or tensor.dtype)


def flat(gradient: Tensor) -> Tensor:
    """All numbers of a tensor in a vector of float64, in logical order."""
    gradient = gradient.detach().cpu()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.to(torch.complex128).resolve_conj())
    return gradient.double().reshape(-1)


def gramian(parts: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The inner products, one by one, correctly rounded."""
    tasks = len(parts[0])
    result = torch.zeros(tasks, tasks, dtype=torch.float64)
    for first in range(tasks):
        for second in range(tasks):
            products = []
            for part in parts:
                if part[first] is not None and part[second] is not None:
                    products += (flat(part[first]) * flat(part[second])).tolist()
            result[first, second] = math.fsum(products)
    return result


def check(gradients: TaskGradients, expected: Tensor, rtol: float = 1e-12) -> None:
    """Gramian, norms and cosines against a Gramian."""
    norms = expected.diagonal().sqrt()
    atol = rtol * norms[:, None] * norms
    assert ((gradients.gramian.cpu() - expected).abs() <= atol).all()
    torch.testing.assert_close(gradients.norms.cpu(), norms, rtol=rtol, atol=0)
    safe = torch.where(norms > 0, norms, 1.0)
    cosines = (expected / safe[:, None] / safe).fill_diagonal_(1.0)
    torch.testing.assert_close(gradients.cosines.cpu(), cosines, rtol=0, atol=4 * rtol)
    for answer in (gradients.gramian, gradients.norms, gradients.cosines):
        assert answer.dtype == torch.float64
        assert answer.device.type == DEVICE.type


def asymmetric(tasks: int, *shape: int, seed: int = 0) -> Tensor:
    gen = zoo.generator(seed)
    scales = zoo.normal(tasks, gen=gen).exp().reshape(tasks, *[1] * len(shape))
    return scales * (zoo.normal(tasks, *shape, gen=gen) + 0.3 * zoo.normal(1, *shape, gen=gen))


# ---------------------------------------------------------------------------------------------- from a single matrix


def test_hand_worked():
    gradients = TaskGradients(on_device(torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])), losses=None)
    assert gradients.gramian.tolist() == [[9.0, 0.0, 9.0], [0.0, 16.0, 16.0], [9.0, 16.0, 25.0]]
    assert gradients.norms.tolist() == [3.0, 4.0, 5.0]
    assert gradients.cosines.tolist() == [[1.0, 0.0, 0.6], [0.0, 1.0, 0.8], [0.6, 0.8, 1.0]]
    assert gradients.weighted_sum(on_device(torch.tensor([2.0, -1.0, 0.5]))).tolist() == [7.5, -2.0]
    assert gradients.num_tasks == 3
    assert gradients.active.tolist() == [True, True, True]
    assert gradients.taking_part == (True, True, True)
    assert bool(gradients.finite)
    assert gradients.losses.isnan().tolist() == [True, True, True]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tasks", "size"), [(1, 1), (1, 7), (2, 3), (5, 40), (6, 2), (3, 3000)])
def test_statistics_in_float64_whatever_the_precision(tasks, size, dtype):
    matrix = on_device(asymmetric(tasks, size), dtype)
    gradients = TaskGradients(matrix)
    assert gradients.precision == dtype
    check(gradients, gramian([list(matrix)]))
    assert torch.equal(gradients.matrix, matrix)


@pytest.mark.parametrize("size", [(1 << 15) - 1, 1 << 15, (1 << 15) + 1, (1 << 17) + 12345])
def test_long_gradients_are_added_up_to_the_last_number(size):
    matrix = on_device(torch.zeros(2, size))
    matrix[0] = 0.25
    matrix[1, -3:] = on_device(torch.tensor([2.0, 3.0, 5.0]))
    gradients = TaskGradients(matrix)
    assert gradients.gramian.tolist() == [[size / 16, 2.5], [2.5, 38.0]]
    matrix = on_device(asymmetric(11, size, seed=1), torch.float32)
    wide = matrix.double()
    # Long float32 rows on a CPU are multiplied in float32, block by block.
    single = size > 1 << 17 and DEVICE.type == "cpu"
    check(TaskGradients(matrix), (wide @ wide.T).cpu(), rtol=3e-7 if single else 1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("ratio", [1.0, 1e12])
def test_long_gradients_of_any_size(scale, ratio):
    """Where float32 cannot square; with a first part of zeros; some of them absent."""
    matrix = asymmetric(3, 1 << 18, seed=2)
    matrix[:, : 1 << 16] = 0.0
    matrix = on_device(scale * matrix * torch.tensor([[1.0], [ratio], [1.0 / ratio]]), torch.float32)
    wide = matrix.double()
    check(TaskGradients(matrix), (wide @ wide.T).cpu(), rtol=3e-7)
    absent = TaskGradients.from_parts([[matrix[0], None, matrix[2]]], [True, False, True])
    expected = wide @ wide.T
    expected[1] = expected[:, 1] = 0.0
    check(absent, expected.cpu(), rtol=3e-7)


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gramian_is_symmetric_to_the_bit(num_tasks, dtype):
    """The product of a matrix with its own transpose need not be, on some processors."""
    for size in (35, 1000, 30_000):
        matrix = on_device(torch.randn(num_tasks, size, generator=zoo.generator(size), dtype=torch.float64), dtype)
        gramian = TaskGradients(matrix).gramian
        assert torch.equal(gramian, gramian.T)


ONE_SIGNED = {
    "constant": lambda n: torch.ones(n),
    "positive": lambda n: torch.rand(n, generator=zoo.generator(0)) + 0.5,
    "almost constant": lambda n: 1 + 1e-3 * torch.randn(n, generator=zoo.generator(1)),
}


@pytest.mark.parametrize("kind", ONE_SIGNED)
@pytest.mark.parametrize("size", [1 << 18, (1 << 19) + 12345])
def test_long_gradients_of_one_sign(kind, size):
    """Rounding does not cancel in their sums: parallel rows must stay parallel, and each have its share."""
    row = ONE_SIGNED[kind](size)
    matrix = on_device(torch.stack([0.1 * row, 0.3 * row, 0.7 * row, 1e3 * row]), torch.float32)
    wide = matrix.double()
    check(TaskGradients(matrix), (wide @ wide.T).cpu(), rtol=1.5e-6)
    weights = IMTLG().weigh(TaskGradients(matrix))
    torch.testing.assert_close(weights.sum().item(), 1.0)
    assert (weights > 0).all()


@pytest.mark.parametrize("spike", [1e18, 1e25])
def test_long_gradients_with_a_spike(spike):
    matrix = on_device(asymmetric(2, 1 << 18), torch.float32)
    matrix[0, 77_777] = spike
    matrix[1, :200_000] = 0.0
    matrix[1, 200_000:] *= 1e-25
    wide = matrix.double()
    check(TaskGradients(matrix), (wide @ wide.T).cpu(), rtol=1.5e-6)


def test_long_gradients_at_the_end_of_the_range():
    matrix = on_device(torch.full((1, 1 << 18), 3e38), torch.float32)
    assert TaskGradients(matrix).norms.item() == pytest.approx(3e38 * 512, rel=1e-5)


def test_long_gradients_where_products_are_allowed_to_be_coarse():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        matrix = on_device(asymmetric(2, 1 << 18), torch.float32)
        wide = matrix.double()
        check(TaskGradients(matrix), (wide @ wide.T).cpu())
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_long_gradients_that_are_not_finite(bad):
    for position in (0, 100_000):  # one that the sample holds, one that it does not
        matrix = on_device(asymmetric(2, 1 << 18), torch.float32)
        matrix[1, position] = bad
        gradients = TaskGradients(matrix)
        assert not gradients.finite
        assert gradients.norms[0].isfinite()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_beyond_what_float32_can_square(scale):
    matrix = on_device(scale * asymmetric(3, 50), torch.float32)
    gradients = TaskGradients(matrix)
    check(gradients, gramian([list(matrix)]))
    assert bool(gradients.finite)
    assert (gradients.norms > 0).all()


def test_small_numbers_beside_large_ones_are_not_lost():
    # In float32 1 + 1e-8 is 1: a float32 sum of these squares is 1.
    matrix = on_device(torch.full((1, 100_001), 1e-4))
    matrix[0, 0] = 1.0
    small = float(matrix[0, 1]) ** 2
    assert TaskGradients(matrix).gramian.item() == pytest.approx(1 + 100_000 * small, rel=1e-13)


def test_zero_gradients():
    gradients = TaskGradients(on_device(torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])))
    assert gradients.norms.tolist() == [pytest.approx(math.sqrt(5.0)), 0.0, 0.0]
    assert gradients.cosines.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert bool(gradients.finite)


def test_cosines_stay_within_one_for_parallel_gradients():
    for seed in range(20):
        row = on_device(asymmetric(1, 9, seed=seed), torch.float32)
        cosines = TaskGradients(torch.cat([row, 3 * row, -7 * row])).cosines
        assert (cosines.abs() <= 1.0).all()
        torch.testing.assert_close(cosines[0].cpu(), torch.tensor([1.0, 1.0, -1.0]).double(), rtol=0, atol=1e-12)
        assert (cosines.diagonal() == 1.0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told(bad, dtype):
    matrix = on_device(asymmetric(3, 4), dtype)
    matrix[1, 2] = bad
    gradients = TaskGradients(matrix)
    assert gradients.finite.shape == ()
    assert gradients.finite.dtype == torch.bool
    assert not gradients.finite
    assert not gradients.norms[1].isfinite()
    assert gradients.norms[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_columns(dtype):
    gradients = TaskGradients(torch.zeros(2, 0, dtype=dtype, device=DEVICE))
    assert gradients.norms.tolist() == [0.0, 0.0]
    assert gradients.matrix.shape == (2, 0)
    assert gradients.weighted_sum(on_device(torch.ones(2))).shape == (0,)


def test_loss_factors():
    rows = list(on_device(asymmetric(2, 3)))
    assert TaskGradients(torch.stack(rows)).loss_factors.tolist() == [1.0, 1.0]
    factors = on_device(torch.tensor([2.0, 0.25]))
    assert TaskGradients.from_parts([rows], [True, True], loss_factors=factors).loss_factors.tolist() == [2.0, 0.25]
    # They describe the gradients, and change none of the answers.
    gradients = TaskGradients.from_parts([rows], [True, True], loss_factors=factors)
    check(gradients, gramian([rows]))


def test_losses():
    matrix = on_device(asymmetric(2, 3))
    losses = on_device(torch.tensor([0.5, 7.0])).requires_grad_()
    gradients = TaskGradients(matrix, losses)
    assert gradients.losses.tolist() == [0.5, 7.0]
    assert not gradients.losses.requires_grad


# -------------------------------------------------------------------------------------------------------- the parts


def test_several_parts_count_as_one_long_vector():
    for dtype in FLOATS:
        parts = [
            [on_device(row, dtype) for row in asymmetric(3, *shape, seed=seed)]
            for seed, shape in enumerate([(5,), (2, 3), (), (4, 1, 2)])
        ]
        gradients = TaskGradients.from_parts(parts, [True] * 3)
        check(gradients, gramian(parts))
        rows = torch.stack([torch.cat([part[task].reshape(-1) for part in parts]) for task in range(3)])
        assert torch.equal(gradients.matrix, rows)
        weights = on_device(torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64))
        expected = (weights.double() @ rows.double()).cpu()
        tolerance = 4 * torch.finfo(dtype).eps * (weights.abs().double() @ rows.double().abs()).cpu().max().item()
        actual = gradients.weighted_sum(weights)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=tolerance)


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def _transposed(gradient: Tensor) -> Tensor:
    return gradient.transpose(0, -1).contiguous().transpose(0, -1)


def _strided(gradient: Tensor) -> Tensor:
    wide = gradient.repeat_interleave(2, dim=-1)
    wide[..., 1::2] = 99.0
    return wide[..., ::2]


def _permuted(gradient: Tensor) -> Tensor:
    return gradient.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda gradient: gradient,
    "channels last": _channels_last,
    "transposed": _transposed,
    "strided": _strided,
    "permuted": _permuted,
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("others", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_any_memory_layout_also_a_different_one_for_each_task(first, others, dtype):
    plain = [on_device(row, dtype) for row in asymmetric(3, 2, 3, 4, 5)]
    part = [LAYOUTS[first if task == 0 else others](gradient) for task, gradient in enumerate(plain)]
    for given_, gradient in zip(part, plain, strict=True):
        assert torch.equal(given_, gradient)
    gradients = TaskGradients.from_parts([part], [True] * 3)
    check(gradients, gramian([plain]))
    # The matrix stands in memory order: the columns are permuted, for all rows alike.
    matrix = gradients.matrix
    order = matrix[0].argsort(stable=True)
    natural = plain[0].reshape(-1).argsort(stable=True)
    if len(matrix[0].unique()) == matrix.shape[1]:
        rows = torch.stack([gradient.reshape(-1) for gradient in plain])
        assert torch.equal(matrix[:, order], rows[:, natural])
    weights = on_device(torch.tensor([1.0, -2.0, 0.5]))
    sums = gradients.scaled_sum(weights)
    assert len(sums) == 1
    assert sums[0].shape == (2, 3, 4, 5)
    assert sums[0].dtype == dtype
    expected = (plain[0].double() - 2 * plain[1].double() + 0.5 * plain[2].double()).cpu()
    reach = max(gradient.abs().max().item() for gradient in plain) * 4
    atol = 2 * torch.finfo(dtype).eps * reach
    torch.testing.assert_close(sums[0].cpu().double(), expected, rtol=0, atol=atol)
    # The flat sum stands in the same order as the matrix, and finds back into the tensor's shape.
    vector = gradients.weighted_sum(weights)
    torch.testing.assert_close(vector.double(), weights.double() @ matrix.double(), rtol=0, atol=atol)
    (back,) = gradients.scaled(vector)
    assert back.shape == (2, 3, 4, 5)
    torch.testing.assert_close(back.cpu().double(), expected, rtol=0, atol=2 * atol)


def test_expanded_gradients():
    # The gradient of a sum is an expanded scalar.
    part = [on_device(torch.tensor(0.5)).expand(3, 4), on_device(asymmetric(1, 3, 4)[0], torch.float32)]
    gradients = TaskGradients.from_parts([part], [True, True])
    check(gradients, gramian([part]))
    (combined,) = gradients.scaled_sum(on_device(torch.tensor([2.0, 1.0])))
    torch.testing.assert_close(combined, 1.0 + part[1])
    assert torch.equal(part[0], on_device(torch.full((3, 4), 0.5)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_missing_gradients_are_zero(dtype):
    a, b = ([on_device(row, dtype) for row in asymmetric(3, *shape)] for shape in ((4,), (2, 3)))
    parts = [[a[0], None, a[2]], [None, None, b[2]]]
    gradients = TaskGradients.from_parts(parts, [True, True, True])
    check(gradients, gramian(parts))
    zero_a, zero_b = a[0].new_zeros(4), a[0].new_zeros(6)
    rows = [torch.cat([a[0], zero_b]), torch.cat([zero_a, zero_b]), torch.cat([a[2], b[2].reshape(-1)])]
    assert gradients.matrix.dtype == dtype
    assert torch.equal(gradients.matrix, torch.stack(rows))
    total = gradients.weighted_sum(on_device(torch.tensor([1.0, 5.0, 1.0])))
    assert torch.equal(total, (rows[0].double() + rows[2].double()).to(dtype))
    assert gradients.active.tolist() == [True, True, True]


def test_a_task_that_takes_no_part_has_a_gradient_of_zero():
    rows = list(on_device(asymmetric(3, 5), torch.float32))
    losses = on_device(torch.tensor([0.5, math.nan, 2.0]))
    gradients = TaskGradients.from_parts([rows], [True, False, True], losses)
    assert gradients.active.tolist() == [True, False, True]
    assert gradients.taking_part == (True, False, True)
    assert gradients.num_tasks == 3
    check(gradients, gramian([[rows[0], None, rows[2]]]))
    assert (gradients.matrix[1] == 0).all()
    torch.testing.assert_close(gradients.weighted_sum(on_device(torch.tensor([1.0, 9.0, 2.0]))), rows[0] + 2 * rows[2])
    assert gradients.losses.isnan().tolist() == [False, True, False]


def test_no_gradient_at_all():
    gradients = TaskGradients.from_parts([[None, None]], [True, True])
    assert gradients.norms.tolist() == [0.0, 0.0]
    assert bool(gradients.finite)
    assert gradients.weighted_sum(torch.ones(2)).numel() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_part_that_no_task_reaches_changes_nothing(dtype):
    rows = list(on_device(asymmetric(2, 3), dtype))
    weights = on_device(torch.tensor([0.5, 2.0]))
    alone = TaskGradients.from_parts([rows], [True, True])
    for parts in ([rows, [None, None]], [[None, None], rows]):
        gradients = TaskGradients.from_parts(parts, [True, True])
        assert torch.equal(gradients.gramian, alone.gramian)
        assert torch.equal(gradients.matrix, alone.matrix)
        assert gradients.precision == dtype
        assert gradients.weighted_sum(weights).dtype == dtype
        assert torch.equal(gradients.weighted_sum(weights), alone.weighted_sum(weights))


@pytest.mark.parametrize(("dtype", "real"), [(torch.complex64, torch.float32), (torch.complex128, torch.float64)])
def test_complex_gradients_are_pairs_of_numbers(dtype, real):
    numbers = asymmetric(3, 2, 4, 2)
    part = [on_device(torch.view_as_complex(row), dtype) for row in numbers.contiguous()]
    gradients = TaskGradients.from_parts([part], [True] * 3)
    check(gradients, gramian([part]))
    assert gradients.precision == real
    assert gradients.matrix.dtype == real
    assert torch.equal(gradients.matrix, on_device(numbers, real).reshape(3, -1))
    weights = on_device(torch.tensor([1.0, -2.0, 0.5]))
    (combined,) = gradients.scaled_sum(weights)
    assert combined.dtype == dtype
    torch.testing.assert_close(combined, part[0] - 2 * part[1] + 0.5 * part[2])
    (back,) = gradients.scaled(gradients.weighted_sum(weights))
    assert back.dtype == dtype
    torch.testing.assert_close(back, combined)


def test_conjugated_gradients():
    a, b = on_device(torch.tensor([[1 + 2j, 3 - 1j], [0.5j, -2 + 1j]]))
    gradients = TaskGradients.from_parts([[a.conj(), b]], [True, True])
    assert gradients.matrix.tolist() == [[1.0, -2.0, 3.0, 1.0], [0.0, 0.5, -2.0, 1.0]]
    assert gradients.gramian.tolist() == [[15.0, -6.0], [-6.0, 5.25]]
    (combined,) = gradients.scaled_sum(on_device(torch.tensor([1.0, 2.0])))
    assert combined.tolist() == [1 - 1j, -1 + 3j]


def test_sparse_gradients():
    dense = on_device(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -3.0]]))
    other = on_device(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
    gradients = TaskGradients.from_parts([[dense.to_sparse(), other]], [True, True])
    assert gradients.gramian.tolist() == [[13.0, -1.0], [-1.0, 4.0]]
    (combined,) = gradients.scaled_sum(on_device(torch.tensor([1.0, 2.0])))
    assert torch.equal(combined, dense + 2 * other)


def test_complex_parts_with_a_missing_gradient_and_beside_real_ones():
    a = on_device(torch.tensor([1 + 2j, 3 - 1j]))
    b = on_device(torch.tensor([0.5, 4.0, -1.0]))
    expected = on_device(torch.tensor([[1.0, 2.0, 3.0, -1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.5, 4.0, -1.0]]))
    gradients = TaskGradients.from_parts([[a, None], [None, b]], [True, True])
    check(gradients, gramian([[a, None], [None, b]]))
    assert gradients.precision == torch.float32
    assert gradients.matrix.dtype == torch.float32
    assert torch.equal(gradients.matrix, expected)
    total = gradients.weighted_sum(on_device(torch.tensor([2.0, 3.0])))
    torch.testing.assert_close(total, 2 * expected[0] + 3 * expected[1])


def test_parts_of_different_precision():
    a, b = asymmetric(2, 3), asymmetric(2, 4, seed=1)
    parts = [list(on_device(a, torch.bfloat16)), list(on_device(b, torch.float32))]
    gradients = TaskGradients.from_parts(parts, [True, True])
    check(gradients, gramian(parts))
    first, second = gradients.scaled_sum(on_device(torch.tensor([1.0, 2.0])))
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float32)


# -------------------------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize("scale", [65536.0, 1e-3, -2.0, 1.0, 2.0**100])
def test_the_scale_of_the_total_is_divided_out(scale):
    matrix = asymmetric(3, 20)
    rows = list(on_device(scale * matrix, torch.float64))
    factor = on_device(torch.tensor(scale))
    exact = float(factor)  # as float32 has it
    gradients = TaskGradients.from_parts([rows], [True] * 3, scale=factor)
    plain = [row / exact for row in rows]
    check(gradients, gramian([plain]))
    torch.testing.assert_close(gradients.matrix, torch.stack(plain), rtol=1e-14, atol=0)
    weights = on_device(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    expected = (weights.cpu() @ torch.stack(plain).cpu()).to(DEVICE)
    torch.testing.assert_close(gradients.weighted_sum(weights), expected, rtol=1e-12, atol=1e-14)
    # What goes back to autograd carries the scale.
    (back,) = gradients.scaled_sum(weights)
    torch.testing.assert_close(back, exact * expected, rtol=1e-12, atol=1e-14 * abs(exact))
    (back,) = gradients.scaled(gradients.weighted_sum(weights))
    torch.testing.assert_close(back, exact * expected, rtol=1e-12, atol=1e-14 * abs(exact))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1024.0, 65536.0, 2.0**20])
def test_a_loss_scale_beyond_half_precisions_range(dtype, scale):
    # A GradScaler begins at 65536, which is infinite in float16; powers of two divide without rounding.
    matrix = on_device(torch.tensor([[1.0, -0.5, 2.0], [0.25, 3.0, -1.0]])) * 2.0**-8
    rows = list((matrix * scale).to(dtype))
    if not all(row.isfinite().all() for row in rows):
        rows = list((matrix * 2.0**-8 * scale).to(dtype))
        matrix = matrix * 2.0**-8
    gradients = TaskGradients.from_parts([rows], [True, True], scale=on_device(torch.tensor(scale)))
    assert gradients.norms.tolist() == pytest.approx(matrix.double().norm(dim=1).tolist(), rel=1e-12)
    torch.testing.assert_close(gradients.matrix.float(), matrix, rtol=1e-3, atol=0)
    total = gradients.weighted_sum(on_device(torch.tensor([1.0, 2.0])))
    assert total.dtype == dtype
    torch.testing.assert_close(total.float(), matrix[0] + 2 * matrix[1], rtol=1e-2, atol=1e-6)
    (back,) = gradients.scaled(total)
    torch.testing.assert_close(back.float(), scale * (matrix[0] + 2 * matrix[1]), rtol=1e-2, atol=1e-6 * scale)


def test_a_total_that_was_multiplied_with_zero():
    rows = list(on_device(torch.zeros(2, 3)))
    gradients = TaskGradients.from_parts([rows], [True, True], scale=on_device(torch.tensor(0.0)))
    assert gradients.norms.tolist() == [0.0, 0.0]
    assert (gradients.matrix == 0).all()
    assert (gradients.weighted_sum(on_device(torch.ones(2))) == 0).all()
    assert bool(gradients.finite)


def test_cosines_do_not_depend_on_the_scale():
    rows = list(on_device(asymmetric(3, 6), torch.float32))
    plain = TaskGradients.from_parts([rows], [True] * 3)
    scaled = TaskGradients.from_parts([rows], [True] * 3, scale=on_device(torch.tensor(-1e20)))
    assert torch.equal(plain.cosines, scaled.cosines)


# ---------------------------------------------------------------------------------------------------- weighted sums


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_half_precision_with_weights_beyond_its_range(dtype, weight_dtype):
    matrix = on_device(torch.tensor([[1e-4, -2e-4], [3e-4, 5e-5]]), dtype)
    weights = on_device(torch.tensor([1e6, -2e6], dtype=weight_dtype))
    total = TaskGradients(matrix).weighted_sum(weights)
    assert total.dtype == dtype
    expected = (weights.double() @ matrix.double()).to(dtype)
    torch.testing.assert_close(total, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert total.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_summed_in_float32(dtype):
    # 256 ones and a half each time: summed in half precision, the small ones are lost.
    matrix = on_device(torch.full((300, 1), 0.5 if dtype == torch.bfloat16 else 0.4995), dtype)
    matrix[-1] = 256.0 if dtype == torch.bfloat16 else 2048.0  # the last task is the first to be added
    total = TaskGradients(matrix).weighted_sum(on_device(torch.ones(300)))
    expected = matrix.double().sum(dim=0).to(dtype)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_weights_are_the_sum_bit_by_bit_as_autograd_adds(dtype):
    torch.manual_seed(0)
    shared = torch.randn(50, device=DEVICE).to(dtype).requires_grad_()
    factors = on_device(asymmetric(4, 50, seed=3), dtype)
    rows = [torch.autograd.grad((shared * factor).sum(), shared)[0] for factor in factors]
    if dtype in HALVES:  # autograd rounds after every addition, we round once
        expected = torch.stack(rows).double().sum(dim=0).to(dtype)
    else:
        sum((shared * factor).sum() for factor in factors).backward()
        expected = shared.grad
    actual = TaskGradients(torch.stack(rows)).weighted_sum(on_device(torch.ones(4)))
    assert torch.equal(actual, expected)


def test_weights_of_any_kind():
    matrix = on_device(asymmetric(3, 4), torch.float32)
    expected = matrix[0] - 2 * matrix[1] + 3 * matrix[2]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        weights = on_device(torch.tensor([1, -2, 3]), dtype)
        total = TaskGradients(matrix).weighted_sum(weights)
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, expected)


def test_weights_that_are_not_finite_show():
    total = TaskGradients(on_device(torch.ones(2, 3))).weighted_sum(on_device(torch.tensor([math.nan, 1.0])))
    assert total.isnan().all()


def test_weighted_sums_leave_the_gradients_alone():
    matrix = on_device(asymmetric(3, 4), torch.float32)
    before = matrix.clone()
    with torch.no_grad():
        gradients = TaskGradients(matrix)
        gradients.weighted_sum(on_device(torch.tensor([2.0, 3.0, 4.0])))
        gradients.weighted_sum(on_device(torch.ones(3)))
        assert gradients.matrix.shape == (3, 4)
        gradients.matrix.zero_()
    assert torch.equal(matrix, before)


def test_a_derivative_of_the_weighted_sum():
    matrix = on_device(asymmetric(3, 4)).requires_grad_()
    weights = on_device(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)).requires_grad_()
    probe = on_device(torch.arange(1.0, 5.0, dtype=torch.float64))
    (TaskGradients(matrix).weighted_sum(weights) @ probe).backward()
    torch.testing.assert_close(matrix.grad, weights.detach()[:, None] * probe)
    assert weights.grad is None  # a weight is a number


# -------------------------------------------------------------------------------- once, plainly, and for one step only


def test_computed_when_first_asked_for_and_once():
    matrix = on_device(asymmetric(3, 5))
    gradients = TaskGradients(matrix, on_device(torch.ones(3)))
    for name in ("active", "losses", "loss_factors", "gramian", "norms", "cosines", "finite", "matrix"):
        assert getattr(gradients, name) is getattr(gradients, name)
    matrix.mul_(2.0)
    for name in ("gramian", "norms", "cosines", "finite"):  # all follow from what was computed once
        fresh = TaskGradients(0.5 * matrix)
        torch.testing.assert_close(getattr(gradients, name), getattr(fresh, name), rtol=1e-12, atol=1e-12)
    late = TaskGradients(matrix)
    matrix.mul_(2.0)
    torch.testing.assert_close(late.norms, torch.linalg.vector_norm(matrix, dim=1))


def test_one_inner_product_serves_all_statistics():
    matrix = on_device(asymmetric(3, 5))
    gradients = TaskGradients(matrix)
    norms = gradients.norms.clone()
    matrix.zero_()
    torch.testing.assert_close(gradients.gramian.diagonal().sqrt(), norms)
    assert gradients.cosines[0, 1] != 0
    assert bool(gradients.finite)


def test_no_graph():
    matrix = on_device(asymmetric(3, 5)).requires_grad_()
    gradients = TaskGradients(matrix * 2, on_device(torch.ones(3)).requires_grad_())
    for name in ("active", "losses", "loss_factors", "gramian", "norms", "cosines", "finite", "matrix"):
        assert not getattr(gradients, name).requires_grad


@pytest.fixture
def _medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_medium_precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reduced_precision_of_matrix_products_elsewhere_does_not_matter(dtype):
    matrix = on_device(asymmetric(4, 500), dtype)
    check(TaskGradients(matrix), gramian([list(matrix)]))


@pytest.mark.parametrize("autocast", HALVES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_autocast_around_it_does_not_matter(autocast, dtype):
    matrix = on_device(asymmetric(4, 500), dtype)
    weights = on_device(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    expected = TaskGradients(matrix).weighted_sum(weights)
    with torch.autocast(DEVICE.type, dtype=autocast):
        gradients = TaskGradients(matrix)
        check(gradients, gramian([list(matrix)]))
        assert torch.equal(gradients.matrix, matrix)
        assert gradients.matrix.dtype == dtype
        assert torch.equal(gradients.weighted_sum(weights), expected)


@pytest.mark.parametrize(
    "name", ["active", "losses", "loss_factors", "gramian", "norms", "cosines", "finite", "matrix"]
)
@pytest.mark.parametrize("asked_before", [False, True])
def test_released(name, asked_before):
    gradients = TaskGradients(on_device(asymmetric(2, 3)), on_device(torch.ones(2)))
    if asked_before:
        getattr(gradients, name)
    gradients.release()
    with pytest.raises(ValueError, match="These task gradients were freed when their step ended"):
        getattr(gradients, name)


def test_released_gradients_hold_nothing_and_refuse_sums():
    rows = list(on_device(asymmetric(2, 3)))
    gradients = TaskGradients.from_parts([rows], [True, False], on_device(torch.ones(2)), on_device(torch.tensor(2.0)))
    assert repr(gradients) == "TaskGradients(num_tasks=2)"
    gradients.norms, gradients.matrix  # noqa: B018 - asked for, to be kept
    gradients.release()
    gradients.release()
    assert repr(gradients) == "TaskGradients(num_tasks=2, released)"
    assert gradients.num_tasks == 2
    assert gradients.taking_part == (True, False)
    for ask in (gradients.weighted_sum, gradients.scaled_sum):
        with pytest.raises(ValueError, match="These task gradients were freed when their step ended"):
            ask(torch.ones(2))
    assert not _tensors_with_numbers(vars(gradients))


def test_released_gradients_do_not_name_a_wrong_precision():
    gradients = TaskGradients(on_device(asymmetric(2, 3), torch.bfloat16))
    gradients.release()
    with contextlib.suppress(ValueError):  # refusing is as good as the right answer
        assert gradients.precision == torch.bfloat16


def _tensors_with_numbers(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.numel() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in _tensors_with_numbers(entry)]
    return []


# ------------------------------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize(
    ("matrix", "kind"),
    [
        (torch.ones(2, 3, dtype=torch.int64), r"torch\.int64"),
        (torch.ones(2, 3, dtype=torch.bool), r"torch\.bool"),
        (torch.ones(2, 3, dtype=torch.complex64), r"torch\.complex64"),
        ([[1.0, 2.0]], "list"),
    ],
)
def test_a_matrix_of_another_type(matrix, kind):
    with pytest.raises(TypeError, match=rf"matrix: expected a floating-point tensor of shape \[tasks, n\], got {kind}"):
        TaskGradients(matrix)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (0, 0), (2, 3, 4)])
def test_a_matrix_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"matrix: expected the shape \[tasks, n\] with a row per task, got \("):
        TaskGradients(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_losses_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"losses: expected the shape \[2\], got \("):
        TaskGradients(torch.zeros(2, 3), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_weights_of_another_shape(shape):
    gradients = TaskGradients(torch.zeros(2, 3))
    for ask in (gradients.weighted_sum, gradients.scaled_sum):
        with pytest.raises(ValueError, match=r"weights: expected the shape \[2\], got \("):
            ask(torch.ones(shape))


def test_parts_of_another_number_of_tasks():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        TaskGradients.from_parts([[torch.ones(2)]], [True, False])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda size: st.lists(
            st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=size, max_size=size), min_size=1, max_size=5
        )
    )
)
def test_laws_of_the_statistics(rows):
    gradients = TaskGradients(on_device(torch.tensor(rows, dtype=torch.float32)))
    product, norms, cosines = (answer.cpu() for answer in (gradients.gramian, gradients.norms, gradients.cosines))
    assert ((product - product.T).abs() <= 1e-13 * norms[:, None] * norms).all()
    assert torch.equal(norms == 0, torch.tensor([not any(row) for row in rows]))
    assert (product.abs() <= norms[:, None] * norms * (1 + 1e-12)).all()  # Cauchy and Schwarz
    assert (cosines.abs() <= 1).all()
    assert ((cosines - cosines.T).abs() <= 1e-13).all()
    assert (cosines.diagonal() == 1).all()
    assert bool(gradients.finite)
    for actual, row in zip(norms.tolist(), rows, strict=True):
        assert actual == pytest.approx(math.hypot(*row), rel=1e-12, abs=0)
