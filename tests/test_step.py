"""cached(): what lives in a step, who may ask, and that all of it is freed."""

import asyncio
import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mtlwrap import IMTLG, UW, MultiTaskModel, TaskGradients, cached, fork
from tests.benchmarks.contenders import Runner
from tests.benchmarks.measuring import peak_memory
from tests.common import (
    BALANCERS,
    DEVICE,
    TASKS,
    grads,
    make_input,
    make_losses,
    make_model,
    task_gradients,
    unwrapped_losses,
)


def test_answers_equal_brute_force() -> None:
    model, x = make_model("equalweighting"), make_input()
    z, losses = unwrapped_losses(model, x)
    rows = torch.stack([row[0].flatten() for row in task_gradients(list(losses.values()), [z])])
    norms = rows.norm(dim=1)
    with cached():
        model.backward(make_losses(model(x)))
        seen = model.task_gradients
        assert isinstance(seen, TaskGradients)
        assert_close(seen.matrix, rows, rtol=1e-11, atol=1e-14)
        assert_close(seen.gramian, rows @ rows.T, rtol=1e-11, atol=1e-14)
        assert_close(seen.norms, norms, rtol=1e-11, atol=0)
        assert_close(seen.cosines, rows @ rows.T / norms / norms[:, None], rtol=1e-11, atol=1e-12)
        assert_close(seen.losses, torch.stack(list(losses.values())).detach(), rtol=1e-12, atol=0)
        assert seen.active.tolist() == [True, True, True]
        assert bool(seen.finite)


def test_absent_tasks_in_the_answers() -> None:
    model, x = make_model("imtl"), make_input()
    with cached():
        losses = make_losses(model(x))
        model.backward({"c": losses["c"], "a": losses["a"]})
        seen = model.task_gradients
        assert seen.active.tolist() == [True, False, True]
        assert seen.losses.isnan().tolist() == [False, True, False]
        assert seen.norms[1] == 0
        assert (seen.matrix[1] == 0).all()


def test_what_another_balancer_would_have_weighed() -> None:
    model, reference, x = make_model(), make_model("imtl-g"), make_input()
    reference.backward(make_losses(reference(x)))
    with cached():
        model.backward(make_losses(model(x)))
        other = IMTLG().weigh(model.task_gradients)
    assert_close(other, reference.task_weights, rtol=1e-12, atol=0)


def test_each_quantity_is_computed_at_most_once() -> None:
    model, x = make_model("imtl-g"), make_input()
    with cached():
        model.backward(make_losses(model(x)))
        seen = model.task_gradients
        for name in ("gramian", "norms", "cosines", "matrix", "active", "losses", "finite"):
            assert getattr(seen, name) is getattr(seen, name), name


@pytest.mark.parametrize("name", BALANCERS)
def test_training_is_bit_equal_with_and_without(name: str) -> None:
    results = []
    for scoped in (False, True):
        model = make_model(BALANCERS[name](), torch.float32)
        optimizer = torch.optim.Adam(model.param_groups(lr=0.01))

        def step(seed: int, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            model.backward(make_losses(model(make_input(seed, dtype=torch.float32))))
            optimizer.step()

        for seed in range(3):
            (cached()(step) if scoped else step)(seed)
        results.append((dict(model.state_dict()), model.task_weights))
    assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BALANCERS)
def test_training_under_autocast_is_bit_equal_with_and_without(name: str, dtype: torch.dtype) -> None:
    """Half-precision gradients of a plain sum are added up alike, whether or not anyone looks at them."""
    results = []
    for scoped in (False, True):
        model = make_model(BALANCERS[name](), torch.float32)
        optimizer = torch.optim.SGD(model.param_groups(lr=0.01), lr=0.01)
        for seed in range(3):
            optimizer.zero_grad()
            with cached() if scoped else nullcontext(), torch.autocast(DEVICE.type, dtype):
                predictions = model(make_input(seed, dtype=torch.float32))
                total = model.scalarize(make_losses({task: p.float() for task, p in predictions.items()}))
                with torch.autocast(DEVICE.type, enabled=False):
                    total.backward()
            optimizer.step()
        results.append(dict(model.state_dict()))
    assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("how", ["normally", "by an exception", "by an exception before the backward"])
