"""What is decided before the backward pass: batches of their own per task, weighed heads, auxiliary losses that read
predictions; and several losses to a task. Against brute force."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

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
    cached,
)
from tests.balancers.zoo import paper_weights
from tests.common import DEVICE, grads, make_backbone, make_heads, make_input, make_losses

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def make_model(balancer: Any, **options: Any) -> MultiTaskModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MultiTaskModel(make_backbone(), make_heads(), balancer, **options)
    return model.to(device=DEVICE, dtype=torch.float64)


class Given(GradientBalancer):
    """These weights, one of them negative."""

    def weigh(self, gradients: TaskGradients) -> Tensor:
        weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64, device=gradients.active.device)
        return torch.where(gradients.active, weights, 0.0)


def by_task(model: MultiTaskModel, inputs: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """For each task, from its own batch: gradients on z, on the shared parameters, on its head's."""
    found = {}
    for task, x in inputs.items():
        z = model.backbone(x)
        loss = make_losses({task: model.heads[task](z.clone())})[task]
        shared, head = list(model.shared_parameters()), list(model.heads[task].parameters())
        on_z, *rest = torch.autograd.grad(loss, [z, *shared, *head])
        found[task] = {"z": on_z, "shared": rest[: len(shared)], "head": rest[len(shared) :]}
    return found


def weighted(found: dict[str, dict[str, Any]], weights: Any) -> list[Tensor]:
    rows = [task["shared"] for task in found.values()]
    return [sum(w * g for w, g in zip(weights, gs, strict=True)) for gs in zip(*rows, strict=True)]


BATCHES = {"a": (1, 6), "b": (2, 3), "c": (2, 3)}


def batches() -> dict[str, Tensor]:
    return {task: make_input(seed, rows=rows) for task, (seed, rows) in BATCHES.items()}


def joint_losses(model: MultiTaskModel) -> dict[str, Tensor]:
    """Task a has a batch of six, b and c share one of three."""
    x = batches()
    return make_losses({**model(x["a"], tasks="a"), **model(x["b"], tasks=["b", "c"])})


# -------------------------------------------------------------------------------------------------- batches per task


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(
    ("make", "factor"), [(IMTLG, 1.0), (lambda: Compose(loss=UW(), gradient=IMTLG()), 0.5), (EqualWeighting, 1.0)]
)
def test_batches_of_their_own_are_balanced_jointly(make: Any, factor: float, scale: float) -> None:
    model = make_model(make())
    found = by_task(model, batches())
    sums = torch.stack([factor * task["z"].sum(0) for task in found.values()])
    alpha = paper_weights(sums).to(DEVICE) if make is not EqualWeighting else torch.ones(3, device=DEVICE).double()
    for _ in range(2):  # the first time the losses are checked
        model.zero_grad()
        (scale * model.scalarize(joint_losses(model))).backward()
        assert_close(grads(list(model.shared_parameters())), weighted(found, scale * factor * alpha), **CLOSE)
        for task in "abc":
            own = [scale * factor * g for g in found[task]["head"]]
            assert_close(grads(list(model.heads[task].parameters())), own, **CLOSE)
        assert_close(model.task_weights, factor * alpha, **CLOSE)


@pytest.mark.parametrize(("make", "factor"), [(EqualWeighting, 1.0), (UW, 0.5), (IMTLG, 1.0)])
@pytest.mark.parametrize("absent", ["", "b"])
def test_what_is_shown_of_batches_of_their_own(make: Any, factor: float, absent: str) -> None:
    """Whether or not the balancer looks at gradients: those of every task, summed over its batch."""
    model = make_model(make())
    found = by_task(model, batches())
    sums = torch.stack([factor * task["z"].sum(0) * (name != absent) for name, task in found.items()])
    for _ in range(2):  # the first time the losses are checked
        with cached():
            losses = joint_losses(model)
            (1024.0 * model.scalarize({task: loss for task, loss in losses.items() if task != absent})).backward()
            assert_close(model.task_gradients.gramian, sums @ sums.T, **CLOSE)
        assert model.task_gradients is None


