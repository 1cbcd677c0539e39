"""The rules of the fork, each against gradients by brute force on the unwrapped modules."""

import copy
import gc
import math
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from mtlwrap import IMTL, IMTLG, IMTLL, UW, EqualWeighting, GradientBalancer, MultiTaskModel, TaskGradients, fork
from mtlwrap import aliases as aliases_module
from mtlwrap import nodes as nodes_module
from mtlwrap import origins as origins_module
from mtlwrap import passes as passes_module
from tests.common import (
    BALANCERS,
    DEVICE,
    TASKS,
    grads,
    make_input,
    make_losses,
    make_model,
    task_gradients,
    unwrapped_losses,
)

EXACT = {"rtol": 1e-11, "atol": 1e-13}


class Recorder(GradientBalancer):
    """Weighs by (1, 2, 4, ...) and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[TaskGradients] = []

    def weigh(self, gradients: TaskGradients) -> Tensor:
        self.seen.append(gradients)
        gradients.norms  # noqa: B018 - computed here, while the gradients live
        return 2.0 ** torch.arange(gradients.num_tasks, device=gradients.norms.device)


def plain_gradients(model: MultiTaskModel, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Shared and head gradients of the plain sum of losses, without the wrapper."""
    shared, heads = list(model.shared_parameters()), list(model.head_parameters())
    _, losses = unwrapped_losses(model, x)
    found = torch.autograd.grad(sum(losses.values()), shared + heads)
    return list(found[: len(shared)]), list(found[len(shared) :])


# --- what holds in general -------------------------------------------------------------------------------------------


def closed_form_imtlg(rows: list[Tensor]) -> Tensor:
    """The paper's weights, Eq. 2 with its matrix inverse, in float64."""
    g = torch.stack([row.flatten().double() for row in rows])
    u = g / g.norm(dim=1, keepdim=True)
    d, k = g[:1] - g[1:], u[:1] - u[1:]
    rest = (g[:1] @ k.T @ torch.linalg.inv(d @ k.T))[0]
    return torch.cat([1 - rest.sum().reshape(1), rest])


def summed(rows: list[Tensor]) -> Tensor:
    return torch.ones(len(rows), dtype=torch.float64, device=DEVICE)


def thirds(rows: list[Tensor]) -> Tensor:
    """ExcessMTL in its first call, with three tasks of which some may be absent."""
    return summed(rows) / 3


def same_norms(rows: list[Tensor]) -> Tensor:
    """RotoGrad in its first call: the mean of the norms."""
    norms = torch.stack([row.norm() for row in rows])
    return norms.mean() / norms


def shares(powers: list[float]) -> list[float]:
    return [power / sum(powers) for power in powers]


def geometric(losses: list[float], tasks: list[int]) -> list[float]:
    return [math.prod(losses) ** (1 / len(losses)) / (len(losses) * loss) for loss in losses]


def reciprocal(losses: list[float], tasks: list[int]) -> list[float]:
    """What scales each of these to one."""
    return [1 / loss for loss in losses]


def inverse(losses: list[float], tasks: list[int]) -> list[float]:
    """FAMO in its first step, with equal logits."""
    return shares([1 / (loss + 1e-8) for loss in losses])


def drawn(losses: list[float], tasks: list[int]) -> list[float]:
    """RLW in the first step of the seed 0, of which these are the normal numbers."""
    return shares([math.exp((-1.8839083333524405, 0.22760793546360525, -0.22143788059715477)[task]) for task in tasks])


EXPECTED_FACTORS = {
    # the factor of each raw loss in the total, or a function of the losses and the tasks that take part; and what
    # weighs the shared gradient, given those of the present tasks
    "none": ([1, 1, 1], summed),
    "equal": ([1, 1, 1], summed),
    "fixed": ([0.5, 2, 3], summed),
    "uw": ([0.5 * math.exp(-0.25), 0.5 * math.exp(0.5), 0.5 * math.exp(-0.125)], summed),
    "uw-likelihoods": ([0.5, 1, 1], summed),
    "imtl-l": ([math.exp(0.25), math.exp(-0.5), math.exp(0.125)], summed),
    "imtl-g": ([1, 1, 1], closed_form_imtlg),
    "imtl-g-nonneg": ([1, 1, 1], closed_form_imtlg),
    "imtl-g-strict": ([1, 1, 1], closed_form_imtlg),
    "imtl": ([math.exp(0.25), math.exp(-0.5), math.exp(0.125)], closed_form_imtlg),
    "imtl-first-losses": (reciprocal, closed_form_imtlg),
    "imtl-loss": ([1, 1, 1], summed),
    "imtl-gradient": ([1, 1, 1], closed_form_imtlg),
    "excess-mtl": ([1, 1, 1], thirds),
    "rotate-only": ([1, 1, 1], summed),
    "rotograd": ([1, 1, 1], same_norms),
    "rotograd-norm": ([1, 1, 1], summed),
    "grad-norm": ([1, 1, 1], summed),
    "dwa": ([1, 1, 1], summed),
    "famo": (inverse, summed),
    "gls": (geometric, summed),
    "rlw": (drawn, summed),
    "compose": ([0.5 * math.exp(-0.25), 0.5 * math.exp(0.5), 0.5 * math.exp(-0.125)], closed_form_imtlg),
}


