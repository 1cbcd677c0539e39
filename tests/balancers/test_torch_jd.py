"""TorchJD's methods as balancers: everything that it exports, against TorchJD itself on gradients by brute force."""

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchjd
from torch import Tensor, nn
from torch.testing import assert_close
from torchjd import aggregation, autojac, scalarization
from torchjd.aggregation import Aggregator, GramianWeightedAggregator, WeightedAggregator, Weighting
from torchjd.aggregation._weighting_bases import _GramianWeighting
from torchjd.linalg import Matrix, PSDMatrix
from torchjd.scalarization import Scalarizer

import mtlwrap
from mtlwrap import Compose, GradientBalancer, LossBalancer, MultiTaskModel, TaskGradients, fork
from mtlwrap.balancers.torch_jd import TorchJD, TorchJDGradient, TorchJDLoss
from tests.balancers.zoo import generator, normal
from tests.common import (
    DEVICE,
    TASKS,
    float16_losses,
    grads,
    make_backbone,
    make_heads,
    make_input,
    make_losses,
    make_model,
    task_gradients,
    unwrapped_losses,
)

EXACT = {"rtol": 0, "atol": 0}

# cvxpy's own advice on NashMTL's problem, at its first solution.
pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


# ----------------------------------------------------------------------------------------- all that torchjd exports

EXPORTED = {
    f"{package.__name__.split('.')[-1]}.{name}": getattr(package, name)
    for package in (aggregation, scalarization)
    for name in package.__all__
}

# What a constructor asks for that has no default, by the name of the argument.
ARGUMENTS: dict[str, Callable[[], Any]] = {
    "alpha": lambda: 1.0,
    "c": lambda: 0.5,
    "gramian_weighting": aggregation.IMTLGWeighting,
    "lambda_": lambda: 0.7,
    "mu": lambda: 0.5,
    "n_byzantine": lambda: 0,
    "n_tasks": lambda: 3,
    "shape": lambda: 3,
    "theta": lambda: 2.0,
    "trim_number": lambda: 1,
    "weighting": aggregation.MeanWeighting,
    "weights": lambda: vector(0.5, 2.0, 3.0),
}
ABSTRACT = {"aggregation.Aggregator", "aggregation.Weighting", "scalarization.Scalarizer"}
TWO_BATCHES = {"aggregation.MoDoWeighting", "aggregation.SDMGradWeighting"}
# Those for which torchjd asks for packages of its extras.
WITH_EXTRAS = {
    f"aggregation.{name}"
    for name in (
        "CAGrad",
        "CAGradWeighting",
        "DualProj",
        "DualProjWeighting",
        "FairGrad",
        "FairGradWeighting",
        "NashMTL",
        "UPGrad",
        "UPGradWeighting",
    )
}


def make_exported(name: str) -> nn.Module:
    kind = EXPORTED[name]
    required = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    return kind(**{argument: ARGUMENTS[argument]() for argument in required})


def wrap(method: nn.Module) -> TorchJD:
    """Those that want two batches are given the Gramian of one."""
    two = any(isinstance(m, aggregation.MoDoWeighting | aggregation.SDMGradWeighting) for m in method.modules())
    return TorchJD(method, on="gramian") if two else TorchJD(method)


# Options that change the path, next to everything that is exported.
METHODS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(make_exported, name) for name in EXPORTED if name not in ABSTRACT},
    "AlignedMTL-preference": lambda: aggregation.AlignedMTL(vector(0.5, 2.0, 3.0)),
    "ConFIG-preference": lambda: aggregation.ConFIG(vector(0.5, 2.0, 3.0)),
    "CRMOGM-GradVac": lambda: aggregation.CRMOGMWeighting(aggregation.GradVacWeighting()),
    "CRMOGM-MGDA": lambda: GramianWeightedAggregator(
        aggregation.CRMOGMWeighting(aggregation.MGDAWeighting(), initial_weights=vector(1.0, 0.0, 0.0))
    ),
    "DualProj-preference": lambda: aggregation.DualProj(vector(0.5, 2.0, 3.0)),
    "ExcessMTL-warm-up": lambda: aggregation.ExcessMTL(n_warmup_steps=2),
    "GradDrop-leak": lambda: aggregation.GradDrop(leak=vector(0.1, 0.2, 0.3)),
    "NashMTL-seldom": lambda: aggregation.NashMTL(3, update_weights_every=2),
    "PCD-tau": lambda: aggregation.PCD(tau=vector(0.1, 0.3)),
    "SDMGrad-preference": lambda: aggregation.SDMGradWeighting(pref_vector=vector(0.5, 0.2, 0.3)),
    "STCH-vectors": lambda: scalarization.STCH(0.5, weights=vector(0.5, 2.0, 3.0), reference=vector(0.1, 0.0, 0.0)),
    "UPGrad-preference": lambda: aggregation.UPGrad(vector(0.5, 2.0, 3.0)),
}


def make_method(name: str) -> nn.Module:
    try:
        return METHODS[name]()
    except ImportError as error:
        pytest.skip(str(error))


def _is_scalarizer(name: str) -> bool:
    kind = EXPORTED.get(name)
    return issubclass(kind, Scalarizer) if kind is not None else name.startswith("STCH")


