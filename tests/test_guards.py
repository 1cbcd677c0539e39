"""Bad input gets an error that says what was given, what was expected, and which task; and nothing is lost."""

import warnings
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import IMTL, IMTLG, IMTLL, UW, Compose, FixedWeights, LossBalancer, MultiTaskModel, RotateOnly
from tests.common import (
    BALANCERS,
    DEVICE,
    FOLLOW_LOSSES,
    grads,
    make_backbone,
    make_heads,
    make_input,
    make_losses,
    make_model,
)

# --- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda b, h: (lambda x: x, h), TypeError, "backbone: expected a torch.nn.Module, got function"),
        (lambda b, h: (b, []), ValueError, "heads: expected at least one head, got none"),
        (lambda b, h: (b, {}), ValueError, "heads: expected at least one head, got none"),
        (lambda b, h: (b, h["a"]), TypeError, "heads: expected a sequence of modules or a mapping .* got Sequential"),
        (lambda b, h: (b, None), TypeError, "heads: expected a sequence of modules or a mapping .* got NoneType"),
        (lambda b, h: (b, [h["a"], len]), TypeError, "head of task '1' is a builtin_function_or_method; expected"),
        (lambda b, h: (b, {"seg": nn.Linear}), TypeError, "head of task 'seg' is a type; expected"),
        (lambda b, h: (b, {1: h["a"]}), TypeError, "expected task names to be strings, got 1, a int"),
        (lambda b, h: (b, {"": h["a"]}), ValueError, "expected task names that are not empty"),
        (lambda b, h: (b, h, 3), TypeError, "balancer: expected a balancer object, .* got int"),
        (lambda b, h: (b, h, IMTLG), TypeError, "balancer: expected a balancer object, .* got the class IMTLG"),
        (lambda b, h: (b, h, "mgda"), ValueError, "no balancer is called 'mgda'; by name there are "),
        (lambda b, h: (b, h, IMTLL(2)), ValueError, r"IMTLL was made for values of shape \(2,\), but the model has 3"),
        (lambda b, h: (b, h, UW((3, 1))), ValueError, r"UW was made for values of shape \(3, 1\), but the model has 3"),
        (lambda b, h: (b, h, FixedWeights([1, 2])), ValueError, "FixedWeights was made for 2 tasks.* 3 heads"),
        (lambda b, h: (b, h, IMTL(4)), ValueError, "IMTL was made for 4 tasks, but the model has 3 heads"),
        (lambda b, h: (b, h, IMTL(init=[0.0, 1.0])), ValueError, "IMTL was made for 2 tasks, but the model has 3"),
        (lambda b, h: (b, h, Compose(loss=UW(2))), ValueError, "Compose was made for 2 tasks, but the model has 3"),
    ],
)
def test_construction(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiTaskModel(*arguments(make_backbone(), make_heads()))


def test_unknown_gradients() -> None:
    with pytest.raises(ValueError, match=r"gradients: expected 'representation', 'parameters' or .*, got 'weights'"):
        MultiTaskModel(make_backbone(), make_heads(), gradients="weights")


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda ls: list(ls.values())[:2], ValueError, "expected 3, one for each of the tasks 'a', 'b', 'c'.*got 2"),
        (lambda ls: [*ls.values(), ls["a"]], ValueError, "expected 3, one for each of the tasks 'a', 'b', 'c'.*got 4"),
        (lambda ls: {**ls, "d": ls["a"]}, ValueError, "no task called 'd'; expected a subset of the tasks 'a', 'b'"),
        (lambda ls: {**ls, "b": ls["b"].expand(2)}, ValueError, r"task 'b': expected a scalar.* shape \(2,\)"),
        (lambda ls: {**ls, "b": ls["b"].reshape(1)}, ValueError, r"task 'b': expected a scalar.* shape \(1,\)"),
        (lambda ls: {**ls, "c": 0.5}, TypeError, "task 'c': expected a tensor, several in a list, or None, got float"),
        (lambda ls: {**ls, "c": [ls["c"], 0.5]}, TypeError, r"task 'c': expected a tensor \(or None\), got float"),
        (lambda ls: {**ls, "c": [ls["c"], ls["c"].expand(2)]}, ValueError, r"task 'c': expected a scalar.*\(2,\)"),
        (lambda ls: {**ls, "c": torch.tensor(3)}, TypeError, "task 'c': expected a floating-point tensor, got .*int64"),
        (lambda ls: torch.stack(list(ls.values()))[:2], ValueError, r"expected a tensor of shape \[3\].*got .*\(2,\)"),
        (lambda ls: ls["a"], ValueError, r"expected a tensor of shape \[3\].*got the shape \(\)"),
        (lambda ls: "a", TypeError, "expected a list, a dict by task name or a 1-D tensor, got str"),
        (lambda ls: None, TypeError, "expected a list, a dict by task name or a 1-D tensor, got NoneType"),
        (lambda ls: {k: v.detach() for k, v in ls.items()}, ValueError, "None of the losses requires grad"),
    ],
)
@pytest.mark.parametrize("balancer", ["imtl", None])
def test_losses(change: Any, error: type[Exception], message: str, balancer: str | None) -> None:
    """Every refusal leaves gradients and state as they were, and the step can be repeated."""
    model, reference, x = make_model(balancer), make_model(balancer), make_input()
    for each in (model, reference):
        each.backward(make_losses(each(make_input(9))))
    before = grads(list(model.parameters()))
    losses = make_losses(model(x))
    with pytest.raises(error, match=message):
        model.backward(change(losses))
    assert_close(grads(list(model.parameters())), before, rtol=0, atol=0)
    assert_close(model.task_weights, reference.task_weights, rtol=0, atol=0)
    model.backward(losses)
    reference.backward(make_losses(reference(x)))
    assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), rtol=0, atol=0)


