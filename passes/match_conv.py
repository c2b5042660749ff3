"""Detect convolutions, and say why the others stay dense.

One classification for all: depthwise (its own pass), 1x1 without padding ("pointwise", "linear" on one pixel; the GEMM
pass), and the rest, larger windows and groups, as kind "conv". A one-dimensional convolution is described as the
two-dimensional one of height 1. Whatever no pass matched and that multiplies by a weight becomes a
:class:`~fxprune.context.Refusal`.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..context import Context, Refusal
from ..graph import argument, aten, is_call, name_of, pair, shape
from ..match import Geometry, Match
from ..weights import qualified_name

CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default, aten.conv1d.padding)
EMPTY = "its weight has no elements"
_NEVER = {
    "conv3d": "there is no kernel for three-dimensional convolutions",
    "conv_transpose1d": "there is no kernel for transposed convolutions",
    "conv_transpose2d": "there is no kernel for transposed convolutions",
    "conv_transpose3d": "there is no kernel for transposed convolutions",
    "conv1d": "the call has an argument in a form that is not understood",
    "conv2d": "the call has an argument in a form that is not understood",
}


def match_conv(gm: GraphModule, ctx: Context) -> int:
    """Append a match per convolution of kind "conv", and a refusal per convolution nobody matched; returns 0."""
    for node in gm.graph.nodes:
        if is_call(node, *CONVOLUTIONS):
            found = convolution(node, ctx)
            if isinstance(found, str):
                ctx.refused.append(_refusal(node, argument(node, "weight"), "conv", found, ctx))
            elif found.kind == "conv":
                ctx.matches.append(found)
    matched = {m.node for m in ctx.matches}
    for node in gm.graph.nodes:
        if node not in matched and not is_call(node, *CONVOLUTIONS):
            _refuse(node, ctx)
    return 0


def convolution(node: Node, ctx: Context) -> Match | str:
    """Return the match of one convolution, or the reason there is none."""
    x, weight = argument(node, "input"), argument(node, "weight")
    value, dims = ctx.weights.value(weight), shape(x)
    if value is None:
        return "its weight is computed in the graph"
    if not value.numel():
        return EMPTY
    if dims is None or len(dims) != value.dim():
        return "its input has no batch dimension"
    one = value.dim() == 3
    kernel = (1, value.shape[2]) if one else (value.shape[2], value.shape[3])
    stride, dilation = (_window(argument(node, name), one, 1) for name in ("stride", "dilation"))
    padding = _padding(argument(node, "padding"), one, kernel, dilation)
    if padding is None:
        return 'padding="same" pads one side more than the other here'
    groups = argument(node, "groups")
    parameter = qualified_name(ctx.weights.origin(weight))
    return Match(
        kind=_kind(x, value.shape[0], value.shape[1], groups, kernel, padding),
        node=node,
        operands=(0, 2),
        weight=weight,
        name=parameter.rpartition(".")[0] or parameter,
        parameter=parameter,
        value=value,
        geometry=Geometry(_image(dims), _image(shape(node) or ()), kernel, stride, padding, dilation, groups),
    )


def _kind(x: Node, out: int, channels: int, groups: int, kernel: tuple[int, int], padding: tuple[int, int]) -> str:
    if channels == 1 and groups == out and groups > 1:
        return "depthwise"
    if groups != 1 or kernel != (1, 1) or padding != (0, 0):
        return "conv"
    dims = shape(x) or ()
    # a 1x1 convolution of a 1x1 map (squeeze-and-excite, a head after pooling) is a linear layer
    one_pixel = len(dims) == 4 and all(statically_known_true(size == 1) for size in dims[2:])
    return "linear" if one_pixel else "pointwise"


def _window(given: Any, one: bool, above: int) -> tuple[int, int]:
    return (above, pair(given)[0]) if one else pair(given)


def _image(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*dims[:2], 1, *dims[2:]) if len(dims) == 3 else dims


def _padding(given: Any, one: bool, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int] | None:
    """Return symmetric padding; ``None`` for a "same" that pads one side more."""
    if not isinstance(given, str):
        return _window(given, one, 0)
    if given == "valid":
        return (0, 0)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)


def _refuse(node: Node, ctx: Context) -> None:
    """Record a convolution that no pass matched."""
    if node.op != "call_function":
        return
    name = name_of(node)
    operands = [*node.args, *node.kwargs.values()]
    if name in _NEVER:
        weight = operands[1] if len(operands) > 1 else None
        ctx.refused.append(_refusal(node, weight, name, _NEVER[name], ctx))


def _refusal(node: Node, weight: Any, kind: str, reason: str, ctx: Context) -> Refusal:
    known = ctx.weights.value(weight) is not None
    parameter = qualified_name(ctx.weights.origin(weight)) if known else node.name
    sides = [shape(node.args[0]) if node.args else None, (shape(node) or ())[1:]]
    text = "->".join("x".join(map(str, side)) for side in sides if side)
    return Refusal(parameter.rpartition(".")[0] or parameter, kind, text, reason)