def factors_of(name: str, raw: dict[str, Tensor]) -> list[float]:
    """The factors that are expected of the tasks that take part."""
    factors, tasks = EXPECTED_FACTORS[name][0], [TASKS.index(task) for task in raw]
    return factors([loss.item() for loss in raw.values()], tasks) if callable(factors) else [factors[t] for t in tasks]


def test_every_balancer_has_an_expectation() -> None:
    assert EXPECTED_FACTORS.keys() == BALANCERS.keys()


@pytest.mark.parametrize("name", BALANCERS)
def test_gradients_equal_brute_force(name: str) -> None:
    """Shared, heads, own parameters and weights, against one autograd.grad per task and the paper's formula."""
    model, x = make_model(BALANCERS[name]()), make_input()
    shared, heads = list(model.shared_parameters()), list(model.head_parameters())
    z, raw = unwrapped_losses(model, x)
    factors, weigh = factors_of(name, raw), EXPECTED_FACTORS[name][1]
    scaled = [factor * loss for factor, loss in zip(factors, raw.values(), strict=True)]
    on_z = [row[0] for row in task_gradients(scaled, [z])]
    alpha = weigh(on_z)
    assert (alpha > 0).all()  # so that all variants of IMTL-G agree
    per_task = task_gradients(scaled, shared)
    expected_shared = [sum(a * row[i] for a, row in zip(alpha, per_task, strict=True)) for i in range(len(shared))]
    expected_heads = torch.autograd.grad(sum(scaled), heads)

    model.backward(make_losses(model(x)))

    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    assert_close(grads(shared), expected_shared, **tolerance)
    assert_close(grads(heads), list(expected_heads), **EXACT)
    assert model.task_weights is not None
    assert_close(model.task_weights, alpha * torch.tensor(factors, dtype=torch.float64, device=DEVICE), **tolerance)


@pytest.mark.parametrize(
    ("name", "sign", "half"), [("imtl-l", 1, 1.0), ("imtl", 1, 1.0), ("uw", -1, 0.5), ("compose", -1, 0.5)]
)
def test_log_scales_get_their_own_gradient(name: str, sign: int, half: float) -> None:
    """For IMTL-L e^s L - 1, for UW half of 1 - e^-s L; the gradient balance does not touch them."""
    model, x = make_model(BALANCERS[name]()), make_input()
    raw = torch.stack(list(unwrapped_losses(model, x)[1].values())).detach()
    (log_scale,) = model.balancer_parameters()
    expected = sign * half * (torch.exp(sign * log_scale.detach()) * raw - 1)
    model.backward(make_losses(model(x)))
    assert log_scale.grad is not None
    assert_close(log_scale.grad, expected, **EXACT)


@pytest.mark.parametrize("name", BALANCERS)
def test_backward_and_scalarize_are_the_same(name: str) -> None:
    first, second, x = make_model(BALANCERS[name]()), make_model(BALANCERS[name]()), make_input()
    first.backward(make_losses(first(x)))
    second.scalarize(make_losses(second(x))).backward()
    assert_close(grads(list(first.parameters())), grads(list(second.parameters())), rtol=0, atol=0)


@pytest.mark.parametrize("name", BALANCERS)
def test_backbone_and_heads_run_backward_exactly_once(name: str) -> None:
    model, x = make_model(BALANCERS[name]()), make_input()
    runs = {"backbone": 0, **dict.fromkeys(TASKS, 0)}

    def count(name: str) -> None:
        runs[name] += 1

    def count_backward_of(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda *args: args[2].register_hook(lambda _: count(name)) and None)

    count_backward_of(model.backbone[0], "backbone")
    for task in TASKS:
        count_backward_of(model.heads[task], task)
    model.backward(make_losses(model(x)))
    assert set(runs.values()) == {1}, runs


# --- rule 1: it balances only in a backward that came through scalarize -----------------------------------------------


@pytest.mark.parametrize("name", BALANCERS)
def test_plain_sum_is_as_if_not_wrapped(name: str) -> None:
    model, x = make_model(BALANCERS[name]()), make_input()
    shared, heads = plain_gradients(model, x)
    sum(make_losses(model(x)).values()).backward()
    assert_close(grads(list(model.shared_parameters())), shared, **EXACT)
    assert_close(grads(list(model.head_parameters())), heads, **EXACT)
    assert model.task_weights is None


