"""The same training without mtlwrap: a gradient per task by ``autograd.grad``, and each method's closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from tests.trainers.problem import (
    BALANCER_LR,
    BATCHES,
    INIT,
    LR,
    MOMENTUM,
    STEP_SIZE,
    TASKS,
    Feature,
    losses_of,
    make_loader,
    make_model,
)


class Method:
    """Equal weighting; what the methods change of it is a function each.

    Attributes:
        learned: what the optimizer learns of the method: a number per task, or angles.
    """

    def __init__(self, features: int) -> None:
        self.learned: Tensor | None = None

    def rotate(self, z: Tensor) -> list[Tensor]:
        """What each head gets."""
        return [z] * len(TASKS)

    def scalar(self, losses: Tensor, tasks: list[int]) -> Tensor:
        """What the losses that are present make together."""
        return losses.sum()

    def weights(self, rows: Tensor, tasks: list[int]) -> Tensor:
        """Of the gradients on the representation, float64 ``[tasks, rows of the batch, features]``."""
        return rows.new_ones(len(tasks))

    def own_gradient(self, scalar: Tensor, rows: Tensor, tasks: list[int]) -> Tensor | None:
        """On what the method learns: that of the scalar, or of an objective of its own."""
        return None if self.learned is None else grad(scalar, self.learned)[0]

    def state(self) -> dict[str, Tensor]:
        return {}


class UWMethod(Method):
    def __init__(self, features: int) -> None:
        self.learned = torch.tensor(INIT, requires_grad=True)

    def scalar(self, losses: Tensor, tasks: list[int]) -> Tensor:
        s = self.learned[tasks]
        return (losses / (2 * s.exp()) + s / 2).sum()

    def state(self) -> dict[str, Tensor]:
        return {"balancer.log_variance": self.learned}


class IMTLGMethod(Method):
    def weights(self, rows: Tensor, tasks: list[int]) -> Tensor:
        """Equation 2 of the paper, with its inverse of a product of differences."""
        gradients = rows.flatten(1)
        units = gradients / gradients.norm(dim=1, keepdim=True)
        differences, unit_differences = gradients[0] - gradients[1:], units[0] - units[1:]
        others = gradients[0] @ unit_differences.T @ torch.linalg.inv(differences @ unit_differences.T)
        return torch.cat([1 - others.sum(0, keepdim=True), others])


class IMTLMethod(IMTLGMethod):
    def __init__(self, features: int) -> None:
        self.learned = torch.tensor(INIT, requires_grad=True)

    def scalar(self, losses: Tensor, tasks: list[int]) -> Tensor:
        s = self.learned[tasks]
        return (s.exp() * losses - s).sum()

    def state(self) -> dict[str, Tensor]:
        return {"balancer.loss.log_scale": self.learned}


class ExcessMTLMethod(Method):
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.shares = torch.full((len(TASKS),), 1 / len(TASKS), dtype=torch.float64)
        self.squares = torch.zeros(len(TASKS), features, dtype=torch.float64)
        self.baseline = torch.zeros(len(TASKS), dtype=torch.float64)

    def weights(self, rows: Tensor, tasks: list[int]) -> Tensor:
        moving = []
        for task, gradient in zip(tasks, rows.sum(1), strict=True):
            self.squares[task] += gradient**2
            excess = (gradient**2 / self.squares[task].sqrt()).sum()
            if self.baseline[task] == 0:
                self.baseline[task] = excess
                continue
            moving.append((task, self.shares[task] * torch.exp(STEP_SIZE * excess / self.baseline[task])))
        together, grown = sum(self.shares[task] for task, _ in moving), sum(share for _, share in moving)
        for task, share in moving:
            self.shares[task] = share / grown * together
        return self.shares[tasks]

    def state(self) -> dict[str, Tensor]:
        return {"balancer.log_weights": self.shares.log()}


class RotoGradMethod(Method):
    def __init__(self, features: int) -> None:
        self.learned = torch.zeros(len(TASKS), features * (features - 1) // 2, requires_grad=True)
        self.rotations = torch.eye(features, dtype=torch.float64).repeat(len(TASKS), 1, 1)
        self.settled = self.learned.detach().clone()
        self.first_norms = torch.zeros(len(TASKS), dtype=torch.float64)

    def turned(self, angles: Tensor) -> Tensor:
        """The rotations, turned further by the Cayley map of the angles."""
        size = self.rotations.shape[1]
        half, identity = torch.zeros_like(self.rotations), torch.eye(size, dtype=torch.float64)
        below = torch.tril_indices(size, size, -1)
        half[:, below[0], below[1]] = angles.double() / 2
        half = half - half.mT
        return self.rotations @ torch.linalg.inv(identity - half) @ (identity + half)

    def rotate(self, z: Tensor) -> list[Tensor]:
        angles = self.learned.detach()
        self.rotations, self.settled = self.turned(angles - self.settled), angles.clone()
        return [z @ rotation.T.to(z) for rotation in self.rotations]

    def weights(self, rows: Tensor, tasks: list[int]) -> Tensor:
        norms = rows.flatten(1).norm(dim=1)
        first = self.first_norms[tasks]
        self.first_norms[tasks] = torch.where(first == 0, norms, first)
        ratios = norms / self.first_norms[tasks]
        return (ratios / ratios.sum() * norms).sum() / norms

    def own_gradient(self, scalar: Tensor, rows: Tensor, tasks: list[int]) -> Tensor:
        norms = rows.flatten(1).norm(dim=1)
        target = rows.mean(0).norm() * (rows / norms[:, None, None]).mean(0)
        seen = torch.einsum("tbi,tji->tbj", rows, self.rotations[tasks])
        angles = torch.zeros_like(self.learned, requires_grad=True)
        turned = torch.einsum("bi,tji->tbj", target, self.turned(angles)[tasks])
        return grad((turned - seen).square().sum(), angles)[0]

    def state(self) -> dict[str, Tensor]:
        return {"rotations": self.turned(self.learned.detach() - self.settled)}


METHODS = {
    "IMTL": IMTLMethod,
    "UW": UWMethod,
    "IMTLG": IMTLGMethod,
    "RotoGrad": RotoGradMethod,
    "ExcessMTL": ExcessMTLMethod,
}


class Reference:
    """Backbone, heads and method: on the CPU, in float64 unless there is autocast."""

    def __init__(self, balancer: str, feature: Feature) -> None:
        self.dtype = torch.float64 if feature.autocast is None else torch.float32
        self.feature = feature
        self.task_weights: Tensor | None = None
        model = make_model(balancer).to("cpu", self.dtype)
        self.backbone, self.heads = model.backbone, [model.heads[task] for task in TASKS]
        self.method = METHODS[balancer](features=8)
        groups = [{"params": [p for module in (self.backbone, *self.heads) for p in module.parameters()], "lr": LR}]
        if self.method.learned is not None:
            self.method.learned.data = self.method.learned.data.to(self.dtype)
            groups.append({"params": [self.method.learned], "lr": BALANCER_LR})
        self.optimizer = torch.optim.SGD(groups, momentum=MOMENTUM)

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def add_gradients(self, batch: Sequence[Tensor]) -> None:
        """Those of one batch, of which an accumulated step may have several."""
        x, *labels = (column.to(self.dtype) if column.is_floating_point() else column for column in batch)
        with torch.autocast("cpu", self.feature.autocast, enabled=self.feature.autocast is not None):
            z = self.backbone(x)
            own = self.method.rotate(z)
            predictions = {task: head(z_t) for task, head, z_t in zip(TASKS, self.heads, own, strict=True)}
            losses = self.mean_losses(predictions, labels)
        tasks = [task for task, loss in enumerate(losses) if loss is not None]
        values = torch.stack([losses[task].detach() for task in tasks]).requires_grad_()
        scalar = self.method.scalar(values, tasks)
        factors = grad(scalar, values, retain_graph=True)[0]
        scale = self.feature.init_scale or 1.0
        rows = []
        for task, factor in zip(tasks, factors, strict=True):
            scaled = scale * factor * losses[task]
            head = list(self.heads[task].parameters())
            *of_head, of_z = grad(scaled, [*head, z], retain_graph=True)
            self._add(head, of_head, scale)
            rows.append(of_z.double() / scale)
        stacked = torch.stack(rows)
        weights = self.method.weights(stacked, tasks)
        self.task_weights = torch.zeros(len(TASKS), dtype=torch.float64)
        self.task_weights[tasks] = weights * factors.double()
        shared = (weights[:, None, None] * stacked).sum(0)
        backbone = list(self.backbone.parameters())
        self._add(backbone, grad(z, backbone, (scale * shared).to(z)), scale)
        own = self.method.own_gradient(scalar, stacked, tasks)
        if own is not None:
            self._add([self.method.learned], [own], 1.0)

    def mean_losses(self, predictions: dict[str, Tensor], labels: Sequence[Tensor]) -> list[Tensor | None]:
        """Over the processes, each with its part of the rows; one in which a task is absent counts 0."""
        count = self.feature.processes
        means: list[Tensor | None] = [None] * len(TASKS)
        for rank in range(count):
            own = {task: prediction.chunk(count)[rank] for task, prediction in predictions.items()}
            for task, loss in enumerate(losses_of(own, [label.chunk(count)[rank] for label in labels]).values()):
                if loss is not None:
                    means[task] = loss / count if means[task] is None else means[task] + loss / count
        return means

    def fill_with_zeros(self) -> None:
        """As plain DDP does where a task is absent in all processes; momentum then moves its head."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _add(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> None:
        """Add to the gradients what a batch's share of a step is."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            share = gradient.to(parameter) / (scale * self.feature.accumulate)
            parameter.grad = share if parameter.grad is None else parameter.grad + share

    def state(self) -> dict[str, Tensor]:
        """By the names in the model's ``state_dict``, and the weights of the last batch."""
        modules = {"backbone": self.backbone} | {f"heads.{task}": h for task, h in zip(TASKS, self.heads, strict=True)}
        found = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.state_dict().items()}
        found |= self.method.state() | {"task_weights": self.task_weights}
        return {name: value.detach().clone() for name, value in found.items()}


def train(balancer: str, feature: Feature, batches: Sequence[int] = BATCHES) -> dict[str, Tensor]:
    """The parameters, and what the method has learned or remembers; of its state only what the closed form has too."""
    reference = Reference(balancer, feature)
    for number, batch in enumerate(make_loader(batches), start=1):
        reference.add_gradients(batch)
        if number % feature.accumulate == 0:
            if feature.processes > 1 and not feature.unused:
                reference.fill_with_zeros()
            if feature.clip is not None:
                torch.nn.utils.clip_grad_norm_(reference.parameters(), feature.clip)
            reference.optimizer.step()
            reference.optimizer.zero_grad()
    return reference.state()
