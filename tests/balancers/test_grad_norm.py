"""GradNorm: against the paper's Algorithm 1 with autograd's second derivatives, and its invariants."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import UW, Compose, GradNorm, MultiTaskModel, TaskGradients
from mtlwrap.balancers.norm_objective import relative_rates
from tests.balancers.zoo import generator, normal
from tests.common import DEVICE, grads, make_input, make_losses, make_model

EXACT = {"rtol": 0, "atol": 0}


def by_autograd(model: MultiTaskModel, x: Tensor, first: list[float], alpha: float, absent: set[str]) -> dict[str, Any]:
    """The objective's gradient on the logits, through a graph of the gradient norms; and the weighted gradients."""
    z = model.backbone(x)
    losses = make_losses({t: model.heads[t](z.clone()) for t in "abc"})
    present = [t for t in "abc" if t not in absent]
    logits = model.balancer.logits.detach()[["abc".index(t) for t in present]].requires_grad_()
    weights = len(present) * logits.softmax(0)
    norms = []
    for weight, task in zip(weights, present, strict=True):
        (gradient,) = torch.autograd.grad(weight * losses[task], z, create_graph=True)
        norms.append(gradient.norm())
    progress = torch.stack([losses[t].detach() / first["abc".index(t)] for t in present])
    target = (sum(norms) / len(norms) * (progress / progress.mean()) ** alpha).detach()
    objective = (torch.stack(norms) - target).abs().sum()
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)
    total = sum(w.detach() * losses[t] for w, t in zip(weights, present, strict=True))
    model_gradients = torch.autograd.grad(total, list(model.model_parameters()), allow_unused=True)
    return {"logits": expected, "model": model_gradients, "present": present, "weights": weights.detach()}


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("absent", [set(), {"b"}])
def test_gradients_of_the_paper(alpha: float, absent: set[str]) -> None:
    model = make_model(GradNorm(alpha))
    first = [loss.item() for loss in make_losses(model(make_input(0))).values()]
    model.backward(make_losses(model(make_input(0))))
    with torch.no_grad():
        model.balancer.logits.copy_(torch.tensor([0.3, -0.4, 0.1]))
        for parameter in model.model_parameters():
            parameter.add_(0.1 * normal(*parameter.shape, gen=generator(1)).to(DEVICE))
    x = make_input(1)
    expected = by_autograd(model, x, first, alpha, absent)
    model.zero_grad()
    model.backward({t: loss for t, loss in make_losses(model(x)).items() if t not in absent})
    at = ["abc".index(t) for t in expected["present"]]
    assert_close(model.balancer.logits.grad[at], expected["logits"], rtol=1e-8, atol=1e-12)
    assert (model.balancer.logits.grad != 0).sum() == len(at)
    for parameter, gradient in zip(model.model_parameters(), expected["model"], strict=True):
        assert_close(
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad,
            torch.zeros_like(parameter) if gradient is None else gradient,
        )
    assert_close(model.task_weights[at], expected["weights"])
    assert_close(model.task_weights.sum().item(), float(len(at)))


def test_zero_alpha_makes_all_norms_equal() -> None:
    """The objective is stationary exactly there: trained on one batch with the network frozen, the norms meet."""
    model = make_model(GradNorm(0.0))
    optimizer = torch.optim.Adam(model.balancer_parameters(), lr=0.02)
    x = make_input()
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step / 200)
        optimizer.zero_grad()
        model.backward(make_losses(model(x)))
        optimizer.step()
    z = model.backbone(x).detach().requires_grad_()
    losses = make_losses({t: model.heads[t](z.clone()) for t in "abc"})
    norms = [
        w * torch.autograd.grad(loss, z)[0].norm() for w, loss in zip(model.task_weights, losses.values(), strict=True)
    ]
    assert_close(torch.stack(norms), norms[0].expand(3), rtol=0.02, atol=0)
    assert model.task_weights.max() / model.task_weights.min() > 5  # they were far apart


