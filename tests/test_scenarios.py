"""Random scenarios for every balancer, against one autograd.grad per task and formulas; and faults on purpose."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import (
    DWA,
    FAMO,
    GLS,
    IMTL,
    IMTLG,
    IMTLL,
    RLW,
    UW,
    Balancer,
    Compose,
    EqualWeighting,
    ExcessMTL,
    FixedWeights,
    GradNorm,
    MultiTaskModel,
    RotateOnly,
    RotoGrad,
    RotoGradNorm,
)
from tests.common import BALANCERS, DEVICE

LOGS = [0.25, -0.5, 0.125, 0.0, -0.25, 0.5]
KINDS = ["regression", "classification", "laplace"]

# As in tests.common.BALANCERS, for n tasks on a representation whose first tensor has m features.
MAKERS: dict[str, Callable[[int, int], Balancer | None]] = {
    "none": lambda n, m: None,
    "equal": lambda n, m: EqualWeighting(),
    "fixed": lambda n, m: FixedWeights([0.5 + task for task in range(n)]),
    "uw": lambda n, m: UW(init=LOGS[:n]),
    "uw-likelihoods": lambda n, m: UW(likelihood=(2 * KINDS)[:n]),
    "imtl-l": lambda n, m: IMTLL(init=LOGS[:n]),
    "imtl-g": lambda n, m: IMTLG(),
    "imtl-g-nonneg": lambda n, m: IMTLG(nonneg=True),
    "imtl-g-strict": lambda n, m: IMTLG(strict=True),
    "imtl": lambda n, m: IMTL(init=LOGS[:n]),
    "imtl-first-losses": lambda n, m: IMTL(init="first_losses"),
    "imtl-loss": lambda n, m: IMTL(method="loss"),
    "imtl-gradient": lambda n, m: IMTL(method="gradient"),
    "excess-mtl": lambda n, m: ExcessMTL(robust_step_size=0.5),
    "rotate-only": lambda n, m: RotateOnly(m),
    "rotograd": lambda n, m: RotoGrad(m),
    "rotograd-norm": lambda n, m: RotoGradNorm(max(1, m - 1), alpha=0.5),
    "grad-norm": lambda n, m: GradNorm(alpha=0.5),
    "dwa": lambda n, m: DWA(steps_per_epoch=1),
    "famo": lambda n, m: FAMO(),
    "gls": lambda n, m: GLS(),
    "rlw": lambda n, m: RLW(),
    "compose": lambda n, m: Compose(loss=UW(init=LOGS[:n]), gradient=IMTLG(nonneg=True)),
}
# What a weight may differ by that was computed from gradients of this precision, or from a factor in float32.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 0.03}
IMPARTIAL = ("imtl-g", "imtl", "imtl-first-losses", "imtl-gradient")


def test_every_balancer_is_here() -> None:
    assert MAKERS.keys() == BALANCERS.keys()


# ------------------------------------------------------------------------------------------------------- the networks


class Trunk(nn.Module):
    """A backbone that returns a tensor, a tuple, or a dict."""

    def __init__(self, width: int, structure: str) -> None:
        super().__init__()
        self.first, self.second, self.structure = nn.Linear(3, width), nn.Linear(3, 2), structure

    def forward(self, x: Tensor) -> Any:
        first = self.first(x).tanh()
        if self.structure == "tensor":
            return first
        second = self.second(x)
        return (first, second) if self.structure == "tuple" else {"first": first, "second": second}


def tensors_of(z: Any) -> list[Tensor]:
    return [z] if isinstance(z, Tensor) else list(z.values() if isinstance(z, dict) else z)


class Reader(nn.Module):
    """A head that reads the first tensor of a representation, or all of it."""

    def __init__(self, features: int, outputs: int, reads_all: bool) -> None:
        super().__init__()
        self.layer, self.reads_all = nn.Linear(features, outputs), reads_all

    def forward(self, z: Any) -> Tensor:
        tensors = tensors_of(z)
        return self.layer(torch.cat(tensors, 1) if self.reads_all else tensors[0])


def loss_of(task: int, prediction: Tensor) -> Tensor:
    p = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    return (p.square().mean(), (p - 3).abs().mean(), 10 * p.exp().mean())[task % 3]


@dataclass
class Scenario:
    tasks: int
    width: int
    rows: int
    dtype: torch.dtype
    named: bool
    structure: str
    # For each step and task: "present", "absent" from a dict, "none", or a "constant" that does not require grad.
    parts: list[list[str]]
    scale: float
    accumulate: int
    seed: int
    # What a task brought to earlier steps, for formulas that look back.
    memory: dict[str, Any] = field(default_factory=dict)

    def model(self, name: str) -> MultiTaskModel:
        torch.random.default_generator.manual_seed(self.seed)
        width = self.width + (0 if self.structure == "tensor" else 2)
        reads_all = [bool((self.seed >> task) & 1) for task in range(self.tasks)]
        heads = [Reader(width if every else self.width, 1 + task % 2, every) for task, every in enumerate(reads_all)]
        modules = {f"task {task}": head for task, head in enumerate(heads)} if self.named else heads
        model = MultiTaskModel(Trunk(self.width, self.structure), modules, MAKERS[name](self.tasks, self.width))
        model.to(device=DEVICE, dtype=self.dtype)
        with torch.no_grad():
            model.balancer.prepare(tensors_of(model.backbone(self.batch(0))))
        return model

    def batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + step)
        return torch.randn(self.rows, 3, generator=generator).to(DEVICE, self.dtype)


@st.composite
def scenarios(draw: Any, steps: int) -> Scenario:
    tasks = draw(st.integers(1, 6))
    part = st.sampled_from(["present", "present", "present", "absent", "none", "constant"])
    return Scenario(
        tasks,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        draw(st.booleans()),
        draw(st.sampled_from(["tensor", "tuple", "dict"])),
        draw(st.lists(st.lists(part, min_size=tasks, max_size=tasks), min_size=steps, max_size=steps)),
        draw(st.sampled_from([1.0, 65536.0, 1 / 3, 1e-4, -2.0])),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 10**6)),
    )


# ------------------------------------------------------------------------------------------------------- brute force


@dataclass
class Truth:
    """The losses that take part, without the wrapper: their values, and one autograd.grad for each."""

    present: list[int]
    losses: Tensor
    # A row for each: the gradient on the representation as a vector, and summed over the batch.
    on_z: Tensor
    sums: Tensor
    on_shared: list[list[Tensor]]
    on_head: list[list[Tensor]]
    # For each, what its gradients on the shared parameters, and on the head's, are sums of, without any cancelling.
    size_shared: list[Tensor]
    size_head: list[Tensor]


def truth(model: MultiTaskModel, x: Tensor, present: list[int]) -> Truth:
    shared = list(model.shared_parameters())
    z = model.backbone(x)
    tensors = tensors_of(z)
    found = Truth(present, torch.zeros(0), torch.zeros(0), torch.zeros(0), [], [], [], [])
    losses, rows, sums = [], [], []
    rotations = model.balancer.rotations.matrices().detach() if model.balancer.transforms else None
    for task in present:
        head, (first, *rest) = model.heads[task], tensors
        if rotations is not None:
            rotation = rotations[task].to(first.dtype)
            size = len(rotation)
            first = torch.cat([first[:, :size] @ rotation.T, first[:, size:]], 1)
        prediction = head({"first": first, **dict(enumerate(rest))} if rest else first)
        loss = loss_of(task, prediction)
        wanted = [prediction, *tensors, *shared, *head.parameters()]
        gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        on_prediction, *filled = [
            torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)
        ]
        count = len(tensors)
        losses.append(loss.detach().double())
        rows.append(torch.cat([g.flatten() for g in filled[:count]]).double())
        sums.append(torch.cat([g.double().sum(0) for g in filled[:count]]))
        found.on_shared.append([g.double() for g in filled[count : count + len(shared)]])
        found.on_head.append([g.double() for g in filled[count + len(shared) :]])
        found.size_shared.append(rows[-1].abs().sum() * largest(x))
        found.size_head.append(on_prediction.double().abs().sum() * max(map(largest, tensors)))
    found.losses, found.on_z, found.sums = torch.stack(losses), torch.stack(rows), torch.stack(sums)
    return found


def largest(tensor: Tensor) -> Tensor:
    return tensor.detach().double().abs().max().clamp(min=1.0)


def softmax(values: Tensor, present: list[int]) -> Tensor:
    return values.detach().double()[present].softmax(0)


def expected_factors(name: str, balancer: Balancer, seen: Truth, memory: dict[str, Any]) -> Tensor | None:
    """With what factor each loss enters the total: the formula, from what the balancer had learned before the step."""
    losses, present = seen.losses, seen.present
    if name == "fixed":
        return torch.tensor([0.5 + task for task in present], dtype=torch.float64, device=DEVICE)
    if name in ("uw", "uw-likelihoods", "compose"):
        (log_variance,) = balancer.parameters()
        factors = [1.0 if name == "uw-likelihoods" and task % 3 else 0.5 for task in present]
        return torch.tensor(factors, device=DEVICE) * (-log_variance.detach().double()[present]).exp()
    if name in ("imtl-l", "imtl", "imtl-loss"):
        (log_scale,) = balancer.parameters()
        return log_scale.detach().double()[present].exp()
    if name == "imtl-first-losses":
        (log_scale,) = balancer.parameters()
        firsts = [memory.setdefault(("first", task), loss) for task, loss in zip(present, losses, strict=True)]
        return log_scale.detach().double()[present].exp() / torch.stack(firsts)
    if name == "grad-norm":
        return len(present) * softmax(balancer.logits, present)
    if name == "gls":
        return losses.log().mean().exp() / (len(present) * losses)
    if name == "famo":
        shares = softmax(balancer.logits, present) / (losses + 1e-8)
        return shares / shares.sum()
    if name == "dwa":
        return averaged(losses, present, memory)
    return None if name == "rlw" else torch.ones_like(losses)


def averaged(losses: Tensor, present: list[int], memory: dict[str, Any]) -> Tensor:
    """Of an epoch of one step: the weights by the last two losses of each task, 1 for one that has not had two."""
    last = [memory.setdefault(("loss", task), []) for task in present]
    rates = [kept[-1] / kept[-2] / 2 if len(kept) > 1 else None for kept in last]
    total = sum(math.exp(rate) for rate in rates if rate is not None)
    count = sum(rate is not None for rate in rates)
    for kept, loss in zip(last, losses.tolist(), strict=True):
        kept.append(loss)
    return losses.new_tensor([1.0 if rate is None else count * math.exp(rate) / total for rate in rates])


def check_alpha(name: str, alpha: Tensor, seen: Truth, factors: Tensor, scenario: Scenario, logits: Tensor | None):
    """What weighs the gradients of the losses as they entered the total, by formula or by what defines it."""
    rows = factors[:, None] * seen.on_z
    norms = rows.norm(dim=1)
    close = {"rtol": ROUNDING[scenario.dtype], "atol": 1e-6}
    if name == "rotograd":
        first = [scenario.memory.setdefault(("norm", t), n) for t, n in zip(seen.present, norms, strict=True)]
        ratios = norms / torch.stack(first)
        assert_close(alpha, (ratios * norms).sum() / ratios.sum() / norms, **close)
    elif name == "rotograd-norm":
        assert_close(alpha, len(alpha) * softmax(logits, seen.present), **close)
    elif name == "excess-mtl":
        assert_close(alpha, excess_weights(seen, scenario), **close)
    elif name in (*IMPARTIAL, "imtl-g-nonneg", "imtl-g-strict", "compose"):
        check_impartial(name, alpha, rows, scenario.dtype)
    else:
        assert_close(alpha, torch.ones_like(alpha), **close)


def check_impartial(name: str, alpha: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
    usable = rows.norm(dim=1) > 0
    assert (alpha[~usable] == 0).all()
    if not usable.any():
        return
    weights, units = alpha[usable], torch.nn.functional.normalize(rows[usable], dim=1)
    along = units @ (weights @ rows[usable])
    size = (weights.abs() * rows[usable].norm(dim=1)).sum()
    if name in ("imtl-g-nonneg", "compose"):
        assert (weights >= 0).all()
    if name not in IMPARTIAL:
        # The paper's weights may cancel, and their sum with them.
        assert abs(weights.sum() - 1) <= min(1e-5, ROUNDING[dtype]) * weights.abs().sum()
    if dtype == torch.bfloat16 or name == "imtl-g-strict":
        return  # with eight bits the ridge decides; and the paper's formula has no answer where directions oppose
    if name in IMPARTIAL:
        exists = (units @ torch.linalg.pinv(units, rtol=1e-2).sum(1)).sub(1).abs().max() < 1e-6
        assert (weights != 0).any() or not exists
        assert along.min() >= -ROUNDING[dtype] * size
        assert along.max() - along.min() <= 2e-3 * along.max() + ROUNDING[dtype] * size
    else:
        shares = weights * rows[usable].norm(dim=1) / size
        # All projections are equal or larger; those of tasks with a weight are the smallest.
        assert (along[shares > 1e-3] - along.min()).max() <= 0.02 * size
    assert along.min() >= -1e-3 * size


def excess_weights(seen: Truth, scenario: Scenario) -> Tensor:
    """ExcessMTL of the paper in two steps: the first is the baseline of those that take part."""
    memory, tasks = scenario.memory, scenario.tasks
    logs = memory.setdefault("logs", torch.full((tasks,), -math.log(tasks), dtype=torch.float64, device=DEVICE))
    moved = []
    for task, gradient in zip(seen.present, seen.sums, strict=True):
        squares = memory.get(("squares", task), 0.0) + gradient.square()
        memory["squares", task] = squares
        excess = torch.where(squares > 0, gradient.square() / squares.sqrt(), 0.0).sum()
        if ("baseline", task) in memory:
            moved.append((task, logs[task] + 0.5 * excess / memory["baseline", task]))
        elif excess > 0:
            memory["baseline", task] = excess
    if moved:
        which = [task for task, _ in moved]
        grown = torch.stack([log for _, log in moved])
        total = 0.0 if len(moved) == tasks else logs[which].logsumexp(0)
        memory["logs"] = logs.index_copy(0, torch.tensor(which, device=DEVICE), grown - grown.logsumexp(0) + total)
    return memory["logs"][seen.present].exp()


# --------------------------------------------------------------------------------------------------------- the law


def given_losses(model: MultiTaskModel, predictions: Any, parts: Sequence[str], order: random.Random) -> Any:
    """A list, or a dict in any order: with or without the tasks that take no part."""
    alive = "present" in parts
    losses: dict[int, Tensor | None] = {}
    for task, part in enumerate(parts):
        loss = loss_of(task, predictions[model.tasks[task] if isinstance(predictions, dict) else task])
        losses[task] = loss if part == "present" else loss.detach() if part == "constant" and alive else None
    if order.random() < 0.4:
        return [losses[task] for task in range(len(parts))]
    names = [task for task, part in enumerate(parts) if part != "absent"]
    order.shuffle(names)
    return {model.tasks[task]: losses[task] for task in names}


def state_rows(balancer: Balancer, task: int, tasks: int) -> dict[str, Tensor]:
    state = {**dict(balancer.named_parameters()), **dict(balancer.named_buffers())}
    if balancer.transforms:  # from where they are counted says nothing
        state = {key: tensor for key, tensor in state.items() if "rotations." not in key}
        state["rotations"] = balancer.rotations.matrices()
    return {key: t.detach()[task].clone() for key, t in state.items() if t.dim() and len(t) == tasks}


def near(found: Tensor | None, expected: Tensor, size: Tensor, dtype: torch.dtype, what: str) -> None:
    """Equal to the rounding of a sum of terms of this size, of which each was rounded a few times."""
    difference = (torch.zeros_like(expected) if found is None else found.double()) - expected
    assert difference.abs().max() <= 8 * torch.finfo(dtype).eps * size + torch.finfo(torch.float32).tiny, what


def check_step(name: str, model: MultiTaskModel, scenario: Scenario, step: int) -> None:
    parts, x, tasks = scenario.parts[step], scenario.batch(step), scenario.tasks
    present = [task for task, part in enumerate(parts) if part == "present"]
    absent = [task for task in range(tasks) if task not in present]
    seen = truth(model, x, present) if present else None
    factors = None if seen is None else expected_factors(name, model.balancer, seen, scenario.memory)
    logits = None if name != "rotograd-norm" else model.balancer.logits.detach().clone()
    before = {task: state_rows(model.balancer, task, tasks) for task in absent}
    losses = given_losses(model, model(x), parts, random.Random(scenario.seed + step))
    factor = scenario.scale / scenario.accumulate
    (scenario.scale * model.scalarize(losses) / scenario.accumulate).backward()
    if seen is None:
        assert all(p.grad is None for p in model.parameters())
    else:
        weights = model.task_weights
        assert weights.shape == (tasks,)
        assert weights.isfinite().all()
        assert (weights[absent] == 0).all()
        weights = weights[present].double()
        if factors is None:  # random ones
            assert (weights > 0).all()
            assert abs(weights.sum() - 1) < 1e-5
            factors = weights
        shared_size = sum(w.abs() * size for w, size in zip(weights, seen.size_shared, strict=True))
        for index, parameter in enumerate(model.shared_parameters()):
            expected = factor * sum(w * row[index] for w, row in zip(weights, seen.on_shared, strict=True))
            near(parameter.grad, expected, abs(factor) * shared_size, scenario.dtype, f"shared {index}, step {step}")
        for task, own, loss_factor, size in zip(present, seen.on_head, factors, seen.size_head, strict=True):
            each = factor * loss_factor
            for parameter, gradient in zip(model.heads[task].parameters(), own, strict=True):
                near(parameter.grad, each * gradient, each.abs() * size, scenario.dtype, f"head {task}, step {step}")
        check_alpha(name, weights / factors, seen, factors, scenario, logits)
    for task in absent:
        assert all(p.grad is None for p in model.heads[task].parameters())
    for parameter in model.parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all()
            parameter.data.sub_(0.05 * (parameter.grad / factor).clamp(-1.0, 1.0))
    for task in absent:
        for key, row in state_rows(model.balancer, task, tasks).items():
            assert torch.equal(row, before[task][key]), f"{key} of task {task}"


@pytest.mark.parametrize("name", MAKERS)
def test_two_steps_of_any_training(name: str) -> None:
    """The backbone gets the weighted sum of brute-force gradients, and each head that of its own loss."""
    steps = 3 if name == "dwa" else 2

    @settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(scenarios(steps))
    def holds(scenario: Scenario) -> None:
        scenario.memory.clear()
        model = scenario.model(name)
        for step in range(steps):
            model.zero_grad()
            check_step(name, model, scenario, step)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        # FAMO's last losses, and where log-scales start, are infinite before there are any losses.
        waiting = ("log_losses", "start")
        assert all(not t.isnan().any() if key.endswith(waiting) else t.isfinite().all() for key, t in state.items())

    holds()


# --------------------------------------------------------------------------------------------------- faults on purpose


class Faulty(nn.Module):
    """A head whose prediction is what it says times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 1), factor

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z) * self.factor


