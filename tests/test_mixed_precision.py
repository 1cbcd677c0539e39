"""Autocast, half-precision models, a GradScaler that overflows, accumulation and clipping, for every balancer."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mtlwrap import MultiTaskModel
from tests.common import BALANCERS, DEVICE, TASKS, make_input, make_losses, make_model

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# The bits of a type, times a few roundings: of the representation, of products, of the sum.
ROUNDING = {torch.bfloat16: 8 * 2.0**-8, torch.float16: 8 * 2.0**-11}


def wide_losses(predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    return make_losses({task: prediction.float() for task, prediction in predictions.items()})


def batch(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return make_input(seed, dtype=torch.float32).to(dtype)


def by_hand(model: MultiTaskModel, x: Tensor, autocast: torch.dtype | None) -> tuple[list[dict[str, Tensor]], ...]:
    """For each task, its gradients on the backbone's and its head's parameters, by one autograd.grad per loss."""
    on_shared, on_head = [], []
    with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None):
        z = model.backbone(x)
        turned = {task: z.clone() for task in TASKS}
        if model.balancer.transforms:
            for task, rotation in zip(TASKS, model.balancer.rotations.matrices().detach(), strict=True):
                size = len(rotation)
                turned[task] = torch.cat([z[:, :size] @ rotation.to(z).T, z[:, size:]], 1)
        losses = wide_losses({task: model.heads[task](turned[task]) for task in TASKS})
    for task, loss in losses.items():
        for found, module in ((on_shared, model.backbone), (on_head, model.heads[task])):
            named = dict(module.named_parameters())
            gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
            found.append({key: g.double() for key, g in zip(named, gradients, strict=True)})
    return on_shared, on_head


def largest(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.abs().max() for g in gradients.values()]).max()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("how", ["autocast", "half model"])
@pytest.mark.parametrize("name", BALANCERS)
def test_half_precision_against_brute_force(name: str, how: str, half: str) -> None:
    """The backbone gets the sum weighted by task_weights, heads their own losses; and under a loss scale the same."""
    dtype = HALVES[half]
    scales = (1.0, 32.0 if half == "float16" else 65536.0)
    weights = {}
    for scale in scales:
        model = make_model(BALANCERS[name](), torch.float32 if how == "autocast" else dtype)
        x = batch(0, torch.float32 if how == "autocast" else dtype)
        on_shared, on_head = by_hand(model, x, dtype if how == "autocast" else None)
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=how == "autocast"):
            total = model.scalarize(wide_losses(model(x)))
        (scale * total).backward()
        weights[scale] = model.task_weights.double()
        assert weights[scale].isfinite().all()
        size = sum(w.abs() * largest(row) for w, row in zip(weights[scale], on_shared, strict=True))
        for key, parameter in model.backbone.named_parameters():
            expected = sum(w * row[key] for w, row in zip(weights[scale], on_shared, strict=True))
            assert (parameter.grad.double() / scale - expected).abs().max() <= ROUNDING[dtype] * size
        for task, own in zip(TASKS, on_head, strict=True):
            found = {key: p.grad.double() / scale for key, p in model.heads[task].named_parameters()}
            # One factor for the whole head: that of its loss.
            factor = sum((found[k] * own[k]).sum() for k in own) / sum(own[k].square().sum() for k in own)
            assert factor > 0
            for key, gradient in own.items():
                assert (found[key] - factor * gradient).abs().max() <= ROUNDING[dtype] * factor * largest(own)
    # A power of two rounds nothing, as long as nothing is too small for the type.
    exact = {"rtol": 0, "atol": 0} if half == "bfloat16" else {"rtol": 2e-3, "atol": 1e-5}
    assert_close(weights[scales[1]], weights[scales[0]], **exact)


def trainer(model: MultiTaskModel, scaler: Any, seeds: list[int], parts: int = 1, dtype: Any = torch.float16) -> None:
    """What a trainer does: autocast, accumulation by division, unscaling, clipping, and steps that may be skipped."""
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01), lr=0.01)
    for seed in seeds:
        optimizer.zero_grad()
        for part in batch(seed).chunk(parts):
            with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not None):
                total = model.scalarize(wide_losses(model(part)))
            scaler.scale(total / parts).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(list(model.model_parameters()), 1.0)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("name", BALANCERS)
def test_a_scale_that_overflows_is_lowered_and_training_goes_on(name: str) -> None:
    """Half-precision gradients overflow of themselves; but for that the training is the one from the final scale."""
    model, reference = make_model(BALANCERS[name](), torch.float32), make_model(BALANCERS[name](), torch.float32)
    for each in (model, reference):
        each.prepare(batch(0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**42, growth_interval=1000, backoff_factor=2.0**-20)
    trainer(model, scaler, [0, 1])
    assert scaler.get_scale() == 4.0  # two steps were skipped
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    trainer(model, scaler, [2, 3, 4])
    trainer(reference, torch.amp.GradScaler(DEVICE.type, init_scale=4.0, growth_interval=1000), [2, 3, 4])
    assert scaler.get_scale() == 4.0
    # The first step that a model makes is added up in float32, the next ones are in half precision.
    assert_close(dict(model.state_dict()), dict(reference.state_dict()), rtol=0, atol=0.01 * 2.0**-11)


@pytest.mark.parametrize("name", BALANCERS)
def test_scale_accumulation_and_clipping_change_no_decision(name: str) -> None:
    """Two micro-batches, halved, scaled, unscaled, clipped: as halved and clipped by hand, without a scaler."""
    model, reference = make_model(BALANCERS[name](), torch.float32), make_model(BALANCERS[name](), torch.float32)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=65536.0, growth_interval=2)
    trainer(model, scaler, [0, 1, 2, 3], parts=2, dtype=None)
    assert scaler.get_scale() == 4 * 65536.0
    optimizer = torch.optim.SGD(reference.param_groups(lr=0.01), lr=0.01)
    for seed in range(4):
        summed: list[Tensor] = [torch.zeros_like(p) for p in reference.parameters()]
        for part in batch(seed).chunk(2):
            optimizer.zero_grad()
            reference.backward(wide_losses(reference(part)))
            for total, parameter in zip(summed, reference.parameters(), strict=True):
                total += 0 if parameter.grad is None else parameter.grad / 2
        own = {id(p) for p in reference.balancer_parameters()}
        clipped = [g for p, g in zip(reference.parameters(), summed, strict=True) if id(p) not in own]
        norm = torch.stack([g.norm() for g in clipped]).norm()
        for parameter, total in zip(reference.parameters(), summed, strict=True):
            parameter.grad = total if id(parameter) in own else total * (1.0 / (norm + 1e-6)).clamp(max=1.0)
        optimizer.step()
    assert_close(dict(model.state_dict()), dict(reference.state_dict()), rtol=1e-5, atol=1e-6)
    assert_close(model.task_weights, reference.task_weights, rtol=1e-5, atol=1e-6)
