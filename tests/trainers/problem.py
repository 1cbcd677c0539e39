"""What every trainer trains here: one small model, eight batches, and the features of a training."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, smooth_l1_loss
from torch.utils.data import DataLoader, TensorDataset

from mtlwrap import IMTL, IMTLG, UW, ExcessMTL, MultiTaskModel, RotoGrad
from tests.common import DEVICE

TASKS = ("kind", "size", "age")
ROWS = 8
# The batches in their order, and those whose gradients overflow float16 though the loss is finite.
BATCHES = (0, 1, 2, 3, 4, 5, 6, 7)
BAD = -1
BAD_IN_ONE = -2  # in the first half of the rows
# In these no row has an age: the task is absent. Of two processes, each with a half of the rows, in one of them the
# second has no age, and in the other the first has no label at all.
WITHOUT_AGE = (1, 4)
FIRST_HALF_ONLY = {6: ("age",)}
SECOND_HALF_ONLY = {3: ("kind", "size", "age")}
LR, BALANCER_LR, MOMENTUM = 0.05, 0.02, 0.9
# Of the balancers: the first log-scales, and ExcessMTL's step size.
INIT = [0.25, -0.5, 0.125]
STEP_SIZE = 0.5

BALANCERS = {
    "IMTL": lambda: IMTL(init=INIT),
    "UW": lambda: UW(init=INIT),
    "IMTLG": IMTLG,
    "RotoGrad": lambda: RotoGrad(8),
    "ExcessMTL": lambda: ExcessMTL(robust_step_size=STEP_SIZE),
}


@dataclass(frozen=True)
class Feature:
    """What is asked of a trainer.

    Attributes:
        autocast: the type of autocast, or None for float32.
        init_scale: the first loss scale of a ``GradScaler``, or None for no scaler.
        accumulate: over how many batches gradients are accumulated.
        clip: the largest norm of all gradients together, or None.
        processes: how many; each gets its part of the rows of a batch.
        unused: whether DDP looks for unused parameters, which it needs nowhere: without it a head whose task is absent
            in all processes gets a gradient of zero, with it none.
    """

    autocast: torch.dtype | None = None
    init_scale: float | None = None
    accumulate: int = 1
    clip: float | None = None
    processes: int = 1
    unused: bool = False


FEATURES = {
    "fp32": Feature(),
    "bf16": Feature(autocast=torch.bfloat16),
    "fp16 + scaler": Feature(autocast=torch.float16, init_scale=2.0**12),
    "accumulation": Feature(accumulate=2),
    "clipping": Feature(clip=0.5),
    "DDP": Feature(processes=2),
}


@dataclass
class Result:
    """What a training leaves.

    Attributes:
        state: the model's, by name: backbone, heads and balancer.
        weights: ``model.task_weights`` of the last batch; None before there was one.
        scale: the loss scale, if there is a scaler.
    """

    state: dict[str, Tensor]
    weights: Tensor | None
    scale: float | None = None


class Objective(nn.Module):
    """The model for trainers that want a forward that returns the loss; also what DDP wraps."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, kind: Tensor, size: Tensor, age: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model.scalarize(losses_of(self.model(x), (kind, size, age)))}


def make_model(balancer: str) -> MultiTaskModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh())
        age = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
        # Without a bias, a tensor of one number near zero, of which rounding is a large part.
        heads = {"kind": nn.Linear(8, 3), "size": nn.Linear(8, 1, bias=False), "age": age}
        return MultiTaskModel(backbone, heads, BALANCERS[balancer]()).to(DEVICE)


def make_optimizer(model: MultiTaskModel) -> torch.optim.Optimizer:
    """SGD and not Adam, which makes of rounding in a gradient near zero a step of full length."""
    return torch.optim.SGD(model.param_groups(lr=LR, balancer_lr=BALANCER_LR), momentum=MOMENTUM)


def make_batch(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, and a label for each task; NaN, or -1 of classes, where it is missing."""
    gen = torch.Generator().manual_seed(100 + number)
    x = torch.randn(ROWS, 6, generator=gen)
    kind = torch.randint(3, (ROWS,), generator=gen)
    size = 3 * x[:, :1] + torch.randn(ROWS, 1, generator=gen)
    age = 2 + torch.randn(ROWS, 2, generator=gen)
    age[:: ROWS // 2] = torch.nan
    if number in WITHOUT_AGE:
        age[:] = torch.nan
    if number in (BAD, BAD_IN_ONE):
        size[: ROWS if number == BAD else ROWS // 2] = 1e6
    labels = {"kind": kind, "size": size, "age": age}
    for tasks, rows in ((FIRST_HALF_ONLY, slice(ROWS // 2, None)), (SECOND_HALF_ONLY, slice(ROWS // 2))):
        for task in tasks.get(number, ()):
            labels[task][rows] = -1 if task == "kind" else torch.nan
    return x, kind, size, age


def make_loader(numbers: Sequence[int], processes: int = 1, rank: int | None = None) -> DataLoader:
    """The batches in their order; of several processes each gets as many rows of every batch.

    Without a rank it is the loader of all, for trainers that share its batches out to the processes in turn.
    """
    share = ROWS // processes
    rows = slice(None) if rank is None else slice(rank * share, (rank + 1) * share)
    parts = [[column[rows] for column in make_batch(number)] for number in numbers]
    return DataLoader(TensorDataset(*map(torch.cat, zip(*parts, strict=True))), batch_size=share)


def own_rank(feature: Feature) -> int | None:
    """Which of several processes this is, as torchrun would say; None if there is one."""
    return int(os.environ["RANK"]) if feature.processes > 1 else None


def losses_of(predictions: Mapping[str, Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """The losses in float32, whatever autocast made of the predictions; None for a task without a label."""
    losses: dict[str, Tensor | None] = {}
    for task, function, label in zip(TASKS, (cross_entropy, mse_loss, smooth_l1_loss), labels, strict=True):
        known = label >= 0 if task == "kind" else ~label[:, 0].isnan()
        prediction = predictions[task].to(torch.promote_types(predictions[task].dtype, torch.float32))
        losses[task] = function(prediction[known], label[known]) if known.any() else None
    return losses


def result_of(model: MultiTaskModel, scale: float | None = None) -> Result:
    """The result of a training; rotations as what they are, for a forward alone may write them in another way."""
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    if isinstance(model.balancer, RotoGrad):
        del state["balancer.rotations.base"], state["balancer.rotations.anchor"]
        state["rotations"] = model.balancer.rotations.matrices().cpu()
    weights = model.task_weights
    return Result(state, None if weights is None else weights.cpu(), scale)
