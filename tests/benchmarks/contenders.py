"""Who is timed: a plain sum, every balancer of mtlwrap, and the other libraries.

Each makes, for a problem, a function that runs one training step, from the batch to the gradients, in the way in which
its library is meant to be used. All of them share the problem's own modules.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mtlwrap import Balancer, MultiTaskModel, Parameters, balancers
from tests.benchmarks.problems import Problem


class CannotRunError(Exception):
    """A contender cannot run on this problem, for the reason given."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Runner:
    """A contender, made for a problem.

    Attributes:
        step: forward, losses and backward.
        parameters: what the step leaves gradients in.
        forget: drops what else the step left behind, so that each one begins with the same memory in use.
        steps: how many steps are timed as one, where they are not alike.
    """

    step: Callable[[], None]
    parameters: tuple[nn.Parameter, ...]
    forget: Callable[[], None] = _nothing
    steps: int = 1

    def clear(self) -> None:
        """As if no step had been run."""
        self.forget()
        for parameter in self.parameters:
            parameter.grad = None


Make = Callable[[Problem], Runner]


@dataclass(frozen=True)
class Contender:
    """One who is timed.

    Attributes:
        name: the row.
        make: prepares it for a problem, or raises :class:`CannotRunError`.
        most_tasks: the largest number of tasks that it is run with, None for any.
        ours: whether it is a balancer of mtlwrap.
    """

    name: str
    make: Make
    most_tasks: int | None = None
    ours: bool = False

    def prepare(self, problem: Problem) -> Runner:
        if self.most_tasks is not None and problem.num_tasks > self.most_tasks:
            raise CannotRunError(f"too slow, not run with more than {self.most_tasks} tasks")
        return self.make(problem)


def _parameters(*modules: nn.Module) -> tuple[nn.Parameter, ...]:
    return tuple(dict.fromkeys(p for module in modules for p in module.parameters()))


# ----------------------------------------------------------------------------------------------------------- plain


def _plain(problem: Problem) -> Runner:
    def step() -> None:
        z = problem.backbone(problem.inputs)
        sum(problem.losses([head(z) for head in problem.heads])).backward()

    return Runner(step, _parameters(problem.backbone, *problem.heads))


# --------------------------------------------------------------------------------------------------------- mtlwrap

# No methods: what the methods derive from, the container of two, and the adapter of many.
_NO_METHODS = {"Balancer", "Compose", "GradientBalancer", "LossBalancer", "TorchJD"}
# Values for the options that have no default, by the option's name.
_REQUIRED: dict[str, Callable[[Problem], object]] = {
    "alpha": lambda problem: 1.5,
    "steps_per_epoch": lambda problem: 100,
    "rotation_shape": lambda problem: problem.rotation.size,
    "weights": lambda problem: [1.0] * problem.num_tasks,
}
# Values for options that have one, but not one that fits every problem.
_FITTED: dict[str, Callable[[Problem], object]] = {
    "post_shape": lambda problem: problem.rotation.behind,
    # As its documentation advises for maps and tokens: one feature per channel, not one per place.
    "feature_dim": lambda problem: -1 - len(problem.rotation.behind),
}
# Options that change a method's path.
_VARIANTS = {"IMTLG": {"nonneg": True}}


def methods() -> list[str]:
    """The balancers that can be used as they are, by class name."""
    classes = {name: getattr(balancers, name) for name in balancers.__all__ if name not in _NO_METHODS}
    return [
        name
        for name, value in classes.items()
        if inspect.isclass(value) and issubclass(value, Balancer) and not inspect.isabstract(value)
    ]


def _mtlwrap(
    method: str,
    problem: Problem,
    gradients: str | Parameters = "representation",
    weigh_heads: bool = False,
    steps: int = 1,
    **options: object,
) -> Runner:
    balancer_class = getattr(balancers, method)
    balancer = balancer_class(**_options(balancer_class, problem), **options)
    model = MultiTaskModel(problem.backbone, problem.heads, balancer, gradients=gradients, weigh_heads=weigh_heads)

    def step() -> None:
        model.backward(problem.losses(model(problem.inputs)))

    return Runner(step, _parameters(model), steps=steps)


