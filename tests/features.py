"""The README's table of balancers and features, found out by trying; run as a program.

python -m tests.features
"""

from collections.abc import Callable
from typing import Any

from torchjd.aggregation import ConFIG, UPGrad

from mtlwrap import (
    DWA,
    FAMO,
    GLS,
    IMTL,
    IMTLG,
    IMTLL,
    RLW,
    UW,
    Balancer,
    EqualWeighting,
    ExcessMTL,
    FixedWeights,
    GradientBalancer,
    GradNorm,
    LossBalancer,
    MultiTaskModel,
    Parameters,
    RotateOnly,
    RotoGrad,
    RotoGradNorm,
    TorchJD,
)
from tests.common import TASKS, make_backbone, make_heads, make_input, make_losses

ROWS: dict[str, Callable[[], Balancer]] = {
    "`EqualWeighting`": EqualWeighting,
    "`FixedWeights`": lambda: FixedWeights([0.5, 2.0, 3.0]),
    "`UW`": UW,
    "`IMTLL`": IMTLL,
    "`FAMO`": FAMO,
    "`DWA`": lambda: DWA(steps_per_epoch=2),
    "`GLS`": GLS,
    "`RLW`": RLW,
    "`IMTLG`": IMTLG,
    "`IMTL`": IMTL,
    "`ExcessMTL`": ExcessMTL,
    "`RotoGrad`": lambda: RotoGrad(8),
    "`RotateOnly`": lambda: RotateOnly(8),
    "`RotoGradNorm`": lambda: RotoGradNorm(8, alpha=1.5),
    "`GradNorm`": lambda: GradNorm(alpha=1.5),
    "`TorchJD`, a weighting (UPGrad)": lambda: TorchJD(UPGrad()),
    "`TorchJD`, no weighting (ConFIG)": lambda: TorchJD(ConFIG()),
}


def _reads(make: Callable[[], Balancer]) -> str:
    parts = list(make().modules())
    kinds = {"losses": LossBalancer, "gradients": GradientBalancer}
    return " and ".join(word for word, kind in kinds.items() if any(isinstance(part, kind) for part in parts))


def _learns(make: Callable[[], Balancer]) -> str:
    return "✓" if any(True for _ in _trained(make).balancer.parameters()) else ""


def _remembers(make: Callable[[], Balancer]) -> str:
    """Whether there are buffers that training moves."""
    before, after = dict(_bound(make).balancer.named_buffers()), dict(_trained(make).balancer.named_buffers())
    moved = [name for name, value in after.items() if name not in before or not value.equal(before[name].to(value))]
    return "✓" if moved else ""


def _bound(make: Callable[[], Balancer]) -> MultiTaskModel:
    return MultiTaskModel(make_backbone(), make_heads(), make()).double()


def _trained(make: Callable[[], Balancer], *, apart: bool = False, **options: Any) -> MultiTaskModel:
    model = MultiTaskModel(make_backbone(), make_heads(), make(), **options).double()
    for _ in range(2):
        if apart:
            batches = [(task, make_input(rows=3 + number)) for number, task in enumerate(TASKS)]
            predictions = {name: p for task, x in batches for name, p in model(x, tasks=task).items()}
        else:
            predictions = model(make_input())
        model.backward(make_losses(predictions))
    return model


def _mode(**options: Any) -> Callable[[Callable[[], Balancer]], str]:
    """Whether a mode works; "=" where it changes nothing, for there are no gradients to look at."""

    def tried(make: Callable[[], Balancer]) -> str:
        try:
            model = _trained(make, **options)
        except ValueError:
            return "✗"
        return "✓" if model.balancer.sees_gradients or options.get("apart") else "="

    return tried


COLUMNS: dict[str, Callable[[Callable[[], Balancer]], str]] = {
    "reads": _reads,
    "learned by your optimizer": _learns,
    "state of its own": _remembers,
    "batches per task": _mode(apart=True),
    "`weigh_heads`": _mode(weigh_heads=True),
    '`gradients="parameters"`': _mode(gradients="parameters"),
    "`refresh_every`": _mode(gradients=Parameters(refresh_every=2)),
}


def render() -> str:
    """The table as it stands in the README."""
    lines = [f"| balancer | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, make in ROWS.items():
        lines.append(f"| {name} | {' | '.join(column(make) for column in COLUMNS.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(render())
