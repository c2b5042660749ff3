"""Which channels of a graph stand and fall together.

A *space* is a set of channels: the output features of its producers (convolutions, linear layers), every value they
flow through channel by channel (BatchNorm, activations, residual adds, gates, depthwise convolutions, pooling,
layout), and the input features of the consumers that read them. Channel c of a space influences nothing but channel c
of the space and column c of the consumers, so it can be zeroed, or cut out of the graph, as a whole.

A space whose channels something else can see (a graph output, a view, a concatenation, a norm over the channels, an
unknown operator) has a ``reason`` and stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxprune.graph import argument, aten, is_call, mutates, name_of, shape
from fxprune.weights import Weights

_CONV = (aten.conv2d.default, aten.conv2d.padding)
# activations and poolings with f(0) = 0, and those whose zeros become something else
_KEEPS_ZERO = {
    *(aten.relu.default, aten.silu.default, aten.hardswish.default, aten.gelu.default),
    *(F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.tanh, torch.tanh, "tanh", torch.abs, "abs"),
    *(aten.max_pool2d.default, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d),
    *("contiguous", "clone", torch.clone, "detach"),
}
_LOSES_ZERO = {aten.sigmoid.default, aten.hardsigmoid.default, F.softplus, torch.exp, "exp"}
_SCALES = {operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"}  # by a number
_SHIFTS = {operator.add, operator.sub, torch.add, torch.sub, "add", "sub"}
_SIZE_READS = {"size", aten.sym_size.int}


@dataclass(frozen=True, eq=False)
class Gemm:
    """A convolution (one group) or a linear layer. Weight axes: ``rows`` is its outputs', ``columns`` its inputs'."""

    node: Node
    weight: Node
    bias: Node | None
    rows: int
    columns: int


@dataclass(frozen=True)
class Slot:
    """Where a value holds its channels: dimension ``dim``, ``inner`` consecutive elements for each."""

    space: Space
    dim: int
    inner: int = 1


@dataclass(frozen=True)
class Constant:
    """A tensor of the model with one entry per channel of a value: read by ``user``, channels along ``axis``."""

    user: Node
    tensor: Node
    axis: int


@dataclass(eq=False)
class Space:
    """size: channels. reason: why they must all stay, "" when they need not.

    values: how each value comes about: "produce", "depthwise", "norm", "keep" (f(0) = 0), "lose", "add" or "mul".
    """

    size: int
    reason: str = ""
    values: dict[Node, str] = field(default_factory=dict)
    producers: list[Gemm] = field(default_factory=list)
    consumers: list[Gemm] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    @property
    def depthwise(self) -> list[Node]:
        return [node for node, rule in self.values.items() if rule == "depthwise"]


class Coupling:
    """The spaces of one graph.

    slots: where each value holds its channels; spaces there may have been merged. order: positions of the nodes.
    """

    def __init__(self, graph: Graph, weights: Weights) -> None:
        self._weights = weights
        self._into: dict[Space, Space] = {}
        self._all: list[Space] = []
        self.slots: dict[Node, Slot] = {}
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if node.op == "output":
                self._refuse(node, "its channels reach an output of the graph")
            elif node.op not in ("placeholder", "get_attr"):
                self._visit(node)

    @property
    def spaces(self) -> list[Space]:
        return [space for space in self._all if space not in self._into]

    def space(self, node: Node) -> Space | None:
        """Return the space of a value."""
        slot = self.slots.get(node)
        return None if slot is None else self._root(slot.space)

    def gemm(self, node: Node) -> Gemm | None:
        """Read a convolution of one group or a linear layer with a constant weight that is not empty."""
        if is_call(node, *_CONV):
            weight, groups = argument(node, "weight"), argument(node, "groups")
            value, bias = self.constant(weight), argument(node, "bias")
            known = value is not None and value.numel() > 0 and (bias is None or self.constant(bias) is not None)
            return Gemm(node, weight, bias, 0, 1) if known and groups == 1 else None
        if is_call(node, aten.linear.default) and not node.kwargs:
            weight, bias, axes = node.args[1], (*node.args, None)[2], (0, 1)
        elif is_call(node, aten.mm.default, aten.matmul.default):
            weight, bias, axes = node.args[1], None, (1, 0)
        elif is_call(node, aten.addmm.default) and len(node.args) == 3 and not node.kwargs:
            bias, _, weight = node.args
            axes = (1, 0)
        else:
            return None
        value = self.constant(weight)
        if value is None or value.dim() != 2 or not value.numel():
            return None
        if bias is not None and (self.constant(bias) is None or shape(bias) != (value.shape[axes[0]],)):
            return None
        return Gemm(node, weight, bias, *axes)  # type: ignore[arg-type]

    def constant(self, node: Any) -> Tensor | None:
        """Return the tensor behind a weight or buffer that nothing in the graph writes to."""
        value = self._weights.value(node)
        return None if value is None or any(mutates(user) for user in node.users) else value

    def _root(self, space: Space) -> Space:
        while space in self._into:
            space = self._into[space]
        return space

    def _refuse(self, node: Node, reason: str) -> None:
        """Keep the channels of everything ``node`` reads."""
        for source in node.all_input_nodes:
            space = self.space(source)
            if space is not None:
                space.reason = space.reason or reason

    def _visit(self, node: Node) -> None:
        held = [n for n in node.all_input_nodes if n in self.slots]
        gemm = self.gemm(node)
        if gemm is not None and self.operand(node) not in (gemm.weight, gemm.bias):
            self._visit_gemm(gemm)
        elif held and not self._follow(node, held):
            self._refuse(node, f"{name_of(node)} reads its channels")

    @staticmethod
    def operand(node: Node) -> Any:
        """Return the activation a convolution or linear layer reads."""
        return node.args[1 if is_call(node, aten.addmm.default) else 0] if node.args else argument(node, "input")

    def _visit_gemm(self, gemm: Gemm) -> None:
        """End the space of the operand and begin one with the output features."""
        x, dims = self.operand(gemm.node), shape(gemm.node)
        value = self._weights.value(gemm.weight)
        slot = self.slots.get(x)
        rank = None if dims is None else len(dims)
        dim = 1 if gemm.node.target in _CONV else (rank or 0) - 1
        if slot is not None:
            fits = rank in (2, 3, 4) and slot.dim == dim and (gemm.node.target not in _CONV or slot.inner == 1)
            if fits and value is not None and value.shape[gemm.columns] == slot.inner * self._root(slot.space).size:
                self._root(slot.space).consumers.append(gemm)
            else:
                self._refuse(gemm.node, f"{name_of(gemm.node)} reads its channels along another dimension")
        if value is None or rank is None or rank < 2 or (gemm.node.target in _CONV and rank != 4):
            return
        space = Space(value.shape[gemm.rows])
        space.producers.append(gemm)
        self._all.append(space)
        self._put(gemm.node, Slot(space, dim), "produce")

    def _put(self, node: Node, slot: Slot, rule: str) -> bool:
        self.slots[node] = slot
        self._root(slot.space).values[node] = rule
        return True

    def _follow(self, node: Node, held: list[Node]) -> bool:
        """Carry the channels through one call; ``False`` when it does something else with them."""
        if mutates(node):
            return False
        if node.target in _SIZE_READS and len(node.args) == 2 and isinstance(node.args[1], int):
            return node.args[1] % len(shape(node.args[0]) or (0,)) != self.slots[held[0]].dim
        if shape(node) is None:
            return False
        if is_call(node, aten.add.Tensor, aten.mul.Tensor):
            return self._binary(node)
        if len(held) > 1 or held[0] is not (node.args[0] if node.args else None):
            return False
        slot, rest = self.slots[held[0]], node.args[1:]
        if is_call(node, *_CONV):
            return self._depthwise(node, slot)
        if is_call(node, aten.batch_norm.default):
            return self._norm(node, slot)
        if node.target in _KEEPS_ZERO | _LOSES_ZERO:
            pooled = "pool" in name_of(node)
            if pooled and (slot.dim != 1 or slot.inner != 1 or len(shape(node) or ()) != 4):
                return False
            return self._put(node, slot, "keep" if node.target in _KEEPS_ZERO else "lose")
        if is_call(node, aten.hardtanh.default):
            low, high = argument(node, "min_val"), argument(node, "max_val")
            keeps = not isinstance(low, Node) and not isinstance(high, Node) and low <= 0 <= high
            return self._put(node, slot, "keep" if keeps else "lose")
        if node.target in _SCALES | _SHIFTS and len(rest) == 1 and isinstance(rest[0], (int, float)) and not node.kwargs:
            return self._put(node, slot, "keep" if node.target in _SCALES else "lose")
        moved = _LAYOUT[node.target](node, slot) if node.target in _LAYOUT else None
        return moved is not None and self._put(node, moved, "keep")

    def _depthwise(self, node: Node, slot: Slot) -> bool:
        weight, bias = argument(node, "weight"), argument(node, "bias")
        value = self.constant(weight)
        size = self._root(slot.space).size
        if value is None or slot.dim != 1 or slot.inner != 1 or len(shape(node) or ()) != 4:
            return False
        if argument(node, "groups") != size or tuple(value.shape[:2]) != (size, 1) or size == 1:
            return False
        return self._vectors(node, slot, "depthwise", [(weight, 0), (bias, 0)])

    def _norm(self, node: Node, slot: Slot) -> bool:
        if slot.dim != 1 or slot.inner != 1 or argument(node, "training") is not False:
            return False
        return self._vectors(
            node, slot, "norm", [(argument(node, n), 0) for n in ("weight", "bias", "running_mean", "running_var")]
        )

    def _vectors(self, node: Node, slot: Slot, rule: str, tensors: list[tuple[Any, int]]) -> bool:
        given = [(tensor, axis) for tensor, axis in tensors if tensor is not None]
        if any(self.constant(tensor) is None for tensor, _ in given):
            return False
        self._root(slot.space).constants += [Constant(node, tensor, axis) for tensor, axis in given]
        return self._put(node, slot, rule)

    def _binary(self, node: Node) -> bool:
        """Add or multiply: values of one space, a tensor with an entry per channel, or one that is the same for all."""
        rank = len(shape(node) or ())
        found: list[Slot] = []
        constants: list[Constant] = []
        same_for_all = False
        if len(node.args) != 2 or node.kwargs:
            return False
        for operand in node.args:
            slot, dims = self.slots.get(operand), shape(operand)  # type: ignore[arg-type]
            if slot is not None and dims is not None:
                found.append(Slot(self._root(slot.space), rank - len(dims) + slot.dim, slot.inner))
        first = found[0]
        if any(s.dim != first.dim or s.inner != first.inner or s.space.size != first.space.size for s in found):
            return False
        for operand in node.args:
            dims = shape(operand)
            if operand in self.slots or dims is None:
                if dims is None:
                    return False
                continue
            axis = len(dims) - rank + first.dim
            if axis < 0 or statically_known_true(dims[axis] == 1):
                same_for_all = True
            elif self.constant(operand) is not None and dims[axis] == first.space.size and first.inner == 1:
                constants.append(Constant(node, operand, axis))  # type: ignore[arg-type]
            else:
                return False
        if first.space.size == 1:  # it may be broadcast over the channels of the other
            return False
        for other in found[1:]:
            self._merge(first.space, other.space)
        space = self._root(first.space)
        space.constants += constants
        rule = "mul" if is_call(node, aten.mul.Tensor) else "lose" if same_for_all else "add"
        return self._put(node, Slot(space, first.dim, first.inner), rule)

    def _merge(self, one: Space, other: Space) -> None:
        one, other = self._root(one), self._root(other)
        if one is other:
            return
        self._into[other] = one
        one.reason = one.reason or other.reason
        one.values.update(other.values)
        for name in ("producers", "consumers", "constants"):
            getattr(one, name).extend(getattr(other, name))


def _mean(node: Node, slot: Slot) -> Slot | None:
    rank = len(shape(node.args[0]) or ())
    dims = {d % rank for d in argument(node, "dim") or range(rank)}
    if slot.dim in dims:
        return None
    gone = 0 if argument(node, "keepdim") else sum(d < slot.dim for d in dims)
    return Slot(slot.space, slot.dim - gone, slot.inner)


def _flatten(node: Node, slot: Slot) -> Slot | None:
    dims = shape(node.args[0]) or ()
    start, end = (argument(node, name) % len(dims) for name in ("start_dim", "end_dim"))
    if slot.dim < start:
        return slot
    if slot.dim > end:
        return Slot(slot.space, slot.dim - (end - start), slot.inner)
    swallowed = dims[slot.dim + 1 : end + 1]
    if slot.dim != start or not all(isinstance(size, int) for size in swallowed):
        return None
    return Slot(slot.space, slot.dim, slot.inner * math.prod(swallowed))


def _permute(node: Node, slot: Slot) -> Slot | None:
    order = [d % len(argument(node, "dims")) for d in argument(node, "dims")]
    return Slot(slot.space, order.index(slot.dim), slot.inner)


def _transpose(node: Node, slot: Slot) -> Slot | None:
    rank = len(shape(node) or ())
    a, b = (argument(node, name) % rank for name in ("dim0", "dim1"))
    return Slot(slot.space, {a: b, b: a}.get(slot.dim, slot.dim), slot.inner)


_LAYOUT: dict[Any, Callable[[Node, Slot], Slot | None]] = {
    aten.mean.dim: _mean,
    aten.flatten.using_ints: _flatten,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
}
