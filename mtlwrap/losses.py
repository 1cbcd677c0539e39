"""What a user hands over as losses, put in order and checked."""

from collections.abc import Mapping, Sequence

from torch import Tensor

# One loss, several that are added up, or none.
Loss = Tensor | Sequence[Tensor | None] | None
Losses = Tensor | Sequence[Loss] | Mapping[str, Loss]


def collect(losses: Losses, tasks: Sequence[str]) -> list[Tensor | None]:
    """One entry per task, in the tasks' order: its loss, or None if it takes no part.

    Raises:
        TypeError: ``losses`` is no list, mapping or tensor, or a loss is no floating-point tensor.
        ValueError: number or names do not fit the tasks, or a loss is not 0-dim.
    """
    if isinstance(losses, Mapping):
        given: list[Loss] = _by_name(losses, tasks)
    elif isinstance(losses, Tensor):
        if losses.dim() != 1 or losses.shape[0] != len(tasks):
            raise ValueError(
                f"losses: expected a tensor of shape [{len(tasks)}], one loss for each of the tasks "
                f"{_listed(tasks)}, got the shape {tuple(losses.shape)}."
            )
        given = list(losses.unbind())
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        if len(losses) != len(tasks):
            raise ValueError(
                f"losses: expected {len(tasks)}, one for each of the tasks {_listed(tasks)} (None for a task that "
                f"takes no part), got {len(losses)}."
            )
        given = list(losses)
    else:
        raise TypeError(f"losses: expected a list, a dict by task name or a 1-D tensor, got {type(losses).__name__}.")
    return [_single(loss, f"The loss of task {task!r}") for task, loss in zip(tasks, given, strict=True)]


def checked_auxiliary(auxiliary: Tensor | None) -> Tensor | None:
    """The auxiliary loss, if it is one.

    Raises:
        TypeError: it is no floating-point tensor.
        ValueError: it is not 0-dim.
    """
    if auxiliary is not None:
        _check(auxiliary, "auxiliary")
    return auxiliary


def _single(loss: Loss, what: str) -> Tensor | None:
    """The loss of a task, of several their sum."""
    if loss is None or isinstance(loss, Tensor):
        if loss is not None:
            _check(loss, what)
        return loss
    if not isinstance(loss, list | tuple):
        raise TypeError(f"{what}: expected a tensor, several in a list, or None, got {type(loss).__name__}.")
    present = [part for part in loss if part is not None]
    for part in present:
        _check(part, what)
    return sum(present[1:], start=present[0]) if present else None


def _by_name(losses: Mapping[str, Loss], tasks: Sequence[str]) -> list[Loss]:
    unknown = [name for name in losses if name not in tasks]
    if unknown:
        raise ValueError(
            f"losses: there is no task called {_listed(unknown)}; expected a subset of the tasks {_listed(tasks)}."
        )
    return [losses.get(task) for task in tasks]


def _check(loss: Tensor, what: str) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{what}: expected a tensor (or None), got {type(loss).__name__}.")
    if not loss.is_floating_point():
        raise TypeError(f"{what}: expected a floating-point tensor, got {loss.dtype}.")
    if loss.dim() != 0:
        raise ValueError(
            f"{what}: expected a scalar, a 0-dim tensor, got the shape {tuple(loss.shape)}. Reduce it, with .mean() "
            "for example."
        )


def _listed(names: Sequence[object]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown}, ... ({len(names)} in all)"
