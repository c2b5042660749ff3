"""Why ``prune`` leaves a layer that was found: something that is no prunable layer reads its weight, or it is no parameter.

A weight that an embedding shares with the head would lose rows of the embedding, too. Zeros that are there already are
another matter: the head may read them packed while the embedding reads the weight itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.fx import Node

from fxprune.context import Context
from fxprune.graph import name_of
from fxprune.match import Match

Row = tuple[str, str, str, str]  # layer, kind, shape, reason


def other_readers(contexts: Iterable[Context]) -> dict[int, str]:
    """Return, by id of a parameter or buffer, an operation that reads it and is no match, in any graph of the model."""
    found: dict[int, str] = {}
    for ctx in contexts:
        matched = {m.node for m in ctx.matches}
        for node, value in ctx.weights.given():
            reader = _other_reader(node, matched)
            if reader is not None:
                found.setdefault(id(value), reader)
    return found


def _other_reader(weight: Node, matched: set[Node]) -> str | None:
    stack, seen = list(weight.users), set()
    while stack:
        node = stack.pop()
        if node in matched or node in seen:
            continue
        seen.add(node)
        name = name_of(node)
        if name in ("transpose", "permute", "t"):
            stack.extend(node.users)
        else:
            return "the output of the graph" if node.op == "output" else name
    return None


def why_left(match: Match, ctx: Context, readers: dict[int, str]) -> str | None:
    """Return why a match must not be pruned, ``None`` when it may be."""
    value = ctx.weights.value(ctx.weights.origin(match.weight))
    if not isinstance(value, nn.Parameter):
        joined = ctx.weights.origin(match.weight) is match.weight and ctx.weights.is_derived(match.weight)
        return "its weight is computed from several parameters" if joined else "its weight is not a parameter"
    reader = readers.get(id(value))
    return None if reader is None else f"its weight is also read by {reader}"


def may_prune(ctx: Context) -> list[Match]:
    """Return the matches of one graph that may be pruned."""
    readers = other_readers([ctx])
    return [match for match in ctx.matches if why_left(match, ctx, readers) is None]


def left_rows(contexts: Sequence[Context], pruned: set[str]) -> list[Row]:
    """Return a row for every layer that was found but is not among the ``pruned`` parameters."""
    readers = other_readers(contexts)
    rows: dict[str, Row] = {}
    for ctx in contexts:
        for match in ctx.matches:
            if match.parameter not in pruned:
                reason = why_left(match, ctx, readers) or "not asked for"
                shape = "x".join(map(str, match.value.shape))
                rows.setdefault(match.parameter, (match.name, match.kind, shape, reason))
        for refusal in ctx.refused:
            rows.setdefault(refusal.name, (refusal.name, refusal.kind, refusal.shape, refusal.reason))
    return list(rows.values())
