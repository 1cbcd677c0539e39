"""Where the processes differ in what they run: either the law holds, or all refuse, and training goes on."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributions import Normal
from torch.nn.parallel import DistributedDataParallel
from torchjd.aggregation import GradDrop, PCGrad, Random
from torchjd.scalarization import Random as RandomScalarizer

from mtlwrap import IMTLG, IMTLL, ExcessMTL, MultiTaskModel, TorchJD
from tests.common import Normalised, make_backbone, make_heads, make_input, make_losses
from tests.processes.training import Spec, close, make, whole, wrapped

# Predictions of each rank that is served, for the n-th batch of this step; or of only one, by one head.
Call = Callable[..., Any]
Losses = dict[int, dict[str, Tensor]]


def some(predictions: Mapping[str, Tensor], tasks: str) -> dict[str, Tensor]:
    return make_losses({task: predictions[task] for task in tasks})


def batch(step: int, rank: int, number: int) -> Tensor:
    return make_input(100 * step + 10 * rank + number, 3 + 2 * rank).cpu()


# A program makes, in each step, some totals that are run backward together: for each, the losses of each rank.


def idle(call: Call, step: int) -> list[Losses]:
    found = call(0)
    losses = {rank: some(predictions, "abc") for rank, predictions in found.items()}
    if 1 in losses:
        losses[1] = {task: loss.detach() for task, loss in losses[1].items()}
    return [losses]


def two_forwards(call: Call, step: int) -> list[Losses]:
    """Each loss reads two forwards; the second rank lacks a task."""
    first, second = call(0), call(1)
    losses: Losses = {}
    for rank in first:
        tasks = "abc" if rank == 0 else "ac"
        pairs = zip(some(first[rank], tasks).items(), some(second[rank], tasks).values(), strict=True)
        losses[rank] = {task: one + other for (task, one), other in pairs}
    return [losses]


def in_between(call: Call, step: int) -> list[Losses]:
    found = call(0)
    call(1)  # looked at under gradients, never scalarized
    return [{rank: some(predictions, "abc" if rank == 0 else "b") for rank, predictions in found.items()}]


def two_totals(call: Call, step: int) -> list[Losses]:
    first, second = call(0), call(1)
    return [
        {rank: some(predictions, "abc" if rank == 0 else "b") for rank, predictions in first.items()},
        {rank: some(predictions, "ab" if rank == 0 else "c") for rank, predictions in second.items()},
    ]


def in_groups(labels: Sequence[str], call: Call, step: int) -> list[Losses]:
    """A forward for two tasks and one for the third."""
    first, second = call(0, tasks=["a", "b"]), call(1, tasks="c")
    return [{rank: some({**first[rank], **second[rank]}, labels[rank]) for rank in first}]


def looked_at_again(call: Call, step: int) -> list[Losses]:
    """Another forward of one head before the losses of the first, where a rank has no labels."""
    found = call(0)
    call(1, tasks="c")
    return [{rank: some(predictions, "abc" if rank == 0 else "") for rank, predictions in found.items()}]


def another_dtype(call: Call, step: int) -> list[Losses]:
    losses = {rank: some(predictions, "abc") for rank, predictions in call(0).items()}
    if 1 in losses:
        losses[1] = {task: loss.float() for task, loss in losses[1].items() if task != "a"}
    return [losses]


def a_task_each(call: Call, step: int) -> list[Losses]:
    """Each rank runs one head, another one in the next step."""
    losses = {}
    for rank in range(2):
        task = "ab"[(rank + step) % 2]
        if (found := call(0, tasks=task, only=rank)) is not None:
            losses[rank] = some(found, task)
    return [losses]


ALIKE = (a_task_each, idle, two_forwards, in_between, looked_at_again, two_totals, another_dtype)
PROGRAMS: dict[str, Callable[[Call, int], list[Losses]]] = {
    **{f.__name__: f for f in ALIKE},
    "in_groups, c nowhere": partial(in_groups, ["ab", "ab"]),
    "in_groups, little": partial(in_groups, ["ab", "a"]),
    "in_groups, c once": partial(in_groups, ["abc", "ab"]),
}


class Spread(nn.Module):
    """A head that returns what nobody can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.location = nn.Linear(8, 2)

    def forward(self, z: Tensor) -> Normal:
        return Normal(self.location(z), 1.0)


