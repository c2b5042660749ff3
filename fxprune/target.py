"""Meet a time: allocate, build, measure, correct the budget, a few times at most."""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxprune.allocate import Choice, Group, Level, allocate, total
from fxprune.benchmark import interleave
from fxprune.config import Config
from fxprune.errors import NothingToPrune, TargetNotReached
from fxprune.staircase import Staircase, rounded

TOLERANCE = 0.05  # of the target
_BUILDS = 4
_ROUNDS = 6
_BURST_MS = 25.0

log = logging.getLogger(__name__)
Run = Callable[[], Any]
Build = Callable[[Mapping[str, float]], Run]  # sparsity by parameter -> the model compiled with it
Clock = Callable[[dict[str, Run]], dict[str, float]]  # milliseconds of each, taken in turns


@dataclass(frozen=True)
class Speed:
    """What was asked and what came out, in milliseconds of the whole model.

    dense_ms: stock, measured beside measured_ms. predicted_ms: by the plan that was built. levels: sparsity by
    parameter. retained: mean share of importance kept over the prunable layers. iterations: plans built and measured.
    seconds: "plan" without compiling and timing whole models, "build" with.
    """

    dense_ms: float
    target_ms: float
    predicted_ms: float
    measured_ms: float
    reached: bool
    iterations: int
    retained: float
    levels: Mapping[str, float]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.measured_ms

    def __str__(self) -> str:
        verdict = "reached" if self.reached else "not reached"
        return (
            f"{self.measured_ms:.3f} ms ({self.speedup:.2f}x of dense {self.dense_ms:.3f} ms), predicted "
            f"{self.predicted_ms:.3f} ms, target {self.target_ms:.3f} ms: {verdict} in {self.iterations} iteration(s)"
        )


@dataclass(frozen=True)
class _Trial:
    levels: Mapping[str, float]
    plan: Level
    predicted: float
    dense: float
    measured: float


def clock(runs: dict[str, Run]) -> dict[str, float]:
    """Return milliseconds per call, taken in turns: the better of two medians."""
    halves = [interleave(runs, _ROUNDS, _BURST_MS) for _ in range(2)]
    return {name: min(statistics.median(half[name]) for half in halves) for name in runs}


def search(
    groups: Sequence[Sequence[Staircase]],
    config: Config,
    stock_run: Run,
    build: Build,
    clock: Clock = clock,
    seconds: float = 0.0,
) -> Speed:
    """Find the levels that retain most within the target of ``config``, measured.

    stock_run: the unpruned model, compiled without us. The time of a plan is taken to be a line over the time of its
    layers: first from the stock model, then through what was measured. Warns with
    :class:`TargetNotReached` when no plan that was built is within 5 % of the target. seconds: spent on ``groups``.
    """
    if not groups:
        raise NothingToPrune(
            reason="no layer has a compiled kernel that runs it",
            remedy="Run fxprune.explain(model, example_inputs, sparsity=0.5) for the reasons.",
        )
    start, spent = time.perf_counter(), 0.0

    def timed(levels: Mapping[str, float] | None) -> tuple[float, float]:
        nonlocal spent
        before = time.perf_counter()
        taken = clock({"dense": stock_run} if levels is None else {"dense": stock_run, "ours": build(levels)})
        spent += time.perf_counter() - before
        return taken["dense"], taken.get("ours", taken["dense"])

    stock, _ = timed(None)
    target = config.target_latency_ms or stock / (config.target_speedup or 1.0)
    items, unit = rounded(groups)
    dense = total(items, [None] * len(items))
    # Layers are slower inside a model than alone, so only half of what they leave unexplained counts as the rest.
    rest = max(stock - dense.time * unit / 1e3, 0.0) / 2
    slope = (stock - rest) / max(dense.time, 1)  # milliseconds of the model per unit of its layers
    most = dense.time - (target < stock)  # the stock model itself is no answer
    trials: list[_Trial] = []
    while len(trials) < _BUILDS:
        chosen = touched(items, allocate(items, int(min((target - rest) / slope, most))))
        levels, plan = levels_of(groups, chosen), total(items, chosen)
        if any(levels == trial.levels for trial in trials):
            break
        dense_ms, ours = timed(levels) if levels else (stock, stock)
        if config.target_speedup:  # a ratio: both sides drift with the machine
            dense_ms, ours = stock, ours * stock / dense_ms
        trials.append(_Trial(levels, plan, rest + slope * plan.time, dense_ms, ours))
        log.info("%.0f us of layers: predicted %.3f ms, measured %.3f ms", plan.time * unit, trials[-1].predicted, ours)
        if abs(ours / target - 1) <= TOLERANCE or not levels:
            break
        slope, rest = _line([(t.plan.time, t.measured) for t in trials], target, rest)
    best = _best(trials, target)
    speed = Speed(
        dense_ms=best.dense,
        target_ms=target,
        predicted_ms=best.predicted,
        measured_ms=best.measured,
        reached=best.measured <= (1 + TOLERANCE) * target,
        iterations=len(trials),
        retained=best.plan.value / max(dense.value, 1e-30),
        levels=best.levels,
        seconds={"plan": seconds + time.perf_counter() - start - spent, "build": spent},
    )
    if not speed.reached:
        warnings.warn(TargetNotReached(speed), stacklevel=3)
    return speed


def touched(items: Sequence[Group], chosen: Sequence[Choice]) -> list[Choice]:
    """Give groups that leave dense without any zeros the cheapest level they have, else the compiler leaves them dense."""
    result: list[Choice] = []
    for group, picks in zip(items, chosen, strict=True):
        losses = [levels[0].value - levels[1].value if len(levels) > 1 else math.inf for levels in group.layers]
        if picks is not None and not any(picks):
            i = min(range(len(losses)), key=losses.__getitem__)
            picks = None if losses[i] == math.inf else (*picks[:i], 1, *picks[i + 1 :])
        result.append(picks)
    return result


def levels_of(groups: Sequence[Sequence[Staircase]], chosen: Sequence[Choice]) -> dict[str, float]:
    """Return the sparsity of each layer that loses something, by parameter."""
    return {
        stair.parameter: stair.steps[pick].sparsity
        for group, picks in zip(groups, chosen, strict=True)
        for stair, pick in zip(group, picks or (0,) * len(group), strict=True)
        if pick
    }


def _line(points: list[tuple[int, float]], target: float, rest: float) -> tuple[float, float]:
    """Return slope and intercept through the two measurements nearest to the target, or through the nearest and ``rest``."""
    near = sorted(points, key=lambda p: abs(p[1] - target))
    (time, measured), *others = near
    rest = min(rest, target / 2, measured / 2)
    slope = (measured - rest) / max(time, 1)
    for other_time, other in others:
        secant = (other - measured) / (other_time - time) if other_time != time else 0.0
        if slope / 3 < secant < 3 * slope:  # anything else is noise
            return secant, measured - secant * time
    return slope, rest


def _best(trials: list[_Trial], target: float) -> _Trial:
    """Return what retains most of the plans that meet the target, else the fastest."""
    meets = [trial for trial in trials if trial.measured <= (1 + TOLERANCE) * target]
    return max(meets, key=lambda t: t.plan.value) if meets else min(trials, key=lambda t: t.measured)
