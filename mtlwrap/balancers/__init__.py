"""The balancers: one method, one file. What stands in ``__all__`` here the package exports."""

from mtlwrap.balancers.base import Balancer, GradientBalancer, LossBalancer, needs_options
from mtlwrap.balancers.compose import Compose
from mtlwrap.balancers.dwa import DWA
from mtlwrap.balancers.equal import EqualWeighting
from mtlwrap.balancers.excess_mtl import ExcessMTL
from mtlwrap.balancers.famo import FAMO
from mtlwrap.balancers.fixed import FixedWeights
from mtlwrap.balancers.gls import GLS
from mtlwrap.balancers.grad_norm import GradNorm
from mtlwrap.balancers.imtl import IMTL
from mtlwrap.balancers.imtl_g import IMTLG
from mtlwrap.balancers.imtl_l import IMTLL
from mtlwrap.balancers.rlw import RLW
from mtlwrap.balancers.rotate_only import RotateOnly
from mtlwrap.balancers.roto_grad import RotoGrad
from mtlwrap.balancers.roto_grad_norm import RotoGradNorm
from mtlwrap.balancers.torch_jd import TorchJD
from mtlwrap.balancers.uw import UW

__all__ = [
    "DWA",
    "FAMO",
    "GLS",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "RLW",
    "UW",
    "Balancer",
    "Compose",
    "EqualWeighting",
    "ExcessMTL",
    "FixedWeights",
    "GradNorm",
    "GradientBalancer",
    "LossBalancer",
    "RotateOnly",
    "RotoGrad",
    "RotoGradNorm",
    "TorchJD",
]

_ABSTRACT = (Balancer, Compose, GradientBalancer, LossBalancer)
_METHODS: list[type[Balancer]] = [globals()[name] for name in __all__ if globals()[name] not in _ABSTRACT]
# What tables and options like to call them.
_SHORT: dict[str, type[Balancer]] = {"equal": EqualWeighting, "fixed": FixedWeights}


def by_name(name: str) -> Balancer:
    """A balancer with its default options, by its class name in any case; ``-`` and ``_`` do not count.

    Raises:
        ValueError: there is none of that name, or it has options without a default.

    Example:
        >>> by_name("imtl-g")
        IMTLG()
    """
    known: dict[str, type[Balancer]] = {_plain(kind.__name__): kind for kind in _METHODS} | _SHORT
    method = known.get(_plain(name))
    if method is None:
        simple = ", ".join(kind.__name__ for kind in _METHODS if not needs_options(kind))
        others = ", ".join(f"{kind.__name__}(...)" for kind in _METHODS if needs_options(kind) and kind is not TorchJD)
        raise ValueError(
            f"balancer: no balancer is called {name!r}; by name there are {simple}. Those with options that have no "
            f"default are made as objects: {others}; so are TorchJD's: TorchJD(UPGrad())."
        )
    try:
        return method()
    except TypeError as error:
        raise ValueError(f"balancer: {method.__name__} needs options; make it and pass the object. ({error})") from None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
