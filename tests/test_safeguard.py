"""A backward pass that makes any gradient overflow moves no state, wherever in the network it does."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import DWA, Balancer, ExcessMTL, GradientBalancer, LossBalancer, MultiTaskModel, Parameters, fork
from mtlwrap import safeguard as module
from mtlwrap.safeguard import are_finite, leaves
from tests.common import BALANCERS, DEVICE, TASKS, grads, make_backbone, make_heads, make_input, make_losses, make_model

EXACT = {"rtol": 0, "atol": 0}
# What of the network overflows: a head's own gradient, which no balancer looks at, or the backbone's, which is made
# after it has decided.
PLACES = {"head": "heads.b.weight", "backbone": "backbone.0.weight"}


class Trainer:
    """Steps, and bad ones, in which a gradient is not finite and which are not made, as a GradScaler has it."""

    def __init__(self, model: MultiTaskModel) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.param_groups(lr=0.01), lr=0.01)

    def backward(self, seed: int, spoiled: str = "", bad: float = torch.inf) -> None:
        hooks = [p.register_hook(lambda g: g * bad) for n, p in self.model.named_parameters() if n == spoiled]
        assert len(hooks) == bool(spoiled)
        self.model.backward(make_losses(self.model(make_input(seed))))
        for hook in hooks:
            hook.remove()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bad_step(self, seed: int, spoiled: str, bad: float = torch.inf) -> None:
        before = self.moved()
        self.backward(seed, spoiled, bad)
        assert are_finite(self.model.parameters()) == torch.zeros((), dtype=torch.bool, device=DEVICE)
        self.optimizer.zero_grad()
        assert_close(self.moved(), before, **EXACT)

    def moved(self) -> dict[str, Tensor]:
        """The state, but for where rotations are counted from, which the forward takes from the last step."""
        return {key: value for key, value in self.state().items() if ".rotations." not in key}

    def state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.model.state_dict().items()}


def twins(balancer: Callable[[], Balancer | None], **options: Any) -> tuple[Trainer, Trainer]:
    first, second = (make_model(balancer()) if not options else exact_model(balancer(), **options) for _ in range(2))
    for model in (first, second):
        model.prepare(make_input())
    return Trainer(first), Trainer(second)


def exact_model(balancer: Balancer | None, gradients: Parameters) -> MultiTaskModel:
    torch.manual_seed(1)
    model = MultiTaskModel(make_backbone(), make_heads(), balancer, gradients=gradients)
    return model.to(device=DEVICE, dtype=torch.float64)


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
    predictions = trainer.model(make_input())
    auxiliary = (trainer.model.backbone[0].weight * torch.inf).sum()
    trainer.model.backward(make_losses(predictions), auxiliary=auxiliary)
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
    total = trainer.model.scalarize(make_losses(trainer.model(make_input())))
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
        losses = [make_losses(each.model(make_input(seed))) for seed in (1, 2)]
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
        total = each.model.scalarize(make_losses(each.model(make_input())))
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


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [CountsLosses, CountsBoth, CountsGradients])
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
        passage = fork(shared(x), balancer, 2)
        losses = [head(z).square().mean() for head, z in zip(own, passage.aliases, strict=True)]
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


def test_the_leaves_of_a_graph() -> None:
    """As autograd itself finds them: those that get a gradient."""
    model = make_model()
    unused = nn.Parameter(torch.ones(()))
    total = sum(make_losses(model(make_input())).values())
    found = leaves(total.grad_fn)
    assert len(found) == len({id(leaf) for leaf in found})
    total.backward()
    expected = {id(p) for p in [*model.parameters(), unused] if p.grad is not None}
    assert {id(leaf) for leaf in found} == expected


# --- what is finite ----------------------------------------------------------------------------------------------


def with_gradient(gradient: Tensor) -> Tensor:
    parameter = torch.zeros_like(gradient.to_dense() if gradient.is_sparse else gradient).requires_grad_()
    parameter.grad = gradient.to(DEVICE) if DEVICE.type == "cpu" else gradient
    return parameter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_finite(dtype: torch.dtype) -> None:
    """Against isfinite on every number: large ones, whose sum is beyond the type; infinities that cancel out."""
    largest = 6e4 if dtype == torch.float16 else 1e30
    parameters = [with_gradient(torch.full((3, 40), largest, dtype=dtype, device=DEVICE)) for _ in range(3)]
    parameters.append(torch.zeros(2, device=DEVICE, requires_grad=True))  # without a gradient
    parameters.append(with_gradient(torch.zeros(0, 4, dtype=dtype, device=DEVICE)))
    assert bool(are_finite(parameters))
    for values in ([torch.inf], [-torch.inf], [torch.nan], [torch.inf, -torch.inf]):
        for index in range(3):
            for position in (0, 17, 118):
                spoiled = parameters[index].grad.clone()
                spoiled.view(-1)[position : position + len(values)] = torch.tensor(values, dtype=dtype, device=DEVICE)
                others = [*parameters[:index], with_gradient(spoiled), *parameters[index + 1 :]]
                gradients = [p.grad for p in others if p.grad is not None]
                assert not all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
                assert not bool(are_finite(others))


def test_finite_with_mixed_types_and_sparse_gradients() -> None:
    mixed = [with_gradient(torch.ones(3, dtype=kind, device=DEVICE)) for kind in (torch.float32, torch.float64)]
    assert bool(are_finite(mixed))
    for value in (1.0, torch.inf):
        sparse = torch.sparse_coo_tensor([[0, 0]], [[1.0], [value]], (5, 1), device=DEVICE, check_invariants=True)
        assert bool(are_finite([*mixed, with_gradient(sparse)])) == (value == 1.0)


def test_nothing_to_look_at() -> None:
    assert are_finite([]) is None
    assert are_finite([torch.zeros(2, requires_grad=True)]) is None


def test_grads_are_left_as_they_are() -> None:
    trainer, reference = twins(BALANCERS["excess-mtl"])
    trainer.backward(0, PLACES["head"], bad=torch.inf)
    reference.backward(0)
    for name, parameter in trainer.model.named_parameters():
        if name != PLACES["head"]:
            assert_close(parameter.grad, dict(reference.model.named_parameters())[name].grad, **EXACT)
    assert grads([trainer.model.heads["b"].weight])[0].isinf().any()
    assert set(TASKS) == set(trainer.model.tasks)
