"""Gradients on the shared parameters: against one autograd.grad per task, the paper's formula, and TorchJD."""

import copy
import shutil
from io import BytesIO
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.testing import assert_close
from torchjd import aggregation
from torchjd.autojac import jac_to_grad, mtl_backward

from mtlwrap import (
    IMTLG,
    UW,
    Compose,
    EqualWeighting,
    ExcessMTL,
    GradientBalancer,
    GradNorm,
    MultiTaskModel,
    Parameters,
    RotoGrad,
    TaskGradients,
    TorchJD,
    cached,
)
from tests.balancers.zoo import paper_weights
from tests.common import DEVICE, Normalised, grads, make_backbone, make_heads, make_input, make_losses, task_gradients

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def make_model(balancer: Any, gradients: Any = "parameters", dtype: torch.dtype = torch.float64) -> MultiTaskModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MultiTaskModel(make_backbone(), make_heads(), balancer, gradients=gradients)
    return model.to(device=DEVICE, dtype=dtype)


def jacobian(model: MultiTaskModel, x: Tensor, factors: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Tensor:
    """The tasks' gradients on all shared parameters as rows, by brute force."""
    z = model.backbone(x)
    losses = make_losses({t: model.heads[t](z.clone()) for t in "abc"}).values()
    rows = task_gradients([f * loss for f, loss in zip(factors, losses, strict=True)], list(model.shared_parameters()))
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def shared_gradient(model: MultiTaskModel) -> Tensor:
    return torch.cat([g.flatten() for g in grads(list(model.shared_parameters()))])


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize(
    ("make", "factors"), [(IMTLG, (1, 1, 1)), (lambda: Compose(loss=UW(), gradient=IMTLG()), (0.5, 0.5, 0.5))]
)
def test_imtl_g_on_parameters(make: Any, factors: tuple[float, ...], scale: float) -> None:
    model, x = make_model(make()), make_input()
    rows = jacobian(model, x, factors)
    alpha = paper_weights(rows).to(DEVICE)
    plain = torch.autograd.grad(
        sum(f * loss for f, loss in zip(factors, make_losses(model(x)).values(), strict=True)),
        list(model.head_parameters()),
    )
    (scale * model.scalarize(make_losses(model(x)))).backward()
    assert_close(shared_gradient(model), scale * (alpha @ rows), **CLOSE)
    assert_close(grads(list(model.head_parameters())), [scale * g for g in plain], **CLOSE)
    assert_close(model.task_weights, alpha * torch.tensor(factors, dtype=torch.float64, device=DEVICE), **CLOSE)
    # On the representation the weights are others.
    other = make_model(make(), "representation")
    other.backward(make_losses(other(x)))
    assert (other.task_weights - model.task_weights).abs().max() > 1e-3


def test_equals_torchjd() -> None:
    ours, theirs = make_model(IMTLG()), make_model(None, "representation")
    for step in range(3):
        x = make_input(step, dtype=torch.float64)
        ours.zero_grad()
        ours.backward(make_losses(ours(x)))
        theirs.zero_grad()
        z = theirs.backbone(x)
        losses = list(make_losses({t: theirs.heads[t](z.clone()) for t in "abc"}).values())
        mtl_backward(losses, features=z)
        jac_to_grad(list(theirs.shared_parameters()), aggregation.IMTLG())
        assert_close(grads(list(ours.parameters())), grads(list(theirs.parameters())), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["MGDA", "PCGrad", "AlignedMTL", "ConFIG", "TrimmedMean", "UPGrad", "Sum"])
def test_methods_of_torchjd_on_parameters(name: str) -> None:
    """By weights from the Gramian, by weights from the matrix, and without any weights: its aggregator on all rows."""

    def make() -> Any:
        return getattr(aggregation, name)(*((1,) if name == "TrimmedMean" else ()))

    try:
        model, theirs = make_model(TorchJD(make())), make()
    except ImportError as error:
        pytest.skip(str(error))
    x = make_input()
    rows = jacobian(model, x)
    torch.manual_seed(3)
    expected = theirs(rows)
    torch.manual_seed(3)
    (8.0 * model.scalarize(make_losses(model(x)))).backward()
    assert_close(shared_gradient(model), 8 * expected, rtol=1e-6, atol=1e-9)


def test_norm_ratio_of_a_million_in_float32() -> None:
    """Where TorchJD's pseudo-inverse fails: every projection is the same."""
    model, x = make_model(IMTLG(), dtype=torch.float32), make_input(dtype=torch.float32)
    factors = (1e-3, 1.0, 1e3)
    rows = jacobian(copy.deepcopy(model).double(), x.double(), factors)
    assert rows.norm(dim=1).max() / rows.norm(dim=1).min() > 1e6
    losses = make_losses(model(x))
    model.backward({t: f * loss for f, (t, loss) in zip(factors, losses.items(), strict=True)})
    projections = (rows / rows.norm(dim=1, keepdim=True)) @ shared_gradient(model).double()
    assert ((projections.max() - projections.min()) / projections.mean()) < 1e-5


def test_excess_mtl_is_the_published_one() -> None:
    balancer, alone = ExcessMTL(0.5), ExcessMTL(0.5)
    model = make_model(balancer)
    for step in range(4):
        rows = jacobian(model, make_input(step))
        expected = alone.weigh(TaskGradients(rows))
        model.zero_grad()
        model.backward(make_losses(model(make_input(step))))
        assert_close(model.task_weights, expected, **CLOSE)
        assert_close(shared_gradient(model), expected @ rows, **CLOSE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert balancer.squared_gradients.shape == (3, sum(p.numel() for p in model.shared_parameters()))


def test_grad_norm_sees_the_parameters() -> None:
    model, x = make_model(GradNorm(0.0)), make_input()
    model.backward(make_losses(model(x)))
    norms = jacobian(model, x).norm(dim=1)
    pull = torch.sign(norms - norms.mean()) * norms
    assert_close(model.balancer.logits.grad, pull - pull.sum() / 3)


def test_an_absent_task() -> None:
    model, x = make_model(IMTLG()), make_input()
    rows = jacobian(model, x)[[0, 2]]
    losses = make_losses(model(x))
    model.backward({"a": losses["a"], "c": losses["c"]})
    alpha = paper_weights(rows).to(DEVICE)
    assert_close(shared_gradient(model), alpha @ rows, **CLOSE)
    assert model.task_weights[1] == 0
    assert all(p.grad is None for p in model.heads["b"].parameters())


class Halves(nn.Module):
    """A backbone of which some parameters are never used, one is frozen, and each tensor is read by some tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"first": self.first(x) * self.frozen, "second": self.second(x).tanh()}


class Reads(nn.Module):
    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.name, self.layer = name, nn.Linear(size, 1)

    def forward(self, z: dict[str, Tensor]) -> Tensor:
        return self.layer(z[self.name])


def test_several_tensors_and_unused_parameters() -> None:
    model = MultiTaskModel(Halves(), [Reads("first", 4), Reads("second", 3)], IMTLG(), gradients="parameters")
    model = model.double().to(DEVICE)
    x = make_input()
    losses = [p.square().mean() for p in model(x)]
    rows = [
        torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
        for loss, part in zip(losses, (model.backbone.first, model.backbone.second), strict=True)
    ]
    norms = [torch.cat([g.flatten() for g in row]).norm() for row in rows]
    model.backward(losses)
    # Orthogonal gradients: the weights are as one over the norms.
    weights = [norms[1] / sum(norms), norms[0] / sum(norms)]
    for part, row, weight in zip((model.backbone.first, model.backbone.second), rows, weights, strict=True):
        assert_close(grads(list(part.parameters())), [weight * g for g in row])
    assert all(p.grad is None for p in model.backbone.unused.parameters())
    assert model.backbone.frozen.grad is None


def test_state_is_as_wide_as_all_parameters_also_where_none_is_reached() -> None:
    """Zeros stand for those that no task reaches, in this step or at all."""
    balancer = ExcessMTL(0.5)
    model = MultiTaskModel(Halves(), [Reads("first", 4), Reads("second", 3)], balancer, gradients="parameters")
    model = model.double().to(DEVICE)
    trained = [p for p in model.shared_parameters() if p.requires_grad]
    for step, present in enumerate([(0, 1), (0,), (1,), (0, 1)]):
        losses = [p.square().mean() for p in model(make_input(step))]
        rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in task_gradients(losses, trained)])
        squares = balancer.squared_gradients.clone()
        model.backward([loss if task in present else None for task, loss in enumerate(losses)])
        assert balancer.squared_gradients.shape == rows.shape
        for task in range(2):
            added = (rows[task] / balancer.sizes[task]).square() if task in present else 0.0
            assert_close(balancer.squared_gradients[task], squares[task] + added, **CLOSE)


def test_an_input_that_wants_a_gradient_gets_it() -> None:
    model, x = make_model(IMTLG()), make_input().requires_grad_()
    rows = jacobian(model, x)
    alpha = paper_weights(rows).to(DEVICE)
    z = model.backbone(x)
    losses = list(make_losses({t: model.heads[t](z.clone()) for t in "abc"}).values())
    (expected,) = torch.autograd.grad(sum(a * loss for a, loss in zip(alpha, losses, strict=True)), x)
    model.backward(make_losses(model(x)))
    assert_close(x.grad, expected, **CLOSE)
    assert_close(shared_gradient(model), alpha @ rows, **CLOSE)


def test_twice_through_one_graph_and_with_create_graph() -> None:
    model, x = make_model(IMTLG()), make_input()
    expected = paper_weights(jacobian(model, x)).to(DEVICE) @ jacobian(model, x)
    total = model.scalarize(make_losses(model(x)))
    total.backward(retain_graph=True)
    total.backward()
    assert_close(shared_gradient(model), 2 * expected, **CLOSE)
    found = torch.autograd.grad(
        model.scalarize(make_losses(model(x))), list(model.shared_parameters()), create_graph=True
    )
    assert_close(torch.cat([g.flatten() for g in found]), expected, **CLOSE)
    assert all(g.requires_grad for g in found)


def test_a_plain_sum_is_plain() -> None:
    model, x = make_model(IMTLG()), make_input()
    expected = jacobian(model, x).sum(0)
    sum(make_losses(model(x)).values()).backward()
    assert_close(shared_gradient(model), expected, **CLOSE)


def test_no_balancer_is_plain() -> None:
    model, x = make_model(EqualWeighting()), make_input()
    expected = jacobian(model, x).sum(0)
    for _ in range(3):  # the first time the losses are checked
        model.zero_grad()
        model.backward(make_losses(model(x)))
        assert_close(shared_gradient(model), expected, **CLOSE)


def test_gradients_can_be_asked_for() -> None:
    model, x = make_model(IMTLG()), make_input()
    rows = jacobian(model, x)
    with cached():
        model.backward(make_losses(model(x)))
        assert_close(model.task_gradients.gramian, rows @ rows.T)
        assert_close(model.task_gradients.matrix, rows)


class Strict(Normalised):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.5 * gradient


class Watched(nn.Module):
    """A backbone that someone looks into."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(5, 8), nn.Linear(8, 8), how
        if how == "a hook of a parameter":
            self.first.weight.register_hook(lambda gradient: 0.1 * gradient)
        if how == "a hook of a module":
            self.second.register_full_backward_hook(lambda module, before, after: (0.5 * before[0],))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.how == "a function":
            hidden = Normalised.apply(hidden)
        if self.how == "a strict function":
            hidden = Strict.apply(hidden)
        z = self.second(hidden)
        if self.how == "a hook of z" and z.requires_grad:
            z.register_hook(lambda gradient: 0.5 * gradient)
        return z


WATCHED = ["a hook of a parameter", "a hook of a module", "a function", "a strict function", "a hook of z"]


@pytest.mark.parametrize("how", WATCHED)
def test_who_looks_on_sees_one_pass_of_the_shared_gradient(how: str) -> None:
    """As in a plain backward of the weighted losses, with whatever the weights came to."""
    torch.manual_seed(0)
    heads = make_heads()
    model = MultiTaskModel(Watched(how), heads, IMTLG(), gradients="parameters").double().to(DEVICE)
    x = make_input()
    model.backward(make_losses(model(x)))
    found, weights = shared_gradient(model), model.task_weights
    model.zero_grad()
    z = model.backbone(x)
    losses = make_losses({t: model.heads[t](z.clone()) for t in "abc"}).values()
    sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
    assert_close(found, shared_gradient(model), **CLOSE)
    assert found.isfinite().all()


def test_a_hook_inside_the_backbone_sees_each_task_and_then_nothing() -> None:
    model, seen = make_model(IMTLG()), []

    def hook(gradient: Tensor | None) -> Tensor | None:
        seen.append(gradient)
        return None if gradient is None else 2 * gradient

    model.backbone[0].register_forward_hook(lambda *called: called[-1].register_hook(hook) and None)
    rows = 2 * jacobian(make_model(None), make_input())
    model.backward(make_losses(model(make_input())))
    assert [gradient is None for gradient in seen] == [False, False, False, True]
    assert_close(shared_gradient(model), paper_weights(rows) @ rows, **CLOSE)


def test_hooks_after_accumulation_run_once() -> None:
    model, x, calls = make_model(IMTLG()), make_input(), []
    for parameter in model.shared_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    model.backward(make_losses(model(x)))
    assert len(calls) == len(list(model.shared_parameters()))
    assert_close(sorted(c.sum().item() for c in calls), sorted(p.grad.sum().item() for p in model.shared_parameters()))


@pytest.mark.parametrize("make", [IMTLG, lambda: ExcessMTL(0.5)])
def test_without_a_shared_parameter_the_input_is_what_is_shared(make: Any) -> None:
    model = MultiTaskModel(nn.Flatten(), [nn.Linear(5, 1), nn.Linear(5, 2)], make(), gradients="parameters")
    reference = copy.deepcopy(model)
    reference._exact = "representation"
    found = []
    for each in (model, reference):
        each.double().to(DEVICE)
        x = make_input().requires_grad_()
        each.backward([p.square().mean() for p in each(x)])
        found.append(x.grad)
    assert_close(*found, **EXACT)
    assert (found[0] != 0).any()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.table(words).mean(1)


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_sparse_gradients_stay_sparse(refresh_every: int) -> None:
    gradients = Parameters(refresh_every=refresh_every)
    model = MultiTaskModel(Words(), [nn.Linear(4, 1), nn.Linear(4, 2)], IMTLG(), gradients=gradients).to(DEVICE)
    optimizer = torch.optim.SparseAdam(model.backbone.parameters())
    for _ in range(4):
        before = model.backbone.table.weight.detach().clone()
        model.zero_grad()
        model.backward([p.square().mean() for p in model(torch.tensor([[1, 2], [2, 3]], device=DEVICE))])
        assert model.backbone.table.weight.grad.layout == torch.sparse_coo
        optimizer.step()
        moved = (model.backbone.table.weight != before).any(1).tolist()
        assert moved == [row in (1, 2, 3) for row in range(10)]


def test_sparse_gradients() -> None:
    model = MultiTaskModel(Words(), [nn.Linear(4, 1), nn.Linear(4, 2)], IMTLG(), gradients="parameters").double()
    model.to(DEVICE)
    words = torch.tensor([[1, 2], [2, 3]], device=DEVICE)
    losses = [p.square().mean() for p in model(words)]
    rows = [torch.autograd.grad(x, model.backbone.table.weight, retain_graph=True)[0].to_dense() for x in losses]
    model.backward(losses)
    alpha = paper_weights(torch.stack([row.flatten() for row in rows])).to(DEVICE)
    gradient = model.backbone.table.weight.grad
    assert_close(gradient.to_dense(), sum(a * row for a, row in zip(alpha, rows, strict=True)))


class First(GradientBalancer):
    """No weighting: the first half of the first task's gradient, the second half of the others'."""

    def weigh(self, gradients: TaskGradients) -> None:
        return None

    def combine(self, gradients: TaskGradients) -> Tensor:
        matrix = gradients.matrix
        half = matrix.shape[1] // 2
        return torch.cat([matrix[0, :half], matrix[1:, half:].sum(0)])


def test_what_is_no_weighting() -> None:
    model, x = make_model(First()), make_input()
    rows = jacobian(model, x)
    half = rows.shape[1] // 2
    (8.0 * model.scalarize(make_losses(model(x)))).backward()
    assert_close(shared_gradient(model), 8 * torch.cat([rows[0, :half], rows[1:, half:].sum(0)]), **CLOSE)
    assert model.task_weights is None
    refreshed = make_model(First(), Parameters(refresh_every=2))
    with pytest.raises(ValueError, match="refresh_every needs a balancer that returns weights, which First does not"):
        refreshed.backward(make_losses(refreshed(x)))
    with pytest.raises(ValueError, match="whose input wants a gradient, needs a balancer that returns weights"):
        model.backward(make_losses(model(make_input().requires_grad_())))


# ----------------------------------------------------------------------------------------------------------- refreshing


def test_weights_are_refreshed_every_third_step() -> None:
    model = make_model(IMTLG(), Parameters(refresh_every=3))
    for step in range(7):
        x = make_input(step)
        rows = jacobian(model, x)
        if step % 3 == 0:
            alpha = paper_weights(rows).to(DEVICE)
        model.zero_grad()
        model.backward(make_losses(model(x)))
        rtol = 1e-9 if step % 3 == 0 else 1e-6  # kept in float32
        assert_close(model.task_weights, alpha, rtol=rtol, atol=0)
        assert_close(shared_gradient(model), alpha @ rows, rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)


@pytest.mark.parametrize("weigh_heads", [False, True])
def test_between_refreshings_there_are_no_gradients_to_ask_for(weigh_heads: bool) -> None:
    """Those on the representation would be mistaken for those on the parameters."""
    model, x = make_model(IMTLG(), Parameters(refresh_every=2)), make_input()
    model._junction.weigh_heads = weigh_heads
    for step in range(4):
        with cached():
            model.backward(make_losses(model(x)))
            if step % 2:
                assert model.task_gradients is None
            else:
                assert_close(model.task_gradients.matrix, jacobian(model, x))


@pytest.mark.parametrize("how", ["another balancer", "reset"])
def test_another_balancer_weighs_at_once(how: str) -> None:
    """Not with its predecessor's weights until the next refreshing."""
    model, x = make_model(IMTLG(), Parameters(refresh_every=5)), make_input()
    model.backward(make_losses(model(x)))
    first = model.task_weights
    if how == "reset":
        with torch.no_grad():
            next(model.shared_parameters()).mul_(3.0)
        model.schedule.reset()
    else:
        model.balancer = ExcessMTL()
    model.backward(make_losses(model(x)))
    expected = paper_weights(jacobian(model, x)).to(DEVICE) if how == "reset" else torch.full_like(first, 1 / 3)
    assert_close(model.task_weights, expected, rtol=1e-9, atol=0)
    assert not torch.allclose(model.task_weights, first, rtol=1e-2)


def test_a_loss_balancer_has_nothing_to_refresh() -> None:
    model, x = make_model(UW(), Parameters(refresh_every=2)), make_input()
    before = {key: value.clone() for key, value in model.schedule.state_dict().items()}
    for _ in range(3):
        model.backward(make_losses(model(x)))
    assert_close(dict(model.schedule.state_dict()), before, **EXACT)


def test_a_task_that_comes_back_is_weighed_at_once() -> None:
    model, x = make_model(IMTLG(), Parameters(refresh_every=100)), make_input()
    losses = make_losses(model(x))
    model.backward({"a": losses["a"], "b": losses["b"]})
    assert model.task_weights[2] == 0
    losses = make_losses(model(x))
    model.backward({"b": losses["b"]})  # known: the weight of the last weighing
    first = model.task_weights
    assert first[0] == 0
    assert 0 < first[1] < 1
    rows = jacobian(model, x)
    model.zero_grad()
    model.backward(make_losses(model(x)))
    assert_close(shared_gradient(model), paper_weights(rows).to(DEVICE) @ rows, **CLOSE)


@pytest.mark.parametrize("resumed", [False, True])
def test_known_are_the_tasks_of_the_last_weighing(resumed: bool) -> None:
    """Neither those of earlier ones, which have no weight any more, nor those of the last step, which used it."""
    model = make_model(IMTLG(), Parameters(refresh_every=3))
    weighings = 0
    weigh = model.balancer.weigh

    def counting(gradients: TaskGradients) -> Tensor:
        nonlocal weighings
        weighings += 1
        return weigh(gradients)

    model.balancer.weigh = counting
    found = []
    for step, present in enumerate(["abc", "b", "abc", "ab", "b", "ab", "ab", "abc", "a", "abc"]):
        losses = make_losses(model(make_input(step)))
        model.backward({task: losses[task] for task in present})
        if resumed:
            model.load_state_dict(model.state_dict())
        found.append(weighings)
    # Weighed: abc; ab, as it is time; ab, again; abc, for c is new.
    assert found == [1, 1, 1, 2, 2, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("saved_after", [1, 2, 3, 5])
def test_the_schedule_is_resumed_to_the_bit(saved_after: int) -> None:
    def train(model: MultiTaskModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            losses = dict(make_losses(model(make_input(step, dtype=torch.float32))))
            if step < 2:
                del losses["c"]
            model.backward(losses)
            optimizer.step()

    def fresh() -> tuple[MultiTaskModel, torch.optim.Optimizer]:
        model = make_model(IMTLG(), Parameters(refresh_every=4), torch.float32)
        return model, torch.optim.Adam(model.param_groups(lr=0.05))

    whole, optimizer = fresh()
    train(whole, optimizer, range(saved_after))
    buffer = BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(whole, optimizer, range(saved_after, 8))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, optimizer = fresh()
    train(resumed, optimizer, range(20, 23))  # another past, which loading must undo
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(saved_after, 8))
    assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), **EXACT)


def test_weights_that_are_not_finite_are_not_kept() -> None:
    model, x = make_model(IMTLG(), Parameters(refresh_every=2)), make_input()
    losses = make_losses(model(x))
    model.backward({**losses, "a": losses["a"] * torch.nan})
    assert not shared_gradient(model).isfinite().all()
    model.zero_grad()
    model.backward(make_losses(model(x)))  # weighed anew, although it is not yet time
    rows = jacobian(model, x)
    assert_close(shared_gradient(model), paper_weights(rows).to(DEVICE) @ rows, **CLOSE)


# -------------------------------------------------------------------------------------------------------- what it bears


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = make_backbone(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=self.reentrant)


def test_checkpointing() -> None:
    plain, x = make_model(IMTLG()), make_input()
    plain.backward(make_losses(plain(x)))
    for reentrant in (False, True):
        backbone = Checkpointed(reentrant).double().to(DEVICE)
        backbone.layers.load_state_dict(plain.backbone.state_dict())
        heads = copy.deepcopy({t: plain.heads[t] for t in "abc"})
        model = MultiTaskModel(backbone, heads, IMTLG(), gradients="parameters")
        given = x.clone().requires_grad_(reentrant)
        if reentrant:
            with pytest.raises(ValueError, match="which a reentrant checkpoint does not allow"):
                model.backward(make_losses(model(given)))
        else:
            model.backward(make_losses(model(given)))
            assert_close(shared_gradient(model), shared_gradient(plain), **CLOSE)


class SometimesCheckpointed(nn.Module):
    """Only long batches are worth a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_backbone()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 6:
            return self.layers(x)
        return torch.utils.checkpoint.checkpoint(self.layers, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("rows", [(3, 6), (6, 3)])
def test_the_backbone_of_every_batch_is_looked_at(rows: tuple[int, int]) -> None:
    model = MultiTaskModel(SometimesCheckpointed(), make_heads(), IMTLG(), gradients="parameters").double().to(DEVICE)
    first, second = model(make_input(0, rows[0]), tasks="a"), model(make_input(1, rows[1]), tasks=["b", "c"])
    with pytest.raises(ValueError, match="which a reentrant checkpoint does not allow"):
        model.backward(make_losses({**first, **second}))


class Wide(nn.Module):
    """What it saves for its backward inductor gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)).relu())


