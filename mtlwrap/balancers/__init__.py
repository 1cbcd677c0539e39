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

# What can be made without options, by the names that are shown; and other names for these.
_METHODS: dict[str, type[Balancer]] = {
    "equal": EqualWeighting,
    "excess-mtl": ExcessMTL,
    "famo": FAMO,
    "gls": GLS,
    "grad-norm": GradNorm,
    "imtl": IMTL,
    "imtl-g": IMTLG,
    "imtl-l": IMTLL,
    "rlw": RLW,
    "uw": UW,
}
_OF_OPTIONS: tuple[type[Balancer], ...] = (DWA, FixedWeights, RotateOnly, RotoGrad, RotoGradNorm)
_OTHER_NAMES: dict[str, type[Balancer]] = {"equal-weighting": EqualWeighting, "fixed": FixedWeights, "torchjd": TorchJD}


def by_name(name: str) -> Balancer:
    """A balancer with its default options, by its class name in any case; ``-`` and ``_`` do not count.

    Raises:
        ValueError: there is none of that name, or it has options without a default.

    Example:
        >>> by_name("imtl-g")
        IMTLG()
    """
    known = {_plain(key): kind for key, kind in (_METHODS | _OTHER_NAMES).items()}
    known |= {_plain(kind.__name__): kind for kind in _OF_OPTIONS}
    method = known.get(_plain(name))
    if method is None:
        objects = ", ".join(f"{kind.__name__}(...)" for kind in _OF_OPTIONS)
        raise ValueError(
            f"balancer: no balancer is called {name!r}; by name there are {', '.join(_METHODS)}. Those with options "
            f"that have no default are made as objects: {objects}; so are TorchJD's: TorchJD(UPGrad())."
        )
    try:
        return method()
    except TypeError as error:
        raise ValueError(f"balancer: {method.__name__} needs options; make it and pass the object. ({error})") from None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
