"""ExcessMTL: against the formulas of the official code, torchjd's, and what both get wrong."""

import math
from typing import Any

import pytest
import torch
import torchjd.aggregation
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import ExcessMTL, GradientBalancer, MultiTaskModel, TaskGradients, fork
from mtlwrap.balancers import by_name, excess_mtl
from tests.balancers.zoo import generator, normal
from tests.common import DEVICE

EXACT = {"rtol": 0, "atol": 0}


def stream(steps: int, tasks: int = 4, size: int = 30, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Gradients whose sizes differ by task and shrink at different rates, as in a training."""
    gen = generator(seed)
    sizes = scale * 10.0 ** torch.linspace(0, 1, tasks, dtype=torch.float64)
    rates = torch.linspace(0.0, 0.5, tasks, dtype=torch.float64)
    return [
        normal(tasks, size, gen=gen) * (sizes * (1.0 + step) ** -rates)[:, None] + sizes[:, None]
        for step in range(steps)
    ]


def official(matrices: list[Tensor], step_size: float, epsilon: float = 1e-7) -> list[Tensor]:
    """The weights of the official code divided by T (its facts in float64): Eq. 6-9, the first call as baseline."""
    tasks = len(matrices[0])
    weights = [1.0 / tasks] * tasks
    squares = torch.zeros_like(matrices[0])
    first: list[float] = []
    result = []
    for matrix in matrices:
        squares = squares + matrix**2
        risk = (matrix**2 / (squares + epsilon).sqrt()).sum(1).tolist()
        if first:
            grown = [w * math.exp(step_size * r / r0) for w, r, r0 in zip(weights, risk, first, strict=True)]
            weights = [w / sum(grown) for w in grown]
        else:
            first = risk
        result.append(torch.tensor(weights, dtype=torch.float64))
    return result


def weights_of(balancer: GradientBalancer, matrices: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    weights = [balancer.weigh(TaskGradients(matrix.to(DEVICE, dtype))) for matrix in matrices]
    return [w.cpu().double() for w in weights]


# ------------------------------------------------------------------------------------------- the published formulas


@pytest.mark.parametrize("step_size", [1.0, 0.1, 0.01])
def test_the_official_weights_over_200_steps(step_size: float) -> None:
    matrices = stream(200)
    expected = official(matrices, step_size)
    assert max(w.max() / w.min() for w in expected) > 1.2  # they do move
    for got, wanted in zip(weights_of(ExcessMTL(step_size), matrices), expected, strict=True):
        assert_close(got.log(), wanted.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step_size", [1.0, 0.01])
def test_the_official_weights_in_float32(step_size: float) -> None:
    matrices = stream(200)
    balancer = ExcessMTL(step_size)
    for got, wanted in zip(weights_of(balancer, matrices, torch.float32), official(matrices, step_size), strict=True):
        assert_close(got.log(), wanted.log(), rtol=1e-5, atol=1e-4)
    assert balancer.log_weights.dtype == torch.float32


@pytest.mark.parametrize(("ours", "theirs"), [(0, 1), (1, 1), (5, 5)])
def test_torchjds_weights(ours: int, theirs: int) -> None:
    matrices = stream(200, seed=1)
    reference = torchjd.aggregation.ExcessMTLWeighting(robust_step_size=0.1, n_warmup_steps=theirs)
    got = weights_of(ExcessMTL(0.1, n_warmup_steps=ours), matrices)
    for step, (weights, matrix) in enumerate(zip(got, matrices, strict=True)):
        assert_close(weights.log(), reference(matrix).log(), rtol=1e-6, atol=1e-6)
        if step < theirs:
            assert_close(weights, torch.full((4,), 0.25, dtype=torch.float64))


def test_one_step_by_hand() -> None:
    """Two tasks, two features, gradients (3, 4), (0, 2), then (3, 0), (1, 0)."""
    balancer = ExcessMTL(robust_step_size=0.5)
    first, second = weights_of(
        balancer, [torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])]
    )
    assert first.tolist() == [0.5, 0.5]
    # E0 = 3 + 4 and 2; then 9 / sqrt(18) and 1.
    odds = math.exp(0.5 * (9 / math.sqrt(18) / 7 - 1 / 2))
    assert_close(second, torch.tensor([odds / (1 + odds), 1 / (1 + odds)], dtype=torch.float64))


def test_alone_it_returns_the_weighted_sum() -> None:
    balancer, twin = ExcessMTL(0.3), ExcessMTL(0.3)
    for matrix in stream(4):
        weights = twin.weigh(TaskGradients(matrix.to(DEVICE)))
        assert_close(balancer(matrix.to(DEVICE)), weights @ matrix.to(DEVICE))


@pytest.mark.parametrize(
    ("step_size", "steps", "share"),
    [(1.0, 100, 7e-5), (1.0, 1000, 3e-14), (0.1, 100, 0.28), (0.1, 1000, 0.04), (0.01, 100, 0.48), (0.01, 1000, 0.42)],
)
def test_the_docstrings_table(step_size: float, steps: int, share: float) -> None:
    balancer = ExcessMTL(step_size)
    matrices = [torch.tensor([[1.0], [1.0 if step == 0 else 0.5]]) for step in range(steps)]
    shown = {True: "{:.0e}", False: "{:.2f}"}[share < 1e-3]
    assert shown.format(weights_of(balancer, matrices)[-1][1].item()) == shown.format(share)


# ------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("factor", [1e-18, 1e-6, 1e-3, 1e3, 1e6, 1e18])
def test_scales_of_the_losses_do_not_count(factor: float) -> None:
    """Also where squares of float32 gradients under- or overflow, and where the official 1e-7 would decide."""
    matrices = stream(50)
    factors = torch.tensor([1.0, factor, 1.0, factor], dtype=torch.float64)
    scaled = [matrix * factors[:, None] for matrix in matrices]
    plain = weights_of(ExcessMTL(0.5), matrices, torch.float32)
    for got, wanted in zip(weights_of(ExcessMTL(0.5), scaled, torch.float32), plain, strict=True):
        assert_close(got, wanted, rtol=1e-4, atol=1e-12)


def test_weights_are_on_the_simplex_and_saturate_without_nan() -> None:
    balancer = ExcessMTL(100.0)
    for weights in weights_of(balancer, stream(300), torch.float32):
        assert (weights >= 0).all()
        assert abs(weights.sum() - 1) < 1e-5
    assert balancer.log_weights.isfinite().all()
    assert balancer.log_weights.amin() < -1000


def test_a_saturated_weight_comes_back() -> None:
    """As logarithms a weight of zero is still a number: when the other task has converged, it grows again."""
    balancer = ExcessMTL(1.0)
    steady, weak = torch.tensor([[1.0], [0.1]]), torch.tensor([[0.0], [10.0]])
    weights_of(balancer, [torch.ones(2, 1)] + [steady] * 4000)
    assert balancer.log_weights[1].exp() < 1e-20
    assert weights_of(balancer, [weak] * 300)[-1][1] > 0.99


def test_one_task_has_all_the_weight() -> None:
    for weights in weights_of(ExcessMTL(1.0), stream(5, tasks=1)):
        assert weights.tolist() == [1.0]


def test_the_larger_excess_risk_gains() -> None:
    balancer = ExcessMTL(0.5)
    before = weights_of(balancer, [torch.ones(3, 2)])[-1].log()
    after = weights_of(balancer, [torch.tensor([[0.1, 0.1], [1.0, 1.0], [3.0, 3.0]])])[-1].log()
    gains = after - before
    assert gains[0] < gains[1] < gains[2]


# ------------------------------------------------------------------------------------- what is missing, zero, broken


def from_rows(*rows: Tensor | None) -> TaskGradients:
    """Task gradients as they arrive in a step: with a batch dimension; None for a task that takes no part."""
    return TaskGradients.from_parts(
        [[None if r is None else r[None].to(DEVICE) for r in rows]], [r is not None for r in rows]
    )


def test_an_absent_task_does_not_move() -> None:
    balancer = ExcessMTL(0.5)
    first, second, third = stream(3, tasks=3)
    balancer.weigh(from_rows(*first))
    balancer.weigh(from_rows(*second))
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    weights = balancer.weigh(from_rows(third[0], None, third[2]))
    assert weights[1] == 0
    assert (weights[[0, 2]] > 0).all()
    after = balancer.state_dict()
    for key, value in before.items():
        assert_close(after[key][1], value[1], **EXACT)
    assert (after["log_weights"][[0, 2]] != before["log_weights"][[0, 2]]).all()
    assert (after["squared_gradients"][[0, 2]] > before["squared_gradients"][[0, 2]]).all()
    # The others share what they had: the weights still sum to one with the one that is absent.
    assert_close(after["log_weights"].exp().sum().item(), 1.0)


def test_absent_tasks_do_not_change_how_the_others_compare() -> None:
    """Among tasks that are always present the odds are those of a run without the others."""
    matrices = stream(20, tasks=4)
    whole, part = ExcessMTL(0.5), ExcessMTL(0.5)
    for step, matrix in enumerate(matrices):
        absent = step % 3
        rows = [None if t == 3 or (t == 2 and absent) else row for t, row in enumerate(matrix)]
        together = whole.weigh(from_rows(*rows))
        alone = part.weigh(from_rows(*matrix[:2]))
        assert_close(together[0] / together[1], alone[0] / alone[1])


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_zero_first_gradient_waits(warmup: int) -> None:
    """No NaN, its baseline is its first that is not zero, and until then its weight stays."""
    matrices = stream(12, tasks=3)
    for matrix in matrices[:4]:
        matrix[1] = 0.0
    balancer = ExcessMTL(0.5, n_warmup_steps=warmup)
    all_weights = weights_of(balancer, matrices)
    assert all(w.isfinite().all() for w in all_weights)
    calls = max(1, warmup)
    for weights in all_weights[: 4 + calls]:
        assert_close(weights[1].item(), 1 / 3)
    assert (all_weights[4 + calls][1] - 1 / 3).abs() > 1e-4
    late = ExcessMTL(0.5, n_warmup_steps=warmup)
    weights_of(late, [matrix[1:2] for matrix in matrices[4:]])
    assert_close(balancer.baseline[1], late.baseline[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_far_larger_than_the_first_count_in_full(dtype: torch.dtype) -> None:
    balancer = ExcessMTL()
    weights_of(balancer, [torch.ones(2, 3), torch.tensor([[1.0, 1e10, 3.0], [1e14, 2.0, 1e20]])], dtype)
    # From 1e15 times the first on it counts as that: even 1e8 such steps are far from the end of float32.
    expected = torch.tensor([[2.0, 1 + 1e20, 10.0], [1 + 1e28, 5.0, 1e30]], dtype=dtype, device=DEVICE)
    assert_close(balancer.squared_gradients, expected)


def test_always_zero_gradients_change_nothing() -> None:
    balancer = ExcessMTL(1.0)
    for weights in weights_of(balancer, [torch.zeros(3, 4)] * 5):
        assert_close(weights, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_gradient_that_is_not_finite_changes_no_state(bad: float, step: int) -> None:
    matrices = stream(6, tasks=3)
    spoiled = matrices[step].clone()
    spoiled[1, 7] = bad
    balancer, reference = ExcessMTL(0.5), ExcessMTL(0.5)
    got = []
    for index, matrix in enumerate(matrices):
        if index == step:
            before = {key: value.clone() for key, value in balancer.state_dict().items() if value.numel()}
            shared = balancer(spoiled.to(DEVICE))
            assert not shared.isfinite().all()
            after = {key: value for key, value in balancer.state_dict().items() if key in before}
            if step:  # the first call gives the state its size
                assert_close(after, before, **EXACT)
        got.append(balancer.weigh(TaskGradients(matrix.to(DEVICE))))
    wanted = [reference.weigh(TaskGradients(matrix.to(DEVICE))) for matrix in matrices]
    assert_close(got, wanted, **EXACT)


# ----------------------------------------------------------------------------------------- on a representation


class Pixels(nn.Module):
    """A map whose size follows the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def pixel_model(balancer: ExcessMTL, dtype: torch.dtype = torch.float64) -> MultiTaskModel:
    return MultiTaskModel(Pixels(), [nn.Conv2d(3, 1, 1), nn.Conv2d(3, 2, 1)], balancer).to(DEVICE, dtype)


def pixel_step(model: MultiTaskModel, x: Tensor, scale: float = 1.0) -> None:
    losses = [p.square().sum() / len(x) for p in model(x)]
    (scale * model.scalarize(losses)).backward()


def batch(rows: int, size: int = 4, seed: int = 0) -> Tensor:
    return normal(rows, 2, size, size, gen=generator(seed)).to(DEVICE)


@pytest.mark.parametrize("feature_dim", [None, 1, -3, -1, 0])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_its_gradients_are_summed_over_the_batch(feature_dim: int | None, scale: float) -> None:
    """The state after some steps is that of the method alone on sums by hand, whatever the loss scale."""
    balancer, alone = ExcessMTL(0.5, feature_dim=feature_dim), ExcessMTL(0.5)
    model = pixel_model(balancer)
    for step in range(4):
        x = batch(5, seed=step)
        z = model.backbone(x).detach().requires_grad_()
        rows = []
        for head in model.heads:
            (gradient,) = torch.autograd.grad(head(z).square().sum() / len(x), z)
            summed = {
                None: lambda g: g.sum(0).flatten(),
                1: lambda g: g.sum((0, 2, 3)),
                -3: lambda g: g.sum((0, 2, 3)),
                -1: lambda g: g.sum((0, 1, 2)),
                0: lambda g: g.sum((1, 2, 3)),
            }[feature_dim](gradient)
            rows.append(summed)
        expected = alone.weigh(TaskGradients(torch.stack(rows)))
        pixel_step(model, x, scale)
        assert_close(model.task_weights, expected, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert_close(balancer.squared_gradients, alone.squared_gradients)


def test_batches_of_any_size() -> None:
    balancer = ExcessMTL()
    model = pixel_model(balancer)
    for rows in (5, 1, 8):
        pixel_step(model, batch(rows))
    assert balancer.squared_gradients.shape == (2, 48)


def test_images_of_any_size_by_feature() -> None:
    balancer = ExcessMTL(feature_dim=1)
    model = pixel_model(balancer)
    for size in (4, 6, 3):
        pixel_step(model, batch(5, size))
    assert balancer.squared_gradients.shape == (2, 3)


def test_images_of_another_size_are_refused_in_the_forward() -> None:
    balancer = ExcessMTL()
    model = pixel_model(balancer)
    pixel_step(model, batch(5))
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    with pytest.raises(ValueError, match=r"\(2, 108\); expected \(2, 48\) as before.*ExcessMTL\(feature_dim=1\)"):
        model(batch(5, 6))
    assert_close(dict(balancer.state_dict()), before, **EXACT)
    with torch.no_grad():
        model(batch(5, 6))  # evaluation may have another size
    model.eval()
    model(batch(5, 6))
    model.train()
    balancer.reset()
    pixel_step(model, batch(5, 6))
    assert balancer.squared_gradients.shape == (2, 108)


def test_a_missing_feature_dim_is_refused_in_the_forward() -> None:
    model = pixel_model(ExcessMTL(feature_dim=4))
    with pytest.raises(ValueError, match=r"feature_dim=4 is no dimension of a representation of shape \(5, 3, 4, 4\)"):
        model(batch(5))


@pytest.mark.parametrize("feature_dim", [0, 1, 2, -2])
def test_of_parameters_each_entry_is_a_feature(feature_dim: int) -> None:
    """They have no dimension for that to be one of."""
    expected, model = (
        MultiTaskModel(nn.Linear(3, 4), [nn.Linear(4, 1), nn.Linear(4, 2)], balancer, gradients="parameters").to(DEVICE)
        for balancer in (ExcessMTL(0.5), ExcessMTL(0.5, feature_dim=feature_dim))
    )
    model.load_state_dict(expected.state_dict())
    for each in (expected, model):
        for step in range(2):
            x = normal(5, 3, gen=generator(step)).to(DEVICE, torch.float32)
            each.backward([p.square().mean() for p in each(x)])
    assert model.balancer.squared_gradients.shape == (2, 16)
    assert_close(model.task_weights, expected.task_weights, **EXACT)


def test_large_states_are_worked_on_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, blocks = ExcessMTL(0.5), ExcessMTL(0.5)
    gen = generator(3)
    batches = [[normal(3, 6, 2, gen=gen).to(DEVICE) for _ in range(5)] for _ in range(4)]
    batches[2][1][0, 0, 0] = math.nan
    steps = [TaskGradients.from_parts([rows], [True] * 5) for rows in batches]
    expected = [whole.weigh(step) for step in steps]
    monkeypatch.setattr(excess_mtl, "_AT_ONCE", 25)  # two tasks of twelve features at once
    assert_close([blocks.weigh(step) for step in steps], expected, **EXACT)
    assert_close(dict(blocks.state_dict()), dict(whole.state_dict()), **EXACT)
    assert len(blocks._blocks()) == 3


def test_several_tensors_and_complex_ones() -> None:
    gen = generator(4)
    real = [normal(3, 4, gen=gen) for _ in range(2)]
    imaginary = [torch.complex(normal(3, 2, gen=gen), normal(3, 2, gen=gen)) for _ in range(2)]
    gradients = TaskGradients.from_parts([[g.to(DEVICE) for g in real], [g.to(DEVICE) for g in imaginary]], [True] * 2)
    sums = gradients.batch_sums()
    expected = [
        torch.cat([r.sum(0), torch.view_as_real(i.sum(0)).flatten()]) for r, i in zip(real, imaginary, strict=True)
    ]
    assert_close(sums.cpu(), torch.stack(expected))
    balancer, alone = ExcessMTL(), ExcessMTL()
    assert_close(balancer.weigh(gradients), alone.weigh(TaskGradients(sums)))
    assert balancer.squared_gradients.shape == (2, 8)


def test_half_precision_gradients_are_summed_in_float32() -> None:
    ones = torch.full((4096, 3), 1.0, dtype=torch.float16, device=DEVICE)
    gradients = TaskGradients.from_parts([[ones, 20 * ones]], [True, True])
    assert gradients.batch_sums().dtype == torch.float32
    assert gradients.batch_sums().tolist() == [[4096.0] * 3, [81920.0] * 3]  # beyond what half can hold


def test_half_models_keep_their_state_in_float32() -> None:
    balancer = ExcessMTL(0.5)
    model = pixel_model(balancer, torch.float32).half()
    for step in range(3):
        pixel_step(model, batch(5, seed=step).half())
    assert {state.dtype for state in balancer.state_dict().values()} == {torch.float32}
    kept = {key: value.clone() for key, value in balancer.state_dict().items()}
    model.bfloat16()
    assert_close(dict(balancer.state_dict()), kept, **EXACT)
    model.double()
    assert {state.dtype for state in balancer.state_dict().values()} == {torch.float64}


def test_with_a_fork_of_its_own() -> None:
    balancer = ExcessMTL(0.5)
    for step in range(3):
        z = batch(4, seed=step).requires_grad_()
        shared = fork(z, balancer, 2)
        shared.scalarize([alias.square().sum() * (task + step) for task, alias in enumerate(shared.aliases)]).backward()
        assert_close(z.grad, sum(w * (task + step) * 2 * z for task, w in enumerate(shared.task_weights)).detach())
    assert balancer.squared_gradients.shape == (2, 32)


# ----------------------------------------------------------------------------------------------- arguments and state


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"robust_step_size": 0.0}, ValueError, r"robust_step_size: expected a positive finite number, got 0\.0"),
        ({"robust_step_size": -1}, ValueError, "robust_step_size: expected a positive finite number, got -1"),
        ({"robust_step_size": math.inf}, ValueError, "robust_step_size: expected a positive finite number, got inf"),
        ({"robust_step_size": math.nan}, ValueError, "robust_step_size: expected a positive finite number, got nan"),
        ({"robust_step_size": "1"}, TypeError, "robust_step_size: expected a number, got '1'"),
        ({"robust_step_size": True}, TypeError, "robust_step_size: expected a number, got True"),
        ({"n_warmup_steps": -1}, ValueError, "n_warmup_steps: expected at least 0, got -1"),
        ({"n_warmup_steps": 1.0}, TypeError, r"n_warmup_steps: expected an int, got 1\.0"),
        ({"feature_dim": 1.0}, TypeError, r"feature_dim: expected an int, got 1\.0"),
        ({"feature_dim": False}, TypeError, "feature_dim: expected an int, got False"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ExcessMTL(**arguments)


def test_repr_shows_the_options() -> None:
    assert repr(ExcessMTL(1)) == "ExcessMTL(robust_step_size=1, n_warmup_steps=0)"
    assert repr(ExcessMTL(0.1, 5, 1)) == "ExcessMTL(robust_step_size=0.1, n_warmup_steps=5, feature_dim=1)"


def test_the_default_step_is_that_of_the_official_code_by_name_too() -> None:
    assert ExcessMTL().robust_step_size == by_name("excess-mtl").robust_step_size == 0.01


def test_another_matrix_is_refused_and_reset_allows_it() -> None:
    balancer = ExcessMTL()
    balancer(torch.ones(2, 3))
    for other in (torch.ones(2, 4), torch.ones(3, 3)):
        before = {key: value.clone() for key, value in balancer.state_dict().items()}
        with pytest.raises(ValueError, match=r"expected \(2, 3\) as before"):
            balancer(other)
        assert_close(dict(balancer.state_dict()), before, **EXACT)
    balancer.reset()
    assert_close(dict(balancer.state_dict()), dict(ExcessMTL().state_dict()), **EXACT)
    assert balancer(torch.ones(3, 4)).shape == (4,)


def test_a_state_of_other_tasks_is_refused() -> None:
    used = ExcessMTL()
    used(torch.ones(2, 3))
    with pytest.raises(ValueError, match="ExcessMTL holds the state of 2 tasks, but the model has 3 heads"):
        MultiTaskModel(nn.Linear(2, 3), [nn.Linear(3, 1) for _ in range(3)], used)
    assert used.num_tasks is None
    three = ExcessMTL()
    three.bind(3)
    with pytest.raises(RuntimeError, match=r"the checkpoint has \(2, 3\), the balancer \(3, 0\) \(tasks, features\)"):
        three.load_state_dict(used.state_dict())
    assert_close(three.log_weights.exp(), torch.full((3,), 1 / 3))
    alone = ExcessMTL()
    alone.load_state_dict(used.state_dict())
    assert_close(alone(torch.ones(2, 3)), used(torch.ones(2, 3)), **EXACT)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    used, other = ExcessMTL(), ExcessMTL()
    for step in range(2):
        used(stream(2, tasks=2, size=3)[step])
        other(stream(2, tasks=2, size=4)[step])
    before = {key: value.clone() for key, value in used.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"the checkpoint has \(2, 4\), the balancer \(2, 3\)"):
        used.load_state_dict(other.state_dict())
    assert_close(dict(used.state_dict()), before, **EXACT)


def test_a_checkpoint_in_half_precision_is_kept_in_float32() -> None:
    used, fresh = ExcessMTL(0.5), ExcessMTL(0.5)
    used(stream(1)[0].float())
    fresh.load_state_dict({key: value.half() for key, value in used.state_dict().items()})
    assert {value.dtype for value in fresh.state_dict().values()} == {torch.float32}


def test_a_first_gradient_of_nearly_nothing_does_not_stop_it() -> None:
    matrices = [torch.tensor([[1e-20 if step == 0 else 1.0, 0.0], [1.0, 1.0]]) for step in range(6)]
    balancer = ExcessMTL(0.1)
    assert weights_of(balancer, matrices, torch.float32)[-1][0] > 0.99
    assert all(state.isfinite().all() for state in balancer.state_dict().values())


def test_a_checkpoint_of_double_precision_stays_double() -> None:
    used, fresh = ExcessMTL(0.5), ExcessMTL(0.5)
    for matrix in stream(3):
        used(matrix)
    fresh.load_state_dict(used.state_dict())
    assert_close(dict(fresh.state_dict()), dict(used.state_dict()), **EXACT)
    assert fresh.log_weights.dtype == torch.float64