def test_nothing_of_a_step_survives_it(how: str) -> None:
    model, x = make_model("imtl"), make_input()
    alive: list[weakref.ref] = []

    def step() -> None:
        with cached():
            predictions = model(x)
            losses = make_losses(predictions)
            alive.extend(weakref.ref(t) for t in [*predictions.values(), *losses.values()])
            if how == "by an exception before the backward":
                raise RuntimeError("stop")
            total = model.scalarize(losses)
            alive.append(weakref.ref(total))
            total.backward()
            seen = model.task_gradients
            alive.append(weakref.ref(seen))
            alive.extend(weakref.ref(getattr(seen, n)) for n in ("gramian", "norms", "cosines", "matrix", "losses"))
            alive.extend(weakref.ref(g) for part in seen._parts for g in part)
            if how == "by an exception":
                raise RuntimeError("stop")

    if how == "normally":
        step()
    else:
        with pytest.raises(RuntimeError, match="stop"):
            step()
    gc.collect()
    assert len(alive) >= 6
    assert [reference() for reference in alive] == [None] * len(alive)
    assert model.task_gradients is None
    assert len(model._junction._origins._living()) == 0


def test_kept_gradients_refuse_to_answer_later() -> None:
    model, x = make_model("imtl-g"), make_input()
    with cached():
        model.backward(make_losses(model(x)))
        seen = model.task_gradients
        held = weakref.ref(seen._parts[0][0])
        cosines = seen.cosines
    gc.collect()
    assert held() is None
    assert cosines.shape == (3, 3)
    for name in ("cosines", "norms", "gramian", "matrix", "active", "losses", "finite"):
        with pytest.raises(ValueError, match="These task gradients were freed when their step ended"):
            getattr(seen, name)
    with pytest.raises(ValueError, match="These task gradients were freed"):
        seen.weighted_sum(torch.ones(3))
    assert "released" in repr(seen)


def test_outside_of_a_scope_nothing_is_kept() -> None:
    model, x = make_model("imtl-g"), make_input()
    model.backward(make_losses(model(x)))
    assert model.task_gradients is None
    assert model.task_weights is not None


def test_a_backward_after_the_scope_keeps_nothing() -> None:
    model, x = make_model("imtl-g"), make_input()
    with cached():
        total = model.scalarize(make_losses(model(x)))
    total.backward()
    assert model.task_gradients is None
    assert model.task_weights is not None


def test_a_later_backward_in_the_same_scope_is_the_one_asked_about() -> None:
    model = make_model("imtl-g")
    with cached():
        model.backward(make_losses(model(make_input(1))))
        first = model.task_gradients.norms
        model.backward(make_losses(model(make_input(2))))
        second = model.task_gradients.norms
    assert not torch.equal(first, second)


def test_an_inner_scope_joins_the_outer() -> None:
    model, x = make_model("imtl-g"), make_input()
    with cached():
        with cached():
            model.backward(make_losses(model(x)))
        inner = model.task_gradients
        assert inner.norms.shape == (3,)
        with pytest.raises(RuntimeError, match="stop"), cached():
            raise RuntimeError("stop")
        assert model.task_gradients is inner
    assert model.task_gradients is None


def test_each_thread_has_a_step_of_its_own() -> None:
    """Two models, two threads, scopes interleaved: one ending frees nothing of the other."""
    barrier = threading.Barrier(2, timeout=30)
    results: dict[int, object] = {}

    def run(number: int) -> None:
        try:
            model, x = make_model("imtl-g"), make_input(number)
            with cached():
                model.backward(make_losses(model(x)))
                barrier.wait()
                if number == 1:
                    barrier.wait()  # the other scope has ended
                    results[number] = model.task_gradients.norms
            if number == 0:
                barrier.wait()
                results[number] = model.task_gradients
        except BaseException as error:
            results[number] = error
            raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results[0] is None
    assert isinstance(results[1], torch.Tensor)


def test_the_backward_may_run_on_another_thread() -> None:
    model, x = make_model("imtl-g"), make_input()
    with cached():
        total = model.scalarize(make_losses(model(x)))
        thread = threading.Thread(target=total.backward)
        thread.start()
        thread.join(60)
        assert model.task_gradients.norms.shape == (3,)


def test_one_model_in_many_threads() -> None:
    """Forward and backward of copies and of the same model at once: each backward balances its own forward."""
    reference = make_model("imtl-g")
    expected = {}
    for seed in range(4):
        reference.zero_grad()
        reference.backward(make_losses(reference(make_input(seed))))
        expected[seed] = grads(list(reference.shared_parameters()))
    model = copy.deepcopy(reference)
    shared, found = list(model.shared_parameters()), {}

    def run(seed: int) -> None:
        for _ in range(10):
            total = model.scalarize(make_losses(model(make_input(seed))))
            found[seed] = torch.autograd.grad(total, shared)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed in range(4):
        assert_close(list(found[seed]), expected[seed], rtol=0, atol=0)


def test_the_users_weight_norm_survives_a_step_with_micro_batches() -> None:
    model = make_model("imtl-g")
    nn.utils.parametrizations.weight_norm(model.backbone[0])
    reference = copy.deepcopy(model)
    for seed in range(2):
        reference.backward(make_losses(reference(make_input(seed))))
    with cached():
        with torch.no_grad():
            model(make_input())
        for seed in range(2):
            model.backward(make_losses(model(make_input(seed))))
    assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), rtol=0, atol=0)


