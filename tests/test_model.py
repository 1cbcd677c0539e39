"""The wrapper: containers, views, representations of any structure, parameter groups, checkpoints."""

import copy
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mtlwrap
from mtlwrap import IMTL, IMTLG, UW, EqualWeighting, FixedWeights, MultiTaskModel, cached
from tests.common import (
    DEVICE,
    TASKS,
    grads,
    make_backbone,
    make_heads,
    make_input,
    make_losses,
    make_model,
)

Pair = namedtuple("Pair", ["left", "right"])


@dataclass(frozen=True)
class Frozen:
    map: Tensor
    name: str
    length: int = field(init=False, default=3)


@dataclass
class Counted:
    """A dataclass whose __init__ must not run again."""

    x: Tensor
    extra: dict[str, Any]
    made: int = 0

    def __post_init__(self) -> None:
        self.made += 1


# --- containers -------------------------------------------------------------------------------------------------------


def test_heads_in_a_list_give_lists() -> None:
    heads = list(make_heads().values())
    model = MultiTaskModel(make_backbone(), heads).to(DEVICE).double()
    assert model.tasks == ("0", "1", "2")
    assert len(model) == 3
    assert [model.heads[i] for i in range(3)] == heads
    assert list(model.heads) == heads
    assert model.heads["1"] is heads[1]
    predictions = model(make_input())
    assert isinstance(predictions, list)
    assert [tuple(p.shape) for p in predictions] == [(6, 1), (6, 2), (6, 3)]
    model.backward([p.mean() for p in predictions])
    assert model.task_weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [dict, OrderedDict, nn.ModuleDict])
def test_heads_in_a_mapping_give_dicts(kind: type) -> None:
    heads = kind(make_heads())
    before = list(heads.items())
    model = MultiTaskModel(make_backbone(), heads).to(DEVICE).double()
    assert list(heads.items()) == before
    assert model.tasks == tuple(model.heads) == TASKS
    assert list(model(make_input())) == list(TASKS)


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList])
def test_the_callers_sequence_is_not_changed(kind: type) -> None:
    heads = kind(make_heads().values())
    before = list(heads)
    model = MultiTaskModel(make_backbone(), heads)
    assert list(heads) == before
    assert isinstance(heads, kind)
    assert list(model.heads) == before


ODD_NAMES = ["type", "train", "a.b", "a%2Eb", "keys", "_modules", "forward", "%type", "semantic segmentation", "π", "0"]


def test_any_string_is_a_task_name() -> None:
    heads = {name: nn.Linear(8, i + 1) for i, name in enumerate(ODD_NAMES)}
    model = MultiTaskModel(make_backbone(), heads, "imtl").to(DEVICE).double()
    assert model.tasks == tuple(ODD_NAMES)
    predictions = model(make_input())
    for i, name in enumerate(ODD_NAMES):
        assert model.heads[name] is heads[name]
        assert predictions[name].shape == (6, i + 1)
        assert_close(model[name](make_input()), predictions[name], rtol=0, atol=0)
    model.backward({name: p.square().mean() for name, p in predictions.items()})
    state = model.state_dict()
    assert len([key for key in state if key.startswith("heads.")]) == 2 * len(ODD_NAMES)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(state)
    assert_close(other["a.b"](make_input()), predictions["a.b"], rtol=0, atol=0)


def test_state_dict_keys_are_plain() -> None:
    keys = set(make_model("imtl").state_dict())
    assert {"backbone.0.weight", "heads.a.1.bias", "heads.b.weight", "balancer.loss.log_scale"} <= keys
    assert len(keys) == 2 + 2 + 2 + 4 + 1


# --- single-task models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, -3, "a"])
def test_single_task_model(index: int | str) -> None:
    model, x = make_model("imtl"), make_input()
    single = model[index]
    assert isinstance(single, nn.Module)
    assert_close(single(x), model(x)["a"], rtol=0, atol=0)
    assert {id(p) for p in single.parameters()} == {
        id(p) for p in [*model.backbone.parameters(), *model.heads["a"].parameters()]
    }
    single(x).sum().backward()
    assert model.backbone[0].weight.grad is not None
    assert all(p.grad is None for p in model.heads["b"].parameters())


