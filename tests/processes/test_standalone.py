"""A fork that stands on its own, in several processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mtlwrap
from mtlwrap import Balancer
from tests.common import BALANCERS, TASKS, make_backbone, make_heads, make_input, make_losses
from tests.processes.training import close

# Who has which tasks, by step and rank.
PRESENT = {"full": [["abc", "abc"]] * 4, "uneven": [["abc", "ac"], ["b", "abc"], ["ab", "bc"], ["abc", "c"]]}


class Model(nn.Module):
    """Not one backbone with heads, in so far as nobody wraps it."""

    def __init__(self, balancer: Balancer, group: Any = "auto") -> None:
        super().__init__()
        self.backbone, self.heads, self.balancer = make_backbone(), nn.ModuleDict(make_heads()), balancer
        self.group = group
        self.shared: Any = None

    def forward(self, x: Tensor, tasks: str = "abc") -> dict[str, Tensor]:
        self.shared = mtlwrap.fork(self.backbone(x), self.balancer, 3, process_group=self.group)
        own = dict(zip(TASKS, self.shared.aliases, strict=True))
        return {task: head(own[task]) for task, head in self.heads.items() if task in tasks}


def train(model: Model, outer: nn.Module, batches: Any) -> list[dict[str, Any]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        losses = batches(outer, step)
        model.shared.scalarize([losses.get(task) for task in TASKS]).backward()
        left = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({**left, "weights": model.shared.task_weights})
        optimizer.step()
    return found


def batch(step: int, rank: int) -> Tensor:
    return make_input(10 * step + rank, 3 + 2 * rank)


def make(name: str, group: Any = "auto") -> Model:
    torch.manual_seed(1)
    balancer = BALANCERS[name]()
    balancer.bind(len(TASKS))
    return Model(balancer, group).double()


def in_processes(rank: int, size: int, name: str, present: str, way: str) -> list[dict[str, Any]]:
    model = make(name, dist.group.WORLD if way == "explicit" else "auto")
    outer = DistributedDataParallel(model, find_unused_parameters=present == "uneven")

    def losses(outer: nn.Module, step: int) -> dict[str, Tensor]:
        tasks = PRESENT[present][step][rank]
        return make_losses(outer(batch(step, rank), tasks))

    return train(model, outer, losses)


def in_one(name: str, present: str) -> list[dict[str, Any]]:
    def losses(outer: nn.Module, step: int) -> dict[str, Tensor]:
        batches = [batch(step, rank) for rank in range(2)]
        predictions = {task: found.split([3, 5]) for task, found in outer(torch.cat(batches)).items()}
        sums: dict[str, Tensor] = {}
        for rank in range(2):
            for task, loss in make_losses({t: predictions[t][rank] for t in PRESENT[present][step][rank]}).items():
                sums[task] = sums.get(task, 0.0) + loss / 2
        return sums

    model = make(name)
    return train(model, model, losses)


@pytest.mark.parametrize("way", ["auto", "explicit"])
@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("name", ["uw", "imtl", "imtl-g", "excess-mtl", "rotograd"])
def test_a_fork_in_ddp(pools, name, present, way):
    wanted = in_one(name, present)
    for steps in pools[2].run(in_processes, name, present, way):
        for step, (got, expected) in enumerate(zip(steps, wanted, strict=True)):
            for key, value in expected.items():
                close(got.get(key), value, 1e-9, f"step {step}: {key}")


def test_a_group_of_another_type():
    with pytest.raises(TypeError, match="process_group: expected 'auto', a ProcessGroup or None, got 3"):
        mtlwrap.fork(torch.randn(2, 3), mtlwrap.UW(), 2, process_group=3)
