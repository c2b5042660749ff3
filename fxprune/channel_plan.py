"""Choose channels: which filters go, coupled layers together (DEPrune, NeurIPS 2024, Sec. 4.2).

A space of ``fxprune/coupling.py`` is pruned when every producer of it was asked for and nothing outside sees its
channels. Never a filter that feeds a depthwise convolution: that would remove whole depthwise channels, whose few
weights matter most. Nor a squeeze-and-excite block, whose width is the depthwise convolution's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.config import Config
from fxprune.context import Context
from fxprune.coupling import Coupling, Gemm, Space
from fxprune.match import Match
from fxprune.planner import importance, pattern_of, targets
from fxprune.sparsity.channel import coupled_mask, filter_scores
from fxprune.sparsity.pattern import LayerMask, keep_largest
from fxprune.sparsity.recalibrate import ceil_to, choose, floor_to
from fxprune.weights import qualified_name

_SLACK = 0.005  # of the filters: how far rounding may move the share that is removed


@dataclass
class Cut:
    """What one parameter keeps: bool vectors over its output (``rows``) and input features, ``None`` for all."""

    parameter: str
    value: Tensor
    match: Match | None
    layout: Gemm | None
    rows: Tensor | None = None
    columns: Tensor | None = None
    target: float = 0.0

    @property
    def mask(self) -> Tensor:
        """The kept elements, bool of the parameter's shape."""
        mask = torch.ones(self.value.shape, dtype=torch.bool)
        for kept, axis in ((self.rows, 0 if self.layout is None else self.layout.rows), (self.columns, self._inputs)):
            if kept is not None:
                mask &= kept.reshape([-1 if d == axis else 1 for d in range(mask.dim())])
        return mask

    @property
    def _inputs(self) -> int:
        return 0 if self.layout is None else self.layout.columns

    def layer(self, granularity: int) -> LayerMask:
        """Return the mask of the matrix view in the form the tile kernels run."""
        mask = self.mask
        if self.match is not None:
            mask = self.match.matrix(mask)
        else:
            mask = mask.reshape(len(mask), -1)
        return coupled_mask((mask.shape[0], mask.shape[1]), mask.any(1), mask.any(0), granularity)

    def note(self) -> str:
        parts = []
        for kept, what in ((self.rows, "filters"), (self.columns, "inputs")):
            if kept is not None:
                parts.append(f"{int(kept.sum())} of {len(kept)} {what}")
        return ", ".join(parts)


@dataclass
class Channels:
    """cuts by parameter name; filters removed and asked about; why the other groups stay whole, by their layers."""

    cuts: dict[str, Cut] = field(default_factory=dict)
    removed: int = 0
    total: int = 0
    groups: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class _Group:
    space: Space
    matches: list[Match]
    share: float


def choose_channels(
    contexts: Sequence[Context], matches: Sequence[Match], config: Config, unit: Callable[[str], Any]
) -> Channels:
    """Return what every parameter loses to the pattern "channel".

    contexts: the detected graphs. matches: the layers that may be pruned. Kept counts are multiples of the kernel's
    step unless ``recalibration="off"``; a group never loses all its channels.
    """
    result = Channels()
    asked = {n: s for n, s in targets(matches, config).items() if _wants_channel(n, matches, config)}
    if not asked:
        return result
    readers = _readers(contexts)
    groups: list[_Group] = []
    couplings: dict[Space, Coupling] = {}
    by_node = {m.node: m for m in matches if m.parameter in asked}
    every = {m.node: m for c in contexts for m in c.matches}
    for context in contexts:
        if not context.matches:
            continue
        coupling = Coupling(context.matches[0].node.graph, context.weights)
        for space in coupling.spaces:
            mine = [by_node[g.node] for g in space.producers if g.node in by_node]
            if not mine:
                continue
            reason = _refusal(space, coupling, by_node, readers)
            if reason:
                result.skipped[", ".join(m.name for m in mine)] = reason
            else:
                groups.append(_Group(space, mine, min(asked[m.parameter] for m in mine)))
                couplings[space] = coupling
    step = 1 if config.recalibration == "off" else unit("pointwise").column_step
    for group, count in zip(groups, _counts(groups, step), strict=True):
        if count == group.space.size:
            names = ", ".join(m.name for m in group.matches)
            result.skipped[names] = f"its {count} filters keep a multiple of {step} only as a whole"
            continue
        scores = sum(_scores(m, config) for m in group.matches)
        (kept,) = keep_largest([scores], [count])  # type: ignore[list-item]
        _cut(group, kept, couplings[group.space], every, result.cuts)
        result.removed += group.space.size - count
        result.total += group.space.size
        result.groups += 1
    return result