def test_single_task_model_follows_the_mode() -> None:
    model = make_model()
    assert model["a"].training
    model.eval()
    assert not model["a"].training


@pytest.mark.parametrize("index", range(3))
def test_single_task_model_is_exported(index: int) -> None:
    model, x = make_model("imtl"), make_input()
    model.eval()
    program = torch.export.export(model[index], (x,))
    assert_close(program.module()(x), model(x)[TASKS[index]].detach(), rtol=1e-12, atol=0)


def test_the_whole_model_is_exported_for_evaluation() -> None:
    model, x = make_model("imtl").eval(), make_input()
    program = torch.export.export(model, (x,))
    exported, expected = program.module()(x), model(x)
    for task in TASKS:
        assert_close(exported[task], expected[task].detach(), rtol=1e-12, atol=0)


def test_unknown_tasks_are_refused() -> None:
    model = make_model()
    with pytest.raises(IndexError, match="no task at position 3; there are 3 tasks"):
        model[3]
    with pytest.raises(KeyError, match="no task called 'd'; the tasks are 'a', 'b', 'c'"):
        model["d"]
    with pytest.raises(TypeError, match="expected a name or a position, got slice"):
        model[0:1]
    assert len(list(model)) == 3


# --- tasks= -----------------------------------------------------------------------------------------------------------


def test_some_heads_only() -> None:
    model, x = make_model("imtl-g"), make_input()
    everything = model(x)
    ran = []
    for task in TASKS:
        model.heads[task].register_forward_hook(lambda *_, task=task: ran.append(task))
    assert list(model(x, tasks=["c", 0])) == ["c", "a"]
    assert ran == ["c", "a"]
    assert_close(model(x, tasks="b")["b"], everything["b"], rtol=0, atol=0)
    predictions = model(x, tasks=["b", "c"])
    model.backward(make_losses(predictions))
    assert model.task_weights[0] == 0
    assert (model.task_weights[1:] > 0).all()
    as_list = MultiTaskModel(make_backbone(), list(make_heads().values())).to(DEVICE).double()(x, tasks=-1)
    assert [p is None for p in as_list] == [True, True, False]
    with pytest.raises(ValueError, match="no task called 'd'"):
        model(x, tasks="d")
    with pytest.raises(ValueError, match="expected at least one task, each once"):
        model(x, tasks=["a", 0])
    with pytest.raises(ValueError, match="expected at least one task, each once"):
        model(x, tasks=[])


def test_arguments_go_to_the_backbone() -> None:
    class Backbone(nn.Module):
        def forward(self, x: Tensor, *, shift: float, mask: Tensor | None = None) -> Tensor:
            return x + shift if mask is None else x * mask

    model = MultiTaskModel(Backbone(), [nn.Identity()])
    x = make_input()
    assert_close(model(x, shift=2.0)[0], x + 2)
    assert_close(model(x, shift=2.0, mask=x)[0], x * x)


# --- structured representations ---------------------------------------------------------------------------------------


def structures(x: Tensor) -> dict[str, Any]:
    low, high = x * 2, x.exp()
    ids = torch.arange(3)
    return {
        "tensor": low,
        "tuple": (low, high),
        "list": [low, [high, None], "name"],
        "dict": {"p2": low, "p3": high, "ids": ids, "stride": 4},
        "nested": {"levels": (low, {"deep": [high]}), "sizes": torch.Size([2, 3])},
        "namedtuple": Pair(low, high),
        "ordered": OrderedDict(low=low, high=high),
        "default": defaultdict(list, low=low, high=high),
        "frozen dataclass": Frozen(low, "z"),
        "dataclass": Counted(low, {"high": high}),
        "model output": BaseModelOutputWithPooling(last_hidden_state=low, pooler_output=high),
        "packed": pack_sequence([low[0], low[1]]),
    }


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        return structures(self.linear(x))[self.kind]


