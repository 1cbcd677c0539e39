"""Balancers by name, and what the package exports."""

import pytest

import mtlwrap
from mtlwrap import balancers
from mtlwrap.balancers import Balancer, by_name
from tests.common import METHODS, OPTIONS


def _spelled(name: str) -> list[str]:
    return [name, name.lower(), name.upper(), "-".join(name), f"_{name}_"]


@pytest.mark.parametrize("name", METHODS)
def test_every_balancer_goes_by_its_name(name):
    kind = getattr(balancers, name)
    for spelling in _spelled(name):
        if name in OPTIONS:
            with pytest.raises(ValueError, match=f"balancer: {name} needs options; make it and pass the object"):
                by_name(spelling)
        else:
            assert type(by_name(spelling)) is kind
            assert by_name(spelling) is not by_name(spelling)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("equal", "EqualWeighting"),
        ("imtl-g", "IMTLG"),
        ("imtl_l", "IMTLL"),
        ("IMTL", "IMTL"),
        ("Uw", "UW"),
        ("equal-weighting", "EqualWeighting"),
    ],
)
def test_spellings(name, kind):
    assert type(by_name(name)).__name__ == kind


@pytest.mark.parametrize("name", ["nash", "", "balancer", "LossBalancer", "gradient-balancer", "by_name", "imtl g"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match="balancer: no balancer is called") as error:
        by_name(name)
    assert repr(name) in str(error.value)
    for known in METHODS:
        assert known.lower() in str(error.value)


def test_every_balancer_is_exported():
    assert len(METHODS) >= 6
    for name in METHODS:
        assert name in mtlwrap.__all__
        assert getattr(mtlwrap, name) is getattr(balancers, name)
        assert issubclass(getattr(balancers, name), Balancer)
