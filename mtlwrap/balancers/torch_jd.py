"""The methods of TorchJD as balancers."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtlwrap.balancers.base import Balancer, GradientBalancer, LossBalancer, select
from mtlwrap.gradients import TaskGradients
from mtlwrap.plain_data import decoded, same
from mtlwrap.processes import drawing_alike
from mtlwrap.state import Undo
from mtlwrap.surroundings import without_autocast
from mtlwrap.torch_jd_methods import (
    Statistic,
    absence,
    check_is_method,
    indifferent_to_zeros,
    is_sized,
    made_for,
    packages,
    sizes_of,
    statistic_for,
    weighting_of,
)
from mtlwrap.torch_jd_state import (
    State,
    assign,
    attributes_of,
    changes_since,
    complete,
    fresh_state,
    is_stateful,
    reset_parts,
    restore,
    settle,
    snapshot,
)

if TYPE_CHECKING:
    from torchjd.aggregation import Aggregator, Weighting
    from torchjd.scalarization import Scalarizer


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
        _, scalarization = packages()
        check_is_method(method)
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
        self._fresh = fresh_state(method)
        self.num_tasks = next((size for module in method.modules() for size in sizes_of(module)), None)

    def reset(self) -> None:
        """Make the method as good as new; by its own ``reset`` where it has one."""
        restore(self.method, self._fresh)
        with torch.no_grad():
            for parameter, value in zip(self.method.parameters(), self._first_parameters, strict=True):
                parameter.copy_(value)
        reset_parts(self.method)

    def get_extra_state(self) -> dict[str, Any]:
        """What has changed in the method since it was handed over, without its parameters.

        As bytes, in the form of ``torch.save``: a distributed checkpoint fills the tensors that are there, and a new
        object has none yet.
        """
        changes = BytesIO()
        torch.save(changes_since(self.method, self._fresh), changes)
        return {"method": type(self.method).__name__, "state": changes.getvalue()}

    def set_extra_state(self, state: Any) -> None:
        """Put the method into a saved state.

        Raises:
            ValueError: it is the state of another method.
        """
        saved, name = state["method"], type(self.method).__name__
        if saved != name:
            raise ValueError(f"TorchJD: the checkpoint holds the state of {saved}; expected one of {name}.")
        restore(self.method, self._fresh)
        modules = dict(self.method.named_modules())
        # The next use brings it to its device.
        saved_state = torch.load(BytesIO(state["state"]), map_location="cpu", weights_only=True)
        for path, changes in saved_state.items():
            unknown = changes.keys() - attributes_of(modules[path]).keys() if path in modules else set(changes)
            if unknown:
                raise ValueError(
                    f"TorchJD: the checkpoint has {sorted(unknown)} for {name}, which has none. Was it saved with "
                    "another version of torchjd, or with other options?"
                )
            for key, value in changes.items():
                assign(modules[path], key, decoded(value, modules[path]))
            complete(modules[path])

    @property
    def keeps_state(self) -> bool:
        """Whether anything but parameters moves, which learn in the backward."""
        return any(is_stateful(module) and attributes_of(module) for module in self.method.modules())

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
        self.on: Statistic = statistic_for(method, on)
        self._take(method)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The sum of the losses; it says early that a task is missing that the method cannot do without."""
        if tasks is not None and self.num_tasks is not None and torch.is_grad_enabled():
            self._seen_rows([task in tasks for task in range(self.num_tasks)])
        return super().scalarize(losses, tasks)

    def undo_scalarize(self) -> Undo | None:
        """None: the losses are looked at, and nothing is kept."""
        return None

    def undo_weigh(self) -> Undo | None:
        """The method's state, if it keeps something."""
        return _Snapshot(self.method) if self.keeps_state else None

    def weigh(self, gradients: TaskGradients) -> Tensor | None:
        """The method's weights, or None where it is no weighting; see :meth:`Balancer.weigh`."""
        rows = self._seen_rows(gradients.taking_part)
        if not bool(gradients.finite):
            return torch.full_like(gradients.norms, torch.nan)
        weighting = weighting_of(self.method)
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
        return f"{self.method!r}, on={self.on!r}" if made_for(self.method) != self.on else repr(self.method)

    def _ask(self, module: nn.Module, gradients: TaskGradients, rows: list[int] | None) -> Tensor:
        """What TorchJD makes of the gradients of these tasks."""
        given = gradients.gramian if self.on == "gramian" else gradients.matrix
        given = given.to(torch.promote_types(given.dtype, torch.float32))
        if rows is not None:
            given = given[rows][:, rows] if self.on == "gramian" else given[rows]
        settle(self.method, given)
        kept = None if self.training else snapshot(self.method)
        with torch.no_grad(), without_autocast(given.device.type), drawing_alike(gradients.losses):
            answer = module(given)
            answer = answer.clone() if isinstance(answer, Tensor) else answer  # it may be the method's state itself
        if kept is not None:
            restore(self.method, kept)
        expected = given.shape[1:] if module is self.method and weighting_of(module) is None else given.shape[:1]
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
        sized = [module for module in self.method.modules() if is_sized(module)]
        if not sized:
            return [task for task, present in enumerate(taking_part) if present]
        # Zeros are known to change nothing in some parts of TorchJD, and only where no other part is among them.
        foreign = [module for module in self.method.modules() if not type(module).__module__.startswith("torchjd.")]
        minding = [module for module in sized if not isinstance(module, indifferent_to_zeros())] + foreign
        if minding:
            raise absence(minding[0], absent)
        return None


