"""torch.compile with inductor, of the whole model or of its parts: the same training as eager."""

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from mtlwrap import IMTL, IMTLG, UW, Compose, MultiTaskModel, cached
from tests import common
from tests.common import DEVICE, make_backbone, make_heads, make_input, make_losses

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)

BALANCERS = {
    "imtl": lambda: IMTL(init=[0.25, -0.5, 0.125]),
    "imtl-g": IMTLG,
    "compose": lambda: Compose(loss=UW(), gradient=IMTLG(nonneg=True)),
}
SCALES = [65536.0, 65536.0, 1024.0, 1.0, 3.0, 65536.0]
# Task b drops out and comes back.
TASKS_OF_STEP = ["abc", "abc", "ac", "abc", "b", "abc"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield
    torch._dynamo.reset()


def make(name: str) -> MultiTaskModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MultiTaskModel(make_backbone(), make_heads(), BALANCERS[name]())
    return model.to(DEVICE)


def train(model: MultiTaskModel, forward: Any, steps: int = 6) -> list[dict[str, Tensor]]:
    # Without momentum: compiled heads send zeros, not None, to the parameters of an absent task, wrapped or not.
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-3, balancer_lr=0.02))
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        with cached():
            losses = make_losses(forward(make_input(step, dtype=torch.float32)))
            total = SCALES[step] * model.scalarize({task: losses[task] for task in TASKS_OF_STEP[step]})
            total.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= SCALES[step]
        optimizer.step()
        history.append({"weights": model.task_weights.clone(), **{k: v.clone() for k, v in model.state_dict().items()}})
    return history


def compile_whole(model: MultiTaskModel) -> Any:
    return torch.compile(model)


def compile_parts(model: MultiTaskModel) -> Any:
    model.backbone.compile()
    for task in model.tasks:
        model.heads[task].compile()
    return model


def compile_in_place(model: MultiTaskModel) -> Any:
    model.compile()
    return model


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("compiled", [compile_whole, compile_parts, compile_in_place])
def test_compiled_training_equals_eager(name: str, compiled: Any) -> None:
    """Several steps with an optimizer, a loss scale that changes, a task that drops out, an in-place first head."""
    model = make(name)
    reference = copy.deepcopy(model)
    expected = train(reference, reference)
    found = train(model, compiled(model))
    for step, (f, e) in enumerate(zip(found, expected, strict=True)):
        for key in e:
            assert_close(f[key], e[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key, s=step: f"step {s}, {k}: {m}")


def test_no_recompilation_from_step_to_step() -> None:
    model = make("imtl")
    compiled = torch.compile(model)
    train(model, compiled, steps=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, compiled, steps=6)


@pytest.mark.parametrize("name", common.BALANCERS)
def test_one_break_at_the_fork_and_no_recompilation(name: str) -> None:
    """Two graphs, the backbone and the heads, traced once: whatever the loss scale is and whoever drops out."""
    counter = CompileCounterWithBackend("eager")
    model = common.make_model(common.BALANCERS[name](), torch.float32)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter)
    explained = torch._dynamo.explain(copy.deepcopy(model))(make_input(dtype=torch.float32))
    assert (explained.graph_count, explained.graph_break_count) == (2, 1)
    torch._dynamo.reset()
    for step, (scale, tasks) in enumerate(zip(SCALES, TASKS_OF_STEP, strict=True)):
        for each, forward in ((model, compiled), (reference, reference)):
            each.zero_grad()
            losses = make_losses(forward(make_input(step, dtype=torch.float32)))
            (scale * each.scalarize({task: losses[task] for task in tasks})).backward()
        assert counter.frame_count == 2
        assert_close(common.grads(list(model.parameters())), common.grads(list(reference.parameters())))


def test_evaluation_is_one_graph() -> None:
    model = make("imtl").eval()
    x = make_input(dtype=torch.float32)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), {task: p.detach() for task, p in expected.items()}, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_a_compiled_step_function() -> None:
    """Forward, losses, scalarize and backward inside one compiled function."""
    model = make("imtl")
    reference = copy.deepcopy(model)

    def step(model: MultiTaskModel, x: Tensor, scale: float) -> None:
        with cached():
            (scale * model.scalarize(make_losses(model(x)))).backward()

    compiled = torch.compile(step)
    for number, scale in enumerate((65536.0, 2.0, 1.0, 3.0, 5.0)):
        x = make_input(int(scale), dtype=torch.float32)
        torch._dynamo.config.error_on_recompile = number > 2  # the scale becomes a symbol in the second step
        for each, run in ((model, compiled), (reference, step)):
            each.zero_grad()
            run(each, x, scale)
        for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
            assert_close(found.grad, expected.grad, rtol=2e-4, atol=1e-5 * scale)


def test_a_loss_of_another_forward_is_noticed_in_a_compiled_model() -> None:
    model = make("imtl-g")
    compiled = torch.compile(model)
    first, second = (make_losses(compiled(make_input(seed, dtype=torch.float32))) for seed in range(2))
    with pytest.raises(ValueError, match="come from different forwards"):
        model.backward({"a": first["a"], "b": second["b"]})


def test_a_single_task_model_is_compiled() -> None:
    model, x = make("imtl"), make_input(dtype=torch.float32)
    expected = model["a"](x)
    assert_close(torch.compile(model["a"], fullgraph=True)(x), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(model["a"], nn.Module)
