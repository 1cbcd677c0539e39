"""The README's table of balancers and features is what trying them gives."""

from pathlib import Path

import pytest

from mtlwrap import balancers
from tests import features

README = Path(__file__).parents[1] / "README.md"
ABSTRACT = {"Balancer", "GradientBalancer", "LossBalancer", "Compose"}


@pytest.mark.filterwarnings("ignore")
def test_the_table_is_what_trying_gives():
    assert features.render() in README.read_text(encoding="utf-8")


def test_every_balancer_has_a_row():
    named = " ".join(features.ROWS)
    assert [name for name in balancers.__all__ if name not in ABSTRACT and f"`{name}`" not in named] == []