def test_plain_sum_after_a_balanced_backward() -> None:
    """An order is taken once; a retained graph is plain again."""
    model, x = make_model("imtl-g"), make_input()
    losses = make_losses(model(x))
    model.backward(losses, retain_graph=True)
    balanced = grads(list(model.shared_parameters()))
    model.zero_grad()
    sum(losses.values()).backward(retain_graph=True)
    assert_close(grads(list(model.shared_parameters())), plain_gradients(model, x)[0], **EXACT)
    model.zero_grad()
    model.backward(losses)
    assert_close(grads(list(model.shared_parameters())), balanced, rtol=0, atol=0)


def test_an_order_that_was_not_taken_is_forgotten() -> None:
    """A pass that stops at the heads leaves its order behind at the fork; the next pass must not find it."""
    model, x = make_model("imtl-g"), make_input()
    losses = make_losses(model(x))
    total = model.scalarize(losses)
    torch.autograd.grad(total, list(model.head_parameters()), retain_graph=True)
    sum(losses.values()).backward()
    assert_close(grads(list(model.shared_parameters())), plain_gradients(model, x)[0], **EXACT)
    assert model.task_weights is None


def test_autograd_grad_of_predictions_is_plain_and_touches_no_state() -> None:
    model, x = make_model("imtl-g"), make_input().requires_grad_()
    predictions = model(x)
    found = torch.autograd.grad(predictions["b"].sum() + predictions["c"].sum(), x)[0]
    z = model.backbone(x)
    expected = torch.autograd.grad(model.heads["b"](z).sum() + model.heads["c"](z).sum(), x)[0]
    assert_close(found, expected, **EXACT)
    assert model.task_weights is None


@pytest.mark.parametrize("name", ["imtl-g", "imtl"])
def test_second_order_gradients_are_plain(name: str) -> None:
    """A penalty on the input gradient of all predictions: both its passes run through the fork."""
    model = make_model(BALANCERS[name]())
    parameters = list(model.model_parameters())

    def penalty(predictions: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs = sum(p.square().sum() for p in predictions.values())
        return torch.autograd.grad(outputs, x, create_graph=True)[0].square().sum()

    x = make_input().requires_grad_()
    found = torch.autograd.grad(penalty(model(x), x), parameters, allow_unused=True)
    z = model.backbone(x)
    plain = {task: model.heads[task](z.clone()) for task in TASKS}
    expected = torch.autograd.grad(penalty(plain, x), parameters, allow_unused=True)
    assert_close([f for f in found if f is not None], [e for e in expected if e is not None], **EXACT)
    assert [f is None for f in found] == [e is None for e in expected]


def test_a_loss_on_input_derivatives_in_a_balanced_step() -> None:
    """Forces: the loss of one task contains the derivative of its prediction with respect to the input."""
    model, x = make_model(Recorder()), make_input().requires_grad_()
    shared = list(model.shared_parameters())

    def losses_of(predictions: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = make_losses(predictions)
        force = torch.autograd.grad(predictions["c"].sum(), x, create_graph=True)[0]
        return {**losses, "c": losses["c"] + force.square().mean()}

    model.backward(losses_of(model(x)))
    z = model.backbone(x)
    own = {task: z.clone() for task in TASKS}
    losses = losses_of({task: model.heads[task](own[task].clone()) for task in TASKS})
    # What a head sends back is weighed; what the second derivative sends past the heads is added as it is.
    per_task, through_z = task_gradients(list(losses.values()), shared), []
    for task, loss in losses.items():
        (on_z,) = torch.autograd.grad(loss, own[task], retain_graph=True)
        through_z.append(torch.autograd.grad(z, shared, on_z, retain_graph=True))
    for i, parameter in enumerate(shared):
        past_z = sum(whole[i] - through[i] for whole, through in zip(per_task, through_z, strict=True))
        weighed = sum(2.0**t * through[i] for t, through in enumerate(through_z))
        assert_close(parameter.grad, weighed + past_z, rtol=1e-9, atol=1e-11)
    assert len(model.balancer.seen) == 1


def test_create_graph_treats_the_weights_as_constants() -> None:
    model, x = make_model(Recorder()), make_input()
    shared = list(model.shared_parameters())
    first = torch.autograd.grad(model.scalarize(make_losses(model(x))), shared, create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in first), shared)
    _, losses = unwrapped_losses(model, x)
    weighed = sum(2.0**t * loss for t, loss in enumerate(losses.values()))
    expected_first = torch.autograd.grad(weighed, shared, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in expected_first), shared)
    assert_close(list(first), list(expected_first), **EXACT)
    assert_close(list(found), list(expected), rtol=1e-9, atol=1e-10)


# --- rule 2: the address --------------------------------------------------------------------------------------------


def test_two_forwards_scalarized_crosswise() -> None:
    """The total of the first forward, made last, balances the first; and the other way round."""
    model, reference = make_model("imtl-g"), make_model("imtl-g")
    x, y = make_input(1), 3 * make_input(2, rows=4)
    expected = []
    for data in (x, y):
        reference.zero_grad()
        reference.backward(make_losses(reference(data)))
        expected.append(grads(list(reference.shared_parameters())))
    losses_x, losses_y = make_losses(model(x)), make_losses(model(y))
    total_y, total_x = model.scalarize(losses_y), model.scalarize(losses_x)
    total_x.backward()
    assert_close(grads(list(model.shared_parameters())), expected[0], rtol=0, atol=0)
    model.zero_grad()
    total_y.backward()
    assert_close(grads(list(model.shared_parameters())), expected[1], rtol=0, atol=0)


