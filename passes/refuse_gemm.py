"""Say why a product with a weight is no match: the weight is computed in the graph, is no matrix, is empty, or stands on
the left, or the product is inside a transform of functorch.

linear(x, cat([wq, wk, wv]))   x @ w[H, K, N]   w @ x   einsum("bthd,hdo->bto", x, w)   vmap(linear)(x, w)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context, Refusal
from ..graph import TRANSPOSES, aten, is_call, name_of, shape, transformed
from ..weights import qualified_name
from .match_conv import EMPTY
from .normalize_gemm import ADDED, BATCHED, EINSUM, einsum_operands

_PRODUCTS = (*BATCHED, aten.linear.default, aten.mm.default, torch.mm, torch.matmul, operator.matmul, torch._C._nn.linear)
_TRANSFORMED = "it is inside a transform of functorch (vmap, grad, jvp), which our operators have no rule for"


def refuse_gemm(gm: GraphModule, ctx: Context) -> int:
    """Append a refusal per unmatched product with a parameter; returns 0, the graph is unchanged."""
    matched, inside = {m.node for m in ctx.matches}, transformed(gm.graph)
    sources: dict[Node, list[Node]] = {}  # of what is computed from the model's own tensors alone: those tensors
    for node in gm.graph.nodes:
        if ctx.weights.value(node) is not None:
            sources[node] = [node]
        elif node.op in ("call_function", "call_method") and node not in matched:
            if node.all_input_nodes and all(n in sources for n in node.all_input_nodes):
                sources[node] = list(dict.fromkeys(s for n in node.all_input_nodes for s in sources[n]))
            elif (operands := _operands(node)) is not None:
                _refuse(node, operands, sources, inside, ctx)
    return 0


def _operands(node: Node) -> list[Any] | None:
    """Return the two factors of a product."""
    if node.target in EINSUM:
        return einsum_operands(node)
    if node.target in _PRODUCTS:
        return list(node.args[:2])
    return list(node.args[1:3]) if node.target in ADDED else None


def _refuse(node: Node, operands: list[Any], sources: dict[Node, list[Node]], inside: set[Node], ctx: Context) -> None:
    for position, operand in enumerate(operands):
        own = [s for s in sources.get(operand, ()) if isinstance(ctx.weights.value(s), torch.nn.Parameter)]
        sizes = shape(operand)
        if not own or sizes is None:
            continue
        name = ", ".join(qualified_name(ctx.weights.origin(s)) for s in own)
        reason = _TRANSFORMED if node in inside else _reason(node, operand, position, ctx)
        ctx.refused.append(Refusal(name, "linear", "x".join(map(str, sizes)), reason))
        return


def _reason(node: Node, operand: Node, position: int, ctx: Context) -> str:
    value = ctx.weights.value(operand)
    if node.target in EINSUM:
        return f"einsum {node.args[0]!r} is no product with one matrix"
    if value is None and not _is_view(operand):
        return f"its weight is computed in the graph by {name_of(operand)}"
    if len(shape(operand) or ()) != 2:
        return f"its weight has {len(shape(operand) or ())} dimensions; a matrix is expected"
    if 0 in (shape(operand) or ()):
        return EMPTY
    if position == 0:
        return "the weight is the left factor of the product; x @ w and linear are matched"
    return f"{name_of(node)} with these operands is not matched"


def _is_view(node: Node) -> bool:
    return is_call(node, *TRANSPOSES)
