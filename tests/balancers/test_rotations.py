"""RotateOnly, RotoGrad and RotoGradNorm: against the package rotograd, and against its faults."""

import copy
import itertools
import math
from typing import Any

import pytest
import rotograd
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import UW, Compose, MultiTaskModel, RotateOnly, RotoGrad, RotoGradNorm, TaskGradients, cached, fork
from mtlwrap.rotations import Rotations
from tests.balancers.zoo import generator, normal
from tests.common import DEVICE, grads

EXACT = {"rtol": 0, "atol": 0}
FAMILY: dict[str, Any] = {
    "RotateOnly": RotateOnly,
    "RotoGrad": RotoGrad,
    "RotoGradNorm": lambda *args, **options: RotoGradNorm(*args, alpha=0.5, **options),
}
family = pytest.mark.parametrize("name", FAMILY)


def modules(size: int = 6, tasks: int = 3) -> tuple[nn.Module, list[nn.Module]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, size))
        heads = [nn.Sequential(nn.Linear(size, 4), nn.Tanh(), nn.Linear(4, k + 1)) for k in range(tasks)]
    return backbone.double(), [head.double() for head in heads]


def model_of(balancer: Any, **shape: int) -> MultiTaskModel:
    return MultiTaskModel(*modules(**shape), balancer).double().to(DEVICE)


def losses_of(predictions: list[Tensor]) -> list[Tensor]:
    return [2.0**k * (p - 0.3 * k).square().mean() for k, p in enumerate(predictions)]


def batch(step: int = 0, rows: int = 7) -> Tensor:
    return normal(rows, 5, gen=generator(step)).to(DEVICE)


def turned(balancer: Any, size: int = 6, tasks: int = 3, seed: int = 5) -> Any:
    """The balancer with rotations of about a radian."""
    balancer.bind(tasks)
    balancer.double().to(DEVICE)
    with torch.no_grad():
        balancer.rotations.angles.copy_(normal(*balancer.rotations.angles.shape, gen=generator(seed)))
    balancer.rotations.settle()
    return balancer


# ------------------------------------------------------------------------------------------------ the package rotograd


@family
@pytest.mark.parametrize("normalize_losses", [False, True])
def test_gradients_of_the_package_over_30_steps(name: str, normalize_losses: bool) -> None:
    """Shared, head, rotation and weight gradients, from the same rotations in each step, across the burn-in."""
    options = {"normalize_losses": normalize_losses, "burn_in_period": 5}
    extra = {"alpha": 0.5} if name == "RotoGradNorm" else {}
    backbone, heads = modules()
    plain_heads = list(heads)
    theirs = getattr(rotograd, name)(backbone, heads, 6, **options, **extra).double()
    ours = MultiTaskModel(*modules(), FAMILY[name](6, **options)).double()
    balancer = ours.balancer
    optimizer = torch.optim.Adam(ours.param_groups(lr=0.003, balancer_lr=0.03))
    rows, columns = torch.tril_indices(6, 6, -1)
    for step in range(30):
        ours.zero_grad()
        ours.backward(losses_of(ours(batch(step).cpu())))
        with torch.no_grad():
            for mine, peer in [(ours.backbone, backbone), *zip(ours.heads, plain_heads, strict=True)]:
                peer.load_state_dict(mine.state_dict())
                peer.zero_grad()
            for k in range(3):
                setattr(theirs, f"rotation_{k}", balancer.rotations.base[k])
                if name == "RotoGradNorm":
                    theirs.weight_[k].copy_(balancer.logits[k])
        theirs.zero_grad()
        theirs.backward(losses_of(theirs(batch(step).cpu())))
        close = {"rtol": 1e-7, "atol": 1e-10}
        assert_close(grads(list(ours.backbone.parameters())), grads(list(backbone.parameters())), **close)
        for mine, peer in zip(ours.heads, plain_heads, strict=True):
            assert_close(grads(list(mine.parameters())), grads(list(peer.parameters())), **close)
        for k in range(3):
            gradient = getattr(theirs.parametrizations, f"rotation_{k}").original.grad
            below = gradient.tril(-1)[rows, columns]
            assert below.norm() > 1e-6
            assert_close(balancer.rotations.angles.grad[k], below, **close)
            if name == "RotoGradNorm":
                assert_close(balancer.logits.grad[k], theirs.weight_[k].grad, **close)
        optimizer.step()
    assert (balancer.rotations.base - torch.eye(6)).abs().max() > 0.01  # it has turned