def small(name: str, tasks: int = 3) -> tuple[MultiTaskModel, Callable[[int], Tensor]]:
    torch.manual_seed(2)
    balancer = MAKERS[name](tasks, 4)
    model = MultiTaskModel(nn.Linear(3, 4), [Faulty(1.0) for _ in range(tasks)], balancer).to(DEVICE)
    return model, lambda seed: torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def squares(model: MultiTaskModel, x: Tensor) -> list[Tensor]:
    return [p.square().mean() for p in model(x)]


def everything(model: MultiTaskModel) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_head_that_returns_nan(name: str) -> None:
    """It is not hidden, and the next step is that of a training without it."""
    model, batch = small(name)
    reference, _ = small(name)
    for each in (model, reference):
        each.backward(squares(each, batch(0)))
        each.zero_grad()
    before = everything(model)
    model.heads[1].factor = math.nan
    model.backward(squares(model, batch(1)))
    assert not all(p.grad.isfinite().all() for p in model.shared_parameters())
    assert_close(everything(model), before, rtol=0, atol=0)
    model.heads[1].factor = 1.0
    model.zero_grad()
    for each in (model, reference):
        each.backward(squares(each, batch(2)))
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(found.grad, expected.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_loss_of_zero(name: str) -> None:
    """Its gradient is zero too; the others are trained, and it is back when it is not zero any more."""
    model, batch = small(name)
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-3))
    for step in range(4):
        model.heads[1].factor = 0.0 if step < 3 else 1.0
        optimizer.zero_grad()
        losses = squares(model, batch(step))
        assert (losses[1] == 0) == (step < 3)
        model.backward(losses)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert any((p.grad != 0).any() for p in model.shared_parameters())
        optimizer.step()
    assert model.task_weights.isfinite().all()
    assert model.task_weights[1] != 0
    assert all((p.grad != 0).any() for p in model.heads[1].parameters())


