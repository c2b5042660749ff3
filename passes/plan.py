"""Decide, match by match: the mask, and sparse or dense. The only pass that reads weight values.

The mask is the attached plan's where the weight still obeys it; otherwise, in inference, the zeros that are
there. In training a plan's mask is part of the function; zeros without a plan are left alone, because they may be a
zero-initialised layer that must train. Convolutions are decided by region: our kernels run feature-major (NCHW) and
every border to a channels-last kernel is a copy, so one 1x1 layer does not leave the region alone. Linear layers between
two permutes that would cancel are 1x1 convolutions of their region, and leave it together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context, Decision, Kernels, Measure, Timing
from ..errors import ConfigError
from ..graph import fake, name_of
from ..left import may_prune, other_readers, why_left
from ..match import Match
from ..plan import PrunedWeight, lookup
from ..planner import Choice, choose_masks, pattern_of
from ..sparsity import dcp, refit, tile
from ..sparsity.elements import elements
from ..sparsity.found import describe, forms, halved
from ..sparsity.pattern import LayerMask, kept, obeys, share
from ..staircase import choose_levels
from .join_sequences import join_sequences
from .plan_rnn import Found, decide_recurrent, recurrent_layers
from .regions import as_convolutions, by_image, chained, regions
from .split_batch import split_batch

# below this fraction of zeros a weight counts as dense: timing noise is larger than the gain
_MIN_SPARSITY = 0.05
# a dense convolution between feature-major kernels also pays for its own reorders, which its timing does not show
_LEAVE_REGION = 1.3
# a kernel this small is mostly the cost of its call, which it loses inside a region
_JOIN_REGION = 3.0
_CALL = 80.0  # microseconds that a call beside a region costs beyond its kernel: its thread start, its dispatch, cold caches
_OPERATOR = {
    "depthwise": "depthwise_taps",
    "pointwise": "tile_gemm",
    "conv": "tile_conv",
    "linear": "tile_gemm",
    "rnn": "rnn_steps",
}


def plan(gm: GraphModule, ctx: Context) -> int:
    """Append one decision per match; returns 0, the graph is unchanged."""
    wanted = _masks_from_options(ctx)
    chains = chained(ctx.matches)
    convolutions = as_convolutions(chains)

    def in_layout(measure: Measure) -> Context:
        def timed(match: Match, *given: Any) -> Timing:
            return measure(convolutions.get(match, match), *given)

        return replace(ctx, measure=timed, decisions=[])

    found = {m: _mask(m, in_layout(ctx.measure), wanted) for m in ctx.matches}

    def decide(measure: Measure) -> list[Decision]:
        trial = in_layout(measure)
        _decide(found, chains, trial)
        return trial.decisions

    measure = ctx.measure
    split = split_batch(ctx, decide)
    if split is not None:
        ctx.side, measure = split
    readers = other_readers([ctx])
    ctx.decisions = [_explained(d, why_left(d.match, ctx, readers)) for d in decide(measure)]
    return 0


def _decide(found: Mapping[Match, Found], chains: list[list[Match]], ctx: Context) -> None:
    recurrent = [m for m in ctx.matches if m.recurrent is not None]
    together = {match: members for members in chains for match in members}
    convs = [m for m in ctx.matches if m in together or m.kind not in ("linear", "rnn")]
    for region in regions(convs):
        _decide_region(region, found, together, ctx)
    linears = [m for m in ctx.matches if m.kind == "linear" and m not in together]
    for match in sorted(linears, key=lambda m: found[m][1] is None):  # those without zeros join what was chosen
        _decide_alone(match, *found[match], ctx)
    for layer in recurrent_layers(recurrent):
        decide_recurrent(layer, [found[m] for m in layer], _refusal, ctx)
    order = {m.node: i for i, m in enumerate(ctx.matches)}
    ctx.decisions.sort(key=lambda d: order[d.match.node])
    join_sequences(ctx)


def _explained(decision: Decision, left: str | None) -> Decision:
    """Say of a weight without zeros why ``prune`` will not give it any."""
    if decision.mask is not None or decision.chosen or left is None:
        return decision
    return replace(decision, reason=f"{decision.reason}, and prune leaves it: {left}")


def _masks_from_options(ctx: Context) -> dict[str, Choice]:
    levels = ctx.extra.get("levels")
    if levels is not None:  # found for a target speed
        return choose_levels(ctx.matches, ctx.config, ctx.kernels.units(ctx.matches), levels)
    if ctx.config.sparsity is None:
        return {}
    if any(pattern_of(match, ctx.config) == "channel" for match in ctx.matches):
        expected = 'fxprune.prune(model, ..., pattern="channel") before compiling: it also zeroes BatchNorm and biases'
        raise ConfigError(name="pattern", given=ctx.config.pattern, expected=expected)
    return choose_masks(may_prune(ctx), ctx.config, ctx.kernels.units(ctx.matches))


def _mask(match: Match, ctx: Context, wanted: Mapping[str, Choice]) -> tuple[str, LayerMask | None]:
    """Return (pattern name, mask); the mask is ``None`` for a weight that stays dense."""
    if match.parameter in wanted:
        choice = wanted[match.parameter]
        layer = _as_read(choice.layer, choice.match.restore(choice.layer.mask), match)
        return choice.pattern, _form(match, layer.mask, layer, False, ctx)
    parameter = ctx.weights.value(ctx.weights.origin(match.weight))
    planned = None if parameter is None else lookup(parameter)
    matrix = match.matrix(match.value.detach()).cpu()  # masks live on the CPU
    if planned is not None:
        layer = _cut(planned, match, ctx)
        if ctx.kept.get(match.weight) and layer.share > 1.0 - _MIN_SPARSITY:
            return "", None
        if not ctx.inference or obeys(matrix, layer.mask):
            return planned.pattern, _form(match, layer.mask, layer, ctx.inference, ctx)
    if not ctx.inference:
        return "", None
    if 1.0 - share(matrix) < _MIN_SPARSITY:
        return "", None
    if match.kind == "depthwise":
        return "found", dcp.infer(matrix)
    mask = matrix != 0  # -0.0 is zero, NaN is not
    name = describe(mask, match.tile_width(_native(match, ctx)), _drops(match))
    return f"found {name}", _form(match, mask, None, True, ctx)


def _cut(planned: PrunedWeight, match: Match, ctx: Context) -> LayerMask:
    """Return the mask of a plan without the channels that were cut out of the graph."""
    cuts = ctx.kept.get(match.weight)
    if not cuts:
        return _as_read(planned.layer, planned.mask, match)
    mask = planned.mask
    for axis, index in cuts:
        mask = mask.index_select(axis, index)
    return refit(match.matrix(mask), planned.layer.tiling.granularity, match.kind == "depthwise", _drops(match))


def _as_read(layer: LayerMask, mask: torch.Tensor, match: Match) -> LayerMask:
    """Return the form of a mask, bool of the weight's shape, that a match reads.

    layer: what was planned for the weight; where that was for a call that reads its transpose, single elements.
    """
    n, k = match.matrix_shape
    read = match.matrix(mask)
    same = layer.tiling.shape == (n, k) and (n != k or torch.equal(read, layer.mask) or not kept(read & ~layer.mask))
    return layer if same else elements(read)


def _native(match: Match, ctx: Context) -> int:
    return ctx.kernels.unit(match.kind, match.value.dtype, match.value.device).width(match.matrix_shape[0])


def _drops(match: Match) -> bool:
    """True when output features may go: a tile of a grouped convolution lies in one group."""
    return match.geometry.groups == 1


def _form(match: Match, mask: torch.Tensor, planned: LayerMask | None, covers: bool, ctx: Context) -> LayerMask | None:
    """Return what a mask runs as: the plan's own tiles, tiles that cover it, or single elements; the fastest of few."""
    if match.kind == "depthwise" and planned is not None:
        return planned
    native = _native(match, ctx)
    narrow = [native // 2] if match.kind in ("pointwise", "conv") else []
    widths = [match.tile_width(g) for g in (*narrow, native, 2 * native, 4 * native, 128)]
    candidates = forms(mask, widths, planned, covers, _drops(match))
    if covers and _may_be_halved(match, ctx):
        candidates += filter(None, [halved(mask, match.tile_width(native), planned, _drops(match))])
    if not candidates:
        return None
    if covers and match.kind in ("pointwise", "conv") and candidates[0].tiling.granularity == 1:
        # no cover is much narrower than the layer; wide tiles that keep everything may beat single elements all the same
        candidates.append(tile.keep_all(match.matrix_shape, match.tile_width(native)))
    if len(candidates) == 1 or match.recurrent is not None or _refusal(match, candidates[0], ctx):
        return candidates[0]
    return min(candidates, key=lambda layer: ctx.measure(match, layer).sparse * _handicap(match, layer))


def _handicap(match: Match, layer: LayerMask) -> float:
    """What a form costs beyond its own time: single elements do not run as a part of a block of the network."""
    return 1.25 if layer.tiling.granularity == 1 and match.kind == "pointwise" else 1.0


def _may_be_halved(match: Match, ctx: Context) -> bool:
    """True where a product on sparse tensor cores is a form of the layer: of a GPU, in 16 bits, without a window."""
    halves = match.value.dtype in (torch.float16, torch.bfloat16)
    return ctx.inference and match.on_gpu and halves and match.kind in ("linear", "pointwise")


def unsupported(match: Match, kernels: Kernels) -> str | None:
    """Return why no compiled kernel runs a match, ``None`` when one does."""
    return kernels.supports(_OPERATOR[match.kind], match)


def _refusal(match: Match, mask: LayerMask | None, ctx: Context) -> str | None:
    """Return why a match cannot run sparse at all, ``None`` when it can."""
    reason = ctx.extra.get("dense_reason") or unsupported(match, ctx.kernels)
    reason = reason or _layout_refusal(match)
    return _type_refusal(match, ctx) if reason is None and mask is not None else reason


def _layout_refusal(match: Match) -> str | None:
    """Our results are contiguous; where eager's are not, code that addresses memory would read other elements."""
    result = fake(match.node)
    if result is None or result.is_contiguous() or not any(map(_addresses_memory, match.node.graph.nodes)):
        return None
    return "its result is channels-last and the graph addresses memory (as_strided, or a view beside in-place writes)"


def _addresses_memory(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and name_of(node) in ("view", "view_as", "as_strided")


def _type_refusal(match: Match, ctx: Context) -> str | None:
    """A kernel has one type for input, weight and result; autocast mixes them."""
    value, x, result = ctx.weights.value(match.weight), fake(match.x), fake(match.node)
    if value is None or x is None:
        return "the weight is not a constant of this graph"
    types = (x.dtype, value.dtype, value.dtype if result is None else result.dtype)
    return None if len(set(types)) == 1 else "input, weight and result have the types {}, {} and {}".format(*types)


def _decide_alone(match: Match, pattern: str, mask: LayerMask | None, ctx: Context) -> None:
    refusal = _refusal(match, mask, ctx)
    if mask is None and not refusal and _joins_region(match) and any(d.chosen for d in ctx.decisions):
        timing = ctx.measure(match, None)
        if match.value.dim() == 4:
            chosen = timing.sparse <= _JOIN_REGION * timing.dense
        else:
            chosen = (timing.sparse - _CALL) * ctx.config.min_speedup <= timing.dense
        gain = f"no zeros, one row per image beside the region: {timing.dense / max(timing.sparse, 1e-9):.2f}x of dense"
        ctx.decisions.append(_decision(match, None, chosen, timing, "", gain))
        return
    if mask is None or refusal:
        ctx.decisions.append(Decision(match, mask, False, refusal or _whole(match, pattern, ctx), pattern=pattern))
        return
    timing = ctx.measure(match, mask)
    chosen = timing.sparse * ctx.config.min_speedup <= timing.dense
    ctx.decisions.append(_decision(match, mask, chosen, timing, pattern))


def _whole(match: Match, pattern: str, ctx: Context) -> str:
    """Return why a weight counts as one without zeros."""
    if pattern:
        return "its zeros leave no row of a tile"
    return "its zeros were cut out with their channels" if ctx.kept.get(match.weight) else "no zeros"


def _joins_region(match: Match) -> bool:
    """One row per image: a 1x1 convolution of a 1x1 map (squeeze-and-excite) or a classifier behind the pooling."""
    return match.value.dim() == 4 or len(match.geometry.x) == 2


def _decision(match: Match, mask: LayerMask | None, chosen: bool, timing: Timing, pattern: str, why: str = "") -> Decision:
    gain = timing.dense / max(timing.sparse, 1e-9)
    if not why:
        why = f"{gain:.2f}x of dense" + ("" if timing.measured else " (predicted)")
        why += ", two in four on sparse tensor cores" if mask is not None and mask.halved else ""
        why = why if chosen else f"kept dense: {why}"
    kernel = f"{_OPERATOR[match.kind]}" if chosen else "dense"
    return Decision(match, mask, chosen, why, timing, pattern, kernel)


def _decide_region(
    region: list[Match], found: Mapping[Match, Found], together: Mapping[Match, list[Match]], ctx: Context
) -> None:
    refusals = {m.node: _refusal(m, found[m][1], ctx) for m in region}
    if all(found[m][1] is None and not ctx.kept.get(m.weight) for m in region):
        for match in region:
            pattern = found[match][0]
            why = _whole(match, pattern, ctx)
            ctx.decisions.append(Decision(match, None, False, refusals[match.node] or why, pattern=pattern))
        return
    timed = partial(by_image, ctx.measure) if ctx.inference and len(region) > 1 else ctx.measure
    timings = {m.node: timed(m, found[m][1]) for m in region if refusals[m.node] is None}
    ours = dense = 0.0
    for match in region:
        timing = timings.get(match.node)
        if timing is None:
            continue
        ours += min(timing.sparse, timing.dense_feature_major)
        dense += timing.dense
    wins = bool(timings) and ours * ctx.config.min_speedup <= dense
    gain = dense / max(ours, 1e-9)
    for match in region:
        pattern, mask = found[match]
        timing = timings.get(match.node)
        if timing is None:
            ctx.decisions.append(Decision(match, mask, False, refusals[match.node] or "", pattern=pattern))
            continue
        if not wins:
            why = f"kept dense: its region of {len(region)} layers reaches {gain:.2f}x of dense"
            ctx.decisions.append(_decision(match, mask, False, timing, pattern, why))
            continue
        leaving = [t for m in together.get(match, [match]) if (t := timings.get(m.node)) is not None]
        stay = sum(t.sparse for t in leaving) * min(ctx.config.min_speedup, 1.0)  # below 1, it forces kernels here too
        chosen = stay <= _LEAVE_REGION * sum(t.dense_feature_major for t in leaving)
        why = f"{timing.dense / max(timing.sparse, 1e-9):.2f}x of dense"
        why += "" if timing.measured else " (predicted)"
        if mask is None:
            why = f"no zeros, joins its feature-major region: {why}"
        elif not chosen:
            why = f"kept dense in its feature-major region: {why}"
        ctx.decisions.append(_decision(match, mask, chosen, timing, pattern, why))