every_method = pytest.mark.parametrize("name", METHODS)
every_aggregation = pytest.mark.parametrize("name", [name for name in METHODS if not _is_scalarizer(name)])
every_scalarizer = pytest.mark.parametrize("name", [name for name in METHODS if _is_scalarizer(name)])


def outcome(name: str) -> tuple[str, str]:
    """What becomes of something exported: a kind and a reason."""
    if inspect.isabstract(EXPORTED[name]):
        with pytest.raises(TypeError, match="got the class"):
            TorchJD(EXPORTED[name])
        return "abstract", "a base class"
    try:
        method = make_exported(name)
    except ImportError as error:
        return "extra missing", str(error)
    try:
        balancer = TorchJD(method)
    except ValueError as error:
        return "refused", str(error)
    model = make_model(balancer)
    model.backward(make_losses(model(make_input())))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model_parameters())
    assert any(p.grad.count_nonzero() for p in model.shared_parameters())
    return "usable", type(balancer).__mro__[2].__name__


def test_everything_exported_trains_or_is_refused_with_the_reason(
    record_testsuite_property: Callable[..., None],
) -> None:
    outcomes = {name: outcome(name) for name in EXPORTED}
    for name, (kind, reason) in outcomes.items():
        record_testsuite_property(name, f"{kind}: {reason}")
        print(f"{name:40} {kind:14} {reason}")
    by_kind: dict[str, set[str]] = {}
    for name, (kind, _) in outcomes.items():
        by_kind.setdefault(kind, set()).add(name)
    assert len(EXPORTED) == 43 + 13
    assert by_kind["abstract"] == ABSTRACT
    assert by_kind["refused"] == TWO_BATCHES
    for name in TWO_BATCHES:
        assert "product of the gradients of two independent batches" in outcomes[name][1]
    missing = by_kind.get("extra missing", set())
    assert missing <= WITH_EXTRAS
    assert all('pip install "torchjd[' in outcomes[name][1] for name in missing)
    assert len(by_kind["usable"]) == 56 - 3 - 2 - len(missing)


def test_nothing_else_is_exported() -> None:
    """What is called exported above is every module of the two packages whose name is not private."""
    for package in (aggregation, scalarization):
        public = {name for name, value in inspect.getmembers(package, inspect.isclass) if not name.startswith("_")}
        assert public == set(package.__all__)


# ---------------------------------------------------------------------------------------------- against torchjd itself


def on_gramian(weighting: nn.Module) -> bool:
    inner = getattr(weighting, "weighting", None) if isinstance(weighting, aggregation.CRMOGMWeighting) else None
    if inner is not None:
        return on_gramian(inner)
    return isinstance(weighting, _GramianWeighting | aggregation.MoDoWeighting | aggregation.SDMGradWeighting)


def by_hand(method: nn.Module, matrix: Tensor) -> Tensor:
    """What torchjd's method makes of a matrix of gradients."""
    if isinstance(method, Aggregator):
        return method(matrix)
    return method(matrix @ matrix.T if on_gramian(method) else matrix) @ matrix


