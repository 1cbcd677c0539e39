"""The wrapper: the user's backbone and heads as one multi-task model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlwrap.aliases import aliases, without_fork
from mtlwrap.balancers import Balancer, EqualWeighting, by_name
from mtlwrap.balancers.base import check_is_balancer
from mtlwrap.exact import Exact, Parameters, Schedule
from mtlwrap.gradients import TaskGradients
from mtlwrap.heads import Heads
from mtlwrap.junction import Junction
from mtlwrap.losses import Losses
from mtlwrap.processes import Peers, is_distributed
from mtlwrap.watch import Watch


class MultiTaskModel(nn.Module):
    r"""A backbone, a head per task, and a balancer that decides how the tasks share the backbone's gradient.

    The representation ``z = backbone(x)`` is handed to every head. ``backward(losses)`` is one ordinary backward pass:
    the heads get the gradients of their own losses, the balancer sees the tasks' gradients on ``z`` where they meet,
    and the backbone gets what it decides. The gradients on ``z`` are compared with the batch flattened into them.

    A balanced step happens only in the backward of :meth:`scalarize`. Everything else, ``autograd.grad``, derivatives
    of predictions with respect to inputs, a plain ``sum(losses).backward()``, sees the modules as if they were not
    wrapped. What a trainer multiplies the total with (a loss scale, accumulation) does not change any balancer's
    decision. A part of a loss's gradient that reaches the backbone without passing through ``z`` (the second
    derivatives in a loss on forces, say) is added as it is.

    In a mapping of heads the losses and predictions are dicts by task name; in a sequence they are lists.

    Args:
        backbone: the shared module. It may return a tensor, or tensors in tuples, lists, dicts, dataclasses, a
            ``ModelOutput``, nested; each head gets exactly that. A head that writes into it in place does not
            disturb the others.
        heads: a module per task, in a sequence or in a mapping by task name. The container is not changed.
        balancer: a balancer, the name of one (``"imtl"``), or None for equal weighting.
        gradients: with respect to what the tasks' gradients are compared: ``"representation"``; or
            ``"parameters"``, the shared ones themselves, at the cost of the backbone's backward per task; or
            :class:`Parameters` with options.
        weigh_heads: whether a gradient balancer's weights reach the heads too, as in the weighted objective
            :math:`\sum_t \alpha_t L_t` of some papers; a negative weight counts 0 there. The heads are then run
            backward twice. The value of the total is still the sum of the losses.
        process_group: which processes decide jointly, each with batches of its own: ``"auto"``, those of the
            ``DistributedDataParallel`` around the model, or of the device mesh that its parameters are sharded over
            (``fully_shard``); a group; or None, each by itself. They make the same steps as one process that minimises
            the mean of their losses, an absent one counting 0. All call :meth:`scalarize` and ``backward`` as often;
            one that raises leaves the others waiting, until they give up after the time-out of that group.

    Attributes:
        backbone: the shared module.
        heads: the heads, ``model.heads[0]`` or ``model.heads["seg"]``, in order.
        balancer: the balancer; another one may be set at any time, but in ``DistributedDataParallel``.
        schedule: with ``Parameters(refresh_every=k)``, k > 1, the weights in use until the next weighing; a part of the
            checkpoint. Else None.

    Raises:
        TypeError: a module or the balancer is not one, or a task name is no string.
        ValueError: there is no head, an unknown balancer name, or a balancer made for another number of tasks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.functional import cross_entropy, mse_loss
        >>> backbone = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        >>> model = MultiTaskModel(backbone, {"kind": nn.Linear(32, 3), "size": nn.Linear(32, 1)}, balancer="imtl")
        >>> optimizer = torch.optim.Adam(model.param_groups(lr=1e-2, balancer_lr=1e-3))
        >>> x, kind, size = torch.randn(16, 8), torch.randint(3, (16,)), torch.randn(16, 1)
        >>> predictions = model(x)
        >>> model.backward({
        ...     "kind": cross_entropy(predictions["kind"], kind),
        ...     "size": mse_loss(predictions["size"], size),
        ... })
        >>> optimizer.step()
        >>> model.task_weights.shape
        torch.Size([2])
    """

    backbone: nn.Module
    heads: Heads
    balancer: Balancer
    schedule: Schedule | None

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module] | Mapping[str, nn.Module],
        balancer: Balancer | str | None = None,
        *,
        gradients: str | Parameters = "representation",
        weigh_heads: bool = False,
        process_group: Any = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected a torch.nn.Module, got {type(backbone).__name__}.")
        if gradients not in ("representation", "parameters") and not isinstance(gradients, Parameters):
            raise ValueError(
                f"gradients: expected 'representation', 'parameters' or Parameters(...), got {gradients!r}."
            )
        self.backbone = backbone
        self.heads = Heads(heads)
        self._exact = Parameters() if gradients == "parameters" else gradients
        self.schedule = None
        if isinstance(self._exact, Parameters) and self._exact.refresh_every > 1:
            self.schedule = Schedule(len(self.heads), self._exact.refresh_every)
        self.balancer = balancer  # type: ignore[assignment]  # __setattr__ makes it one
        self._junction = Junction(self.heads.tasks, bool(weigh_heads), Peers(process_group))
        self._watch = Watch()
        self._is_replica = False  # DataParallel says so of those that it makes

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; but a balancer, also one that replaces another, is told the number of tasks."""
        if name == "heads" and not isinstance(value, Heads):
            raise TypeError(
                f"heads: expected them to stay, got a {type(value).__name__} in their place. Make a new model of "
                "backbone, heads and balancer."
            )
        super().__setattr__(name, self._bound(value) if name == "balancer" else value)
        if name == "balancer" and self.schedule is not None:
            self.schedule.reset()  # the weights in it are those of another balancer

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in order; ``"0"``, ``"1"``, ... for heads given as a sequence."""
        return self.heads.tasks

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.heads)

    def __getitem__(self, task: int | str) -> "SingleTaskModel":
        """The single-task model of a task, by name or position: backbone and head, sharing the weights."""
        if not isinstance(task, str) and hasattr(task, "__index__") and not -len(self) <= task < len(self):
            raise IndexError(f"There is no task at position {task}; there are {len(self)} tasks.")
        if isinstance(task, str) and task not in self.tasks:
            raise KeyError(f"There is no task called {task!r}; the tasks are {', '.join(map(repr, self.tasks))}.")
        return SingleTaskModel(
            self.backbone, self.heads[task], self.balancer, self.heads.position(task), training=self.training
        )

    def __iter__(self) -> Iterator["SingleTaskModel"]:
        """Over the single-task models."""
        return (self[task] for task in range(len(self)))

    def forward(self, *args: Any, tasks: int | str | Iterable[int | str] | None = None, **kwargs: Any) -> Any:
        """The predictions of every head: a dict by task name, or a list for heads given as a sequence.

        Args:
            *args: handed to the backbone.
            tasks: run only these heads; names or positions, one or several. A dict of predictions then has only
                these entries; a list keeps its length, with None for the others.
            **kwargs: handed to the backbone.

        Raises:
            TypeError: the backbone returned an object that hides tensors, or none.
            ValueError: there is no such task.
        """
        chosen = self._positions(tasks)
        representation = self.backbone(*args, **kwargs)
        own: Iterable[Any]
        several = False
        if _is_captured():
            own = without_fork(representation, self.balancer, chosen)  # nothing to balance: no break in the graph
        else:
            # Compiled code gets them all at once, for it cannot look into what the junction does.
            lazily = not torch.compiler.is_compiling()
            several = is_distributed() or self._is_replica
            if several and torch.is_grad_enabled():
                self._junction.meet(self)
            own = self._junction.fork(representation, self.balancer, chosen, self._shared(), lazily=lazily)
        predictions = {task: self.heads[task](z) for task, z in zip(chosen, own, strict=True)}
        if several:
            predictions = self._junction.connect(predictions, self.balancer, self.heads)
        if self.heads.named:
            return {self.tasks[task]: prediction for task, prediction in predictions.items()}
        return [predictions.get(task) for task in range(len(self))]

    def scalarize(self, losses: Losses, auxiliary: Tensor | None = None) -> Tensor:
        r"""The scalar, 0-dim, whose ``backward()`` is a balanced step: return it to any trainer.

        Its value is the sum of the losses, or what a loss balancer makes of them (for IMTL
        :math:`\sum_t e^{s_t} L_t - s_t`). Under ``torch.no_grad`` it is the value alone.

        Args:
            losses: 0-dim tensors, a list in the tasks' order or a dict by task name, or one tensor ``[T]``. A task
                whose loss is absent, None, or does not require grad takes no part: it has no gradient, no weight,
                and the balancer's state for it does not move. (What an optimizer learns for it gets a gradient of zero,
                with which momentum runs out.) If all are absent, ``backward`` does nothing. A task's
                loss reads the prediction of its own head only.
            auxiliary: a 0-dim tensor that bypasses the balancing; its gradient is added as it is. It may read
                predictions, also of several heads; then a gradient balancer runs the heads backward twice. Do not add
                such a loss to the total by hand: its gradient would count as the tasks', and be dropped where a task
                takes no part.

        Raises:
            TypeError: losses of an unknown kind, or one that is no floating-point tensor.
            ValueError: wrong number or names of losses, one that is not 0-dim, that comes from another forward or
                another model, or that reads another task's head; no forward before; none requires grad; what is asked
                for needs gradients before the backward pass, which the graph does not allow.

        Note:
            That a loss reads its own head only, and comes from this model, is checked when a task comes for the first
            time, by its gradient on the other heads; a term that is added to it later, or that a compiled loss function
            hides, is not noticed.
        """
        total = self._junction.scalarize(losses, self.balancer, auxiliary, self)
        if self.training and total.requires_grad:
            self._watch.look(self, self.balancer, self._junction.peers)
        return total

    def backward(self, losses: Losses, auxiliary: Tensor | None = None, *, retain_graph: bool | None = None) -> None:
        """``scalarize(losses, auxiliary).backward(retain_graph=retain_graph)``: a balanced step.

        Raises:
            TypeError, ValueError: as :meth:`scalarize` does; also under ``torch.no_grad``, where a total has no graph.
        """
        if not torch.is_grad_enabled():
            raise ValueError(
                "backward under torch.no_grad or torch.inference_mode: expected gradients to be enabled, for what is "
                "made of the losses there has no graph. For its value alone call scalarize."
            )
        self.scalarize(losses, auxiliary).backward(retain_graph=retain_graph)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the balancer's state, whose size the representation decides; the first training step does it too.

        Needed before a distributed checkpoint is loaded into a new model, which must have every tensor already. One
        forward in evaluation mode: batch statistics and random numbers stay as they are.

        Args:
            *args: a batch, as for :meth:`forward`; its size does not matter.
            **kwargs: likewise.
        """
        modes = {module: module.training for module in self.modules()}
        devices = {p.device for p in self.parameters() if p.device.type == "cuda"}
        self.eval()
        self.balancer.train()
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
                self(*args, **kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode
                # fully_shard leaves whole what a forward gathered: an optimizer made now would train nothing.
                if hasattr(module, "_get_fsdp_state") and callable(reshard := getattr(module, "reshard", None)):
                    reshard()

    @property
    def task_weights(self) -> Tensor | None:
        r"""With what factor each task's raw-loss gradient entered the shared gradient in the last balanced backward.

        ``[T]``, detached, on the device, at no synchronisation; 0 for a task that took no part. For IMTL it is
        :math:`\alpha_t e^{s_t}`, for UW :math:`\tfrac12 e^{-s_t}`. None before the first balanced backward, with
        a frozen backbone, or where the balancer's decision is no weighting.
        """
        return self._junction.report.weights

    @property
    def task_gradients(self) -> TaskGradients | None:
        """The tasks' gradients in the last balanced backward, while its :func:`~mtlwrap.cached` scope is open.

        They are what the balancer saw: the gradients on the shared parameters with ``gradients="parameters"``, summed
        over the batches where each task has its own. None in a step that uses the weights of an earlier one, and where
        no balancer sees gradients but an auxiliary loss adds its own to them.
        """
        return self._junction.report.gradients

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the backbone."""
        return self.backbone.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the heads, without those that the backbone has too."""
        shared = {id(parameter) for parameter in self.backbone.parameters()}
        return (parameter for parameter in self.heads.parameters() if id(parameter) not in shared)

    def model_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of backbone and heads: all but the balancer's."""
        yield from self.shared_parameters()
        yield from self.head_parameters()

    def balancer_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the balancer wants learned; it may have none."""
        return self.balancer.parameters()

    def param_groups(
        self, *, lr: float | None = None, balancer_lr: float | None = None, weight_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: backbone and heads, then, if it has parameters, the balancer without weight decay.

        Args:
            lr: the learning rate of backbone and heads; None leaves it to the optimizer.
            balancer_lr: that of the balancer; None for the same. Of no effect if it has no parameters.
            weight_decay: that of backbone and heads; None leaves it to the optimizer. It would pull a balancer's
                log-scales to 0, so they have none.

        Example:
            >>> from torch import nn
            >>> model = MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1)], balancer="uw")
            >>> [sorted(group) for group in model.param_groups(lr=0.1, balancer_lr=0.01)]
            [['lr', 'params'], ['lr', 'params', 'weight_decay']]
        """
        groups: list[dict[str, Any]] = [{"params": list(self.model_parameters())}]
        if weight_decay is not None:
            groups[0]["weight_decay"] = weight_decay
        learned = list(self.balancer_parameters())
        if learned:
            groups.append({"params": learned, "weight_decay": 0.0})
        for group, rate in zip(groups, (lr, lr if balancer_lr is None else balancer_lr), strict=False):
            if rate is not None:
                group["lr"] = rate
        return groups

    def _bound(self, balancer: Balancer | str | None) -> Balancer:
        made = by_name(balancer) if isinstance(balancer, str) else EqualWeighting() if balancer is None else balancer
        check_is_balancer(made, "a balancer object, the name of one or None")
        if made.transforms and isinstance(self._exact, Parameters):
            raise ValueError(f"{type(made).__name__} balances gradients on the representation, not on parameters.")
        made.bind(len(self.heads))
        # It comes to where the model already is; a later model.to(...) moves both.
        example = next(self.backbone.parameters(), None)
        if example is not None and any(t.device != example.device for t in (*made.parameters(), *made.buffers())):
            made.to(example.device)
        return made

    def _shared(self) -> Exact | None:
        """The parameters to balance the gradients on, if that is not the representation."""
        if not isinstance(self._exact, Parameters) or not self.balancer.sees_gradients:
            return None
        # In one go: to look for the parameters takes as long as a small layer, and so does it for the modules.
        modules = list(self.backbone.modules())
        own = (parameter for module in modules for parameter in module._parameters.values())
        shared = [p for p in dict.fromkeys(own) if p is not None and p.requires_grad]
        # With nothing to train in the backbone what is left is the gradient on its input, by way of the representation.
        # Hooks of modules, other than full ones, sit at nodes that keep them to themselves.
        hooked = any(module._backward_hooks and not module._is_full_backward_hook for module in modules)
        return Exact(shared, self.schedule, self._exact.vectorize, whole=hooked) if shared else None

    def _positions(self, tasks: int | str | Iterable[int | str] | None) -> list[int]:
        if tasks is None:
            return list(range(len(self)))
        chosen = list(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str) else [tasks]
        positions = [self.heads.position(task) for task in chosen]
        if len(set(positions)) != len(positions) or not positions:
            raise ValueError(f"tasks: expected at least one task, each once, got {chosen!r}.")
        return positions


class SingleTaskModel(nn.Module):
    """Backbone and one head of a :class:`MultiTaskModel`, sharing its weights; ``model[task]`` makes it.

    An ordinary module: it evaluates, trains without balancing, and can be exported with ``torch.export``. Its mode is
    the mode of the modules it shares: ``eval()`` on it is ``eval()`` on them.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, balancer: Balancer, task: int, *, training: bool = True
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        # Only what rotates the representation is a part of this model; otherwise its state is backbone and head.
        self.balancer = balancer if balancer.transforms else None
        self._task = task
        self.training = training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The prediction of the head; the arguments go to the backbone."""
        representation = self.backbone(*args, **kwargs)
        if self.balancer is not None:
            return self.head(*without_fork(representation, self.balancer, [self._task]))
        # Aliased, for a head that writes in place must not touch what the backbone keeps for its backward.
        return self.head(representation if _is_captured() else aliases(representation))


def _is_captured() -> bool:
    """Whether the forward is being recorded for use without a backward: exported, traced, compiled for evaluation."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return torch.compiler.is_compiling() and (torch.compiler.is_exporting() or not torch.is_grad_enabled())
