"""What a method of TorchJD is made for, and what it keeps for every task."""

import inspect
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Literal, cast, get_args, get_origin

from torch import Tensor, nn

from mtlwrap.balancers.base import Balancer
from mtlwrap.torch_jd_state import attributes_of, is_stateful

Statistic = Literal["gramian", "matrix"]


def packages() -> tuple[ModuleType, ModuleType]:
    """torchjd.aggregation and torchjd.scalarization, imported when first needed."""
    try:
        import torchjd.aggregation
        import torchjd.scalarization
    except ImportError as error:
        raise ImportError(f"TorchJD needs the package torchjd: pip install 'mtlwrap[torchjd]'. ({error})") from error
    return torchjd.aggregation, torchjd.scalarization


def check_is_method(method: Any) -> None:
    """Refuse what is no method of TorchJD.

    Raises:
        TypeError: it is none.
    """
    aggregation, scalarization = packages()
    if isinstance(method, aggregation.Aggregator | aggregation.Weighting | scalarization.Scalarizer):
        return
    if isinstance(method, Balancer):
        got = f"{type(method).__name__}, which is a balancer of mtlwrap already"
    elif inspect.isclass(method):
        got = f"the class {method.__name__}; make an object of it"
    elif inspect.isroutine(method):
        got = f"the function {method.__name__}; its work is done by the backward of the model here"
    else:
        got = type(method).__name__
    raise TypeError(f"method: expected a Weighting, Aggregator or Scalarizer object of torchjd, got {got}.")


def weighting_of(method: nn.Module) -> nn.Module | None:
    """The weighting that the method is, or goes by."""
    aggregation, _ = packages()
    if isinstance(method, aggregation.Weighting):
        return cast("nn.Module", method)
    # One that holds a weighting for something else (ConFIG), or combines in its own way, is no weighting.
    base = aggregation.WeightedAggregator
    if isinstance(method, base) and all(
        getattr(type(method), name, None) is getattr(base, name, None) for name in ("forward", "_combine")
    ):
        gramian = isinstance(method, aggregation.GramianWeightedAggregator)
        return cast("nn.Module", method.gramian_weighting if gramian else method.weighting)
    return None


def made_for(method: nn.Module) -> Statistic | None:
    """What the class of a method says that it is made for."""
    aggregation, _ = packages()
    weighting = weighting_of(method)
    if weighting is None:
        return "matrix"
    return "gramian" if isinstance(method, aggregation.GramianWeightedAggregator) else _of_weighting(weighting)


def _of_weighting(weighting: nn.Module) -> Statistic | None:
    import torchjd.linalg

    aggregation, _ = packages()
    for base in type(weighting).__mro__:
        for generic in vars(base).get("__orig_bases__", ()):
            if get_origin(generic) is aggregation.Weighting:
                (kind,) = get_args(generic)
                if kind is torchjd.linalg.PSDMatrix:
                    return "gramian"
                if kind is torchjd.linalg.Matrix:
                    return None if _wants_two_batches(weighting) else "matrix"
    inner = getattr(weighting, "weighting", None)
    # A wrapper of another weighting wants what that wants, unless a function stands between them.
    return _of_weighting(inner) if isinstance(inner, aggregation.Weighting) and not hasattr(weighting, "fn") else None


def _wants_two_batches(weighting: nn.Module) -> bool:
    aggregation, _ = packages()
    return isinstance(weighting, aggregation.MoDoWeighting | aggregation.SDMGradWeighting)


def statistic_for(method: nn.Module, on: Statistic | None) -> Statistic:
    """What the method is to be given."""
    name = type(method).__name__
    if on not in (None, *get_args(Statistic)):
        raise ValueError(f"on: expected 'gramian', 'matrix' or None, got {on!r}.")
    says = made_for(method)
    if on is not None and says not in (None, on):
        raise ValueError(f"on: {name} is made for the {says}, got {on!r}.")
    two = [type(module).__name__ for module in method.modules() if _wants_two_batches(module)]
    if on is None and says is None and two:
        raise ValueError(
            f"{two[0]} is made for the product of the gradients of two independent batches, and one backward has "
            f"only one. To give it the Gramian of one batch all the same: TorchJD({name}(...), on='gramian')."
        )
    if on is None and says is None:
        raise ValueError(
            f"{name} does not say what it is made for; expected on='gramian' for the inner products of the gradients, "
            "[T, T], or on='matrix' for the gradients themselves, [T, n]."
        )
    if two and on == "matrix":
        raise ValueError(f"on: {two[0]} takes a matrix of shape [T, T]; expected 'gramian', got 'matrix'.")
    return on or says or "matrix"


def indifferent_to_zeros() -> tuple[type, ...]:
    """Parts with a number for every task, to which a gradient of zero is the same as none."""
    aggregation, _ = packages()
    return (
        aggregation.AlignedMTLWeighting,
        aggregation.ConFIG,
        aggregation.Constant,
        aggregation.ConstantWeighting,
        aggregation.DualProjWeighting,
        aggregation.GradDrop,
        aggregation.UPGradWeighting,
    )


def is_sized(module: nn.Module) -> bool:
    """Whether a part has numbers that belong to single tasks."""
    own = [*module.parameters(recurse=False), *attributes_of(module).values()]
    return is_stateful(module) or any(isinstance(value, Tensor) for value in own)


def absence(module: nn.Module, absent: Sequence[int]) -> ValueError:
    """The error of a part that needs the tasks which take no part."""
    which = f"tasks {list(absent)} take" if len(absent) > 1 else "".join(f"task {task} takes" for task in absent)
    return ValueError(
        f"{which or 'a task takes'} no part in this step, but {type(module).__name__} keeps something for "
        "every task that cannot be used for some of them. Give every task a loss in every batch, or choose another "
        "method."
    )


def sizes_of(module: nn.Module) -> Iterator[int]:
    """For how many tasks a part was made, where it says so."""
    for name in ("weights", "reference", "pref_vector", "leak", "_initial_weights", "log_var", "log_scale", "_w"):
        value = getattr(module, name, None)
        if isinstance(value, Tensor) and value.dim() == 1:
            yield len(value)
    tau = getattr(module, "tau", None)
    if isinstance(tau, Tensor):
        yield len(tau) + 1  # one for each but the first
    num_tasks = getattr(module, "n_tasks", None)
    if isinstance(num_tasks, int):
        yield num_tasks
