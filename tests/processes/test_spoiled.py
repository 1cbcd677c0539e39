"""Gradients that overflow in one process only: the state moves in none, and stays the same in all."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing import assert_close

from mtlwrap import MultiTaskModel
from tests.common import BALANCERS, make_backbone, make_heads, make_losses
from tests.processes.messages import Recorder
from tests.processes.training import Spec, whole, wrapped

OF_LOSSES = ["dwa", "famo", "rlw"]
OF_GRADIENTS = ["excess-mtl", "rotograd-norm", "grad-norm"]


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
    options = {"process_group": dist.group.WORLD, **spec.options} if spec.wrap == "hand" else {}
    heads = {**make_heads(), "a": nn.Sequential(nn.ReLU(), nn.Linear(8, 1)), "b": Spoilable(8, 2)}
    model = MultiTaskModel(make_backbone(), heads, BALANCERS[spec.balancer](), **options)
    model.prepare(batch(spec, 0, 0))
    return model, wrapped(model, spec)


def batch(spec: Spec, step: int, rank: int) -> Tensor:
    return spec.batch_of(step, rank).float()


def float16_losses(outer: nn.Module, x: Tensor, present: str = "abc") -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.float16):
        return make_losses({task: p.float() for task, p in outer(x).items() if task in present})


def moved(model: MultiTaskModel) -> dict[str, Tensor]:
    """The state, but for where rotations are counted from: the forward takes that from the optimizer's last step."""
    return {name: whole(b) for name, b in model.balancer.named_buffers() if not name.startswith("rotations.")}


def standing(states: list[dict[str, Tensor]]) -> list[bool]:
    """For each step, whether the state stood still in it."""
    return [all(torch.equal(new[key], value) for key, value in old.items()) for old, new in pairwise(states)]


def train(rank: int, size: int, spec: Spec, bad_steps: dict[int, int]) -> list[dict[str, Tensor]]:
    """The state at first, and after each backward pass; in bad steps the gradients of one rank overflow."""
    model, outer = make(spec)
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01, balancer_lr=0.1))
    left = [moved(model)]
    for step in range(spec.steps):
        ends = (step + 1) % spec.accumulate == 0
        model.heads["b"].is_bad = bad_steps.get(step) == rank
        with nullcontext() if ends or spec.wrap != "ddp" else outer.no_sync():
            model.backward(float16_losses(outer, batch(spec, step, rank), spec.tasks_of(step, rank)))
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


# A head that fully_shard keeps with the root is whole as the backward pass begins, and sharded at its end.
WRAPS = ["ddp", "fsdp", "fsdp-root", "fsdp-whole", "fsdp-resharded"]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", [*OF_LOSSES, *OF_GRADIENTS])
def test_it_overflows_in_one(pools, name, wrap):
    check(pools, Spec(name, wrap=wrap, steps=5), {0: 1, 2: 1, 3: 0})


@pytest.mark.parametrize("name", [*OF_LOSSES, *OF_GRADIENTS])
def test_gradients_averaged_by_hand(pools, name):
    """What follows the losses alone has moved: its backward pass does not wait for that of the others."""
    check(pools, Spec(name, wrap="hand", steps=5), {0: 1, 2: 1, 3: 0}, still=set() if name in OF_LOSSES else None)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_the_first_losses_are_those_of_the_first_good_step(pools, wrap):
    check(pools, Spec("imtl-first-losses", wrap=wrap), {0: 1}, still={0, 2, 3})


