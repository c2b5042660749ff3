"""Rewrite a chosen depthwise convolution into DR-form taps.

    conv2d(x, w, b, groups=C)  =>  fxprune::depthwise_taps(x, taps(w), mask, b, ...)
    conv1d(x, w, b, groups=C)  =>  squeeze(fxprune::depthwise_taps(unsqueeze(x), ...))

In inference the taps are packed once and become graph inputs; in training the live weight is the operand and the
operator reads only its kept taps, so the gradient of a pruned tap is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..context import Context, Decision
from ..graph import aten, call, replace
from ..match import Match
from ..sparsity import dcp
from ..sparsity.pattern import obeys
from ..weights import Fits


def rewrite_depthwise(gm: GraphModule, ctx: Context) -> int:
    """Return the number of depthwise convolutions rewritten."""
    chosen = [d for d in ctx.decisions if d.chosen and d.match.kind == "depthwise"]
    for decision in chosen:
        _rewrite(decision, ctx)
    return len(chosen)


def _rewrite(decision: Decision, ctx: Context) -> None:
    match = decision.match
    kept = torch.ones(match.matrix_shape, dtype=torch.bool) if decision.mask is None else decision.mask.mask
    words = dcp.tap_words(kept)
    view, on_gpu = match.view, match.on_gpu

    def build(weight: Tensor) -> tuple[Tensor, ...]:
        matrix = view.matrix(weight) * kept.to(weight.dtype)
        return matrix if on_gpu else matrix.float(), words  # the CPU kernels' type for any activations

    if ctx.inference:
        weight, taps = ctx.weights.derive(
            (f"{match.node.name}_taps", f"{match.node.name}_mask"), (match.weight,), build, keeps(match, kept, ctx)
        )
    else:
        (taps,) = ctx.weights.derive((f"{match.node.name}_mask",), (), lambda: (words,))
        weight = call(match.node, aten.reshape.default, match.weight, list(match.matrix_shape))
    target = torch.ops.fxprune.depthwise_taps.default
    new = call(match.node, target, as_image(match), weight, taps, ctx.bias(match), *match.geometry.windows, "none")
    replace(match.node, from_image(match, new))


def as_image(match: Match) -> Node:
    """Return the input of a convolution as (B, C, H, W): a one-dimensional one has height 1."""
    return call(match.node, aten.unsqueeze.default, match.x, 2) if match.value.dim() == 3 else match.x


def from_image(match: Match, new: Node) -> Node:
    """Give the result of :func:`as_image`'s operator the rank the convolution has."""
    return call(match.node, aten.squeeze.dim, new, 2) if match.value.dim() == 3 else new


def keeps(match: Match, kept: Tensor, ctx: Context) -> Fits | None:
    """Return whether a changed weight has no non-zero outside the mask it was packed with.

    A mask that came from ``options={"sparsity": ...}`` is applied instead: pruning was asked for.
    """
    view = match.view
    return None if ctx.config.prunes else lambda weight: obeys(view.matrix(weight), kept)