def test_losses_of_different_forwards() -> None:
    model = make_model("imtl-g")
    first, second = make_losses(model(make_input(1))), make_losses(model(make_input(2)))
    with pytest.raises(ValueError, match="come from different forwards: that of task 'a' and that of task 'b'"):
        model.backward({"a": first["a"], "b": second["b"], "c": first["c"]})
    with pytest.raises(ValueError, match="come from different forwards: that of task 'a' and that of task 'c'"):
        model.backward({"a": first["a"], "c": first["c"] + second["c"]})
    model.backward(first)
    model.backward(second)


def test_losses_of_another_model() -> None:
    model, other, x = make_model("imtl-g"), make_model("imtl-g"), make_input()
    own, foreign = make_losses(model(x)), make_losses(other(x))
    with pytest.raises(ValueError, match="task 'b' was computed from the representation of another model"):
        model.backward({"a": own["a"], "b": foreign["b"]})
    with pytest.raises(ValueError, match="task 'a' was computed from the representation of another model"):
        model.backward(foreign)
    with pytest.raises(ValueError, match="No loss depends on a representation of this model"):
        model.backward({"a": torch.ones((), device=DEVICE, requires_grad=True) * 2})
    model.backward(own)
    other.backward(foreign)


def test_backward_before_forward() -> None:
    model, x = make_model("imtl"), make_input()
    plain = {task: head(model.backbone(x)).mean() for task, head in make_heads_on(model).items()}
    with pytest.raises(ValueError, match="There was no such forward yet"):
        model.backward(plain)
    with torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="There was no such forward yet"):
        model.backward(plain)
    model(x)
    with pytest.raises(ValueError, match="Were all predictions detached"):
        model.backward(plain)
    assert all(p.grad is None for p in model.parameters())


def make_heads_on(model: MultiTaskModel) -> dict[str, nn.Module]:
    return {task: model.heads[task] for task in model.tasks}


def test_a_loss_that_reads_another_head() -> None:
    model, x = make_model("imtl-g"), make_input()
    predictions = model(x)
    losses = make_losses(predictions)
    mixed = {**losses, "b": losses["b"] + (predictions["b"][:, 0] - predictions["c"][:, 0]).square().mean()}
    with pytest.raises(ValueError, match="loss of task 'b' reads the prediction of task 'c'"):
        model.backward(mixed)
    assert all(p.grad is None for p in model.parameters())
    detached = {**losses, "b": losses["b"] + (predictions["b"][:, 0] - predictions["c"][:, 0].detach()).square().mean()}
    model.backward(detached)