# -------------------------------------------------------------------------------------------------------- the rotation


@pytest.mark.parametrize("size", [1, 2, 7])
def test_rotations_start_at_the_identity_and_come_back_to_it(size: int) -> None:
    rotations = Rotations(3, size)
    assert rotations.angles.shape == (3, size * (size - 1) // 2)
    identity = torch.eye(size).repeat(3, 1, 1)
    assert_close(rotations.matrices(), identity, **EXACT)
    with torch.no_grad():
        rotations.angles.add_(0.5)
    rotations.settle()
    assert size == 1 or (rotations.base - identity).abs().max() > 0.1
    rotations.reset()
    assert_close(rotations.matrices(), identity, **EXACT)


def test_the_cayley_map() -> None:
    """In two dimensions: an angle a below the diagonal turns by 2 atan(a / 2)."""
    rotations = Rotations(1, 2).double()
    with torch.no_grad():
        rotations.angles.fill_(0.8)
    angle = 2 * math.atan(0.4)
    cosine, sine = math.cos(angle), math.sin(angle)
    assert_close(rotations.matrices()[0], torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64))


def test_settling_changes_neither_rotation_nor_angles() -> None:
    rotations = Rotations(2, 9).double()
    with torch.no_grad():
        rotations.angles.copy_(normal(2, 36, gen=generator(0)))
    angles, before = rotations.angles.clone(), rotations.matrices()
    rotations.settle()
    assert_close(rotations.angles, angles, **EXACT)
    assert_close(rotations.matrices(), before, **EXACT)
    rotations.settle()
    assert_close(rotations.matrices(), before, **EXACT)


def test_a_step_beyond_all_measure_is_still_a_rotation() -> None:
    for size in (3, 7, 8):
        rotations = Rotations(2, size)
        with torch.no_grad():
            rotations.angles[0] = 1e7 * torch.randn(rotations.angles.shape[1], generator=generator(0))
            rotations.angles[1] = torch.nan
        rotations.settle()
        matrices = rotations.base.double()
        assert (matrices[0].mT @ matrices[0] - torch.eye(size)).abs().max() < 1e-4
        assert_close(rotations.base[1], torch.eye(size), **EXACT)


def test_rotations_with_swapped_buffers() -> None:
    """What functional_call was given is written to as a whole: the next step turns from where this one ended."""
    rotations, swapped = Rotations(1, 3), Rotations(1, 3)
    with torch.no_grad():
        rotations.angles.fill_(0.5)
        swapped.angles.fill_(0.5)
    given = {name: buffer.clone() for name, buffer in swapped.named_buffers()}
    swapped.base, swapped.anchor = given["base"], given["anchor"]
    swapped.settle()
    rotations.settle()
    assert_close(given, dict(rotations.named_buffers()), **EXACT)
    swapped.settle()
    assert_close(given, dict(rotations.named_buffers()), **EXACT)


