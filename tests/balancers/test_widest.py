"""A device without float64: every balancer decides in float32 there, and as it does elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtlwrap import MultiTaskModel, cached, vectors
from tests.common import BALANCERS, make_input, make_losses, make_model


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func}: this device has no float64.")
        return results


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "has_float64", lambda device: False)


def trained(name: str, steps: int = 5) -> MultiTaskModel:
    model = make_model(BALANCERS[name](), torch.float32)
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-3), foreach=False)
    for number in range(steps):
        optimizer.zero_grad()
        with cached():
            losses = make_losses(model(make_input(number, dtype=torch.float32)))
            model.backward({task: loss for task, loss in losses.items() if number != 2 or task != "b"})
            if model.task_gradients is not None:
                model.task_gradients.cosines  # noqa: B018 - it is computed when it is asked for
        optimizer.step()
    return model


@pytest.mark.parametrize("name", BALANCERS)
def test_no_balancer_needs_float64(name: str, request: pytest.FixtureRequest) -> None:
    expected = trained(name)
    request.getfixturevalue("no_float64")
    with WithoutFloat64():
        model = trained(name)
    assert model.task_weights.dtype == torch.float32
    assert_close(model.task_weights, expected.task_weights.float(), rtol=2e-3, atol=2e-3)


def test_the_pretended_device_refuses() -> None:
    with WithoutFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.ones(2).double()
    with WithoutFloat64(), pytest.raises(TypeError, match="no float64"):
        trained("imtl")