class SumsUp(nn.Module):
    """Reads every tensor of a structure, and writes into each."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.got: Any = None

    def forward(self, representation: Any) -> Tensor:
        self.got = representation
        return self.factor * sum(t.mul_(self.factor).exp().mean() for t in tensors_of(representation))


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_of(item)]
    if isinstance(value, Frozen | Counted):
        return [t for item in vars(value).values() for t in tensors_of(item)]
    return []


@pytest.mark.parametrize("kind", structures(torch.randn(3, 4)))
@pytest.mark.parametrize("balancer", [None, "imtl-g"])
def test_each_head_gets_what_the_backbone_returned(kind: str, balancer: str | None) -> None:
    backbone, heads = Structured(kind), [SumsUp(1.0), SumsUp(-0.5)]
    model = MultiTaskModel(backbone, heads, balancer).to(DEVICE).double()
    x = make_input()
    predictions = model(x)
    plain = backbone(x)
    for head in heads:
        assert type(head.got) is type(plain)
        assert len(tensors_of(head.got)) == len(tensors_of(plain))

    def loss_of(head: SumsUp, representation: Any) -> Tensor:
        return head.factor * sum((t * head.factor).exp().mean() for t in tensors_of(representation))

    alone = [loss_of(head, backbone(x)) for head in heads]
    assert_close([p.detach() for p in predictions], [p.detach() for p in alone], rtol=1e-12, atol=0)
    parameters = list(backbone.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in alone]
    if balancer is None:
        weights = [1.0, 1.0]
    else:  # two tasks in closed form: the gradient on everything that is shared, as one vector
        norms = []
        for head in heads:
            representation = backbone(x)
            found = torch.autograd.grad(loss_of(head, representation), tensors_of(representation))
            norms.append(torch.cat([g.flatten() for g in found]).norm())
        weights = [norms[1] / sum(norms), norms[0] / sum(norms)]
    model.backward(predictions)
    expected = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]
    assert_close(grads(parameters), expected, rtol=1e-9, atol=1e-12)


def test_other_leaves_of_a_structure_pass_through() -> None:
    class Backbone(nn.Module):
        def forward(self, x: Tensor) -> Any:
            self.out = {"z": x * 2, "ids": ids, "flag": True, "none": None, "function": len}
            return self.out

    ids = torch.arange(3)
    backbone = Backbone()
    model = MultiTaskModel(backbone, [nn.Identity(), nn.Identity()])
    first, second = model(make_input().requires_grad_())
    assert first["ids"] is second["ids"] is ids
    assert (first["flag"], first["none"], first["function"]) == (True, None, len)
    assert first is not backbone.out
    assert first["z"] is not second["z"]


def test_a_tensor_that_occurs_twice_is_forked_once() -> None:
    class Backbone(nn.Module):
        def forward(self, x: Tensor) -> Any:
            z = x * 2
            return {"fine": z, "pyramid": [z, z.mean(0)]}

    class Reads(nn.Module):
        def __init__(self, power: int) -> None:
            super().__init__()
            self.power = power

        def forward(self, representation: Any) -> Tensor:
            assert representation["fine"] is representation["pyramid"][0]
            return representation["fine"].pow(self.power).sum() + representation["pyramid"][0].sum()

    model = MultiTaskModel(Backbone(), [Reads(2), Reads(3)], "imtl-g")
    x = make_input().requires_grad_()
    model(x)
    with torch.no_grad():
        model(x)
    with cached():
        model.backward(model(x))
        assert model.task_gradients.matrix.shape == (2, x.numel() + 5)
    z = 2 * x.detach()
    on_z = torch.stack([2 * z + 1, 3 * z.square() + 1])
    first, second = on_z.flatten(1).norm(dim=1)
    weights = torch.stack([second, first]) / (first + second)  # of two gradients, whatever their angle
    assert_close(model.task_weights, weights.double())
    assert_close(x.grad, 2 * torch.einsum("t,t...->...", weights, on_z))


def test_a_container_that_hides_tensors_is_refused() -> None:
    class Hides:
        def __init__(self, z: Tensor) -> None:
            self.inner = {"z": [z]}

    class Slotted:
        __slots__ = ("z",)

        def __init__(self, z: Tensor) -> None:
            self.z = z

    class Backbone(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.wrap = wrap

        def forward(self, x: Tensor) -> Any:
            return {"ok": x, "bad": self.wrap(x * 2)}

    x = make_input().requires_grad_()
    for wrap in (Hides, Slotted, lambda z: {z}, lambda z: torch.distributions.Normal(z, 1.0)):
        with pytest.raises(TypeError, match=r"representation\['bad'\] is a .* which holds floating-point tensors"):
            MultiTaskModel(Backbone(wrap), [nn.Identity()])(x)
    MultiTaskModel(Backbone(lambda z: iter([1, 2])), [nn.Identity()])(x)  # hides nothing: passed on


def test_several_devices_or_dtypes_of_losses() -> None:
    model, x = make_model("imtl"), make_input()
    losses = make_losses(model(x))
    losses["a"] = losses["a"].float()
    total = model.scalarize(losses)
    assert total.dtype == torch.float64
    total.backward()
    assert all(p.grad is not None for p in model.heads["a"].parameters())


def test_a_half_precision_model() -> None:
    model = make_model("imtl", torch.bfloat16)
    x = make_input(dtype=torch.bfloat16)
    total = model.scalarize(make_losses(model(x)))
    assert total.dtype == torch.float32
    (65536 * total).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- modules and parameters -------------------------------------------------------------------------------------------


def test_everything_is_registered_normally() -> None:
    model = make_model("imtl", torch.float32)
    assert {name for name, _ in model.named_children()} == {"backbone", "heads", "balancer"}
    model.double().requires_grad_(False).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    hooks = []
    model.register_forward_hook(lambda *_: hooks.append("model"))
    model.backbone.register_forward_hook(lambda *_: hooks.append("backbone"))
    model(make_input())
    assert hooks == ["backbone", "model"]


def test_parameter_groups() -> None:
    model = make_model("imtl")
    shared, heads = list(model.shared_parameters()), list(model.head_parameters())
    assert {id(p) for p in shared} == {id(p) for p in model.backbone.parameters()}
    assert {id(p) for p in heads} == {id(p) for p in model.heads.parameters()}
    assert [id(p) for p in model.model_parameters()] == [id(p) for p in shared + heads]
    (log_scale,) = model.balancer_parameters()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in [*shared, *heads, log_scale])

    groups = model.param_groups(lr=0.1, balancer_lr=0.01, weight_decay=0.5)
    assert [group["lr"] for group in groups] == [0.1, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in groups] == [len(shared) + len(heads), 1]
    optimizer = torch.optim.AdamW(model.param_groups(), lr=0.3, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.3, 0.2), (0.3, 0.0)]
    assert [g["lr"] for g in make_model("uw").param_groups(lr=0.2)] == [0.2, 0.2]
    assert len(make_model("imtl-g").param_groups(lr=0.2, balancer_lr=0.1)) == 1


def test_tied_and_shared_modules_are_counted_once() -> None:
    backbone, shared_head = make_backbone(), nn.Linear(8, 2)
    tied = nn.Linear(5, 8)
    tied.weight = backbone[0].weight
    model = MultiTaskModel(backbone, {"x": shared_head, "y": shared_head, "z": nn.Sequential(nn.Linear(8, 5), tied)})
    parameters = list(model.model_parameters())
    assert len({id(p) for p in parameters}) == len(parameters) == len(list(model.parameters()))
    model.double().to(DEVICE)
    model.backward({task: p.square().mean() for task, p in model(make_input()).items()})
    torch.optim.SGD(model.param_groups(), lr=0.1).step()


def test_balancer_names_and_defaults() -> None:
    assert isinstance(make_model().balancer, EqualWeighting)
    assert isinstance(make_model("imtl").balancer, IMTL)
    assert isinstance(make_model("IMTL_G").balancer, IMTLG)
    with pytest.raises(ValueError, match=r"'pcgrad'; by name there are .*IMTL, .*EqualWeighting, "):
        make_model("pcgrad")
    with pytest.raises(ValueError, match="FixedWeights needs options"):
        make_model("fixedweights")


def test_a_balancer_moves_to_where_the_model_is() -> None:
    model = MultiTaskModel(nn.Linear(2, 2, device="meta"), [nn.Linear(2, 1, device="meta")], UW())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_frozen_backbone_trains_heads_and_loss_balancer() -> None:
    model, x = make_model("imtl"), make_input()
    model.backbone.requires_grad_(False)
    raw = make_losses(model(x))
    model.backward(raw)
    (log_scale,) = model.balancer_parameters()
    expected = torch.stack([loss.detach() for loss in raw.values()]) - 1
    assert_close(log_scale.grad, expected)
    assert all(p.grad is not None for p in model.head_parameters())
    assert model.task_weights is None


def test_frozen_heads_still_balance_the_backbone() -> None:
    model, x = make_model("imtl-g"), make_input()
    reference = make_model("imtl-g")
    reference.backward(make_losses(reference(x)))
    for parameter in model.head_parameters():
        parameter.requires_grad_(False)
    model.backward(make_losses(model(x)))
    assert_close(grads(list(model.shared_parameters())), grads(list(reference.shared_parameters())), rtol=0, atol=0)


def test_scalarize_without_gradients_is_the_value() -> None:
    model, x = make_model("imtl"), make_input()
    expected = model.scalarize(make_losses(model(x))).detach()
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            total = model.scalarize(make_losses(model(x)))
            assert_close(total, expected)
            assert not total.requires_grad
            assert model.scalarize({}) == 0


def test_auxiliary_is_added_as_it_is() -> None:
    model, reference, x = make_model("imtl"), make_model("imtl"), make_input()
    reference.backward(make_losses(reference(x)))
    penalty = 0.5 * sum(p.square().sum() for p in model.model_parameters())
    model.backward(make_losses(model(x)), auxiliary=penalty)
    expected = [
        g + p.detach()
        for g, p in zip(grads(list(reference.model_parameters())), reference.model_parameters(), strict=True)
    ]
    assert_close(grads(list(model.model_parameters())), expected, rtol=1e-12, atol=1e-14)
    assert_close(model.balancer.loss.log_scale.grad, reference.balancer.loss.log_scale.grad, rtol=0, atol=0)
    model.zero_grad()
    model(x)
    model.backward({}, auxiliary=0.5 * model.backbone[0].bias.square().sum())
    assert_close(model.backbone[0].bias.grad, model.backbone[0].bias.detach())


def test_public_names() -> None:
    for name in mtlwrap.__all__:
        assert getattr(mtlwrap, name).__doc__, name


# --- representations that hold a tensor in two places -----------------------------------------------------------------


class AttributeDict(dict):
    """The common idiom: items are attributes too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


