"""What each layer can lose and what that saves: levels of sparsity with retained importance and time.

A level is a sparsity asked of one layer; what its pattern makes of it (legal counts, achieved zeros) is found by choosing
the mask, the same way as when the level is applied, so nothing is approximated twice. Its time is the cost model's, scaled
to three measured points of the layer.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxprune.allocate import Group, Level
from fxprune.config import Config
from fxprune.context import Measure
from fxprune.match import Match
from fxprune.planner import Choice, choose_masks, importances, targets
from fxprune.sparsity.pattern import LayerMask

_LEVELS = 15
_LEAST_GAIN = 0.99  # a level that is not this much faster than the one before is no level
_LEAST_SHARE = 1e-6  # of a layer's importance; what retains less counts as this
_RESOLUTION = 20000  # units of time in which a budget is counted

Unit = Callable[[str], Any]


@dataclass(frozen=True)
class Step:
    """sparsity: as asked of the layer, 0 keeps everything. retained: share of its importance. micros: of all its calls."""

    sparsity: float
    retained: float
    micros: float


@dataclass(frozen=True)
class Staircase:
    """One parameter and the calls that use it. dense: microseconds in the fastest dense layout.

    importance: of all its weights, where layers are compared by that (``scope="global"``); 0: they count the same.
    """

    matches: tuple[Match, ...]
    steps: tuple[Step, ...]
    dense: float
    importance: float = 0.0

    @property
    def parameter(self) -> str:
        return self.matches[0].parameter

    def value(self, step: Step) -> float:
        """Return what a plan gains by keeping ``step``; plans add it up over layers.

        Where layers count the same it is a logarithm: they follow each other, so shares multiply, and a plan would
        rather take a little from all than nearly everything from the few that save most time.
        """
        return self.importance * step.retained if self.importance else math.log(max(step.retained, _LEAST_SHARE))


def staircases(matches: Sequence[Match], config: Config, unit: Unit, measure: Measure, predict: Measure) -> list[Staircase]:
    """Return the staircase of every parameter, in order; layers that may not be pruned have one step.

    measure, predict: microseconds of a match under a mask, the former on this machine. Levels reach to
    ``config.max_sparsity``; ``config.ignored_layers`` and kinds whose pattern is off stay whole.
    """
    allowed = targets(matches, _asking(config, config.max_sparsity))
    users: dict[str, list[Match]] = {}
    for match in matches:
        users.setdefault(match.parameter, []).append(match)
    return [_staircase(mine, name in allowed, config, unit, measure, predict) for name, mine in users.items()]


def choose_levels(matches: Sequence[Match], config: Config, unit: Unit, levels: Mapping[str, float]) -> dict[str, Choice]:
    """Return what each parameter loses at the sparsity that ``levels`` asks of it, layer by layer."""
    chosen: dict[str, Choice] = {}
    for match in matches:
        ratio = levels.get(match.parameter, 0.0)
        if ratio and match.parameter not in chosen:
            chosen[match.parameter] = _choose(match, ratio, config, unit, importances([match], config))
    return chosen


def grouped(stairs: Sequence[Staircase], regions: Iterable[Sequence[Match]]) -> list[list[Staircase]]:
    """Put the staircases of each region of convolutions together; every other layer is alone."""
    group_of = {id(match): i for i, region in enumerate(regions) for match in region}
    groups: dict[Any, list[Staircase]] = {}
    for stair in stairs:
        key = group_of.get(id(stair.matches[0]), stair.parameter)
        groups.setdefault(key, []).append(stair)
    return list(groups.values())


def rounded(groups: Sequence[Sequence[Staircase]]) -> tuple[list[Group], float]:
    """Return the groups with times in whole units, and the microseconds of one unit.

    A group that can lose nothing stays dense, whatever its kernels take.
    """
    unit = max(sum(stair.dense for group in groups for stair in group) / _RESOLUTION, 1e-9)
    items = []
    for group in groups:
        stays = all(len(stair.steps) == 1 for stair in group)
        layers = tuple(
            tuple(Level(round((stair.dense if stays else s.micros) / unit), stair.value(s)) for s in stair.steps)
            for stair in group
        )
        dense = Level(sum(round(s.dense / unit) for s in group), sum(s.value(s.steps[0]) for s in group))
        items.append(Group(layers, dense))
    return items, unit


def retained(groups: Sequence[Sequence[Staircase]], plan: Level, whole: Level) -> float:
    """Return the share of importance that ``plan`` keeps of ``whole``: of all, or the geometric mean over layers."""
    stairs = [stair for group in groups for stair in group]
    if any(stair.importance for stair in stairs):
        return plan.value / max(whole.value, 1e-30)
    return math.exp((plan.value - whole.value) / max(len(stairs), 1))


def _staircase(
    users: list[Match], prunable: bool, config: Config, unit: Unit, measure: Measure, predict: Measure
) -> Staircase:
    match = users[0]
    whole = [measure(user, None) for user in users]
    dense, feature_major = sum(t.dense for t in whole), sum(t.dense_feature_major for t in whole)
    ours = sum(t.sparse for t in whole)
    convolution = match.kind != "linear"
    # a convolution without zeros runs in its region; a linear layer without zeros stays dense
    first = min(ours, feature_major) if convolution else dense
    scores = importances([match], config)
    squares = scores[match.parameter].double().square()
    scale = float(squares.sum()) or 1.0
    weight = scale if config.scope == "global" else 0.0
    steps = [Step(0.0, 1.0, first)]
    if not prunable:
        return Staircase(tuple(users), tuple(steps), dense, weight)
    ratios = [config.max_sparsity * (i + 1) / _LEVELS for i in range(_LEVELS)]
    masks = [_choose(match, ratio, config, unit, scores).layer for ratio in ratios]
    shares = [float((squares * mask.mask).sum()) / scale for mask in masks]
    bound = first if convolution else dense / max(config.min_speedup, 1e-9)
    for ratio, share, micros in zip(ratios, shares, _times(users, masks, ours, measure, predict), strict=True):
        if micros <= min(bound, _LEAST_GAIN * steps[-1].micros):
            steps.append(Step(ratio, share, micros))
    return Staircase(tuple(users), tuple(steps), dense, weight)


def _choose(match: Match, ratio: float, config: Config, unit: Unit, scores: Mapping[str, Tensor]) -> Choice:
    """One layer at one ratio, alone, so that what it loses does not depend on the others."""
    alone = dataclasses.replace(_asking(config, ratio), ignored_layers=())
    return choose_masks([match], alone, unit, scores=scores)[match.parameter]


def _asking(config: Config, ratio: float) -> Config:
    return dataclasses.replace(config, sparsity=ratio, target_speedup=None, target_latency_ms=None)


def _times(users: list[Match], masks: list[LayerMask], ours: float, measure: Measure, predict: Measure) -> list[float]:
    """Return the predicted microseconds of each mask, scaled to those of everything kept, the middle and the last."""

    def predicted(mask: LayerMask | None) -> float:
        return sum(predict(user, mask).sparse for user in users)

    kept = [mask.share for mask in masks]
    anchors = {1.0: ours / predicted(None)}
    for i in (len(masks) // 2, len(masks) - 1):
        anchors[kept[i]] = sum(measure(user, masks[i]).sparse for user in users) / predicted(masks[i])
    return [predicted(mask) * _between(share, anchors) for share, mask in zip(kept, masks, strict=True)]


def _between(x: float, points: Mapping[float, float]) -> float:
    """Linear interpolation, constant outside."""
    xs = sorted(points)
    right = min(max(bisect_left(xs, x), 1), len(xs) - 1) if len(xs) > 1 else 0
    left = max(right - 1, 0)
    if xs[right] == xs[left]:
        return points[xs[left]]
    share = min(max((x - xs[left]) / (xs[right] - xs[left]), 0.0), 1.0)
    return points[xs[left]] * (1 - share) + points[xs[right]] * share
