"""Detect depthwise convolutions: ``aten.conv2d`` with a constant weight (C, 1, KH, KW) and groups == C > 1."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..context import Context
from ..graph import argument, aten, is_call, pair, shape
from ..match import Geometry, Match
from ..weights import qualified_name


def match_depthwise(gm: GraphModule, ctx: Context) -> int:
    """Append a match per depthwise convolution; returns 0, the graph is unchanged."""
    for node in gm.graph.nodes:
        if is_call(node, aten.conv2d.default, aten.conv2d.padding):
            found = match_conv(node, ctx, depthwise=True)
            if found is not None:
                ctx.matches.append(found)
    return 0


def match_conv(node: Node, ctx: Context, depthwise: bool) -> Match | None:
    """Match one ``aten.conv2d`` as depthwise, or as pointwise (1x1, one group, no padding)."""
    x, weight = argument(node, "input"), argument(node, "weight")
    value = ctx.weights.value(weight)
    dims = shape(x)
    if value is None or value.dim() != 4 or dims is None or len(dims) != 4:
        return None
    groups, kernel = argument(node, "groups"), (value.shape[2], value.shape[3])
    stride, dilation = pair(argument(node, "stride")), pair(argument(node, "dilation"))
    padding = _padding(argument(node, "padding"), kernel, stride, dilation)
    if padding is None:
        return None
    if depthwise:
        if value.shape[1] != 1 or groups != value.shape[0] or groups < 2:
            return None
    elif groups != 1 or kernel != (1, 1) or padding != (0, 0):
        return None
    parameter = qualified_name(ctx.weights.origin(weight))
    return Match(
        kind="depthwise" if depthwise else _gemm_kind(x),
        node=node,
        operands=(0, 2),
        weight=weight,
        name=parameter.rpartition(".")[0] or parameter,
        parameter=parameter,
        value=value,
        geometry=Geometry(dims, shape(node) or (), kernel, stride, padding, dilation),
    )


def _gemm_kind(x: Node) -> str:
    """A 1x1 convolution of a 1x1 map (squeeze-and-excite, a head after pooling) is a linear layer."""
    one_pixel = all(statically_known_true(size == 1) for size in (shape(x) or ())[2:])
    return "linear" if one_pixel else "pointwise"


def _padding(
    given: Any, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int] | None:
    """Return symmetric padding; ``None`` for a "same" that pads one side more."""
    if not isinstance(given, str):
        return pair(given)
    if given == "valid":
        return (0, 0)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