def test_nothing_is_shown_of_batches_with_other_features() -> None:
    widths = {"a": 2, "b": 3}
    model = MultiTaskModel(nn.Linear(4, 6), {task: nn.Identity() for task in widths})
    with cached():
        first, second = (model(torch.randn(5, width, 4), tasks=task)[task] for task, width in widths.items())
        model.backward({"a": first.sum(), "b": second.sum()})
        assert model.task_gradients is None
    assert model.task_weights.tolist() == [1.0, 1.0]
    assert_close(model.backbone.bias.grad, torch.full((6,), 5.0 * (2 + 3)))


def test_one_task_of_one_batch_is_absent() -> None:
    model = make_model(IMTLG())
    found = by_task(model, batches())
    losses = joint_losses(model)
    model.backward({"a": losses["a"], "c": losses["c"]})
    del found["b"]
    alpha = paper_weights(torch.stack([task["z"].sum(0) for task in found.values()])).to(DEVICE)
    assert_close(grads(list(model.shared_parameters())), weighted(found, alpha), **CLOSE)
    assert all(p.grad is None for p in model.heads["b"].parameters())


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_batches_per_task_on_parameters(refresh_every: int) -> None:
    model = make_model(IMTLG(), gradients=Parameters(refresh_every=refresh_every))
    found = by_task(model, batches())
    rows = torch.stack([torch.cat([g.flatten() for g in task["shared"]]) for task in found.values()])
    alpha = paper_weights(rows).to(DEVICE)
    for step in range(3):
        model.zero_grad()
        model.backward(joint_losses(model))
        kept = refresh_every == 2 and step == 1
        assert_close(
            grads(list(model.shared_parameters())), weighted(found, alpha), rtol=1e-5 if kept else 1e-9, atol=1e-9
        )


def test_state_is_that_of_a_representation() -> None:
    """The same state whether the tasks share a batch or each has its own."""
    shared, apart = make_model(ExcessMTL(0.5)), make_model(ExcessMTL(0.5))
    for step in range(3):
        x = make_input(step)
        shared.zero_grad()
        apart.zero_grad()
        shared.backward(make_losses(shared(x)))
        apart.backward(make_losses({t: apart(x, tasks=t)[t] for t in "abc"}))
        assert_close(grads(list(apart.parameters())), grads(list(shared.parameters())), **CLOSE)
    assert_close(dict(apart.state_dict()), dict(shared.state_dict()), **CLOSE)


def test_rotations_learn_from_batches_of_their_own() -> None:
    model = make_model(RotoGrad(8))
    model.backward(joint_losses(model))
    assert (model.balancer.rotations.angles.grad != 0).any(dim=1).all()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_what_a_balancer_learns_comes_once_for_all_batches(scale: float) -> None:
    """From one fork only, times the loss scale, as every gradient."""
    model = make_model(GradNorm(0.0))
    norms = torch.stack([task["z"].sum(0).norm() for task in by_task(model, batches()).values()])
    pull = torch.sign(norms - norms.mean()) * norms
    (scale * model.scalarize(joint_losses(model))).backward()
    assert_close(model.balancer.logits.grad, (scale * (pull - pull.sum() / 3)).to(model.balancer.logits), **CLOSE)