@dataclass
class Derived:
    tokens: Tensor

    def __post_init__(self) -> None:
        self.pooled = 2 * self.tokens  # an attribute that is no field


class Store(MutableMapping):
    """A mapping whose shallow copy shares its items."""

    def __init__(self, **items: Tensor) -> None:
        self.inner = dict(items)

    def __getitem__(self, key: str) -> Tensor:
        return self.inner[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.inner[key] = value

    def __delitem__(self, key: str) -> None:
        del self.inner[key]

    def __iter__(self) -> Any:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


class Levels(list):
    """A list with an attribute."""


def make_levels(z: Tensor) -> Levels:
    levels = Levels([z])
    levels.top = z * 3
    return levels


TWO_PLACES = {
    "attribute dict": (lambda z: AttributeDict(z=z), lambda r: r["z"], lambda r: r.z, 1),
    "dataclass attribute": (Derived, lambda r: r.tokens, lambda r: r.pooled, 2),
    "mapping with a dict inside": (lambda z: Store(z=z), lambda r: r["z"], lambda r: r.inner["z"], 1),
    "list attribute": (make_levels, lambda r: r[0], lambda r: r.top, 3),
}


@pytest.mark.parametrize("kind", TWO_PLACES)
def test_no_tensor_escapes_the_fork(kind: str) -> None:
    make, first, second, factor = TWO_PLACES[kind]

    class Backbone(nn.Module):
        def forward(self, x: Tensor) -> Any:
            self.out = make(x * 1)
            return self.out

    class Head(nn.Module):
        def __init__(self, read: Any, scale: float) -> None:
            super().__init__()
            self.read, self.scale = read, scale

        def forward(self, representation: Any) -> Tensor:
            return self.scale * self.read(representation).square().sum()

    backbone = Backbone()
    model = MultiTaskModel(backbone, [Head(first, 1.0), Head(second, 5.0)], "imtl-g")
    x = make_input().requires_grad_()
    predictions = model(x)
    kept = first(backbone.out)
    model.backward(predictions)
    # On what the two heads read, their gradients are 2 x and 5 * 2 factor x; two tasks in closed form.
    norms = [2.0, 10.0 * factor]
    weights = [norms[1] / sum(norms), norms[0] / sum(norms)]
    assert_close(model.task_weights, torch.tensor(weights, dtype=torch.float64, device=DEVICE))
    assert_close(x.grad, (weights[0] * 2 + weights[1] * 10 * factor**2) * x.detach())
    assert kept is first(backbone.out)
    assert first(backbone.out).grad_fn is not None


# --- odd ways to make, move and record a model ------------------------------------------------------------------------


@pytest.mark.parametrize("balancer", [FixedWeights([1.0, 0.1]), UW(likelihood=["classification", "laplace"])])
def test_options_of_a_balancer_survive_meta_and_half(balancer: Any) -> None:
    model = MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1), nn.Linear(2, 1)], balancer)
    good = copy.deepcopy(model).double().to(DEVICE)
    moved = copy.deepcopy(model).half().to("meta").to_empty(device=DEVICE).double()
    moved.load_state_dict(good.state_dict())
    x = torch.randn(3, 2, dtype=torch.float64, device=DEVICE)
    for each in (good, moved):
        each.backward([p.square().mean() for p in each(x)])
    assert_close(moved.task_weights, good.task_weights, rtol=0, atol=0)
    assert good.task_weights.tolist() in ([1.0, 0.1], [1.0, 1.0])


