"""What follows from the numbers of a problem, in plain words; the words are chosen by the numbers alone."""

import pandas as pd

from example.study.methods import BASELINES, EQUAL, FIXED, SINGLE
from example.study.summary import difference

# A difference counts if it is larger than so many of its standard errors ...
ERRORS = 2.0
# ... but with five seeds the best of fourteen balancers exceeds two errors by chance about every other time. Beyond
# five it does in one case of twenty (Student's t with 4 degrees of freedom, one side, 0.05 / 14).
SURE = 5.0

AGAINST = {EQUAL: "equal weights", FIXED: "tuned fixed weights", SINGLE: "a network per task"}


def beats(changes: pd.DataFrame, method: str, other: str, errors: float = ERRORS) -> bool:
    """Whether a method's Δm is larger by more than so many standard errors."""
    mean, error = difference(changes, method, other)
    return mean > errors * error


def verdict(changes: pd.DataFrame) -> list[str]:
    """Sentences.

    Args:
        changes: of :func:`~example.study.summary.changes`, with the three baselines.
    """
    balancers = [method for method in changes.index if method not in BASELINES]
    sentences = []
    for other, name in AGAINST.items():
        better = [method for method in balancers if beats(changes, method, other)]
        worse = [method for method in balancers if beats(changes, other, method)]
        sentences.append(f"Better than {name}: {listed(changes, better, other)}.")
        sentences.append(f"Worse than {name}: {listed(changes, worse, other)}.")
    sentences.append(f"Fixed weights against equal ones: {signed(changes, FIXED, EQUAL)}.")
    sentences.append(conclusion(changes, balancers))
    return sentences


def conclusion(changes: pd.DataFrame, balancers: list[str]) -> str:
    """Whether to balance: what counts is the better of equal and tuned fixed weights."""
    means = changes.mean(axis="columns")
    plain = str(means[[EQUAL, FIXED]].idxmax())
    sure = [method for method in balancers if beats(changes, method, plain, SURE)]
    hints = [method for method in balancers if beats(changes, method, plain)]
    best = str(means[sure or hints or balancers].idxmax())
    apart = signed(changes, best, plain)
    if sure:
        return f"Balancing helps here: {best} is the best, {apart} against {AGAINST[plain]}."
    if hints:
        return f"Balancing may help here, or it is chance: {best}, {apart} against {AGAINST[plain]}."
    return f"Balancing does not help here: {AGAINST[plain]} do as well as the best balancer, {best} ({apart})."


def listed(changes: pd.DataFrame, methods: list[str], other: str) -> str:
    """Methods with their differences, the largest first, or that there are none."""
    ordered = sorted(methods, key=lambda method: -abs(difference(changes, method, other)[0]))
    return ", ".join(f"{method} ({signed(changes, method, other)})" for method in ordered) or "none"


def signed(changes: pd.DataFrame, method: str, other: str) -> str:
    """A difference in Δm and its standard error."""
    mean, error = difference(changes, method, other)
    return f"{mean:+.1f} ± {error:.1f}"
