"""Two processes through ``idist.Parallel`` and ``idist.auto_model``: the training of one process, by the law.

It minimises the mean over the processes of their losses, an absent one counting 0.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Accuracy, MeanSquaredError
from torch import Tensor
from torch.testing import assert_close

from mtlwrap import MultiTaskModel
from mtlwrap.ignite import BalancerStatistics, create_multitask_evaluator, create_multitask_trainer
from tests.common import BALANCERS, TASKS
from tests.ignite.problem import LOSSES, losses_by_hand, make_batch, make_training
from tests.processes.pool import PRELOADED, forkserver

PRELOADED.append("tests.ignite.problem")

# For each step the numbers of the two batches: 3 and 10 are without c, 4 and 14 without b, 20 has no label at all.
NUMBERS = [(1, 2), (3, 4), (20, 5), (12, 3), (3, 10), (6, 20), (20, 20), (14, 4), (7, 8), (20, 3)]
STEPS, WINDOW = len(NUMBERS), 5
PROCESSES = 2

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")

# The balancer, over how many iterations gradients are accumulated, and whether DDP looks for unused parameters.
CASES = [
    *((name, 1 + number % 2, False) for number, name in enumerate(BALANCERS)),
    *((name, accumulation, True) for name in ("none", "imtl", "rotograd") for accumulation in (1, 2)),
]
Case = tuple[str, int, bool]


def batch_of(step: int, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64, for Adam makes of rounding in a gradient near zero a step of full length."""
    x, targets = make_batch(NUMBERS[step - 1][rank], rows=6 + 2 * rank)
    return x.double(), {task: t.double() if t.is_floating_point() else t for task, t in targets.items()}


def make_double(name: str) -> tuple[MultiTaskModel, torch.optim.Optimizer]:
    model, optimizer = make_training(name)
    return model.double(), optimizer


def metrics() -> dict[str, Any]:
    return {"a": {"mse": MeanSquaredError()}, "b": {"accuracy": Accuracy()}}


def in_a_process(local_rank: int, folder: str) -> None:
    """All that is asked of a process; starting one takes longer."""
    torch.set_num_threads(1)
    rank = idist.get_rank()
    torch.save({case: train(rank, *case) for case in CASES}, Path(folder) / f"{rank}.pt")


def train(rank: int, name: str, accumulation: int, unused: bool) -> dict[str, Any]:
    model, optimizer = make_double(name)
    wrapped = idist.auto_model(model, find_unused_parameters=unused)
    trainer = create_multitask_trainer(wrapped, optimizer, LOSSES, gradient_accumulation_steps=accumulation)
    BalancerStatistics(wrapped).attach(trainer, every=WINDOW)

    @trainer.on(Events.ITERATION_STARTED)
    def load(engine: Engine) -> None:
        engine.state.batch = batch_of(engine.state.iteration, rank)

    found = dict(trainer.run(epoch_length=STEPS).metrics)
    evaluator = create_multitask_evaluator(wrapped, metrics())
    found |= evaluator.run([batch_of(step, rank) for step in range(1, 4)]).metrics
    return {"model": model.state_dict(), "weights": model.task_weights, "metrics": found}


def alone(name: str, accumulation: int, unused: bool) -> tuple[MultiTaskModel, dict[str, list[float]]]:
    """One process that sees both batches, by hand; also the losses in the last window, and their gradients' norms."""
    model, optimizer = make_double(name)
    seen: dict[str, list[float]] = {f"{what}/{task}": [] for what in ("loss", "norm") for task in TASKS}
    shared: list[Tensor] = []
    model.backbone.register_forward_hook(lambda _module, _x, z: shared.append(z))
    for step in range(1, STEPS + 1):
        if (step - 1) % accumulation == 0:
            optimizer.zero_grad()
        batches = [batch_of(step, rank) for rank in range(PROCESSES)]
        predictions = model(torch.cat([x for x, _ in batches]))
        own = {task: prediction.split([len(x) for x, _ in batches]) for task, prediction in predictions.items()}
        means: dict[str, Tensor] = {}
        for rank, (_, targets) in enumerate(batches):
            for task, loss in losses_by_hand({task: own[task][rank] for task in TASKS}, targets).items():
                if loss is not None:
                    means[task] = means.get(task, 0.0) + loss / PROCESSES
                    if step > STEPS - WINDOW:
                        seen[f"loss/{task}"].append(loss.item())
                        norm = torch.autograd.grad(loss, shared[-1], retain_graph=True)[0].norm()
                        seen[f"norm/{task}"].append(norm.item())
        (model.scalarize(means) / accumulation).backward()
        if not unused:
            fill_with_zeros(model)
        if step % accumulation == 0:
            optimizer.step()
    return model, seen


def fill_with_zeros(model: MultiTaskModel) -> None:
    """What plain DDP makes of the gradient of a head whose task is absent in all processes; Adam moves it then."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, dict[str, Any]]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    # Through a file, for a port may be taken; and a process that waits for another is not to wait for half an hour.
    options: dict[str, Any] = {"init_method": f"file://{folder / 'rendezvous'}", "timeout": timedelta(seconds=60)}
    options["start_method"] = forkserver().get_start_method()
    with idist.Parallel(backend="gloo", nproc_per_node=PROCESSES, **options) as parallel:
        parallel.run(in_a_process, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_train_as_one(case: Case, found: list[dict[Case, dict[str, Any]]]) -> None:
    first, second = (results[case] for results in found)
    assert_close(first["model"], second["model"], rtol=0, atol=0)
    assert first["metrics"] == second["metrics"]
    model, seen = alone(*case)
    assert_close(first["model"], model.state_dict(), rtol=1e-9, atol=1e-11)
    assert_close(first["weights"], model.task_weights, rtol=1e-9, atol=1e-11)
    means = {name: sum(values) / len(values) for name, values in seen.items()}
    compared = [name for name in means if name.startswith("loss") or case[0] == "none"]  # others scale the gradients
    for name in compared:
        assert first["metrics"][name] == pytest.approx(means[name], rel=1e-9), name
    evaluator = create_multitask_evaluator(model, metrics())
    batches = [batch_of(step, rank) for step in range(1, 4) for rank in range(PROCESSES)]
    expected = evaluator.run(batches).metrics
    assert {key: first["metrics"][key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_labels_are_missing_in_one_process_and_in_both() -> None:
    model, _ = make_double("none")
    present = []
    for step in range(1, STEPS + 1):
        for rank in range(PROCESSES):
            x, targets = batch_of(step, rank)
            present.append("".join(task for task, y in losses_by_hand(model(x), targets).items() if y is not None))
    assert list(zip(present[::2], present[1::2], strict=True)) == [
        ("abc", "abc"), ("ab", "ac"), ("", "abc"), ("abc", "ab"), ("ab", "ab"),
        ("abc", ""), ("", ""), ("ac", "ac"), ("abc", "abc"), ("", "ab"),
    ]  # fmt: skip
