"""FAMO against Algorithm 1 by hand, the official update, and what a step without some of the tasks may change."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchjd import scalarization

from mtlwrap import MultiTaskModel
from mtlwrap.balancers.compose import Compose
from mtlwrap.balancers.famo import FAMO
from tests.balancers.zoo import generator, normal
from tests.common import DEVICE, TASKS, grads, make_input, make_losses, make_model, unwrapped_losses

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-11, "atol": 1e-14}


def doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE, requires_grad=True)


def made(logits: Sequence[float], **options: Any) -> FAMO:
    balancer = FAMO(len(logits), **options).to(DEVICE, torch.float64)
    with torch.no_grad():
        balancer.logits.copy_(doubles(logits))
    return balancer


def step(balancer: FAMO, losses: Sequence[float], tasks: list[int] | None = None) -> tuple[float, list[float], Tensor]:
    """The scalar of a training step, the weights of the losses, and the gradient of the logits."""
    given = doubles(losses)
    balancer.zero_grad()
    total = balancer.scalarize(given, tasks)
    total.backward()
    return total.item(), given.grad.tolist(), balancer.logits.grad.clone()


def softmax(numbers: Sequence[float]) -> list[float]:
    powers = [math.exp(number) for number in numbers]
    return [power / sum(powers) for power in powers]


def by_hand(logits: Sequence[float], losses: Sequence[float], bounds: Sequence[float]) -> tuple[float, list[float]]:
    """The scalar and the weights of Algorithm 1."""
    z, gaps = softmax(logits), [loss - b + 1e-8 for loss, b in zip(losses, bounds, strict=True)]
    c = 1 / sum(share / gap for share, gap in zip(z, gaps, strict=True))
    scalar = c * sum(share * math.log(gap) for share, gap in zip(z, gaps, strict=True))
    return scalar, [c * share / gap for share, gap in zip(z, gaps, strict=True)]


def direction(logits: Sequence[float], fell: Sequence[float], gamma: float) -> list[float]:
    """The gradient of the logits, with the Jacobian of the softmax written out."""
    z = softmax(logits)
    n = range(len(z))
    return [sum(z[j] * ((i == j) - z[i]) * fell[j] for j in n) + gamma * logits[i] for i in n]


def drops(old: Sequence[float], new: Sequence[float], bound: float = 0.0) -> list[float]:
    return [math.log(a - bound + 1e-8) - math.log(b - bound + 1e-8) for a, b in zip(old, new, strict=True)]


# --------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [0.5, -1.0, 2.0]])
@pytest.mark.parametrize("bounds", [0.0, 0.25, [0.1, -2.0, 3.0]])
def test_scalar_and_weights_by_hand(logits: list[float], bounds: Any) -> None:
    losses = [0.5, 4.0, 30.0]
    total, weights, _ = step(made(logits, min_losses=bounds), losses)
    scalar, expected = by_hand(logits, losses, bounds if isinstance(bounds, list) else [bounds] * 3)
    assert total == pytest.approx(scalar, rel=1e-12)
    assert weights == pytest.approx(expected, rel=1e-12)
    assert sum(weights) == pytest.approx(1, rel=1e-12)


def test_numbers() -> None:
    """z equal and L = (1, 4): c = 1 / (1/2 + 1/8) = 1.6, the scalar is 0.8 ln 4, the weights are 0.8 and 0.2."""
    total, weights, gradient = step(made([0.0, 0.0]), [1.0, 4.0])
    assert total == pytest.approx(0.8 * math.log(4), abs=1e-7)
    assert weights == pytest.approx([0.8, 0.2], abs=1e-7)
    assert gradient.tolist() == [0.0, 0.0]
    # The first halves and the second stays: delta is (ln 2, 0), and z (delta - ln 2 / 2) a quarter of ln 2.
    _, _, gradient = step(made_after([1.0, 4.0]), [0.5, 4.0])
    assert gradient.tolist() == pytest.approx([math.log(2) / 4, -math.log(2) / 4], abs=1e-7)


def made_after(losses: Sequence[float], logits: Sequence[float] | None = None, **options: Any) -> FAMO:
    balancer = made([0.0] * len(losses) if logits is None else logits, **options)
    step(balancer, losses)
    return balancer


@pytest.mark.parametrize("gamma", [0.0, 0.01, 3.0])
def test_the_gradient_of_the_logits_by_hand(gamma: float) -> None:
    logits, rows = [0.5, -1.0, 2.0], [[0.5, 4.0, 30.0], [0.4, 5.0, 10.0], [0.1, 5.5, 11.0]]
    balancer = made(logits, gamma=gamma)
    assert step(balancer, rows[0])[2].tolist() == [0.0, 0.0, 0.0]
    for old, new in pairwise(rows):
        total, _, gradient = step(balancer, new)
        assert gradient.tolist() == pytest.approx(direction(logits, drops(old, new), gamma), rel=1e-12)
        assert total == pytest.approx(by_hand(logits, new, [0.0] * 3)[0], rel=1e-12)  # its value is zero


def test_bounds_count_in_the_drops() -> None:
    balancer = made_after([2.0, 2.0], [0.1, 0.2], min_losses=1.5)
    gradient = step(balancer, [1.75, 2.5])[2]
    expected = direction([0.1, 0.2], drops([2.0, 2.0], [1.75, 2.5], 1.5), 0.01)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_weight_moves_to_the_task_that_falls_behind() -> None:
    balancer = made([0.0, 0.0])
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.025)
    for n in range(50):
        optimizer.zero_grad()
        balancer(doubles([0.9**n, 0.99**n])).backward()
        optimizer.step()
    assert balancer.logits[1] > 0.5 > -0.5 > balancer.logits[0]


def test_adams_weight_decay_is_gamma() -> None:
    """Adam's own decay is added to the gradient as gamma is; in the first step both add nothing to zero."""
    runs = []
    for ours, theirs in ((0.05, 0.0), (0.0, 0.05)):
        balancer = made([0.0, 0.0, 0.0], gamma=ours)
        optimizer = torch.optim.Adam(balancer.parameters(), lr=0.025, weight_decay=theirs)
        for row in normal(30, 3, gen=generator(0)).exp():
            optimizer.zero_grad()
            balancer(row.to(DEVICE)).backward()
            optimizer.step()
        runs.append(balancer.logits.detach().clone())
    assert_close(runs[0], runs[1], **CLOSE)
    assert runs[0].abs().max() > 0.05


