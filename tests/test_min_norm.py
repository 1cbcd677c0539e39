"""The shortest vector in a convex hull, against hand-worked hulls; vectors that take no part have no say."""

import math

import pytest
import torch
from torch.testing import assert_close

from mtlwrap.min_norm import min_norm_weights
from tests.balancers.zoo import AWKWARD, generator, normal, units
from tests.common import DEVICE


def weights_of(rows: list[list[float]], usable: list[bool]) -> torch.Tensor:
    vectors = torch.tensor(rows, dtype=torch.float64, device=DEVICE)
    return min_norm_weights(vectors @ vectors.T, torch.tensor(usable, device=DEVICE)).cpu()


HALF = 1 / math.sqrt(2)


@pytest.mark.parametrize(
    ("rows", "usable", "expected"),
    [
        ([[1, 0], [0, 1]], [True, True], [0.5, 0.5]),
        # The third lies between the other two, but farther out than the line through them.
        ([[1, 0], [0, 1], [HALF, HALF]], [True, True, True], [0.5, 0.5, 0.0]),
        ([[1, 0], [0, 1], [HALF, HALF]], [True, False, True], [0.5, 0.0, 0.5]),
        ([[1, 0], [-1, 0], [0, 1]], [True, False, True], [0.5, 0.0, 0.5]),
        ([[1, 0], [0, 1], [-4, 0]], [True, True, False], [0.5, 0.5, 0.0]),
        ([[1, 0], [0, 1]], [False, True], [0.0, 1.0]),
        ([[1, 0], [0, 1]], [False, False], [0.0, 0.0]),
        ([[1, 0]], [True], [1.0]),
        ([[1, 0], [1, 0], [0, 1]], [True, True, True], [0.25, 0.25, 0.5]),
    ],
)
def test_hand_worked_hulls(rows: list[list[float]], usable: list[bool], expected: list[float]) -> None:
    weights = weights_of(rows, usable)
    assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (weights[~torch.tensor(usable)] == 0).all()


def test_a_vector_that_is_not_finite_and_takes_no_part_has_no_say() -> None:
    gramian = torch.tensor([[1.0, math.nan, 0.0], [math.nan, math.inf, math.nan], [0.0, math.nan, 1.0]]).double()
    weights = min_norm_weights(gramian.to(DEVICE), torch.tensor([True, False, True], device=DEVICE)).cpu()
    assert_close(weights, torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64), rtol=0, atol=1e-9)


FLOAT32 = [
    *(units(make()) for name, make in AWKWARD.items() if "zero" not in name),
    *(units(normal(tasks, size, gen=generator(tasks))) for tasks in (2, 5, 20) for size in (1, 2, 3, 10)),
]


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize("case", range(len(FLOAT32)))
def test_in_float32_where_a_device_has_no_more(case: int, ridge: float) -> None:
    """There rounding does break factorisations, and the last round before that is kept. By duality; see the zoo."""
    vectors = FLOAT32[case]
    gramian = (vectors @ vectors.T + ridge * torch.eye(len(vectors), dtype=torch.float64)).float().to(DEVICE)
    weights = min_norm_weights(gramian, torch.ones(len(vectors), dtype=torch.bool, device=DEVICE))
    assert weights.dtype == torch.float32
    weights, products = weights.double().cpu(), gramian.double().cpu()
    assert (weights >= 0).all()
    assert_close(weights.sum().item(), 1.0, rtol=0, atol=1e-5)
    assert weights @ products @ weights - (products @ weights).amin() < 1e-5