def jacobian(model: MultiTaskModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """The representation, and the tasks' gradients on it by one autograd.grad per task."""
    z, losses = unwrapped_losses(model, x)
    rows = task_gradients([losses[task] for task in TASKS], [z])
    return z, torch.stack([gradient.flatten() for (gradient,) in rows])


@every_aggregation
def test_the_shared_gradient_is_torchjds(name: str) -> None:
    method = make_method(name)
    reference = copy.deepcopy(method)
    balancer = wrap(method)
    assert isinstance(balancer, GradientBalancer)
    model = make_model(balancer)
    for step in range(4):
        x = make_input(step)
        model.zero_grad()
        torch.manual_seed(step)
        model.backward(make_losses(model(x)))
        z, matrix = jacobian(model, x)
        torch.manual_seed(step)
        shared = by_hand(reference, matrix)
        expected = torch.autograd.grad(z, list(model.shared_parameters()), shared.reshape(z.shape))
        assert_close(grads(list(model.shared_parameters())), list(expected), rtol=1e-6, atol=1e-9)
        if isinstance(reference, WeightedAggregator | Weighting):
            assert_close(model.task_weights.double() @ matrix, shared, rtol=1e-6, atol=1e-9)
        else:
            assert model.task_weights is None


@every_aggregation
def test_heads_keep_the_gradient_of_their_own_loss(name: str) -> None:
    model = make_model(wrap(make_method(name)))
    x = make_input()
    model.backward(make_losses(model(x)))
    _, losses = unwrapped_losses(model, x)
    heads = list(model.head_parameters())
    assert_close(grads(heads), list(torch.autograd.grad(sum(losses.values()), heads)))


@every_scalarizer
def test_the_scalar_is_torchjds(name: str) -> None:
    method = make_method(name)
    reference = copy.deepcopy(method).to(DEVICE, torch.float64)
    balancer = TorchJD(method)
    assert isinstance(balancer, LossBalancer)
    model = make_model(balancer)
    for step in range(4):
        x = make_input(step)
        model.zero_grad()
        torch.manual_seed(step)
        total = model.scalarize(make_losses(model(x)))
        total.backward()
        torch.manual_seed(step)
        _, losses = unwrapped_losses(model, x)
        expected = reference(torch.stack(list(losses.values())))
        assert_close(total, expected)
        reference.zero_grad()
        wanted = [*model.model_parameters(), *reference.parameters()]
        by_torchjd = torch.autograd.grad(expected, wanted, allow_unused=True)
        ours = [*model.model_parameters(), *model.balancer_parameters()]
        assert_close(
            grads(ours), [torch.zeros_like(w) if g is None else g for g, w in zip(by_torchjd, wanted, strict=True)]
        )
        after_the_step(method, losses, step)
        after_the_step(reference, losses, step)


def after_the_step(method: nn.Module, losses: Any, step: int) -> None:
    """What torchjd leaves to the user's loop."""
    if isinstance(method, scalarization.FAMO):
        method.update(torch.stack([0.5 * loss.detach() * (1 + t) for t, loss in enumerate(losses.values())]))
    if isinstance(method, scalarization.DWA) and step % 2:
        method.step()


@pytest.mark.parametrize("kind", [scalarization.UW, scalarization.IMTLL])
def test_parameters_of_scalarizers_are_found_and_learned(kind: type[nn.Module]) -> None:
    method = kind(3)
    model = make_model(TorchJD(method))
    assert [id(p) for p in model.balancer_parameters()] == [id(p) for p in method.parameters()]
    optimizer = torch.optim.SGD(model.param_groups(lr=0.0, balancer_lr=0.01))
    model.backward(make_losses(model(make_input())))
    optimizer.step()
    assert next(method.parameters()).count_nonzero() == 3


@every_aggregation
def test_no_matrix_is_built_where_the_gramian_will_do(name: str) -> None:
    balancer = wrap(make_method(name))
    gradients = TaskGradients(normal(3, 9, gen=generator(1)).to(DEVICE))
    balancer.combine(gradients)
    inner = getattr(balancer.method, "gramian_weighting", balancer.method)
    assert ("matrix" in vars(gradients)) == (not on_gramian(inner))


# ------------------------------------------------------------------------------------------------- tasks, scales, NaN

# Those that keep something for every task.
REFUSING = {
    "aggregation.CRMOGMWeighting",
    "aggregation.ExcessMTL",
    "aggregation.ExcessMTLWeighting",
    "aggregation.GradVac",
    "aggregation.GradVacWeighting",
    "aggregation.MoDoWeighting",
    "aggregation.NashMTL",
    "aggregation.PCD",
    "aggregation.PCDWeighting",
    "aggregation.SDMGradWeighting",
    "CRMOGM-GradVac",
    "CRMOGM-MGDA",
    "ExcessMTL-warm-up",
    "NashMTL-seldom",
    "PCD-tau",
    "SDMGrad-preference",
    "scalarization.COSMOS",
    "scalarization.DWA",
    "scalarization.FAMO",
    "scalarization.PBI",
    "STCH-vectors",
}
# Those that see a gradient of zero: they have a number for every task.
WITH_ZEROS = {
    "aggregation.Constant",
    "aggregation.ConstantWeighting",
    "AlignedMTL-preference",
    "ConFIG-preference",
    "DualProj-preference",
    "GradDrop-leak",
    "UPGrad-preference",
}
NEED_THREE_ROWS = {"aggregation.Krum", "aggregation.KrumWeighting", "aggregation.TrimmedMean"}


def from_rows(*rows: Tensor | None) -> TaskGradients:
    """Task gradients as they arrive in a step; None for a task that takes no part."""
    return TaskGradients.from_parts(
        [[None if r is None else r[None].to(DEVICE) for r in rows]], [r is not None for r in rows]
    )


@every_aggregation
def test_an_absent_task(name: str) -> None:
    method = make_method(name)
    reference = copy.deepcopy(method)
    balancer = wrap(method)
    matrix = normal(3, 9, gen=generator(2)).to(DEVICE)
    gradients = from_rows(matrix[0], None, matrix[2])
    if name in REFUSING:
        with pytest.raises(
            ValueError, match=r"task 1 takes no part in this step, but .* keeps something for every task"
        ):
            balancer.combine(gradients)
        return
    if name in NEED_THREE_ROWS:
        with pytest.raises(ValueError, match="at least 3 rows"):
            balancer.combine(gradients)
        return
    torch.manual_seed(3)
    combined = balancer.combine(gradients)
    kept = matrix[[0, 2]]
    if name in WITH_ZEROS:
        kept = torch.stack([matrix[0], torch.zeros_like(matrix[1]), matrix[2]])
    torch.manual_seed(3)
    assert_close(combined, by_hand(reference, kept), rtol=1e-6, atol=1e-9)
    torch.manual_seed(3)
    weights = balancer.weigh(gradients)
    assert weights is None or (weights.shape == (3,) and weights[1] == 0)


@pytest.mark.parametrize("name", sorted(WITH_ZEROS))
def test_zeros_instead_of_an_absent_task_change_nothing(name: str) -> None:
    """The method of three tasks on two rows and one of zeros does what that of two tasks does on the two."""
    of_two = {
        "aggregation.Constant": lambda: aggregation.Constant(vector(0.5, 3.0)),
        "aggregation.ConstantWeighting": lambda: aggregation.Constant(vector(0.5, 3.0)),
        "AlignedMTL-preference": lambda: aggregation.AlignedMTL(vector(0.5, 3.0)),
        "ConFIG-preference": lambda: aggregation.ConFIG(vector(0.5, 3.0)),
        "DualProj-preference": lambda: aggregation.DualProj(vector(0.5, 3.0)),
        "GradDrop-leak": lambda: aggregation.GradDrop(leak=vector(0.1, 0.3)),
        "UPGrad-preference": lambda: aggregation.UPGrad(vector(0.5, 3.0)),
    }
    balancer = TorchJD(make_method(name))
    for seed in range(5):
        matrix = normal(3, 9, gen=generator(seed)).to(DEVICE)
        torch.manual_seed(3)
        combined = balancer.combine(from_rows(matrix[0], None, matrix[2]))
        torch.manual_seed(3)
        assert_close(combined, of_two[name]()(matrix[[0, 2]]), rtol=1e-6, atol=1e-9)


@every_scalarizer
def test_an_absent_task_of_a_scalarizer(name: str) -> None:
    method = make_method(name)
    balancer = TorchJD(method)
    model = make_model(balancer)
    losses = make_losses(model(make_input()))
    del losses["b"]
    if name in REFUSING:
        with pytest.raises(ValueError, match="task 1 takes no part in this step"):
            model.scalarize(losses)
        return
    torch.manual_seed(3)
    total = model.scalarize(losses)
    total.backward()
    values = torch.stack(list(losses.values())).detach()
    of_two = {
        "scalarization.Constant": lambda: scalarization.Constant(vector(0.5, 3.0)),
        "scalarization.IMTLL": lambda: scalarization.IMTLL(2),
        "scalarization.UW": lambda: scalarization.UW(2),
    }.get(name, partial(copy.deepcopy, method))()
    torch.manual_seed(3)
    assert_close(total.detach(), of_two.to(DEVICE)(values).detach())
    assert all(p.grad is None for p in model.heads["b"].parameters())
    for parameter in balancer.parameters():
        assert (parameter.grad != 0).tolist() == [True, False, True]


def test_a_missing_task_is_refused_before_the_backward() -> None:
    model = make_model(TorchJD(aggregation.PCD()))
    losses = make_losses(model(make_input()))
    del losses["a"], losses["c"]
    with pytest.raises(ValueError, match=r"tasks \[0, 2\] take no part in this step, but PCD keeps something"):
        model.scalarize(losses)
    with torch.no_grad():  # where nothing is balanced
        losses = make_losses(model(make_input()))
        del losses["a"]
        assert_close(model.scalarize(losses), sum(losses.values()))


@every_aggregation
@pytest.mark.parametrize("factor", [65536.0, 2.0**-20])
def test_a_loss_scale_does_not_reach_the_method(name: str, factor: float) -> None:
    results = []
    for scale in (1.0, factor):
        model = make_model(wrap(make_method(name)))
        for step in range(3):
            model.zero_grad()
            torch.manual_seed(step)
            (scale * model.scalarize(make_losses(model(make_input(step))))).backward()
        results.append((model.task_weights, [g / scale for g in grads(list(model.model_parameters()))]))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@every_aggregation
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("at", [0, 2])
def test_a_gradient_that_is_not_finite_leaves_the_state(name: str, bad: float, at: int) -> None:
    balancer, twin = wrap(make_method(name)), wrap(make_method(name))
    matrices = [normal(3, 9, gen=generator(seed)).to(DEVICE) for seed in range(4)]
    spoiled = matrices[at].clone()
    spoiled[1, 4] = bad
    for step, matrix in enumerate(matrices):
        if step == at:
            before = copy.deepcopy(state_of(balancer))
            weights = balancer.weigh(TaskGradients(spoiled))
            assert weights.shape == (3,)
            assert weights.isnan().all()
            assert not balancer(spoiled).isfinite().any()
            assert_same_state(state_of(balancer), before)
        torch.manual_seed(step)
        got = balancer(matrix)
        torch.manual_seed(step)
        assert_close(got, twin(matrix), **EXACT)
        assert got.isfinite().all()


@every_aggregation
@pytest.mark.parametrize("steps", [0, 2])
def test_in_evaluation_mode_it_decides_and_keeps_its_state(name: str, steps: int) -> None:
    balancer, twin = wrap(make_method(name)), wrap(make_method(name))
    matrices = [normal(3, 9, gen=generator(seed)).to(DEVICE) for seed in range(steps + 2)]

    def asked(each: TorchJD, step: int) -> Tensor:
        torch.manual_seed(step)
        return each(matrices[step])

    for step in range(steps):
        assert_close(asked(balancer, step), asked(twin, step), **EXACT)
    before = copy.deepcopy(state_of(balancer))
    balancer.eval()
    evaluated = [asked(balancer, steps) for _ in range(2)]
    assert_same_state(state_of(balancer), before)
    balancer.train()
    expected = asked(twin, steps)
    for got in (*evaluated, asked(balancer, steps)):
        assert_close(got, expected, **EXACT)
    assert_close(asked(balancer, steps + 1), asked(twin, steps + 1), **EXACT)


def test_a_grad_scaler_skips_the_step() -> None:
    model = make_model(TorchJD(aggregation.IMTLG()), torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for step in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        losses = make_losses(model(make_input(step, dtype=torch.float32)))
        if step == 1:
            losses["b"] = losses["b"] * torch.inf
        scaler.scale(model.scalarize(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert unchanged == (step == 1)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("name", ["scalarization.DWA", "scalarization.FAMO"])
def test_losses_that_are_not_finite_or_of_an_evaluation_leave_the_state(name: str) -> None:
    balancer = TorchJD(make_method(name)).to(DEVICE)
    balancer(vector(1.0, 2.0, 3.0))
    before = copy.deepcopy(state_of(balancer))
    assert before
    assert balancer(vector(1.0, torch.nan, 3.0)).isnan()
    with torch.no_grad():
        assert balancer(vector(4.0, 2.0, 3.0)).isfinite()
    balancer.eval()
    balancer(vector(5.0, 2.0, 3.0))
    assert_same_state(state_of(balancer), before)
    balancer.train()
    balancer(vector(5.0, 2.0, 3.0))
    with pytest.raises(AssertionError):
        assert_same_state(state_of(balancer), before)


def test_batches_of_another_size_are_refused_where_the_state_has_a_size() -> None:
    balancer = TorchJD(aggregation.ExcessMTL())
    model = make_model(balancer)
    model.backward(make_losses(model(make_input(0))))
    before = copy.deepcopy(state_of(balancer))
    with pytest.raises(ValueError, match=r"ExcessMTLWeighting .* state of gradients of shape \(3, 48\), got \(3, 32\)"):
        model.backward(make_losses(model(make_input(1, rows=4))))
    assert_same_state(state_of(balancer), before)
    balancer.reset()
    model.backward(make_losses(model(make_input(1, rows=4))))
    assert balancer.method.weighting._sq_grad_sum.shape == (3, 32)


# ------------------------------------------------------------------------------------------------------ state


# Everything of torchjd's with a state, the variants, and some without.
WITH_STATE = [name for name in METHODS if name not in EXPORTED or issubclass(EXPORTED[name], torchjd.Stateful)]
SOME_WITHOUT = ["aggregation.GradDrop", "aggregation.MGDA", "aggregation.Random", "scalarization.GeometricMean"]

every_state = pytest.mark.parametrize("name", [*WITH_STATE, *SOME_WITHOUT])


class Training:
    """A model in training; every step is determined by its number."""

    def __init__(self, name: str) -> None:
        self.model = make_model(wrap(make_method(name)), torch.float32)
        self.restart()

    def restart(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.param_groups(lr=0.01, balancer_lr=0.02))

    def train(self, steps: range) -> "Training":
        for step in steps:
            torch.manual_seed(step)
            self.optimizer.zero_grad()
            losses = make_losses(self.model(make_input(step, dtype=torch.float32)))
            self.model.backward(losses)
            self.optimizer.step()
            after_the_step(self.model.balancer.method, losses, step)
        return self

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> "Training":
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self

    def assert_equals(self, other: "Training") -> None:
        for mine, others in zip(self.model.parameters(), other.model.parameters(), strict=True):
            assert_close(mine, others, **EXACT)
        assert_close(grads(list(self.model.parameters())), grads(list(other.model.parameters())), **EXACT)
        assert_close(self.model.task_weights, other.model.task_weights, **EXACT)
        assert_same_state(state_of(self.model.balancer), state_of(other.model.balancer))


def through_file(state: Any) -> Any:
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def state_of(balancer: Any) -> dict[str, Any]:
    """What the method keeps besides its parameters, by part and attribute."""
    extra = balancer.get_extra_state()
    assert extra["method"] == type(balancer.method).__name__
    return torch.load(BytesIO(extra["state"]), weights_only=True)


def assert_same_state(one: Any, other: Any) -> None:
    """Plain data, equal to the bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert_close(one, other, equal_nan=True, **EXACT)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, others in zip(one, other, strict=True):
            assert_same_state(mine, others)
    else:
        assert one == other


@every_state
@pytest.mark.parametrize("saved_after", [0, 1, 3])
def test_resumes_bit_for_bit(name: str, saved_after: int) -> None:
    whole = Training(name).train(range(saved_after))
    saved = through_file(whole.state())
    whole.train(range(saved_after, 6))
    resumed = Training(name).load(saved).train(range(saved_after, 6))
    resumed.assert_equals(whole)


@every_state
def test_a_float16_step_that_overflows_in_a_head_moves_no_state(name: str) -> None:
    """Before any other step, and after one."""
    training, reference = Training(name), Training(name)
    for step in range(2):
        before = through_file(training.state())
        hook = training.model.heads["b"].weight.register_hook(lambda g: g * torch.inf)
        training.model.backward(float16_losses(training.model, make_input(10 + step, dtype=torch.float32)))
        hook.remove()
        training.optimizer.zero_grad()
        assert_same_state(through_file(training.state()), before)
        training.train(range(step, step + 1)).assert_equals(reference.train(range(step, step + 1)))


@every_state
def test_a_state_that_is_replaced_before_the_overflow_is_not_overwritten(name: str) -> None:
    training, fresh = Training(name).train(range(1)), Training(name)
    total = training.model.scalarize(float16_losses(training.model, make_input(5, dtype=torch.float32)))
    training.model.balancer.reset()
    training.model.heads["b"].weight.register_hook(lambda g: g * torch.inf)
    total.backward()
    assert_same_state(state_of(training.model.balancer), state_of(fresh.model.balancer))


@every_state
def test_another_pass_over_the_same_losses_takes_back_no_more_than_it_moved(name: str) -> None:
    training = Training(name)
    total = training.model.scalarize(float16_losses(training.model, make_input(dtype=torch.float32)))
    total.backward(retain_graph=True)
    before = through_file(training.state())
    training.model.heads["b"].weight.register_hook(lambda g: g * torch.inf)
    total.backward()
    assert_same_state(through_file(training.state()), before)


@every_state
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(name: str, tmp_path: Path) -> None:
    """Into a model that has made no step; the optimizer would need one, so it is made anew on both sides."""
    whole = Training(name).train(range(2))
    dcp.save(whole.model.state_dict(), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    resumed = Training(name)
    state = resumed.model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    resumed.model.load_state_dict(state)
    for training in (whole, resumed):
        training.restart()
        training.train(range(2, 4))
    resumed.assert_equals(whole)


@every_state
def test_loading_replaces_what_was_learned_before(name: str) -> None:
    fresh = Training(name)
    saved = through_file(fresh.state())
    used = Training(name).train(range(10, 13)).load(saved).train(range(3))
    used.assert_equals(fresh.train(range(3)))


@every_state
def test_reset_equals_fresh(name: str) -> None:
    used, fresh = Training(name).train(range(3)), Training(name)
    used.model.balancer.reset()
    assert_same_state(state_of(used.model.balancer), state_of(fresh.model.balancer))
    used.model.backbone.load_state_dict(fresh.model.backbone.state_dict())
    used.model.heads.load_state_dict(fresh.model.heads.state_dict())
    used.restart()
    used.train(range(3)).assert_equals(fresh.train(range(3)))


@every_state
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda trained: pickle.loads(pickle.dumps(trained))])
def test_copies_train_on_alike_and_share_nothing(name: str, duplicate: Callable[[Training], Training]) -> None:
    training = Training(name).train(range(2))
    copied, kept = duplicate(training), copy.deepcopy(training)
    assert type(copied.model.balancer) is type(training.model.balancer)
    copied.train(range(2, 4))
    for mine, others in zip(training.model.parameters(), kept.model.parameters(), strict=True):
        assert_close(mine, others, **EXACT)
    assert_same_state(state_of(training.model.balancer), state_of(kept.model.balancer))
    copied.assert_equals(training.train(range(2, 4)))


@every_method
def test_only_what_has_state_saves_some(name: str) -> None:
    training = Training(name).train(range(2))
    saved = state_of(training.model.balancer)
    stateful = any(
        isinstance(module, torchjd.Stateful) and not isinstance(module, scalarization.UW | scalarization.IMTLL)
        for module in training.model.balancer.method.modules()
    )
    assert bool(saved) == stateful
    assert stateful <= (name in WITH_STATE)
    keys = {key for key in training.model.state_dict() if key.startswith("balancer.")}
    assert keys == {"balancer._extra_state", *(f"balancer.{k}" for k, _ in training.model.balancer.named_parameters())}


def test_an_option_that_is_changed_in_training_is_saved_and_one_given_anew_is_kept() -> None:
    def made(beta: float) -> TorchJD:
        return TorchJD(GramianWeightedAggregator(aggregation.CRMOGMWeighting(aggregation.GradVacWeighting(beta=beta))))

    used = made(0.5)
    used(normal(3, 4, gen=generator(0)))
    used.method.gramian_weighting.alpha = 0.25
    resumed = made(0.75)
    resumed.load_state_dict(through_file(used.state_dict()))
    assert resumed.method.gramian_weighting.alpha == 0.25
    assert resumed.method.gramian_weighting.weighting.beta == 0.75
    resumed.reset()
    assert resumed.method.gramian_weighting.alpha == 0.9
    assert resumed.method.gramian_weighting._lambda is None


def test_a_method_that_was_used_before_keeps_its_state_until_reset() -> None:
    method, twin = aggregation.GradVac(), aggregation.GradVac()
    first, second = normal(3, 4, gen=generator(0)), normal(3, 4, gen=generator(1))
    for each in (method, twin):
        torch.manual_seed(0)
        each(first)
    balancer = TorchJD(method)
    saved = through_file(balancer.state_dict())
    resumed = TorchJD(aggregation.GradVac())
    resumed.load_state_dict(saved)
    torch.manual_seed(1)
    expected = twin(second)
    for each in (balancer, resumed):
        torch.manual_seed(1)
        assert_close(each(second), expected)
        each.reset()
        assert state_of(each) == {}


def test_the_state_of_another_method_is_refused() -> None:
    used = TorchJD(aggregation.GradVac())
    used(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"the checkpoint holds the state of GradVac; expected one of PCD\."):
        TorchJD(aggregation.PCD()).load_state_dict(used.state_dict())
    buffer = BytesIO()
    torch.save({"weighting.weighting": {"_psi": torch.ones(2)}}, buffer)
    saved = {"_extra_state": {"method": "GradVac", "state": buffer.getvalue()}}
    with pytest.raises(ValueError, match=r"the checkpoint has \['_psi'\] for GradVac, which has none"):
        TorchJD(aggregation.GradVac()).load_state_dict(saved)


class Remembering(Weighting[PSDMatrix]):
    """A weighting of a user, with state of a kind that cannot be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.dtypes: list[torch.dtype] = []

    def forward(self, gramian: Tensor, /) -> Tensor:
        self.seen = {*self.seen, len(self.seen)}
        self.dtypes.append(gramian.dtype)
        return gramian.new_ones(len(gramian))


def test_what_cannot_be_saved_is_named_in_a_warning() -> None:
    balancer = TorchJD(Remembering())
    balancer.state_dict()
    balancer(torch.ones(2, 3))
    with pytest.warns(UserWarning, match=r"Remembering\.seen has changed and is not in the state_dict, for a set"):
        saved = balancer.state_dict()
    resumed = TorchJD(Remembering())
    resumed.load_state_dict(saved)
    assert resumed.method.dtypes == [torch.float64]
    balancer.reset()
    assert (balancer.method.seen, balancer.method.dtypes) == (set(), [])


@pytest.mark.parametrize("name", ["aggregation.PCD", "aggregation.GradVac", "aggregation.ExcessMTL", "CRMOGM-MGDA"])
def test_a_change_of_precision_does_not_restart_or_round_the_state(name: str) -> None:
    training = Training(name).train(range(2))
    before = copy.deepcopy(state_of(training.model.balancer))
    training.model.half()
    assert_same_state(state_of(training.model.balancer), before)
    training.model.double()
    balancer, twin = training.model.balancer, copy.deepcopy(training.model.balancer)
    matrix = normal(3, 48, gen=generator(0)).to(DEVICE)
    torch.manual_seed(0)
    wide = balancer(matrix.double())
    torch.manual_seed(0)
    assert_close(wide.float(), twin(matrix.float()), rtol=1e-4, atol=1e-5)
    fresh = wrap(make_method(name))
    torch.manual_seed(0)
    assert (fresh(matrix) - wide).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------- arguments and kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gramians_are_in_double_precision(dtype: torch.dtype) -> None:
    balancer = TorchJD(Remembering())
    balancer(torch.ones(2, 3, dtype=dtype, device=DEVICE))
    assert balancer.method.dtypes == [torch.float64]


class OnMatrix(Weighting[Matrix]):
    """A weighting of a user, on the matrix."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        self.dtype = matrix.dtype
        return 1 / matrix.norm(dim=1)


class NotByWeights(WeightedAggregator):
    """An aggregator of a user that does not simply go by its weighting."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        return super().forward(matrix).sign()


@pytest.mark.parametrize(
    ("dtype", "given"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_matrices_are_in_single_precision_at_least(dtype: torch.dtype, given: torch.dtype) -> None:
    balancer = TorchJD(OnMatrix())
    matrix = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=dtype, device=DEVICE)
    assert_close(balancer(matrix).double(), vector(0.6, 1.8), rtol=1e-3, atol=0)
    assert balancer.method.dtype == given


def test_an_aggregator_that_does_not_go_by_its_weights_gets_the_matrix() -> None:
    balancer = TorchJD(NotByWeights(OnMatrix()))
    gradients = TaskGradients(torch.tensor([[3.0, -4.0], [0.0, 2.0]], device=DEVICE))
    assert balancer.weigh(gradients) is None
    assert balancer.combine(gradients).tolist() == [1.0, 1.0]


def test_options_that_are_tensors_come_to_the_precision_of_the_gradients() -> None:
    """torchjd alone refuses a preference in float32 for a Gramian in float64, and a direction for losses."""
    for make in (lambda p: aggregation.AlignedMTL(p), lambda p: aggregation.ConFIG(p)):
        matrix = normal(3, 5, gen=generator(0)).to(DEVICE)
        single = TorchJD(make(torch.tensor([0.5, 2.0, 3.0])))
        assert_close(single(matrix), make(vector(0.5, 2.0, 3.0))(matrix))
        assert state_of(single) == {}
    losses = vector(1.0, 2.0, 3.0)
    balancer = TorchJD(scalarization.PBI(1.0, torch.tensor([0.5, 2.0, 3.0])))
    assert_close(balancer(losses), scalarization.PBI(1.0, vector(0.5, 2.0, 3.0))(losses))


def test_a_composed_weighting_has_to_say_what_it_is_for() -> None:
    composed = aggregation.MGDAWeighting() << (lambda matrix: matrix @ matrix.T)
    with pytest.raises(ValueError, match=r"_Composition does not say what it is made for; expected on='gramian'"):
        TorchJD(composed)
    matrix = normal(3, 5, gen=generator(0))
    assert_close(TorchJD(composed, on="matrix")(matrix), aggregation.MGDA()(matrix))
    assert repr(TorchJD(composed, on="matrix")).endswith("on='matrix')")


def test_functions_of_torchjds_other_packages_are_refused() -> None:
    for function in (autojac.backward, autojac.mtl_backward):
        with pytest.raises(TypeError, match=rf"got the function {function.__name__}; its work is done by the backward"):
            TorchJD(function)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: TorchJD(aggregation.MGDA), TypeError, "got the class MGDA; make an object of it"),
        (lambda: TorchJD(mtlwrap.IMTLG()), TypeError, "got IMTLG, which is a balancer of mtlwrap already"),
        (
            lambda: TorchJD("mgda"),
            TypeError,
            "expected a Weighting, Aggregator or Scalarizer object of torchjd, got str",
        ),
        (lambda: TorchJD(None), TypeError, "got NoneType"),
        (lambda: TorchJD(nn.Linear(2, 2)), TypeError, "got Linear"),
        (
            lambda: TorchJD(aggregation.MGDA(), on="matrix"),
            ValueError,
            "on: MGDA is made for the gramian, got 'matrix'",
        ),
        (lambda: TorchJD(aggregation.ConFIG(), on="gramian"), ValueError, "on: ConFIG is made for the matrix"),
        (lambda: TorchJD(aggregation.MGDA(), on="jacobian"), ValueError, "expected 'gramian', 'matrix' or None, got"),
        (lambda: TorchJD(scalarization.Mean(), on="gramian"), ValueError, "on: a Scalarizer gets the losses"),
        (lambda: TorchJD(aggregation.MoDoWeighting()), ValueError, r"TorchJD\(MoDoWeighting\(...\), on='gramian'\)"),
        (lambda: TorchJD(aggregation.MoDoWeighting(), on="matrix"), ValueError, r"takes a matrix of shape \[T, T\]"),
        (
            lambda: TorchJD(aggregation.CRMOGMWeighting(aggregation.SDMGradWeighting())),
            ValueError,
            "SDMGradWeighting is made for the product of the gradients of two independent batches",
        ),
    ],
)
def test_bad_arguments(given: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        given()


def test_a_result_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a result of shape \(2,\), got the shape \(3,\)"):
        TorchJD(aggregation.MeanWeighting() << torch.t, on="matrix")(torch.ones(2, 3))


@pytest.mark.parametrize(
    "method",
    [
        lambda: aggregation.Constant(torch.ones(2)),
        lambda: aggregation.AlignedMTL(torch.ones(2)),
        lambda: aggregation.GradDrop(leak=torch.ones(2)),
        lambda: aggregation.PCD(tau=torch.full((1,), 0.1)),
        lambda: scalarization.UW(2),
        lambda: scalarization.FAMO(2),
        lambda: scalarization.PBI(1.0, torch.ones(2)),
    ],
)
def test_a_method_of_another_number_of_tasks_is_refused_when_wrapping(method: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="was made for 2 tasks, but the model has 3 heads"):
        MultiTaskModel(make_backbone(), make_heads(), TorchJD(method()))


def test_kinds() -> None:
    gradient, loss = TorchJD(aggregation.IMTLG()), TorchJD(scalarization.UW(3))
    assert isinstance(gradient, TorchJDGradient)
    assert isinstance(loss, TorchJDLoss)
    for balancer in (gradient, loss):
        assert isinstance(balancer, TorchJD)
        assert isinstance(balancer, mtlwrap.Balancer)
        assert isinstance(balancer, GradientBalancer) != isinstance(balancer, LossBalancer)
    assert repr(gradient) == "TorchJD(IMTLG())"
    assert repr(loss) == "TorchJD(UW(shape=(3,)))"


def test_composed_with_others_and_with_each_other() -> None:
    x = make_input()
    for loss, reference in (
        (mtlwrap.UW(init=[0.25, -0.5, 0.125]), None),
        (TorchJD(scalarization.Constant(vector(0.5, 2.0, 3.0))), vector(0.5, 2.0, 3.0)),
    ):
        model = make_model(Compose(loss=loss, gradient=TorchJD(aggregation.MGDA())))
        model.backward(make_losses(model(x)))
        _, matrix = jacobian(model, x)
        factors = 0.5 * (-vector(0.25, -0.5, 0.125)).exp() if reference is None else reference
        scaled = factors[:, None] * matrix
        expected = aggregation.MGDAWeighting()(scaled @ scaled.T) * factors
        assert_close(model.task_weights, expected)
    with pytest.raises(TypeError, match="loss: expected a LossBalancer or None, got TorchJDGradient"):
        Compose(loss=TorchJD(aggregation.MGDA()))


def test_with_a_fork_of_its_own() -> None:
    balancer = TorchJD(aggregation.MGDA())
    z = normal(4, 3, gen=generator(0)).to(DEVICE).requires_grad_()
    shared = fork(z, balancer, 2)
    shared.scalarize([shared.aliases[0].square().sum(), 3 * shared.aliases[1].sin().sum()]).backward()
    plain = z.detach()
    matrix = torch.stack([(2 * plain).flatten(), (3 * plain.cos()).flatten()])
    assert_close(z.grad.flatten(), aggregation.MGDA()(matrix))


# ------------------------------------------------------------------------------------------- an optional dependency


def test_the_core_does_not_import_torchjd() -> None:
    script = (
        "import sys, mtlwrap, mtlwrap.balancers.torch_jd; assert not any('torchjd' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_torchjd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r"TorchJD needs the package torchjd: pip install 'mtlwrap\[torchjd\]'"):
        TorchJD(nn.Linear(1, 1))