def test_two_totals_in_one_backward_balance_each_forward_by_itself() -> None:
    model, reference = make_model("imtl"), make_model("imtl")
    x, y = make_input(1), 3 * make_input(2, rows=4)
    for data in (x, y):
        (reference.scalarize(make_losses(reference(data))) / 2).backward()
    losses_x, losses_y = make_losses(model(x)), make_losses(model(y))
    (model.scalarize(losses_x) / 2 + model.scalarize(losses_y) / 2).backward()
    assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), **EXACT)


def test_losses_added_up_over_two_forwards() -> None:
    """One total from two forwards: each fork balances the gradients that reach it."""
    model, reference = make_model("imtl-g"), make_model("imtl-g")
    x, y = make_input(1), 3 * make_input(2, rows=4)
    for data in (x, y):
        reference.backward(make_losses(reference(data)))
    losses_x, losses_y = make_losses(model(x)), make_losses(model(y))
    model.backward({task: losses_x[task] + losses_y[task] for task in TASKS})
    assert_close(grads(list(model.shared_parameters())), grads(list(reference.shared_parameters())), **EXACT)


def test_micro_batches_accumulate() -> None:
    model, reference = make_model("imtl"), make_model("imtl")
    batches = [make_input(seed) for seed in range(3)]
    expected = [torch.zeros_like(p) for p in reference.parameters()]
    for x in batches:
        reference.zero_grad()
        reference.backward(make_losses(reference(x)))
        expected = [e + g / 3 for e, g in zip(expected, grads(list(reference.parameters())), strict=True)]
    for x in batches:
        (model.scalarize(make_losses(model(x))) / 3).backward()
    assert_close(grads(list(model.parameters())), expected, **EXACT)


def test_an_evaluation_between_forward_and_backward_changes_nothing() -> None:
    model, reference = make_model("imtl-g"), make_model("imtl-g")
    x, y = make_input(1), make_input(2)
    reference.backward(make_losses(reference(x)))
    losses = make_losses(model(x))
    kept = model(y)  # a second fork, alive
    with torch.no_grad():
        model(y)
    model.backward(losses)
    del kept
    assert_close(grads(list(model.shared_parameters())), grads(list(reference.shared_parameters())), rtol=0, atol=0)


def test_a_total_that_is_kept_does_not_make_the_next_step_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer holds on to the last total; its fork is spent, so the fast path stays open."""
    model, x = make_model("imtl-g"), make_input()
    kept = model.scalarize(make_losses(model(x)))
    kept.backward()
    whole_walks = []
    original = origins_module.Walk

    def walk(*args: object, to_first: bool = False) -> object:
        whole_walks.extend([] if to_first else [args])
        return original(*args, to_first=to_first)

    monkeypatch.setattr(origins_module, "Walk", walk)
    again = model.scalarize(make_losses(model(x)))
    again.backward()
    assert kept.item() == again.item()
    assert not whole_walks


def test_the_model_holds_no_graph() -> None:
    model = make_model("imtl")
    x = make_input().requires_grad_()
    predictions = model(x)
    losses = make_losses(predictions)
    total = model.scalarize(losses)
    state = model._junction._origins._alive[-1]
    assert state() is not None
    held = weakref.ref(losses["a"])
    del predictions, losses, total
    gc.collect()
    assert state() is None
    assert held() is None


def pickled(model: MultiTaskModel) -> MultiTaskModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("when", ["before", "forward", "scalarize", "after"])
def test_copies_between_the_parts_of_a_step(when: str, duplicate: Callable[[MultiTaskModel], MultiTaskModel]) -> None:
    model, x = make_model("imtl"), make_input()
    copies = {"before": duplicate(model)}
    losses = make_losses(model(x))
    copies["forward"] = duplicate(model)
    total = model.scalarize(losses)
    copies["scalarize"] = duplicate(model)
    total.backward()
    copies["after"] = duplicate(model)
    copied = copies[when]
    copied.zero_grad()
    copied.backward(make_losses(copied(x)))
    assert_close(grads(list(copied.parameters())), grads(list(model.parameters())), rtol=0, atol=0)
    assert copied.balancer is not model.balancer


# --- rule 3: the upstream gradient is divided out ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [65536.0, 1 / 3, 1e-6, -1.0])
@pytest.mark.parametrize("name", BALANCERS)
def test_whatever_the_total_is_multiplied_with_comes_out_as_a_factor(name: str, scale: float) -> None:
    model, reference, x = make_model(BALANCERS[name]()), make_model(BALANCERS[name]()), make_input()
    reference.backward(make_losses(reference(x)))
    (scale * model.scalarize(make_losses(model(x)))).backward()
    assert_close([g / scale for g in grads(list(model.parameters()))], grads(list(reference.parameters())), **EXACT)
    assert_close(model.task_weights, reference.task_weights, rtol=1e-12, atol=0)


def test_the_balancer_never_sees_the_scale() -> None:
    model, reference, x = make_model(Recorder()), make_model(Recorder()), make_input()
    reference.backward(make_losses(reference(x)))
    (65536 * model.scalarize(make_losses(model(x)))).backward()
    (seen,), (expected,) = model.balancer.seen, reference.balancer.seen
    for quantity in ("norms", "gramian", "matrix", "losses"):
        assert_close(getattr(seen, quantity), getattr(expected, quantity), rtol=1e-12, atol=0)


def test_a_total_times_zero_gives_zeros_and_no_nan() -> None:
    model, x = make_model("imtl"), make_input()
    (0.0 * model.scalarize(make_losses(model(x)))).backward()
    assert all((g == 0).all() for g in grads(list(model.parameters())))


# --- rule 4: scalarize decides who is present -------------------------------------------------------------------------


def test_a_gradient_from_an_absent_task_is_ignored() -> None:
    """As a compiled graph sends it: the absent task's alias is connected; here what arrives is not even zero."""
    recorder = Recorder()
    z = make_input().requires_grad_()
    shared = fork(z, recorder, 2)
    first = shared.aliases[0].square().sum() + 0.0 * shared.aliases[1].sum()
    total = shared.scalarize([first, None])
    shared.aliases[1].register_hook(lambda gradient: gradient + 7)
    total.backward()
    assert recorder.seen[0].taking_part == (True, False)
    assert recorder.seen[0].norms[1] == 0
    assert_close(shared.task_weights, torch.tensor([1.0, 0.0], dtype=torch.float64, device=DEVICE))
    assert_close(z.grad, 2 * z.detach())