@pytest.mark.parametrize("name", ["dwa", "excess-mtl"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_some_tasks_are_absent(pools, name, wrap):
    check(pools, Spec(name, wrap=wrap, steps=5, present=[["abc", "b"], ["b", "ac"], ["abc", "bc"]]), {2: 1})


@pytest.mark.parametrize("name", [*OF_LOSSES, *OF_GRADIENTS])
def test_batches_accumulated_without_a_message(pools, name):
    """Each process has gradients of its own then, until the averaging spoils those of the other, too.

    What follows the losses alone has moved in the meantime, for no backward pass there waits for that of the others.
    """
    check(pools, Spec(name, steps=9, accumulate=3), {3: 1}, still={5} if name in OF_LOSSES else {3, 5})
    check(pools, Spec(name, steps=9, accumulate=3), {5: 0})


@pytest.mark.parametrize(
    "bucket", [{}, {"bucket_cap_mb": 1e-6}, {"gradient_as_bucket_view": True}, {"static_graph": True}]
)
def test_ddp_puts_its_gradients_in_place_before(pools, bucket):
    """Also in the first step of a static graph, which it averages at the very end."""
    check(pools, Spec("excess-mtl", steps=4, ddp=bucket), {0: 1, 2: 0})


def steps(
    model: MultiTaskModel,
    outer: Any,
    rank: int,
    bad: set[tuple[int, int]],
    *,
    losses: Callable[[nn.Module, Tensor], dict[str, Tensor]] = float16_losses,
    begin: Callable[[int], None] = lambda step: None,
    zeroed: nn.Module | None = None,
) -> list[dict[str, Tensor]]:
    """The state at first and after each of four backward passes; in some of them a gradient of some ranks overflows."""
    left = [moved(model)]
    for step in range(4):
        begin(step)
        model.heads["b"].is_bad = (step, rank) in bad
        model.backward(losses(outer, batch(Spec("none"), step, rank)))
        (model if zeroed is None else zeroed).zero_grad()
        left.append(moved(model))
    return left


def comm_hooked(rank: int, size: int, name: str) -> list[dict[str, Tensor]]:
    """DDP that is told not to average."""
    model, outer = make(Spec(name))
    outer.register_comm_hook(None, noop_hook)
    return steps(model, outer, rank, {(1, 1)})


@pytest.mark.parametrize("name", ["dwa", "excess-mtl"])
def test_a_communication_hook_may_do_anything(pools, name):
    first, second = pools[2].run(comm_hooked, name)
    assert_close(first, second, rtol=0, atol=0)
    assert standing(first) == [False, True, False, False]


def unsynced(rank: int, size: int, name: str) -> list[dict[str, Tensor]]:
    """fully_shard that accumulates whole gradients, where no ``.grad`` tells of them."""
    model, _ = make(Spec(name, wrap="fsdp"))
    nothing = nn.Module()
    return steps(
        model, model, rank, {(0, 0)}, begin=lambda step: model.set_requires_gradient_sync(step == 3), zeroed=nothing
    )


@pytest.mark.parametrize("name", ["dwa", "excess-mtl"])
def test_gradients_that_fully_shard_accumulates(pools, name):
    first, second = pools[2].run(unsynced, name)
    assert_close(first, second, rtol=0, atol=0)
    assert standing(first)[:3] == [True, False, False]


def never_zeroed(rank: int, size: int, name: str) -> list[dict[str, Tensor]]:
    """After its first gradient, which overflows, a head outside the optimizer keeps it."""
    model, _ = make(Spec(name, wrap="fsdp-root"))
    return steps(model, model, rank, {(0, 1)}, zeroed=model.backbone)


@pytest.mark.parametrize("name", ["dwa", "excess-mtl"])
def test_what_nobody_sets_to_zero_does_not_hold_the_state(pools, name):
    first, second = pools[2].run(never_zeroed, name)
    assert_close(first, second, rtol=0, atol=0)
    assert standing(first) == [True, False, False, False]


def alone(rank: int, size: int, name: str) -> list[dict[str, Tensor]]:
    """Each by itself, on a mesh of one."""
    model, _ = make(Spec(name, wrap="hand", options={"process_group": None}))
    fully_shard(model, mesh=init_device_mesh("cpu", (size, 1), mesh_dim_names=("all", "own"))["own"])
    return steps(model, model, rank, {(1, 0), (1, 1)})


@pytest.mark.parametrize("name", ["dwa", "excess-mtl"])
def test_a_mesh_of_one(pools, name):
    for states in pools[2].run(alone, name):
        assert standing(states) == [False, True, False, False]


def uneven(rank: int, size: int, name: str, how: str) -> list[dict[str, Tensor]]:
    """The second process makes no backward pass in the second step, or none that arrives; gradients go by hand."""
    model, _ = make(Spec(name, wrap="hand"))
    left = []
    for step in range(4):
        is_out = rank == step == 1
        if is_out and how == "no forward":
            assert model.scalarize({}).item() != 0.0
        else:
            losses = float16_losses(model, batch(Spec(name), step, rank))
            total = model.scalarize({} if is_out and how == "no labels" else losses)
            hook = model.backbone[0].weight.register_hook(lambda g: 1 / 0) if is_out and how == "error" else None
            if hook is not None:
                with pytest.raises(ZeroDivisionError):
                    total.backward()
                hook.remove()
            elif not is_out:
                total.backward()
        model.zero_grad()
        left.append(moved(model))
    return left


@pytest.mark.parametrize("how", ["no forward", "no labels", "no backward", "error"])
@pytest.mark.parametrize("name", OF_LOSSES)
def test_a_process_that_makes_no_backward_pass_is_not_waited_for(pools, name, how):
    first, second = pools[2].run(uneven, name, how)
    assert_close(first, second, rtol=0, atol=0)
    assert standing(first) == [False] * 3


def unlike(rank: int, size: int, name: str, wrap: str, how: str) -> list[dict[str, Tensor]]:
    """Something is otherwise in the second process, in some steps or in all; that it overflows is rare."""
    model, outer = make(Spec(name, wrap=wrap))
    left = [moved(model)]
    for step in range(4):
        odd = rank == 1 and (step in (1, 2) or how == "float32")
        model.heads["b"].is_bad = rank == 0 and step == 2 and how == "float32"
        x = batch(Spec(name), step, rank)
        with torch.autocast("cpu", dtype=torch.float16, enabled=not (odd and how == "float32")):
            losses = make_losses({task: p.float() for task, p in outer(x).items()})
        if how == "half losses":
            losses = {task: loss.half() for task, loss in losses.items()}
        if odd and how == "looks":
            with torch.no_grad():
                model(x)
        model.balancer.train(not (odd and how == "evaluation"))
        model.backward({} if odd and how == "half losses" else losses)
        if step != 1:  # gradients that are there already
            model.zero_grad()
        left.append(moved(model))
    return left


WRAPPED = ("ddp", "hand", "fsdp")
UNLIKE = [
    *((name, wrap, how) for name in ("dwa", "excess-mtl") for wrap in WRAPPED for how in ("half losses", "evaluation")),
    *(("dwa", wrap, "float32") for wrap in WRAPPED),  # a gradient balancer refuses representations of two types
    *((name, "ddp", "looks") for name in ("dwa", "excess-mtl")),
]


@pytest.mark.parametrize(("name", "wrap", "how"), UNLIKE)
def test_processes_that_are_not_alike(pools, name, wrap, how):
    first, second = pools[2].run(unlike, name, wrap, how)
    if how != "evaluation":  # where the second one's state is not to move
        assert_close(first, second, rtol=0, atol=0)
    assert standing(first) == [False, False, how == "float32" and wrap != "hand", False]


def cast(rank: int, size: int, name: str) -> list[dict[str, Tensor]]:
    """fully_shard computes in float16, and nobody sees it: representation and losses are in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, output_dtype=torch.float32)
    model, _ = make(Spec(name, wrap="hand", options={"process_group": "auto"}))
    mesh = init_device_mesh("cpu", (size,))
    for part in (model.backbone, *model.heads.children(), model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return steps(model, model, rank, {(1, 1)}, losses=lambda outer, x: make_losses(outer(x)))


@pytest.mark.parametrize("name", ["dwa", "excess-mtl"])
def test_float16_by_a_policy(pools, name):
    first, second = pools[2].run(cast, name)
    assert_close(first, second, rtol=0, atol=0)
    assert standing(first) == [False, True, False, False]


def counted(rank: int, size: int, name: str, wrap: str) -> int:
    """How many messages a later step takes in float16, over one in float32."""
    counts = []
    for dtype in (torch.float32, torch.float16):
        model, outer = make(Spec(name, wrap=wrap))
        for step in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.float16):
                losses = make_losses({task: p.float() for task, p in outer(batch(Spec(name), step, rank)).items()})
            with Recorder() as sent:
                model.backward(losses)
        counts.append(sum(kind == "all_reduce" for kind, *_ in sent))
    return counts[1] - counts[0]


@pytest.mark.parametrize("wrap", ["ddp", "hand", "fsdp"])
@pytest.mark.parametrize("name", ["uw", "imtl", *OF_LOSSES, *OF_GRADIENTS])
def test_what_it_takes(pools, name, wrap):
    """A message where state moves and DDP does not see to it that the gradients are the same in all processes."""
    keeps = name in OF_GRADIENTS or (name in OF_LOSSES and wrap == "fsdp")
    assert pools[2].run(counted, name, wrap) == [int(keeps and wrap != "ddp")] * 2