def test_a_balancer_put_in_later_knows_the_tasks() -> None:
    model, x = make_model(), make_input()
    model.balancer = UW()
    model.balancer.to(DEVICE)
    model.backward(make_losses(model(x)))
    assert model.balancer.log_variance.grad.shape == (3,)
    model.balancer = "imtl-g"
    assert isinstance(model.balancer, IMTLG)
    with pytest.raises(ValueError, match="was made for values of shape"):
        model.balancer = UW(2)


def test_numpy_integers_are_positions() -> None:
    model, x = make_model(), make_input()
    assert list(model(x, tasks=np.int64(1))) == ["b"]
    assert_close(model[np.int64(1)](x), model(x)["b"], rtol=0, atol=0)
    assert model.heads.items() == list(zip(model.heads.keys(), model.heads.values(), strict=True))


def test_tracing() -> None:
    model, x = make_model("imtl").eval(), make_input()
    expected = model(x)
    traced = torch.jit.trace(model, x, strict=False)(x)
    assert_close({k: v.detach() for k, v in traced.items()}, {k: v.detach() for k, v in expected.items()})


def test_export_with_a_batch_of_any_size() -> None:
    model = make_model("imtl").eval()
    program = torch.export.export(model["b"], (make_input(),), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),))
    assert_close(program.module()(make_input(rows=11)), model(make_input(rows=11))["b"].detach(), rtol=1e-12, atol=0)
    assert not [node for node in program.graph.nodes if "clone" in str(node.target)]