def train(model: MultiTaskModel, call: Callable[[int], Call], program: str) -> list[dict[str, Tensor]]:
    """What three steps left, of one rank or of all."""
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01, balancer_lr=0.01))
    left = []
    for step in range(3):
        optimizer.zero_grad()
        totals = []
        for losses in PROGRAMS[program](call(step), step):
            own = next(iter(losses.values())) if len(losses) == 1 else mean_over_ranks(losses)
            totals.append(model.scalarize(own))
        torch.stack([*totals]).sum().backward()
        left.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        left[-1] |= {f"balancer.{name}": whole(value) for name, value in model.balancer.state_dict().items()}
        optimizer.step()
    return left


def mean_over_ranks(losses: Losses) -> dict[str, Tensor]:
    means: dict[str, Tensor] = {}
    for own in losses.values():
        for task, loss in own.items():
            if loss.requires_grad:
                means[task] = means.get(task, 0.0) + loss / len(losses)
    return means


def in_processes(rank: int, size: int, spec: Spec, program: str) -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    model = make(spec)
    outer = wrapped(model, spec)

    def call(step: int) -> Call:
        def own(number: int, *, tasks: Any = None, only: int | None = None) -> Any:
            if only is not None:
                return outer(batch(step, rank, number), tasks=tasks) if only == rank else None
            return {rank: outer(batch(step, rank, number), tasks=tasks)}

        return own

    return train(model, call, program)


def in_one(size: int, spec: Spec, program: str) -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    model = make(spec)

    def call(step: int) -> Call:
        def joined(number: int, *, tasks: Any = None, only: int | None = None) -> Any:
            if only is None or not known:
                wanted = tasks if only is None else None
                batches = [batch(step, rank, number) for rank in range(size)]
                rows = [len(b) for b in batches]
                pieces = {task: p.split(rows) for task, p in model(torch.cat(batches), tasks=wanted).items()}
                known.update({rank: {task: piece[rank] for task, piece in pieces.items()} for rank in range(size)})
            return dict(known) if only is None else known[only]

        known: dict[int, dict[str, Any]] = {}
        return joined

    return train(model, call, program)


LAWFUL = [
    *((program, balancer, "ddp") for program in ("idle", "in_between") for balancer in ("imtl", "uw", "rotograd")),
    *((program, balancer, "fsdp") for program in ("idle", "in_between") for balancer in ("imtl", "uw")),
    *(("two_forwards", balancer, wrap) for balancer in ("imtl", "uw") for wrap in ("ddp", "fsdp")),
    *(("two_totals", balancer, "ddp") for balancer in ("imtl", "uw", "excess-mtl")),
    *(
        (f"in_groups, {labels}", balancer, "ddp")
        for labels in ("c nowhere", "little", "c once")
        for balancer in ("imtl-g", "imtl", "excess-mtl", "uw")
    ),
    ("looked_at_again", "uw", "ddp"),
    *(("a_task_each", balancer, "unused") for balancer in ("imtl", "uw", "excess-mtl")),
    ("another_dtype", "famo", "ddp"),
    ("another_dtype", "imtl", "ddp"),
]


@pytest.mark.parametrize(("program", "balancer", "wrap"), LAWFUL)
def test_lawful(pools, program, balancer, wrap):
    spec = Spec(balancer, wrap=wrap)
    if wrap == "unused":
        spec = Spec(balancer, ddp={"find_unused_parameters": True})
    tolerance = 1e-5 if program == "another_dtype" else 1e-9
    wanted = in_one(2, spec, program)
    ranks = pools[2].run(in_processes, spec, program)
    for rank, left in enumerate(ranks):
        for step, (got, want) in enumerate(zip(left, wanted, strict=True)):
            assert got.keys() >= want.keys()
            for name in got:  # DDP makes zeros for a head without a loss anywhere
                wanted_here = want.get(name, torch.zeros_like(got[name]))
                close(got[name], wanted_here, tolerance, f"rank {rank}, step {step}, {name}")
                # Else they drift apart.
                assert torch.equal(got[name], ranks[0][step][name]), f"rank {rank}, step {step}, {name}"