def test_a_fork_alone_answers_too() -> None:
    z = make_input().requires_grad_()
    with cached():
        shared = fork(z, UW(2).double().to(z.device), 2)
        shared.scalarize([shared.aliases[0].square().sum(), shared.aliases[1].sum()]).backward()
        assert_close(shared.task_gradients.norms[1], 0.5 * torch.ones_like(z).norm().detach())
    assert shared.task_gradients is None


def test_tasks_are_in_order() -> None:
    assert make_model().tasks == TASKS


def test_interleaved_generators_do_not_end_each_others_step() -> None:
    def run(seed: int) -> Iterator[object]:
        model = make_model("imtl-g")
        with cached():
            model.backward(make_losses(model(make_input(seed))))
            yield None
            yield model.task_gradients.norms

    first, second = run(1), run(2)
    next(first)
    next(second)
    assert next(first).shape == (3,)
    first.close()
    assert next(second).shape == (3,)


def test_a_task_of_asyncio_outlives_the_scope_it_was_started_in() -> None:
    async def later() -> tuple[int, ...]:
        await asyncio.sleep(0.01)
        model = make_model("imtl-g")
        with cached():
            model.backward(make_losses(model(make_input())))
            return tuple(model.task_gradients.norms.shape)

    async def main() -> tuple[int, ...]:
        with cached():
            task = asyncio.create_task(later())
        return await task

    assert asyncio.run(main()) == (3,)


def test_factors_of_the_loss_balancer_are_told() -> None:
    model, x = make_model(BALANCERS["imtl"]()), make_input()
    z, losses = unwrapped_losses(model, x)
    norms = torch.stack([row[0].norm() for row in task_gradients(list(losses.values()), [z])])
    with cached():
        model.backward(make_losses(model(x)))
        seen = model.task_gradients
        factors = torch.tensor([0.25, -0.5, 0.125], dtype=torch.float64, device=z.device).exp()
        assert_close(seen.loss_factors, factors, rtol=1e-12, atol=0)
        assert_close(seen.norms / seen.loss_factors, norms, rtol=1e-11, atol=0)


# --- a plain sum, once the losses are known to read their own heads --------------------------------------------------


def test_a_later_scope_can_ask_a_loss_balancer_too() -> None:
    model, x = make_model("uw"), make_input()
    for _ in range(3):
        model.backward(make_losses(model(x)))
    with cached():
        model.backward(make_losses(model(x)))
        z, losses = unwrapped_losses(model, x)
        rows = torch.stack([row[0].flatten() for row in task_gradients([0.5 * loss for loss in losses.values()], [z])])
        assert_close(model.task_gradients.matrix, rows)


def test_an_absent_task_has_no_weight_in_any_step() -> None:
    model = make_model("uw")
    for step in range(3):
        losses = make_losses(model(make_input(step)))
        model.backward([losses["a"], None, losses["c"]])
        assert model.task_weights[1] == 0
        assert (model.task_weights[[0, 2]] == 0.5).all()


def test_a_task_that_comes_later_is_checked_too() -> None:
    model, x = make_model("uw"), make_input()
    for _ in range(2):
        losses = make_losses(model(x))
        model.backward({"a": losses["a"], "b": losses["b"]})
    predictions = model(x)
    with pytest.raises(ValueError, match="The loss of task 'c' reads the prediction of task 'a'"):
        model.backward({"a": predictions["a"].mean(), "c": predictions["c"].mean() + predictions["a"].mean()})


# --- what a plain sum costs -------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what the profiler sees of the CPU's allocator")
@pytest.mark.parametrize("balancer", ["equalweighting", "uw", "imtll"])
def test_balanced_losses_take_no_more_memory_than_their_sum(balancer: str) -> None:
    """Their gradients are added up as they arrive, not held until all are there."""
    backbone, heads = nn.Linear(4, 4096), [nn.Linear(4096, 1) for _ in range(12)]
    model, x = MultiTaskModel(backbone, heads, balancer), torch.randn(64, 4)

    def plain() -> None:
        z = backbone(x)
        sum(head(z).square().mean() for head in heads).backward()

    def balanced() -> None:
        model.backward([p.square().mean() for p in model(x)])

    peaks = []
    for step in (plain, balanced, plain, balanced):
        peaks.append(peak_memory(Runner(step, tuple(model.parameters())), DEVICE))
    gradient = 64 * 4096 * 4
    assert peaks[3] <= peaks[2] + 0.1 * gradient
    assert peaks[1] > peaks[0] + 8 * gradient  # the first step, in which the losses are told apart to be checked
