"""No waiting for the device in forward, scalarize or backward: whatever is left is stated here, to the number."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchjd import aggregation

from mtlwrap import IMTLG, UW, Balancer, MultiTaskModel, Parameters, TorchJD, cached
from mtlwrap.balancers import base
from tests.common import BALANCERS, DEVICE, TASKS, make_backbone, make_heads, make_input, make_losses
from tests.waiting import waits

# Of a device without values: whoever reads one gets an error.
META = torch.device("meta")
ROTATING = ("rotate-only", "rotograd", "rotograd-norm")
WHERE = [DEVICE, META]


def make(balancer: Balancer | None, device: torch.device = DEVICE, **options: Any) -> MultiTaskModel:
    torch.manual_seed(1)
    return MultiTaskModel(make_backbone(), make_heads(), balancer, **options).to(device)


def batch(seed: int, device: torch.device = DEVICE, rows: int = 6) -> Tensor:
    return make_input(seed, rows, torch.float32).to(device)


def losses_of(model: MultiTaskModel, x: Tensor, present: str = "abc") -> dict[str, Tensor | None]:
    losses = make_losses(model(x))
    return {task: losses[task] if task in present else None for task in TASKS}


def batches(number: int, device: torch.device) -> list[Tensor]:
    return [batch(seed, device) for seed in range(number)]


def counted(steps: Any) -> list[dict[str, int]]:
    """What each step waits for."""
    found = []
    for step in steps:
        with waits() as waited:
            step()
        found.append(dict(waited))
    return found


# ----------------------------------------------------------------------------------------------------- the counting


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (lambda x: x.sum().item(), {"item": 1, "_local_scalar_dense": 1}),
        (lambda x: bool(x.any()), {"__bool__": 1, "is_nonzero": 1, "_local_scalar_dense": 1}),
        (lambda x: x.tolist(), {"tolist": 1}),
        (lambda x: x.nonzero(), {"nonzero": 1}),
        (lambda x: x[x > 0], {"index by a mask": 1}),
        (lambda x: x.masked_select(x > 0), {"masked_select": 1}),
        (lambda x: torch.equal(x, x), {"equal": 1}),
        (lambda x: x[[0, 1]], {"__getitem__ with a list": 1}),
        (lambda x: torch.tensor([1.0], device=x.device), {"tensor": 1}),
        (lambda x: torch.linalg.inv(torch.eye(2, device=x.device)), {"_linalg_check_errors": 1}),
        (lambda x: x.to(META), {"copy between devices": 1}),
        (lambda x: (x * 2).sum() + 1, {}),
    ],
)
def test_the_counting_counts(what: Callable[[Tensor], object], found: dict[str, int]) -> None:
    x = torch.ones(3, device=DEVICE)
    with waits() as waited:
        what(x)
    seen = dict(waited)
    if "__bool__" in found:  # as many operators as the release has
        seen.pop("is_nonzero", None)
        found = {key: number for key, number in found.items() if key != "is_nonzero"}
    assert seen == found


def test_the_counting_sees_the_backward_pass() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: gradient if gradient.sum().item() else None)
    with waits() as waited:
        y.sum().backward()
    assert waited == {"item": 1, "_local_scalar_dense": 1}


# -------------------------------------------------------------------------------------------------------- every step


@pytest.mark.parametrize("device", WHERE, ids=str)
@pytest.mark.parametrize("name", BALANCERS)
def test_a_training_waits_for_nothing(name: str, device: torch.device) -> None:
    """Beyond the burn-in, with absent tasks, under a loss scale that is a tensor, inside and outside of cached()."""
    base._constant.cache_clear()
    model, data = make(BALANCERS[name](), device), batches(7, device)
    scale = torch.full((), 1024.0, device=device)

    def step(number: int) -> None:
        present = ("abc", "ac", "b")[number % 3]
        (scale * model.scalarize(losses_of(model, data[number], present)) / 2).backward()

    def asks(number: int) -> None:
        with cached():
            step(number)
            seen = model.task_gradients
            _ = seen.norms, seen.cosines, seen.gramian, seen.finite, seen.active, seen.losses, seen.matrix
            _ = seen.weighted_sum(model.task_weights), IMTLG().weigh(seen), seen.loss_factors, seen.batch_sums()

    # Options of a balancer are copied to the device in its first step, whichever tasks that has.
    options = {"fixed": {"tensor": 1}, "uw-likelihoods": {"tensor": 2}}.get(name, {})
    assert counted([lambda: step(1)]) == [options]
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-6))
    for number in range(6):
        assert counted([lambda n=number: (asks if n % 2 else step)(n)]) == [{}], number
        optimizer.step()
        optimizer.zero_grad()
    with waits() as waited, torch.no_grad():
        model.eval().scalarize(losses_of(model, data[6]))
        _ = model.task_weights
    assert waited == {}


@pytest.mark.parametrize("device", WHERE, ids=str)
@pytest.mark.parametrize("name", BALANCERS)
def test_neither_does_one_in_float16(name: str, device: torch.device) -> None:
    """Where all gradients are looked at in the end, also on top of others."""
    model, data = make(BALANCERS[name](), device).half(), batches(4, device)

    def step(number: int) -> None:
        losses = make_losses(model(data[number].half()))
        model.backward({task: loss.float() for task, loss in losses.items() if task in ("abc", "ac")[number % 2]})

    step(0)
    assert counted([lambda n=n: step(n) for n in (1, 2)]) == [{}] * 2
    model.zero_grad()
    assert counted([lambda: step(3)]) == [{}]


@pytest.mark.parametrize("name", BALANCERS)
def test_neither_do_decisions_ahead_of_the_heads(name: str) -> None:
    """weigh_heads, batches of their own per task, an auxiliary loss that reads predictions."""
    weighed, apart = make(BALANCERS[name](), weigh_heads=True), make(BALANCERS[name]())
    data, few = batches(4, DEVICE), batch(9, rows=4)

    def step(number: int) -> None:
        weighed.backward(losses_of(weighed, data[number], "abc" if number % 2 else "bc"))
        first, second = apart(data[number], tasks="a"), apart(few, tasks=["b", "c"])
        auxiliary = (second["b"].sum(1) - second["c"].sum(1)).square().mean()
        apart.backward(make_losses({**first, **second}), auxiliary=auxiliary)

    step(0)
    assert counted([lambda n=n: step(n) for n in range(1, 4)]) == [{}] * 3


@pytest.mark.parametrize("name", [name for name in BALANCERS if name not in ROTATING])
def test_neither_do_gradients_on_the_parameters(name: str) -> None:
    model, data = make(BALANCERS[name](), gradients="parameters"), batches(4, DEVICE)

    def step(number: int) -> None:
        model.backward(losses_of(model, data[number], "abc" if number % 2 else "bc"))

    step(0)
    assert counted([lambda n=n: step(n) for n in range(1, 4)]) == [{}] * 3


# ---------------------------------------------------------------------------------------------------- what is left


def test_stacked_losses_are_checked_in_the_first_step() -> None:
    """Each loss is connected to every head: one number is read for each other head, T (T - 1) in all, and then none."""
    model = MultiTaskModel(make_backbone(), [nn.Linear(8, 1) for _ in range(4)], IMTLG()).to(DEVICE)

    def step(present: tuple[int, ...]) -> None:
        losses = torch.cat(model(batch(0)), 1).square().mean(0).unbind()
        model.backward([loss if task in present else None for task, loss in enumerate(losses)])

    found = counted([lambda p=p: step(p) for p in ((0, 1, 2), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3))])
    assert [steps.get("__bool__", 0) for steps in found] == [9, 0, 3, 0]
    assert found[1] == found[3] == {}


@pytest.mark.parametrize("trained", [False, True])
def test_what_seems_not_to_learn_is_compared_once(trained: bool) -> None:
    """In the 101st pass, and only if nothing has counted a parameter's version up."""
    model = make(UW())
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-6) if trained else model.model_parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        model.backward(losses_of(model, batch(0)))

    found = []
    with pytest.warns(UserWarning, match="did not change") if not trained else torch.enable_grad():
        for _ in range(103):
            found += counted([step])
            optimizer.step()
    assert {number: waited for number, waited in enumerate(found) if waited} == ({} if trained else {100: {"equal": 1}})


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_a_schedule_reads_one_flag_after_each_weighing(refresh_every: int) -> None:
    """And what it starts from, in its first step and when it was loaded."""
    model = make(IMTLG(), gradients=Parameters(refresh_every=refresh_every))

    def step() -> None:
        model.backward(losses_of(model, batch(0)))

    read = {"__bool__": 1, "_local_scalar_dense": 1}
    start = {"__int__": 1, "_local_scalar_dense": 1, "tolist": 1}
    found = counted([step] * 8)
    assert found == ([{}] * 8 if refresh_every == 1 else [start, read, {}, {}, read, {}, {}, read])
    if refresh_every == 3:
        model.load_state_dict(model.state_dict())
        assert counted([step] * 2)[0] == start


