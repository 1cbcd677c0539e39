"""RLW: its numbers against splitmix64 and Box-Muller in Python's integers, their distribution, its state."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from mtlwrap import MultiTaskModel
from mtlwrap.balancers import rlw
from mtlwrap.balancers.compose import Compose
from mtlwrap.balancers.rlw import RLW
from tests.balancers.zoo import generator, normal
from tests.common import DEVICE, TASKS, grads, make_input, make_losses, make_model, unwrapped_losses

EXACT = {"rtol": 0, "atol": 0}


def splitmix(state: int) -> int:
    """The output of splitmix64 for a state, in Python's integers."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def normal_number(seed: int, step: int, task: int) -> float:
    golden = 0x9E3779B97F4A7C15
    key = splitmix(splitmix(seed) + step * golden)
    first, second = (splitmix(key + (2 * task + k) * golden) // 2**11 / 2**53 for k in (1, 2))
    return math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)


def softmax(numbers: list[float]) -> list[float]:
    powers = [math.exp(number) for number in numbers]
    return [power / sum(powers) for power in powers]


def weights_of(balancer: RLW, tasks: list[int] | None = None, count: int = 3) -> list[float]:
    """The weights of one training step, which are the gradient of the scalar."""
    losses = torch.ones(count if tasks is None else len(tasks), dtype=torch.float64, device=DEVICE, requires_grad=True)
    balancer.scalarize(losses, tasks).backward()
    return losses.grad.tolist()


# ------------------------------------------------------------------------------------------------- the numbers


