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
        ("excess-mtl", "ExcessMTL"),
        ("grad-norm", "GradNorm"),
    ],
)
def test_spellings(name, kind):
    assert type(by_name(name)).__name__ == kind


@pytest.mark.parametrize("name", ["nash", "", "balancer", "LossBalancer", "gradient-balancer", "by_name", "imtl g"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match="balancer: no balancer is called") as error:
        by_name(name)
    assert repr(name) in str(error.value)
    by_their_names, as_objects = str(error.value).split("made as objects:")
    for known in METHODS:
        if known in OPTIONS:
            assert f" {known}(...)" in as_objects
        else:
            assert f" {known}" in by_their_names
    assert "TorchJD(UPGrad())" in as_objects
    for listed in by_their_names.split("there are ")[1].split(". ")[0].split(", "):
        assert by_name(listed)


def test_every_balancer_is_exported():
    assert set(METHODS) >= {"EqualWeighting", "FixedWeights", "UW", "IMTL", "ExcessMTL", "RotoGrad", "GradNorm"}
    for name in METHODS:
        assert name in mtlwrap.__all__
        assert getattr(mtlwrap, name) is getattr(balancers, name)
        assert issubclass(getattr(balancers, name), Balancer)
