"""torch.compile of the model inside DDP, and of DDP around it: the gradients of DDP without it."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from tests.processes.training import UNEVEN, Spec, close, losses_of, make, state_of

STEPS = 6


def train(rank: int, spec: Spec, compiled: str | None) -> tuple[list[dict[str, Any]], int]:
    """What each step left, and how many graphs were traced."""
    torch._dynamo.reset()
    model = make(spec)
    counter = CompileCounterWithBackend("aot_eager")
    inner: Any = torch.compile(model, backend=counter) if compiled == "inside" else model
    outer: Any = DistributedDataParallel(inner, **spec.ddp)
    if compiled == "around":
        outer = torch.compile(outer, backend=counter)
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01, balancer_lr=0.1))
    left = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = model.scalarize(losses_of(outer, spec, step, rank))
        total.backward()
        left.append(state_of(model, total))
        optimizer.step()
    torch._dynamo.reset()
    return left, counter.frame_count


def both(rank: int, size: int, spec: Spec, compiled: str) -> tuple[Any, Any, int]:
    wanted, _ = train(rank, spec, None)
    got, graphs = train(rank, spec, compiled)
    return got, wanted, graphs


@pytest.mark.parametrize("compiled", ["inside", "around"])
@pytest.mark.parametrize("name", ["uw", "imtl-g", "imtl"])
def test_compiled(pools, name, compiled):
    """Without momentum: compiled heads send zeros, not None, to the parameters of an absent task, wrapped or not."""
    spec = Spec(name, present=UNEVEN, steps=STEPS)
    first, second = pools[2].run(both, spec, compiled)
    for got, wanted, graphs in (first, second):
        assert graphs > 0
        for step, (here, there) in enumerate(zip(got, wanted, strict=True)):
            close(here["total"], there["total"], 1e-9, f"step {step}: total")
            close(here["weights"], there["weights"], 1e-9, f"step {step}: weights")
            for key, value in there["state"].items():
                close(here["state"][key], value, 1e-9, f"step {step}: {key}")
            for key in here["gradients"].keys() | there["gradients"].keys():
                found, expected = here["gradients"].get(key), there["gradients"].get(key)
                close(found, torch.zeros_like(found) if expected is None else expected, 1e-9, f"step {step}: {key}")
    for here, there in zip(first[0], second[0], strict=True):  # that the gradients were averaged
        for key, gradient in here["gradients"].items():
            close(there["gradients"][key], gradient, 0.0, key)