@pytest.mark.parametrize("name", ["Mean", "Sum", "IMTLG", "PCGrad", "MGDA", "AlignedMTL", "UPGrad", "TrimmedMean"])
def test_the_adapter_of_torchjd_reads_one_flag_beside_the_method(name: str) -> None:
    """Whether all gradients are finite; twice where there are no weights. The method itself waits as often as alone."""

    def method() -> Any:
        return getattr(aggregation, name)(*((1,) if name == "TrimmedMean" else ()))

    try:
        model, alone = make(TorchJD(method())), method()
    except ImportError as error:
        pytest.skip(str(error))
    model.backward(losses_of(model, batch(0)))
    weighting = None if name == "TrimmedMean" else getattr(alone, "gramian_weighting", alone.weighting)
    with cached():
        total = model.scalarize(losses_of(model, batch(1)))
        torch.manual_seed(0)
        with waits() as waited:
            total.backward()
        gradients = model.task_gradients
        given = gradients.matrix if model.balancer.on == "matrix" else gradients.gramian
    torch.manual_seed(0)
    with waits() as expected:
        (weighting or alone)(given)
    flags = 2 if weighting is None else 1
    assert waited == expected + Counter({"__bool__": flags, "_local_scalar_dense": flags})


# ---------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("name", BALANCERS)
def test_state_stays_where_it_is(name: str) -> None:
    """A CUDA graph reads and writes at the addresses of its capture."""
    model = make(BALANCERS[name]())
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-3))
    addresses = []
    for number in range(5):
        optimizer.zero_grad()
        model.backward(losses_of(model, batch(number)))
        optimizer.step()
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        addresses.append({key: tensor.data_ptr() for key, tensor in state.items()})
    assert addresses == addresses[:1] * 5


