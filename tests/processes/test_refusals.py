"""What several processes cannot do together is refused by all of them, in good time, and nothing is lost by it."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mtlwrap import MultiTaskModel
from tests.common import make_backbone, make_heads, make_input, make_losses, make_model
from tests.processes.training import Spec, losses_of, make, whole, wrapped

EXACT = {"gradients": "parameters"}
WEIGHED = {"weigh_heads": True}
UNUSED = {"find_unused_parameters": True}
STATIC = {"static_graph": True}

SPECS = {
    "exact, sharded": (Spec("imtl-g", wrap="fsdp", options=EXACT), "needs whole parameters"),
    "exact, sharded parts": (Spec("imtl-g", wrap="fsdp-parts", options=EXACT), "needs whole parameters"),
    "exact, sharded as a whole": (Spec("imtl-g", wrap="fsdp-whole", options=EXACT), "needs whole parameters"),
    "weigh_heads, sharded": (Spec("imtl-g", wrap="fsdp", options=WEIGHED), "fully_shard.* do not allow"),
    "weigh_heads, sharded parts": (Spec("imtl-g-nonneg", wrap="fsdp-parts", options=WEIGHED), "fully_shard"),
    "weigh_heads, sharded as a whole": (Spec("imtl", wrap="fsdp-whole", options=WEIGHED), "fully_shard"),
    "batches, sharded": (Spec("imtl-g", wrap="fsdp", apart=True), "fully_shard"),
    "batches, sharded as a whole": (Spec("imtl-g", wrap="fsdp-whole", apart=True), "fully_shard"),
    "weigh_heads, static": (Spec("imtl-g", ddp=STATIC, options=WEIGHED), "static_graph=True"),
    "batches, static": (Spec("imtl-g", ddp=STATIC, apart=True), "static_graph=True"),
    "batches, unused": (Spec("imtl-g", ddp=UNUSED, apart=True), "find_unused_parameters=True"),
    "batches of a loss balancer, unused": (Spec("uw", ddp=UNUSED, apart=True), "find_unused_parameters=True"),
}


def refused(rank: int, size: int, spec: Spec, words: str, joined: bool = False) -> bool:
    """Whether a first training step is refused, and all else is as it was."""
    model = make(spec)
    outer: Any = wrapped(model, spec)
    before = {name: whole(value) for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words), outer.join() if joined else nullcontext():
        model.scalarize(losses_of(outer, spec, 0, rank))
    after = {name: whole(value) for name, value in model.state_dict().items()}
    # What the representation's size decides is allocated in the forward.
    same = all(torch.equal(value, after[name]) for name, value in before.items() if value.shape == after[name].shape)
    if joined:  # a DDP that was in it stays so
        model.backward(losses_of(wrapped(model, spec), spec, 0, rank))
        same = same and all(p.grad is not None for p in model.model_parameters())
    else:
        same = same and all(p.grad is None for p in model.parameters())
    return same


@pytest.mark.parametrize("case", SPECS)
def test_refused(pools, case):
    spec, words = SPECS[case]
    assert pools[2].run(refused, spec, words) == [True, True]


def test_join_is_refused_and_left(pools):
    assert pools[2].run(refused, Spec("imtl-g"), r"join\(\)", True) == [True, True]


def test_data_parallel():
    model = make_model("imtl-g")
    replica: Any = model._replicate_for_data_parallel()
    replica._modules = model._modules
    predictions = replica(make_input())
    with pytest.raises(ValueError, match=r"torch\.nn\.DataParallel .* one process per device"):
        model.backward(make_losses(predictions))
    assert all(p.grad is None for p in model.parameters())


def test_data_parallel_without_devices_to_copy_to():
    model = make_model("imtl-g")
    model.backward(make_losses(torch.nn.DataParallel(model)(make_input())))
    assert model.task_weights is not None


@pytest.mark.parametrize("group", ["world", 3, object()])
def test_a_group_of_another_type(group):
    with pytest.raises(TypeError, match="process_group: expected 'auto', a ProcessGroup or None, got"):
        MultiTaskModel(make_backbone(), make_heads(), process_group=group)


def foreign(rank: int, size: int) -> str | None:
    group = dist.new_group([0])
    if rank == 0:  # a group of one is no group
        model = MultiTaskModel(make_backbone(), make_heads(), "imtl-g", process_group=group).double()
        model.backward(make_losses(model(make_input())))
        return None
    with pytest.raises(ValueError, match="process_group") as error:
        MultiTaskModel(make_backbone(), make_heads(), "imtl-g", process_group=group)
    return str(error.value)


def test_a_group_of_others(pools):
    assert pools[2].run(foreign) == [
        None,
        "process_group: expected a group that this process is in, got one of others.",
    ]


def meshes(rank: int, size: int, kind: str) -> str:
    line = init_device_mesh("cpu", (size,), mesh_dim_names=("line",))
    square = init_device_mesh("cpu", (size, 1), mesh_dim_names=("rows", "columns"))
    model = make(Spec("imtl-g", wrap="fsdp"))
    if kind == "several":
        fully_shard(model.backbone, mesh=line)
        for head in model.heads.children():
            fully_shard(head, mesh=square["rows"])
    else:
        fully_shard(model, mesh=square)
    with pytest.raises(ValueError, match="process_group='auto'") as error:
        model(make_input())
    assert all(p.grad is None for p in model.parameters())
    return str(error.value)


@pytest.mark.parametrize("kind", ["several", "square"])
def test_several_meshes(pools, kind):
    for message in pools[2].run(meshes, kind):
        assert "Expected process_group=..., the group of the processes that have different batches." in message


def square(rank: int, size: int) -> bool:
    """With the group given, a mesh of two dimensions trains."""
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("rows", "columns"))
    model = make(Spec("imtl-g", wrap="fsdp", options={"process_group": dist.group.WORLD}))
    fully_shard(model, mesh=mesh)
    model.backward(make_losses(model(make_input())))
    return model.task_weights is not None


def test_a_mesh_of_two_dimensions_with_a_group(pools):
    assert pools[2].run(square) == [True, True]


def test_ddp_is_imported_for_its_name():
    """What finds it, where the name is no longer there, would silently find nothing."""
    assert hasattr(DistributedDataParallel, "_active_ddp_module")
