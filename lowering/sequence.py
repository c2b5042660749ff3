"""Run a transformer's layers feature-major, (B, T, C) as (B, C, T), so that they become one region.

    linear -> view, transpose -> attention -> transpose, view -> linear + x -> layer_norm
        =>  tile_gemm(1) -> fxprune::attention -> tile_gemm(1) -> channel_norm

Tokens then lie in the lanes of vectors: kept rows of a product are whole lines, and neither softmax nor normalisation adds
up across lanes. Where values come from or go to other nodes they are transposed, so a part of the graph is taken only if
it holds an attention for every two of these borders. In inference, in bfloat16, on the CPU, with tokens enough to fill the
lanes; the attention has one size of heads, no dropout, and a mask that all heads share or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..cost import hint
from ..graph import aten, call, equal_sizes, fake, is_call, mutates, name_of, shape, sole_user
from . import library, sdpa

_GEMM = torch.ops.fxprune.tile_gemm.default
_NORM = aten.layer_norm.default
_FEATURE_DIM, _RESIDUAL = 10, 6
_ISAS = ("amx", "avx512_bf16")  # elsewhere torch's attention has the better products
_LANES = 32
_COPIES = ("view", "reshape", "flatten", "contiguous", "clone")


@dataclass(frozen=True)
class _Attention:
    """q, k, v: (B, T, heads * D), before heads are cut. path: the views between them and the attention."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    heads: int
    scale: float
    path: tuple[Node, ...]


_Attentions = dict[Node, _Attention]  # by result, (B, T, heads * D)


def feature_major_sequences(gm: GraphModule, ctx: Context) -> int:
    """Return the number of attentions that run feature-major."""
    if not ctx.inference or library.isa() not in _ISAS:
        return 0
    attentions = {result: found for node in gm.graph.nodes for result, found in _attention(node)}
    members = [n for n in gm.graph.nodes if n in attentions or _is_member(n, ctx)]
    done = 0
    for part in _parts(members, attentions):
        inside = [n for n in part if n in attentions]
        entries, exits = _borders(part, attentions)
        if inside and len(entries) + len(exits) <= 2 * len(inside):
            _rewrite(part, exits, attentions)
            done += len(inside)
    return done


