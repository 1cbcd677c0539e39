"""Gradients on the weights of linear layers as factors: against one autograd.grad per task, and who is left out."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mtlwrap import IMTLG, ExcessMTL, MultiTaskModel, TaskGradients, TorchJD, cached, factored
from tests import test_exact
from tests.balancers.zoo import paper_weights
from tests.common import DEVICE, make_heads, make_input, make_losses, task_gradients
from tests.test_exact import CLOSE, jacobian, shared_gradient

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="on a CPU only")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Factors are kept wherever they can be; filled with the positions of the weights concerned, per step."""
    noted = []
    found = factored.linear_layers

    def noting(*args: Any) -> list[factored.Linear]:
        layers = found(*args)
        noted.append(sorted(layer.weight for layer in layers))
        return layers

    monkeypatch.setattr(factored, "_pays", lambda *_: True)
    monkeypatch.setattr("mtlwrap.exact.linear_layers", noting)
    return noted


class Backbone(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def two(bias: bool = True) -> dict[str, nn.Module]:
    return {"first": nn.Linear(5, 12, bias=bias), "second": nn.Linear(12, 8, bias=bias)}


def run_two(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x).tanh())


def frozen(name: str) -> Backbone:
    backbone = Backbone(run_two, **two())
    backbone.get_parameter(name).requires_grad_(False)
    return backbone


def square() -> dict[str, nn.Module]:
    return {"first": nn.Linear(5, 8), "second": nn.Linear(8, 8)}


def tied() -> Backbone:
    backbone = Backbone(lambda m, x: m.third(m.second(m.first(x).tanh()).tanh()), **square(), third=nn.Linear(8, 8))
    backbone.third.weight = backbone.second.weight
    return backbone


def run_read_twice(m: Any, x: Tensor) -> Tensor:
    hidden = m.first(x).tanh()
    return m.second(hidden) + 0.1 * m.second.weight.square().sum()


def run_bias_read_twice(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x).tanh()) * m.second.bias.cos()


def run_hooked(m: Any, x: Tensor) -> Tensor:
    hidden = m.first(x)
    after = m.second(hidden.tanh())
    if after.requires_grad:
        # In the pass in which the parameters have their gradient already, there is none.
        hidden.register_hook(lambda gradient: None if gradient is None else 3.0 * gradient)
        after.register_hook(lambda gradient: None if gradient is None else gradient.flip(0))
    return after.tanh()


def run_checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.second(checkpoint(m.first, x, use_reentrant=False).tanh())


def run_saved_elsewhere(m: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        hidden = m.first(x).tanh()
    return m.second(hidden)


def run_addmm(m: Any, x: Tensor) -> Tensor:
    hidden = torch.addmm(m.first.bias, x, m.first.weight.t(), beta=0.5, alpha=2.0).tanh()
    # A row for each sample, rather than one for all.
    return torch.addmm(m.offset.weight, hidden, m.second.weight.t()) + m.second.bias


def run_transposed_once(m: Any, x: Tensor) -> Tensor:
    transposed, hidden = m.second.weight.t(), m.first(x).tanh()
    return hidden @ transposed + hidden.cos() @ transposed


def hooked_weight() -> Backbone:
    backbone = Backbone(run_two, **two())
    backbone.first.weight.register_hook(lambda gradient: 3.0 * gradient)
    return backbone


def run_on_expanded(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x).sum(0).expand(6, 12))


