"""The README's table of trainers and features; run as a program, from the outcome of the tests.

python -m tests.trainers.table
"""

import sys
from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from string import ascii_lowercase

import pytest

from tests.trainers.matrix import IMPOSSIBLE, TRAINERS, is_possible
from tests.trainers.problem import FEATURES

Cell = tuple[str, str]


class Outcomes:
    """A plugin of pytest that notes which cells' tests passed: all of them, in every phase."""

    def __init__(self) -> None:
        self.passed: dict[Cell, bool] = defaultdict(lambda: True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if {"trainer", "feature"} <= parameters.keys():
            self.passed[parameters["trainer"], parameters["feature"]] &= report.passed
        return report


def measured() -> dict[Cell, bool]:
    """The cells that the tests have gone through, and whether they passed."""
    outcomes = Outcomes()
    tests = Path(__file__).with_name("test_matrix.py")
    with redirect_stdout(sys.stderr):
        pytest.main(["-q", "-p", "no:cacheprovider", str(tests)], plugins=[outcomes])
    return dict(outcomes.passed)


def declared() -> dict[Cell, bool]:
    """What the README claims: that all cells pass, those that are impossible by their refusal."""
    return {(trainer, feature): True for trainer in TRAINERS for feature in FEATURES}


def render(cells: Mapping[Cell, bool], device: str = "cpu") -> str:
    """The table: a check, a cross, or the letter of a footnote for a cell that is impossible on the device."""
    letters: dict[str, str] = {}
    lines = [f"| trainer | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 1) + "|"]
    for trainer in TRAINERS:
        shown = []
        for feature in FEATURES:
            mark = "✓" if cells.get((trainer, feature)) else "✗"
            if not is_possible(trainer, feature, device) and mark == "✓":
                reason = IMPOSSIBLE[trainer, feature].reason
                mark = f"({letters.setdefault(reason, ascii_lowercase[len(letters)])})"
            shown.append(mark)
        lines.append(f"| {trainer} | {' | '.join(shown)} |")
    notes = [f"({letter}) {reason}" for reason, letter in letters.items()]
    return "\n".join([*lines, "", *"\n\n".join(notes).split("\n")])


if __name__ == "__main__":
    found = measured()
    print(render(found))
    sys.exit(not all(found.values()))