def _is_sequence(node: Any) -> bool:
    """A (B, T, C) tensor with tokens enough."""
    value = fake(node)
    if value is None or value.dim() != 3 or value.dtype != torch.bfloat16 or value.device.type != "cpu":
        return False
    tokens = hint(value.shape[1])
    return 4 * tokens >= 3 * _LANES * -(-tokens // _LANES)


def _is_member(node: Node, ctx: Context) -> bool:
    if not _is_sequence(node):
        return False
    if is_call(node, _GEMM):
        return bool(node.args[_FEATURE_DIM] == -1)
    if not is_call(node, _NORM):
        return False
    sizes: Any = node.args[1]
    affine = [w for w in node.args[2:4] if w is not None]
    return len(sizes) == 1 and all(isinstance(w, Node) and ctx.weights.value(w) is not None for w in affine)


def _attention(node: Node) -> Iterator[tuple[Node, _Attention]]:
    """Yield the (B, T, heads * D) result of an attention, and the attention."""
    given = sdpa.given(node)
    if given is None:
        return
    *operands, mask, scale = given
    paths = [_joined_heads(operand) for operand in operands]
    result, sizes = _result(node), shape(operands[0])
    if result is None or sizes is None or not all(paths) or not isinstance(sizes[1], int):
        return
    q, k, v = (path[0] for path in paths)
    if not (mask is None or _is_shared(mask, shape(q), shape(k))):
        return
    if (
        all(map(_is_sequence, (q, k, v, result)))
        and equal_sizes(shape(k), shape(v))
        and equal_sizes(shape(q), shape(result))
    ):
        yield result, _Attention(q, k, v, mask, sizes[1], scale, tuple(n for path in paths for n in path[1:]))


def _joined_heads(swap: Any) -> tuple[Node, ...]:
    """Return x and the two views of ``swap`` = transpose(reshape(x, (B, T, heads, D)), 1, 2), which nothing else reads."""
    if not _swaps(swap) or len(swap.users) != 1 or name_of(cut := swap.args[0]) not in ("view", "reshape", "unflatten"):
        return ()
    whole, sizes = shape(cut.args[0]), shape(cut)
    if len(cut.users) != 1 or whole is None or sizes is None or len(whole) != 3 or len(sizes) != 4:
        return ()
    return (cut.args[0], cut, swap) if equal_sizes((*sizes[:2], sizes[2] * sizes[3]), whole) else ()


def _swaps(node: Any) -> bool:
    return is_call(node, aten.transpose.int) and sorted(d % 4 for d in node.args[1:]) == [1, 2]  # type: ignore[operator]


def _result(attention: Node) -> Node | None:
    """Follow transpose(1, 2) and the reshape to (B, T, heads * D), whatever copies lie around."""
    found = sole_user(attention)
    while found is not None and name_of(found) in _COPIES and equal_sizes(shape(found), shape(attention)):
        found = sole_user(found)
    if found is None or not _swaps(found):
        return None
    batch, tokens, heads, depth = shape(found) or (0, 0, 0, 0)
    while len(shape(found) or ()) == 4:
        found = sole_user(found)
        if found is None or name_of(found) not in _COPIES:
            return None
    while (after := sole_user(found)) is not None and name_of(after) == "contiguous":
        found = after
    return found if equal_sizes(shape(found), (batch, tokens, heads * depth)) else None


def _is_shared(mask: Any, q: Any, k: Any) -> bool:
    """A mask (B or 1, 1, queries or 1, keys or 1), to be added or of booleans."""
    value = fake(mask)
    if value is None or value.dim() != 4 or value.dtype not in (torch.bool, torch.bfloat16):
        return False
    pairs = zip(value.shape, (q[0], 1, q[1], k[1]), strict=True)
    return all(equal_sizes([a], [b]) or (equal_sizes([a], [1]) and d != 1) for d, (a, b) in enumerate(pairs))


def _operands(node: Node, attentions: _Attentions) -> list[Node]:
    if node in attentions:
        found = attentions[node]
        return [found.q, found.k, found.v]
    operands = [node.args[0], node.args[_RESIDUAL] if is_call(node, _GEMM) else None]
    return [n for n in operands if isinstance(n, Node)]


def _parts(members: list[Node], attentions: _Attentions) -> Iterator[list[Node]]:
    """Yield what hangs together, in graph order, without the norms in front."""
    root = {n: n for n in members}

    def find(node: Node) -> Node:
        while root[node] is not node:
            node = root[node]
        return node

    for node in members:
        for operand in _operands(node, attentions):
            if operand in root:
                root[find(node)] = find(operand)
    groups: dict[Node, list[Node]] = {}
    for node in members:
        groups.setdefault(find(node), []).append(node)
    for part in groups.values():
        while part and is_call(part[0], _NORM):
            part.pop(0)
        yield part


def _inside(part: list[Node], attentions: _Attentions) -> set[Node]:
    return {*part, *(n for node in part if node in attentions for n in attentions[node].path)}


def _borders(part: list[Node], attentions: _Attentions) -> tuple[set[Node], set[Node]]:
    """Return the values that come from outside, and those that are read there."""
    inside = _inside(part, attentions)
    entries = {operand for node in part for operand in _operands(node, attentions) if operand not in inside}
    return entries, {node for node in part if any(user not in inside for user in node.users)}


def _rewrite(part: list[Node], exits: set[Node], attentions: _Attentions) -> None:
    moved: dict[Node, Node] = {}
    masks: dict[Node, Node] = {}
    for node in part:
        for operand in _operands(node, attentions):
            if operand not in moved:
                moved[operand] = _transposed(node, operand)
        if node in attentions:
            moved[node] = _attend(node, attentions[node], moved, masks)
        elif is_call(node, _GEMM):
            arguments: list[Any] = [moved.get(a, a) if isinstance(a, Node) else a for a in node.args]
            arguments[_FEATURE_DIM] = 1
            moved[node] = call(node, _GEMM, *arguments)
        else:
            weight, bias = [*node.args[2:4], None, None][:2]
            eps = node.args[4] if len(node.args) > 4 else 1e-5
            moved[node] = call(node, torch.ops.fxprune.channel_norm.default, moved[node.args[0]], weight, bias, eps)  # type: ignore[index]
    inside = _inside(part, attentions)
    order = {node: number for number, node in enumerate(part[0].graph.nodes)}
    for node in exits:
        first = min((user for user in node.users if user not in inside), key=order.__getitem__)
        back = _transposed(first, moved[node])  # as late as can be: what leaves a region ends it
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user not in inside)
    _erase(part)


def _erase(nodes: list[Node]) -> None:
    """Erase what nothing reads, and what was computed for it alone."""
    left, erased = list(nodes), set()
    while left:
        node = left.pop()
        if node in erased or node.users or node.op not in ("call_function", "call_method") or mutates(node):
            continue
        left.extend(node.all_input_nodes)
        node.graph.erase_node(node)
        erased.add(node)


def _attend(node: Node, found: _Attention, moved: dict[Node, Node], masks: dict[Node, Node]) -> Node:
    if found.mask is not None and found.mask not in masks:
        masks[found.mask] = _added(node, found.mask, found)
    mask = None if found.mask is None else masks[found.mask]
    operands = (moved[found.q], moved[found.k], moved[found.v], mask, found.heads, found.scale)
    return call(node, torch.ops.fxprune.attention.default, *operands)


def _transposed(anchor: Node, x: Node) -> Node:
    return call(anchor, aten.contiguous.default, call(anchor, aten.transpose.int, x, 1, 2))


def _added(anchor: Node, mask: Node, found: _Attention) -> Node:
    """Return a mask as (B, keys, queries), to be added."""
    batch, queries, _ = shape(found.q) or (0, 0, 0)
    keys, value = (shape(found.k) or (0, 0, 0))[1], fake(mask)
    if value is not None and value.dtype == torch.bool:
        mask = call(anchor, aten.to.dtype, sdpa.added(anchor, mask), torch.bfloat16)
    wide = call(anchor, aten.expand.default, mask, [batch, 1, queries, keys])
    return _transposed(anchor, call(anchor, aten.squeeze.dim, wide, 1))