@pytest.mark.parametrize("at_base", [True, False])
def test_angle_gradients_are_derivatives(at_base: bool) -> None:
    """Of any function of the rotations, by finite differences of the map itself, at rotations far from the identity."""
    rotations = Rotations(2, 5).double()
    for _ in range(1 if at_base else 2):
        rotations.settle()
        with torch.no_grad():
            rotations.angles.add_(normal(2, 10, gen=generator(1)))
    if at_base:
        rotations.settle()
    target = normal(2, 5, 5, gen=generator(2))

    def value() -> float:
        return (rotations.matrices() * target).sum().item()

    gradient = rotations.angle_gradients(rotations.matrices().mT @ target, at_base=at_base)
    for task, angle in itertools.product(range(2), range(10)):
        with torch.no_grad():
            rotations.angles[task, angle] += 1e-6
            above = value()
            rotations.angles[task, angle] -= 2e-6
            below = value()
            rotations.angles[task, angle] += 1e-6
        assert gradient[task, angle].item() == pytest.approx((above - below) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("rate", [1e-3, 0.05, 1.0])
def test_orthogonal_after_3000_adam_steps_in_float32(rate: float) -> None:
    rotations = Rotations(2, 24)
    optimizer = torch.optim.Adam(rotations.parameters(), lr=rate)
    gen = torch.Generator().manual_seed(0)
    drift = torch.randn(2, 276, generator=gen)
    for _ in range(3000):
        rotations.angles.grad = drift + torch.randn(2, 276, generator=gen)
        optimizer.step()
        rotations.settle()
    matrices = rotations.matrices().double()
    assert (matrices.mT @ matrices - torch.eye(24)).abs().max() < 1e-5
    assert_close(torch.linalg.det(matrices), torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (matrices - torch.eye(24)).abs().max() > 0.1


# -------------------------------------------------------------------------------------------- where and what is rotated


def rotated_by_hand(z: Tensor, matrix: Tensor, size: int, post: int) -> Tensor:
    """Each vector of the first ``size`` features turned by itself."""
    moved = z.flatten(start_dim=z.dim() - post) if post else z[..., None]
    moved = moved.movedim(-1, -2).clone()
    for index in itertools.product(*map(range, moved.shape[:-1])):
        moved[index][:size] = matrix @ moved[index][:size].clone()
    return moved.movedim(-2, -1).reshape(z.shape)


def columns_of(z: Tensor, size: int, post: int) -> Tensor:
    """The vectors that are turned, as columns."""
    return (z.flatten(start_dim=z.dim() - post) if post else z[..., None])[..., :size, :]


SHAPES = {
    "vector": ((4, 6), 6, ()),
    "first of a vector": ((4, 6), 4, ()),
    "tokens": ((3, 5, 6), 6, ()),
    "channels of a map": ((2, 6, 3, 2), 6, (3, 2)),
    "first channels of a map": ((2, 6, 3, 2), 4, (3, 2)),
    "one sample": ((6,), 6, ()),
}


@pytest.mark.parametrize("case", SHAPES)
def test_what_is_rotated(case: str) -> None:
    """Every head gets R_k z; the objective's gradient is that of |R v - g|^2 over all samples and positions."""
    shape, size, post = SHAPES[case]
    balancer = turned(RotateOnly(size, post_shape=post))
    z = normal(*shape, gen=generator(3)).to(DEVICE).requires_grad_()
    targets = [normal(*shape, gen=generator(10 + k)).to(DEVICE) for k in range(3)]
    shared = fork(z, balancer, 3)
    for k, alias in enumerate(shared.aliases):
        matrix = balancer.rotations.base[k]
        assert_close(alias, rotated_by_hand(z.detach(), matrix, size, len(post)))
    shared.scalarize(
        [(a - t).pow(2).sum() * (k + 1) for k, (a, t) in enumerate(zip(shared.aliases, targets, strict=True))]
    ).backward()

    # By hand, with autograd through the map itself.
    at_heads, at_z = [], []
    for k in range(3):
        r = rotated_by_hand(z.detach(), balancer.rotations.base[k], size, len(post))
        at_heads.append(2 * (k + 1) * (r - targets[k]))
        at_z.append(rotated_by_hand(at_heads[k], balancer.rotations.base[k].mT, size, len(post)))
    assert_close(z.grad, sum(at_z))
    mean = sum(at_z) / 3
    v = mean.norm() * sum(g / g.norm() for g in at_z) / 3
    for k in range(3):
        angles = torch.zeros(size * (size - 1) // 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
        rows, columns = torch.tril_indices(size, size, -1)
        lower = torch.zeros(size, size, dtype=torch.float64, device=DEVICE).index_put((rows, columns), angles)
        matrix = balancer.rotations.base[k] @ torch.linalg.matrix_exp(lower - lower.mT)
        objective = (matrix @ columns_of(v, size, len(post)) - columns_of(at_heads[k], size, len(post))).square().sum()
        (expected,) = torch.autograd.grad(objective, angles)
        assert_close(balancer.rotations.angles.grad[k], expected)


@family
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [0.1, 0.5, 2.0])
def test_gradients_of_the_angles_wherever_the_optimizer_took_them(name: str, training: bool, size: float) -> None:
    """By autograd through the Cayley map. A model in evaluation mode can be trained too; only its state stays."""
    model = model_of(turned(FAMILY[name](6)))
    balancer, rotations = model.balancer, model.balancer.rotations
    with torch.no_grad():
        rotations.angles.add_(size * normal(*rotations.angles.shape, gen=generator(6)).to(DEVICE))
    model.train(training)
    if training:
        rotations.settle()  # as its forward will
    before = {key: value.clone() for key, value in model.state_dict().items()}
    angles = rotations.angles.detach().clone().requires_grad_()
    rows, columns = torch.tril_indices(6, 6, -1)
    lower = torch.zeros(3, 6, 6, dtype=torch.float64, device=DEVICE)
    lower[:, rows, columns] = angles - rotations.anchor
    delta, identity = lower - lower.mT, torch.eye(6, dtype=torch.float64, device=DEVICE)
    matrices = rotations.base @ torch.linalg.solve(identity - delta / 2, identity + delta / 2)
    rotated = [(model.backbone(batch()) @ m.mT).detach().requires_grad_() for m in matrices]
    losses = losses_of([head(r) for head, r in zip(model.heads, rotated, strict=True)])
    at_heads = [torch.autograd.grad(loss, r)[0] for loss, r in zip(losses, rotated, strict=True)]
    at_z = [g @ m.detach() for g, m in zip(at_heads, matrices, strict=True)]
    v = (sum(at_z) / 3).norm() * sum(g / g.norm() for g in at_z) / 3
    objective = sum((v @ m.mT - g).square().sum() for m, g in zip(matrices, at_heads, strict=True))
    (expected,) = torch.autograd.grad(objective, angles)
    model.backward(losses_of(model(batch())))
    assert_close(balancer.rotations.angles.grad, expected)
    if not training:
        assert_close(dict(model.state_dict()), before, **EXACT)


def test_a_forward_in_evaluation_between_forward_and_backward_of_a_step() -> None:
    """The gradient is that of the step, whoever else has asked for the rotations since."""
    plain, disturbed = model_of(turned(RotateOnly(6))), model_of(turned(RotateOnly(6)))
    for model in (plain, disturbed):
        with torch.no_grad():
            model.balancer.rotations.angles.add_(0.5)
        predictions = model(batch())
        if model is disturbed:
            model.eval()
            model(batch(1))
            model.train()
        model.backward(losses_of(predictions))
    assert_close(grads(list(disturbed.parameters())), grads(list(plain.parameters())), **EXACT)


def test_a_shape_of_several_dimensions_is_rotated_as_one() -> None:
    balancer = turned(RotateOnly((2, 3)))
    z = normal(4, 2, 3, gen=generator(3)).to(DEVICE)
    (first, *_) = balancer.transform([z, z, z], [0, 1, 2])
    assert_close(first, (z.reshape(4, 6) @ balancer.rotations.base[0].mT).reshape(4, 2, 3))


def test_of_several_tensors_the_first_is_rotated() -> None:
    balancer = turned(RotoGrad(6))
    z = {"z": normal(4, 6, gen=generator(3)).to(DEVICE).requires_grad_(), "skip": torch.ones(2, device=DEVICE)}
    _, second, third = fork(z, balancer, 3).aliases
    assert_close(second["z"], z["z"] @ balancer.rotations.base[1].mT)
    assert_close(third["skip"], z["skip"], **EXACT)


@pytest.mark.parametrize("post_shape", [(), (3,)])
def test_an_empty_batch(post_shape: tuple[int, ...]) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), 4, *post_shape)

    model = MultiTaskModel(Zero(), [nn.Flatten(), nn.Identity()], RotateOnly(4, post_shape=post_shape))
    flat, same = model(torch.zeros(0, 2))
    assert flat.shape == (0, 4 * math.prod(post_shape))
    assert same.shape == (0, 4, *post_shape)