def test_a_missing_gradient_of_a_present_task_is_zero() -> None:
    """A head that detaches takes part with a gradient of zero."""
    recorder = Recorder()
    z = make_input().requires_grad_()
    probe = nn.Linear(5, 1, dtype=torch.float64, device=DEVICE)
    shared = fork(z, recorder, 2)
    shared.scalarize([shared.aliases[0].square().sum(), probe(shared.aliases[1].detach()).sum()]).backward()
    assert recorder.seen[0].taking_part == (True, True)
    assert recorder.seen[0].norms[1] == 0
    assert_close(z.grad, 2 * z.detach())


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("how", ["missing", "none", "constant", "list"])
def test_an_absent_task_takes_no_part(name: str, how: str) -> None:
    """The same as a model that never had the task, and neither its head nor its log-scale moves."""
    model, x = make_model(BALANCERS[name]()), make_input()
    losses = dict(make_losses(model(x)))
    absent = losses.pop("b")
    given = {
        "missing": losses,
        "none": {**losses, "b": None},
        "constant": {**losses, "b": absent.detach()},
        "list": [losses["a"], None, losses["c"]],
    }[how]
    model.backward(given)
    z, raw = unwrapped_losses(model, x)
    raw.pop("b")
    factors, weigh = factors_of(name, raw), EXPECTED_FACTORS[name][1]
    scaled = [factor * loss for factor, loss in zip(factors, raw.values(), strict=True)]
    rows = [row[0] for row in task_gradients(scaled, [z])]
    alpha = weigh(rows)
    shared = list(model.shared_parameters())
    rows = task_gradients(scaled, shared)
    expected = [sum(a * g for a, g in zip(alpha, gs, strict=True)) for gs in zip(*rows, strict=True)]
    assert_close(grads(shared), expected, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.heads["b"].parameters())
    assert model.task_weights[1] == 0
    for parameter in model.balancer_parameters():
        assert (parameter.grad[1] == 0).all()
        # FAMO has nothing to compare with in the first step.
        assert (parameter.grad[[0, 2]] != 0).any(dim=-1).all() or name == "famo"


def test_nothing_present_does_nothing() -> None:
    model, x = make_model("imtl"), make_input()
    model(x)
    model.backward({})
    model.backward([None, None, None])
    assert all(p.grad is None for p in model.parameters())


# --- rule 5: the balancer's parameters are inputs of the fork ---------------------------------------------------------


@pytest.mark.parametrize("name", ["uw", "imtl", "compose"])
def test_balancer_parameters_are_reachable_from_any_prediction(name: str) -> None:
    """DDP walks the graph of the outputs for the parameters in use, before scalarize has run."""
    model = make_model(BALANCERS[name]())
    found, stack = set(), [model(make_input())["b"].grad_fn]
    while stack:
        node = stack.pop()
        found.add(getattr(node, "variable", None))
        stack.extend(following for following, _ in node.next_functions if following is not None)
    assert set(model.balancer_parameters()) <= found


# --- rule 6: aliases are copy-on-write --------------------------------------------------------------------------------