@pytest.mark.parametrize("name", MAKERS)
def test_a_task_that_vanishes_for_100_steps_and_returns(name: str) -> None:
    model, batch = small(name)
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-3))

    def step(number: int, present: tuple[bool, ...]) -> None:
        optimizer.zero_grad()
        losses = squares(model, batch(number))
        model.backward([loss if here else None for loss, here in zip(losses, present, strict=True)])
        optimizer.step()

    step(0, (True, True, True))
    step(1, (True, True, True))
    rows, head = state_rows(model.balancer, 1, 3), everything(model.heads[1])
    for number in range(100):
        step(2 + number, (True, False, True))
        assert model.task_weights[1] == 0
    assert_close(state_rows(model.balancer, 1, 3), rows, rtol=0, atol=0)
    assert_close(everything(model.heads[1]), head, rtol=0, atol=0)
    step(102, (True, True, True))
    assert model.task_weights.isfinite().all()
    assert model.task_weights[1] != 0
    assert (model.heads[1].layer.weight != head["layer.weight"]).any()


@pytest.mark.parametrize("name", MAKERS)
def test_losses_of_a_million_to_one(name: str) -> None:
    model, batch = small(name)
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-9))
    for step in range(3):
        optimizer.zero_grad()
        with torch.enable_grad():
            z = model.backbone(batch(step))
            turned = [z] * 3
            if model.balancer.transforms:
                matrices = [torch.eye(4, device=DEVICE).clone() for _ in range(3)]
                for matrix, rotation in zip(matrices, model.balancer.rotations.matrices().detach(), strict=True):
                    matrix[: len(rotation), : len(rotation)] = rotation
                turned = [z @ matrix.T for matrix in matrices]
            raw = [f * model.heads[t](turned[t]).square().mean() for t, f in enumerate((1e6, 1.0, 1e-6))]
            rows = [torch.autograd.grad(loss, model.backbone.weight, retain_graph=True)[0].double() for loss in raw]
        losses = squares(model, batch(step))
        model.backward([1e6 * losses[0], losses[1], 1e-6 * losses[2]])
        weighed = [w * row for w, row in zip(model.task_weights.double(), rows, strict=True)]
        size = sum(row.abs().max() for row in weighed)
        assert (model.backbone.weight.grad.double() - sum(weighed)).abs().max() <= 1e-5 * size
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_a_thousand_tasks(name: str) -> None:
    """Each is a row of one matrix, so that what they send back is known without a thousand backward passes."""
    torch.manual_seed(3)
    tasks = 1000
    makers = {**MAKERS, "fixed": lambda n, m: FixedWeights([1.0] * n), "uw": lambda n, m: UW(n)}
    makers.update({"imtl-l": lambda n, m: IMTLL(n), "imtl": lambda n, m: IMTL(n)})
    makers["uw-likelihoods"] = lambda n, m: UW(likelihood=["laplace", "regression"] * (n // 2))
    makers["compose"] = lambda n, m: Compose(loss=UW(n), gradient=IMTLG(nonneg=True))
    heads = [nn.Linear(4, 1, bias=False) for _ in range(tasks)]
    model = MultiTaskModel(nn.Linear(3, 4), heads, makers[name](tasks, 4)).to(DEVICE)
    x = torch.randn(6, 3, device=DEVICE)
    for step in range(2):
        model.zero_grad()
        losses: list[Tensor | None] = [p.square().mean() for p in model(x)]
        if step:
            losses[::7] = [None] * len(losses[::7])
        model.backward(losses)
        weights = model.task_weights
        assert weights.isfinite().all()
        assert not step or (weights[::7] == 0).all()
        z = model.backbone(x).detach()  # the rotations are still the identity
        rows = torch.cat([head.weight.detach() for head in heads])
        on_z = torch.einsum("t,bt,tm->bm", weights.to(z), 2 / len(x) * z @ rows.T, rows)
        size = torch.einsum("t,bt,tm->bm", weights.to(z).abs(), 2 / len(x) * (z @ rows.T).abs(), rows.abs())
        difference = (model.backbone.weight.grad - on_z.T @ x).abs().max()
        assert difference <= 1e-5 * (size.T @ x.abs()).max()