def test_the_official_updates_one_step_later() -> None:
    """On one batch for ever, the update with the losses after a step is the one with the next step's losses.

    TorchJD has the official code's update; SGD and not Adam, which counts our first gradient of zero as a step.
    """
    ours, theirs = made([0.0, 0.0, 0.0], gamma=0.0), scalarization.FAMO(3).to(DEVICE, torch.float64)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.3)
    rows = normal(12, 3, gen=generator(1)).exp().to(DEVICE)
    theirs._optimizer = torch.optim.SGD([theirs._w], lr=0.3)
    for new in rows:
        assert_close(ours.logits.detach(), theirs._w.detach(), **CLOSE)
        before = theirs._prev_losses
        losses, same = new.clone().requires_grad_(), new.clone().requires_grad_()
        optimizer.zero_grad()
        ours(losses).backward()
        theirs(same).backward()
        assert_close(losses.grad, same.grad, **CLOSE)
        optimizer.step()
        if before is not None:
            theirs._prev_losses = before
            theirs.update(new)
            theirs._prev_losses = new
    assert ours.logits.abs().max() > 0.05


def test_noise_of_the_batches_cancels() -> None:
    """The logits' gradients of a loss that goes up and down sum to that of the whole way."""
    balancer, summed = made([0.0, 0.0], gamma=0.0), torch.zeros(2, dtype=torch.float64, device=DEVICE)
    rows = [[1.0, 1.0], [5.0, 0.2], [0.3, 2.0], [0.5, 1.0]]
    for row in rows:
        summed += step(balancer, row)[2]
    assert summed.tolist() == pytest.approx(direction([0.0, 0.0], drops(rows[0], rows[-1]), 0.0), rel=1e-11)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_narrow_losses(dtype: torch.dtype, rel: float) -> None:
    balancer = FAMO(3).to(DEVICE)
    values = [0.5, 4.0, 30.0]
    losses = torch.tensor(values, dtype=dtype, device=DEVICE, requires_grad=True)
    total = balancer(losses)
    total.backward()
    scalar, weights = by_hand([0.0] * 3, values, [0.0] * 3)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(scalar, rel=1e-5)
    assert losses.grad.tolist() == pytest.approx(weights, rel=rel)


