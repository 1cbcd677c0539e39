"""The scope of one training step: what lives in it, and when it is freed."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class _Releasable(Protocol):
    def release(self) -> None: ...


class Scope:
    """Holds, weakly, whatever must be freed when the step ends."""

    def __init__(self) -> None:
        self.is_open = True
        self.users = 0
        self._members: weakref.WeakSet[_Releasable] = weakref.WeakSet()

    def add(self, member: _Releasable) -> None:
        """Have ``member`` released when the scope closes."""
        self._members.add(member)

    def close(self) -> None:
        """Release what is still alive."""
        self.is_open = False
        for member in list(self._members):
            member.release()


# A context variable and not a global: each thread, and each asyncio task, is in a step of its own.
_current: ContextVar[Scope | None] = ContextVar("mtlwrap_step", default=None)


def current_scope() -> Scope | None:
    """The open scope that the running code is in, or None outside :func:`cached`."""
    scope = _current.get()
    # An asyncio task inherits the scope it was started in, which may have ended since.
    return scope if scope is not None and scope.is_open else None


@contextmanager
def cached() -> Iterator[None]:
    """The scope of one training step: what the step derives is computed once, can be asked about, then freed.

    Inside it, once a balanced backward has run, ``model.task_gradients`` is a
    :class:`~mtlwrap.TaskGradients` that answers questions about the step at no further backward: the norms of the
    tasks' gradients, the cosines between them, what another balancer would have weighed. On leaving, also by an
    exception, the gradients are freed; a ``TaskGradients`` that was kept refuses to answer from then on.

    With several processes norms, Gramian and cosines that the balancer asked for are those of all processes, the rest
    are those of the gradients in this one: nobody sends messages to answer a question.

    Outside of it training is the same to the bit; the gradients are freed as the backward pass ends.

    Scopes nest: an inner one joins the outer one, and the last to leave frees. Each thread has a step of its own. The
    scope that counts is the one around the *forward*; the backward may run on any thread. It can also be used as
    a decorator, ``@cached()``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mtlwrap import IMTLG, MultiTaskModel, cached
        >>> model = MultiTaskModel(nn.Linear(3, 4), [nn.Linear(4, 1), nn.Linear(4, 2)], balancer="uw")
        >>> with cached():
        ...     first, second = model(torch.randn(8, 3))
        ...     model.backward([first.square().mean(), second.abs().mean()])
        ...     cosines = model.task_gradients.cosines
        ...     other = IMTLG().weigh(model.task_gradients)
        >>> cosines.shape, other.shape
        (torch.Size([2, 2]), torch.Size([2]))
        >>> model.task_gradients is None
        True
    """
    scope = current_scope() or Scope()
    scope.users += 1
    token = _current.set(scope)
    try:
        yield
    finally:
        _current.reset(token)
        scope.users -= 1
        if scope.users == 0:  # interleaved generators may leave in another order than they came
            scope.close()
