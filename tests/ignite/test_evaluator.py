"""Metrics per task over the rows that have a label, and Δm."""

from typing import Any

import pytest
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Accuracy, Loss, MeanAbsoluteError, Precision, Recall, RunningAverage
from torch import nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from mtlwrap.ignite import DeltaM, create_multitask_evaluator, delta_m
from tests.ignite.problem import make_batch, make_training

STEPS = range(1, 26)  # with batches that have no label of a task, and one without any


def make_metrics() -> dict[str, dict[str, Any]]:
    precision, recall = Precision(average=False), Recall(average=False)
    return {
        "a": {"mse": Loss(mse_loss), "mae": MeanAbsoluteError()},
        "b": {"accuracy": Accuracy(), "f1": (precision * recall * 2 / (precision + recall)).mean()},
    }


def test_metrics_are_those_of_all_labelled_rows() -> None:
    model, _ = make_training("rotograd")
    model.train()
    evaluator = create_multitask_evaluator(model, make_metrics())
    modes = []
    model.heads["b"].register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    for _ in range(2):  # the second run begins anew
        found = evaluator.run([make_batch(step) for step in STEPS]).metrics
    assert set(modes) == {(False, False)}
    x = torch.cat([make_batch(step)[0] for step in STEPS])
    a, b = (torch.cat([make_batch(step)[1][task] for step in STEPS]) for task in "ab")
    with torch.no_grad():
        predictions = model(x)
    known = ~a[:, 0].isnan()
    assert_close(found["a/mse"], mse_loss(predictions["a"][known], a[known]).item())
    assert_close(found["a/mae"], (predictions["a"][known] - a[known]).abs().mean().item())
    hits = predictions["b"].argmax(1)[b >= 0] == b[b >= 0]
    assert_close(found["b/accuracy"], hits.double().mean().item())
    assert 0 < found["b/f1"] < 1
    assert set(found) == {"a/mse", "a/mae", "b/accuracy", "b/f1"}


def test_what_is_left_behind_for_handlers() -> None:
    model, _ = make_training("equal")
    evaluator = create_multitask_evaluator(model, amp_mode="amp")
    state = evaluator.run([make_batch(3)])
    assert sorted(state.labelled) == ["a", "b"]
    predictions, targets = state.output
    assert predictions["c"].dtype == torch.bfloat16
    assert targets["c"].shape == (6, 3)
    prediction, target = state.labelled["a"]
    assert len(prediction) == len(target) < 6


def test_running_average_and_output_transform() -> None:
    model, _ = make_training("equal")
    metric = RunningAverage(output_transform=lambda pair: pair[1].abs().mean())
    evaluator = create_multitask_evaluator(model, {"a": {"size": metric}}, output_transform=lambda x, y, p: None)
    # Put into the metrics in every iteration, as ignite does it.
    assert evaluator.run([make_batch(1)]).metrics["a/size"] > 0


def test_an_epoch_without_a_label_names_the_task() -> None:
    model, _ = make_training("equal")
    evaluator = create_multitask_evaluator(model, {"b": {"accuracy": Accuracy()}})
    with pytest.raises(NotComputableError, match="task 'b'"):
        evaluator.run([make_batch(4)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "got Linear"),
        ({"metrics": {"d": {}}}, ValueError, r"no task called 'd'.*\['a', 'b', 'c'\]"),
        ({"metrics": {"a": Accuracy()}}, TypeError, "of task 'a' by name, got Accuracy"),
        ({"metrics": {"a": {"x": 3}}}, TypeError, "'a/x', got int"),
        ({"amp_mode": "half"}, ValueError, "'half'"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_multitask_evaluator(**{"model": make_training("equal")[0], **arguments})


SINGLE = {"a": {"mse": 2.0}, "b": {"accuracy": 0.5, "f1": 0.25}}
HIGHER = {"mse": False, "accuracy": True, "b/f1": True}


def test_delta_m_by_hand() -> None:
    results = {"a/mse": 1.0, "b/accuracy": 0.4, "b/f1": 0.5, "b/other": 7.0}
    # +50 % for the error that was halved; -20 % and +100 %.
    assert_close(delta_m(results, SINGLE, HIGHER), (50 + (-20 + 100) / 2) / 2)
    assert_close(delta_m(results, SINGLE, HIGHER, "metrics"), (50 - 20 + 100) / 3)
    assert_close(delta_m({"a/r2": -1.0}, {"a/r2": -2.0}, {"r2": True}), 50.0)
    assert delta_m(SINGLE, SINGLE, HIGHER) == 0


def test_delta_m_of_an_evaluator() -> None:
    model, _ = make_training("equal")
    evaluator = create_multitask_evaluator(model, make_metrics())
    DeltaM({"a/mse": 2.0, "b/accuracy": 0.5}, HIGHER).attach(evaluator)
    DeltaM({"a/mse": 2.0}, {"a/mse": True}).attach(evaluator, "other")
    found = evaluator.run([make_batch(step) for step in STEPS]).metrics
    assert_close(found["delta_m"], 50 * ((2 - found["a/mse"]) / 2 + (found["b/accuracy"] - 0.5) / 0.5))
    assert_close(found["other"], 100 * (found["a/mse"] - 2) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a/mse": 1.0}, {}, HIGHER), "single: expected at least one"),
        (({"a/mse": 1.0}, {"a/mse": 0.0}, HIGHER), "'a/mse', got 0.0"),
        (({"a/mse": 1.0}, {"a/mse": float("nan")}, HIGHER), "'a/mse', got nan"),
        (({"a/mae": 1.0}, {"a/mse": 1.0}, HIGHER), "none for 'a/mse'; there are 'a/mae'"),
        (({"a/mse": 1.0}, {"a/mse": 1.0}, {"mae": False}), "'a/mse' or for 'mse', got 'mae'"),
        (({"a/mse": 1.0}, {"a/mse": 1.0}, HIGHER, "all"), "'tasks' or 'metrics', got 'all'"),
    ],
)
def test_delta_m_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_m(*arguments)
    if "none for" not in message:
        with pytest.raises(ValueError, match=message):
            DeltaM(*arguments[1:])
