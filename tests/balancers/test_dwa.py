"""DWA against Eq. 7 by hand, over epochs of losses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchjd import scalarization

from mtlwrap import MultiTaskModel
from mtlwrap.balancers.compose import Compose
from mtlwrap.balancers.dwa import DWA
from tests.balancers.zoo import generator, normal
from tests.common import DEVICE, TASKS, grads, make_input, make_losses, make_model, unwrapped_losses

EXACT = {"rtol": 0, "atol": 0}
Row = list[float | None]


def stream(epochs: int, steps: int, tasks: int = 3, seed: int = 0) -> list[list[float]]:
    """Noisy losses that fall at different rates, one row per step."""
    noise = (0.3 * normal(epochs * steps, tasks, gen=generator(seed))).exp()
    rates = torch.linspace(0.5, 1.1, tasks, dtype=torch.float64)
    falling = torch.stack([rates ** (step // steps) for step in range(epochs * steps)])
    return (noise * falling * torch.tensor([1.0, 20.0, 0.01], dtype=torch.float64)[:tasks]).tolist()


def equation_7(newer: list[float], older: list[float], temperature: float = 2.0) -> list[float]:
    powers = [math.exp(a / b / temperature) for a, b in zip(newer, older, strict=True)]
    return [len(powers) * power / sum(powers) for power in powers]


def by_hand(rows: list[Row], steps: int, temperature: float = 2.0) -> list[list[float]]:
    """The weights of each step from the lists of all losses so far; a None is a task that takes no part."""
    result = []
    for now, row in enumerate(rows):
        present = [task for task, loss in enumerate(row) if loss is not None]
        averages: dict[int, list[float]] = {}
        for task in present:
            for first in range(0, now - now % steps, steps):
                seen = [r[task] for r in rows[first : first + steps] if r[task] is not None]
                if seen:
                    averages.setdefault(task, []).append(sum(seen) / len(seen))
        known = [task for task in present if len(averages.get(task, [])) > 1]
        shares = equation_7([averages[t][-1] for t in known], [averages[t][-2] for t in known], temperature)
        weights = dict.fromkeys(present, 1.0) | dict(zip(known, shares, strict=True))
        result.append([weights[task] for task in present])
    return result


def weights_of(balancer: DWA, row: Row, dtype: torch.dtype = torch.float64) -> list[float]:
    """The weights of one training step, which are the gradient of the scalar."""
    present = [task for task, loss in enumerate(row) if loss is not None]
    values = [loss for loss in row if loss is not None]
    losses = torch.tensor(values, dtype=dtype, device=DEVICE, requires_grad=True)
    balancer.scalarize(losses, None if len(present) == len(row) else present).backward()
    return losses.grad.tolist()


def made(steps: int, temperature: float = 2.0, tasks: int = 3, dtype: torch.dtype = torch.float64) -> DWA:
    return DWA(steps, temperature, num_tasks=tasks).to(DEVICE, dtype)


# --------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_weights_by_hand(steps: int, temperature: float) -> None:
    rows = stream(6, steps)
    balancer = made(steps, temperature)
    expected = by_hand(rows, steps, temperature)
    assert expected[2 * steps - 1] == [1.0, 1.0, 1.0]
    assert max(abs(w - 1) for w in expected[2 * steps]) > 0.02  # they do move
    for row, wanted in zip(rows, expected, strict=True):
        assert weights_of(balancer, row) == pytest.approx(wanted, rel=1e-12)


def test_two_epochs_and_a_step_by_hand() -> None:
    """Averages (2, 6) over (1, 3), (3, 9), then (1, 6) over (0.5, 8), (1.5, 4): the rates are 1/2 and 1."""
    balancer = made(2, tasks=2)
    for row in ([1.0, 3.0], [3.0, 9.0], [0.5, 8.0], [1.5, 4.0]):
        assert weights_of(balancer, row) == [1.0, 1.0]
    odds = math.exp(-0.25)
    assert weights_of(balancer, [7.0, 7.0]) == pytest.approx([2 * odds / (1 + odds), 2 / (1 + odds)], rel=1e-13)


def test_the_total_is_the_weighted_sum() -> None:
    rows = stream(4, 2)
    balancer = made(2)
    for row, weights in zip(rows, by_hand(rows, 2), strict=True):
        total = balancer(torch.tensor(row, dtype=torch.float64, device=DEVICE))
        assert total.shape == ()
        assert total.item() == pytest.approx(sum(w * x for w, x in zip(weights, row, strict=True)), rel=1e-12)


def test_equals_torchjd() -> None:
    ours, theirs = made(4), scalarization.DWA()
    for step, row in enumerate(stream(5, 4, seed=1)):
        values = torch.tensor(row, dtype=torch.float64, device=DEVICE)
        assert_close(ours(values), theirs(values), rtol=1e-12, atol=0)
        if step % 4 == 3:
            theirs.step()


def test_float32() -> None:
    rows = stream(4, 50)
    balancer = made(50, dtype=torch.float32)
    for row, wanted in zip(rows, by_hand(rows, 50), strict=True):
        assert weights_of(balancer, row, torch.float32) == pytest.approx(wanted, rel=1e-5)


def test_the_weights_sum_to_the_number_of_tasks() -> None:
    balancer = made(2)
    for row in stream(8, 2, seed=2):
        assert sum(weights_of(balancer, row)) == pytest.approx(3, rel=1e-12)


def test_the_docstrings_weights() -> None:
    balancer = made(1, tasks=2)
    for row in ([1.0, 1.0], [0.5, 1.0]):
        weights_of(balancer, row)
    assert [round(weight, 2) for weight in weights_of(balancer, [1.0, 1.0])] == [0.88, 1.12]


# ---------------------------------------------------------------------------------- what is absent, zero, not finite


def test_tasks_that_come_and_go() -> None:
    """Over the steps in which they took part; whole epochs without a task, and a boundary that it misses."""
    rows: list[Row] = list(stream(9, 3, seed=3))
    gen = generator(5)
    for row in rows:
        for task in (1, 2):
            if torch.rand((), generator=gen) < 0.4:
                row[task] = None
    for step in (*range(6), *range(12, 18), 21):
        rows[step][2] = None
    balancer = made(3)
    expected = by_hand(rows, 3)
    for row, wanted in zip(rows, expected, strict=True):
        assert weights_of(balancer, row) == pytest.approx(wanted, rel=1e-12)
    mixed = [w for w, row in zip(expected, rows, strict=True) if row[2] is not None and w[-1] == 1.0 != w[0]]
    assert mixed  # some steps have a task without averages next to ones that have them


def test_the_state_of_an_absent_task_does_not_move() -> None:
    balancer = made(2)
    for row in stream(3, 2):
        weights_of(balancer, row)
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    for _ in range(5):  # over the ends of epochs
        weights_of(balancer, [1.0, None, 2.0])
    for key in ("epochs", "counts", "averages"):
        after = getattr(balancer, key)
        assert_close(after[1], before[key][1], **EXACT)
        assert (after[[0, 2]] != before[key][[0, 2]]).any()
    assert balancer.step.item() == before["step"].item() + 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 3, 4, 11])
def test_a_loss_that_is_not_finite_changes_no_state(bad: float, at: int) -> None:
    balancer, reference = made(2), made(2)
    for step, row in enumerate(stream(6, 2)):
        if step == at:
            before = {key: value.clone() for key, value in balancer.state_dict().items()}
            spoiled = torch.tensor([row[0], bad, row[2]], dtype=torch.float64, device=DEVICE)
            assert not balancer(spoiled).isfinite()
            assert_close(dict(balancer.state_dict()), before, **EXACT)
        assert weights_of(balancer, row) == weights_of(reference, row)


def test_an_average_of_zero_has_no_ratio() -> None:
    """0 / x is a rate of 0; x / 0 and 0 / 0 are none, and the task counts as one without averages."""
    balancer = made(1)
    for row in ([4.0, 0.0, 2.0], [2.0, 5.0, 0.0]):
        weights_of(balancer, row)
    rates = equation_7([0.5, 0.0], [1.0, 1.0])
    assert weights_of(balancer, [1.0, 1.0, 0.0]) == pytest.approx([rates[0], 1.0, rates[1]], rel=1e-12)
    rates = equation_7([1.0, 1.0], [2.0, 5.0])
    assert weights_of(balancer, [1.0, 1.0, 1.0]) == pytest.approx([*rates, 1.0], rel=1e-12)


def test_a_ratio_that_overflows_takes_all_the_weight() -> None:
    balancer = made(1, dtype=torch.float32)
    for row in ([1e-30, 1.0, 1.0], [1e30, 1.0, 1.0]):
        weights_of(balancer, row, torch.float32)
    assert weights_of(balancer, [1.0, 1.0, 1.0], torch.float32) == [3.0, 0.0, 0.0]


def test_a_loss_beyond_the_range_of_the_state() -> None:
    """Finite in float64, but not in the float32 of the averages."""
    balancer = made(1, dtype=torch.float32)
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    assert weights_of(balancer, [1.0, 1e300, 1.0]) == [1.0, 1.0, 1.0]
    assert_close(dict(balancer.state_dict()), before, **EXACT)


# --------------------------------------------------------------------------------------------------------- state


def test_only_training_under_gradients_counts() -> None:
    balancer = made(1)
    for row in stream(3, 1):
        weights_of(balancer, row)
    values = torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64, device=DEVICE)
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    with torch.no_grad():
        shown = balancer(values)
    balancer.eval()
    assert_close(balancer(values), shown, **EXACT)
    balancer.train()
    assert torch.func.grad(balancer)(values).sum().item() == pytest.approx(3)
    assert_close(torch.func.vmap(balancer)(torch.stack([values, values])), torch.stack([shown, shown]))
    assert_close(dict(balancer.state_dict()), before, **EXACT)
    assert_close(balancer(values), shown, **EXACT)
    assert balancer.step.item() == 4
    assert shown != values.sum()


def test_an_earlier_total_can_still_go_backward() -> None:
    balancer = made(1)
    rows = stream(5, 1)
    losses = [torch.tensor(row, dtype=torch.float64, device=DEVICE, requires_grad=True) for row in rows]
    totals = [balancer(each) for each in losses]
    for total, each, wanted in reversed(list(zip(totals, losses, by_hand(rows, 1), strict=True))):
        total.backward()
        assert each.grad.tolist() == pytest.approx(wanted, rel=1e-12)


def test_reset_and_resume() -> None:
    rows = stream(6, 2)
    balancer = made(2)
    first = [weights_of(balancer, row) for row in rows]
    for row in rows[:7]:
        weights_of(balancer, row)
    balancer.reset()
    assert_close(dict(balancer.state_dict()), dict(made(2).state_dict()), **EXACT)
    assert [weights_of(balancer, row) for row in rows[:7]] == first[:7]
    resumed = made(2)
    resumed.load_state_dict(balancer.state_dict())
    assert [weights_of(resumed, row) for row in rows[7:]] == first[7:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_their_state_in_float32(dtype: torch.dtype) -> None:
    rows = stream(4, 3)
    balancer = made(3, dtype=torch.float32)
    for row in rows[:8]:
        weights_of(balancer, row, torch.float32)
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    balancer.to(dtype)
    assert_close(dict(balancer.state_dict()), before, **EXACT)
    for row, wanted in zip(rows[8:], by_hand(rows, 3)[8:], strict=True):
        assert weights_of(balancer, row, dtype) == pytest.approx(wanted, rel=1e-2)
    assert balancer.averages.dtype == torch.float32
    assert balancer(torch.ones(3, dtype=dtype, device=DEVICE)).dtype == torch.float32
    assert made(3, dtype=torch.float64).averages.dtype == torch.float64


def test_compiled() -> None:
    rows = stream(4, 2)
    balancer = made(2)
    compiled = torch.compile(balancer, backend="aot_eager", fullgraph=True)
    for row, wanted in zip(rows, by_hand(rows, 2), strict=True):
        total = compiled(torch.tensor(row, dtype=torch.float64, device=DEVICE))
        assert total.item() == pytest.approx(sum(w * x for w, x in zip(wanted, row, strict=True)), rel=1e-12)
    assert balancer.step.item() == 8


# ------------------------------------------------------------------------------------------------------ in a model


@pytest.mark.parametrize("composed", [False, True])
def test_in_a_model_with_and_without_a_task(composed: bool) -> None:
    """Heads and backbone get the weighted sum of the losses that take part."""
    model = make_model(Compose(loss=DWA(1)) if composed else DWA(1))
    parameters = list(model.model_parameters())
    seen: list[Row] = []
    for step in range(5):
        present = ("a", "c") if step == 3 else TASKS
        x = make_input(step)
        _, losses = unwrapped_losses(model, x)
        seen.append([losses[task].item() if task in present else None for task in TASKS])
        weights = dict(zip(present, by_hand(seen, 1)[-1], strict=True))
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
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.9)
    assert abs(model.task_weights - 1).max() > 1e-3


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch: expected at least 1, got 0"),
        ({"steps_per_epoch": 2.0}, TypeError, r"steps_per_epoch: expected an int, got 2\.0"),
        ({"steps_per_epoch": True}, TypeError, "steps_per_epoch: expected an int, got True"),
        ({}, TypeError, "steps_per_epoch"),
        ({"temperature": 0.0}, ValueError, r"temperature: expected a positive finite number, got 0\.0"),
        ({"temperature": math.inf}, ValueError, "temperature: expected a positive finite number, got inf"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a positive finite number, got nan"),
        ({"temperature": "2"}, TypeError, "temperature: expected a number, got '2'"),
        ({"temperature": True}, TypeError, "temperature: expected a number, got True"),
        ({"num_tasks": 0}, ValueError, "num_tasks: expected at least 1, got 0"),
        ({"num_tasks": 2.0}, TypeError, r"num_tasks: expected an int, got 2\.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    options = arguments if not arguments or "steps_per_epoch" in arguments else {"steps_per_epoch": 1, **arguments}
    with pytest.raises(error, match=message):
        DWA(**options)


def test_values_that_do_not_fit() -> None:
    values = torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"DWA does not know the number of tasks.*bind\(num_tasks\)"):
        DWA(1)(values)
    balancer = made(1)
    for wrong in (values, torch.ones(3, 1, device=DEVICE), torch.ones((), device=DEVICE)):
        with pytest.raises(ValueError, match=r"DWA: expected values of shape \(3,\), got"):
            balancer(wrong)
    with pytest.raises(ValueError, match=r"DWA: expected values of shape \(1,\), got \(2,\)"):
        balancer.scalarize(values, [1])
    assert balancer.step.item() == 0
    with pytest.raises(ValueError, match="DWA was made for 3 tasks, but the model has 2 heads"):
        MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1), nn.Linear(2, 1)], balancer)
    with pytest.raises(RuntimeError, match="size mismatch for averages"):
        balancer.load_state_dict(made(1, tasks=2).state_dict())


def test_binding_again_keeps_the_state() -> None:
    balancer = made(1)
    for row in stream(2, 1):
        weights_of(balancer, row)
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    balancer.bind(3)
    assert_close(dict(balancer.state_dict()), before, **EXACT)


def test_repr_and_state() -> None:
    assert repr(DWA(5)) == "DWA(steps_per_epoch=5, temperature=2)"
    assert repr(DWA(100, 0.5, num_tasks=3)) == "DWA(steps_per_epoch=100, temperature=0.5)"
    assert DWA(5).state_dict() == {}
    DWA(5).reset()
    assert list(made(1).state_dict()) == ["step", "epochs", "counts", "averages"]
    assert list(made(1).parameters()) == []


def test_the_state_is_no_tensor_of_inference() -> None:
    with torch.inference_mode():
        balancer = DWA(1, num_tasks=2)
    balancer(torch.ones(2, requires_grad=True) * torch.tensor([1.0, 3.0])).backward()
    assert balancer.averages[:, 0].tolist() == [1.0, 3.0]


def test_the_default_dtype_may_be_half() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        assert DWA(1, num_tasks=2).averages.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_losses_need_no_gradient() -> None:
    balancer = made(1)
    values: Tensor = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE)
    assert balancer(values).item() == 6.0
    assert_close(balancer.averages[:, 0], values, **EXACT)
