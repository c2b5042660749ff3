"""Linear layers of a transformer whose others run sparse: one that is a little slower than dense alone joins them.

In inference, in bfloat16 on a CPU, they run as one region with the attentions between them (``lowering/sequence.py``). A
layer that stays dense would cut it in two, with a transpose on either side.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..context import Context, Decision
from ..graph import name_of

_SLOWER = 1.3  # of its dense time: less than a call and two transposes beside a region take


def join_sequences(ctx: Context) -> int:
    """Return the number of layers that join; only where at least half of them are chosen without it."""
    mine = [d for d in ctx.decisions if _is_part(d)]
    if not ctx.inference or not mine or 2 * sum(d.chosen for d in mine) < len(mine) or not _attends(mine[0]):
        return 0
    kernel = next(d.kernel for d in mine if d.chosen)
    joining = {id(d) for d in mine if not d.chosen and d.timing is not None and d.timing.sparse <= _SLOWER * d.timing.dense}

    def joined(d: Decision) -> Decision:
        why = f"joins its transformer's region: {d.reason.removeprefix('kept dense: ')}"
        return replace(d, chosen=True, kernel=kernel, reason=why)

    ctx.decisions = [joined(d) if id(d) in joining else d for d in ctx.decisions]
    return len(joining)


def _is_part(decision: Decision) -> bool:
    match = decision.match
    on_cpu = match.value.device.type == "cpu" and match.value.dtype == torch.bfloat16
    return match.kind == "linear" and decision.mask is not None and on_cpu and len(match.geometry.x) == 3


def _attends(decision: Decision) -> bool:
    """True when the graph around a layer holds an attention."""
    nodes = decision.match.node.graph.nodes
    return any(n.op == "call_function" and name_of(n) == "scaled_dot_product_attention" for n in nodes)