class Both(nn.Module):
    """Two tensors, of which one will not be read."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.unread = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(x), self.unread(x)


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, z: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer(z[0])


@pytest.mark.parametrize("weigh_heads", [False, True])
def test_what_no_task_reads_gets_no_gradient(weigh_heads: bool) -> None:
    """Not zeros, which momentum and weight decay would act on; as without a decision ahead of the heads."""
    model = MultiTaskModel(Both(), [First(), First()], IMTLG(), weigh_heads=weigh_heads).double().to(DEVICE)
    model.backward([p.square().mean() for p in model(make_input())])
    assert all((p.grad != 0).any() for p in model.backbone.read.parameters())
    assert all(p.grad is None for p in model.backbone.unread.parameters())


def test_the_gradients_can_be_asked_for() -> None:
    model = make_model(IMTLG())
    found = by_task(model, batches())
    sums = torch.stack([task["z"].sum(0) for task in found.values()])
    with cached():
        model.backward(joint_losses(model))
        assert_close(model.task_gradients.gramian, sums @ sums.T)


def test_batches_with_other_features_are_refused() -> None:
    model = MultiTaskModel(nn.Identity(), [nn.Flatten(), nn.Flatten()], IMTLG())
    first, second = torch.ones(2, 3, 4, requires_grad=True), torch.ones(2, 3, 5, requires_grad=True)
    losses = [model(first, tasks=0)[0].sum(), model(second, tasks=1)[1].sum()]
    with pytest.raises(ValueError, match=r"must agree in all but the number of samples, got '0'.*\(3, 4\).*'1'"):
        model.backward(losses)


# ------------------------------------------------------------------------------------------------------ weighed heads


@pytest.mark.parametrize("gradients", ["representation", "parameters"])
def test_weights_reach_the_heads_but_never_negative_ones(gradients: str) -> None:
    model = make_model(Given(), weigh_heads=True, gradients=gradients)
    found = by_task(model, dict.fromkeys("abc", make_input()))
    total = model.scalarize(make_losses(model(make_input())))
    assert_close(total.detach(), sum(make_losses(model(make_input())).values()).detach())
    (4.0 * total).backward()
    weights = [0.5, -2.0, 3.0]
    assert_close(grads(list(model.shared_parameters())), weighted(found, [4 * w for w in weights]), **CLOSE)
    for task, weight in zip("abc", weights, strict=True):
        own = [4 * max(weight, 0.0) * g for g in found[task]["head"]]
        assert_close(grads(list(model.heads[task].parameters())), own, **CLOSE)
    assert_close(model.task_weights, torch.tensor(weights, dtype=torch.float64, device=DEVICE))


def test_weighed_heads_of_a_composition() -> None:
    """Heads see both factors; the loss balancer's own parameters see neither weight."""
    model = make_model(Compose(loss=UW(), gradient=Given()), weigh_heads=True)
    reference = make_model(UW())
    found = by_task(model, dict.fromkeys("abc", make_input()))
    for each in (model, reference):
        each.backward(make_losses(each(make_input())))
    assert_close(grads(list(model.shared_parameters())), weighted(found, [0.25, -1.0, 1.5]), **CLOSE)
    for task, factor in zip("abc", [0.25, 0.0, 1.5], strict=True):
        own = [factor * g for g in found[task]["head"]]
        assert_close(grads(list(model.heads[task].parameters())), own, **CLOSE)
    assert_close(model.balancer.loss.log_variance.grad, reference.balancer.log_variance.grad)


def test_the_official_excess_mtl() -> None:
    """With heads weighed, as in the official code: one backward of the weighted sum."""
    model = make_model(ExcessMTL(0.5), weigh_heads=True)
    for step in range(3):
        x = make_input(step)
        model.zero_grad()
        model.backward(make_losses(model(x)))
        found = grads(list(model.model_parameters()))
        weights = model.task_weights
        model.zero_grad()
        sum(w * loss for w, loss in zip(weights, make_losses(model(x)).values(), strict=True)).backward()
        assert_close(found, grads(list(model.model_parameters())), **CLOSE)
    assert weights.max() > weights.min()


def test_weighed_heads_and_an_absent_task() -> None:
    model = make_model(Given(), weigh_heads=True)
    found = by_task(model, {"a": make_input(), "c": make_input()})
    losses = make_losses(model(make_input()))
    model.backward([losses["a"], None, losses["c"]])
    assert_close(grads(list(model.shared_parameters())), weighted(found, [0.5, 3.0]), **CLOSE)
    assert_close(grads(list(model.heads["c"].parameters())), [3 * g for g in found["c"]["head"]], **CLOSE)


def test_loss_balancers_weigh_heads_anyway() -> None:
    model, reference = make_model(UW(), weigh_heads=True), make_model(UW())
    for each in (model, reference):
        each.backward(make_losses(each(make_input())))
    assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), rtol=0, atol=0)