@family
def test_training_evaluation_and_single_task_models_rotate_alike(name: str) -> None:
    model = model_of(FAMILY[name](6))
    optimizer = torch.optim.Adam(model.param_groups(lr=0.01, balancer_lr=0.1))
    for step in range(3):
        optimizer.zero_grad()
        model.backward(losses_of(model(batch(step))))
        optimizer.step()
    x = batch(9)
    assert (model.balancer.rotations.angles - model.balancer.rotations.anchor).abs().max() > 0.01  # not settled yet
    model.eval()
    with torch.no_grad():
        evaluated, single = model(x), [view(x) for view in model]
    with_gradients = [p.detach() for p in model(x)]
    model.train()
    trained = [p.detach() for p in model(x)]
    for others in (single, with_gradients, trained):
        assert_close(others, evaluated, **EXACT)
    model.eval()
    matrices = model.balancer.rotations.matrices()
    by_hand = [head(model.backbone(x) @ matrix.mT) for head, matrix in zip(model.heads, matrices, strict=True)]
    assert_close(evaluated, by_hand)


def test_before_the_next_forward_a_single_task_model_has_the_last_step() -> None:
    model = model_of(RotoGrad(6))
    optimizer = torch.optim.Adam(model.param_groups(lr=0.01, balancer_lr=0.1))
    model.backward(losses_of(model(batch())))
    optimizer.step()
    single = model[0](batch(1)).detach()
    frozen = copy.deepcopy(model)
    frozen.backbone.requires_grad_(False)
    assert_close(frozen(batch(1))[0].detach(), single)
    model.eval()
    assert_close(model[0](batch(1)).detach(), single, **EXACT)


