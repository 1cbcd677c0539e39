"""One training in several processes, and the same in one: what the tests of many processes compare."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtlwrap import MultiTaskModel
from tests.common import BALANCERS, TASKS, make_backbone, make_heads, make_input, make_losses

# Who has which tasks: for each step, for each rank, their letters; ranks beyond are served again from the first.
FULL = [["abc"]]
UNEVEN = [["abc", "ac"], ["b", "abc"], ["c", ""], ["ab", "b"], ["", ""], ["", "abc"]]


@dataclass(frozen=True)
class Spec:
    """A training: the same on every rank, and in one process."""

    balancer: str
    wrap: str = "ddp"
    present: Sequence[Sequence[str]] = field(default_factory=lambda: FULL)
    steps: int = 4
    unequal: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    scale: float = 1.0
    # Forwards of their own for each task; backward passes without a reduction in between.
    apart: bool = False
    accumulate: int = 1
    # From which rank on task a is perfect.
    perfect: int | None = None

    def tasks_of(self, step: int, rank: int) -> str:
        ranks = self.present[step % len(self.present)]
        return ranks[rank % len(ranks)]

    def losses_of(self, step: int, rank: int, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = make_losses({task: predictions[task] for task in self.tasks_of(step, rank)})
        if self.perfect is not None and rank >= self.perfect and "a" in losses:
            losses["a"] = losses["a"] * 0.0
        return losses

    def batch_of(self, step: int, rank: int, task: str = "") -> Tensor:
        rows = 3 + 2 * rank if self.unequal else 4
        seed = 100 * step + 10 * rank + (TASKS.index(task) if task else 0)
        return make_input(seed, rows, self.dtype).cpu()


def make(spec: Spec) -> MultiTaskModel:
    torch.manual_seed(1)
    heads = make_heads()
    if spec.wrap.startswith("fsdp"):
        # A module that fully_shard wraps cannot begin in place, in plain torch: what it gets is a view.
        heads["a"] = nn.Sequential(nn.ReLU(), *list(heads["a"])[1:])
    model = MultiTaskModel(make_backbone(), heads, BALANCERS[spec.balancer](), **spec.options)
    return model.to(spec.dtype)


def in_processes(rank: int, size: int, spec: Spec) -> list[dict[str, Any]]:
    """Train as one of several processes; what each step left."""
    torch.manual_seed(7)
    if spec.wrap == "hand":
        spec = replace(spec, options={**spec.options, "process_group": dist.group.WORLD})
    model = make(spec)
    outer: Any = wrapped(model, spec)
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01, balancer_lr=0.1))
    left = []
    for step in range(spec.steps):
        last = (step + 1) % spec.accumulate == 0
        with nullcontext() if last or spec.wrap != "ddp" else outer.no_sync():
            total = model.scalarize(losses_of(outer, spec, step, rank))
            (spec.scale * total).backward()
        if spec.wrap == "hand":
            _average(model, size)
        left.append(state_of(model, total))
        if last:
            _step(optimizer, spec)
    return left


def in_one(size: int, spec: Spec) -> list[dict[str, Any]]:
    """The same in this process alone, which minimises the mean over the ranks of their losses."""
    torch.manual_seed(7)
    model = make(spec)
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01, balancer_lr=0.1))
    left = []
    for step in range(spec.steps):
        total = model.scalarize(mean_losses(model, range(size), spec, step))
        (spec.scale * total).backward()
        left.append(state_of(model, total))
        if (step + 1) % spec.accumulate == 0:
            _step(optimizer, spec)
    return left


def _average(model: nn.Module, size: int) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(size)


def _step(optimizer: torch.optim.Optimizer, spec: Spec) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(spec.scale)
    optimizer.step()
    optimizer.zero_grad()


class Outer(nn.Module):
    """A user's own module around the model. Behind it, its parameters would want a loss of every task everywhere."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(torch.zeros(1, dtype=next(model.parameters()).dtype))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.model(x + self.shift)