def distributions(rank: int, size: int, balancer: str, hidden: str, *, one: bool = False) -> dict[str, Tensor]:
    """Gradients where some heads hide their tensors, and the first has a loss on one rank only."""
    torch.manual_seed(1)
    heads = {task: Spread() if task in hidden else head for task, head in make_heads().items()}
    model = MultiTaskModel(make_backbone(), heads, balancer).double()
    outer = model if one else DistributedDataParallel(model)
    for step in range(2):
        model.zero_grad()
        ranks = range(size) if one else [rank]
        predictions = outer(torch.cat([batch(step, r, 0) for r in ranks]))
        losses: Losses = {}
        start = 0
        for r in ranks:
            rows = slice(start, start := start + 3 + 2 * r)
            tasks = "abc" if r == 0 else "bc"
            losses[r] = some({t: p[rows] for t, p in predictions.items() if t not in hidden}, tasks.strip(hidden))
            losses[r] |= {t: -predictions[t].log_prob(torch.ones(2))[rows].mean() for t in hidden if t in tasks}
        model.backward(mean_over_ranks(losses) if one else losses[rank])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("hidden", ["a", "abc"])
@pytest.mark.parametrize("balancer", ["imtl", "equal-weighting"])
def test_heads_that_hide_their_tensors(pools, balancer, hidden):
    wanted = distributions(0, 2, balancer, hidden, one=True)
    for got in pools[2].run(distributions, balancer, hidden):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            close(got[name], value, 1e-9, name)


