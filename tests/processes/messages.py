"""What processes send each other."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Recorder:
    """Notes what is sent, by anyone in this process, through torch.distributed."""

    NAMES = ("all_reduce", "all_gather_object", "new_group", "broadcast", "all_gather_into_tensor", "barrier")

    def __enter__(self) -> list[tuple[Any, ...]]:
        self.sent: list[tuple[Any, ...]] = []
        self.kept = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self.kept.items():
            setattr(dist, name, self._noting(name, function))
        return self.sent

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)

    def _noting(self, name: str, function: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else None
            self.sent.append((name, tuple(first.shape)) if isinstance(first, Tensor) else (name,))
            return function(*args, **kwargs)

        return noting