CASES: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "two layers": (lambda: Backbone(run_two, **two()), [0, 2]),
    "no bias": (lambda: Backbone(run_two, **two(bias=False)), [0, 1]),
    "a frozen weight": (lambda: frozen("first.weight"), [1]),
    "a frozen bias": (lambda: frozen("second.bias"), [0, 2]),
    "tied": (tied, [0]),
    "called twice": (lambda: Backbone(lambda m, x: m.second(m.second(m.first(x).tanh())), **square()), [0]),
    "a weight read twice": (lambda: Backbone(run_read_twice, **two()), [0]),
    "a bias read twice": (lambda: Backbone(run_bias_read_twice, **two()), [0, 2]),
    "tokens": (lambda: Backbone(lambda m, x: run_two(m, x.expand(3, 6, 5).cos()).mean(0), **two()), [0, 2]),
    "tokens, no bias": (lambda: Backbone(lambda m, x: run_two(m, x.expand(3, 6, 5)).mean(0), **two(False)), [0, 1]),
    "hooks of outputs": (lambda: Backbone(run_hooked, **two()), [0, 2]),
    "a checkpoint": (lambda: Backbone(run_checkpointed, **two()), [2]),
    "saved elsewhere": (lambda: Backbone(run_saved_elsewhere, **two()), [2]),
    "addmm": (lambda: Backbone(run_addmm, **two(), offset=nn.Linear(8, 6, bias=False)), [2]),
    "transposed once": (lambda: Backbone(run_transposed_once, **two(bias=False)), [0]),
    "a hook of a weight": (hooked_weight, [2]),
    "expanded": (lambda: Backbone(run_on_expanded, **two()), [0, 2]),
    "transposed": (lambda: Backbone(lambda m, x: linear(x, m.mixed.weight.t()), mixed=nn.Linear(8, 5, bias=False)), []),
    "convolution": (
        lambda: Backbone(lambda m, x: m.b(m.a(x[:, None]).flatten(1)), a=nn.Conv1d(1, 4, 3), b=nn.Linear(12, 8)),
        [2],
    ),
}


def make_model(backbone: nn.Module, balancer: Any = None, dtype: torch.dtype = torch.float64) -> MultiTaskModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in backbone.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        heads = make_heads()
    return MultiTaskModel(backbone, heads, balancer or IMTLG(), gradients="parameters").to(dtype)


def rows_of(model: MultiTaskModel, x: Tensor) -> Tensor:
    """The tasks' gradients on all shared parameters that are trained, by brute force."""
    z = model.backbone(x)
    losses = make_losses({t: model.heads[t](z.clone()) for t in "abc"}).values()
    trained = [p for p in model.shared_parameters() if p.requires_grad]
    found = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])


def trained_gradient(model: MultiTaskModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.shared_parameters() if p.requires_grad])


@pytest.mark.parametrize("case", CASES)
def test_is_the_gradient(case: str, kept: list[list[int]]) -> None:
    make, expected = CASES[case]
    model, x = make_model(make()), make_input()
    rows = rows_of(model, x)
    alpha = paper_weights(rows)
    with cached():
        (64.0 * model.scalarize(make_losses(model(x)))).backward()
        assert_close(model.task_weights, alpha, **CLOSE)
        assert_close(trained_gradient(model), 64.0 * (alpha @ rows), **CLOSE)
        assert_close(model.task_gradients.gramian, rows @ rows.T, **CLOSE)
        assert_close(model.task_gradients.matrix, rows, **CLOSE)
        assert_close(model.task_gradients.weighted_sum(alpha), alpha @ rows, **CLOSE)
    assert kept == [expected]


class Reads(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, z: tuple[Tensor, ...]) -> Tensor:
        return z[self.index].square()


def check_tensors(run: Callable[..., Any], layers: dict[str, nn.Module], kept: list[list[int]]) -> None:
    """Each of two tasks reads one of two tensors."""
    torch.manual_seed(0)
    model = MultiTaskModel(Backbone(run, **layers), [Reads(0), Reads(1)], IMTLG(), gradients="parameters").double()
    x, trained = make_input(), list(model.shared_parameters())
    rows = torch.stack(
        [torch.cat([g.flatten() for g in r]) for r in task_gradients([p.sum() for p in model(x)], trained)]
    )
    model.backward([p.sum() for p in model(x)])
    assert_close(shared_gradient(model), paper_weights(rows) @ rows, **CLOSE)
    assert any(kept)


