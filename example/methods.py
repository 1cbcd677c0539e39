"""What is compared: ten ways to balance one network for all tasks, and a network for each task alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from example.training import TASKS, WIDTH
from mtlwrap import IMTL, IMTLG, UW, Balancer, Compose, EqualWeighting, ExcessMTL, FixedWeights, GradNorm, RotoGrad

LIKELIHOODS = [task.likelihood for task in TASKS.values()]


@dataclass(frozen=True)
class Method:
    """A way to train the tasks.

    Attributes:
        balancer: makes the balancer of one network.
        groups: the tasks that share a network, for each network.
        balancer_lr: the learning rate of what the balancer learns; that of the network is 1e-2.
    """

    balancer: Callable[[], Balancer]
    groups: Sequence[Sequence[str]] = (tuple(TASKS),)
    balancer_lr: float = 1e-2


# What the others are measured against.
BASELINE = "single"

METHODS: dict[str, Method] = {
    BASELINE: Method(EqualWeighting, groups=[[task] for task in TASKS]),
    "equal": Method(EqualWeighting),
    # Cancelled flights are rare, which makes their loss small.
    "fixed": Method(lambda: FixedWeights([5.0, 1.0, 1.0, 1.0])),
    "uw": Method(lambda: UW(likelihood=LIKELIHOODS)),
    "imtl-l": Method(lambda: IMTL(method="loss")),
    "imtl-g": Method(IMTLG),
    "imtl": Method(IMTL),
    "uw+imtl-g": Method(lambda: Compose(loss=UW(likelihood=LIKELIHOODS), gradient=IMTLG())),
    # One batch is too noisy a baseline, whence the warm-up; the step size is the one for more than some hundred steps.
    "excess-mtl": Method(lambda: ExcessMTL(robust_step_size=0.01, n_warmup_steps=50)),
    "grad-norm": Method(lambda: GradNorm(alpha=1.5)),
    # Rotations must be the slow players: at the network's rate the heads cannot follow them.
    "rotograd": Method(lambda: RotoGrad(WIDTH), balancer_lr=1e-3),
}