# ------------------------------------------------------------------------------------------------------------- a GPU

on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: MTLWRAP_TEST_DEVICE=cuda")


@on_a_gpu
@pytest.mark.parametrize("how", ["plain", "float16", "weigh_heads", "parameters"])
@pytest.mark.parametrize("name", BALANCERS)
def test_cuda_sees_no_synchronisation(name: str, how: str) -> None:
    if how == "parameters" and name in ROTATING:
        pytest.skip("what rotates works on the representation")
    options = {"weigh_heads": {"weigh_heads": True}, "parameters": {"gradients": "parameters"}}.get(how, {})
    model = make(BALANCERS[name](), **options)
    data = batches(6, DEVICE)
    scale = torch.full((), 1024.0, device=DEVICE)
    for x in data[:2]:
        model.backward(losses_of(model, x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, x in enumerate(data):
            with torch.autocast("cuda", dtype=torch.float16, enabled=how == "float16"):
                total = model.scalarize(losses_of(model, x, "abc" if number % 2 else "bc"))
            (scale * total).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("name", BALANCERS)
def test_a_whole_step_in_a_cuda_graph(name: str) -> None:
    """Forward, scalarize, backward and optimizer, captured once and replayed: the same training."""
    trained = {}
    for captured in (False, True):
        model = make(BALANCERS[name]())
        optimizer = torch.optim.SGD(model.param_groups(lr=1e-3))
        x = batch(0).clone()

        def step(model: MultiTaskModel = model, optimizer: Any = optimizer, x: Tensor = x) -> None:
            optimizer.zero_grad(set_to_none=True)
            model.backward(losses_of(model, x))
            optimizer.step()

        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for number in range(3):
                x.copy_(batch(number))
                step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for number in range(3, 8):
            x.copy_(batch(number))
            graph.replay() if captured else step()
        torch.cuda.synchronize()
        trained[captured] = {**model.state_dict(), "task_weights": model.task_weights.clone()}
    assert_close(trained[True], trained[False], rtol=1e-5, atol=1e-6)