class SyncBatchNorm(torch.autograd.Function):
    """Subtracts the mean over all processes; torch's own, whose name it has, has no kernel for CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - _mean_of_all(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient - _mean_of_all(gradient)


def _mean_of_all(rows: Tensor) -> Tensor:
    total = torch.cat([rows.detach().sum(0), rows.new_tensor([float(len(rows))])])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total[:-1] / total[-1]


class NaiveSyncBatchNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SyncBatchNorm.apply(x)


def synchronised(
    rank: int, size: int, where: str, tasks: str, options: Mapping[str, Any], *, one: bool = False
) -> dict[str, Tensor]:
    torch.manual_seed(1)
    backbone, heads = make_backbone(), make_heads()
    if where == "backbone":
        backbone = nn.Sequential(nn.Linear(5, 8, bias=False), NaiveSyncBatchNorm(), nn.Tanh())
    else:
        heads = {
            task: nn.Sequential(nn.Linear(8, 4, bias=False), NaiveSyncBatchNorm(), nn.Linear(4, 2)) for task in "abc"
        }
    model = MultiTaskModel(backbone, heads, "imtl-g", **options).double()
    outer = model if one else DistributedDataParallel(model)
    for step in range(2):
        model.zero_grad()
        ranks = range(size) if one else [rank]
        pieces = (
            {t: p.split([3, 5]) for t, p in outer(torch.cat([batch(step, r, 0) for r in ranks])).items()} if one else {}
        )
        losses: Losses = {}
        for r in ranks:
            own = {t: piece[r] for t, piece in pieces.items()} if one else outer(batch(step, r, 0))
            losses[r] = some(own, "abc" if r == 0 else tasks)
        model.backward(mean_over_ranks(losses) if one else losses[rank])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


EXACT = {"gradients": "parameters"}
MODES = {"on z": {}, "exact": EXACT, "weighed heads": {"weigh_heads": True}, "both": {**EXACT, "weigh_heads": True}}


@pytest.mark.parametrize("tasks", ["ab", ""])
@pytest.mark.parametrize(
    ("where", "mode"), [*(("backbone", mode) for mode in MODES), ("heads", "on z"), ("heads", "exact")]
)
def test_layers_that_communicate_in_the_backward(pools, where, mode, tasks):
    options = MODES[mode]
    wanted = synchronised(0, 2, where, tasks, options, one=True)
    for got in pools[2].run(synchronised, where, tasks, options):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            close(got[name], value, 1e-9, name)


class Unit(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return Normalised.apply(z)


def normalised(rank: int, size: int, options: Mapping[str, Any]) -> bool:
    torch.manual_seed(1)
    heads = {**make_heads(), "b": nn.Sequential(Unit(), nn.Linear(8, 2))}
    model = MultiTaskModel(make_backbone(), heads, "imtl-g", **options).double()
    outer = DistributedDataParallel(model)
    for step in range(2):
        model.zero_grad()
        model.backward(some(outer(batch(step, rank, 0)), "abc" if rank == 0 else "ac"))
    return all(bool(p.grad.isfinite().all()) for p in model.shared_parameters())


@pytest.mark.parametrize("options", [{}, {"gradients": "parameters"}], ids=["on z", "exact"])
def test_what_a_head_makes_of_nothing_does_not_count(pools, options):
    assert pools[2].run(normalised, options) == [True, True]


def skipping(rank: int, size: int, balancer: str) -> list[bool]:
    """A task a step; a batch is skipped after its forward, on one rank only in the end."""
    spec = Spec(balancer, ddp={"find_unused_parameters": True})
    model = make(spec)
    outer = wrapped(model, spec)
    trained = []
    for step, task in enumerate("abcabc"):
        model.zero_grad()
        predictions = outer(batch(step, rank, 0), tasks=task)
        if step == 1:
            continue
        model.backward(some(predictions, task))
        trained.append(all(p.grad is not None and bool(p.grad.any()) for p in model.heads[task].parameters()))
    return trained


@pytest.mark.parametrize("balancer", ["imtl", "uw"])
def test_a_batch_that_is_skipped_after_its_forward(pools, balancer):
    assert pools[2].run(skipping, balancer) == [[True] * 5] * 2


def distance(predictions: Mapping[str, Tensor]) -> Tensor:
    return (predictions["a"].mean() - predictions["b"].mean()).square()


def auxiliaries(rank: int, size: int, wrap: str, ddp: Mapping[str, Any]) -> list[float]:
    """How far from one process with an auxiliary loss that reads predictions, from the second step on."""
    spec = Spec("uw", wrap=wrap, ddp=ddp)
    model, alone = make(spec), make(spec)
    outer = wrapped(model, spec)
    off = []
    for step in range(3):
        model.zero_grad(), alone.zero_grad()
        own = outer(batch(step, rank, 0))
        tasks = ["abc", "abc" if step == 0 or ddp else "ac"]
        model.backward(some(own, tasks[rank]), distance(own) if step else None)
        rows = [3, 5]
        pieces = {t: p.split(rows) for t, p in alone(torch.cat([batch(step, r, 0) for r in range(2)])).items()}
        each = [{task: piece[r] for task, piece in pieces.items()} for r in range(2)]
        losses = mean_over_ranks({r: some(each[r], tasks[r]) for r in range(2)})
        alone.backward(losses, (distance(each[0]) + distance(each[1])) / 2 if step else None)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            off.append((whole(p.grad) - q.grad).abs().max().item() / (1 + q.grad.abs().max().item()))
    return off


@pytest.mark.parametrize(("wrap", "ddp"), [("fsdp", {}), ("ddp", {"static_graph": True})], ids=["fsdp", "static"])
def test_an_auxiliary_with_a_loss_balancer_needs_no_second_pass(pools, wrap, ddp):
    for off in pools[2].run(auxiliaries, wrap, ddp):
        assert max(off) < 1e-9


def auxiliary_of_one(rank: int, size: int, wrap: str, which: int, has_losses: bool) -> list[float]:
    """An auxiliary loss on one rank only, that reads what has no loss on any."""
    spec = Spec("uw", wrap=wrap)
    model, alone = make(spec), make(spec)
    outer = wrapped(model, spec)
    off = []
    for step in range(2):
        model.zero_grad(), alone.zero_grad()
        tasks = "bc" if has_losses else ""
        own = outer(batch(step, rank, 0))
        model.backward(some(own, tasks), distance(own) if rank == which else None)
        pieces = {t: p.split([3, 5]) for t, p in alone(torch.cat([batch(step, r, 0) for r in range(2)])).items()}
        each = [{task: piece[r] for task, piece in pieces.items()} for r in range(2)]
        total = distance(each[which]) / 2
        if has_losses:
            alone.backward(mean_over_ranks({r: some(each[r], tasks) for r in range(2)}), total)
        else:
            total.backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            expected = torch.zeros_like(q) if q.grad is None else q.grad
            found = expected * 0 if p.grad is None else whole(p.grad)
            off.append((found - expected).abs().max().item() / (1 + expected.abs().max().item()))
    return off


@pytest.mark.parametrize("has_losses", [True, False])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
def test_an_auxiliary_loss_of_one_process_runs_the_heads_of_all(pools, wrap, which, has_losses):
    for off in pools[2].run(auxiliary_of_one, wrap, which, has_losses):
        assert max(off) < 1e-9


def watched(rank: int, size: int, how: str, which: tuple[int, ...], balancer: str) -> list[float]:
    """How far from one process, with gradients on parameters, while something looks on in some processes only."""
    spec = Spec(balancer, options={"gradients": "parameters"})
    model, alone = make(spec), make(spec)
    outer, is_in, x = wrapped(model, spec), rank in which, batch(0, rank, 0)
    if is_in and how == "hook of a parameter":
        model.backbone[0].weight.register_hook(lambda g: None)
    if is_in and how == "hook of a module":
        model.backbone.register_full_backward_hook(lambda module, g_in, g_out: None)
    if how == "input that wants a gradient":
        x.requires_grad_(is_in)
    own = outer(x)
    auxiliary = distance(own) if is_in and how == "auxiliary" else None
    model.backward(some(own, "abc"), auxiliary)
    pieces = {t: p.split([3, 5]) for t, p in alone(torch.cat([batch(0, r, 0) for r in range(2)])).items()}
    each = [{task: piece[r] for task, piece in pieces.items()} for r in range(2)]
    extra = sum(distance(each[r]) for r in which) / 2 if how == "auxiliary" else None
    alone.backward(mean_over_ranks({r: some(each[r], "abc") for r in range(2)}), extra)
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return [(p.grad - q.grad).abs().max().item() / q.grad.abs().max().item() for p, q in pairs if q.grad.any()]


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
@pytest.mark.parametrize("balancer", ["imtl-g", "grad-norm"])
@pytest.mark.parametrize("how", ["hook of a parameter", "hook of a module", "input that wants a gradient", "auxiliary"])
def test_who_looks_on_in_one_process_changes_nothing_in_another(pools, how, balancer, which):
    for off in pools[2].run(watched, how, which, balancer):
        assert max(off) < 1e-9


def freed(rank: int, size: int) -> bool:
    spec = Spec("imtl")
    model = make(spec)
    outer: Any = wrapped(model, spec)
    with outer.no_sync():
        outer(batch(0, rank, 0), tasks="c")["c"].square().mean().backward()
    model.zero_grad()
    model.backward(some(outer(batch(1, rank, 0), tasks=["a", "b"]), "ab" if rank == 0 else ""))
    return all(p.grad is not None for p in model.heads["a"].parameters())


def test_a_plain_backward_before(pools):
    assert pools[2].run(freed) == [True, True]


def twice(rank: int, size: int, wrap: str) -> list[float]:
    """Two totals of one forward, the first to look at, where a rank has no labels."""
    spec = Spec("imtl", wrap=wrap)
    model = make(spec)
    outer = wrapped(model, spec)
    totals = []
    for step in range(2):
        losses = some(outer(batch(step, rank, 0)), "abc" if rank == 0 else "")
        totals.append(model.scalarize(losses).item())
        model.backward(losses)
    return [*totals, *(float(whole(p.grad).sum()) for p in model.parameters())]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_totals_of_one_forward(pools, wrap):
    first, second = pools[2].run(twice, wrap)
    assert first == second
    assert all(first)


RANDOM: dict[str, Any] = {"Random": Random, "GradDrop": GradDrop, "PCGrad": PCGrad, "scalarizer": RandomScalarizer}


def draws(rank: int, size: int, name: str) -> list[dict[str, Tensor]]:
    torch.manual_seed(10 + rank)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        balancer = TorchJD(RANDOM[name]())
        model = MultiTaskModel(make_backbone(), make_heads(), balancer, gradients="parameters").double()
    outer = DistributedDataParallel(model)
    left = []
    for _ in range(3):
        before = torch.get_rng_state()
        model.zero_grad()
        model.backward(some(outer(batch(0, rank, 0)), "abc"))
        assert torch.equal(before, torch.get_rng_state())
        model.backbone[0].weight.data.mul_(1.01)
        left.append({key: p.grad.clone() for key, p in model.named_parameters()})
        left[-1]["weights"] = torch.zeros(()) if model.task_weights is None else model.task_weights.clone()
    return left


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_draw_alike(pools, name):
    first, second = pools[2].run(draws, name)
    for mine, theirs in zip(first, second, strict=True):
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key
    if name in ("Random", "scalarizer"):
        assert not torch.equal(first[0]["weights"], first[1]["weights"])  # anew in each step


# -------------------------------------------------------------------------------------------------------- all refuse


def unlabelled(outer: nn.Module, model: MultiTaskModel, rank: int) -> None:
    """A loss of two forwards, where the other rank has no labels."""
    first, second = outer(batch(0, rank, 0)), outer(batch(0, rank, 1))
    pairs = zip(some(first, "abc").items(), some(second, "abc").values(), strict=True)
    model.backward({task: one + other for (task, one), other in pairs} if rank == 0 else {})


def late(outer: nn.Module, model: MultiTaskModel, rank: int) -> None:
    """Two totals of two forwards, where the other rank has no labels in the first."""
    first, second = outer(batch(0, rank, 0)), outer(batch(0, rank, 1))
    total = model.scalarize(some(first, "abc" if rank == 0 else ""))
    (total + model.scalarize(some(second, "abc"))).backward()


def misnamed(outer: nn.Module, model: MultiTaskModel, rank: int) -> None:
    losses = some(outer(batch(0, rank, 0)), "abc")
    model.backward({**losses, "d": losses["a"]} if rank == 0 else losses)


def of_another_head(outer: nn.Module, model: MultiTaskModel, rank: int) -> None:
    losses = some(outer(batch(0, rank, 0)), "abc")
    model.backward({**losses, "a": losses["a"] + losses["b"]} if rank == 0 else losses)


def all_idle(outer: nn.Module, model: MultiTaskModel, rank: int) -> None:
    losses = some(outer(batch(0, rank, 0)), "abc")
    model.backward({task: loss.detach() for task, loss in losses.items()})


def fewer_forwards(outer: nn.Module, model: MultiTaskModel, rank: int) -> None:
    """Batches of their own, where the other rank does not run them all."""
    tasks = "abc" if rank == 0 else "ab"
    predictions = {key: p for task in tasks for key, p in outer(batch(0, rank, 0), tasks=task).items()}
    model.backward(some(predictions, tasks))


def unlabelled_at_first(outer: nn.Module, model: MultiTaskModel, rank: int) -> None:
    model.backward(some(outer(batch(0, rank, 0)), "abc" if rank == 0 else ""))


def looked_at(outer: nn.Module, model: MultiTaskModel, rank: int) -> None:
    found = outer(batch(0, rank, 0))
    outer(batch(0, rank, 1), tasks="c")
    model.backward(some(found, "abc" if rank == 0 else ""))


REFUSED: dict[str, tuple[Callable[..., None], Sequence[Spec], str, str]] = {
    "two forwards, unlabelled": (
        unlabelled,
        [Spec("imtl"), Spec("uw", wrap="fsdp")],
        "same step. .* 2 forwards",
        "same step. .* 1 forwards",
    ),
    "two totals, unlabelled in the first": (
        late,
        [Spec("imtl"), Spec("uw"), Spec("imtl", wrap="fsdp")],
        "was not scalarized",
        "was scalarized before",
    ),
    "a wrong name": (misnamed, [Spec("imtl"), Spec("uw", wrap="fsdp")], "'d'", "Another process refuses"),
    "another head": (of_another_head, [Spec("imtl"), Spec("uw")], "reads the prediction", "Another process refuses"),
    "nothing to train": (all_idle, [Spec("imtl"), Spec("uw")], "requires grad", "requires grad"),
    "unlabelled in the first step": (
        unlabelled_at_first,
        [Spec("imtl", ddp={"static_graph": True}), Spec("uw", ddp={"static_graph": True})],
        "Another process refuses",
        "static_graph=True.* wants a loss",
    ),
    "another forward of one head": (looked_at, [Spec("imtl")], "of 1 forwards", "of 2 forwards"),
    "fewer forwards": (fewer_forwards, [Spec("imtl-g")], "of 3 forwards", "of 2 forwards"),
}


def refused(rank: int, size: int, case: str, number: int) -> bool:
    """Whether all refuse the step, nothing is lost by it, and the next one is as if it had not been."""
    function, specs, words, others = REFUSED[case]
    spec = specs[number]
    model, unharmed = make(spec), make(spec)
    outer, other = wrapped(model, spec), wrapped(unharmed, spec)
    with pytest.raises(ValueError, match=words if rank == 0 else others):
        function(outer, model, rank)
    assert all(p.grad is None for p in model.parameters())
    for wrapper, inner in ((outer, model), (other, unharmed)):
        inner.backward(some(wrapper(batch(1, rank, 0)), "abc" if rank == 0 else "b"))
    pairs = zip(model.parameters(), unharmed.parameters(), strict=True)
    return all(torch.equal(whole(p.grad), whole(q.grad)) for p, q in pairs)


@pytest.mark.parametrize(("case", "number"), [(case, n) for case in REFUSED for n in range(len(REFUSED[case][1]))])
def test_all_refuse(pools, case, number):
    assert pools[2].run(refused, case, number) == [True, True]


class Sequences(nn.Module):
    """A representation as long as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z).mean(1)