def test_losses_of_stacked_predictions_are_fine() -> None:
    """Predictions put into one matrix and reduced by column: connected to all heads, reading only one."""
    heads = [nn.Linear(8, 1) for _ in range(4)]
    model = MultiTaskModel(make_backbone(), heads, "imtl-g").to(DEVICE).double()
    reference = MultiTaskModel(make_backbone(), heads, "imtl-g").to(DEVICE).double()
    reference.backbone.load_state_dict(model.backbone.state_dict())
    x, target = make_input(), torch.arange(4, dtype=torch.float64, device=DEVICE)
    model.backward((torch.cat(model(x), 1) - target).square().mean(0))
    found = grads(list(model.backbone.parameters()))
    model.zero_grad()
    reference.backward([(p - t).square().mean() for p, t in zip(reference(x), target, strict=True)])
    assert_close(found, grads(list(reference.backbone.parameters())), rtol=1e-10, atol=1e-13)


def test_auxiliary_that_is_none() -> None:
    model, x = make_model("imtl-g"), make_input()
    predictions = model(x)
    with pytest.raises(TypeError, match="auxiliary: expected a tensor"):
        model.backward(make_losses(predictions), auxiliary=1.0)
    with pytest.raises(ValueError, match=r"auxiliary: expected a scalar, .* shape \(2,\)"):
        model.backward(make_losses(predictions), auxiliary=torch.ones(2, requires_grad=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_balancer_that_returns_no_scalar() -> None:
    class Wrong(LossBalancer):
        def scalarize(self, losses: Tensor, tasks: Any = None) -> Tensor:
            return losses

    model = make_model(Wrong())
    with pytest.raises(ValueError, match=r"Wrong.scalarize: expected to return a 0-dim tensor, got \(3,\)"):
        model.backward(make_losses(model(make_input())))


def test_a_representation_without_numbers() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"ids": x.long()}

    with pytest.raises(TypeError, match="representation: expected floating-point tensors, found none in a dict"):
        MultiTaskModel(Nothing(), [nn.Identity()])(make_input())


@pytest.mark.parametrize("first_is_trained", [False, True])
def test_rotations_want_the_trained_tensor_first(first_is_trained: bool) -> None:
    """The rotation of the first tensor must not learn from the gradient of another."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            both = x, self.layer(x)
            return both[::-1] if first_is_trained else both

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 1)

        def forward(self, z: tuple[Tensor, ...]) -> Tensor:
            return self.layer(z[0]) + self.layer(z[1])

    model, x = MultiTaskModel(Two(), [Both(), Both()], RotateOnly(5)).to(DEVICE), make_input(dtype=torch.float32)
    if first_is_trained:
        model.backward([prediction.square().mean() for prediction in model(x)])
    else:
        with pytest.raises(ValueError, match="RotateOnly rotates the representation's first tensor, but that one does"):
            model(x)
    with torch.no_grad():
        model(x)


def test_without_a_trained_backbone_there_are_no_weights() -> None:
    model, x = make_model("uw"), make_input()
    model.backward(make_losses(model(x)))
    assert model.task_weights is not None
    model.backbone.requires_grad_(False)
    model.backward(make_losses(model(x)))
    assert model.task_weights is None


@pytest.mark.parametrize("through", ["scalarize", "backward"])
def test_a_warning_points_at_the_line_that_called(through: str) -> None:
    model = make_model("imtl")
    optimizer = torch.optim.SGD(model.model_parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(102):
            losses = make_losses(model(make_input()))
            model.backward(losses) if through == "backward" else model.scalarize(losses).backward()
            optimizer.step()
    assert [w.filename for w in caught if "did not change" in str(w.message)] == [__file__]


def test_what_is_never_run_backward_is_forgotten() -> None:
    """Neither forwards without a total nor totals without a backward pass pile up."""
    model, x = make_model("imtl-g"), make_input()
    for _ in range(200):
        model(x)
    assert len(model._junction._origins._alive) <= 33
    total = model.scalarize(make_losses(model(x)))
    for _ in range(70):  # these end before they come to the fork
        torch.autograd.grad(total, list(model.head_parameters()), retain_graph=True)
    stations = [state() for state in model._junction._origins._alive]
    assert max(len(state._passes) for state in stations if state is not None) <= 64


def test_a_total_times_zero_leaves_finite_weights() -> None:
    model, x = make_model("imtl"), make_input()
    (0 * model.scalarize(make_losses(model(x)))).backward()
    assert model.task_weights.isfinite().all()
    assert all(not p.grad.any() for p in model.model_parameters())


# --- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_reaches_grad_and_no_state(name: str, bad: float) -> None:
    model, reference, x = make_model(BALANCERS[name]()), make_model(BALANCERS[name]()), make_input()
    model.prepare(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    predictions = model(x)
    losses = dict(make_losses(predictions))
    if name in FOLLOW_LOSSES:
        losses["b"] = losses["b"] * bad
    else:
        predictions["b"].register_hook(lambda g: g * bad)
    model.backward(losses)
    assert not all(p.grad.isfinite().all() for p in model.shared_parameters())
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    model.zero_grad()
    for each in (model, reference):
        each.backward(make_losses(each(x)))
    assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), rtol=0, atol=0)


@pytest.mark.parametrize("name", BALANCERS)
def test_a_loss_scaler_skips_a_bad_step_and_goes_on(name: str) -> None:
    """The run with a bad batch in it equals the run without."""

    def run(bad_batch: bool) -> dict[str, Tensor]:
        model = make_model(BALANCERS[name](), torch.float32)
        optimizer = torch.optim.SGD(model.param_groups(lr=0.01), lr=0.01)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=65536.0, growth_interval=100)
        for seed in range(4):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=torch.float16):
                predictions = {task: p.float() for task, p in model(make_input(seed, dtype=torch.float32)).items()}
            if seed == 2:
                if not bad_batch:
                    scaler.update(scaler.get_scale() / 2)
                    continue
                predictions["c"].register_hook(lambda g: g * torch.inf)
            scaler.scale(model.scalarize(make_losses(predictions))).backward()
            scaler.step(optimizer)
            scaler.update()
        return dict(model.state_dict())

    assert_close(run(True), run(False), rtol=1e-6, atol=1e-7)


# --- parameters that nobody trains ------------------------------------------------------------------------------------


def train(model: MultiTaskModel, parameters: Any, steps: int, accumulate: int = 1) -> None:
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for step in range(steps):
        model.backward(make_losses(model(make_input(step))))
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def plain_passes(model: MultiTaskModel, count: int) -> None:
    for _ in range(count):
        sum(make_losses(model(make_input())).values()).backward()


def test_a_balancer_that_is_never_asked_is_warned_about_once() -> None:
    model = make_model("imtl")
    with pytest.warns(UserWarning, match=r"100 backward passes .* IMTL balances nothing") as caught:
        plain_passes(model, 250)
    assert len(caught) == 1


@pytest.mark.parametrize("name", ["none", "equal", "imtl"])
def test_plain_passes_next_to_balanced_ones_or_without_a_balancer(name: str) -> None:
    """Derivatives of predictions, penalties, a sum that is meant."""
    model = make_model(BALANCERS[name]())
    if name == "imtl":
        model.backward(make_losses(model(make_input())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_passes(model, 120)


def test_a_balancer_outside_the_optimizer_is_warned_about_once() -> None:
    model = make_model("imtl")
    with pytest.warns(
        UserWarning, match=r"IMTL: loss.log_scale did not change in 100 backward passes, while"
    ) as caught:
        train(model, model.model_parameters(), 500)
    assert len([w for w in caught if "did not change" in str(w.message)]) == 1


@pytest.mark.parametrize("case", ["trained", "accumulated", "frozen", "without parameters", "evaluated"])
def test_no_warning_without_reason(case: str) -> None:
    model = make_model("imtl-g" if case == "without parameters" else "imtl")
    if case == "frozen":
        model.balancer.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "evaluated":
            model.eval()
            train(model, model.model_parameters(), 250)
        elif case == "trained" or case == "accumulated":
            train(model, model.param_groups(), 250, accumulate=1 if case == "trained" else 128)
        else:
            train(model, model.model_parameters(), 250)


def test_several_processes_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decides by itself where the model is in no DDP, not sharded, and given no group."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    model, x = make_model("imtl-g"), make_input()
    with pytest.warns(UserWarning, match="There are several processes, and IMTLG weighs gradients"):
        model.backward(make_losses(model(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.backward(make_losses(model(x)))
        apart = MultiTaskModel(nn.Linear(5, 8), make_heads(), "imtl-g", process_group=None)
        for quiet in (make_model(), make_model("uw"), apart):
            quiet.to(x).backward(make_losses(quiet(x)))


def test_a_fused_optimizer_is_not_warned_about() -> None:
    """It writes without counting versions up."""
    model = make_model("imtl", torch.float32)
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-3), fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(210):
            optimizer.zero_grad()
            model.backward(make_losses(model(make_input(step, dtype=torch.float32))))
            optimizer.step()


# --- what a first, good step must not hide ----------------------------------------------------------------------------


def test_losses_from_elsewhere_after_a_good_step() -> None:
    model, other, x = make_model("imtl-g"), make_model("imtl-g"), make_input()
    model.backward(make_losses(model(x)))
    model.zero_grad()
    predictions = model(x)
    single = {task: make_losses({task: model[task](x)})[task] for task in model.tasks}
    with pytest.raises(ValueError, match="No loss depends on a representation of this model"):
        model.backward(single)
    with pytest.raises(ValueError, match="computed from the representation of another model"):
        model.backward(make_losses(other(x)))

    def inside(*values: Tensor) -> Tensor:
        return model.scalarize(make_losses(dict(zip(model.tasks, values, strict=True))))

    with pytest.raises(ValueError, match="No loss depends on a representation of this model"):
        torch.utils.checkpoint.checkpoint(inside, *predictions.values(), use_reentrant=True).backward()


def test_a_task_that_comes_later_is_checked_then() -> None:
    model, x = make_model("imtl-g"), make_input()
    model.backward({"a": make_losses(model(x))["a"]})
    predictions = model(x)
    with pytest.raises(ValueError, match=r"task 'b' reads the prediction of task 'c'.*Are the losses in order"):
        model.backward({"a": predictions["a"].mean(), "b": predictions["c"].mean()})


@pytest.mark.parametrize("name", ["uw", "imtl"])
def test_the_mean_over_nothing_does_not_poison_the_balancer(name: str) -> None:
    """A NaN loss that sends no gradient to the network must leave the log-scales alone too."""
    model, x = make_model(BALANCERS[name]()), make_input()
    optimizer = torch.optim.Adam(model.param_groups(lr=0.01))
    predictions = model(x)
    losses = {**make_losses(predictions), "b": predictions["b"][:0].square().mean()}
    assert losses["b"].isnan()
    model.backward(losses)
    assert all(p.grad.isfinite().all() for p in model.balancer_parameters())
    optimizer.step()
    assert all(p.isfinite().all() for p in model.balancer_parameters())


def test_a_nan_in_a_vector_of_losses_is_no_reading_of_heads() -> None:
    heads = [nn.Linear(8, 1) for _ in range(3)]
    model = MultiTaskModel(make_backbone(), heads, "uw").to(DEVICE).double()
    mask = torch.tensor([[1, 0, 1]] * 6, device=DEVICE)
    squares = torch.cat(model(make_input()), 1).square() * mask
    model.backward(squares.sum(0) / mask.sum(0))


def test_auxiliary_from_another_forward_is_added_as_it_is() -> None:
    model, reference, x, y = make_model("imtl-g"), make_model("imtl-g"), make_input(1), make_input(2)
    reference.backward(make_losses(reference(x)))
    (reference(y)["a"] - 1).square().mean().backward()
    model.backward(make_losses(model(x)), auxiliary=(model(y)["a"] - 1).square().mean())
    assert_close(grads(list(model.parameters())), grads(list(reference.parameters())), rtol=1e-12, atol=1e-14)


def test_a_head_that_detaches_may_be_the_only_one_with_a_label() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 1)

        def forward(self, z: Tensor) -> Tensor:
            return self.linear(z.detach())

    model = MultiTaskModel(make_backbone(), {"task": nn.Linear(8, 1), "probe": Probe()}, "imtl-g").to(DEVICE).double()
    x = make_input()
    model.backward({task: p.square().mean() for task, p in model(x).items()})
    before = grads(list(model.shared_parameters()))
    model.backward({"probe": model(x)["probe"].square().mean()})
    assert_close(grads(list(model.shared_parameters())), before, rtol=0, atol=0)
    assert model.heads["probe"].linear.weight.grad is not None
