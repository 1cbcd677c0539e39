"""How the balancers check their options: in the same words, with the option's name and what was given."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


def is_integer(value: object) -> bool:
    """Whether it is an int; True and False are none here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is an int or a float; True and False are none here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int | None = None) -> int:
    """The value, if it is an int of at least ``least``."""
    if not is_integer(value):
        raise TypeError(f"{name}: expected an int, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}.")
    return int(value)


def positive(name: str, value: Any) -> float:
    """The value, if it is a positive finite number."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {value!r}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}.")
    return float(value)


def at_least_zero(name: str, value: Any) -> float:
    """The value, if it is a finite number of at least zero."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}.")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """The value, if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}.")
    return value


def ordered(name: str, given: Any, what: str) -> list[Any]:
    """What was given for each task, as a list; ``what`` says what was expected."""
    if isinstance(given, Mapping):
        raise TypeError(f"{name}: expected {what} in the heads' order, got a {type(given).__name__}.")
    if not isinstance(given, Iterable) or isinstance(given, str) or (isinstance(given, Tensor) and given.dim() != 1):
        raise TypeError(f"{name}: expected a sequence of {what}, one per task, got {given!r}.")
    return given.tolist() if isinstance(given, Tensor) else list(given)


def one_or_each(name: str, given: Any, what: str = "a number, or one per task") -> float | list[float]:
    """One number for all tasks, or a list with one for each; ``what`` says what was expected."""
    values = given.tolist() if isinstance(given, Tensor) else given
    several = isinstance(values, Sequence | Mapping) and not isinstance(values, str)
    listed: list[Any] = ordered(name, values, "numbers") if several else [values]
    if not listed:
        raise ValueError(f"{name}: expected one number, or one per task, got none.")
    if not all(map(is_number, listed)):
        raise TypeError(f"{name}: expected {what}, got {given!r}.")
    numbers = list(map(float, listed))
    return numbers if several else numbers[0]