def test_known_initial_losses() -> None:
    known, seen = make_model(GradNorm(1.5, [1.0, 2.0, 3.0])), make_model(GradNorm(1.5))
    x = make_input()
    for model in (known, seen):
        model.backward(make_losses(model(x)))
    expected = by_autograd(known, x, [1.0, 2.0, 3.0], 1.5, set())
    assert_close(known.balancer.logits.grad, expected["logits"])
    assert (known.balancer.logits.grad - seen.balancer.logits.grad).abs().max() > 1e-6


def test_a_loss_scale_counts_once() -> None:
    plain, scaled = make_model(GradNorm()), make_model(GradNorm())
    for step in range(3):
        for model, scale in ((plain, 1.0), (scaled, 65536.0)):
            model.zero_grad()
            (scale * model.scalarize(make_losses(model(make_input(step))))).backward()
        assert_close(grads(list(scaled.parameters())), [65536.0 * g for g in grads(list(plain.parameters()))])


def test_zero_losses_and_gradients_are_no_nan() -> None:
    model = make_model(GradNorm())
    for factor in (0.0, 0.0, 1.0, 1.0):
        model.zero_grad()
        model.backward(
            {t: loss * (factor if t == "b" else 1.0) for t, loss in make_losses(model(make_input())).items()}
        )
        assert all(g.isfinite().all() for g in grads(list(model.parameters())))
    model.zero_grad()
    model.backward({t: loss * 0.0 for t, loss in make_losses(model(make_input())).items()})
    assert all(g.isfinite().all() for g in grads(list(model.parameters())))


def test_a_loss_below_zero_counts_as_done() -> None:
    """Its progress is none of the others': as the mean of all it could be zero, and rates of any size would follow."""
    gradients = TaskGradients.from_parts([[torch.ones(2)] * 3], [True] * 3)
    rates = relative_rates(torch.tensor([2.0, 1.0, -3.0]), gradients, 1.0)
    assert_close(rates, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    model = make_model(GradNorm(1.5, [1.0, 1.0, 1.0]))
    model.backward({t: loss - 3.0 * (t == "a") for t, loss in make_losses(model(make_input())).items()})
    assert model.balancer.logits.grad.isfinite().all()


def test_standing_alone_the_weighted_gradients_are_summed() -> None:
    matrix = normal(3, 5, gen=generator(0)).to(DEVICE)
    assert_close(GradNorm()(matrix), matrix.sum(0))
    assert_close(GradNorm().weigh(TaskGradients(matrix)).sum().item(), 3.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GradNorm(-0.1), ValueError, r"alpha: expected a finite number of at least 0, got -0\.1"),
        (lambda: GradNorm(math.nan), ValueError, "alpha: expected a finite number of at least 0, got nan"),
        (lambda: GradNorm(None), TypeError, "alpha: expected a number, got None"),
        (
            lambda: GradNorm(1.0, [1.0, 0.0]),
            ValueError,
            r"initial_losses: expected one positive finite number per task",
        ),
        (
            lambda: GradNorm(1.0, []),
            ValueError,
            r"initial_losses: expected one positive finite number per task, got \[\]",
        ),
        (lambda: GradNorm().scalarize(torch.ones(2)), ValueError, "GradNorm does not know the number of tasks"),
        (lambda: Compose(loss=UW(), gradient=GradNorm()), TypeError, "scales the losses itself, so it stands alone"),
        (
            lambda: MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1)] * 3, GradNorm(1.0, [1.0, 2.0])),
            ValueError,
            "GradNorm was made for 2 tasks, but the model has 3 heads",
        ),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_repr_shows_the_options() -> None:
    assert "alpha=1.5" in repr(GradNorm())
    assert "alpha=0.5, initial_losses=[1.0, 2.0]" in repr(GradNorm(0.5, [1, 2]))
