"""What the tasks do to each other, as metrics of the trainer: any of ignite's loggers can take them."""

import ignite.distributed as idist
from ignite.engine import Engine, Events
from torch import Tensor, nn

from mtlwrap.ignite.common import unwrapped
from mtlwrap.ignite.trainer import MultitaskEvents
from mtlwrap.measures import Measures


class BalancerStatistics:
    r"""Means over n steps of losses, weights, gradients' norms and cosines, put into ``engine.state.metrics``.

    They are added up on the device in every step, and read, all at once, in every n-th: only then the host waits.
    With :math:`g_t` the gradient of a task as the balancer sees it,

    ==================  =============================================================================================
    ``loss/<task>``     :math:`L_t`, the mean over the steps in which the task took part; so are the next two
    ``weight/<task>``   ``model.task_weights``; absent where the balancer's decision is no weighting
    ``norm/<task>``     :math:`\lVert g_t \rVert`, with the factor that a loss balancer gave the loss
    ``cosine/<a>/<b>``  the cosine of :math:`g_a` and :math:`g_b`, over the steps in which both took part
    ``conflicts``       the fraction of the steps in which some of these cosines are negative
    ``nonfinite``       the fraction of the steps with a gradient that is not finite, as those are that a GradScaler
                        skips; weights, norms, cosines and conflicts leave them out
    ==================  =============================================================================================

    What did not occur in n steps is NaN; a run begins with none. A step is an iteration of the trainer, also where
    gradients are accumulated. A step without gradients to ask (a frozen backbone, ``Parameters(refresh_every=k)``
    between two weighings) counts for losses and weights alone, and one without a label for nothing. A trainer with
    statistics keeps the tasks' gradients until the backward pass is over, as :func:`mtlwrap.cached` does.

    Several processes are averaged, in each step those in which the task has a label; so attach it in each of them.
    Losses are those of their own batches. So are norms and cosines, unless the balancer asked for them: then they are
    those of all batches together, which it has seen.

    Args:
        model: the trainer's model.
        cosines: whether there is a metric for every pair; there are :math:`T (T - 1) / 2`. Conflicts are counted
            anyway.

    Raises:
        TypeError: the model is no :class:`~mtlwrap.MultiTaskModel`, wrapped or not.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mtlwrap import IMTLG, MultiTaskModel
        >>> from mtlwrap.ignite import BalancerStatistics, create_multitask_trainer
        >>> model = MultiTaskModel(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}, IMTLG())
        >>> optimizer = torch.optim.SGD(model.param_groups(lr=0.1))
        >>> trainer = create_multitask_trainer(model, optimizer, {"a": nn.MSELoss(), "b": nn.L1Loss()})
        >>> BalancerStatistics(model).attach(trainer, every=5)
        >>> batch = torch.randn(8, 3), {"a": torch.randn(8, 1), "b": torch.randn(8, 1)}
        >>> state = trainer.run([batch] * 10)
        >>> list(state.metrics)
        ['loss/a', 'loss/b', 'weight/a', 'weight/b', 'norm/a', 'norm/b', 'cosine/a/b', 'conflicts', 'nonfinite']
        >>> round(state.metrics["weight/a"] + state.metrics["weight/b"], 4)
        1.0
    """

    def __init__(self, model: nn.Module, *, cosines: bool = True) -> None:
        self.model = unwrapped(model)
        self.cosines = cosines
        self._measures = Measures(self.model.tasks)

    def attach(self, engine: Engine, every: int = 1) -> None:
        """Have a trainer's metrics updated in every n-th iteration; loggers that are attached later see them.

        Args:
            engine: a trainer made by :func:`create_multitask_trainer`.
            every: n.

        Raises:
            TypeError, ValueError: ``every`` is no positive int, or the engine is no such trainer.
        """
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every: expected an int, got {every!r}.")
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}.")
        if MultitaskEvents.BACKWARD_COMPLETED not in engine._allowed_events:
            raise ValueError("engine: expected a trainer made by create_multitask_trainer, got another engine.")
        engine.add_event_handler(Events.STARTED, self.reset)
        engine.add_event_handler(MultitaskEvents.BACKWARD_COMPLETED, self.update)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=every), self.completed)

    def reset(self) -> None:
        """Forget the steps since the last reading."""
        self._measures.sums = None

    def update(self, engine: Engine) -> None:
        """Add a step; called in the scope of the step, after its backward."""
        losses: dict[str, Tensor] = engine.state.losses  # type: ignore[attr-defined]
        if losses:  # otherwise nothing was balanced: the model's weights are those of an earlier step
            self._measures.add(losses, self.model.task_weights, self.model.task_gradients)

    def compute(self) -> dict[str, float]:
        """The means since the last reset, over all processes; here the host waits."""
        tasks, names = len(self.model.tasks), self._measures.names
        together = self._measures.sums
        if together is None:  # no step with a label, here; there may have been some in another process
            together = self._measures.nothing(next(self.model.parameters()))
        if idist.get_world_size() > 1:
            together = idist.all_reduce(together.clone())  # type: ignore[assignment]
        sums, counts = together.tolist()
        hidden = names[3 * tasks : -2] if not self.cosines else []
        if not any(counts[tasks : 2 * tasks]):
            hidden = [*hidden, *names[tasks : 2 * tasks]]
        return {name: mean for name, mean in self._measures.means(sums, counts).items() if name not in hidden}

    def completed(self, engine: Engine) -> None:
        """Put the means into the engine's metrics, and begin anew."""
        engine.state.metrics.update(self.compute())
        self.reset()
