r"""Gradients on the weights of linear layers, kept as the two factors that each is the product of.

A linear layer makes :math:`Y = X W^\top + \mathbf{1} b^\top` of the rows :math:`X` of a batch. With the gradient
:math:`G_t` of a task on :math:`Y`, those on weight and bias are the columns of :math:`G_t^\top [X\ \mathbf{1}]`. All
tasks have the second factor in common, so with the triangular factor of :math:`[X\ \mathbf{1}]^\top = Q R`

.. math:: \langle G_s^\top [X\ \mathbf{1}],\ G_t^\top [X\ \mathbf{1}] \rangle = \langle R\,G_s,\ R\,G_t \rangle,

for the columns of :math:`Q` are orthonormal. :math:`R\,G_t` has as many rows as the batch, where the gradient has a
column for each of the layer's inputs. A weighted sum of the gradients is :math:`(\sum_t w_t G_t)^\top [X\ \mathbf{1}]`:
one product for all tasks.

That inner products of such gradients follow from their factors is how gradients of single examples are clipped without
being made: Goodfellow, "Efficient Per-Example Gradient Computations" (arXiv:1510.01799), and Li et al., "Large Language
Models Can Be Strong Differentially Private Learners" (arXiv:2110.05679). There :math:`X X^\top` is multiplied with
:math:`G_s G_t^\top`, and what cancels within a batch, as nearly all of it does close to a minimum, is lost in the
squares; here nothing is squared before it is added up.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from mtlwrap.probe import nodes_behind, pull_back
from mtlwrap.processes import Ranks
from mtlwrap.rows import Rows, spread
from mtlwrap.surroundings import without_autocast
from mtlwrap.vectors import weighted_sum

# Measured on a CPU, in the time that a product of matrices takes for one multiplication: a multiplication of a QR
# decomposition; inner products, for each number of a row; all that is called for a layer besides.
_DECOMPOSITION = 4.5
_NUMBER = 128
_CALLS = 1 << 21
# The factors are kept where that seems to take at most this fraction of the time.
_WORTH = 0.85

# What F.linear leaves in the graph: for the inputs, what they are saved as.
_SAVED = {"AddmmBackward0": "mat1", "MmBackward0": "self"}


@dataclass(frozen=True)
class Linear:
    """The call of a linear layer, as it stands in a graph.

    Attributes:
        node: makes of the gradient on its output those on its inputs and parameters.
        weight: which parameter.
        bias: likewise; None if none wants its gradient from here alone.
        inputs: what it was called with, ``[rows, features]``.
        version: how often the inputs had been written to.
    """

    node: Node
    weight: int
    bias: int | None
    inputs: Tensor
    version: int


def linear_layers(edges: Sequence[GradientEdge], parameters: Sequence[Tensor], num_tasks: int) -> list[Linear]:
    """The calls of linear layers behind ``edges`` whose gradients it pays to keep as factors, for so many tasks."""
    nodes = nodes_behind(edges)
    calls = [node for node in nodes if node.name() in _SAVED and _pays(node, num_tasks)]
    if not calls:
        return []
    graph = _Graph(edges, nodes, parameters)
    return [layer for call in calls if (layer := graph.layer(call)) is not None]


class _Graph:
    """What the nodes of a graph are used for."""

    def __init__(self, edges: Sequence[GradientEdge], nodes: Sequence[Node], parameters: Sequence[Tensor]) -> None:
        self._uses = Counter(following for node in nodes for following, _ in node.next_functions)
        self._uses.update(edge.node for edge in edges)
        self._parameters = parameters
        # Of one type, so that what comes of them can stand side by side.
        known = [_is_plain(parameter) and parameter.dtype == parameters[0].dtype for parameter in parameters]
        self._positions = {id(parameter): position for position, parameter in enumerate(parameters) if known[position]}

    def layer(self, call: Any) -> Linear | None:
        """The call of a linear layer that left this node, unless it is something else."""
        saved = _SAVED[call.name()]
        # Saved elsewhere, or to be computed anew (a checkpoint), its inputs would have to be fetched once more.
        if getattr(getattr(call, f"_raw_saved_{saved}"), "unpack_hook", call) is not None:
            return None
        *biases, _, transposed = [following for following, _ in call.next_functions]
        if biases and (call._saved_alpha, call._saved_beta) != (1, 1):
            return None
        if transposed is None or transposed.name() != "TBackward0" or self._uses[transposed] != 1:
            return None
        weight = self._position(transposed.next_functions[0][0])
        if weight is None:
            return None
        inputs = getattr(call, f"_saved_{saved}")
        if type(inputs) not in (Tensor, nn.Parameter) or inputs.layout != torch.strided:
            return None
        bias = self._position(biases[0]) if biases else None
        if bias is not None and self._parameters[bias].shape != self._parameters[weight].shape[:1]:
            bias = None  # one for each row, or for all outputs
        return Linear(call, weight, bias, inputs.detach(), inputs._version)

    def _position(self, node: Node | None) -> int | None:
        """Which parameter has its gradient from this node; one that is used elsewhere too has another besides."""
        return self._positions.get(id(getattr(node, "variable", None))) if self._uses[node] == 1 else None


def _is_plain(parameter: Tensor) -> bool:
    """Whether its gradient is what the graph says, and a CPU, where this was measured, can work on it."""
    if type(parameter) not in (Tensor, nn.Parameter) or parameter._backward_hooks:
        return False
    return parameter.is_cpu and parameter.dtype in (torch.float32, torch.float64)


def _pays(call: Any, num_tasks: int) -> bool:
    """Whether factors take less time than whole gradients."""
    rows, features = getattr(call, f"_saved_{_SAVED[call.name()]}_sym_sizes")
    outputs = call._saved_mat2_sym_sizes[1]
    whole = num_tasks * features * outputs * (rows + _NUMBER)
    factors = num_tasks * rows * outputs * (rows + _NUMBER) + rows * features * (_DECOMPOSITION * rows + outputs)
    return bool(0 < rows < features and factors + _CALLS < _WORTH * whole)


class FactoredRows:
    """The gradient of each task that takes part, those on weights of linear layers as factors.

    Args:
        parameters: the shared parameters.
        taking_part: for each task, whether it takes part in this step.
        layers: the calls of linear layers.
    """

    def __init__(self, parameters: Sequence[Tensor], taking_part: Sequence[bool], layers: Sequence[Linear]) -> None:
        self._parameters = tuple(parameters)
        self._taking_part = tuple(taking_part)
        self._layers = [_Factors(layer, parameters[layer.weight], len(taking_part)) for layer in layers]
        of_layers = {position for layer in layers for position in (layer.weight, layer.bias)}
        self._others = [position for position in range(len(parameters)) if position not in of_layers]
        self._rest = Rows([parameters[position] for position in self._others], taking_part)
        self._whole: Rows | None = None

    def pull_back(self, edges: Sequence[GradientEdge], parts: Sequence[Sequence[Tensor | None]]) -> None:
        """Run the backbone's backward for each task, without the products of the layers' factors."""
        others: list[Tensor | GradientEdge] = [self._parameters[position] for position in self._others]
        nodes = [factors.layer.node for factors in self._layers]
        asked = [*others, *(GradientEdge(node, 0) for node in nodes)]
        with _listening(nodes) as heard:
            for task in self._present():
                heard.clear()
                found = pull_back(edges, [part[task] for part in parts], asked)
                self._rest.add(found[: len(others)])
                for factors, on_output in zip(self._layers, found[len(others) :], strict=True):
                    # autograd.grad answers before hooks of the output run, unless nothing else is asked behind it.
                    if factors.layer.node in heard:
                        on_output = heard[factors.layer.node]
                    elif on_output is not None:
                        on_output = on_output.clone()
                    factors.on_output[task] = on_output

    @torch.no_grad()
    def keep_inputs(self) -> None:
        """Copy the layers' inputs: they may be asked for after they were overwritten, seen (optimizer) or unseen."""
        for factors in self._layers:
            inputs = factors._inputs().clone()
            factors.layer = replace(factors.layer, inputs=inputs, version=inputs._version)

    @property
    def like(self) -> Tensor:
        """Of the gradients' type, on their device."""
        return self._parameters[0].detach()

    def average(self, ranks: Ranks) -> None:
        """As :meth:`Rows.average`."""
        self._made().average(ranks)

    def parts(self) -> list[list[Tensor | None]]:
        """As :meth:`Rows.parts`."""
        return self._made().parts()

    def shaped(self, shared: Sequence[Tensor]) -> list[Tensor | None]:
        """As :meth:`Rows.shaped`."""
        return self._made().shaped(shared)

    @torch.no_grad()
    def short_parts(self) -> list[list[Tensor | None]]:
        """Shorter vectors than :meth:`parts`, with the same inner products."""
        if self._whole is not None:
            return self._whole.parts()
        # Side by side, for what is done with rows is then done once.
        sizes, tasks = [factors.num_columns for factors in self._layers], self._present()
        short = self._layers[0].layer.inputs.new_empty(len(tasks), sum(sizes))
        for factors, columns in zip(self._layers, short.split(sizes, 1), strict=True):
            factors.fill(columns, tasks)
        return [*self._rest.parts(), spread(short, self._taking_part)]

    @torch.no_grad()
    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """As :meth:`Rows.weighted_sum`."""
        if self._whole is not None:
            return self._whole.weighted_sum(weights)
        found = self._placed(self._rest.weighted_sum(weights))
        for factors in self._layers:
            factors.place(factors.sum_of_outputs(weights), found)
        return found

    @torch.no_grad()
    def _made(self) -> Rows:
        """The gradients themselves."""
        if self._whole is None:
            whole, rest = Rows(self._parameters, self._taking_part), self._rest.parts()
            with without_autocast("cpu"):  # it may be asked for anywhere
                for task in self._present():
                    row = [vector for part in rest if (vector := part[task]) is not None]
                    gradients = self._placed(self._rest.shaped(row))
                    for factors in self._layers:
                        factors.place(factors.on_output[task], gradients)
                    whole.add(gradients)
            self._whole = whole
        return self._whole

    def _placed(self, others: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients on the other parameters, each at its place among all."""
        gradients: list[Tensor | None] = [None] * len(self._parameters)
        for position, gradient in zip(self._others, others, strict=True):
            gradients[position] = gradient
        return gradients

    def _present(self) -> list[int]:
        return [task for task, present in enumerate(self._taking_part) if present]


class _Factors:
    """The gradients of the tasks on the parameters of one linear layer."""

    def __init__(self, layer: Linear, weight: Tensor, num_tasks: int) -> None:
        self.layer = layer
        # The factors that differ: the tasks' gradients on the output.
        self.on_output: list[Tensor | None] = [None] * num_tasks
        self._outputs = weight.shape[0]

    @property
    def num_columns(self) -> int:
        """The length of the short vectors."""
        rows, features = self.layer.inputs.shape
        return min(rows, features + (self.layer.bias is not None)) * self._outputs

    def fill(self, matrix: Tensor, tasks: Sequence[int]) -> None:
        """Write vectors that have the inner products of these tasks' gradients, a row for each."""
        inputs = self._inputs()
        if self.layer.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        _, triangle = torch.linalg.qr(inputs.T, mode="r")
        for row, task in zip(matrix.unflatten(1, (-1, self._outputs)), tasks, strict=True):
            on_output = self.on_output[task]
            row.zero_() if on_output is None else torch.mm(triangle, on_output, out=row)

    def sum_of_outputs(self, weights: Tensor) -> Tensor | None:
        """The weighted sum of the factors that differ."""
        if all(on_output is None for on_output in self.on_output):
            return None
        return weighted_sum(self.on_output, self.layer.inputs.dtype, weights)

    def place(self, on_output: Tensor | None, gradients: list[Tensor | None]) -> None:
        """Put the gradients on weight and bias, for this one on the output, at their places."""
        if on_output is None:
            return
        gradients[self.layer.weight] = on_output.T @ self._inputs()
        if self.layer.bias is not None:
            gradients[self.layer.bias] = on_output.sum(0)

    def _inputs(self) -> Tensor:
        """The factor that all tasks have in common.

        Raises:
            ValueError: it is not what it was.
        """
        if self.layer.inputs._version != self.layer.version:
            raise ValueError(
                "The inputs of a linear layer were changed in place after the backward. Ask for the tasks' gradients "
                "before that, or give the model a copy of its inputs."
            )
        return self.layer.inputs


@contextmanager
def _listening(nodes: Sequence[Node]) -> Iterator[dict[Node, Tensor | None]]:
    """What arrives at these nodes, in this thread, after all hooks of the tensors that they made."""
    heard: dict[Node, Tensor | None] = {}
    thread = get_ident()  # another one may be running backward through the same graph

    def note(node: Node, arrived: Sequence[Tensor | None]) -> None:
        if get_ident() == thread:
            # A copy: whoever runs later may write to it, a function with a buffer of its own in the next pass too.
            heard[node] = None if arrived[0] is None else arrived[0].clone()

    handles = [node.register_prehook(partial(note, node)) for node in nodes]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
