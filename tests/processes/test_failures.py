"""What goes wrong on one rank does not stay there unnoticed, nor hold up the others for ever."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from tests.common import BALANCERS
from tests.processes.pool import Pool, join_gloo
from tests.processes.training import Spec, close, in_one, in_processes, losses_of, make, whole, wrapped

PATIENCE = 4.0


@pytest.fixture
def impatient() -> Iterator[Pool]:
    pool = Pool(2, partial(join_gloo, seconds=PATIENCE))
    yield pool
    pool.close()


def raising(rank: int, size: int) -> float:
    """How long the others wait for one that raised in its losses."""
    spec = Spec("imtl")
    model = make(spec)
    outer = wrapped(model, spec)
    model.backward(losses_of(outer, spec, 0, rank))
    losses = losses_of(outer, spec, 1, rank)
    if rank == 0:
        raise KeyError("a label is missing")
    start = time.perf_counter()
    with pytest.raises(RuntimeError):
        model.backward(losses)
    return time.perf_counter() - start


def test_others_give_up_waiting(impatient):
    outcomes = impatient.outcomes(raising)
    assert "a label is missing" in str(outcomes[0][1])
    waited, error = outcomes[1]
    assert error is None, error
    assert PATIENCE / 2 < waited < 5 * PATIENCE


BAD = {"nan": float("nan"), "inf": float("inf")}


def not_finite(rank: int, size: int, wrap: str, bad: float) -> dict[str, tuple[list[str], list[bool]]]:
    """Which state a step moves in which one task of one rank is not finite, and where its gradients are finite."""
    found = {}
    for name in BALANCERS:
        spec = Spec(name, wrap=wrap)
        model = make(spec)
        outer: Any = wrapped(model, spec)
        model.backward(losses_of(outer, spec, 0, rank))
        model.zero_grad()
        buffers = {key: whole(value) for key, value in model.balancer.named_buffers()}
        losses = losses_of(outer, spec, 1, rank)
        if rank == 1:
            losses["a"] = losses["a"] * bad
        model.backward(losses)
        moved = [key for key, b in model.balancer.named_buffers() if not torch.equal(whole(b), buffers[key])]
        parts = [model.backbone, *model.heads.children()]
        sound = [all(bool(whole(p.grad).isfinite().all()) for p in part.parameters()) for part in parts]
        found[name] = moved, sound
    return found


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_rank(pools, wrap, bad):
    """It is nowhere learned from, and every rank sees it in its gradients, so that a GradScaler skips on all."""
    first, second = pools[2].run(not_finite, wrap, BAD[bad])
    assert first == second
    for name, (moved, (backbone, a, *_)) in first.items():
        assert moved == [], name
        assert not backbone, name
        assert not a, name


# Long absent: everywhere, and on one rank.
LONG = [["abc"], *[["ac"]] * 10, ["abc"], *[["abc", ""]] * 20, ["abc"]]


@pytest.mark.parametrize("name", ["uw", "imtl", "excess-mtl", "rotograd", "dwa", "famo", "grad-norm"])
def test_long_absent(pools, name):
    check(pools, Spec(name, present=LONG, steps=len(LONG), unequal=True))


@pytest.mark.parametrize("since", [0, 1])
@pytest.mark.parametrize("name", ["uw", "imtl-g", "imtl", "excess-mtl", "rotograd", "gls", "famo", "grad-norm"])
def test_a_loss_of_zero(pools, name, since):
    check(pools, Spec(name, perfect=since, steps=2))


def check(pools: dict[int, Pool], spec: Spec) -> None:
    wanted = in_one(2, spec)
    for steps in pools[2].run(in_processes, spec):
        for step, (got, expected) in enumerate(zip(steps, wanted, strict=True)):
            close(got["weights"], expected["weights"], 1e-8, f"step {step}: weights")
            for key, gradient in expected["gradients"].items():
                close(got["gradients"].get(key), gradient, 1e-8, f"step {step}: {key}")