def test_a_single_task_model_is_exported_with_its_rotation() -> None:
    model = MultiTaskModel(nn.Linear(5, 6), [nn.Linear(6, 1), nn.Linear(6, 2)], RotoGrad(6)).double()
    turned(model.balancer, tasks=2)
    model.eval()
    x = batch(0).cpu()
    program = torch.export.export(model.cpu()[1], (x,))
    assert_close(program.module()(x), model[1](x))


def test_heads_are_not_touched() -> None:
    backbone, heads = modules()
    given = list(heads)
    model = MultiTaskModel(backbone, heads, RotoGrad(6))
    assert all(mine is theirs for mine, theirs in zip(heads, given, strict=True))
    assert all(mine is theirs for mine, theirs in zip(model.heads, given, strict=True))


# ---------------------------------------------------------------------------------------------------------- invariants


@family
def test_a_loss_scale_scales_every_gradient_and_no_more(name: str) -> None:
    """In the package the rotations' gradients come out the loss scale times too large."""
    plain, scaled = model_of(FAMILY[name](6)), model_of(FAMILY[name](6))
    for step in range(3):
        for model, scale in ((plain, 1.0), (scaled, 65536.0)):
            model.zero_grad()
            (scale * model.scalarize(losses_of(model(batch(step))))).backward()
        expected = [65536.0 * g for g in grads(list(plain.parameters()))]
        assert_close(grads(list(scaled.parameters())), expected, rtol=1e-9, atol=1e-9)
        for model, scale in ((plain, 1.0), (scaled, 65536.0)):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.01 * parameter.grad / scale)
    assert_close(dict(scaled.state_dict()), dict(plain.state_dict()), rtol=1e-9, atol=1e-9)


@family
def test_task_losses_do_not_reach_the_rotations(name: str) -> None:
    model = model_of(turned(FAMILY[name](6)))
    sum(losses_of(model(batch()))).backward()
    assert all(parameter.grad is None for parameter in model.balancer_parameters())