# --------------------------------------------------------------------------------- what is absent, at a bound, broken


def test_an_absent_task() -> None:
    logits = [0.5, -1.0, 2.0]
    balancer = made_after([0.5, 4.0, 30.0], logits)
    before = balancer.log_losses.clone()
    total, weights, gradient = step(balancer, [0.4, 10.0], tasks=[0, 2])
    scalar, expected = by_hand([0.5, 2.0], [0.4, 10.0], [0.0, 0.0])
    assert total == pytest.approx(scalar, rel=1e-12)
    assert weights == pytest.approx(expected, rel=1e-12)
    moved = direction([0.5, 2.0], drops([0.5, 30.0], [0.4, 10.0]), 0.01)
    assert gradient.tolist() == pytest.approx([moved[0], 0.0, moved[1]], rel=1e-12)
    assert gradient[1] == 0
    assert balancer.log_losses[1] == before[1]
    # Back again, it is compared with its last loss.
    gradient = step(balancer, [0.3, 3.0, 9.0])[2]
    assert gradient.tolist() == pytest.approx(
        direction(logits, drops([0.4, 4.0, 10.0], [0.3, 3.0, 9.0]), 0.01), rel=1e-12
    )


def test_bounds_of_absent_tasks() -> None:
    balancer = made([0.0, 0.0, 0.0], min_losses=[0.1, 100.0, 0.2])
    _, weights, _ = step(balancer, [0.4, 10.0], tasks=[0, 2])
    assert weights == pytest.approx(by_hand([0.0, 0.0], [0.4, 10.0], [0.1, 0.2])[1], rel=1e-12)


def test_a_task_that_comes_late_moves_from_its_second_step_on() -> None:
    logits = [0.5, -1.0, 2.0]
    balancer = made(logits)
    step(balancer, [0.5, 30.0], tasks=[0, 2])
    gradient = step(balancer, [0.4, 4.0, 10.0])[2]
    moved = direction([0.5, 2.0], drops([0.5, 30.0], [0.4, 10.0]), 0.01)
    assert gradient.tolist() == pytest.approx([moved[0], 0.0, moved[1]], rel=1e-12)
    gradient = step(balancer, [0.3, 3.0, 9.0])[2]
    expected = direction(logits, drops([0.4, 4.0, 10.0], [0.3, 3.0, 9.0]), 0.01)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("first", [False, True])
def test_a_loss_that_is_not_finite_or_below_its_bound(bad: float, first: bool) -> None:
    """It reaches the total and the network's gradients, but neither the state nor the logits."""
    balancer = made([0.5, -1.0, 2.0]) if first else made_after([0.5, 4.0, 30.0], [0.5, -1.0, 2.0])
    before = balancer.log_losses.clone()
    total, weights, gradient = step(balancer, [0.4, bad, 10.0])
    assert not math.isfinite(total)
    assert not any(math.isfinite(weight) for weight in weights)
    assert gradient.tolist() == [0.0, 0.0, 0.0]
    assert_close(balancer.log_losses, before, **EXACT)


def test_a_loss_at_its_bound_has_nearly_all_the_weight() -> None:
    balancer = FAMO(2).to(DEVICE)
    for _ in range(2):
        losses = torch.tensor([0.0, 1.0], device=DEVICE, requires_grad=True)
        balancer(losses).backward()
        assert losses.grad.tolist() == pytest.approx([1.0, 1e-8], rel=1e-5)
        assert balancer.logits.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------------- state


def test_only_training_under_gradients_remembers() -> None:
    balancer = made_after([0.5, 4.0], [0.3, -0.3])
    before, values = balancer.log_losses.clone(), doubles([1.0, 5.0]).detach()
    with torch.no_grad():
        shown = balancer(values)
    assert shown.item() == pytest.approx(by_hand([0.3, -0.3], [1.0, 5.0], [0.0, 0.0])[0], rel=1e-12)
    balancer.eval()
    assert_close(balancer(values).detach(), shown, **EXACT)
    balancer.train()
    expected = by_hand([0.3, -0.3], [1.0, 5.0], [0.0, 0.0])[1]
    assert torch.func.grad(balancer)(values).tolist() == pytest.approx(expected, rel=1e-12)
    assert_close(torch.func.vmap(balancer)(torch.stack([values, values])).detach(), torch.stack([shown, shown]))
    assert_close(balancer.log_losses, before, **EXACT)
    assert_close(balancer(values).detach(), shown, **EXACT)
    assert balancer.log_losses.exp().tolist() == pytest.approx([1.0, 5.0])