LENGTHS = {"excess-mtl": (ExcessMTL, False), "batches": (IMTLG, True)}


def lengths(rank: int, size: int, case: str) -> str:
    balancer, apart = LENGTHS[case]
    torch.manual_seed(1)
    model = MultiTaskModel(Sequences(), {task: Pooled() for task in "abc"}, balancer())
    outer = DistributedDataParallel(model)
    x = torch.randn(4, 3 + rank, 5)
    predictions = {k: p for task in "abc" for k, p in outer(x, tasks=task).items()} if apart else outer(x)
    with pytest.raises(ValueError, match="The processes do not make the same step") as error:
        model.backward(some(predictions, "abc"))
    return str(error.value)


@pytest.mark.parametrize("case", LENGTHS)
def test_representations_of_different_shapes(pools, case):
    first, second = pools[2].run(lengths, case)
    assert ("[3, 8]" in first, "[4, 8]" in second) == (True, True) if case == "batches" else first != second


def test_lengths_may_differ_where_gradients_are_flattened(pools):
    assert pools[2].run(free_lengths) == [True, True]


def free_lengths(rank: int, size: int) -> bool:
    torch.manual_seed(1)
    model = MultiTaskModel(Sequences(), {task: Pooled() for task in "abc"}, ExcessMTL(feature_dim=-1))
    outer = DistributedDataParallel(model)
    model.backward(some(outer(torch.randn(4, 3 + rank, 5)), "abc"))
    return model.task_weights is not None


