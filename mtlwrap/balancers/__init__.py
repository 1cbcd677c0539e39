"""The balancers: one method, one file."""

from mtlwrap.balancers.base import Balancer, GradientBalancer, LossBalancer
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
    "by_name",
]

_METHODS: dict[str, type[Balancer]] = {
    name.lower(): globals()[name]
    for name in __all__
    if name not in ("Balancer", "Compose", "GradientBalancer", "LossBalancer", "by_name")
}

# What tables and options like to call them.
_SHORT = {"equal": "equalweighting", "fixed": "fixedweights"}


def by_name(name: str) -> Balancer:
    """A balancer with its default options, by its class name in any case; ``-`` and ``_`` do not count.

    Raises:
        ValueError: there is none of that name, or it has options without a default.

    Example:
        >>> by_name("imtl-g")
        IMTLG()
    """
    plain = name.lower().replace("-", "").replace("_", "")
    method = _METHODS.get(_SHORT.get(plain, plain))
    if method is None:
        raise ValueError(f"balancer: no balancer is called {name!r}; known are {', '.join(sorted(_METHODS))}.")
    try:
        return method()
    except TypeError as error:
        raise ValueError(f"balancer: {method.__name__} needs options; make it and pass the object. ({error})") from None
