"""Several processes equal one that minimises the mean over them of their losses, an absent one counting 0."""

from dataclasses import replace

import pytest

from mtlwrap import Parameters
from tests.common import BALANCERS
from tests.processes.pool import Pool
from tests.processes.training import UNEVEN, Spec, close, in_one, in_processes


def check(pools: dict[int, Pool], size: int, spec: Spec, *, weights: float = 1e-9, gradients: float = 1e-9) -> None:
    expected = in_one(size, spec)
    for rank, steps in enumerate(pools[size].run(in_processes, spec)):
        for step, (got, wanted) in enumerate(zip(steps, expected, strict=True)):
            where = f"rank {rank}, step {step}"
            close(got["total"], wanted["total"], weights, f"{where}: total")
            close(got["weights"], wanted["weights"], weights, f"{where}: weights")
            for name, value in wanted["state"].items():
                close(got["state"][name], value, weights, f"{where}: {name}")
            for name, gradient in wanted["gradients"].items():
                close(got["gradients"].get(name), gradient, gradients, f"{where}: {name}")
            for name in got["gradients"].keys() - wanted["gradients"].keys():
                assert not got["gradients"][name].any(), f"{where}: {name}"


@pytest.mark.parametrize("balancer", BALANCERS)
def test_ddp(pools, balancer):
    check(pools, 2, Spec(balancer))


@pytest.mark.parametrize("balancer", BALANCERS)
def test_ddp_with_absent_tasks_and_unequal_batches(pools, balancer):
    check(pools, 2, Spec(balancer, present=UNEVEN, unequal=True, steps=8))


@pytest.mark.parametrize("balancer", BALANCERS)
def test_four_processes(pools, balancer):
    check(pools, 4, Spec(balancer, present=UNEVEN, unequal=True, steps=6))


@pytest.mark.parametrize("balancer", BALANCERS)
def test_fsdp(pools, balancer):
    check(pools, 2, Spec(balancer, wrap="fsdp", present=UNEVEN, unequal=True, steps=6))


@pytest.mark.parametrize("wrap", ["fsdp-resharded", "fsdp-nested"])
@pytest.mark.parametrize("balancer", ["uw", "imtl", "famo", "grad-norm", "rotograd-norm", "imtl-first-losses"])
def test_what_a_balancer_learns_may_be_sharded_after_the_forward(pools, balancer, wrap):
    check(pools, 2, Spec(balancer, wrap=wrap, present=UNEVEN, unequal=True, steps=6))


# One of each kind.
KINDS = ["none", "uw", "imtl", "excess-mtl", "rotograd-norm", "gls"]


@pytest.mark.parametrize("wrap", ["fsdp-parts", "fsdp-whole"])
@pytest.mark.parametrize("balancer", KINDS)
def test_other_ways_to_shard(pools, balancer, wrap):
    check(pools, 2, Spec(balancer, wrap=wrap, present=UNEVEN, unequal=True, steps=6))


@pytest.mark.parametrize("balancer", BALANCERS)
def test_fsdp_of_four(pools, balancer):
    check(pools, 4, Spec(balancer, wrap="fsdp", present=UNEVEN, unequal=True, steps=4))


WAYS = {
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "small-buckets": {"bucket_cap_mb": 1e-6},
    "views": {"gradient_as_bucket_view": True},
    "no-broadcast": {"broadcast_buffers": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("balancer", KINDS)
def test_ways_of_ddp(pools, balancer, way):
    check(pools, 2, Spec(balancer, present=UNEVEN, unequal=True, steps=6, ddp=WAYS[way]))


@pytest.mark.parametrize("balancer", KINDS)
def test_accumulation_without_synchronisation(pools, balancer):
    spec = Spec(balancer, present=UNEVEN, unequal=True, steps=6, accumulate=3)
    expected = in_one(2, spec)
    found = pools[2].run(in_processes, spec)
    for rank in range(2):  # in between, gradients are those of the rank alone
        for step in (2, 5):
            for name, gradient in expected[step]["gradients"].items():
                close(found[rank][step]["gradients"].get(name), gradient, 1e-9, f"rank {rank}, step {step}: {name}")


MODES = {
    "exact": Spec("imtl-g", options={"gradients": "parameters"}),
    "exact-hybrid": Spec("imtl", options={"gradients": "parameters"}),
    "exact-excess": Spec("excess-mtl", options={"gradients": "parameters"}),
    "scheduled": Spec("imtl-g", options={"gradients": Parameters(refresh_every=3)}),
    "weigh-heads": Spec("imtl-g-nonneg", options={"weigh_heads": True}),
    "weigh-heads-excess": Spec("excess-mtl", options={"weigh_heads": True}),
    "apart": Spec("excess-mtl", apart=True),
    "apart-loss": Spec("uw", apart=True),
    "apart-hybrid": Spec("imtl", apart=True),
    "apart-exact": Spec("imtl-g", apart=True, options={"gradients": "parameters"}),
    "scaled": Spec("rotograd-norm", scale=65536.0),
    "scaled-hybrid": Spec("imtl", scale=65536.0),
}


# What DDP itself cannot do: see test_refusals.
IMPOSSIBLE = {
    "unused": ("apart", "apart-loss", "apart-hybrid", "apart-exact"),
    "static": ("weigh-heads", "weigh-heads-excess", "apart", "apart-hybrid", "apart-exact"),
}


@pytest.mark.parametrize(
    ("mode", "way"),
    [(mode, way) for mode in MODES for way in ("plain", "unused", "static") if mode not in IMPOSSIBLE.get(way, ())],
)
def test_modes(pools, mode, way):
    check(pools, 2, replace(MODES[mode], present=UNEVEN, unequal=True, steps=6, ddp=WAYS.get(way, {})))


@pytest.mark.parametrize("mode", ["apart-loss", "scaled", "scaled-hybrid"])
def test_modes_of_fsdp(pools, mode):
    check(pools, 2, replace(MODES[mode], wrap="fsdp", present=UNEVEN, unequal=True, steps=6))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_head_without_a_loss_anywhere_gets_no_gradient(pools, wrap):
    """So that an optimizer with momentum does not move it; plain DDP makes zeros of it."""
    ddp = {"find_unused_parameters": True} if wrap == "ddp" else {}
    spec = Spec("imtl", wrap=wrap, present=[["ab", "a"], ["abc", "c"], ["", ""]], steps=3, ddp=ddp)
    for steps in pools[2].run(in_processes, spec):
        heads = [{name.split(".")[1] for name in step["gradients"] if name.startswith("heads.")} for step in steps]
        assert heads == [{"a", "b"}, {"a", "b", "c"}, set()]