def nothing_to_run(rank: int, size: int, why: str) -> str:
    torch.manual_seed(1)
    heads = {task: Spread() if why == "hidden" else nn.Linear(8, 2) for task in "ab"}
    model = MultiTaskModel(make_backbone(), heads, "uw").double()
    outer = DistributedDataParallel(model)
    for _ in range(0 if why == "hidden" else 2):  # in its second forward DDP speaks with the others
        model.backward({task: p.square().mean() for task, p in outer(batch(0, rank, 0)).items()})
    losses: dict[str, Tensor] = {}
    if rank == 0 or why == "hidden":
        predictions = outer(batch(1, rank, 0))
    if rank == 0:
        losses = {t: (p.mean if why == "hidden" else p).square().mean() for t, p in predictions.items()}
    with pytest.raises(ValueError, match="nothing to run backward") as error:
        model.backward(losses)
    dist.barrier()
    return str(error.value)


@pytest.mark.parametrize("why", ["hidden", "no forward"])
def test_a_rank_with_nothing_to_run_backward(pools, why):
    first, second = pools[2].run(nothing_to_run, why)
    pools[2].close()  # DDP itself is out of step now
    assert "It is another one" in first
    assert "It is this one" in second


def prepared_first(rank: int, size: int) -> list[float]:
    """The learned scales after training with an optimizer that was made behind ``prepare``."""
    spec = Spec("imtl-loss", wrap="fsdp")
    model = make(spec)
    outer = wrapped(model, spec)
    model.prepare(batch(0, rank, 0))
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01, balancer_lr=0.1))
    for step in range(2):
        optimizer.zero_grad()
        model.backward(some(outer(batch(step, rank, 0)), "abc"))
        optimizer.step()
    return [value for p in model.balancer_parameters() for value in whole(p).tolist()]


