"""Detect depthwise convolutions: a constant weight (C, 1, KH, KW) or (C, 1, K) and groups == C > 1."""

from __future__ import annotations

from torch.fx import GraphModule

from ..context import Context
from ..graph import is_call
from ..match import Match
from .match_conv import CONVOLUTIONS, convolution


def match_depthwise(gm: GraphModule, ctx: Context) -> int:
    """Append a match per depthwise convolution; returns 0, the graph is unchanged."""
    for node in gm.graph.nodes:
        found = convolution(node, ctx) if is_call(node, *CONVOLUTIONS) else None
        if isinstance(found, Match) and found.kind == "depthwise":
            ctx.matches.append(found)
    return 0
