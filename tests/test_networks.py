"""Networks of every kind, for several balancers, against one autograd.grad per task on the same modules."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import IMTL, IMTLG, UW, EqualWeighting, ExcessMTL, MultiTaskModel
from tests.common import DEVICE, grads, task_gradients

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
BALANCERS: dict[str, Callable[[], Any]] = {
    "equal": EqualWeighting,
    "uw": lambda: UW(init=[0.25, -0.5, 0.125]),
    "imtl-g": IMTLG,
    "imtl": lambda: IMTL(init=[0.25, -0.5, 0.125]),
    "excess-mtl": lambda: ExcessMTL(robust_step_size=0.5),
}


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Sequence(nn.Module):
    """An LSTM: all its outputs, or the last."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(inputs, outputs, batch_first=True), last

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x)
        return outputs[:, -1] if self.last else outputs


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())


def heads() -> list[nn.Module]:
    return [nn.Linear(8, 1), nn.Sequential(nn.Linear(8, 4), nn.Sigmoid(), nn.Linear(4, 2)), nn.Linear(8, 3)]


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3)).to(
        memory_format=torch.channels_last
    )


def shared_between_heads() -> list[nn.Module]:
    both = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    return [nn.Sequential(both, nn.Linear(8, 1)), nn.Sequential(both, nn.Linear(8, 2)), nn.Linear(8, 3)]


def with_a_frozen_layer() -> nn.Module:
    backbone = mlp()
    backbone[0].requires_grad_(False)
    return backbone


def with_a_frozen_head() -> list[nn.Module]:
    found = heads()
    found[1].requires_grad_(False)
    return found


def flat(size: int) -> tuple[int, ...]:
    return (6, size)


# For each: backbone, heads, shape of the input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "backbone checkpointed": (lambda: Checkpointed(mlp(), False), heads, flat(5)),
    "backbone checkpointed, reentrant": (lambda: Checkpointed(mlp(), True), heads, flat(5)),
    "heads checkpointed": (mlp, lambda: [Checkpointed(head, False) for head in heads()], flat(5)),
    "heads checkpointed, reentrant": (mlp, lambda: [Checkpointed(head, True) for head in heads()], flat(5)),
    "everything checkpointed": (
        lambda: Checkpointed(mlp(), True),
        lambda: [Checkpointed(head, reentrant) for head, reentrant in zip(heads(), (True, False, True), strict=True)],
        flat(5),
    ),
    "lstm": (lambda: Sequence(5, 8, False), lambda: [Sequence(8, n, True) for n in (1, 2, 3)], (6, 4, 5)),
    "lstm backbone": (lambda: Sequence(5, 8, True), heads, (6, 4, 5)),
    "channels last": (convolutions, lambda: [nn.Conv2d(4, n, 2) for n in (1, 2, 3)], (6, 3, 5, 5)),
    "a module shared between heads": (mlp, shared_between_heads, flat(5)),
    "a frozen layer": (with_a_frozen_layer, heads, flat(5)),
    "a frozen head": (mlp, with_a_frozen_head, flat(5)),
}


def losses_of(predictions: list[Tensor]) -> list[Tensor]:
    first, second, third = predictions
    return [first.square().mean(), (second - 3).abs().mean(), 10 * third.exp().mean()]


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_training_of_it(kind: str, name: str) -> None:
    """Two steps: what is shared gets the weighted sum, each head the gradient of its own loss, times its factor."""
    make_backbone, make_heads, shape = NETWORKS[kind]
    torch.manual_seed(4)
    model = MultiTaskModel(make_backbone(), make_heads(), BALANCERS[name]()).double().to(DEVICE)
    # The same modules without checkpoints, whose gradients autograd.grad can be asked for.
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, Checkpointed):
            module.forward = module.inner.forward  # type: ignore[method-assign]
    shared = [p for p in model.shared_parameters() if p.requires_grad]
    own = [p for p in model.head_parameters() if p.requires_grad]
    for step in range(2):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        x = x.to(memory_format=torch.channels_last) if kind == "channels last" else x
        plain.load_state_dict(model.state_dict())
        (log_scale,) = [*model.balancer_parameters()] or [None]
        sign = -1 if name == "uw" else 1
        factors = [1.0] * 3 if log_scale is None else ((0.5 if name == "uw" else 1) * (sign * log_scale).exp()).tolist()
        z = plain.backbone(x)
        losses = losses_of([head(z) for head in plain.heads])
        on_shared = task_gradients(losses, [p for p in plain.shared_parameters() if p.requires_grad])
        on_own = task_gradients(losses, [p for p in plain.head_parameters() if p.requires_grad])
        model.zero_grad()
        # A reentrant checkpoint wants an input with a gradient.
        model.backward(losses_of(model(x.clone().requires_grad_("reentrant" in kind or "everything" in kind))))
        weights = model.task_weights.tolist()
        assert len({round(w, 6) for w in weights}) > 1 or name == "equal" or (name == "excess-mtl" and step == 0)
        expected = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*on_shared, strict=True)]
        assert_close(grads(shared), expected, **CLOSE)
        expected = [sum(f * g for f, g in zip(factors, column, strict=True)) for column in zip(*on_own, strict=True)]
        assert_close(grads(own), expected, **CLOSE)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        torch.optim.SGD(model.param_groups(lr=0.01)).step()
        evaluates(model, x)


def evaluates(model: MultiTaskModel, x: Tensor) -> None:
    """The same predictions in evaluation, and no trace of it in the training."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z = model.backbone(x)
            expected = [head(z.clone()) for head in model.heads]
            assert_close(model(x), expected, rtol=0, atol=0)
            assert_close([single(x) for single in model], expected, rtol=0, atol=0)
            assert model.scalarize(losses_of(model(x))).isfinite()
    model.train()
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