def test_loss_balancers_under_torch_func() -> None:
    values = torch.tensor([2.0, 3.0], dtype=torch.float64, device=DEVICE)
    balancer = UW(2).to(DEVICE).double()
    parameters = dict(balancer.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(balancer, p, (values,)))(parameters)
    assert_close(gradient["log_variance"], 0.5 * (1 - values))
    assert_close(
        torch.func.vmap(balancer)(torch.stack([values, 2 * values])), torch.stack([values.sum() / 2, values.sum()])
    )


def test_heads_cannot_be_replaced() -> None:
    model = MultiTaskModel(nn.Linear(2, 3), {"a": nn.Linear(3, 1)})
    before = model.heads
    with pytest.raises(TypeError, match="heads: expected them to stay, got a ModuleDict in their place"):
        model.heads = nn.ModuleDict({"a": nn.Linear(3, 1)})
    assert model.heads is before


def test_backward_without_gradients_says_so() -> None:
    model = MultiTaskModel(nn.Linear(2, 3), {"a": nn.Linear(3, 1)})
    losses = {"a": model(torch.randn(4, 2))["a"].sum()}
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, pytest.raises(ValueError, match="expected gradients to be enabled"):
            model.backward(losses)
    model.backward(losses)
    assert model.backbone.weight.grad is not None
