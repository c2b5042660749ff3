"""Form regions: chains of our operators that run as one native call, ``fxprune::region``.

    tile_gemm -> depthwise_taps -> mean -> tile_gemm -> ...  =>  region([x], weights, layout, program, outputs)

A region is a run of eligible nodes in graph order; a node that depends on it but is not eligible, or that writes memory,
closes it. Nodes in between that do not depend on it stay in front. Only in inference, and only for two kernels or more.
The weights of all regions of a graph become one graph input per type.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..context import Context
from ..graph import fake, mutates
from ..ops import activation
from ..ops import region as ops
from ..weights import Weights

aten = torch.ops.aten
_DEPTHWISE = torch.ops.fxprune.depthwise_taps.default
_GEMM = torch.ops.fxprune.tile_gemm.default
_CONV = torch.ops.fxprune.tile_conv.default
_MEAN = aten.mean.dim
_POOL = aten.max_pool2d.default
_NORM = torch.ops.fxprune.channel_norm.default
_ATTENTION = torch.ops.fxprune.attention.default
_SLICE = aten.slice.Tensor
_RESHAPES = (aten.flatten.using_ints, aten.unflatten.int, aten.reshape.default)
_REGION = torch.ops.fxprune.region.default
# which operands are weights
_WEIGHTS: dict[Any, slice] = {_DEPTHWISE: slice(1, 4), _GEMM: slice(1, 6), _CONV: slice(1, 6), _NORM: slice(1, 3)}
# which are values
_VALUES: dict[Any, tuple[int, ...]] = {_GEMM: (0, 6, 7), _CONV: (0, 6), _ATTENTION: (0, 1, 2, 3)}


@dataclass
class _Region:
    nodes: list[Node] = field(default_factory=list)

    def kernels(self) -> int:
        return sum(n.target in (_DEPTHWISE, _GEMM, _CONV, _ATTENTION) for n in self.nodes)


def form_regions(gm: GraphModule, ctx: Context) -> int:
    """Return the number of regions formed."""
    if not ctx.inference:
        return 0
    current = _Region()
    found: list[_Region] = []
    for node in gm.graph.nodes:
        eligible = _eligible(node, current.nodes, ctx.weights)
        if eligible and _fits(node, current.nodes):
            current.nodes.append(node)
        elif eligible or mutates(node) or any(n in current.nodes for n in node.all_input_nodes):
            found.append(current)
            current = _Region([node] if _eligible(node, [], ctx.weights) else [])
    for candidate in [*found, current]:
        _trim(candidate)
    regions = [r.nodes for r in [*found, current] if r.kernels() >= 2]
    if regions:
        used = dict.fromkeys(w for members in regions for node in members for w in _weights(node))
        holders, layout = ctx.weights.bundle(list(used))
        numbers = {weight: number for number, weight in enumerate(used)}
        for members in regions:
            _replace(members, holders, layout, numbers)
    return len(regions)


def _known(node: Any) -> Tensor:
    """The value of a member, which being eligible made sure of."""
    value = fake(node)
    assert value is not None, node
    return value


def _fits(node: Node, members: list[Node]) -> bool:
    """The region runs image by image, so everything in it has one batch size, and one dtype."""
    if not members:
        return True
    value, first = _known(node), _known(members[0])
    return value.dtype == first.dtype and statically_known_true(value.shape[0] == first.shape[0])


def _weights(node: Node) -> list[Node]:
    return [n for n in _weight_operands(node) if isinstance(n, Node)]


def _weight_operands(node: Node) -> Any:
    """The operands of a node that are weights; a bias may be ``None``."""
    return node.args[_WEIGHTS.get(node.target, slice(0))]


def _eligible(node: Node, members: list[Node], weights: Weights) -> bool:
    if node.op != "call_function" or any(weights.value(w) is None for w in _weights(node)):
        return False
    value = fake(node)
    if value is None or value.dtype not in (torch.float32, torch.bfloat16) or value.device.type != "cpu":
        return False
    if node.target is _DEPTHWISE:
        return True
    x = fake(node.args[0])
    if x is None or x.dtype != value.dtype:
        return False
    if node.target is _CONV:
        return True
    if node.target is _NORM:
        return x.dim() in (3, 4)
    if node.target is _ATTENTION:
        return x.dim() == 3
    if node.target is _POOL:
        return len(node.args) == 5 and node.args[0] in members
    if node.target is _SLICE:
        return node.args[0] in members and _is_step(node, x.dim())
    if node.target is _GEMM:
        if node.args[10] == 1:
            return x.dim() in (3, 4) and not _is_channel_vector(x)
        return x.dim() == 2 and node.args[0] in members  # rows of a matrix from elsewhere need not be images
    if node.target is _MEAN:
        over: Any = node.args[1]
        dims = sorted(d % x.dim() for d in over)
        if _is_channel_vector(x) and node.args[0] not in members:
            return False  # one pixel of an input: there is nothing to compute
        return x.dim() == 4 and dims == [2, 3] and len(node.args) <= 3
    return node.target in _RESHAPES and _is_channel_vector(x) and _is_channel_vector(value)


def _is_step(node: Node, rank: int) -> bool:
    """Every n-th row or column of an image: pooling with a window of one pixel."""
    if len(node.args) != 5 or rank != 4:
        return False
    _, dim, start, end, step = (a if isinstance(a, int) else -1 for a in node.args)
    return dim in (2, 3) and start == 0 and end == 2**63 - 1 and step >= 1


def _is_channel_vector(value: Tensor) -> bool:
    """(B, C) or (B, C, 1, 1): reshapes between them move nothing."""
    return value.dim() == 2 or (value.dim() == 4 and list(value.shape[2:]) == [1, 1])


def _trim(candidate: _Region) -> None:
    """Drop the views at both ends, and pooling no kernel is in front of: they are Inductor's."""
    while candidate.nodes and candidate.nodes[-1].target in (*_RESHAPES, _SLICE):
        candidate.nodes.pop()
    while candidate.nodes and candidate.nodes[0].target in (*_RESHAPES, _MEAN, _POOL, _SLICE):
        candidate.nodes.pop(0)