def test_weighed_heads_need_weights() -> None:
    class NoWeights(GradientBalancer):
        def weigh(self, gradients: TaskGradients) -> None:
            return None

        def combine(self, gradients: TaskGradients) -> Tensor:
            return gradients.matrix.sum(0)

    model = make_model(NoWeights(), weigh_heads=True)
    with pytest.raises(ValueError, match="needs a balancer that returns weights, which NoWeights does not"):
        model.backward(make_losses(model(make_input())))


class Ones(GradientBalancer):
    """A plain sum that looks at the gradients."""

    def weigh(self, gradients: TaskGradients) -> Tensor:
        return gradients.active.double()


def small_losses(predictions: Any) -> list[Tensor]:
    return [1e-6 * p.float().square().mean() for p in predictions]


@pytest.mark.parametrize("how", ["weighed heads", "batches", "auxiliary"])
def test_a_loss_scale_saves_small_half_precision_gradients(how: str) -> None:
    """They vanish in half precision without the scale, so they must be asked for with it."""
    torch.manual_seed(0)
    model = MultiTaskModel(nn.Linear(5, 8), [nn.Linear(8, 4), nn.Linear(8, 4)], Ones(), weigh_heads=how[0] == "w")
    exact, x = copy.deepcopy(model).double().to(DEVICE), torch.randn(16, 5)
    model.half().to(DEVICE)
    for each, scale, dtype in ((model, 65536.0, torch.float16), (exact, 1.0, torch.float64)):
        given = x.to(DEVICE, dtype)
        predictions = each(given) if how != "batches" else [each(given, tasks=0)[0], each(given, tasks=1)[1]]
        auxiliary = small_losses([predictions[0] + predictions[1]])[0] if how == "auxiliary" else None
        (scale * each.scalarize(small_losses(predictions), auxiliary=auxiliary)).backward()
    for half, double in zip(model.shared_parameters(), exact.shared_parameters(), strict=True):
        assert_close(half.grad.double() / 65536, double.grad, rtol=0.02, atol=0.02 * double.grad.abs().max().item())


def test_second_derivatives_are_refused() -> None:
    model = make_model(Given(), weigh_heads=True)
    total = model.scalarize(make_losses(model(make_input())))
    with pytest.raises(ValueError, match="create_graph=True: second derivatives are not known with batches"):
        torch.autograd.grad(total, list(model.shared_parameters()), create_graph=True)


def test_a_decision_made_early_is_spared_autocast() -> None:
    class Multiplies(Ones):
        dtypes: list[torch.dtype] = []  # noqa: RUF012

        def weigh(self, gradients: TaskGradients) -> Tensor:
            self.dtypes.append((gradients.matrix @ gradients.matrix.T).dtype)
            return super().weigh(gradients)

    model = make_model(Multiplies(), weigh_heads=True).float()
    total = model.scalarize(make_losses(model(make_input(dtype=torch.float32))))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        total.backward()
    assert Multiplies.dtypes == [torch.float32]


def test_nothing_moves_before_the_backward_pass() -> None:
    model = make_model(ExcessMTL(0.5), weigh_heads=True)
    model.backward(make_losses(model(make_input())))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    total = model.scalarize(make_losses(model(make_input(1))))
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    total.backward()
    assert (model.balancer.log_weights != before["balancer.log_weights"]).any()


# ----------------------------------------------------------------------------------------------------- auxiliary losses