def test_rotating_keeps_norms_and_rotates_gradients_back() -> None:
    model = model_of(turned(RotateOnly(6)))
    with cached():
        model.backward(losses_of(model(batch())))
        norms = model.task_gradients.norms
    z = model.backbone(batch()).detach()
    for k, head in enumerate(model.heads):
        r = (z @ model.balancer.rotations.base[k].mT).requires_grad_()
        assert_close(r.norm(), z.norm())
        (gradient,) = torch.autograd.grad(losses_of([torch.zeros(1)] * k + [head(r)])[k], r)
        assert_close(norms[k], gradient.norm())


def test_magnitudes_of_rotograd() -> None:
    """Every scaled gradient has the norm C, which lies between the smallest and the largest; the mean at first."""
    balancer = RotoGrad(4)
    gen = generator(0)
    for step in range(30):
        matrix = normal(3, 4, gen=gen) * torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64) / (step + 1)
        norms = matrix.norm(dim=1)
        sizes = balancer.weigh(TaskGradients(matrix.to(DEVICE))).cpu() * norms
        assert_close(sizes, sizes[0].expand(3))
        assert norms.min() <= sizes[0] <= norms.max()
        if step in (0, 20):  # 20 is the burn-in
            assert_close(sizes[0], norms.mean())


