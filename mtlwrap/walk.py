"""Which forward a loss came from, found out by walking its graph."""

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from mtlwrap.connection import PredictionsNode
from mtlwrap.nodes import ForkNode, ForkState, Owner

# Nodes through which autograd.grad cannot be asked for a part of the gradient, or not by one process alone.
_OPAQUE_NODES = {"CompiledFunctionBackward", "CheckpointFunctionBackward", "SyncBatchNormBackward"}


class Walk:
    """Which forks the graph of a loss leads to, and at which of their aliases it arrives."""

    def __init__(self, loss: Tensor | None, owner: Owner, *, to_first: bool = False) -> None:
        self.reached: dict[ForkState, set[int]] = {}
        # The tasks of the connected predictions that were met.
        self.predicted: set[int] = set()
        # Whether a fork of another model was met, and whether a node was met that mixes all it was compiled from.
        self.foreign = False
        self.opaque = False
        start = None if loss is None else loss.grad_fn
        stack: list[tuple[Node, int]] = [] if start is None or loss is None else [(start, loss.output_nr)]
        visited: set[Node] = set()
        while stack:
            node, output = stack.pop()
            kind = getattr(type(node), "_forward_cls", None)
            if kind is PredictionsNode:  # connects for the backward pass what has nothing to do with each other
                tasks = node.connection.tasks  # type: ignore[attr-defined]
                if output < len(tasks):  # behind them is the token
                    self.predicted.add(tasks[output])
                    stack.append(node.next_functions[output])  # type: ignore[arg-type]  # a prediction has a graph
                continue
            state = node.state if kind is ForkNode else None  # type: ignore[attr-defined]
            if state is not None and state.owner() is owner:
                self.reached.setdefault(state, set()).add(output)
                if to_first:
                    return
                continue  # what lies behind is the backbone's
            if node in visited:
                continue
            visited.add(node)
            self.foreign = self.foreign or state is not None
            self.opaque = self.opaque or node.name() in _OPAQUE_NODES
            stack.extend((following, nr) for following, nr in node.next_functions if following is not None)

    def tasks(self) -> set[int]:
        """The tasks at whose aliases the walk arrived."""
        return {state.tasks[o // state.num_tensors] for state, outputs in self.reached.items() for o in outputs}

    def aliases_of_others(self, task: int) -> list[tuple[int, GradientEdge]]:
        """The aliases of other tasks at which the walk arrived."""
        found = []
        for state, outputs in self.reached.items():
            node = state.node() if state.node is not None else None
            for output in sorted(outputs):
                other = state.tasks[output // state.num_tensors]
                if other != task and node is not None:
                    found.append((other, GradientEdge(node, output)))
        return found
