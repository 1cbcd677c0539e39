"""A backward pass in float16 that makes any gradient overflow moves no state, wherever in the network it does."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import DWA, Balancer, ExcessMTL, GradientBalancer, LossBalancer, MultiTaskModel, Parameters, fork
from mtlwrap import safeguard as module
from mtlwrap.safeguard import are_finite, leaves, of_leaves
from tests.common import (
    BALANCERS,
    DEVICE,
    float16_losses,
    make_backbone,
    make_heads,
    make_input,
    make_losses,
    make_model,
)

EXACT = {"rtol": 0, "atol": 0}
# What of the network overflows: a head's own gradient, which no balancer looks at, or the backbone's, which is made
# after it has decided.
PLACES = {"head": "heads.b.weight", "backbone": "backbone.0.weight"}


def batch(seed: int = 0) -> Tensor:
    return make_input(seed, dtype=torch.float32)


class Trainer:
    """Steps, and bad ones, in which a gradient is not finite and which are not made, as a GradScaler has it."""

    def __init__(self, model: MultiTaskModel) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.param_groups(lr=0.01), lr=0.01)

    def backward(self, seed: int, spoiled: str = "", bad: float = torch.inf) -> None:
        hooks = [p.register_hook(lambda g: g * bad) for n, p in self.model.named_parameters() if n == spoiled]
        assert len(hooks) == bool(spoiled)
        self.model.backward(float16_losses(self.model, batch(seed)))
        for hook in hooks:
            hook.remove()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bad_step(self, seed: int, spoiled: str, bad: float = torch.inf) -> None:
        before = self.moved()
        self.backward(seed, spoiled, bad)
        assert not all(p.grad.isfinite().all() for p in self.model.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        assert_close(self.moved(), before, **EXACT)

    def moved(self) -> dict[str, Tensor]:
        """The state, but for where rotations are counted from, which the forward takes from the last step."""
        return {key: value for key, value in self.state().items() if ".rotations." not in key}

    def state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.model.state_dict().items()}


def twins(balancer: Callable[[], Balancer | None], **options: Any) -> tuple[Trainer, Trainer]:
    first, second = (made(balancer(), **options) for _ in range(2))
    for model in (first, second):
        model.prepare(batch())
    return Trainer(first), Trainer(second)


def made(balancer: Balancer | None, **options: Any) -> MultiTaskModel:
    torch.manual_seed(1)
    return MultiTaskModel(make_backbone(), make_heads(), balancer, **options).to(DEVICE)


def assert_alike(first: Trainer, second: Trainer) -> None:
    assert_close(first.state(), second.state(), **EXACT)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BALANCERS)
def test_a_training_with_bad_steps_is_the_one_without(name: str, place: str) -> None:
    """The first step of all, one in the middle, two on end: to the bit."""
    trainer, reference = twins(BALANCERS[name])
    trainer.bad_step(10, PLACES[place])
    for seed in range(3):
        trainer.step(seed)
        reference.step(seed)
        trainer.bad_step(20 + seed, PLACES[place], torch.nan)
        trainer.bad_step(30 + seed, PLACES[place], -torch.inf)
    trainer.step(3)
    reference.step(3)
    assert_alike(trainer, reference)


@pytest.mark.parametrize("name", BALANCERS)
def test_good_steps_move_what_they_moved_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the safeguard as without; and without a way to know when a backward pass ends, it is not there."""
    trainer, reference = twins(BALANCERS[name])
    for seed in range(4):
        trainer.step(seed)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_queue", None)
        for seed in range(4):
            reference.step(seed)
    assert_alike(trainer, reference)


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("name", ["imtl-g", "imtl-first-losses", "excess-mtl", "grad-norm"])
def test_exact_gradients(name: str, refresh_every: int) -> None:
    """A weighing in a bad step is none: the next step weighs anew."""
    trainer, reference = twins(BALANCERS[name], gradients=Parameters(refresh_every=refresh_every))
    before = dict(trainer.model.balancer.state_dict())
    weights = None if trainer.model.schedule is None else trainer.model.schedule.weights.clone()
    trainer.backward(10, PLACES["head"])
    trainer.optimizer.zero_grad()
    assert_close(dict(trainer.model.balancer.state_dict()), before, **EXACT)
    if weights is not None:
        assert_close(trainer.model.schedule.weights, weights, **EXACT)
    for seed in range(4):
        trainer.step(seed)
        reference.step(seed)
    assert_alike(trainer, reference)


