"""Rewrite a chosen depthwise convolution into DR-form taps.

    conv2d(x, w, b, groups=C)  =>  fxprune::depthwise_taps(x, taps(w), mask, b, ...)

In inference the taps are packed once and become graph inputs; in training the live weight is the operand and the
operator reads only its kept taps, so the gradient of a pruned tap is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..context import Context, Decision
from ..graph import aten, call, replace
from ..sparsity import dcp


def rewrite_depthwise(gm: GraphModule, ctx: Context) -> int:
    """Return the number of depthwise convolutions rewritten."""
    chosen = [d for d in ctx.decisions if d.chosen and d.match.kind == "depthwise"]
    for decision in chosen:
        _rewrite(decision, ctx)
    return len(chosen)


def _rewrite(decision: Decision, ctx: Context) -> None:
    match, g = decision.match, decision.match.geometry
    kept = torch.ones(match.matrix_shape, dtype=torch.bool) if decision.mask is None else decision.mask.mask
    words = dcp.tap_words(kept)

    def build(weight: Tensor) -> tuple[Tensor, ...]:
        return match.matrix(weight) * kept.to(weight.dtype), words

    if ctx.inference:
        weight, taps = ctx.weights.derive(
            (f"{match.node.name}_taps", f"{match.node.name}_mask"), (match.weight,), exact(build, match, kept, ctx)
        )
    else:
        (taps,) = ctx.weights.derive((f"{match.node.name}_mask",), (), lambda: (words,))
        weight = call(match.node, aten.reshape.default, match.weight, list(match.matrix_shape))
    windows = [list(g.kernel), list(g.stride), list(g.padding), list(g.dilation)]
    target = torch.ops.fxprune.depthwise_taps.default
    replace(match.node, call(match.node, target, match.x, weight, taps, match.bias, *windows, "none"))


def exact(build, match, kept, ctx):  # type: ignore[no-untyped-def]
    """Make a repack fail when the weight has a non-zero outside the mask it was packed with.

    A mask that came from ``options={"sparsity": ...}`` is applied instead: pruning was asked for.
    """
    from ..weights import StructureChanged

    def checked(weight: Tensor) -> tuple[Tensor, ...]:
        if not ctx.config.prunes and torch.count_nonzero(match.matrix(weight)[~kept]).item():
            raise StructureChanged
        return build(weight)

    return checked