def _wants_channel(parameter: str, matches: Sequence[Match], config: Config) -> bool:
    return any(pattern_of(m, config) == "channel" for m in matches if m.parameter == parameter)


def _readers(contexts: Sequence[Context]) -> Counter[int]:
    """Count the calls that read each tensor, over all graphs."""
    readers: Counter[int] = Counter()
    for context in contexts:
        for node in context.matches[0].node.graph.nodes if context.matches else ():
            value = context.weights.value(node)
            if value is not None:
                readers[id(value)] += len(node.users)
    return readers


def _refusal(space: Space, coupling: Coupling, asked: dict[Node, Match], readers: Counter[int]) -> str:
    """Return why a group stays whole, "" when it may be pruned."""
    if space.depthwise:
        return "it feeds a depthwise convolution (DEPrune, Sec. 4.2)"
    if space.reason:
        return space.reason
    for gemm in space.producers:
        value = coupling.constant(gemm.weight)
        if value is not None and value.dim() == 4 and gemm.node in asked and asked[gemm.node].kind == "linear":
            return "squeeze-and-excite stays as it is (DEPrune, Sec. 4.2)"
        if gemm.node not in asked:
            return f"it is coupled with {qualified_name(gemm.weight)}, which is not pruned by channel"
    if not space.consumers:
        return "nothing that can lose its input features reads it"
    touched = [n for g in space.producers for n in (g.weight, g.bias) if n is not None]
    touched += [g.weight for g in space.consumers] + [c.tensor for c in space.constants]
    for node in touched:
        value = coupling.constant(node)
        if value is not None and readers[id(value)] > 1:
            return f"{qualified_name(node)} is used more than once"
    if any(not isinstance(coupling.constant(g.weight), nn.Parameter) for g in space.consumers):
        return "a weight that reads it is no parameter"
    return ""


def _counts(groups: Sequence[_Group], step: int) -> list[int]:
    """Round the kept filters of every group to ``step``, towards the share asked of all of them."""
    exact = [max(g.space.size - round(g.share * g.space.size), 1) for g in groups]
    sizes = [g.space.size for g in groups]
    lows = [floor_to(count, size, step) for count, size in zip(exact, sizes, strict=True)]
    highs = [ceil_to(count, size, step) for count, size in zip(exact, sizes, strict=True)]
    down = [low - count for low, count in zip(lows, exact, strict=True)]
    up = [high - count for high, count in zip(highs, exact, strict=True)]
    taken = choose(down, up, 0.0, _SLACK * sum(sizes))
    return [high if goes_up else low for low, high, goes_up in zip(lows, highs, taken, strict=True)]


def _scores(match: Match, config: Config) -> Tensor:
    weight = match.matrix(match.value.detach())
    return filter_scores(weight, importance(match, config), config.channel_score).double()


def _cut(group: _Group, kept: Tensor, coupling: Coupling, every: dict[Node, Match], cuts: dict[str, Cut]) -> None:
    """Note what each parameter of a group keeps; one may already keep only some of its other features."""
    space = group.space

    def of(node: Node, gemm: Gemm | None = None) -> Cut:
        name, value = qualified_name(node), coupling.constant(node)
        assert value is not None
        match = every.get(gemm.node) if gemm is not None else None
        return cuts.setdefault(name, Cut(name, value, match, gemm))

    for gemm in space.producers:
        cut = of(gemm.weight, gemm)
        cut.rows, cut.target = kept, group.share
        if gemm.bias is not None:
            of(gemm.bias).rows = kept
    for constant in space.constants:
        if space.values[constant.user] == "norm" and isinstance(coupling.constant(constant.tensor), nn.Parameter):
            of(constant.tensor).rows = kept
    for gemm in space.consumers:
        cut = of(gemm.weight, gemm)
        cut.columns = kept.repeat_interleave(cut.value.shape[gemm.columns] // space.size)
