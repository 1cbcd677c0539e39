"""The methods of TorchJD as balancers."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_origin, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtlwrap.balancers.base import Balancer, GradientBalancer, LossBalancer, select
from mtlwrap.gradients import TaskGradients
from mtlwrap.processes import drawing_alike
from mtlwrap.surroundings import without_autocast

if TYPE_CHECKING:
    from torchjd.aggregation import Aggregator, Weighting
    from torchjd.scalarization import Scalarizer

Statistic = Literal["gramian", "matrix"]


class TorchJD(Balancer):
    r"""Any weighting, aggregator or scalarizer of TorchJD as a balancer: ``TorchJD(UPGrad())``.

    `TorchJD <https://torchjd.org>`_ (Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_) has some thirty methods, made for an engine of its own. Here they run in one
    ordinary backward, on the gradients with respect to the representation, and heads keep their own losses. With
    :math:`J` the gradients as rows, ``[T, n]``, what the method is decides on what it gets:

    ==============================================  =====================================  =======================
    TorchJD's                                       gets                                   becomes
    ==============================================  =====================================  =======================
    ``Weighting`` on a Gramian, and its aggregator  :math:`J J^\top`, ``[T, T]``, float64  a gradient balancer
    ``Weighting`` on a matrix, and its aggregator   :math:`J`, ``[T, n]``                  a gradient balancer
    any other ``Aggregator``                        :math:`J`, ``[T, n]``                  a gradient balancer, whose
                                                                                           ``task_weights`` are None
    ``Scalarizer``                                  the losses, ``[T]``                    a loss balancer
    ==============================================  =====================================  =======================

    An aggregator that is a weighting goes by its weighting, so that no matrix is built for one on a Gramian; hooks on
    the aggregator itself do not run then. The matrix is in the gradients' own precision, float32 at least.
    ``isinstance(TorchJD(x), GradientBalancer)`` or ``LossBalancer`` says which it is, and ``Compose`` takes it as such.

    Differences from the other balancers here:

    - Many methods synchronise with the host (they branch on values, or solve on the CPU with quadprog, cvxpy or
      scipy), and so does this class.
    - A gradient that is not finite makes every weight NaN, so that a ``GradScaler`` skips the step; the method is not
      asked and keeps its state. A scalarizer is asked, and its state put back.
    - In evaluation mode the method is asked, and its state put back, so that a validation loss leaves no trace. What
      you call yourself, ``FAMO.update``, moves it in either mode.
    - A task that takes no part is left out of what the method sees, and gets the weight 0; a mean is one over the
      others. Methods with a number for every task (``Constant``, a ``pref_vector``, ``GradDrop(leak=...)``) see a
      gradient or a loss of zero instead, which to them is the same; ``UW`` and ``IMTLL`` use the parameters of the
      others. Methods that keep state by task (what TorchJD calls ``Stateful``), and ``COSMOS``, ``PBI`` and ``STCH``
      with vectors, refuse: TorchJD would start their state afresh, or take one task for another.
    - State whose shape is the matrix's (``ExcessMTL``) refuses batches of another size, at which TorchJD would
      silently start afresh. ``mtlwrap.ExcessMTL`` takes any.
    - ``MoDoWeighting`` and ``SDMGradWeighting`` are made for :math:`J_1 J_2^\top` of two independent batches, which
      one backward does not have. They are refused, unless ``on="gramian"`` says that one batch's will do.

    The state of a method, whatever has changed in it since it was handed over, is in the ``state_dict`` as an extra
    state, and training resumes to the bit. TorchJD alone cannot load its own (it registers buffers as None). What is
    no tensor, number, string or container of these cannot be saved; a warning names it. Random methods draw from
    torch's global generator; with several processes from one that is seeded with the losses, so that all draw alike.

    ``DWA.step()`` after each epoch and ``FAMO.update(losses)`` after each step remain yours to call: the object is
    ``balancer.method``. Skip the update where a loss was not finite.

    TorchJD is an optional dependency: ``pip install 'mtlwrap[torchjd]'``. Some of its methods need more:
    ``torchjd[quadprog_projector]`` for UPGrad and DualProj, ``torchjd[cagrad]``, ``torchjd[nash_mtl]``,
    ``torchjd[fairgrad]``, or ``torchjd[full]`` for all.

    Args:
        method: the object of TorchJD. It is used itself, not a copy.
        on: what a weighting is made for, where its class does not say (one that is composed with a function by ``<<``).

    Raises:
        ImportError: TorchJD is not installed.
        TypeError: ``method`` is no weighting, aggregator or scalarizer object.
        ValueError: ``on`` does not fit the method, or is needed; the method needs two batches; in use, a task takes no
            part where the method cannot do without, or the gradients have another shape than its state.

    Shape:
        alone, as a gradient balancer, ``matrix``: ``[T, n]``, the result is ``[n]``; as a loss balancer, ``values``:
        whatever the scalarizer takes, the result is 0-dim.

    Example:
        >>> import torch
        >>> from torchjd.aggregation import MGDA
        >>> TorchJD(MGDA())(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # weights 1/5 and 4/5: the shortest vector
        tensor([0.4000, 0.8000])
    """

    method: nn.Module

    @overload
    def __new__(cls, method: "Scalarizer") -> "TorchJDLoss": ...
    @overload
    def __new__(cls, method: "Aggregator | Weighting[Any]", *, on: Statistic | None = None) -> "TorchJDGradient": ...
    def __new__(cls, method: Any, *, on: Statistic | None = None) -> "TorchJD":
        """A balancer of the kind that the method is."""
        if cls is not TorchJD:
            return super().__new__(cls)
        _, scalarization = _packages()
        _check_is_method(method)
        if not isinstance(method, scalarization.Scalarizer):
            return super().__new__(TorchJDGradient)
        if on is not None:
            raise ValueError(f"on: a Scalarizer gets the losses; expected None, got {on!r}.")
        return super().__new__(TorchJDLoss)

    def __getnewargs__(self) -> tuple[nn.Module]:
        return (self.method,)  # copies and pickles are made by way of __new__

    def _take(self, method: nn.Module) -> None:
        self.method = method
        # TorchJD's buffers come into being in use, where load_state_dict does not expect them: all go with the extra
        # state.
        for module in method.modules():
            for name, buffer in list(module._buffers.items()):
                module.register_buffer(name, buffer, persistent=False)
        self._first_parameters = [parameter.detach().clone() for parameter in method.parameters()]
        self._fresh = _fresh_state(method)
        self.num_tasks = next((size for module in method.modules() for size in _sizes(module)), None)

    def reset(self) -> None:
        """Make the method as good as new; by its own ``reset`` where it has one."""
        _restore(self.method, self._fresh)
        with torch.no_grad():
            for parameter, value in zip(self.method.parameters(), self._first_parameters, strict=True):
                parameter.copy_(value)
        _reset(self.method)

    def get_extra_state(self) -> dict[str, Any]:
        """What has changed in the method since it was handed over, without its parameters.

        As bytes, in the form of ``torch.save``: a distributed checkpoint fills the tensors that are there, and a new
        object has none yet.
        """
        changes = BytesIO()
        torch.save(_changes(self.method, self._fresh), changes)
        return {"method": type(self.method).__name__, "state": changes.getvalue()}

    def set_extra_state(self, state: Any) -> None:
        """Put the method into a saved state.

        Raises:
            ValueError: it is the state of another method.
        """
        saved, name = state["method"], type(self.method).__name__
        if saved != name:
            raise ValueError(f"TorchJD: the checkpoint holds the state of {saved}; expected one of {name}.")
        _restore(self.method, self._fresh)
        modules = dict(self.method.named_modules())
        # The next use brings it to its device.
        saved_state = torch.load(BytesIO(state["state"]), map_location="cpu", weights_only=True)
        for path, changes in saved_state.items():
            unknown = changes.keys() - _attributes(modules[path]).keys() if path in modules else set(changes)
            if unknown:
                raise ValueError(
                    f"TorchJD: the checkpoint has {sorted(unknown)} for {name}, which has none. Was it saved with "
                    "another version of torchjd, or with other options?"
                )
            for key, value in changes.items():
                _assign(modules[path], key, _decoded(value, modules[path]))
            _complete(modules[path])

    def extra_repr(self) -> str:
        """The method."""
        return repr(self.method)

    def __repr__(self) -> str:
        return f"TorchJD({self.extra_repr()})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TorchJD":
        """As for any module, but the method's state keeps its precision: half() would spoil running averages."""
        before = [
            (module, name, buffer)
            for module in self.method.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            after = module._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(after.device)
        return self


class TorchJDGradient(TorchJD, GradientBalancer):
    """A weighting or an aggregator of TorchJD; made by :class:`TorchJD`."""

    def __init__(self, method: nn.Module, *, on: Statistic | None = None) -> None:
        super().__init__()
        self.on: Statistic = _statistic(method, on)
        self._take(method)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The sum of the losses; it says early that a task is missing that the method cannot do without."""
        if tasks is not None and self.num_tasks is not None and torch.is_grad_enabled():
            self._seen_rows([task in tasks for task in range(self.num_tasks)])
        return super().scalarize(losses, tasks)

    def weigh(self, gradients: TaskGradients) -> Tensor | None:
        """The method's weights, or None where it is no weighting; see :meth:`Balancer.weigh`."""
        rows = self._seen_rows(gradients.taking_part)
        if not bool(gradients.finite):
            return torch.full_like(gradients.norms, torch.nan)
        weighting = _weighting(self.method)
        if weighting is None:
            return None
        weights = self._ask(weighting, gradients, rows)
        result = weights.new_zeros(gradients.num_tasks)
        for position, task in enumerate(range(gradients.num_tasks) if rows is None else rows):
            if gradients.taking_part[task]:
                result[task] = weights[position]
        return result

    def combine(self, gradients: TaskGradients) -> Tensor:
        """The shared gradient, ``[n]``; see :meth:`Balancer.combine`."""
        weights = self.weigh(gradients)
        if weights is not None:
            return gradients.weighted_sum(weights)
        return self._ask(self.method, gradients, self._seen_rows(gradients.taking_part))

    def extra_repr(self) -> str:
        """The method, and what it gets where its class does not say."""
        return f"{self.method!r}, on={self.on!r}" if _says(self.method) != self.on else repr(self.method)

    def _ask(self, module: nn.Module, gradients: TaskGradients, rows: list[int] | None) -> Tensor:
        """What TorchJD makes of the gradients of these tasks."""
        given = gradients.gramian if self.on == "gramian" else gradients.matrix
        given = given.to(torch.promote_types(given.dtype, torch.float32))
        if rows is not None:
            given = given[rows][:, rows] if self.on == "gramian" else given[rows]
        _settle(self.method, given)
        kept = None if self.training else _snapshot(self.method)
        with torch.no_grad(), without_autocast(given.device.type), drawing_alike(gradients.losses):
            answer = module(given)
            answer = answer.clone() if isinstance(answer, Tensor) else answer  # it may be the method's state itself
        if kept is not None:
            _restore(self.method, kept)
        expected = given.shape[1:] if module is self.method and _weighting(module) is None else given.shape[:1]
        if not isinstance(answer, Tensor) or answer.shape != expected:
            got = f"the shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"{type(module).__name__}: expected a result of shape {tuple(expected)}, got {got}. It was given "
                f"the {self.on} of the gradients, {list(given.shape)}."
            )
        return answer.detach()

    def _seen_rows(self, taking_part: Sequence[bool]) -> list[int] | None:
        """The tasks that the method gets to see; None for all of them, those that take no part with zeros."""
        absent = [task for task, present in enumerate(taking_part) if not present]
        if not absent:
            return None
        sized = [module for module in self.method.modules() if _is_sized(module)]
        if not sized:
            return [task for task, present in enumerate(taking_part) if present]
        # Zeros are known to change nothing in some parts of TorchJD, and only where no other part is among them.
        foreign = [module for module in self.method.modules() if not type(module).__module__.startswith("torchjd.")]
        minding = [module for module in sized if not isinstance(module, _indifferent_to_zeros())] + foreign
        if minding:
            raise _absence(minding[0], absent)
        return None


class TorchJDLoss(TorchJD, LossBalancer):
    """A scalarizer of TorchJD; made by :class:`TorchJD`."""

    def __init__(self, method: nn.Module, *, on: None = None) -> None:
        super().__init__()
        self._take(method)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The scalarizer's scalar; see :meth:`Balancer.scalarize`."""
        values = losses.to(torch.promote_types(losses.dtype, torch.float32))
        _settle(self.method, values)
        kept = None if self._may_learn(values) else _snapshot(self.method)
        with without_autocast(values.device.type), drawing_alike(values):
            total = self._of_all(values) if tasks is None else self._of_some(values, tasks)
        if kept is not None:
            _restore(self.method, kept)
        return total

    def _may_learn(self, values: Tensor) -> bool:
        if not any(_is_torchjd_stateful(module) and _attributes(module) for module in self.method.modules()):
            return True  # parameters learn in the backward
        return self.training and torch.is_grad_enabled() and bool(values.isfinite().all())

    def _of_all(self, values: Tensor) -> Tensor:
        total: Tensor = self.method(values)
        return total

    def _of_some(self, values: Tensor, tasks: Sequence[int]) -> Tensor:
        _, scalarization = _packages()
        if isinstance(self.method, scalarization.Constant):
            places = dict(zip(tasks, values.unbind(), strict=True))
            nothing = values.new_zeros(())
            num_tasks = len(torch.as_tensor(self.method.weights))
            return self._of_all(torch.stack([places.get(task, nothing) for task in range(num_tasks)]))
        if isinstance(self.method, scalarization.UW | scalarization.IMTLL):
            own = {name: select(parameter, tasks) for name, parameter in self.method.named_parameters()}
            total: Tensor = functional_call(self.method, own, (values,))
            return total
        if _is_sized(self.method):
            raise _absence(self.method, [task for task in range(self.num_tasks or 0) if task not in tasks])
        return self._of_all(values)


# -------------------------------------------------------------------------------------------- what a method is made for


def _packages() -> tuple[ModuleType, ModuleType]:
    """torchjd.aggregation and torchjd.scalarization, imported when first needed."""
    try:
        import torchjd.aggregation
        import torchjd.scalarization
    except ImportError as error:
        raise ImportError(f"TorchJD needs the package torchjd: pip install 'mtlwrap[torchjd]'. ({error})") from error
    return torchjd.aggregation, torchjd.scalarization


def _check_is_method(method: Any) -> None:
    aggregation, scalarization = _packages()
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


def _weighting(method: nn.Module) -> nn.Module | None:
    """The weighting that the method is, or goes by."""
    aggregation, _ = _packages()
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


def _says(method: nn.Module) -> Statistic | None:
    """What the class of a method says that it is made for."""
    aggregation, _ = _packages()
    weighting = _weighting(method)
    if weighting is None:
        return "matrix"
    return "gramian" if isinstance(method, aggregation.GramianWeightedAggregator) else _of_weighting(weighting)


def _of_weighting(weighting: nn.Module) -> Statistic | None:
    import torchjd.linalg

    aggregation, _ = _packages()
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
    aggregation, _ = _packages()
    return isinstance(weighting, aggregation.MoDoWeighting | aggregation.SDMGradWeighting)


def _statistic(method: nn.Module, on: Statistic | None) -> Statistic:
    """What the method is to be given."""
    name = type(method).__name__
    if on not in (None, *get_args(Statistic)):
        raise ValueError(f"on: expected 'gramian', 'matrix' or None, got {on!r}.")
    says = _says(method)
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


# ---------------------------------------------------------------------------------------------- tasks that take no part


def _indifferent_to_zeros() -> tuple[type, ...]:
    """Parts with a number for every task, to which a gradient of zero is the same as none."""
    aggregation, _ = _packages()
    return (
        aggregation.AlignedMTLWeighting,
        aggregation.ConFIG,
        aggregation.Constant,
        aggregation.ConstantWeighting,
        aggregation.DualProjWeighting,
        aggregation.GradDrop,
        aggregation.UPGradWeighting,
    )


def _is_sized(module: nn.Module) -> bool:
    """Whether a part has numbers that belong to single tasks."""
    own = [*module.parameters(recurse=False), *_attributes(module).values()]
    return _is_torchjd_stateful(module) or any(isinstance(value, Tensor) for value in own)


def _absence(module: nn.Module, absent: Sequence[int]) -> ValueError:
    which = f"tasks {list(absent)} take" if len(absent) > 1 else "".join(f"task {task} takes" for task in absent)
    return ValueError(
        f"{which or 'a task takes'} no part in this step, but {type(module).__name__} keeps something for "
        "every task that cannot be used for some of them. Give every task a loss in every batch, or choose another "
        "method."
    )


def _sizes(module: nn.Module) -> Iterator[int]:
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


# ----------------------------------------------------------------------------------------------------- a method's state

# By the path of each part, by attribute.
_State = dict[str, dict[str, Any]]
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_KEY = "_state_key"
_NASH = "_init_optim_problem"


def _is_torchjd_stateful(module: nn.Module) -> bool:
    import torchjd

    return isinstance(module, torchjd.Stateful)


def _reset(method: nn.Module) -> None:
    for module in method.modules():
        if _is_torchjd_stateful(module):
            module.reset()  # type: ignore[operator]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A part's own buffers, those that are None too, and what it keeps in plain attributes."""
    plain = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return {**plain, **module._buffers}


def _assign(module: nn.Module, name: str, value: Any) -> None:
    """Set a buffer or a plain attribute, past properties and checks."""
    (module._buffers if name in module._buffers else vars(module))[name] = value


def _snapshot(method: nn.Module) -> _State:
    return {
        path: {name: _mapped(value, lambda tensor: tensor.detach().clone()) for name, value in _attributes(m).items()}
        for path, m in method.named_modules()
    }


def _restore(method: nn.Module, state: _State) -> None:
    modules = dict(method.named_modules())
    for path, attributes in state.items():
        if path in modules:
            for late in _attributes(modules[path]).keys() - attributes.keys():
                delattr(modules[path], late)
            for name, value in attributes.items():
                _assign(modules[path], name, _mapped(value, torch.clone))


def _fresh_state(method: nn.Module) -> _State:
    """The state after a reset, or as it is where there is no reset; the method stays as it was."""
    used, parameters = _snapshot(method), [parameter.detach().clone() for parameter in method.parameters()]
    _reset(method)
    fresh = _snapshot(method)
    _restore(method, used)
    with torch.no_grad():
        for parameter, value in zip(method.parameters(), parameters, strict=True):
            parameter.copy_(value)
    return fresh


def _settle(method: nn.Module, given: Tensor) -> None:
    """Bring what the method keeps to the device and precision of what it is given.

    Options that are tensors do not come along when a model is moved, and some states remember their device and
    precision and start afresh on another.
    """
    for module in method.modules():
        device, attributes = given.device, _attributes(module)
        if _KEY in attributes:
            key = attributes[_KEY] if isinstance(attributes[_KEY], tuple) else (attributes[_KEY],)
            _check_size(module, tuple(part for part in key if isinstance(part, int)), given)
            if not any(isinstance(part, torch.dtype) for part in key):
                continue  # it looks after this itself
            if not any(isinstance(part, torch.device) for part in key):
                device = torch.device("cpu")  # where TorchJD keeps it
            _assign(module, _KEY, tuple(_renewed(part, device, given.dtype) for part in key))
            attributes = dict(module._buffers)
        for name, value in attributes.items():
            _assign(module, name, _mapped(value, partial(_like, device=device, dtype=given.dtype)))


def _renewed(part: Any, device: torch.device, dtype: torch.dtype) -> Any:
    return dtype if isinstance(part, torch.dtype) else device if isinstance(part, torch.device) else part


def _like(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _check_size(module: nn.Module, sizes: tuple[int, ...], given: Tensor) -> None:
    if sizes != tuple(given.shape[: len(sizes)]):
        raise ValueError(
            f"{type(module).__name__} of torchjd holds the state of gradients of shape {sizes}, got "
            f"{tuple(given.shape)[: len(sizes)]}: it would silently start afresh. Keep the size of the batch (drop "
            "the last, smaller one), use a balancer of mtlwrap, or call reset()."
        )


def _complete(module: nn.Module) -> None:
    """Make what NashMTL makes in its first step only, from what was restored."""
    make = getattr(module, _NASH, None)
    if make is not None and getattr(module, "step", False):
        make()


def _changes(method: nn.Module, fresh: _State) -> _State:
    """What differs from the fresh state, as plain data."""
    changes: _State = {}
    for path, module in method.named_modules():
        for name, value in _attributes(module).items():
            known = fresh.get(path, {})
            if name in known and _same(value, known[name]):
                continue
            try:
                changes.setdefault(path, {})[name] = _encoded(value)
            except TypeError:
                if not hasattr(module, _NASH):  # whose solver is made again by _complete
                    _warn_unsaved(module, name, value)
    return {path: entries for path, entries in changes.items() if entries}


def _warn_unsaved(module: nn.Module, name: str, value: Any) -> None:
    warnings.warn(
        f"TorchJD: {type(module).__name__}.{name} has changed and is not in the state_dict, for a "
        f"{type(value).__name__} cannot be saved as plain data. Training will not resume exactly.",
        UserWarning,
        stacklevel=2,
    )


# ----------------------------------------------------------------------------------------------------------- plain data


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same with ``fn`` applied to the tensors in it; containers and arrays are copied, all else is shared."""
    if isinstance(value, Tensor):
        return fn(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(entry, fn) for entry in value)
    if type(value) is dict:
        return {key: _mapped(entry, fn) for key, entry in value.items()}
    return value.copy() if _is_array(value) else value


def _same(one: Any, other: Any) -> bool:
    """Whether nothing but the device or the precision of tensors has changed."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.is_meta or other.is_meta or one.shape != other.shape:
            return one.shape == other.shape
        mine, others = one.detach().cpu(), other.detach().cpu()
        return torch.equal(mine, others.to(mine.dtype)) or torch.equal(mine.to(others.dtype), others)
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if _is_array(one):
        return one.shape == other.shape and bool((one == other).all())
    return isinstance(one, _PLAIN) and bool(one == other)


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_ARRAY, _OPTIMIZER = "numpy.ndarray", "torch.optim.Adam"


def _encoded(value: Any) -> Any:
    """As data that ``torch.load(weights_only=True)`` reads.

    Raises:
        TypeError: it is none.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(_encoded(entry) for entry in value)
    if type(value) is dict:
        return {key: _encoded(entry) for key, entry in value.items()}
    if _is_array(value):
        return {_ARRAY: torch.as_tensor(value.copy())}
    if type(value) is torch.optim.Adam:
        return {_OPTIMIZER: value.state_dict()}
    raise TypeError(f"{type(value).__name__} is no plain data.")


def _decoded(value: Any, module: nn.Module) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(_decoded(entry, module) for entry in value)
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {_ARRAY}:
        return value[_ARRAY].numpy().copy()
    if value.keys() == {_OPTIMIZER}:
        optimizer = torch.optim.Adam(module.parameters(recurse=False))
        optimizer.load_state_dict(value[_OPTIMIZER])
        return optimizer
    return {key: _decoded(entry, module) for key, entry in value.items()}