def test_a_weight_that_is_handed_out_itself(kept: list[list[int]]) -> None:
    check_tensors(lambda m, x: (run_two(m, x), m.second.weight), two(), kept)
    check_tensors(lambda m, x: (run_two(m, x), m.second.weight.t()), two(), kept)
    assert kept == [[0]] * 2


def test_layers_that_not_every_task_reaches(kept: list[list[int]]) -> None:
    layers = {f"{name}{place}": layer for place in range(2) for name, layer in two().items()}

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.second0(m.first0(x).tanh()), m.second1(m.first1(x).tanh())

    check_tensors(run, layers, kept)
    assert kept == [[0, 2, 4, 6]]


def test_layers_of_two_types(kept: list[list[int]]) -> None:
    model = make_model(Backbone(lambda m, x: m.second(m.first(x).tanh().double()), **two()))
    model.backbone.first.float()
    x = make_input(dtype=torch.float32)
    rows = torch.stack(
        [
            torch.cat([g.double().flatten() for g in row])
            for row in task_gradients(list(make_losses(model(x)).values()), list(model.shared_parameters()))
        ]
    )
    model.backward(make_losses(model(x)))
    found = torch.cat([p.grad.double().flatten() for p in model.shared_parameters()])
    assert_close(found, paper_weights(rows) @ rows, rtol=1e-5, atol=1e-7)
    assert kept == [[0]]


def test_to_the_bit_the_same_inside_a_scope(kept: list[list[int]]) -> None:
    first, x = make_model(Backbone(run_two, **two()), dtype=torch.float32), make_input(dtype=torch.float32)
    second = copy.deepcopy(first)
    first.backward(make_losses(first(x)))
    with cached():
        second.backward(make_losses(second(x)))
        assert second.task_gradients.matrix.isfinite().all()
    assert torch.equal(shared_gradient(first), shared_gradient(second))
    assert torch.equal(first.task_weights, second.task_weights)
    assert kept == [[0, 2]] * 2


WHOLE = [
    (test_exact.test_equals_torchjd, ()),
    (test_exact.test_methods_of_torchjd_on_parameters, ("MGDA",)),
    (test_exact.test_methods_of_torchjd_on_parameters, ("AlignedMTL",)),
    (test_exact.test_methods_of_torchjd_on_parameters, ("ConFIG",)),
    (test_exact.test_methods_of_torchjd_on_parameters, ("TrimmedMean",)),
    (test_exact.test_norm_ratio_of_a_million_in_float32, ()),
    (test_exact.test_excess_mtl_is_the_published_one, ()),
    (test_exact.test_grad_norm_sees_the_parameters, ()),
    (test_exact.test_an_absent_task, ()),
    (test_exact.test_several_tensors_and_unused_parameters, ()),
    (test_exact.test_state_is_as_wide_as_all_parameters_also_where_none_is_reached, ()),
    (test_exact.test_an_input_that_wants_a_gradient_gets_it, ()),
    (test_exact.test_twice_through_one_graph_and_with_create_graph, ()),
    (test_exact.test_who_looks_on_sees_one_pass_of_the_shared_gradient, ("a hook of a parameter",)),
    (test_exact.test_who_looks_on_sees_one_pass_of_the_shared_gradient, ("a hook of a module",)),
    (test_exact.test_who_looks_on_sees_one_pass_of_the_shared_gradient, ("a hook of z",)),
    (test_exact.test_hooks_after_accumulation_run_once, ()),
    (test_exact.test_what_is_no_weighting, ()),
    (test_exact.test_weights_are_refreshed_every_third_step, ()),
    (test_exact.test_weights_that_are_not_finite_are_not_kept, ()),
    (test_exact.test_gradients_do_not_overlap, ()),
]


