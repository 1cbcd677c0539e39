"""Which rows have a label: numbers of every type, dense targets, predictions that are no tensor."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

from mtlwrap import MultiTaskModel
from mtlwrap.ignite import create_multitask_trainer
from mtlwrap.ignite.common import prepare_batch
from mtlwrap.ignite.masking import Masking, Rows, masking

NAN = torch.nan


def labelled(target: Any, ignored: Any = (-1, -100)) -> list[int] | bool:
    """The rows with a label, or whether the target is a label as a whole."""
    (rows,) = masking(["a"], ignored).rows([target])
    if rows.index is None:
        return rows.present
    return rows.index.tolist()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (torch.tensor([1.0, NAN, 3.0]), [0, 2]),
        (torch.tensor([1.0, NAN, NAN, 3.0]).half(), [0, 3]),
        (torch.tensor([[1.0, NAN], [NAN, NAN]]), [0]),
        (torch.tensor([1.0, -1.0]), True),
        (torch.tensor([NAN, NAN]), False),
        (torch.tensor([1j, NAN]), [0]),
        (torch.tensor([0, -1, 2, -100]), [0, 2]),
        (torch.tensor([0, 1, 2], dtype=torch.int8), True),
        (torch.tensor([[-1, -1], [-100, 5], [-1, -100]]), [1]),
        (torch.tensor([254, 255, 156], dtype=torch.uint8), True),
        (torch.tensor([True, False]), True),
        (torch.zeros(0), False),
        (torch.tensor(NAN), True),
        (None, False),
        ([], True),
        ({"boxes": torch.tensor([NAN])}, True),
    ],
)
def test_what_is_no_label(target: Any, expected: list[int] | bool) -> None:
    assert labelled(target) == expected


def test_ignore_index() -> None:
    target = torch.tensor([-1, 1, 7, -100])
    assert labelled(target, 7) == [0, 1, 3]
    assert labelled(target, [7, 1]) == [0, 3]
    assert labelled(target, ()) is True
    assert labelled(torch.tensor([3, 255], dtype=torch.uint8), 255) == [0]


def test_many_rows_keep_their_order() -> None:
    target = torch.randn(10_000).where(torch.rand(10_000) < 0.4, NAN)
    assert labelled(target) == (~target.isnan()).nonzero()[:, 0].tolist()


def test_the_numbers_of_all_tasks_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: read.append(tensor.shape) or original(tensor))
    targets = [torch.tensor([NAN, 1.0]), None, torch.tensor([1, 2]), torch.tensor([NAN])]
    rows = Masking(("a", "b", "c", "d")).rows(targets)
    assert [row.present for row in rows] == [True, False, True, False]
    assert read == [torch.Size([3])]


def test_predictions_in_structures_are_dropped_too() -> None:
    Pair = namedtuple("Pair", "mean scale")
    prediction = {"pair": Pair(torch.arange(3.0), torch.tensor(2.0)), "list": [torch.arange(3), torch.zeros(3, 2)]}
    target = torch.tensor([1.0, NAN, 3.0])
    (rows,) = Masking(("a",)).rows([target])
    chosen, labels = Masking(("a",)).take(0, prediction, target, rows)
    assert labels.tolist() == [1.0, 3.0]
    assert chosen["pair"].mean.tolist() == [0.0, 2.0]
    assert chosen["pair"].scale.item() == 2.0
    assert chosen["list"][0].tolist() == [0, 2]
    assert chosen["list"][1].shape == (2, 2)


def test_what_is_labelled_throughout_is_handed_on_as_it_is() -> None:
    prediction, target = object(), torch.ones(3)
    (rows,) = Masking(("a",)).rows([target])
    assert Masking(("a",)).take(0, prediction, target, rows) == (prediction, target)
    with pytest.raises(TypeError, match=r"task 'a' is a object.*tuple"):
        Masking(("a",)).take(0, prediction, target, Rows(True, torch.tensor([1]), 3))


def test_gradients_do_not_reach_the_rows_without_a_label() -> None:
    prediction = torch.randn(4, 2, requires_grad=True)
    target = torch.tensor([[1.0, 2.0], [NAN, NAN], [3.0, NAN], [1.0, 1.0]])
    (rows,) = Masking(("a",)).rows([target])
    p, y = Masking(("a",)).take(0, prediction, target, rows)
    l1_loss(p[~y.isnan()], y[~y.isnan()]).backward()
    assert prediction.grad is not None
    assert (prediction.grad != 0).tolist() == [[True, True], [False, False], [True, False], [True, True]]


def test_dense_targets_and_targets_that_are_no_tensor() -> None:
    model = MultiTaskModel(
        nn.Conv2d(1, 4, 3, padding=1), {"seg": nn.Conv2d(4, 3, 1), "depth": nn.Conv2d(4, 1, 1), "box": nn.Flatten()}
    )
    seg, depth = torch.randint(3, (4, 5, 5)), torch.rand(4, 1, 5, 5)
    seg[0], seg[1, :2], depth[3], depth[2, :, 3] = -100, -100, NAN, NAN
    boxes = ({"a": 1}, {"b": 2})
    seen = {}

    def box_loss(prediction: Tensor, target: Any) -> Tensor:
        seen["box"] = prediction.shape[0], target
        return prediction.square().mean()

    def depth_loss(prediction: Tensor, target: Tensor) -> Tensor:
        seen["depth"] = target.shape
        return mse_loss(prediction[~target.isnan()], target[~target.isnan()])

    def seg_loss(prediction: Tensor, target: Tensor) -> Tensor:
        seen["seg"] = target.shape
        return cross_entropy(prediction, target, ignore_index=-100)

    trainer = create_multitask_trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), {"seg": seg_loss, "depth": depth_loss, "box": box_loss}
    )
    x = torch.randn(4, 1, 5, 5)
    output = trainer.run([(x, {"seg": seg, "depth": depth, "box": boxes})]).output
    assert seen == {"seg": (3, 5, 5), "depth": (3, 1, 5, 5), "box": (4, boxes)}
    assert all(loss.isfinite() for loss in output.values())
    assert sorted(trainer.run([(x, {"seg": seg, "depth": depth, "box": None})]).output) == ["depth", "seg"]


def test_batches_are_moved_with_what_is_absent() -> None:
    x, y = prepare_batch(({"x": torch.zeros(1)}, {"a": None, "b": torch.zeros(2), "c": ["text"]}), "meta")
    assert x["x"].device.type == y["b"].device.type == "meta"
    assert y["a"] is None
    assert y["c"] == ["text"]


def test_targets_on_the_host_are_looked_at_there() -> None:
    """On a device that has no values the rows could not be found."""
    model = MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1), nn.Linear(2, 1)]).to("meta")
    shapes = []

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        shapes.append((prediction.shape, target.shape))
        return mse_loss(prediction, target)

    trainer = create_multitask_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), [loss, loss], "meta")
    y = torch.randn(6, 1)
    y[:2] = NAN
    trainer.run([(torch.randn(6, 2), [y, torch.full((6, 1), NAN)])])
    assert shapes == [((4, 1), (4, 1))]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_target_of_no_rows_is_no_label(dtype: torch.dtype) -> None:
    some, none = torch.ones(2), torch.ones(0, dtype=dtype)
    assert [row.present for row in Masking(("a", "b")).rows([some, none])] == [True, False]
    assert [row.present for row in Masking(("a", "b")).rows([None, none])] == [False, False]