def test_a_bad_step_between_weighings_keeps_the_weights() -> None:
    trainer, _ = twins(BALANCERS["imtl-g"], gradients=Parameters(refresh_every=10))
    trainer.step(0)
    weights = trainer.model.schedule.weights.clone()
    trainer.backward(1, PLACES["head"])
    assert_close(trainer.model.schedule.weights, weights, **EXACT)
    assert_close(trainer.model.task_weights, weights, **EXACT)


@pytest.mark.parametrize("name", ["dwa", "excess-mtl", "rotograd", "imtl-first-losses", "imtl"])
def test_an_auxiliary_loss_counts_too(name: str) -> None:
    trainer, _ = twins(BALANCERS[name])
    before = trainer.state()
    losses = float16_losses(trainer.model, batch())
    trainer.model.backward(losses, auxiliary=(trainer.model.backbone[0].weight * torch.inf).sum())
    assert_close(trainer.state(), before, **EXACT)


# --- whose gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BALANCERS)
def test_of_accumulated_batches_those_count_that_spoil_nothing(name: str) -> None:
    """Also after one that has, when all gradients are spoiled already."""
    trainer, reference = twins(BALANCERS[name])
    trainer.backward(0)
    trainer.backward(1, PLACES["head"])
    trainer.backward(2)
    reference.backward(0)
    reference.backward(2)
    assert_alike(trainer, reference)


@pytest.mark.parametrize("name", ["dwa", "famo", "rlw", "excess-mtl", "rotograd", "grad-norm"])
def test_a_gradient_that_nobody_sets_to_zero_does_not_hold_the_state(name: str) -> None:
    """That of a head outside the optimizer, after it overflowed once."""
    trainer, reference = twins(BALANCERS[name])
    kept = trainer.model.heads["b"].weight
    for seed in range(3):
        kept.grad = torch.full_like(kept, torch.inf)
        trainer.backward(seed)
        reference.backward(seed)
        for each in (trainer, reference):
            each.optimizer.zero_grad()
    assert_alike(trainer, reference)


def test_a_gradient_that_is_spoiled_already_hides_no_other() -> None:
    trainer, _ = twins(BALANCERS["dwa"])
    kept = trainer.model.heads["a"][1].weight
    kept.grad = torch.full_like(kept, torch.inf)
    before = trainer.state()
    trainer.backward(0, PLACES["head"])
    assert_close(trainer.state(), before, **EXACT)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_set_to_zero_in_place(set_to_none: bool) -> None:
    trainer, reference = twins(BALANCERS["excess-mtl"])
    for each in (trainer, reference):
        each.backward(0)
        each.optimizer.zero_grad(set_to_none=set_to_none)
    trainer.backward(1, PLACES["head"])
    assert_alike(trainer, reference)


@pytest.mark.parametrize("name", ["dwa", "excess-mtl"])
def test_gradients_that_are_asked_for_and_not_kept(name: str) -> None:
    """autograd.grad moves the state as backward does."""
    trainer, reference = twins(BALANCERS[name])
    total = trainer.model.scalarize(float16_losses(trainer.model, batch(0)))
    torch.autograd.grad(total, [*trainer.model.model_parameters()])
    reference.backward(0)
    assert_alike(trainer, reference)


@pytest.mark.parametrize("name", ["dwa", "excess-mtl", "rotograd", "famo"])
def test_two_totals_in_one_backward_pass(name: str) -> None:
    trainer, reference = twins(BALANCERS[name])
    trainer.step(0)
    reference.step(0)
    before = trainer.moved()
    for each, bad in ((trainer, True), (reference, False)):
        losses = [float16_losses(each.model, batch(seed)) for seed in (1, 2)]
        hook = each.model.heads["b"].weight.register_hook(lambda g: g * torch.inf) if bad else None
        sum(each.model.scalarize(own) for own in losses).backward()
        if hook is not None:
            hook.remove()
    assert_close(trainer.moved(), before, **EXACT)
    assert any(not torch.equal(reference.state()[key], value) for key, value in before.items())