def test_first_norms_are_kept_where_losses_are_not_known() -> None:
    balancer = RotoGrad(2)
    balancer(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    # Ratios 1 and 1/2: C = (1 * 1 + 1/2 * 3/2) / (3/2).
    assert_close(balancer(torch.tensor([[1.0, 0.0], [0.0, 1.5]])), torch.tensor([1.75 / 1.5, 1.75 / 1.5]))
    assert balancer.initial_norms.tolist() == [1.0, 3.0]


def test_one_task_is_trained_alone() -> None:
    model = model_of(RotoGrad(6), tasks=1)
    model.backward(losses_of(model(batch())))
    reference = model_of(None, tasks=1)
    reference.backward(losses_of(reference(batch())))
    assert_close(grads(list(model.backbone.parameters())), grads(list(reference.backbone.parameters())))


def mean_cosine(model: MultiTaskModel, x: Tensor, targets: list[Tensor]) -> float:
    with cached():
        predictions = model(x)
        model.backward([(p - t).square().mean() for p, t in zip(predictions, targets, strict=True)])
        cosines = model.task_gradients.cosines
    model.zero_grad()
    count = len(cosines)
    return ((cosines.sum() - count) / (count * (count - 1))).item()


@pytest.mark.parametrize("kind", [RotateOnly, RotoGrad])
def test_training_brings_the_gradients_together(kind: Any) -> None:
    """Four tasks that want different things of a small representation (the network frozen: rotations alone)."""
    gen = generator(0)
    tasks, x = 4, normal(64, 5, gen=gen).to(DEVICE)
    targets = [normal(64, k + 1, gen=gen).to(DEVICE) for k in range(tasks)]
    model = model_of(kind(6), tasks=tasks)
    before = mean_cosine(model, x, targets)
    optimizer = torch.optim.Adam(model.balancer_parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        model.backward([(p - t).square().mean() for p, t in zip(model(x), targets, strict=True)])
        optimizer.step()
    after = mean_cosine(model, x, targets)
    assert before < 0.2
    assert after > before + 0.1


# ------------------------------------------------------------------------------------- what is missing, zero, broken


@family
def test_an_absent_task_has_no_part(name: str) -> None:
    model, two = model_of(turned(FAMILY[name](6))), model_of(turned(FAMILY[name](6)))
    for step in range(3):
        model.zero_grad()
        losses = losses_of(model(batch(step)))
        losses[1] = None
        model.backward(losses)
        # The same as a model that has only the others.
        pair = MultiTaskModel(two.backbone, [two.heads[0], two.heads[2]], FAMILY[name](6)).double().to(DEVICE)
        if step == 0:
            pair.balancer.rotations.base.copy_(model.balancer.rotations.base[[0, 2]])
            kept = pair
        kept.zero_grad()
        first, third = kept(batch(step))
        first_loss, _, third_loss = losses_of([first, first, third])
        kept.backward([first_loss, third_loss])
        assert_close(grads(list(model.shared_parameters())), grads(list(kept.shared_parameters())))
        for mine, theirs in zip(model.balancer_parameters(), kept.balancer_parameters(), strict=True):
            assert_close(mine.grad[[0, 2]], theirs.grad)
            assert (mine.grad[1] == 0).all()
        assert model.task_weights[1] == 0
    assert model.balancer.first_losses.calls.tolist() == [3, 0, 3]


@family
@pytest.mark.parametrize("normalize_losses", [False, True])
def test_a_first_loss_of_zero_is_waited_out(name: str, normalize_losses: bool) -> None:
    """No NaN, no task that decides alone; its first loss and gradient are the first that are not zero."""
    model = model_of(FAMILY[name](6, normalize_losses=normalize_losses))
    for step in range(3):
        model.zero_grad()
        losses = losses_of(model(batch(step)))
        losses[1] = losses[1] * (0.0 if step == 0 else 1.0)
        model.backward(losses)
        assert all(g.isfinite().all() for g in grads(list(model.parameters())))
        if step == 1:
            assert_close(model.balancer.first_losses.values[1], losses[1].detach().float().double(), rtol=1e-6, atol=0)
    weights = model.task_weights
    assert (weights > 0).all()


def test_normalized_losses() -> None:
    model = model_of(RotateOnly(6, normalize_losses=True, burn_in_period=2))
    first = None
    for step in range(4):
        losses = [loss.detach() for loss in losses_of(model(batch(step)))]
        first = losses if step in (0, 2) else first
        total = model.scalarize(losses_of(model(batch(step))))
        assert_close(total.detach(), sum(loss / start for loss, start in zip(losses, first, strict=True)))
        total.backward()
        assert_close(model.task_weights, 1 / torch.stack(first))


@family
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_no_state(name: str, bad: float) -> None:
    model = model_of(turned(FAMILY[name](6)))
    model.backward(losses_of(model(batch())))
    before = {key: value.clone() for key, value in model.balancer.state_dict().items()}
    model.zero_grad()
    predictions = model(batch(1))
    predictions[1].register_hook(lambda g: g * bad)
    model.backward(losses_of(predictions))
    assert_close(dict(model.balancer.state_dict()), before, **EXACT)
    assert not all(g.isfinite().all() for g in grads(list(model.shared_parameters())))
    assert not model.balancer.rotations.angles.grad.isfinite().all()


def test_exactly_opposing_gradients_turn_nothing() -> None:
    balancer = RotateOnly(3)
    z = normal(4, 3, gen=generator(0)).to(DEVICE).requires_grad_()
    shared = fork(z, turned(balancer, tasks=2), 2)
    balancer.reset()
    shared = fork(z, balancer, 2)
    first, second = shared.aliases
    shared.scalarize([first.sum(), -second.sum()]).backward()
    assert_close(balancer.rotations.angles.grad, torch.zeros_like(balancer.rotations.angles))


def test_accumulation_rotates_alike_in_every_micro_batch() -> None:
    model = model_of(turned(RotoGrad(6)))
    base = model.balancer.rotations.base.clone()
    for step in range(3):
        model.backward(losses_of(model(batch(step))))
    assert_close(model.balancer.rotations.base, base, **EXACT)


def test_half_models_keep_rotations_in_float32() -> None:
    model = model_of(RotoGrad(6)).float().bfloat16()
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01, balancer_lr=0.1))
    for step in range(20):
        optimizer.zero_grad()
        model.backward(losses_of(model(batch(step).bfloat16())))
        optimizer.step()
    matrices = model.balancer.rotations.matrices()
    assert matrices.dtype == torch.float32
    assert (matrices.mT @ matrices - torch.eye(6, device=DEVICE)).abs().max() < 1e-5
    assert (matrices - torch.eye(6, device=DEVICE)).abs().max() > 1e-3


