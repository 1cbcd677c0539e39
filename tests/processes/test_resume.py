"""What several processes save is continued bit for bit by fresh models and fresh processes, and by another number."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from mtlwrap import Parameters
from tests.common import BALANCERS
from tests.processes.pool import Pool
from tests.processes.training import Spec, close, make, mean_losses, whole, wrapped

SAVED_AFTER, STEPS = 3, 6
# Every task is somewhere in every step but one: to a head without a loss DDP gives gradients of zero, with which Adam
# goes on by its momentum, and one process gives none.
PRESENT = [["abc", "ac"], ["b", "abc"], ["", "abc"], ["c", "ab"], ["", ""], ["ab", "c"]]
COMPLETE = StateDictOptions(full_state_dict=True)


class Training:
    """A model in training, as one of several processes or alone, with the batches of these ranks of the saved one."""

    def __init__(self, spec: Spec, ranks: range) -> None:
        self.spec, self.ranks = spec, ranks
        self.model = make(spec)
        self.wrapped: Any = self.model if spec.wrap == "alone" else wrapped(self.model, spec)
        self.optimizer = torch.optim.Adam(self.model.param_groups(lr=0.01, balancer_lr=0.02))

    def train(self, first: int, last: int) -> "Training":
        for step in range(first, last):
            self.optimizer.zero_grad()
            self.model.backward(mean_losses(self.wrapped, self.ranks, self.spec, step))
            self.optimizer.step()
        return self

    def states(self, options: StateDictOptions | None = None) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model, options=options),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
        }

    def load(self, states: dict[str, Any], options: StateDictOptions | None = None) -> None:
        set_model_state_dict(self.model, states["model"], options=options)
        set_optimizer_state_dict(self.model, self.optimizer, states["optimizer"], options=options)

    def left(self, options: StateDictOptions | None = None) -> dict[str, Any]:
        """Everything that the last step left, by name: what this process has of it, or all."""
        states = self.states(options)
        left = {name: local(value) for name, value in states["model"].items()}
        for name, state in states["optimizer"]["state"].items():
            left.update((f"optimizer {name} {key}", local(value)) for key, value in state.items())
        seen = local if options is None else whole
        left.update((f"grad {name}", seen(p.grad)) for name, p in self.model.named_parameters())
        return {**left, "weights": local(self.model.task_weights)}


def local(tensor: Any) -> Any:
    """What this process holds of a tensor."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone() if isinstance(tensor, Tensor) else tensor


Trainings = dict[str, Training]
Left = dict[str, dict[str, Any]]


# One of each kind of state.
KINDS = ("uw", "imtl", "excess-mtl", "rotograd", "rotograd-norm", "grad-norm", "dwa", "famo", "rlw", "compose")
# In exact mode, whose schedule is state of the model and not of the balancer.
SCHEDULED = "scheduled"


def begun(names: Collection[str], wrap: str, ranks: range) -> Trainings:
    options: dict[str, Any] = {"process_group": None} if wrap == "alone" else {}
    specs = {name: Spec(name, wrap, PRESENT, options=options) for name in names if name != SCHEDULED}
    if SCHEDULED in names:
        exact = {"gradients": Parameters(refresh_every=4), **options}
        specs[SCHEDULED] = Spec("imtl-g", wrap, PRESENT, options=exact)
    return {name: Training(spec, ranks) for name, spec in specs.items()}


def save(rank: int, size: int, wrap: str, folder: Path, last: int = STEPS, complete: bool = False) -> Left:
    """Train all, or one of each kind, save in both ways, train on; what that left."""
    every = BALANCERS if wrap.startswith("fsdp") else [*BALANCERS, SCHEDULED]
    trainings = begun(KINDS if complete else every, wrap, range(rank, rank + 1))
    for training in trainings.values():
        training.train(0, SAVED_AFTER)
    states = {name: training.states(COMPLETE) for name, training in trainings.items()}
    if rank == 0:
        torch.save(states, folder / "plain.pt")
    if size > 1:
        dcp.save({name: training.states() for name, training in trainings.items()}, checkpoint_id=folder / "dcp")
    return finished(trainings, last, complete)


def resume(
    rank: int, size: int, wrap: str, folder: Path, way: str, last: int = STEPS, ranks: int = 1, complete: bool = False
) -> Left:
    """Load into fresh models, train on, each process with the batches of several; what that left.

    Where all is gathered anyway, it is compared with what was saved.
    """
    saved = torch.load(folder / "plain.pt", weights_only=True)
    trainings = begun(saved, wrap, range(rank * ranks, (rank + 1) * ranks))
    if way == "dcp":
        for training in trainings.values():
            training.model.prepare(training.spec.batch_of(99, 0))  # what is loaded into must have its shape
        states = {name: training.states() for name, training in trainings.items()}
        dcp.load(states, checkpoint_id=folder / "dcp")
    for name, training in trainings.items():
        training.load(saved[name], COMPLETE) if way == "plain" else training.load(states[name])
        if complete:
            loaded = training.states(COMPLETE)
            assert_close(loaded["model"], saved[name]["model"], rtol=0, atol=0)
            assert_close(loaded["optimizer"]["state"], saved[name]["optimizer"]["state"], rtol=0, atol=0)
    return finished(trainings, last, complete)


def finished(trainings: Trainings, last: int, complete: bool) -> Left:
    options = COMPLETE if complete else None
    return {name: training.train(SAVED_AFTER, last).left(options) for name, training in trainings.items()}


def check(got: Sequence[Left], wanted: Sequence[Left], *, tolerance: float = 0.0) -> None:
    for here, there in zip(got, wanted, strict=True):
        assert here.keys() == there.keys()
        for name, expected in there.items():
            assert here[name].keys() == expected.keys(), name
            for key, value in expected.items():
                close(here[name][key], value, tolerance, f"{name}: {key}")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def saved(request, pools, tmp_path_factory) -> tuple[str, Path, list[Left]]:
    """Trainings that were saved half-way, and what they came to."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, pools[2].run(save, request.param, folder)


@pytest.fixture(scope="module")
def fresh() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


def test_fresh_models_after_a_distributed_checkpoint(pools, saved):
    wrap, folder, expected = saved
    check(pools[2].run(resume, wrap, folder, "dcp"), expected)


def test_fresh_processes_after_torch_save(fresh, saved):
    wrap, folder, expected = saved
    check(fresh.run(resume, wrap, folder, "plain"), expected)


def test_a_fresh_process_after_one_alone(fresh, tmp_path):
    expected = save(0, 1, "alone", tmp_path)
    check(fresh.run(alone, tmp_path), [expected, expected])


def alone(rank: int, size: int, folder: Path) -> Left:
    return resume(0, 1, "alone", folder, "plain")


def test_other_numbers_of_processes(pools, tmp_path):
    """Four that are sharded, then two, then one: with the batches of the four, they are one training."""
    last = SAVED_AFTER + 1
    wanted = pools[4].run(save, "fsdp", tmp_path, last, True)[0]
    two = pools[2].run(resume, "fsdp", tmp_path, "dcp", last, 2, True)
    replicas = pools[2].run(resume, "ddp", tmp_path, "plain", last, 2, True)
    one = resume(0, 1, "alone", tmp_path, "plain", last, 4, True)
    check([*two, *replicas, one], [wanted] * 5, tolerance=1e-9)