def writes_in_place(kind: str) -> nn.Module:
    class Writes(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            if kind == "add":
                z += 1
            elif kind == "flatten":
                functional.relu_(z.flatten(1))
            elif kind == "slice":
                z[:, 0] = 0
            elif kind == "relu":
                functional.relu_(z)
            return z.sum(1, keepdim=True)

    return Writes()


@pytest.mark.parametrize("kind", ["relu", "add", "flatten", "slice"])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_in_place_first_head_disturbs_nobody(kind: str, frozen: bool) -> None:
    """train == eval == no_grad == inference == model[i], with sigmoid in front, which keeps its output."""
    backbone = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid())
    model = MultiTaskModel(backbone, [writes_in_place(kind), nn.Linear(8, 2)]).to(DEVICE).double()
    backbone.requires_grad_(not frozen)
    x = make_input()
    z = backbone(x)
    expected = [writes_in_place(kind)(z.detach().clone()), model.heads[1](z)]

    def check(predictions: list[Tensor]) -> None:
        for prediction, e in zip(predictions, expected, strict=True):
            assert_close(prediction.detach(), e.detach(), rtol=0, atol=0)

    check(model(x))
    check([single(x) for single in model])
    model.eval()
    check(model(x))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check(model(x))
            check([model[0](x), model[1](x)])
    losses = [p.square().mean() for p in model(x)]
    if frozen:
        losses[0] = None  # nothing in it requires grad
    model.backward(losses)
    if not frozen:
        copied = z.clone()
        plain = writes_in_place(kind)(copied).square().mean() + model.heads[1](z).square().mean()
        assert_close(grads(list(backbone.parameters())), list(torch.autograd.grad(plain, list(backbone.parameters()))))


def test_aliases_share_memory_until_somebody_writes() -> None:
    z = make_input().requires_grad_()
    shared = fork(z * 2, IMTLG(), 2)
    first, second = shared.aliases
    same = (
        torch._C._data_address(first) == torch._C._data_address(second) if hasattr(torch._C, "_data_address") else True
    )
    assert same
    first.add_(1)
    assert_close(second.detach(), 2 * z.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_without_lazy_clone_aliases_are_copies(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    monkeypatch.setattr(aliases_module, "_lazy_clone", None)
    test_an_in_place_first_head_disturbs_nobody("relu", frozen)


def test_a_lazy_clone_that_is_not_supported_becomes_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(tensor: Tensor) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(aliases_module, "_lazy_clone", unsupported)
    test_an_in_place_first_head_disturbs_nobody("add", False)


def test_without_graph_task_ids_a_step_is_still_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model, x = make_model("imtl"), make_model("imtl"), make_input()
    expected.backward(make_losses(expected(x)))
    for module in (nodes_module, passes_module):
        monkeypatch.setattr(module, "graph_task_id", passes_module.unknown_graph_task)
    monkeypatch.setattr(nodes_module, "keeps_graph", lambda: True)
    model.backward(make_losses(model(x)))
    assert_close(grads(list(model.parameters())), grads(list(expected.parameters())), rtol=0, atol=0)


# --- rule 8: autocast is off in the fork's backward -------------------------------------------------------------------


def test_backward_inside_autocast_decides_in_full_precision() -> None:
    """No head multiplies matrices here, so any difference is the decision's."""
    weights = []
    for ambient in (False, True):
        balancer = IMTLG()
        shared = fork(make_input(dtype=torch.float32).requires_grad_(), balancer, 3)
        losses = [z.pow(t + 1).mean() for t, z in enumerate(shared.aliases)]
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=ambient):
            shared.scalarize(losses).backward()
        weights.append(shared.task_weights)
    assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_a_loss_balancer_that_learns_from_gradients_sees_them_in_every_step() -> None:
    class Learner(EqualWeighting):
        def __init__(self) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.zeros(()))

        def own_gradients(self, gradients: TaskGradients) -> dict[str, Tensor]:
            return {"size": gradients.norms.sum()}

    model, x = make_model(Learner()), make_input()
    for _ in range(3):
        model.zero_grad()
        model.backward(make_losses(model(x)))
        assert model.balancer.size.grad > 0


def test_a_custom_balancer_that_multiplies_matrices_is_spared_autocast() -> None:
    class Multiplies(GradientBalancer):
        dtypes: list[torch.dtype] = []  # noqa: RUF012

        def weigh(self, gradients: TaskGradients) -> Tensor:
            product = gradients.matrix @ gradients.matrix.T
            self.dtypes.append(product.dtype)
            return product.diagonal()

    model, x = make_model(Multiplies(), torch.float32), make_input(dtype=torch.float32)
    losses = make_losses(model(x))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        model.backward(losses)
    assert model.balancer.dtypes == [torch.float32]


# --- autograd's other ways in -----------------------------------------------------------------------------------------