class _Program:
    """Number the values of a region while its steps are written. numbers: of the weights."""

    def __init__(self, members: list[Node], numbers: dict[Node, int]) -> None:
        self.members = set(members)
        self.inputs: list[Node] = []
        self._numbers = numbers
        self.code: list[int] = []
        self._values: dict[Node, int] = {}
        self._sliced: dict[Node, tuple[int, list[int]]] = {}  # what slices read at which strides
        external = [n for m in members for n in _activations(m) if n not in self.members]
        for node in dict.fromkeys(external):
            self._values[node] = len(self.inputs)
            self.inputs.append(node)
        self._next = len(self.inputs)

    def value(self, node: Node | None) -> int:
        return -1 if node is None else self._values[node]

    def weight(self, node: Node | None) -> int:
        return -1 if node is None else self._numbers[node]

    def add(self, node: Node) -> None:
        a: Any = node.args
        if node.target in _RESHAPES or (node.target is _MEAN and _is_channel_vector(_known(a[0]))):
            self._values[node] = self.value(a[0])
            return
        weights = [self.weight(w) for w in _weight_operands(node)]
        if node.target is _DEPTHWISE:
            numbers = [n for window in a[4:8] for n in window]
            record = [self.value(a[0]), *weights, *numbers, activation.NAMES.index(a[8])]
            code = ops.DEPTHWISE
        elif node.target is _GEMM:
            values = [self.value(a[6]), self.value(a[7])]
            tail = [*values, *a[8:11], activation.NAMES.index(a[11])]
            record = [self.value(a[0]), *weights, *tail]
            code = ops.GEMM
        elif node.target is _CONV:
            numbers = [n for window in a[9:13] for n in window]
            record = [self.value(a[0]), *weights, self.value(a[6]), a[7], a[8], *numbers, a[13]]
            record.append(activation.NAMES.index(a[14]))
            code = ops.CONV
        elif node.target is _SLICE:
            source, stride = self._sliced.get(a[0]) or (self.value(a[0]), [1, 1])
            stride = [s * (a[4] if a[1] == dim else 1) for dim, s in enumerate(stride, 2)]
            if all(user in self.members and user.target is _SLICE for user in node.users):
                self._sliced[node] = (source, stride)
                return
            record, code = [source, 1, 1, *stride, 0, 0, 1, 1], ops.POOL
        elif node.target is _POOL:
            record, code = [self.value(a[0]), *[n for window in a[1:5] for n in window]], ops.POOL
        elif node.target is _NORM:
            record, code = [self.value(a[0]), *weights, ops.bits_of(a[3])], ops.NORM
        elif node.target is _ATTENTION:
            record, code = [*map(self.value, a[:4]), a[4], ops.bits_of(a[5])], ops.ATTENTION
        else:
            record, code = [self.value(a[0])], ops.MEAN
        self.code += [code, len(record), *record]
        self._values[node] = self._next
        self._next += 1


def _activations(node: Node) -> list[Node]:
    return [n for p in _VALUES.get(node.target, (0,)) if isinstance(n := node.args[p], Node)]


def _replace(members: list[Node], holders: list[Node], layout: list[int], weights: dict[Node, int]) -> None:
    program = _Program(members, weights)
    for node in members:
        program.add(node)
    results = [n for n in members if any(u not in program.members for u in n.users)]
    last = members[-1]
    fakes = [_known(n) for n in program.inputs]
    numbers = list(dict.fromkeys(program.value(n) for n in results))
    texts = ops.text(layout), ops.text(program.code)
    with last.graph.inserting_after(last):
        call = last.graph.call_function(_REGION, (program.inputs, holders, *texts, numbers))
    call.meta = {k: v for k, v in last.meta.items() if k == "stack_trace"}
    call.meta[ops.PARTS] = [w.name for w in weights]
    mode = next(m for m in (getattr(f, "fake_mode", None) for f in fakes) if m is not None)
    with mode:
        call.meta["example_value"] = ops.fake(fakes, [_known(h) for h in holders], *texts, numbers)
    anchor = call
    for node in results:
        position = numbers.index(program.value(node))
        with last.graph.inserting_after(anchor):
            anchor = last.graph.call_function(operator.getitem, (call, position))
        anchor.meta["example_value"] = call.meta["example_value"][position]
        shape = _known(node).shape
        if anchor.meta["example_value"].dim() != len(shape):
            anchor = _as_shape(anchor, node)
        node.replace_all_uses_with(anchor, delete_user_cb=lambda user: user not in program.members)
    for node in reversed(members):
        node.graph.erase_node(node)


def _as_shape(anchor: Node, node: Node) -> Node:
    """Give a channel vector back the rank it had."""
    with anchor.graph.inserting_after(anchor):
        if _known(node).dim() == 2:
            new = anchor.graph.call_function(aten.flatten.using_ints, (anchor, 1))
        else:
            new = anchor.graph.call_function(aten.unflatten.int, (anchor, 1, [_known(node).shape[1], 1, 1]))
    new.meta = dict(node.meta)
    return new