@pytest.mark.parametrize(("test", "args"), WHOLE, ids=lambda value: getattr(value, "__name__", None))
def test_all_else_holds_with_factors(test: Callable[..., None], args: tuple[Any, ...], kept: list[list[int]]) -> None:
    test(*args)
    assert any(kept)


def test_parameters_of_several_types(kept: list[list[int]]) -> None:
    """What is of the first one's type is kept as factors."""
    test_exact.test_parameters_of_several_types(absent=True, vectorize=False)
    assert kept


def wide(dtype: torch.dtype = torch.float32, balancer: Any = None) -> tuple[MultiTaskModel, Tensor]:
    """Layers for which it pays."""
    layers = {"first": nn.Linear(400, 300), "second": nn.Linear(300, 8)}
    model = make_model(Backbone(run_two, **layers), balancer, dtype)
    return model, torch.randn(6, 400, generator=torch.Generator().manual_seed(0)).to(dtype)


def losses_with(model: MultiTaskModel, x: Tensor, factors: dict[str, float]) -> dict[str, Tensor]:
    return {t: factors[t] * loss for t, loss in make_losses(model(x)).items()}


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_norm_ratio_of_a_million_in_wide_layers(size: float) -> None:
    model, x = wide()
    rows = jacobian(copy.deepcopy(model).double(), x.double(), (size * 1e-3, size, size * 1e3))
    assert rows.norm(dim=1).max() / rows.norm(dim=1).min() > 3e5
    model.backward(losses_with(model, x, {"a": size * 1e-3, "b": size, "c": size * 1e3}))
    projections = (rows / rows.norm(dim=1, keepdim=True)) @ shared_gradient(model).double()
    assert ((projections.max() - projections.min()) / projections.mean()) < 1e-5