@needs_a_compiler
@pytest.mark.parametrize("donated", [False, True])
def test_a_compiled_backbone(donated: bool) -> None:
    torch._dynamo.reset()
    x, heads = make_input(), make_heads()
    plain = MultiTaskModel(Wide(), heads, IMTLG(), gradients="parameters").double().to(DEVICE)
    model = copy.deepcopy(plain)
    plain.backward(make_losses(plain(x)))
    with torch._functorch.config.patch(donated_buffer=donated):
        model.backbone.compile()
        losses = make_losses(model(x))
        if donated:
            with pytest.raises(ValueError, match=r"donated_buffer = False"):
                model.backward(losses)
        else:
            model.backward(losses)
            assert_close(shared_gradient(model), shared_gradient(plain), rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


def test_batch_norm_and_dropout_run_once() -> None:
    backbone = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model = MultiTaskModel(backbone, [nn.Linear(8, 1), nn.Linear(8, 1)], IMTLG(), gradients="parameters").double()
    model.to(DEVICE)
    model.backward([p.square().mean() for p in model(make_input())])
    assert model.backbone[1].num_batches_tracked == 1


def test_what_rotates_is_refused() -> None:
    with pytest.raises(ValueError, match="RotoGrad balances gradients on the representation, not on parameters"):
        make_model(RotoGrad(8))


# ----------------------------------------------------------------------------------------------------------- long rows


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", ["several", "checkpoint", "recurrent", "function"])
def test_all_kinds_of_backbones(name: str, vectorize: bool) -> None:
    """One after the other, and together: the weighted sum of what one autograd.grad per task gives."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(1, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, :, None])[0][:, -1]

    torch.manual_seed(0)
    kinds = {"checkpoint": (Checkpointed, False), "recurrent": (Recurrent,), "function": (Watched, "a function")}
    make, *given = kinds.get(name, (make_backbone,))
    backbone = make(*given)
    model = MultiTaskModel(backbone, make_heads(), IMTLG(), gradients=Parameters(vectorize=vectorize))
    model.double().to(DEVICE)
    x = make_input()
    rows = jacobian(model, x)
    alpha = paper_weights(rows).to(DEVICE)
    with cached():
        model.backward(make_losses(model(x)))
        assert_close(model.task_gradients.matrix, rows, **CLOSE)
        assert_close(model.task_gradients.gramian, rows @ rows.T, **CLOSE)
    assert_close(model.task_weights, alpha, **CLOSE)
    if name != "function":  # whose backward is not linear: it is run once more, for the weighted sum
        assert_close(shared_gradient(model), alpha @ rows, **CLOSE)


class Mixed(nn.Module):
    """Parameters of three types next to each other; of two tensors each is read by some tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(5, 4))
        self.offset = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.unread = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.table = nn.Embedding(6, 4, sparse=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = ((x.float() @ self.first).double() + self.offset).float() + self.table.weight.new_ones(())
        words = self.table(torch.arange(len(x), device=x.device) % 6)
        return {"first": (hidden * self.turn).abs(), "second": hidden.tanh() + words}


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("absent", [False, True])
def test_parameters_of_several_types(absent: bool, vectorize: bool) -> None:
    torch.manual_seed(0)
    heads = [Reads("first", 4), Reads("second", 4), Reads("second", 4), Reads("first", 4)]
    model = MultiTaskModel(Mixed(), heads, IMTLG(), gradients=Parameters(vectorize=vectorize)).to(DEVICE)
    x, shared = make_input(), list(model.shared_parameters())
    rows = []
    with cached():
        losses: list[Tensor | None] = [p.square().mean() for p in model(x)]
        for loss in losses:
            found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
            rows.append(
                [p.new_zeros(p.shape) if g is None else g.to_dense() for g, p in zip(found, shared, strict=True)]
            )
        if absent:
            losses[1] = None
        model.backward(losses)
        weights = model.task_weights
        found_matrix = model.task_gradients.matrix
    flat = [torch.cat([_real(g) for g in row]) for row in rows]
    expected = torch.stack([torch.zeros_like(r) if absent and t == 1 else r for t, r in enumerate(flat)])
    assert_close(found_matrix, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert (weights[1] == 0) == absent
    for index, parameter in enumerate(shared):
        if parameter is model.backbone.unread:
            assert parameter.grad is None
        else:
            total = sum(w.to(row[index].real) * row[index] for w, row in zip(weights, rows, strict=True))
            assert parameter.grad.dtype == parameter.dtype
            assert_close(parameter.grad.to_dense(), total, rtol=1e-4, atol=1e-5)


def _real(gradient: Tensor) -> Tensor:
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).flatten().double()


def test_gradients_do_not_overlap() -> None:
    """They lie in one piece of memory."""
    model = make_model(IMTLG())
    model.backward(make_losses(model(make_input())))
    before = [p.grad.clone() for p in model.shared_parameters()]
    for index, parameter in enumerate(model.shared_parameters()):
        parameter.grad.fill_(index)
        before[index] = torch.full_like(parameter, index)
        assert_close([p.grad for p in model.shared_parameters()], before, **EXACT)


def test_what_cannot_be_run_together_says_so() -> None:
    class Branches(Normalised):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient if gradient.sum() > 0 else 2 * gradient

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return Branches.apply(self.layer(x))

    model = MultiTaskModel(Branching(), make_heads(), IMTLG(), gradients=Parameters(vectorize=True)).double().to(DEVICE)
    with pytest.raises(ValueError, match="vectorize=True: the backbone's backward cannot be run for all tasks at once"):
        model.backward(make_losses(model(make_input())))


def test_together_and_refreshed() -> None:
    model = make_model(IMTLG(), Parameters(refresh_every=2, vectorize=True))
    plain = make_model(IMTLG(), Parameters(refresh_every=2))
    for step in range(4):
        for each in (model, plain):
            each.zero_grad()
            each.backward(make_losses(each(make_input(step))))
        assert_close(shared_gradient(model), shared_gradient(plain), **CLOSE)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (0, ValueError, "refresh_every: expected at least 1, got 0"),
        (1.5, TypeError, r"refresh_every: expected an int, got 1\.5"),
        (True, TypeError, "refresh_every: expected an int, got True"),
    ],
)
def test_bad_arguments(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Parameters(refresh_every=given)


def test_vectorize_is_a_bool() -> None:
    with pytest.raises(TypeError, match="vectorize: expected a bool, got 2"):
        Parameters(vectorize=2)