def test_splitmix64_known_answers() -> None:
    """The first outputs of the published generator from the seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [1234567 + (k + 1) * 0x9E3779B97F4A7C15 for k in range(4)]
    assert [splitmix(state) for state in states] == known
    mixed = rlw._mixed(torch.tensor([rlw._signed(state % 2**64) for state in states], device=DEVICE))
    assert [value % 2**64 for value in mixed.tolist()] == known
    assert [rlw._mixed_int(state % 2**64) % 2**64 for state in states] == known


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("std", [1.0, 0.25])
def test_weights_by_hand(seed: int, std: float) -> None:
    balancer = RLW(seed, std).to(DEVICE)
    for step in range(4):
        numbers = [std * normal_number(seed, step, task) for task in range(5)]
        assert weights_of(balancer, count=5) == pytest.approx(softmax(numbers), rel=1e-11)


def test_the_total_is_the_weighted_sum() -> None:
    losses = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64, device=DEVICE)
    expected = sum(w * x for w, x in zip(softmax([normal_number(7, 0, t) for t in range(3)]), losses.tolist()))  # noqa: B905
    total = RLW(7).to(DEVICE)(losses)
    assert total.shape == ()
    assert total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_values_of_any_shape(shape: tuple[int, ...]) -> None:
    values = normal(6, gen=generator(0))[: math.prod(shape)].reshape(shape).to(DEVICE)
    assert_close(RLW(3).to(DEVICE)(values), RLW(3).to(DEVICE)(values.flatten()), **EXACT)
    assert RLW(3).to(DEVICE)(values).shape == ()


def test_a_late_step_by_hand() -> None:
    balancer = RLW(5).to(DEVICE)
    balancer.step.fill_(2**40 + 3)
    numbers = [normal_number(5, 2**40 + 3, task) for task in range(3)]
    assert weights_of(balancer) == pytest.approx(softmax(numbers), rel=1e-11)


@pytest.mark.parametrize("bits", [0, -1])
def test_the_ends_of_the_uniform_numbers(bits: int) -> None:
    """In [0, 1), so that the logarithm of 1 - u is finite."""
    uniform = rlw._uniform(torch.tensor(bits, device=DEVICE))
    assert uniform.item() == (0.0 if bits == 0 else 1 - 2.0**-53)


# -------------------------------------------------------------------------------------------------- distribution


@pytest.fixture(scope="module")
def numbers() -> np.ndarray:
    """The normal numbers themselves, steps by tasks."""
    balancer = RLW(2024).to(DEVICE)
    like = torch.ones(8, dtype=torch.float64, device=DEVICE)
    rows = []
    for _ in range(4000):
        rows.append(balancer._normals(like, None).tolist())
        balancer(like)
    return np.array(rows)


def test_they_are_normal(numbers: np.ndarray) -> None:
    assert stats.kstest(numbers.ravel(), "norm").pvalue > 1e-3
    for task in range(8):
        assert stats.kstest(numbers[:, task], "norm").pvalue > 1e-3
    n = numbers.size
    assert abs(numbers.mean()) < 4 / math.sqrt(n)
    assert abs(numbers.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((numbers**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((numbers**4).mean() - 3) < 4 * math.sqrt(96 / n)


def test_steps_and_tasks_are_independent(numbers: np.ndarray) -> None:
    """No correlation of the numbers, nor of their squares, between tasks, or with the steps before."""
    limit = 5 / math.sqrt(len(numbers))
    for values in (numbers, numbers**2):
        between = np.corrcoef(values.T)
        assert abs(between - np.eye(8)).max() < limit
        for lag in (1, 2, 8):
            across = np.corrcoef(values[lag:].T, values[:-lag].T)[:8, 8:]
            assert abs(across).max() < limit


def test_nothing_repeats(numbers: np.ndarray) -> None:
    assert len(np.unique(numbers)) == numbers.size


def test_neighbouring_seeds_are_independent(numbers: np.ndarray) -> None:
    rows = []
    for seed in range(1500):
        rows.append([normal_number(seed, 0, 0), normal_number(seed + 1, 0, 0), normal_number(seed, 1, 0)])
        assert weights_of(RLW(seed).to(DEVICE)) != weights_of(RLW(seed + 1).to(DEVICE))
    assert stats.kstest([row[0] for row in rows], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(np.array(rows).T) - np.eye(3)).max() < 5 / math.sqrt(1500)


def test_weights_sum_to_one_and_average_to_equal() -> None:
    balancer = RLW(1).to(DEVICE)
    rows = np.array([weights_of(balancer) for _ in range(2000)])
    assert abs(rows.sum(1) - 1).max() < 1e-12
    assert (rows > 0).all()
    assert abs(rows.mean(0) - 1 / 3).max() < 4 * rows.std() / math.sqrt(2000)


def test_std_spreads_the_weights() -> None:
    logs = [
        np.log([weights_of(balancer) for _ in range(50)])
        for balancer in (RLW(1, 0.1).to(DEVICE), RLW(1, 1.0).to(DEVICE))
    ]
    narrow, usual = (each - each.mean(1, keepdims=True) for each in logs)
    assert usual == pytest.approx(10 * narrow, rel=1e-9)


# --------------------------------------------------------------------------------------------------------- state


def test_a_seed_decides_all() -> None:
    first, second, other = RLW(3).to(DEVICE), RLW(3).to(DEVICE), RLW(4).to(DEVICE)
    runs = [[weights_of(balancer) for _ in range(5)] for balancer in (first, second, other)]
    assert runs[0] == runs[1]
    assert all(a != b for a, b in zip(runs[0], runs[2], strict=True))
    assert len({tuple(weights) for weights in runs[0]}) == 5


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        balancer = RLW().to(DEVICE)
        runs.append([weights_of(balancer) for _ in range(3)])
        assert_close(torch.random.get_rng_state(), before, **EXACT)
    assert runs[0] == runs[1]


def test_only_training_under_gradients_draws_new_weights() -> None:
    balancer, values = RLW().to(DEVICE), torch.tensor([1.0, 5.0], device=DEVICE)
    with torch.no_grad():
        shown = balancer(values)
        balancer(values)
    balancer.eval()
    assert_close(balancer(values), shown, **EXACT)
    assert balancer.step.item() == 0
    balancer.train()
    assert_close(balancer(values), shown, **EXACT)  # those of the next step
    assert balancer.step.item() == 1
    assert balancer(values) != shown


def test_torch_func_and_compile() -> None:
    balancer, values = RLW(9).to(DEVICE), torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64, device=DEVICE)
    expected = [softmax([normal_number(9, step, t) for t in range(3)]) for step in range(3)]
    assert torch.func.grad(balancer)(values).tolist() == pytest.approx(expected[0], rel=1e-11)
    assert torch.func.vmap(balancer)(torch.stack([values, 2 * values])).shape == (2,)
    assert balancer.step.item() == 0
    compiled = torch.compile(balancer, backend="aot_eager", fullgraph=True)
    for weights in expected:
        exact = sum(w * x for w, x in zip(weights, values.tolist(), strict=True))
        assert compiled(values).item() == pytest.approx(exact, rel=1e-11)
    assert balancer.step.item() == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_reaches_the_total_and_draws_nothing(bad: float) -> None:
    balancer, reference = RLW().to(DEVICE), RLW().to(DEVICE)
    losses = torch.tensor([1.0, bad], dtype=torch.float64, device=DEVICE)
    assert not balancer(losses).isfinite()
    assert balancer.step.item() == 0
    assert weights_of(balancer) == weights_of(reference)


def test_an_absent_task_leaves_the_odds_of_the_others() -> None:
    whole, part = RLW(2).to(DEVICE), RLW(2).to(DEVICE)
    for step in range(3):
        together, without = weights_of(whole, count=4), weights_of(part, tasks=[0, 3])
        assert without == pytest.approx(softmax([normal_number(2, step, 0), normal_number(2, step, 3)]), rel=1e-11)
        assert without[0] / without[1] == pytest.approx(together[0] / together[3], rel=1e-11)


def test_reset_begins_again() -> None:
    balancer = RLW(6).to(DEVICE)
    first = [weights_of(balancer) for _ in range(3)]
    balancer.reset()
    assert [weights_of(balancer) for _ in range(3)] == first


def test_resumes_from_its_state() -> None:
    whole = RLW(6).to(DEVICE)
    for _ in range(3):
        weights_of(whole)
    resumed = RLW(6).to(DEVICE)
    resumed.load_state_dict(whole.state_dict())
    assert [weights_of(resumed) for _ in range(3)] == [weights_of(whole) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_leaves_the_count(dtype: torch.dtype) -> None:
    balancer = RLW().to(DEVICE)
    balancer.step.fill_(100_003)  # not a number of half precision
    expected = weights_of(balancer)
    balancer.step.fill_(100_003)
    balancer.to(dtype)
    assert balancer.step.dtype == torch.int64
    assert weights_of(balancer) == expected


def test_half_precision_losses() -> None:
    losses = torch.tensor([60000.0, 60000.0], dtype=torch.float16, device=DEVICE, requires_grad=True)
    total = RLW().to(DEVICE)(losses)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(60000, rel=1e-5)
    total.backward()
    assert losses.grad.dtype == torch.float16


# ------------------------------------------------------------------------------------------------------ in a model


def test_in_a_model_with_and_without_a_task() -> None:
    model = make_model(RLW(8))
    parameters = list(model.model_parameters())
    for step, present in enumerate((TASKS, ("a", "c"), TASKS)):
        x = make_input(step)
        numbers = [normal_number(8, step, TASKS.index(task)) for task in present]
        weights = dict(zip(present, softmax(numbers), strict=True))
        _, losses = unwrapped_losses(model, x)
        expected = torch.autograd.grad(sum(weights[t] * losses[t] for t in present), parameters, allow_unused=True)
        model.zero_grad()
        found = make_losses(model(x))
        model.backward({task: found[task] for task in present})
        assert_close(
            grads(parameters),
            [torch.zeros_like(p) if e is None else e for p, e in zip(parameters, expected, strict=True)],
            rtol=1e-10,
            atol=1e-13,
        )
        assert model.task_weights.tolist() == pytest.approx([weights.get(task, 0.0) for task in TASKS], rel=1e-11)


def test_inside_a_composition() -> None:
    model = make_model(Compose(loss=RLW(8)))
    for step in range(2):
        model.backward(make_losses(model(make_input(step))))
        weights = softmax([normal_number(8, step, task) for task in range(3)])
        assert model.task_weights.tolist() == pytest.approx(weights, rel=1e-11)


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed: expected at least 0 and less than 2\*\*64, got -1"),
        ({"seed": 2**64}, ValueError, r"seed: expected at least 0 and less than 2\*\*64, got 18446744073709551616"),
        ({"seed": 1.0}, TypeError, r"seed: expected an int, got 1\.0"),
        ({"seed": True}, TypeError, "seed: expected an int, got True"),
        ({"std": 0.0}, ValueError, r"std: expected a positive finite number, got 0\.0"),
        ({"std": math.inf}, ValueError, "std: expected a positive finite number, got inf"),
        ({"std": math.nan}, ValueError, "std: expected a positive finite number, got nan"),
        ({"std": "1"}, TypeError, "std: expected a number, got '1'"),
        ({"std": False}, TypeError, "std: expected a number, got False"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RLW(**arguments)


def test_repr_and_state() -> None:
    assert repr(RLW()) == "RLW(seed=0, std=1)"
    assert repr(RLW(5, 0.5)) == "RLW(seed=5, std=0.5)"
    model = MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1)], RLW())
    assert list(model.balancer.state_dict()) == ["step"]
    assert list(model.balancer_parameters()) == []


def test_the_state_is_no_tensor_of_inference() -> None:
    with torch.inference_mode():
        balancer = RLW()
    first = balancer(torch.ones(2, requires_grad=True) * torch.tensor([1.0, 3.0]))
    assert balancer.step.item() == 1
    first.backward()