def test_gradients_that_cancel_within_the_batch(kept: list[list[int]]) -> None:
    """As they do near a minimum: of a product of inputs with inputs, in float32, nothing would be left but rounding.

    What is left of the inputs is a four-thousandth of them: in float32 its inner products are right to some 1e-4 and
    less, but of squares of the inputs, rounded at 6e-8, only 1e-7 is left.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 40, generator=generator).add_(3.0)
    x[4:] = x[:4] + 1e-3 * torch.randn(4, 40, generator=generator)
    signs = torch.tensor([1.0] * 4 + [-1.0] * 4)[:, None]
    layer = nn.Linear(40, 30)
    model = MultiTaskModel(layer, [nn.Identity(), nn.Identity()], IMTLG(), gradients="parameters")
    directions = torch.randn(2, 4, 30, generator=generator).repeat(1, 2, 1) * signs
    with cached():
        model.backward([(z * d).sum() for z, d in zip(model(x), directions, strict=True)])
        found = model.task_gradients.gramian
    rows = torch.stack([torch.cat([(d.double().T @ x.double()).flatten(), d.double().sum(0)]) for d in directions])
    assert_close(found, rows @ rows.T, rtol=1e-3, atol=0.0)
    assert kept == [[0]]


def test_what_is_not_finite_shows() -> None:
    for spoilt in (torch.nan, torch.inf):
        model, x = wide()
        x[2, 3] = spoilt
        model.backward(make_losses(model(x)))
        assert model.task_weights.isnan().all()


def test_inputs_that_change_are_kept_for_questions(kept: list[list[int]]) -> None:
    model, x = make_model(Backbone(run_two, **two())), make_input()
    rows = rows_of(model, x)
    with cached():
        model.backward(make_losses(model(x)))
        x.data.zero_()  # which nobody is told of
        assert_close(model.task_gradients.matrix, rows, **CLOSE)
    assert any(kept)


def test_gradients_asked_for_under_autocast_are_not_rounded(kept: list[list[int]]) -> None:
    model, x = make_model(Backbone(run_two, **two()), dtype=torch.float32), make_input(dtype=torch.float32)
    weights = torch.ones(3)
    with cached():
        model.backward(make_losses(model(x)))
        with torch.autocast("cpu", torch.bfloat16):
            under = model.task_gradients.weighted_sum(weights)
        assert torch.equal(under, model.task_gradients.weighted_sum(weights))
        assert_close(under, model.task_gradients.matrix.sum(0))
    assert any(kept)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_of_old_are_run(kept: list[list[int]]) -> None:
    model, x = make_model(nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 8), nn.Flatten())), make_input()
    rows = rows_of(model, x)
    model.backbone[1].register_backward_hook(lambda _, given, __: tuple(g if g is None else 2 * g for g in given))
    model.backward(make_losses(model(x)))
    assert not any(kept)
    assert (shared_gradient(model) - paper_weights(rows) @ rows).abs().max() > 1e-3


class Reused(torch.autograd.Function):
    """Hands out the same memory in each backward pass."""

    memory = torch.zeros(0)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if Reused.memory.shape != gradient.shape:
            Reused.memory = torch.empty_like(gradient)
        return Reused.memory.copy_(gradient)


def test_gradients_in_memory_that_is_used_again(kept: list[list[int]]) -> None:
    model, x = make_model(nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 8), nn.Flatten())), make_input()
    model.backbone[1].register_forward_hook(lambda *called: Reused.apply(called[-1]))
    rows = rows_of(model, x)
    model.backward(make_losses(model(x)))
    assert_close(shared_gradient(model), paper_weights(rows) @ rows, **CLOSE)
    assert any(kept)


def test_autocast_makes_no_such_product(kept: list[list[int]]) -> None:
    """The weight's gradient is rounded on its way, for each task by itself."""
    model, x = make_model(Backbone(run_two, **two()), dtype=torch.float32), make_input(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = make_losses({t: p.float() for t, p in model(x).items()})
    model.backward(losses)
    assert kept == [[]]
    assert shared_gradient(model).isfinite().all()


def test_another_thread_in_the_same_graph_is_not_heard(kept: list[list[int]]) -> None:
    model, x = make_model(Backbone(run_two, **two())), make_input()
    z = model.backbone(x)
    rows, seen = rows_of(model, x), []

    def other() -> None:
        torch.autograd.grad(z, list(model.shared_parameters()), torch.ones_like(z), retain_graph=True)

    def beside(gradient: Tensor) -> None:
        if threading.current_thread() is threading.main_thread():
            seen.append(gradient)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    model.backbone.run = lambda m, _: z
    z.register_hook(beside)
    model.backward(make_losses(model(x)))
    assert seen
    assert_close(model.task_weights, paper_weights(rows), **CLOSE)
    assert any(kept)


def test_it_is_done_where_it_pays() -> None:
    def count(rows: int, features: int, outputs: int, tasks: int) -> int:
        layer = nn.Linear(features, outputs)
        y = layer(torch.randn(rows, features))
        edge = torch.autograd.graph.get_gradient_edge(y)
        return len(factored.linear_layers([edge], list(layer.parameters()), tasks))

    assert count(64, 512, 512, 2) == 1
    assert count(128, 512, 512, 8) == 1
    assert count(512, 512, 512, 8) == 0  # as many rows as features
    assert count(64, 64, 64, 16) == 0
    assert count(256, 512, 512, 2) == 0  # the decomposition takes longer than what is saved
    assert count(4, 16, 16, 2) == 0
    assert count(0, 512, 512, 2) == 0


@pytest.mark.parametrize("make", [lambda: ExcessMTL(0.5), lambda: TorchJD(_trimmed_mean())])
def test_whole_gradients_of_wide_layers(make: Callable[[], Any]) -> None:
    model, x = wide(torch.float64, make())
    rows = jacobian(model, x)
    expected = make().combine(TaskGradients(rows))
    model.backward(make_losses(model(x)))
    assert_close(shared_gradient(model), expected, **CLOSE)


def _trimmed_mean() -> nn.Module:
    from torchjd.aggregation import TrimmedMean

    return TrimmedMean(1)