def wrapped(model: MultiTaskModel, spec: Spec) -> nn.Module:
    if spec.wrap == "ddp":
        return DistributedDataParallel(model, **spec.ddp)
    if spec.wrap == "nested":
        return DistributedDataParallel(Outer(model), **spec.ddp)
    if spec.wrap == "pairs":
        pairs = [dist.new_group([first, first + 1]) for first in range(0, dist.get_world_size(), 2)]
        return DistributedDataParallel(model, process_group=pairs[dist.get_rank() // 2], **spec.ddp)
    if spec.wrap == "hand":
        return model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if spec.wrap == "fsdp-whole":
        fully_shard(model, mesh=mesh)
    elif spec.wrap == "fsdp-root":  # heads and balancer with the root, which stays whole after the forward
        for part in (model.backbone, model):
            fully_shard(part, mesh=mesh)
    elif spec.wrap == "fsdp-resharded":  # the balancer's parameters too, as soon as the forward is over
        for part in (model.backbone, *model.heads.children(), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    elif spec.wrap == "fsdp-nested":
        outer = Outer(model)
        for part in (model.backbone, *model.heads.children(), model, outer):
            fully_shard(part, mesh=mesh)
        return outer
    elif spec.wrap in ("fsdp", "fsdp-parts"):
        for part in (model.backbone, *model.heads.children()):
            fully_shard(part, mesh=mesh)
        if spec.wrap == "fsdp":
            fully_shard(model, mesh=mesh)
    else:
        raise ValueError(spec.wrap)
    return model


def losses_of(model: nn.Module, spec: Spec, step: int, rank: int) -> dict[str, Tensor]:
    if spec.apart:
        predictions = {}
        for task in TASKS:
            predictions.update(model(spec.batch_of(step, rank, task), tasks=task))
    else:
        predictions = model(spec.batch_of(step, rank))
    return spec.losses_of(step, rank, predictions)


def mean_losses(model: nn.Module, ranks: Sequence[int], spec: Spec, step: int) -> dict[str, Tensor]:
    """The means of the losses of these ranks, an absent one counting 0."""
    predictions = {}
    for task in TASKS if spec.apart else [""]:
        batches = [spec.batch_of(step, rank, task) for rank in ranks]
        found = model(torch.cat(batches), tasks=task or None)
        rows = [len(batch) for batch in batches]
        predictions.update({name: prediction.split(rows) for name, prediction in found.items()})
    losses: dict[str, Tensor] = {}
    for index, rank in enumerate(ranks):
        own = {task: pieces[index] for task, pieces in predictions.items()}
        for task, loss in spec.losses_of(step, rank, own).items():
            losses[task] = losses.get(task, 0.0) + loss / len(ranks)
    return losses


def state_of(model: MultiTaskModel, total: Tensor) -> dict[str, Any]:
    weights = model.task_weights
    return {
        "total": total.detach(),
        "weights": None if weights is None else weights.clone(),
        "gradients": {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None},
        "state": {name: whole(b) for name, b in model.balancer.state_dict().items()},
    }


def whole(tensor: Any) -> Any:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().clone() if isinstance(tensor, Tensor) else tensor


def close(got: Any, wanted: Any, tolerance: float, what: str) -> None:
    """Refuse a difference of more than ``tolerance`` times the largest number; nothing is as good as zeros.

    That of a log-scale's gradient counts as 1 at least: it is the difference of two numbers of about that.
    """
    if not isinstance(wanted, Tensor):
        assert got == wanted, what
        return
    assert got is not None or not wanted.any(), what
    got = torch.zeros_like(wanted) if got is None else got
    size = wanted.double().abs().max().item() if wanted.numel() else 0.0
    size = max(size, 1.0) if "log_scale" in what else size
    assert torch.allclose(got, wanted.to(got.dtype), rtol=tolerance, atol=tolerance * size, equal_nan=True), (
        f"{what}: {got} instead of {wanted}"
    )
