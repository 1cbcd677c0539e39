"""ExcessMTL, robust multi-task learning with excess risks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlwrap.balancers.base import GradientBalancer
from mtlwrap.checks import integer, positive
from mtlwrap.gradients import TaskGradients, num_features

# Entries of [T, features] that are worked on at once: what is larger is done task by task, to save memory.
_AT_ONCE = 1 << 20
# Of a square, in units of the first gradient's: sums of it are still far from the end of float32.
_MOST = 1e30
_STATE = ("log_weights", "baseline", "baseline_calls", "sizes", "squared_gradients")


class ExcessMTL(GradientBalancer):
    r"""Weighs the tasks by how far each is from its own optimum, so that one with noisy labels does not dominate.

    He et al., `Robust Multi-Task Learning with Excess Risks <https://arxiv.org/abs/2402.02009>`_ (ICML 2024), Eq. 6-9.
    With :math:`g_{ij}` the gradient of task i on feature j of the representation, summed over the batch,

    .. math:: S_{ij} \mathrel{+}= g_{ij}^2, \qquad E_i = \sum_j \frac{g_{ij}^2}{\sqrt{S_{ij}}}, \qquad
        \alpha_i \propto \alpha_i \exp\left( \eta \, E_i / E_i^0 \right)

    where :math:`E_i` estimates the excess risk and :math:`E_i^0` is its value in the first call, so that the losses'
    scales do not count. The weights start equal, and sum to 1 over all tasks. Heads get their own losses.

    Differences:

    - The paper's gradients are those of the shared parameters, with ``[T, parameters]`` of state. Here they are those
      of the representation, with ``[T, features]``. Alone, on a matrix ``[T, n]`` of any gradients, it is the
      published method. (The official code's and LibMTL's ``rep_grad=True`` return NaN from the second step on.)
    - The official code's weights sum to T and reach the heads too. TorchJD's, with ``n_warmup_steps=1``, are these.
    - The official code has :math:`\sqrt{S_{ij} + 10^{-7}}`, which makes the weights depend on the losses' scales once
      gradients fall below about 1e-3; here a feature without a gradient counts 0, and the scales never matter.
    - A task that takes no part in a step keeps its weight, and the others share what is left. One whose gradient is
      zero until now has no baseline yet and keeps its weight too; in the official code it becomes NaN.
    - A step in which a gradient is not finite changes nothing.

    The estimates are never forgotten and the weights multiply up, so they saturate: choose the step size by the
    length of the training. Of two tasks with constant gradients, one that halved after the first call, that one's
    weight is

    ==================  =========  ===========  ============
    step size           100 steps  1,000 steps  10,000 steps
    ==================  =========  ===========  ============
    1                   7e-5       3e-14        5e-44
    0.1                 0.28       0.04         5e-5
    0.01 (the default)  0.48       0.42         0.27
    ==================  =========  ===========  ============

    The default is the official code's; TorchJD's is 1, which leaves one task nearly everything within a few hundred
    steps. Take a baseline from more than one batch, say ``n_warmup_steps=50``: with one the noise of the first batch
    stays in the weights for good, and one task may end up with all of it. The state holds logarithms, so that a weight
    can come back from anywhere.

    Args:
        robust_step_size: :math:`\eta > 0`.
        n_warmup_steps: for how many calls the weights stay as they are, while :math:`E_i^0` is averaged; 0 and 1 mean
            the first call alone. (TorchJD's 0 applies the first raw :math:`E_i`, which makes one weight 1 for good.)
            The paper warms up for three epochs (App. C.1).
        feature_dim: the one dimension of the representation whose entries are the features; gradients are summed over
            all others. None for all dimensions but the first, the batch. Give it where image size or sequence length
            vary (1 for the channels of a convolutional map, -1 for the width of a transformer), or where all
            positions are too many. It holds for every tensor in the representation. Gradients on parameters, and a
            matrix, have no such dimensions: there each entry is a feature, whatever this says.

    Raises:
        TypeError, ValueError: an argument is not of the stated kind or range; in use, the number of features changed.

    Shape:
        alone, ``matrix``: ``[T, n]``, a task's gradient per row; the result is ``[n]``.

    Example:
        >>> import torch
        >>> balancer = ExcessMTL(robust_step_size=0.01)
        >>> balancer(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # the first call is the baseline: half of each
        tensor([0.5000, 1.5000])
    """

    log_weights: Tensor
    baseline: Tensor
    baseline_calls: Tensor
    sizes: Tensor
    squared_gradients: Tensor

    def __init__(self, robust_step_size: float = 0.01, n_warmup_steps: int = 0, feature_dim: int | None = None) -> None:
        super().__init__()
        self.robust_step_size = positive("robust_step_size", robust_step_size)
        self.n_warmup_steps = integer("n_warmup_steps", n_warmup_steps, least=0)
        self.feature_dim = None if feature_dim is None else integer("feature_dim", feature_dim)
        # log_weights [T]; baseline [T], the average so far, and baseline_calls [T], over how many calls; sizes [T], the
        # largest entry of each task's first gradient, the unit of all that follows, so that squares neither overflow
        # nor vanish; squared_gradients [T, features], S.
        for name in _STATE:
            self.register_buffer(name, torch.zeros(0))
        self.reset()

    def bind(self, num_tasks: int) -> None:
        """See :meth:`Balancer.bind`."""
        known = self.log_weights.shape[0]
        if known not in (0, num_tasks):
            raise ValueError(f"ExcessMTL holds the state of {known} tasks, but the model has {num_tasks} heads.")
        super().bind(num_tasks)
        if known == 0:
            self.reset()

    def reset(self) -> None:
        """Equal weights, no baseline, no gradients seen; the next forward decides on the number of features."""
        self._allocate(self.num_tasks or 0, 0, self.log_weights.dtype, self.log_weights.device)

    def prepare(self, representation: Sequence[Tensor]) -> None:
        """See :meth:`Balancer.prepare`."""
        if self.num_tasks is not None:
            first = representation[0]
            features = sum(map(self._features, representation))
            self._fit(self.num_tasks, features, first.dtype, first.device)

    def weigh(self, gradients: TaskGradients) -> Tensor:
        """The weights, and in training an update of the state; see :meth:`Balancer.weigh`."""
        if self.training:
            return self._step(gradients)
        kept = {name: getattr(self, name) for name in _STATE}
        try:
            for name, state in kept.items():
                setattr(self, name, state.clone())
            return self._step(gradients)
        finally:
            for name, state in kept.items():
                setattr(self, name, state)

    def extra_repr(self) -> str:
        """The options."""
        feature_dim = "" if self.feature_dim is None else f", feature_dim={self.feature_dim}"
        return f"robust_step_size={self.robust_step_size:g}, n_warmup_steps={self.n_warmup_steps}{feature_dim}"

    def _step(self, gradients: TaskGradients) -> Tensor:
        """The weights, and an update of the state."""
        features = gradients.num_features(self.feature_dim)
        self._fit(gradients.num_tasks, features, gradients.precision, gradients.active.device)
        blocks = self._blocks()
        sizes, excess = self.sizes.clone(), torch.zeros_like(self.baseline)
        squares = torch.zeros(0)
        for rows in blocks:
            squares = self._squares(gradients, rows, sizes)
            excess[rows] = _excess(self.squared_gradients[rows], squares)
        # Nothing changes before all are known to be finite. What is done in one block is still there, others are not.
        sound = excess.isfinite().all()
        for rows in blocks:
            squares = squares if len(blocks) == 1 else self._squares(gradients, rows, sizes)
            self.squared_gradients[rows].add_(torch.where(sound, squares, 0.0))
        self.sizes.copy_(torch.where(sound, sizes, self.sizes))
        active = gradients.active & sound
        moving = self._take_baseline(excess, active)
        relative = excess / torch.where(moving, self.baseline, 1.0)
        grown = self.log_weights + self.robust_step_size * torch.where(moving, relative, 0.0)
        # Those that move share what they had together, so that the others keep theirs.
        shift = _log_total(grown, moving) - torch.where(moving.all(), 0.0, _log_total(self.log_weights, moving))
        self.log_weights.copy_(torch.where(moving, grown - shift, self.log_weights))
        return torch.where(gradients.active, self.log_weights.exp(), 0.0)

    def _features(self, tensor: Tensor) -> int:
        # A parameter comes as a detached row: all of it are features, as in its gradient.
        if tensor.dim() == 2 and len(tensor) == 1 and not tensor.requires_grad:
            return num_features(tensor.shape, tensor.dtype, None)
        return num_features(tensor.shape, tensor.dtype, self.feature_dim)

    def _take_baseline(self, excess: Tensor, active: Tensor) -> Tensor:
        """Average each task's first excess risks into its baseline; which tasks had theirs before this call."""
        calls = max(1, self.n_warmup_steps)
        known = self.baseline_calls >= calls
        counts = active & ~known & (excess > 0)
        self.baseline.add_(torch.where(counts, excess / calls, 0.0))
        self.baseline_calls.add_(counts)
        return active & known

    def _squares(self, gradients: TaskGradients, rows: slice, sizes: Tensor) -> Tensor:
        """The squared gradients in units of ``sizes``, where tasks that have none yet get theirs."""
        sums = gradients.batch_sums(self.feature_dim, rows).to(sizes.dtype)
        least, most = torch.aminmax(sums, dim=1)  # several times as fast as the norm of the same name
        largest = torch.maximum(-least, most)
        sizes[rows] = torch.where(sizes[rows] == 0, largest, sizes[rows])
        squares = sums.div_(torch.where(sizes[rows] == 0, 1.0, sizes[rows])[:, None]).square_()
        # Out of all proportion to the first gradient, but finite: it counts as very much.
        return torch.where(largest.isfinite()[:, None], squares.clamp_(max=_MOST), torch.nan)

    def _blocks(self) -> list[slice]:
        """Which tasks are worked on together."""
        num_tasks, features = self.squared_gradients.shape
        size = max(1, _AT_ONCE // max(1, features))
        return [slice(start, min(start + size, num_tasks)) for start in range(0, num_tasks, size)]

    def _fit(self, num_tasks: int, features: int, dtype: torch.dtype, device: torch.device) -> None:
        """Give the state its size, or refuse another one than it has."""
        if self.squared_gradients.shape[1] == 0 and self.log_weights.shape[0] in (0, num_tasks):
            self._allocate(num_tasks, features, dtype, device)
        expected = tuple(self.squared_gradients.shape)
        if (num_tasks, features) != expected:
            raise ValueError(
                f"ExcessMTL: gradients of {num_tasks} tasks, summed over the batch, have the shape "
                f"{(num_tasks, features)}; expected {expected} as before. Where the representation changes its "
                "size, name the dimension that does not: ExcessMTL(feature_dim=1) for the channels of a map. reset() "
                "starts afresh."
            )

    def _allocate(self, num_tasks: int, features: int, dtype: torch.dtype, device: torch.device) -> None:
        real = dtype.to_real() if dtype.is_complex else dtype
        options: dict[str, Any] = {"dtype": torch.promote_types(real, torch.float32), "device": device}
        with torch.inference_mode(False):
            self.log_weights = torch.full((num_tasks,), -math.log(max(1, num_tasks)), **options)
            self.baseline = torch.zeros(num_tasks, **options)
            self.baseline_calls = torch.zeros(num_tasks, **options)
            self.sizes = torch.zeros(num_tasks, **options)
            self.squared_gradients = torch.zeros(num_tasks, features, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take over the size of a state; one without a size, from before the first step, resets."""
        saved = {
            name: state_dict[prefix + name] for name in _STATE if isinstance(state_dict.get(prefix + name), Tensor)
        }
        squares = saved.get("squared_gradients")
        if squares is not None and squares.dim() == 2 and len(saved) == len(_STATE):
            num_tasks = self.log_weights.shape[0]
            if squares.shape[1] == 0 and squares.shape[0] in (0, num_tasks):
                self.reset()
                state_dict = {**state_dict, **{prefix + name: getattr(self, name) for name in _STATE}}
            elif self.squared_gradients.shape[1] == 0 and num_tasks in (0, squares.shape[0]):
                for name, state in saved.items():
                    wide = torch.promote_types(state.dtype, torch.float32)
                    setattr(self, name, torch.zeros_like(state, dtype=wide, device=self.log_weights.device))
            if any(getattr(self, name).shape != state_dict[prefix + name].shape for name in _STATE):
                # All or nothing: a state is of one piece.
                rest[-1].append(
                    f"size mismatch for {prefix}squared_gradients: the checkpoint has {tuple(squares.shape)}, the "
                    f"balancer {tuple(self.squared_gradients.shape)} (tasks, features)."
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _excess(squared_gradients: Tensor, squares: Tensor) -> Tensor:
    """The excess risk of each row, sum of g^2 / sqrt(S) with this call in S, and 0 for 0 / 0."""
    total = squared_gradients + squares
    return total.clamp_(min=torch.finfo(total.dtype).tiny).rsqrt_().mul_(squares).sum(1)


def _log_total(logarithms: Tensor, chosen: Tensor) -> Tensor:
    """The logarithm of the sum of what is chosen."""
    return torch.where(chosen, logarithms, -torch.inf).logsumexp(0)