def test_torch_func_and_forward_mode_see_plain_modules() -> None:
    model, x = make_model("imtl-g"), make_input()

    def output(v: Tensor) -> Tensor:
        predictions = model(v)
        return predictions["b"].sum() + predictions["c"].square().sum()

    def plain(v: Tensor) -> Tensor:
        z = model.backbone(v)
        return model.heads["b"](z).sum() + model.heads["c"](z).square().sum()

    assert_close(torch.func.grad(output)(x), torch.func.grad(plain)(x), **EXACT)
    assert_close(torch.func.jvp(output, (x,), (x,)), torch.func.jvp(plain, (x,), (x,)), **EXACT)
    assert_close(
        torch.func.jacrev(lambda v: model(v)["b"])(x),
        torch.func.jacrev(lambda v: model.heads["b"](model.backbone(v)))(x),
        **EXACT,
    )
    single = torch.func.vmap(torch.func.grad(lambda v: output(v[None])))(x)
    assert_close(single, torch.func.vmap(torch.func.grad(lambda v: plain(v[None])))(x), **EXACT)


def test_gradcheck_of_the_plain_fork() -> None:
    z = make_input(rows=2).requires_grad_()

    def through(v: Tensor) -> Tensor:
        first, second = fork(v, IMTLG(), 2).aliases
        return first.square() * 2 + second.exp()

    assert torch.autograd.gradcheck(through, z)
    assert torch.autograd.gradgradcheck(through, z)


# --- the fork on its own ----------------------------------------------------------------------------------------------


def test_fork_alone_equals_the_model() -> None:
    balancer = IMTL(3, init=[0.25, -0.5, 0.125]).to(DEVICE).double()
    model, x = make_model(IMTL(init=[0.25, -0.5, 0.125])), make_input()
    model.backward(make_losses(model(x)))
    expected = grads(list(model.parameters()))
    model.zero_grad()
    shared = fork(model.backbone(x), balancer, 3)
    predictions = {task: model.heads[task](z) for task, z in zip(TASKS, shared.aliases, strict=True)}
    shared.scalarize(list(make_losses(predictions).values())).backward()
    assert_close(grads([*model.model_parameters(), *balancer.parameters()]), expected, rtol=0, atol=0)
    assert_close(shared.task_weights, model.task_weights, rtol=0, atol=0)


def test_fork_of_a_mixture_of_experts() -> None:
    """Several shared tensors, each task its own mixture of them: flattened into one gradient per task."""
    x = make_input()
    experts = [nn.Linear(5, 4, dtype=torch.float64, device=DEVICE) for _ in range(3)]
    mixtures = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=torch.float64, device=DEVICE)

    def losses_of(per_task: list[list[Tensor]]) -> list[Tensor]:
        mixed = [sum(m * e for m, e in zip(row, es, strict=True)) for row, es in zip(mixtures, per_task, strict=True)]
        return [mixed[0].square().mean(), 5 * mixed[1].exp().mean()]

    def run_experts() -> list[Tensor]:
        return [expert(x) for expert in experts]

    shared = fork(run_experts(), IMTLG(), 2)
    shared.scalarize(losses_of(shared.aliases)).backward()
    outputs = run_experts()
    rows = task_gradients(losses_of([outputs, outputs]), outputs)
    norms = [torch.cat([g.flatten() for g in row]).norm() for row in rows]
    parameters = [p for expert in experts for p in expert.parameters()]
    weighed = (norms[1] * losses_of([outputs, outputs])[0] + norms[0] * losses_of([outputs, outputs])[1]) / sum(norms)
    assert_close(grads(parameters), list(torch.autograd.grad(weighed, parameters)), rtol=1e-9, atol=1e-12)


def test_fork_refuses_what_does_not_fit() -> None:
    z = make_input().requires_grad_()
    with pytest.raises(TypeError, match="expected a balancer of mtlwrap, got str"):
        fork(z, "imtl", 2)
    with pytest.raises(ValueError, match="num_tasks: expected a positive int, got 0"):
        fork(z, IMTLG(), 0)
    with pytest.raises(ValueError, match="IMTLL was made for 3 tasks, got 2"):
        fork(z, IMTLL(3), 2)
    used = IMTLG()
    fork(z, used, 2)
    with pytest.raises(ValueError, match="IMTLG was made for 2 tasks, got 3"):
        fork(z, used, 3)
    with pytest.raises(TypeError, match="found none in a list"):
        fork([torch.arange(3)], IMTLG(), 2)
    unbound = fork(z, UW(), 2)
    with pytest.raises(ValueError, match="UW does not know the number of tasks"):
        unbound.scalarize([unbound.aliases[0].sum(), unbound.aliases[1].sum()])
    with pytest.raises(ValueError, match="expected 2, one for each of the tasks '0', '1'"):
        unbound.scalarize([unbound.aliases[0].sum()])


def test_two_totals_of_one_forward_in_one_backward_are_refused() -> None:
    model, x = make_model("imtl-g"), make_input()
    losses = make_losses(model(x))
    both = model.scalarize({"a": losses["a"]}) + model.scalarize({"b": losses["b"]})
    with pytest.raises(ValueError, match="Two scalarized totals of the same forward met in one backward pass"):
        both.backward()


