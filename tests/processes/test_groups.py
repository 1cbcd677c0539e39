"""Which processes decide jointly, and what they send each other."""

import copy
import io
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtlwrap import MultiTaskModel, cached
from tests.common import BALANCERS, make_input, make_losses
from tests.processes.messages import Recorder
from tests.processes.pool import Pool, join_gloo
from tests.processes.training import FULL, UNEVEN, Spec, close, in_one, in_processes, losses_of, make, state_of, wrapped


def step(model: MultiTaskModel, outer: nn.Module, spec: Spec, rank: int, number: int = 0) -> dict[str, Any]:
    model.zero_grad()
    total = model.scalarize(losses_of(outer, spec, number, rank))
    total.backward()
    return state_of(model, total)


def check(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    close(got["weights"], wanted["weights"], 1e-9, "weights")
    for name, gradient in wanted["gradients"].items():
        close(got["gradients"].get(name), gradient, 1e-9, name)


# How many messages a step takes: one before the backward pass, who takes part with which losses; in it one for what a
# gradient balancer asks of the gradients, inner products or sums over the batch; and one for a rotation's own gradient.
ASKS = ("imtl-g", "imtl-g-nonneg", "imtl-g-strict", "imtl", "imtl-first-losses", "imtl-gradient", "excess-mtl")
ASKS += ("grad-norm", "compose")
ROTATES = ("rotate-only", "rotograd", "rotograd-norm")
MESSAGES = {name: 3 if name in ROTATES else 2 if name in ASKS else 1 for name in BALANCERS}


def messages(rank: int, size: int, present: Any) -> dict[str, list[list[tuple[Any, ...]]]]:
    """What each step of each balancer sends."""
    found: dict[str, list[list[tuple[Any, ...]]]] = {}
    for name in BALANCERS:
        spec = Spec(name, present=present, unequal=True)
        model = make(spec)
        outer = wrapped(model, spec)
        found[name] = []
        for number in range(6):
            with Recorder() as sent:
                step(model, outer, spec, rank, number)
            found[name].append(sent[:])
    return found


@pytest.mark.parametrize("present", [FULL, UNEVEN], ids=["full", "uneven"])
def test_every_process_sends_the_same_messages(pools, present):
    first, second = pools[2].run(messages, present)
    assert first == second
    for name, steps in first.items():
        counts = [sum(kind == "all_reduce" for kind, *_ in sent) for sent in steps]
        expected = [MESSAGES[name]] * 6
        if present is UNEVEN:
            expected[4] = 1  # nobody has a loss
        assert counts == expected, name
        assert all(len(sent) == count for sent, count in zip(steps[1:], counts[1:], strict=True)), name


def as_pairs(rank: int, size: int, spec: Spec) -> list[dict[str, Any]]:
    return in_processes(rank % 2, 2, spec)


@pytest.mark.parametrize("name", ["uw", "imtl", "rotograd", "excess-mtl"])
@pytest.mark.parametrize("wrap", ["hand", "nested", "pairs"])
def test_other_ways_to_be_several(pools, wrap, name):
    """Gradients averaged by hand; DDP around a module around the model; two trainings of two processes each."""
    spec = Spec(name, wrap=wrap, present=UNEVEN, unequal=True)
    found = pools[4].run(as_pairs, spec) if wrap == "pairs" else pools[2].run(in_processes, spec)
    for steps in found:
        for got, wanted in zip(steps, in_one(2, spec), strict=True):
            check(got, wanted)


def with_a_group_more(rank: int, size: int, spec: Spec) -> list[dict[str, Any]]:
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    return in_processes(rank, size, spec)


def test_groups_that_one_has_and_another_has_not(pools):
    """torch names a group after how many there are, and waits for those who call it the same."""
    spec = Spec("imtl", steps=2)
    for steps in pools[2].run(with_a_group_more, spec):
        check(steps[1], in_one(2, spec)[1])


def apart(rank: int, size: int, name: str) -> tuple[list[Any], list[Any], list[str]]:
    """What is sent, and warned of, by processes that are by themselves: said so, and left to be found out."""
    silent, found = make(Spec(name, options={"process_group": None})), make(Spec(name))
    with Recorder() as sent:
        for number in range(3 + rank):  # nobody waits for anybody
            step(silent, silent, Spec(name), rank, number)
    with Recorder() as sent_too, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in range(3 + rank):
            step(found, found, Spec(name), rank, number)
    return sent, sent_too, [str(w.message) for w in warned if "several processes" in str(w.message)]


@pytest.mark.parametrize("name", ["uw", "imtl-g"])
def test_each_by_itself(pools, name):
    for sent, sent_too, warned in pools[2].run(apart, name):
        assert sent == sent_too == []
        assert len(warned) == (name == "imtl-g")


def around(rank: int, size: int) -> list[dict[str, Any]]:
    """Steps with a forward past DDP before, between and after."""
    model = make(Spec("imtl"))
    outer: Any = wrapped(model, Spec("imtl"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model, outer.module, Spec("imtl"), rank)  # by itself: DDP is not known yet
    model.balancer.reset()
    left = [step(model, outer, Spec("imtl"), rank)]
    outer.module(make_input())  # never scalarized
    if rank == 0:
        with torch.no_grad():  # nor on every rank
            outer.module(make_input())
            model.eval()
            losses = make_losses(model(make_input()))
            model.scalarize(losses)
            model.train()
    left.append(step(model, outer, Spec("imtl"), rank))
    left.append(step(model, outer.module, Spec("imtl"), rank))  # jointly, but its gradients are its own
    return left


def test_forwards_past_ddp(pools):
    wanted = in_one(2, Spec("imtl", steps=1))[0]
    for first, second, third in pools[2].run(around):
        check(first, wanted)
        check(second, wanted)
        close(third["weights"], wanted["weights"], 1e-9, "weights")


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: _through_file(model),
}


def _through_file(model: MultiTaskModel) -> MultiTaskModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied(rank: int, size: int, name: str, explicitly: bool) -> list[dict[str, Any]]:
    """A step of each copy that was made in the middle of a step, and of the model itself."""
    spec = Spec(name, options={"process_group": dist.group.WORLD} if explicitly else {})
    model = make(spec)
    outer = wrapped(model, spec)
    step(model, outer, spec, rank)
    total = model.scalarize(losses_of(outer, spec, 0, rank))
    copies = [make_copy(model) for way, make_copy in COPIES.items() if not (explicitly and way != "deepcopy")]
    model.zero_grad()
    total.backward()
    left = [state_of(model, total)]
    for one in copies:
        left.append(step(one, wrapped(one, spec), spec, rank))
    return left


@pytest.mark.parametrize("explicitly", [False, True])
def test_copies_find_their_own_processes(pools, explicitly):
    wanted = in_one(2, Spec("imtl", steps=1))[0]
    for steps in pools[2].run(copied, "imtl", explicitly):
        for left in steps:
            check(left, wanted)


def looked_at(rank: int, size: int) -> tuple[Any, ...]:
    """One rank looks at the gradients of its step, the other does not."""
    spec = Spec("imtl-g")
    model = make(spec)
    outer = wrapped(model, spec)
    with cached() if rank == 0 else nullcontext():
        left = step(model, outer, spec, rank)
        with Recorder() as sent:
            seen = None if model.task_gradients is None else model.task_gradients
            asked = None if seen is None else (seen.norms, seen.gramian, seen.batch_sums(), seen.matrix.shape)
    step(model, outer, spec, rank)
    return left, sent, asked


def test_one_looks_at_its_gradients(pools):
    (left, sent, asked), (other, _, nothing) = pools[2].run(looked_at)
    assert sent == []
    assert asked is not None
    assert nothing is None
    check(left, in_one(2, Spec("imtl-g", steps=1))[0])
    close(left["weights"], other["weights"], 0.0, "weights")


def _alone_again(rank: int, size: int, folder: str) -> list[Any]:
    """Train together, alone, and together again, in groups that are made anew."""
    left = []
    for turn in range(2):
        spec = Spec("imtl", present=[["abc", "a"]], steps=2)
        left.append(in_processes(rank, size, spec)[-1]["weights"])
        model = make(spec)
        ddp = DistributedDataParallel(model)
        model.backward(make_losses(ddp(spec.batch_of(0, rank))))
        del ddp  # with its hooks
        dist.destroy_process_group()
        model.zero_grad()
        model.backward(make_losses(model(spec.batch_of(0, rank))))
        left.append(model.task_weights.clone())
        join_gloo(rank, size, f"{folder}/{turn}")
    return left


def test_after_the_group_is_destroyed_each_goes_on_alone(tmp_path):
    spec = Spec("imtl", present=[["abc", "a"]], steps=2)
    together = in_one(2, spec)[-1]["weights"]
    pool = Pool(2)  # whose groups nobody needs
    found = pool.run(_alone_again, str(tmp_path))
    pool.close()
    for rank, (first, alone, again, _) in enumerate(found):
        model = make(spec)
        model.backward(make_losses(model(spec.batch_of(0, rank))))
        close(first, together, 1e-9, "together")
        close(again, together, 1e-9, "together again")
        close(alone, model.task_weights, 1e-9, "alone")


def _two_models(rank: int, size: int, spec: Spec) -> Any:
    outer, inner = make(spec), make(spec)
    both = DistributedDataParallel(nn.ModuleList([outer, inner]).requires_grad_(True))
    x = spec.batch_of(0, rank)
    # Under the wrapper's forward, as a module that holds both would call them.
    with both._inside_ddp_forward():
        first, second = outer(x), inner(x)
    outer.backward(make_losses(first), auxiliary=inner.scalarize(make_losses(second)))
    return outer.task_weights.clone()


def test_the_total_of_one_model_in_that_of_another(pools):
    for weights in pools[2].run(_two_models, Spec("equal")):
        assert weights.tolist() == [1.0, 1.0, 1.0]