def test_under_autocast() -> None:
    model = model_of(turned(RotoGrad(6))).float()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        losses = losses_of([p.float() for p in model(batch().float())])
    model.backward(losses)
    reference = copy.deepcopy(model)
    reference.zero_grad()
    reference.balancer.reset()
    assert model.balancer.rotations.angles.grad.isfinite().all()
    assert model.balancer.rotations.angles.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_rotations(dtype: torch.dtype) -> None:
    """A forward under autocast takes the optimizer's step in full precision, and they stay rotations."""
    found, expected = Rotations(2, 8).to(DEVICE), Rotations(2, 8).to(DEVICE)
    for step in range(20):
        with torch.no_grad():
            turn = 0.01 * normal(2, 28, gen=generator(step)).to(DEVICE, torch.float32)
            found.angles.add_(turn)
            expected.angles.add_(turn)
        with torch.autocast(DEVICE.type, dtype=dtype):
            found.settle()
        expected.settle()
    assert_close(found.base, expected.base, **EXACT)
    assert (found.base.mT @ found.base - torch.eye(8, device=DEVICE)).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RotateOnly(0), ValueError, "rotation_shape: expected sizes of at least 1, got 0"),
        (lambda: RotateOnly(()), ValueError, "rotation_shape: expected at least one dimension, got none"),
        (lambda: RotateOnly(2.0), TypeError, r"rotation_shape: expected an int or a sequence of ints, got 2\.0"),
        (lambda: RotateOnly((2, "3")), TypeError, "rotation_shape: expected an int or a sequence of ints"),
        (lambda: RotoGrad(2, post_shape=(0,)), ValueError, r"post_shape: expected sizes of at least 1, got \(0,\)"),
        (lambda: RotoGrad(2, burn_in_period=-1), ValueError, "burn_in_period: expected at least 0, got -1"),
        (lambda: RotoGrad(2, burn_in_period=1.5), TypeError, r"burn_in_period: expected an int, got 1\.5"),
        (lambda: RotoGradNorm(2, alpha=-1.0), ValueError, r"alpha: expected a finite number of at least 0, got -1\.0"),
        (lambda: RotoGradNorm(2, alpha="1"), TypeError, "alpha: expected a number, got '1'"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("balancer", "message"),
    [
        (
            RotoGrad(7),
            r"RotoGrad: expected .* at least 7 features in the shape \[..., 7\], got \(7, 6\)",
        ),
        (RotateOnly((2, 3)), r"at least 6 features in the shape \[..., 2, 3\], got \(7, 6\)"),
        (RotateOnly(6, post_shape=(4, 4)), r"in the shape \[..., 6, 4, 4\], got \(7, 6\)"),
    ],
)
def test_a_representation_that_does_not_fit(balancer: Any, message: str) -> None:
    model = model_of(balancer)
    for train in (True, False):
        model.train(train)
        with pytest.raises(ValueError, match=message):
            model(batch())


def test_a_map_whose_columns_would_be_rotated_is_refused() -> None:
    model = MultiTaskModel(nn.Conv2d(3, 8, 3, padding=1), [nn.Conv2d(8, 1, 1)] * 2, RotoGrad(8)).to(DEVICE)
    with pytest.raises(ValueError, match=r"For its 8 channels give the dimensions behind them: post_shape=\(5, 32\)"):
        model(torch.randn(2, 3, 5, 32, device=DEVICE))


def test_in_a_composition() -> None:
    model = model_of(Compose(loss=UW(), gradient=turned(RotoGrad(6))))
    optimizer = torch.optim.Adam(model.param_groups(lr=0.01, balancer_lr=0.02))
    for step in range(3):
        optimizer.zero_grad()
        model.backward(losses_of(model(batch(step))))
        assert (model.balancer.gradient.rotations.angles.grad != 0).any()
        optimizer.step()
    with pytest.raises(TypeError, match=r"gradient: RotoGrad(.|\n)* scales the losses itself, so it stands alone"):
        Compose(loss=UW(), gradient=RotoGrad(6, normalize_losses=True))


def test_repr_shows_the_options() -> None:
    assert repr(RotateOnly(4)).startswith("RotateOnly(\n  4\n")
    shown = repr(RotoGradNorm((2, 3), alpha=1.5, post_shape=(4,), normalize_losses=True))
    assert "(2, 3), post_shape=(4,), normalize_losses=True, burn_in_period=20, alpha=1.5" in shown