def test_an_optimizer_made_after_prepare_trains_shards(pools):
    first, second = pools[2].run(prepared_first)
    assert first == second
    assert all(first)


def sharded_late(rank: int, size: int) -> str:
    """Sharded after a first forward."""
    spec = Spec("imtl-g", wrap="fsdp", options={"weigh_heads": True})
    model = make(spec)
    model.prepare(batch(0, rank, 0))
    outer = wrapped(model, spec)
    with pytest.raises(ValueError, match="fully_shard") as error:
        model.backward(some(outer(batch(0, rank, 0)), "abc"))
    return str(error.value)


def test_sharded_after_a_first_forward(pools):
    assert all(pools[2].run(sharded_late))


def of_half_precision(rank: int, size: int) -> list[float]:
    model = make(Spec("imtl-g"))
    wrapped(model, Spec("imtl-g"))(batch(0, rank, 0))
    return model._junction.peers.ranks.mean(torch.full((2,), 40000.0, dtype=torch.float16)).tolist()


def test_a_mean_of_what_float16_cannot_add_up(pools):
    assert pools[2].run(of_half_precision) == [[40000.0] * 2] * 2


def beyond(rank: int, size: int, wrap: str, init: Any) -> tuple[list[float], list[float]]:
    """Log-scales that a first step of SGD takes far beyond the bound: sharded, and in one process."""
    torch.manual_seed(1)
    model, alone = (
        MultiTaskModel(make_backbone(), {t: nn.Linear(8, 1) for t in "abc"}, IMTLL(3, init=init)).double()
        for _ in range(2)
    )
    alone.load_state_dict(model.state_dict())
    outer = wrapped(model, Spec("imtl-l", wrap=wrap))
    found = []
    for each, call in ((model, outer), (alone, alone)):
        optimizer = torch.optim.SGD(each.param_groups(lr=0.0, balancer_lr=0.1))
        for step in range(3):
            optimizer.zero_grad()
            total = {task: (1e5 * (step > 0) + 1) * p.square().mean() for task, p in call(batch(0, 0, 0)).items()}
            each.backward(total)
            optimizer.step()
        call(batch(0, 0, 0))
        found.append([value for p in each.balancer_parameters() for value in whole(p).tolist()])
    return found[0], found[1]


