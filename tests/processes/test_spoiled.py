"""Gradients that overflow in one process only: the state moves in none, and stays the same in all."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import MultiTaskModel
from tests.common import BALANCERS, make_backbone, make_heads, make_losses
from tests.processes.training import Spec, whole, wrapped

STATEFUL = ["dwa", "famo", "rlw", "excess-mtl", "rotograd-norm", "grad-norm"]


class Spoil(torch.autograd.Function):
    """What it passes back is not finite, if asked for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, is_bad: bool) -> Tensor:
        ctx.is_bad = is_bad
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient * torch.inf if ctx.is_bad else gradient), None


class Spoilable(nn.Linear):
    """A head whose own gradient overflows, and not the one that it sends to the backbone."""

    is_bad = False

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.linear(z, Spoil.apply(self.weight, self.is_bad), self.bias)


def make(spec: Spec) -> tuple[MultiTaskModel, Any]:
    torch.manual_seed(1)
    options = {"process_group": dist.group.WORLD} if spec.wrap == "hand" else {}
    heads = {**make_heads(), "a": nn.Sequential(nn.ReLU(), nn.Linear(8, 1)), "b": Spoilable(8, 2)}
    model = MultiTaskModel(make_backbone(), heads, BALANCERS[spec.balancer](), **options).double()
    model.prepare(spec.batch_of(0, 0))
    return model, wrapped(model, spec)


def moved(model: MultiTaskModel) -> dict[str, Tensor]:
    """The state, but for where rotations are counted from: the forward takes that from the optimizer's last step."""
    return {name: whole(b) for name, b in model.balancer.named_buffers() if not name.startswith("rotations.")}


def train(rank: int, size: int, spec: Spec, bad_steps: dict[int, int]) -> list[dict[str, Tensor]]:
    """The state at first, and after each backward pass; in bad steps the gradients of one rank overflow."""
    model, outer = make(spec)
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01, balancer_lr=0.1))
    left = [moved(model)]
    for step in range(spec.steps):
        ends = (step + 1) % spec.accumulate == 0
        model.heads["b"].is_bad = bad_steps.get(step) == rank
        with nullcontext() if ends or spec.wrap != "ddp" else outer.no_sync():
            losses = make_losses(outer(spec.batch_of(step, rank)))
            present = spec.tasks_of(step, rank)
            model.backward({task: loss for task, loss in losses.items() if task in present})
        left.append(moved(model))
        if ends:
            if not any(step - back in bad_steps for back in range(spec.accumulate)):
                optimizer.step()
            optimizer.zero_grad()
    return left


def check(pools: Any, spec: Spec, bad_steps: dict[int, int], still: set[int] | None = None) -> None:
    """The state is the same in both processes, and stands still in these steps, which are the bad ones if not said."""
    first, second = pools[2].run(train, spec, bad_steps)
    for step, (one, other) in enumerate(zip(first[1:], second[1:], strict=True)):
        assert_close(one, other, rtol=0, atol=0, msg=lambda text, step=step: f"step {step}: {text}")
        stands = all(torch.equal(value, first[step][name]) for name, value in one.items())
        assert stands == (step in (bad_steps if still is None else still)), f"step {step}"


@pytest.mark.parametrize("wrap", ["ddp", "hand", "fsdp"])
@pytest.mark.parametrize("name", STATEFUL)
def test_it_overflows_in_one(pools, name, wrap):
    check(pools, Spec(name, wrap=wrap, steps=5), {0: 1, 2: 1, 3: 0})


@pytest.mark.parametrize("wrap", ["ddp", "hand", "fsdp"])
def test_the_first_losses_are_those_of_the_first_good_step(pools, wrap):
    check(pools, Spec("imtl-first-losses", wrap=wrap), {0: 1}, still={0, 2, 3})


@pytest.mark.parametrize("name", ["dwa", "excess-mtl"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_some_tasks_are_absent(pools, name, wrap):
    check(pools, Spec(name, wrap=wrap, steps=5, present=[["abc", "b"], ["b", "ac"], ["abc", "bc"]]), {2: 1})


@pytest.mark.parametrize("name", STATEFUL)
def test_batches_accumulated_without_a_message(pools, name):
    """Each process has gradients of its own then; the averaging spoils those of the other."""
    check(pools, Spec(name, steps=9, accumulate=3), {3: 1}, still={3, 5})
    check(pools, Spec(name, steps=9, accumulate=3), {5: 0})


@pytest.mark.parametrize(
    "bucket", [{}, {"bucket_cap_mb": 1e-6}, {"gradient_as_bucket_view": True}, {"static_graph": True}]
)
def test_ddp_puts_its_gradients_in_place_before(pools, bucket):
    """Also in the first step of a static graph, which it averages at the very end."""
    check(pools, Spec("excess-mtl", steps=4, ddp=bucket), {0: 1, 2: 0})


def aside(rank: int, size: int, name: str) -> list[dict[str, Tensor]]:
    """In every other step the second process has no batch, and makes neither a forward nor a backward pass."""
    model, _ = make(Spec(name, wrap="hand"))
    left = []
    for step in range(4):
        if rank == 0 or step % 2 == 0:
            model.backward(make_losses(model(Spec(name).batch_of(step, rank))))
        else:
            assert model.scalarize({}).item() != 0.0
        model.zero_grad()
        left.append(moved(model))
    return left


@pytest.mark.parametrize("name", ["dwa", "famo", "rlw"])
def test_a_process_that_stands_aside_is_not_waited_for(pools, name):
    first, second = pools[2].run(aside, name)
    assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(*(torch.cat([v.flatten() for v in state.values()]) for state in first[:2]))
