"""The objective of GradNorm, which RotoGradNorm has too: gradients of the norms that the tasks' progress calls for."""

import torch
from torch import Tensor

from mtlwrap.gradients import TaskGradients


def relative_rates(progress: Tensor, gradients: TaskGradients, alpha: float) -> Tensor:
    r"""The relative inverse training rates :math:`r^\alpha`, ``[T]``: progress over its mean; 1 where all are 0."""
    active = gradients.active
    progress = torch.where(active, progress.to(gradients.norms).clamp(min=0.0), 0.0)
    mean = progress.sum() / active.sum()
    return torch.where(mean > 0, progress / torch.where(mean > 0, mean, 1.0), 1.0) ** alpha


def pulls(norms: Tensor, reference: Tensor, rates: Tensor) -> Tensor:
    r"""The derivative of :math:`|G_k - \text{target}_k|` by :math:`\log w_k`, ``[T]``, with the target constant."""
    return torch.sign(norms - reference * rates) * norms


def logit_gradients(pull: Tensor, logits: Tensor, gradients: TaskGradients) -> Tensor:
    r"""From derivatives by :math:`\log w` to those by p, where :math:`w \propto \operatorname{softmax}(p)`."""
    masked = torch.where(gradients.active, logits.detach().to(pull), -torch.inf)
    return torch.where(gradients.active, pull - masked.softmax(0) * pull.sum(), 0.0).to(logits)
