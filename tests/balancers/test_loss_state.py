"""What DWA, FAMO, GLS and RLW have in common: they never ask the device, and state follows losses in training only."""

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtlwrap import LossBalancer
from mtlwrap.balancers.dwa import DWA
from mtlwrap.balancers.famo import FAMO
from mtlwrap.balancers.gls import GLS
from mtlwrap.balancers.loss_state import LossStateBalancer, learns, wide, write
from mtlwrap.balancers.rlw import RLW
from tests.common import DEVICE

MAKE: dict[str, Callable[[], LossBalancer]] = {
    "dwa": lambda: DWA(2, num_tasks=3),
    "famo": lambda: FAMO(3, min_losses=[0.0, 0.1, 0.2]),
    "gls": GLS,
    "rlw": RLW,
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("tasks", [None, [0, 2]])
def test_no_value_is_asked_for(name: str, tasks: list[int] | None) -> None:
    """A tensor on meta has none: whatever would synchronise with the host raises."""
    balancer = MAKE[name]().to("meta")
    for _ in range(3):
        losses = torch.empty(3 if tasks is None else 2, device="meta", requires_grad=True)
        balancer.scalarize(losses, tasks).backward()
        assert losses.grad.shape == losses.shape
    balancer.reset()


@pytest.mark.parametrize("name", MAKE)
def test_the_state_keeps_its_place_and_kind(name: str) -> None:
    """Written in place, never replaced: a compiled graph or an optimizer may hold the tensors."""
    balancer = MAKE[name]().to(DEVICE)
    before = {key: (id(value), value.dtype) for key, value in (*balancer.named_buffers(), *balancer.named_parameters())}
    for dtype in (torch.float32, torch.float64, torch.float16):
        balancer(torch.tensor([1.0, 2.0, 3.0], dtype=dtype, device=DEVICE))
    balancer.scalarize(torch.tensor([1.0, 3.0], device=DEVICE), [0, 2])
    balancer.reset()
    after = {key: (id(value), value.dtype) for key, value in (*balancer.named_buffers(), *balancer.named_parameters())}
    assert after == before


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["dwa", "famo", "rlw"])
def test_compiled_with_inductor(name: str) -> None:
    """It has rules of its own for integers that wrap around, and for buffers that are written to."""
    torch._dynamo.reset()
    balancer = MAKE[name]().to(DEVICE)
    reference = copy.deepcopy(balancer)
    compiled = torch.compile(balancer, fullgraph=True)
    for step in range(6):
        found = torch.tensor([1.0 + step, 2.0, 30.0 / (step + 1)], device=DEVICE, requires_grad=True)
        expected = found.detach().clone().requires_grad_()
        compiled(found).backward()
        reference(expected).backward()
        assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-7)
    assert_close(dict(balancer.state_dict()), dict(reference.state_dict()), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_write_leaves_the_others() -> None:
    for tail in ((), (2,)):
        state = torch.arange(4.0).reshape(4, *[1] * len(tail)).expand(4, *tail).clone()
        values = torch.full((2, *tail), 9.0)
        for sound in (False, True):
            before = state.clone()
            write(state, values, [3, 1], torch.tensor(sound))
            changed = (state != before).reshape(4, -1).all(1).tolist()
            assert changed == [False, sound, False, sound]
    state = torch.zeros(2)
    write(state, torch.tensor([1.0, 2.0]), [1, 0], torch.tensor(True))
    assert state.tolist() == [2.0, 1.0]
    write(state, torch.tensor([5.0, 6.0]), None, torch.tensor(False))
    assert state.tolist() == [2.0, 1.0]
    write(state, torch.tensor([5.0, 6.0]), None, torch.tensor(True))
    assert state.tolist() == [5.0, 6.0]


def test_learns_in_training_under_gradients_alone() -> None:
    balancer = GLS()
    assert learns(balancer)
    with torch.no_grad():
        assert not learns(balancer)
    seen = []

    def look(value: Tensor) -> Tensor:
        seen.append(learns(balancer))
        return value

    torch.func.vmap(look)(torch.ones(1))
    assert seen == [False]
    assert not learns(balancer.eval())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_wide(given: torch.dtype, expected: torch.dtype) -> None:
    values = torch.tensor([1.5], dtype=given)
    assert wide(values).dtype == expected
    assert_close(wide(values).double(), values.double())


def test_it_cannot_be_used_by_itself() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LossStateBalancer(2)  # type: ignore[abstract]
