"""Training and evaluation with PyTorch-Ignite: ``pip install 'mtlwrap[ignite]'``.

:func:`create_multitask_trainer` and :func:`create_multitask_evaluator` are ignite's supervised ones for several tasks,
with labels that may be missing: NaN in floating-point targets (also those of 0 and 1 that a binary cross-entropy
wants), -1 or -100 in integer ones. :class:`BalancerStatistics` shows what the tasks do to each other,
:class:`CSVLogger` writes that, or any metric, to a file; :class:`DeltaM` compares with single-task training.

What to save with ignite's ``Checkpoint``: the trainer, the model, which has the balancer in it, the optimizer,
``trainer.state.scaler`` if there is one, and :class:`AccumulatedGradients` if gradients are accumulated and the
checkpoint may fall between two steps of the optimizer. The training then continues to the bit, given the same batches;
in mixed precision with a balancer of losses, its first step may be rounded otherwise.
"""

try:
    import ignite as _  # noqa: F401 - before a part of ours misses it
except ImportError as error:
    raise ImportError(f"mtlwrap.ignite needs pytorch-ignite: pip install 'mtlwrap[ignite]'. ({error})") from error

from mtlwrap.ignite.accumulated import AccumulatedGradients
from mtlwrap.ignite.csv_logger import CSVLogger
from mtlwrap.ignite.delta_m import DeltaM, delta_m
from mtlwrap.ignite.evaluator import create_multitask_evaluator
from mtlwrap.ignite.statistics import BalancerStatistics
from mtlwrap.ignite.trainer import MultitaskEvents, create_multitask_trainer

__all__ = [
    "AccumulatedGradients",
    "BalancerStatistics",
    "CSVLogger",
    "DeltaM",
    "MultitaskEvents",
    "create_multitask_evaluator",
    "create_multitask_trainer",
    "delta_m",
]