def test_a_second_pass_over_the_same_losses_takes_nothing_back() -> None:
    """The first one was sound, and the step with its gradients may have been made."""
    trainer, reference = twins(BALANCERS["dwa"])
    for each in (trainer, reference):
        total = each.model.scalarize(float16_losses(each.model, batch()))
        total.backward(retain_graph=True)
        if each is trainer:
            hook = each.model.heads["b"].weight.register_hook(lambda g: g * torch.inf)
            total.backward()
            hook.remove()
    assert_alike(trainer, reference)


def test_in_evaluation_mode_nothing_is_kept_or_looked_at() -> None:
    trainer, _ = twins(BALANCERS["excess-mtl"])
    trainer.model.eval()
    trainer.bad_step(0, PLACES["head"])


# --- balancers of one's own --------------------------------------------------------------------------------------


class CountsLosses(LossBalancer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen += losses.detach().sum()
        return losses.sum()


class CountsGradients(GradientBalancer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", torch.zeros(3))

    def weigh(self, gradients: Any) -> Tensor:
        if self.training:
            self.norms += gradients.norms
        return torch.ones_like(gradients.norms)


class CountsBoth(CountsLosses):
    weigh = CountsGradients.weigh

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", torch.zeros(3))


class Replaces(CountsLosses):
    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen = 0.5 * self.seen + losses.detach().sum()
        return losses.sum()


class ReplacesNorms(CountsGradients):
    def weigh(self, gradients: Any) -> Tensor:
        if self.training:
            self.norms = 0.5 * self.norms + gradients.norms
        return torch.ones_like(gradients.norms)


class Scales(GradientBalancer):
    """Keeps something of the losses, and something of the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("norms", torch.zeros(3))

    scalarize = CountsLosses.scalarize
    weigh = CountsGradients.weigh


KINDS = [CountsLosses, CountsBoth, CountsGradients, Replaces, ReplacesNorms, Scales]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_balancer_of_ones_own_needs_to_do_nothing_for_it(kind: type[Balancer], place: str) -> None:
    trainer, reference = twins(kind)
    trainer.step(0)
    reference.step(0)
    moved = trainer.state()
    assert all(moved[f"balancer.{name}"].any() for name, _ in trainer.model.balancer.named_buffers())
    trainer.bad_step(1, PLACES[place])
    trainer.step(2)
    reference.step(2)
    assert_alike(trainer, reference)


# --- without a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["shared", "own"])
@pytest.mark.parametrize("make", [lambda: DWA(1, num_tasks=2), lambda: ExcessMTL()])
def test_a_fork_on_its_own_looks_at_what_its_graph_leads_to(make: Callable[[], Balancer], place: str) -> None:
    torch.manual_seed(0)
    balancer, shared, own = make(), nn.Linear(4, 3), nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    for module_ in (balancer, shared, own):
        module_.to(DEVICE)

    def backward(seed: int, bad: bool) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            passage = fork(shared(x), balancer, 2)
            losses = [head(z).float().square().mean() for head, z in zip(own, passage.aliases, strict=True)]
        weight = shared.weight if place == "shared" else own[1].weight
        hook = weight.register_hook(lambda g: g * torch.inf) if bad else None
        passage.scalarize(losses).backward()
        if hook is not None:
            hook.remove()
        shared.zero_grad()
        own.zero_grad()

    backward(0, bad=False)
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    backward(1, bad=True)
    assert_close(dict(balancer.state_dict()), before, **EXACT)
    backward(2, bad=False)
    assert any(not torch.equal(value, before[key]) for key, value in balancer.state_dict().items())


class CallsItVariable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = "x"
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_the_leaves_of_a_graph() -> None:
    """As autograd itself finds them: those that get a gradient."""
    model = make_model()
    unused = nn.Parameter(torch.ones(()))
    total = CallsItVariable.apply(sum(make_losses(model(make_input())).values()))
    found = leaves(total.grad_fn)
    assert len(found) == len({id(leaf) for leaf in found})
    total.backward()
    expected = {id(p) for p in [*model.parameters(), unused] if p.grad is not None}
    assert {id(leaf) for leaf in found} == expected


# --- what is finite ----------------------------------------------------------------------------------------------


def with_gradient(gradient: Tensor) -> Tensor:
    parameter = torch.zeros(gradient.shape, dtype=gradient.dtype, device=DEVICE).requires_grad_()
    parameter.grad = gradient
    return parameter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_finite(dtype: torch.dtype) -> None:
    """Against isfinite on every number: of large ones the sum is beyond the type; infinities cancel out."""
    largest = 6e4 if dtype == torch.float16 else 3e38
    gradients = [torch.full((3, 40), largest, dtype=dtype, device=DEVICE) for _ in range(3)]
    assert are_finite(gradients).tolist() == [True] * 3
    for values in ([torch.inf], [-torch.inf], [torch.nan], [torch.inf, -torch.inf]):
        for index in range(3):
            for position in (0, 17, 118):
                spoiled = [gradient.clone() for gradient in gradients]
                place = spoiled[index].view(-1)[position : position + len(values)]
                place.copy_(torch.tensor(values, dtype=dtype))
                assert are_finite(spoiled).tolist() == [bool(g.isfinite().all()) for g in spoiled]


def test_the_gradients_that_count() -> None:
    """Of mixed types, sparse ones by their values; no empty ones, of which there is no largest."""
    float32, float64 = torch.ones(3, device=DEVICE), torch.ones(2, dtype=torch.float64, device=DEVICE)
    for value in (1.0, torch.inf):
        sparse = torch.sparse_coo_tensor([[0, 0]], [[1.0], [value]], (5, 1), device=DEVICE, check_invariants=True)
        tensors = [with_gradient(gradient) for gradient in (float32, float64, sparse, torch.zeros(0, 4, device=DEVICE))]
        found = of_leaves([*tensors, torch.zeros(2, requires_grad=True)])
        assert list(found) == [id(tensor) for tensor in tensors[:3]]
        assert are_finite(list(found.values())).tolist() == [True, True, value == 1.0]


def test_grads_are_left_as_they_are() -> None:
    trainer, reference = twins(BALANCERS["excess-mtl"])
    trainer.backward(0, PLACES["head"], bad=torch.inf)
    reference.backward(0)
    expected = dict(reference.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if name == PLACES["head"]:
            assert parameter.grad.isinf().any()
        else:
            assert_close(parameter.grad, expected[name].grad, **EXACT)


# --- what it leaves alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_no_scaler_is_needed_nobody_looks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(BALANCERS[name]())
    monkeypatch.setattr(module.Safeguard, "__init__", lambda *_: pytest.fail("looked"))
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
        losses = make_losses({task: p.float() for task, p in model(batch()).items()})
    model.backward(losses)


class Widens(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Narrows(nn.Linear):
    """A head in float16 whose prediction is not."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.half()).float()


@pytest.mark.parametrize("how", ["model", "head", "loss", "autocast around a wide representation"])
def test_other_ways_to_float16(how: str) -> None:
    balancer = DWA(1)
    heads = {**make_heads(), "c": Narrows(8, 2).half()} if how == "head" else make_heads()
    model = MultiTaskModel(Widens(5, 8) if "autocast" in how else nn.Linear(5, 8), heads, balancer).to(DEVICE)
    if how == "model":
        model.half()
    with torch.autocast(DEVICE.type, dtype=torch.float16, enabled="autocast" in how):
        losses = make_losses(model(batch().half() if how == "model" else batch()))
    losses = {task: loss.half() if (task, how) == ("a", "loss") else loss.float() for task, loss in losses.items()}
    model.heads["b"].weight.register_hook(lambda g: g * torch.inf)
    model.backward(losses)
    assert balancer.step == 0


@pytest.mark.parametrize("mode", ["no_grad", "eval", "float32"])
def test_another_forward_in_float32_changes_nothing(mode: str) -> None:
    """To look at predictions, or of a task with batches of its own."""
    trainer, _ = twins(BALANCERS["dwa"])
    losses = float16_losses(trainer.model, batch())
    if mode == "no_grad":
        with torch.no_grad():
            trainer.model(batch())
    else:
        trainer.model.train(mode != "eval")
        trainer.model(batch())
        trainer.model.train()
    before = trainer.state()
    trainer.model.heads["b"].weight.register_hook(lambda g: g * torch.inf)
    trainer.model.backward(losses)
    assert_close(trainer.state(), before, **EXACT)


def test_backward_passes_that_fail_leave_nothing() -> None:
    """Their copies of the state would add up where memory has run out."""
    trainer, _ = twins(BALANCERS["excess-mtl"])
    hook = trainer.model.backbone[0].weight.register_hook(lambda g: 1 / 0)
    for seed in range(10):
        with pytest.raises(ZeroDivisionError):
            trainer.backward(seed)
    hook.remove()
    gc.collect()
    assert len(trainer.model._junction._watched) == 0
    trainer.step(1)
    trainer.bad_step(2, PLACES["head"])


class Compressed(nn.Module):
    """A backbone with a gradient in another sparse form."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 8)
        self.weight = nn.Parameter(torch.eye(5).to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_parameters_in_other_sparse_forms() -> None:
    model = MultiTaskModel(Compressed(), make_heads(), DWA(1)).to(DEVICE)
    model.backbone.weight.grad = model.backbone.weight.detach().clone()
    model.backward(float16_losses(model, batch()))
    assert model.balancer.step == 1


class Constant(LossBalancer):
    """Saves a buffer for the backward pass, which may come twice; some cannot be written to at all."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        return (self.weights.to_dense() * losses).sum()


class SavesWhatItReplaces(LossBalancer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.ones(3))

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        self.weights = (0.5 * self.weights + losses.detach()).mean().expand(3)
        return (self.weights * losses).sum()


def test_a_buffer_that_is_replaced_by_what_the_graph_needs() -> None:
    model = made(SavesWhatItReplaces())
    total = model.scalarize(float16_losses(model, batch()))
    total.backward(retain_graph=True)
    total.backward()


class ReadsWhatItMoves(LossBalancer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(3))

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.average.mul_(0.9).add_(0.1 * losses.detach())
        return (losses / self.average).sum()


def test_a_buffer_that_moves_in_place_and_is_read_by_the_graph() -> None:
    trainer, _ = twins(ReadsWhatItMoves)
    total = trainer.model.scalarize(float16_losses(trainer.model, batch()))
    total.backward(retain_graph=True)
    total.backward()
    trainer.optimizer.zero_grad()
    trainer.bad_step(1, PLACES["head"])


@pytest.mark.parametrize(
    "weights", [torch.tensor([1.0, 2.0, 3.0]), torch.ones(()).expand(3), torch.eye(3)[0].to_sparse()], ids=str
)
def test_buffers_that_do_not_move(weights: Tensor) -> None:
    model = made(Constant(weights))
    first, second = (model.scalarize(float16_losses(model, batch(seed))) for seed in range(2))
    first.backward(retain_graph=True)
    second.backward()
    first.backward()


@pytest.mark.parametrize("name", ["imtl", "dwa", "excess-mtl"])
def test_a_total_that_is_kept_holds_no_model(name: str) -> None:
    kept, alive = [], []
    for seed in range(5):
        model = made(BALANCERS[name]())
        model.total = model.scalarize(float16_losses(model, batch(seed)))
        model.total.backward()
        kept.append(model.total)
        alive.append(weakref.ref(model))
        del model
    gc.collect()
    assert [reference() for reference in alive] == [None] * 5


@pytest.mark.parametrize("name", ["dwa", "famo", "rlw", "excess-mtl", "rotograd"])
def test_another_total_in_between_loses_nothing(name: str) -> None:
    """What it has moved stays, though the first one overflows."""
    trainer, reference = twins(BALANCERS[name])
    first = trainer.model.scalarize(float16_losses(trainer.model, batch(1)))
    trainer.step(2)
    between = trainer.moved()
    hook = trainer.model.heads["b"].weight.register_hook(lambda g: g * torch.inf)
    first.backward()
    hook.remove()
    assert_close(trainer.moved(), between, **EXACT)
    reference.step(2)
    if name in ("excess-mtl", "rotograd"):  # the first total has moved nothing by then
        assert_close(trainer.moved(), reference.moved(), **EXACT)


@pytest.mark.parametrize("change", ["reset", "load"])
def test_a_state_that_is_replaced_in_between_is_not_overwritten(change: str) -> None:
    trainer, reference = twins(BALANCERS["dwa"])
    reference.step(5)
    total = trainer.model.scalarize(float16_losses(trainer.model, batch()))
    if change == "reset":
        trainer.model.balancer.reset()
    else:
        trainer.model.balancer.load_state_dict(reference.model.balancer.state_dict())
    expected = trainer.moved()
    hook = trainer.model.heads["b"].weight.register_hook(lambda g: g * torch.inf)
    total.backward()
    hook.remove()
    assert_close(trainer.moved(), expected, **EXACT)