@pytest.mark.parametrize("balancer", [IMTLG, EqualWeighting, UW])
@pytest.mark.parametrize("scope", [False, True])
def test_an_auxiliary_loss_may_read_predictions(balancer: Any, scope: bool) -> None:
    """Its gradient is added as it is, everywhere, and does not take part in the balancing."""
    model, reference = make_model(balancer()), make_model(balancer())

    def consistency(predictions: dict[str, Tensor]) -> Tensor:
        return (predictions["a"] - predictions["b"].sum(1, keepdim=True)).square().mean()

    for step in range(3):
        x = make_input(step)
        reference.zero_grad()
        reference.backward(make_losses(reference(x)))
        extra = torch.autograd.grad(
            consistency({t: reference.heads[t](reference.backbone(x).clone()) for t in "abc"}),
            list(reference.model_parameters()),
            allow_unused=True,
        )
        for parameter, gradient in zip(reference.model_parameters(), extra, strict=True):
            if gradient is not None:
                parameter.grad += gradient
        model.zero_grad()
        with cached() if scope else torch.enable_grad():
            predictions = model(x)
            total = model.scalarize(make_losses(predictions), auxiliary=consistency(predictions))
            total.backward()
        assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), **CLOSE)
        assert_close(model.task_weights, reference.task_weights, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("balancer", [EqualWeighting, UW, IMTLG])
def test_looking_on_at_an_auxiliary_loss_changes_nothing(balancer: Any, dtype: torch.dtype) -> None:
    """To the bit. Where nobody weighs the tasks' gradients, they are not told apart from those of the auxiliary."""
    found = []
    for looks in (False, True):
        model, x = make_model(balancer()).to(dtype), make_input(dtype=dtype)
        with cached() if looks else torch.enable_grad():
            predictions = model(x)
            extra = (predictions["a"] * predictions["b"].sum(1, keepdim=True)).mean()
            model.backward(make_losses(predictions), auxiliary=extra)
            if looks:
                assert (model.task_gradients is None) == (balancer is not IMTLG)
        found.append(grads(list(model.parameters())))
    assert_close(*found, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- losses in a task


@pytest.mark.parametrize("how", [list, tuple])
def test_several_losses_to_a_task_are_added_up(how: Any) -> None:
    model, reference = make_model("imtl"), make_model("imtl")
    first, second = make_losses(model(make_input())), make_losses(reference(make_input()))
    extra = model.heads["b"].bias.square().sum()
    model.backward({**first, "b": how([first["b"], None, extra])})
    reference.backward({**second, "b": second["b"] + reference.heads["b"].bias.square().sum()})
    assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), rtol=0, atol=0)


def test_no_loss_among_several_is_no_loss() -> None:
    model = make_model("imtl")
    losses = make_losses(model(make_input()))
    model.backward([losses["a"], [None, None], losses["c"]])
    assert model.task_weights[1] == 0


# ------------------------------------------------------------------------------------------- passes that never arrive


def decides_early(x: Tensor, way: str) -> tuple[Tensor, list[nn.Parameter], Callable[[], None]]:
    """A total whose decision comes before the forks, the parameters of the heads, and what spoils a head's backward."""
    model = make_model(IMTLG(), weigh_heads=way == "weighed heads")
    predictions = {**model(x, tasks="a"), **model(x[:2], tasks=["b", "c"])} if way == "batches" else model(x)

    def fail(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("pretended")

    auxiliary = sum(p.square().mean() for p in predictions.values()) if way == "auxiliary" else None
    total = model.scalarize(make_losses(predictions), auxiliary)
    return total, list(model.head_parameters()), lambda: predictions["a"].register_hook(fail)


@pytest.mark.parametrize("ends", ["with an error", "at the heads", "at the heads, twice"])
@pytest.mark.parametrize("way", ["weighed heads", "auxiliary", "batches"])
def test_a_backward_that_never_arrives_holds_nothing(way: str, ends: str) -> None:
    x = make_input()
    held = weakref.ref(x)
    total, heads, spoil = decides_early(x, way)
    if ends == "with an error":
        spoil()
        with pytest.raises(torch.OutOfMemoryError, match="pretended"):
            total.backward()
        torch.zeros((), requires_grad=True).backward()  # torch itself holds what waited when the error came, until then
    else:
        for _ in range(ends.count("twice") + 1):
            torch.autograd.grad(total, heads, retain_graph=True)
    del x, total, heads, spoil
    gc.collect()
    assert held() is None


def test_passes_that_arrived_are_forgotten_while_the_graph_is_kept() -> None:
    model = make_model(IMTLG(), weigh_heads=True)
    total = model.scalarize(make_losses(model(make_input())))
    for _ in range(3):
        total.backward(retain_graph=True)
    scalar_node = total.grad_fn
    assert not scalar_node.order.passes
