"""Two processes through ``idist.Parallel`` and ``idist.auto_model``: the training of one process that sees both."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Accuracy, MeanSquaredError
from torch.testing import assert_close

from mtlwrap.ignite import BalancerStatistics, create_multitask_evaluator, create_multitask_trainer
from tests.common import TASKS
from tests.ignite.problem import LOSSES, losses_by_hand, make_batch, make_training

STEPS = 26  # with a batch that has no label at all, in one process and then in the other
PROCESSES = 2

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")


def batch_of(step: int, rank: int) -> Any:
    return make_batch(step + 3 * rank)


def metrics() -> dict[str, Any]:
    return {"a": {"mse": MeanSquaredError()}, "b": {"accuracy": Accuracy()}}


# The balancer, and over how many iterations gradients are accumulated.
CASES = [("fixed", 1), ("uw", 2)]


def in_a_process(local_rank: int, folder: str) -> None:
    """All that is asked of a process; starting one takes longer."""
    torch.set_num_threads(1)
    rank = idist.get_rank()
    found: dict[Any, Any] = {case: train(rank, *case) for case in CASES}
    found["refused"] = refuse()
    torch.save(found, Path(folder) / f"{rank}.pt")


def train(rank: int, name: str, accumulation: int) -> dict[str, Any]:
    model, optimizer = make_training(name)
    wrapped = idist.auto_model(model, find_unused_parameters=True)
    trainer = create_multitask_trainer(wrapped, optimizer, LOSSES, gradient_accumulation_steps=accumulation)
    BalancerStatistics(wrapped).attach(trainer, every=13)

    @trainer.on(Events.ITERATION_STARTED)
    def load(engine: Engine) -> None:
        engine.state.batch = batch_of(engine.state.iteration, rank)

    found = dict(trainer.run(epoch_length=STEPS).metrics)
    evaluator = create_multitask_evaluator(wrapped, metrics())
    found |= evaluator.run([batch_of(step, rank) for step in range(1, 4)]).metrics
    return {"model": model.state_dict(), "metrics": found}


def refuse() -> str:
    """Each process has the same batch, so that none waits for another."""
    model, optimizer = make_training("equal")
    trainer = create_multitask_trainer(idist.auto_model(model), optimizer, LOSSES)
    try:
        trainer.run([make_batch(3)])
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    # Through a file, for a port may be taken; and a process that waits for another is not to wait for half an hour.
    options: dict[str, Any] = {"init_method": f"file://{folder / 'rendezvous'}", "timeout": timedelta(seconds=60)}
    with idist.Parallel(backend="gloo", nproc_per_node=PROCESSES, **options) as parallel:
        parallel.run(in_a_process, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize(("name", "accumulation"), CASES)
def test_two_processes_train_as_one_that_sees_both_batches(
    name: str, accumulation: int, found: list[dict[Any, Any]]
) -> None:
    first, second = (results[name, accumulation] for results in found)
    assert_close(first["model"], second["model"], rtol=0, atol=0)
    model, optimizer = make_training(name)
    raw: dict[str, list[float]] = {task: [] for task in TASKS}
    for step in range(1, STEPS + 1):
        if (step - 1) % accumulation == 0:
            optimizer.zero_grad()
        for rank in range(PROCESSES):
            x, targets = batch_of(step, rank)
            losses = losses_by_hand(model(x), targets)
            (model.scalarize(losses) / PROCESSES / accumulation).backward()
            for task, loss in losses.items():
                if loss is not None and step > STEPS - 13:
                    raw[task].append(loss.item())
        if step % accumulation == 0:
            optimizer.step()
    assert_close(first["model"], model.state_dict(), rtol=1e-5, atol=1e-6)
    for task in TASKS:
        assert first["metrics"][f"loss/{task}"] == pytest.approx(sum(raw[task]) / len(raw[task]), rel=1e-4)
    assert first["metrics"] == second["metrics"]
    evaluator = create_multitask_evaluator(model, metrics())
    alone = evaluator.run([batch_of(step, rank) for step in range(1, 4) for rank in range(PROCESSES)]).metrics
    assert {key: first["metrics"][key] for key in alone} == pytest.approx(alone, rel=1e-4)


def test_an_absent_task_needs_unused_parameters(found: list[dict[Any, Any]]) -> None:
    for results in found:
        assert "'c'" in results["refused"]
        assert "find_unused_parameters=True" in results["refused"]