def test_an_earlier_total_can_still_go_backward() -> None:
    balancer = made_after([1.0, 1.0], [0.3, -0.3])
    first, second = doubles([0.5, 1.0]), doubles([0.5, 0.5])
    totals = [balancer(first), balancer(second)]
    with torch.no_grad():
        balancer.logits.add_(1.0)
    totals[1].backward()
    assert balancer.logits.grad.tolist() == pytest.approx(
        direction([0.3, -0.3], drops([0.5, 1.0], [0.5, 0.5]), 0.01), rel=1e-11
    )
    balancer.zero_grad()
    totals[0].backward()
    assert balancer.logits.grad.tolist() == pytest.approx(
        direction([0.3, -0.3], drops([1.0, 1.0], [0.5, 1.0]), 0.01), rel=1e-11
    )


def test_reset_equals_fresh() -> None:
    balancer = made_after([0.5, 4.0], [0.3, -0.3])
    balancer.reset()
    assert_close(dict(balancer.state_dict()), dict(made([0.0, 0.0]).state_dict()), **EXACT)
    assert balancer.log_losses.tolist() == [math.inf, math.inf]
    assert balancer.logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_their_state_in_float32(dtype: torch.dtype) -> None:
    balancer = FAMO(2).to(DEVICE)
    balancer(torch.tensor([0.3, 4.1], device=DEVICE))
    before = balancer.log_losses.clone()
    balancer.to(dtype)
    assert_close(balancer.log_losses, before, **EXACT)
    assert balancer.logits.dtype == dtype
    balancer(torch.tensor([0.15, 4.1], dtype=dtype, device=DEVICE)).backward()
    assert balancer.log_losses.dtype == torch.float32
    assert balancer.logits.grad.tolist() == pytest.approx([math.log(2) / 4, -math.log(2) / 4], rel=2e-2)


def test_half_logits_are_not_computed_with_in_half() -> None:
    balancer = FAMO(3).to(DEVICE).half()
    with torch.no_grad():
        balancer.logits.copy_(torch.tensor([0.3, -1.1, 4.7]))
    losses = torch.tensor([0.5, 4.0, 30.0], device=DEVICE, requires_grad=True)
    balancer(losses).backward()
    expected = by_hand(balancer.logits.tolist(), losses.tolist(), [0.0] * 3)[1]
    assert losses.grad.tolist() == pytest.approx(expected, rel=1e-5)


def test_frozen_logits() -> None:
    balancer = made_after([0.5, 4.0], [0.3, -0.3])
    balancer.requires_grad_(False)
    losses = doubles([1.0, 5.0])
    balancer(losses).backward()
    assert losses.grad.tolist() == pytest.approx(by_hand([0.3, -0.3], [1.0, 5.0], [0.0, 0.0])[1], rel=1e-12)


def test_compiled() -> None:
    balancer = made([0.3, -0.3])
    compiled = torch.compile(balancer, backend="aot_eager", fullgraph=True)
    for row in ([0.5, 4.0], [0.4, 5.0]):
        balancer.zero_grad()
        compiled(doubles(row)).backward()
    expected = direction([0.3, -0.3], drops([0.5, 4.0], [0.4, 5.0]), 0.01)
    assert balancer.logits.grad.tolist() == pytest.approx(expected, rel=1e-11)


