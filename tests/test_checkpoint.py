"""The checkpoint law, for every balancer: state is saved, loaded, copied, moved and reset without a trace."""

import copy
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import IMTLL, Compose, ExcessMTL, MultiTaskModel, balancers, cached
from tests.common import BALANCERS, DEVICE, METHODS, OPTIONS, grads, make_input, make_losses, make_model

EXACT = {"rtol": 0, "atol": 0}

# What is exported, and the variants of the other tests: parameters and buffers at once, a warm-up that is not over.
MAKE: dict[str, Callable[[], Any]] = {
    **{name: OPTIONS.get(name, getattr(balancers, name)) for name in METHODS},
    **BALANCERS,
    "excess-mtl-in-warm-up": lambda: ExcessMTL(n_warmup_steps=4),
    "excess-mtl-by-feature": lambda: ExcessMTL(feature_dim=1),
    "parameters-and-buffers": lambda: Compose(loss=IMTLL(), gradient=ExcessMTL(robust_step_size=0.3)),
}
# DCP says that it works without processes, which is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

every_balancer = pytest.mark.parametrize("name", MAKE)


class Training:
    """A model in training; every step is determined by its number."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = make_model(MAKE[name](), dtype)
        self.optimizer = torch.optim.Adam(self.model.param_groups(lr=0.01, balancer_lr=0.02))
        self.dtype = dtype

    def train(self, steps: range) -> "Training":
        for step in steps:
            self.optimizer.zero_grad()
            losses = dict(make_losses(self.model(self.batch(step))))
            if step % 3 == 2:
                del losses["b"]
            self.model.backward(losses)
            self.optimizer.step()
        return self

    def batch(self, step: int) -> Tensor:
        return make_input(step, dtype=self.dtype)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def outcome(self) -> dict[str, Any]:
        weights = self.model.task_weights
        assert weights is not None
        return {**self.model.state_dict(), "weights": weights, "grads": grads(list(self.model.parameters()))}


def through_file(state: dict[str, Any]) -> Any:
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_every_exported_balancer_is_here() -> None:
    assert set(METHODS) <= set(MAKE)
    assert len(METHODS) >= 7


@every_balancer
@pytest.mark.parametrize("saved_after", [0, 1, 4])
@pytest.mark.parametrize("prepared", [False, True])
def test_resumes_bit_for_bit(name: str, saved_after: int, prepared: bool) -> None:
    whole = Training(name).train(range(saved_after))
    saved = through_file(whole.state())
    expected = whole.train(range(saved_after, 8)).outcome()
    resumed = Training(name)
    if prepared:
        resumed.model.prepare(resumed.batch(99))
    resumed.load(saved)
    resumed.train(range(saved_after, 8))
    assert_close(resumed.outcome(), expected, **EXACT)


@every_balancer
def test_loading_replaces_what_was_learned_before(name: str) -> None:
    fresh = Training(name)
    saved = through_file(fresh.state())
    expected = fresh.train(range(4)).outcome()
    used = Training(name).train(range(10, 15))
    used.load(saved)
    assert_close(used.train(range(4)).outcome(), expected, **EXACT)


@every_balancer
def test_distributed_checkpoint_after_prepare(name: str, tmp_path: Path) -> None:
    whole = Training(name).train(range(3))
    dcp.save(whole.state(), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    expected = whole.train(range(3, 6)).outcome()
    resumed = Training(name)
    resumed.model.prepare(resumed.batch(99))
    # The optimizer too has its state only after a step; with rates of zero one that changes nothing.
    rates = [group["lr"] for group in resumed.optimizer.param_groups]
    for group in resumed.optimizer.param_groups:
        group["lr"] = 0.0
    sum(p.sum() for p in resumed.model.parameters()).backward()
    resumed.optimizer.step()
    for group, rate in zip(resumed.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state = resumed.state()
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    resumed.load(state)
    assert_close(resumed.train(range(3, 6)).outcome(), expected, **EXACT)


@every_balancer
def test_reset_equals_fresh(name: str) -> None:
    training = Training(name).train(range(4))
    fresh = Training(name)
    training.model.balancer.reset()
    assert_close(dict(training.model.balancer.state_dict()), dict(fresh.model.balancer.state_dict()), **EXACT)
    training.model.backbone.load_state_dict(fresh.model.backbone.state_dict())
    training.model.heads.load_state_dict(fresh.model.heads.state_dict())
    training.optimizer = torch.optim.Adam(training.model.param_groups(lr=0.01, balancer_lr=0.02))
    assert_close(training.train(range(4)).outcome(), fresh.train(range(4)).outcome(), **EXACT)


@every_balancer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_on_alike(name: str, duplicate: Callable[[MultiTaskModel], MultiTaskModel]) -> None:
    training = Training(name).train(range(2))
    with cached():
        training.model.backward(make_losses(training.model(training.batch(2))))
        copied = duplicate(training.model)
        assert copied.task_gradients is None
        assert_close(copied.task_weights, training.model.task_weights, **EXACT)
    for each in (training.model, copied):
        each.zero_grad()
        each.backward(make_losses(each(training.batch(3))))
    assert_close(dict(copied.state_dict()), dict(training.model.state_dict()), **EXACT)
    assert_close(grads(list(copied.parameters())), grads(list(training.model.parameters())), **EXACT)


@every_balancer
def test_a_copy_shares_nothing(name: str) -> None:
    training = Training(name).train(range(2))
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    copied = copy.deepcopy(training.model)
    for step in range(2, 5):
        copied.backward(make_losses(copied(training.batch(step))))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(0.1)
    assert_close(dict(training.model.state_dict()), before, **EXACT)


@every_balancer
def test_double_reaches_everything(name: str) -> None:
    training = Training(name).train(range(2))
    training.model.double()
    assert {t.dtype for t in training.model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    training.model.backward(make_losses(training.model(training.batch(2).double())))
    assert training.model.task_weights is not None
    assert {t.dtype for t in training.model.state_dict().values() if t.is_floating_point()} == {torch.float64}


@every_balancer
def test_to_reaches_everything(name: str) -> None:
    training = Training(name).train(range(2))
    for moved in (copy.deepcopy(training.model).to("meta"), copy.deepcopy(training.model).to(device="meta")):
        assert {t.device.type for t in moved.state_dict().values()} == {"meta"}
        back = moved.to_empty(device=DEVICE)
        back.load_state_dict(training.model.state_dict())
        for each in (back, copy.deepcopy(training.model)):
            each.zero_grad()
            each.backward(make_losses(each(training.batch(2))))
        assert_close(back.task_weights, each.task_weights, **EXACT)


@every_balancer
def test_a_balancer_comes_to_where_the_model_is(name: str) -> None:
    balancer = Training(name).train(range(2)).model.balancer.cpu()
    heads = {task: nn.Linear(8, 1, device="meta") for task in "abc"}
    model = MultiTaskModel(nn.Linear(5, 8, device="meta"), heads, balancer)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


@every_balancer
def test_prepare_changes_nothing_but_what_it_allocates(name: str) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    heads = {task: nn.Linear(8, 1) for task in "abc"}
    model = MultiTaskModel(backbone, heads, MAKE[name]()).to(DEVICE)
    model.heads["a"].eval()
    parameters = {key: p.clone() for key, p in model.named_parameters()}
    batch_statistics = {key: b.clone() for key, b in model.backbone.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    state = torch.random.get_rng_state()

    assert model.prepare(make_input(dtype=torch.float32)) is None

    assert_close(torch.random.get_rng_state(), state, **EXACT)
    assert {module: module.training for module in model.modules()} == modes
    assert_close(dict(model.named_parameters()), parameters, **EXACT)
    assert_close(dict(model.backbone.named_buffers()), batch_statistics, **EXACT)
    assert all(p.grad is None for p in model.parameters())
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.backward({task: p.square().mean() for task, p in model(make_input(dtype=torch.float32)).items()})
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_prepare_puts_the_modes_back_after_an_error() -> None:
    model = make_model(ExcessMTL())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.prepare(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE))
    assert all(module.training for module in model.modules())
