"""The fork itself, for models that are not one backbone with heads."""

import weakref
from typing import Any

import torch
from torch import Tensor

from mtlwrap.balancers.base import Balancer, check_is_balancer
from mtlwrap.checks import is_integer
from mtlwrap.gradients import TaskGradients
from mtlwrap.junction import Junction
from mtlwrap.losses import Losses
from mtlwrap.processes import Peers
from mtlwrap.surroundings import opaque


class Fork:
    """One passage through a fork that stands on its own; :func:`fork` makes it.

    Attributes:
        aliases: the representation, once for each task.
    """

    def __init__(self, representation: Any, balancer: Balancer, junction: Junction) -> None:
        self._junction = junction
        self._balancer = balancer
        if torch.is_grad_enabled():
            junction.meet()
        self.aliases: list[Any] = list(junction.fork(representation, balancer, range(len(junction.tasks))))

    def scalarize(self, losses: Losses, auxiliary: Tensor | None = None) -> Tensor:
        """The scalar, 0-dim, whose ``backward()`` is a balanced step; as :meth:`MultiTaskModel.scalarize`."""
        return self._junction.scalarize(losses, self._balancer, auxiliary)

    @property
    def task_weights(self) -> Tensor | None:
        """The factors of the raw gradients in the last balanced backward, ``[T]``; None before there was one."""
        return self._junction.report.weights

    @property
    def task_gradients(self) -> TaskGradients | None:
        """The gradients of the last balanced backward, inside :func:`~mtlwrap.cached`; else None."""
        return self._junction.report.gradients


# One junction for all forks of a balancer: it outlives the single step, as that of a model does.
_junctions: "weakref.WeakKeyDictionary[Balancer, Junction]" = weakref.WeakKeyDictionary()


@opaque
def fork(representation: Any, balancer: Balancer, num_tasks: int, *, process_group: Any = "auto") -> Fork:
    """The fork itself, for a model that is not one backbone with heads (MMoE, MTAN, cross-stitch).

    Call it in each forward, where the shared part ends: ``aliases[t]`` is the representation for task t. The gradients
    that come back through the aliases are balanced in the backward of ``scalarize(losses)``, and only there.

    With several processes it does not see the predictions, so it cannot run backward through what has no loss. Where
    tasks are absent in some of them, use ``DistributedDataParallel(find_unused_parameters=True)`` and run only the
    parts that have a loss; every process needs one loss at least.

    Args:
        representation: what the tasks share; a tensor, or tensors in any container that :class:`MultiTaskModel` takes.
        balancer: the same object in every step. Make it for ``num_tasks`` tasks, and put its parameters into your
            optimizer.
        num_tasks: the number of tasks.
        process_group: as for :class:`MultiTaskModel`; that of the first call counts. ``"auto"`` finds a
            ``DistributedDataParallel`` whose forward this is called in, and no ``fully_shard``: give a group there.

    Raises:
        TypeError: ``balancer`` is no balancer, or the representation holds no floating-point tensor; ``process_group``
            is no group.
        ValueError: ``num_tasks`` is not positive, or not the number that the balancer was made for.

    Example:
        >>> import torch
        >>> from mtlwrap import IMTL, fork
        >>> experts = [torch.nn.Linear(4, 8) for _ in range(3)]
        >>> gates = [torch.nn.Linear(4, 3) for _ in range(2)]
        >>> balancer = IMTL(2)
        >>> x = torch.randn(16, 4)
        >>> shared = fork([expert(x) for expert in experts], balancer, 2)
        >>> mixed = [
        ...     sum(share * e for share, e in zip(gate(x).softmax(1).T.unsqueeze(2), own))
        ...     for gate, own in zip(gates, shared.aliases)
        ... ]
        >>> shared.scalarize([m.square().mean() for m in mixed]).backward()
        >>> shared.task_weights.shape
        torch.Size([2])
    """
    check_is_balancer(balancer, "a balancer of mtlwrap")
    if not is_integer(num_tasks) or num_tasks < 1:
        raise ValueError(f"num_tasks: expected a positive int, got {num_tasks!r}.")
    known = _junctions.get(balancer)
    made_for = balancer.num_tasks if known is None else len(known.tasks)
    if made_for is not None and made_for != num_tasks:
        raise ValueError(f"num_tasks: {type(balancer).__name__} was made for {made_for} tasks, got {num_tasks}.")
    if known is None:
        known = Junction([str(task) for task in range(num_tasks)], peers=Peers(process_group))
        _junctions[balancer] = known
    return Fork(representation, balancer, known)