# ------------------------------------------------------------------------------------------------------ in a model


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_in_a_model_with_and_without_a_task(composed: bool, scale: float) -> None:
    """Heads and backbone get the weighted sum of the losses that take part, the logits their direction."""
    model = make_model(Compose(loss=FAMO()) if composed else FAMO())
    parameters, (logits,) = list(model.model_parameters()), model.balancer_parameters()
    last: dict[str, float] = {}
    for number in range(4):
        present = ("a", "c") if number == 2 else TASKS
        x = make_input(number)
        _, losses = unwrapped_losses(model, x)
        values, own = [losses[t].item() for t in present], [logits[TASKS.index(t)].item() for t in present]
        weights = dict(zip(present, by_hand(own, values, [0.0] * len(own))[1], strict=True))
        expected = torch.autograd.grad(sum(weights[t] * losses[t] for t in present), parameters, allow_unused=True)
        moved = direction(own, drops([last[t] for t in present], values), 0.01) if last else [0.0] * len(own)
        model.zero_grad()
        found = make_losses(model(x))
        (scale * model.scalarize({task: found[task] for task in present})).backward()
        assert_close(
            [g / scale for g in grads(parameters)],
            [torch.zeros_like(p) if e is None else e for p, e in zip(parameters, expected, strict=True)],
            rtol=1e-10,
            atol=1e-13,
        )
        assert model.task_weights.tolist() == pytest.approx([weights.get(task, 0.0) for task in TASKS], rel=1e-10)
        by_task = dict(zip(present, moved, strict=True))
        gradient = (logits.grad / scale).tolist()
        assert gradient == pytest.approx([by_task.get(task, 0.0) for task in TASKS], rel=1e-10)
        last |= dict(zip(present, values, strict=True))
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.9)
            logits.sub_(0.5 * logits.grad / scale)
    assert logits.abs().max() > 1e-2


def test_the_bound_of_a_model() -> None:
    model = make_model(FAMO(), torch.float32)
    assert [tuple(p.shape) for p in model.balancer_parameters()] == [(3,)]
    groups = model.param_groups(lr=1e-3, balancer_lr=0.025)
    assert (groups[1]["lr"], groups[1]["weight_decay"]) == (0.025, 0.0)
    assert groups[1]["params"] == [model.balancer.logits]


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gamma": -0.1}, ValueError, r"gamma: expected a finite number of at least 0, got -0\.1"),
        ({"gamma": math.inf}, ValueError, "gamma: expected a finite number of at least 0, got inf"),
        ({"gamma": math.nan}, ValueError, "gamma: expected a finite number of at least 0, got nan"),
        ({"gamma": "0"}, TypeError, "gamma: expected a number, got '0'"),
        ({"gamma": True}, TypeError, "gamma: expected a number, got True"),
        ({"min_losses": math.inf}, ValueError, "min_losses: expected finite numbers, got inf"),
        ({"min_losses": [0.0, math.nan]}, ValueError, "min_losses: expected finite numbers, got nan"),
        ({"min_losses": []}, ValueError, "min_losses: expected one number, or one per task, got none"),
        ({"min_losses": "0"}, TypeError, "min_losses: expected a number, or one per task, got '0'"),
        ({"min_losses": [True]}, TypeError, r"min_losses: expected a number, or one per task, got \[True\]"),
        ({"min_losses": [0.0, 1.0], "num_tasks": 3}, ValueError, "min_losses: expected one number, or 3, got 2"),
        ({"num_tasks": 0}, ValueError, "num_tasks: expected at least 1, got 0"),
        ({"num_tasks": (2,)}, TypeError, r"num_tasks: expected an int, got \(2,\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FAMO(**arguments)


def test_values_that_do_not_fit() -> None:
    values = torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"FAMO does not know the number of tasks.*bind\(num_tasks\)"):
        FAMO()(values)
    with pytest.raises(ValueError, match=r"FAMO: expected values of shape \(3,\), got \(2,\)"):
        made([0.0] * 3)(values)
    with pytest.raises(ValueError, match="FAMO was made for 3 tasks, but the model has 2 heads"):
        MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1), nn.Linear(2, 1)], FAMO(min_losses=[0.0, 1.0, 2.0]))


def test_bounds_tell_the_number_of_tasks() -> None:
    for bounds in ([0.0, 1], (0.0, 1.0), torch.tensor([0.0, 1.0])):
        balancer = FAMO(min_losses=bounds)
        assert balancer.logits.tolist() == [0.0, 0.0]
        assert balancer.min_losses == (0.0, 1.0)
    assert FAMO(min_losses=torch.tensor(0.5)).min_losses == 0.5


def test_repr_and_state() -> None:
    assert repr(FAMO()) == "FAMO(num_tasks=None, gamma=0.01, min_losses=0)"
    assert repr(FAMO(min_losses=[0, 0.5], gamma=1)) == "FAMO(num_tasks=2, gamma=1, min_losses=[0.0, 0.5])"
    assert FAMO().state_dict() == {}
    FAMO().reset()
    assert list(FAMO(2).state_dict()) == ["logits", "log_losses"]
