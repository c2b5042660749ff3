"""Detect GEMMs with a constant weight: linear, addmm, mm, matmul by a weight, and 1x1 convolutions."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import argument, aten, is_call, shape
from ..match import Geometry, Match
from ..weights import qualified_name
from .match_conv import CONVOLUTIONS, convolution


def match_gemm(gm: GraphModule, ctx: Context) -> int:
    """Append a match per GEMM; returns 0, the graph is unchanged."""
    for node in gm.graph.nodes:
        found = convolution(node, ctx) if is_call(node, *CONVOLUTIONS) else _linear(node, ctx)
        if isinstance(found, Match) and found.kind in ("pointwise", "linear"):
            ctx.matches.append(found)
    return 0


def _linear(node: Node, ctx: Context) -> Match | None:
    operands: tuple[int, int | None]
    if is_call(node, aten.linear.default):
        (x, operand, *rest), operands, stored_nk = node.args, (0, 2), True
        bias = rest[0] if rest else None
    elif is_call(node, aten.mm.default, aten.matmul.default):
        (x, operand), bias, operands, stored_nk = node.args, None, (0, None), False
    elif is_call(node, aten.addmm.default) and len(node.args) == 3 and not node.kwargs:
        (bias, x, operand), operands, stored_nk = node.args, (1, 0), False
    else:
        return None
    weight, transposed = _weight(operand, stored_nk)
    value = ctx.weights.value(weight)
    if value is None or value.dim() != 2 or not value.numel():
        return None
    if not _activation(x, ctx) or not _bias_fits(bias, value, transposed):
        return None
    parameter = qualified_name(ctx.weights.origin(weight))
    return Match(
        kind="linear",
        node=node,
        operands=operands,
        weight=weight,
        name=parameter.rpartition(".")[0] or parameter,
        parameter=parameter,
        value=value,
        geometry=Geometry(shape(x) or (), shape(node) or ()),
        transposed=transposed,
    )


def _weight(operand: Any, stored_nk: bool) -> tuple[Any, bool]:
    """Look through a transpose of a weight; returns (weight node, whether it is stored (K, N))."""
    swapped = is_call(operand, aten.t.default)
    swapped |= is_call(operand, aten.permute.default) and list(argument(operand, "dims")) == [1, 0]
    swapped |= is_call(operand, aten.transpose.int) and sorted(argument(operand, d) % 2 for d in ("dim0", "dim1")) == [0, 1]
    if swapped:
        return operand.args[0], stored_nk
    return operand, not stored_nk


def _activation(x: Any, ctx: Context) -> bool:
    """True for a computed tensor of at least two dimensions (a constant operand is no activation)."""
    dims = shape(x)
    return dims is not None and len(dims) >= 1 and ctx.weights.value(x) is None


def _bias_fits(bias: Any, value: Any, transposed: bool) -> bool:
    """addmm broadcasts its first operand; only a vector over the output features is a bias."""
    if bias is None:
        return True
    features = value.shape[1] if transposed else value.shape[0]
    return shape(bias) == (features,)