# --- passes within and beside the balanced one ------------------------------------------------------------------------


def test_a_pass_inside_the_balanced_backward_does_not_take_its_order() -> None:
    """A hook that asks for another gradient through the same fork, while the balanced backward is under way."""
    model, reference, x = make_model("imtl"), make_model("imtl"), make_input()
    reference.backward(make_losses(reference(x)))
    predictions = model(x)
    inner = predictions["b"].sum()
    asked = []

    def ask(gradient: Tensor) -> None:
        asked.append(torch.autograd.grad(inner, model.backbone[0].weight, retain_graph=True)[0])

    predictions["a"].register_hook(ask)
    model.backward(make_losses(predictions), retain_graph=True)
    assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), rtol=0, atol=0)
    expected = torch.autograd.grad(model.heads["b"](model.backbone(x)).sum(), model.backbone[0].weight)[0]
    assert_close(asked, [expected], **EXACT)


def test_threads_run_backward_through_one_total() -> None:
    model, x = make_model("imtl"), make_input()
    parameters = list(model.parameters())
    total = model.scalarize(make_losses(model(x)))
    expected = torch.autograd.grad(total, parameters, retain_graph=True)
    found: dict[int, tuple[Tensor, ...]] = {}

    def run(number: int) -> None:
        for _ in range(10):
            found[number] = torch.autograd.grad((number + 1) * total, parameters, retain_graph=True)
            assert_close([g / (number + 1) for g in found[number]], list(expected), **EXACT)
        found[number] = ()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert list(found.values()) == [()] * 4  # every thread came to its end without a difference


def test_nothing_grows_from_step_to_step() -> None:
    model = MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1) for _ in range(12)], "imtl-g").to(DEVICE)
    x = torch.randn(3, 2, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        present = torch.rand(12, generator=generator) < 0.5
        model.backward([p.square().mean() if here else None for p, here in zip(model(x), present, strict=True)])
        sum(p.sum() for p in model(x)).backward()  # a forward that is never scalarized
    junction = model._junction
    assert len(junction._origins._trusted) <= 12
    assert len(junction._origins._alive) <= 64


# --- gradients of unusual kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("balancer", [None, "imtl-g"])
def test_conjugated_gradients(balancer: str | None) -> None:
    class Complex(nn.Module):
        def __init__(self, conjugate: bool) -> None:
            super().__init__()
            self.conjugate = conjugate

        def forward(self, z: Tensor) -> Tensor:
            return (z.conj() * (1 + 2j)).real.square().sum() if self.conjugate else z.abs().square().sum()

    weight = torch.randn(4, dtype=torch.complex128, device=DEVICE, requires_grad=True)
    model = MultiTaskModel(nn.Identity(), [Complex(True), Complex(False)], balancer)
    model.backward(model(weight * 2))
    rows = [torch.autograd.grad(Complex(c)(weight * 2), weight)[0] for c in (True, False)]
    norms = [torch.view_as_real(row).norm() for row in rows]
    share = [1.0, 1.0] if balancer is None else [norms[1] / sum(norms), norms[0] / sum(norms)]
    assert_close(weight.grad, share[0] * rows[0] + share[1] * rows[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("balancer", [None, "imtl-g"])
def test_a_sparse_gradient_from_a_head(balancer: str | None) -> None:
    class LooksUp(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return functional.embedding(torch.tensor([0, 2], device=z.device), z, sparse=True).square().sum()

    table = torch.randn(5, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    model = MultiTaskModel(nn.Identity(), [LooksUp(), LooksUp()], balancer)
    model.backward(model(table * 1))
    expected = torch.zeros_like(table)
    expected[[0, 2]] = (4 if balancer is None else 2) * table.detach()[[0, 2]]
    assert_close(table.grad, expected)


def test_a_nested_representation_is_refused() -> None:
    values = torch.randn(5, 3, requires_grad=True)
    nested = torch.nested.nested_tensor_from_jagged(values * 1, torch.tensor([0, 2, 5]))
    with pytest.raises(TypeError, match="expected strided tensors, found a nested one"):
        fork(nested, IMTLG(), 2)


def test_backward_on_the_meta_device() -> None:
    model = MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1), nn.Linear(2, 1)]).to("meta")
    sum(p.sum() for p in model(torch.empty(3, 2, device="meta"))).backward()
    assert model.backbone.weight.grad.is_meta


def test_a_weighing_of_the_wrong_kind_is_refused() -> None:
    class Lists(GradientBalancer):
        def weigh(self, gradients: TaskGradients) -> Tensor:
            return [1.0] * gradients.num_tasks  # type: ignore[return-value]

    model = make_model(Lists())
    with pytest.raises(TypeError, match=r"Lists.weigh: expected to return a tensor of shape \[3\] or None, got list"):
        model.backward(make_losses(model(make_input())))