@pytest.mark.parametrize("init", [None, "first_losses"])
@pytest.mark.parametrize("wrap", ["fsdp", "fsdp-whole", "fsdp-resharded", "fsdp-nested"])
def test_sharded_log_scales_beyond_the_bound_are_put_back(pools, wrap, init):
    for sharded, alone in pools[2].run(beyond, wrap, init):
        assert sharded == pytest.approx(alone, rel=1e-9)


def asked_alone(rank: int, size: int) -> str:
    """The value of a total, on one rank only, where the log-scales are sharded."""
    spec = Spec("imtl", wrap="fsdp-resharded")
    model = make(spec)
    outer = wrapped(model, spec)
    losses = some(outer(batch(0, rank, 0)), "abc")
    said = ""
    if rank == 0:
        with torch.no_grad(), pytest.raises(ValueError, match="sharded at this point") as error:
            model.scalarize(losses)
        said = str(error.value)
    model.backward(losses)
    return said


def test_the_value_of_a_total_does_not_wait_for_others(pools):
    said, nothing = pools[2].run(asked_alone)
    assert "The parameters of IMTL are sharded" in said.replace("FSDP", "")
    assert nothing == ""


def balancer_sharded(rank: int, size: int) -> str:
    model = make(Spec("imtl", wrap="fsdp"))
    fully_shard(model.balancer, mesh=init_device_mesh("cpu", (size,)))
    with pytest.raises(ValueError, match="not on its balancer") as error:
        model(batch(0, rank, 0))
    return str(error.value)


def test_a_balancer_that_is_sharded_by_itself(pools):
    for message in pools[2].run(balancer_sharded):
        assert "are sharded by themselves. Call fully_shard on the model, not on its balancer" in message


def hidden_and_sharded(rank: int, size: int) -> str:
    spec = Spec("imtl", wrap="fsdp")
    torch.manual_seed(1)
    model = MultiTaskModel(make_backbone(), {"a": Spread(), "b": nn.Linear(8, 2)}, "imtl").double()
    outer = wrapped(model, spec)
    with pytest.raises(TypeError, match="hides its tensors") as error:
        outer(batch(0, rank, 0))
    dist.barrier()
    return str(error.value)


def test_hidden_tensors_and_sharded_parameters(pools):
    for message in pools[2].run(hidden_and_sharded):
        assert "The head of task 'a' returned a Normal" in message