class TorchJDLoss(TorchJD, LossBalancer):
    """A scalarizer of TorchJD; made by :class:`TorchJD`."""

    def __init__(self, method: nn.Module, *, on: None = None) -> None:
        super().__init__()
        self._take(method)

    def undo_scalarize(self) -> Undo | None:
        """The scalarizer's state, if it keeps something."""
        return _Snapshot(self.method) if self.keeps_state else None

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The scalarizer's scalar; see :meth:`Balancer.scalarize`."""
        values = losses.to(torch.promote_types(losses.dtype, torch.float32))
        settle(self.method, values)
        kept = None if self._may_learn(values) else snapshot(self.method)
        with without_autocast(values.device.type), drawing_alike(values):
            total = self._of_all(values) if tasks is None else self._of_some(values, tasks)
        if kept is not None:
            restore(self.method, kept)
        return total

    def _may_learn(self, values: Tensor) -> bool:
        if not self.keeps_state:
            return True
        return self.training and torch.is_grad_enabled() and bool(values.isfinite().all())

    def _of_all(self, values: Tensor) -> Tensor:
        total: Tensor = self.method(values)
        return total

    def _of_some(self, values: Tensor, tasks: Sequence[int]) -> Tensor:
        _, scalarization = packages()
        if isinstance(self.method, scalarization.Constant):
            places = dict(zip(tasks, values.unbind(), strict=True))
            nothing = values.new_zeros(())
            num_tasks = len(torch.as_tensor(self.method.weights))
            return self._of_all(torch.stack([places.get(task, nothing) for task in range(num_tasks)]))
        if isinstance(self.method, scalarization.UW | scalarization.IMTLL):
            own = {name: select(parameter, tasks) for name, parameter in self.method.named_parameters()}
            total: Tensor = functional_call(self.method, own, (values,))
            return total
        if is_sized(self.method):
            raise absence(self.method, [task for task in range(self.num_tasks or 0) if task not in tasks])
        return self._of_all(values)


class _Snapshot(Undo):
    """The state of a method; a part of it is no tensor, so that the host waits for the word."""

    def __init__(self, method: nn.Module) -> None:
        self._method = method
        self._before = snapshot(method)
        self._after: State | None = None

    def settle(self) -> None:
        """Note what the method has come to; what others make of that later is theirs."""
        self._after = snapshot(self._method) if self._after is None else self._after

    def __call__(self, spoiled: Tensor, *_: object) -> None:
        if bool(spoiled) and same(snapshot(self._method), self._after):
            restore(self._method, self._before)
