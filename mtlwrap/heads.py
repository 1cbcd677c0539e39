"""The container of the heads: registered normally, indexed as given, any name allowed."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn


class Heads(nn.Module):
    """The heads of a model, by position or by task name, in the order in which they were given.

    ``nn.ModuleDict`` refuses names such as ``"type"`` or ``"a.b"``. Here they are quoted where torch needs a plain
    attribute name, in the keys of the ``state_dict``: ``%`` before a name that is taken, ``%2E`` for a dot. All
    other names stand there as they are.

    Args:
        heads: modules in a sequence, or in a mapping by task name. The container itself is not kept.

    Raises:
        TypeError: ``heads`` is neither, a name is no string, or a head is no module.
        ValueError: there is no head, or a name is empty.
    """

    def __init__(self, heads: Sequence[nn.Module] | Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.named = isinstance(heads, Mapping | nn.ModuleDict)
        self._keys: dict[str, str] = {}
        for name, head in _checked(heads):
            if not isinstance(head, nn.Module):
                raise TypeError(
                    f"heads: the head of task {name!r} is a {type(head).__name__}; expected a torch.nn.Module."
                )
            self._keys[name] = key = self._quoted(name)
            self.add_module(key, head)
        if not self._keys:
            raise ValueError("heads: expected at least one head, got none.")
        self._tasks = tuple(self._keys)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names; for a sequence ``"0"``, ``"1"``, ..."""
        return self._tasks

    def position(self, task: int | str) -> int:
        """The position of a task given by name, or by position, from the end if negative.

        Raises:
            TypeError: ``task`` is neither.
            ValueError: there is no such task.
        """
        if isinstance(task, str):
            if task not in self._keys:
                raise ValueError(f"There is no task called {task!r}; the tasks are {', '.join(map(repr, self.tasks))}.")
            return self.tasks.index(task)
        if isinstance(task, bool) or not hasattr(task, "__index__"):
            raise TypeError(f"task: expected a name or a position, got {type(task).__name__}.")
        task = operator.index(task)  # numpy's integers too
        if not -len(self) <= task < len(self):
            raise ValueError(f"There is no task at position {task}; there are {len(self)} tasks.")
        return task % len(self)

    def __getitem__(self, task: int | str) -> nn.Module:
        return self._modules[self._keys[self.tasks[self.position(task)]]]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Any]:
        """Over the names if the heads were given by name, else over the heads."""
        return iter(self.tasks) if self.named else (self[name] for name in self.tasks)

    def keys(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.tasks

    def values(self) -> list[nn.Module]:
        """The heads, in the tasks' order."""
        return [self[task] for task in self.tasks]

    def items(self) -> list[tuple[str, nn.Module]]:
        """The names and the heads."""
        return [(task, self[task]) for task in self.tasks]

    def _quoted(self, name: str) -> str:
        quoted = name.replace("%", "%25").replace(".", "%2E")
        return f"%{quoted}" if hasattr(self, quoted) else quoted


def _checked(heads: Any) -> list[tuple[str, Any]]:
    if isinstance(heads, Mapping | nn.ModuleDict):
        for name in heads:
            if not isinstance(name, str):
                raise TypeError(f"heads: expected task names to be strings, got {name!r}, a {type(name).__name__}.")
            if not name:
                raise ValueError("heads: expected task names that are not empty, got ''.")
        return list(heads.items())
    if isinstance(heads, list | tuple | nn.ModuleList):
        return [(str(position), head) for position, head in enumerate(heads)]
    raise TypeError(f"heads: expected a sequence of modules or a mapping by task name, got {type(heads).__name__}.")