def _options(balancer_class: type[Balancer], problem: Problem) -> dict[str, object]:
    options = {}
    for name, parameter in inspect.signature(balancer_class).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        if required and name not in _REQUIRED:
            raise CannotRunError(f"the benchmark has no value for its option {name}")
        if required or name in _FITTED:
            options[name] = (_REQUIRED if required else _FITTED)[name](problem)
    return options


def _ours() -> Iterator[Contender]:
    for method in methods():
        yield Contender(method, partial(_mtlwrap, method), ours=True)
        for option, value in _VARIANTS.get(method, {}).items():
            yield Contender(f"{method}-{option}", partial(_mtlwrap, method, **{option: value}), ours=True)
    # Other ways to take the gradients, on the balancer that torchjd has too.
    yield Contender("IMTLG-parameters", partial(_mtlwrap, "IMTLG", gradients="parameters"), ours=True)
    every_tenth = partial(_mtlwrap, "IMTLG", gradients=Parameters(refresh_every=10), steps=10)
    yield Contender("IMTLG-parameters/10", every_tenth, ours=True)
    yield Contender("IMTLG-weigh-heads", partial(_mtlwrap, "IMTLG", weigh_heads=True), ours=True)


# --------------------------------------------------------------------------------------------------------- torchjd


@contextmanager
def _installed() -> Iterator[None]:
    """A library that is not there only costs its own rows."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CannotRunError(f"{error.name} is not installed") from None


def _torchjd(problem: Problem, *, lean: bool) -> Runner:
    """IMTL-G on the gradients of the backbone's parameters, one per task.

    As it comes, ``mtl_backward`` goes back through the backbone with all tasks at once. If lean, with one after
    the other, and without a second copy of the Jacobian, which takes less memory and on some devices less time.
    """
    with _installed():
        from torchjd.aggregation import IMTLG
        from torchjd.autojac import jac_to_grad, mtl_backward
    aggregator = IMTLG()
    shared = list(problem.backbone.parameters())
    own = [list(head.parameters()) for head in problem.heads]

    def step() -> None:
        z = problem.backbone(problem.inputs)
        losses = problem.losses([head(z) for head in problem.heads])
        chunk = 1 if lean else None
        mtl_backward(losses, features=z, tasks_params=own, shared_params=shared, parallel_chunk_size=chunk)
        jac_to_grad(shared, aggregator, optimize_gramian_computation=lean)

    return Runner(step, _parameters(problem.backbone, *problem.heads))


# -------------------------------------------------------------------------------------------------------- rotograd


def _vanilla(problem: Problem) -> Runner:
    with _installed():
        from rotograd import VanillaMTL
    model = VanillaMTL(problem.backbone, list(problem.heads))

    def step() -> None:
        model.backward(problem.losses(model(problem.inputs)))

    return Runner(step, _parameters(problem.backbone, *problem.heads), partial(_forget, model, ("grads",)))


def _rotograd(problem: Problem) -> Runner:
    with _installed():
        from rotograd import RotoGrad, cached
    rotation = problem.rotation
    with torch.device(problem.device):
        # It puts its rotations before the heads in the list that it is given.
        model = RotoGrad(problem.backbone, list(problem.heads), rotation.size, post_shape=rotation.behind)
    model.train()

    def step() -> None:
        with cached():  # else each rotation is computed anew for every task
            model.backward(problem.losses(model(problem.inputs)))

    parameters = _parameters(problem.backbone, *problem.heads, model)
    return Runner(step, parameters, partial(_forget, model, ("grads", "original_grads")))


def _forget(model: nn.Module, lists: Iterable[str]) -> None:
    """These models hold the representation and its gradients until the next step."""
    model.rep = None
    for name in lists:
        setattr(model, name, [None] * len(getattr(model, name)))


def contenders() -> list[Contender]:
    """All of them, the plain sum first."""
    return [
        Contender("plain", _plain),
        *_ours(),
        Contender("torchjd:IMTLG", partial(_torchjd, lean=False)),
        Contender("torchjd:IMTLG-lean", partial(_torchjd, lean=True)),
        Contender("rotograd:VanillaMTL", _vanilla),
        Contender("rotograd:RotoGrad", _rotograd, most_tasks=128),
    ]
