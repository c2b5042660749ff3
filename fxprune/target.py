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
from fxprune.staircase import Staircase, retained, rounded

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
    parameter. retained: share of importance kept, the geometric mean over layers (``scope="global"``: of all).
    iterations: plans built and measured. least: nothing, or the least pruning that leaves dense: a slower plan does
    not exist.
    seconds: "plan" without compiling and timing whole models, "build" with.
    """

    dense_ms: float
    target_ms: float
    predicted_ms: float
    measured_ms: float
    iterations: int
    retained: float
    levels: Mapping[str, float]
    least: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.measured_ms

    @property
    def reached(self) -> bool:
        """Whether the model is at most 5 % slower than asked."""
        return self.measured_ms <= (1 + TOLERANCE) * self.target_ms

    @property
    def close(self) -> bool:
        """Whether the time is within 5 % of the target on both sides; reached but not close is faster than asked."""
        return abs(self.measured_ms / self.target_ms - 1) <= TOLERANCE

    def __str__(self) -> str:
        verdict = "reached" if self.reached else "not reached"
        if self.reached and not self.close:
            verdict += ", already faster with the least pruning," if self.least else ", faster than asked,"
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
    layers. The loosest plan that was fast enough and the tightest that was not, at first the stock model, enclose the
    next one. Ends within 5 % of the target, when no plan is left between the two, or after four builds. Warns with
    :class:`TargetNotReached` when every plan is more than 5 % too slow. seconds: spent on ``groups``.
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

    stock_ms, _ = timed(None)
    target = config.target_latency_ms or stock_ms / (config.target_speedup or 1.0)
    items, unit = rounded(groups)
    whole = total(items, [None] * len(items))
    stock = _Trial({}, whole, stock_ms, stock_ms, stock_ms)
    # Layers are slower inside a model than alone, so only half of what they leave unexplained counts as the rest.
    rest = max(stock_ms - whole.time * unit / 1e3, 0.0) / 2
    tightest = total(items, allocate(items, -1)).time
    trials: list[_Trial] = []
    while target < stock_ms and len(trials) < _BUILDS:
        line = _line(trials, stock, target, rest)
        fast, slow = _bracket(trials, stock, target)
        for budget in _budgets(line, fast, slow, target, tightest):
            chosen = touched(items, allocate(items, budget))
            levels, plan = levels_of(groups, chosen), total(items, chosen)
            if all(levels != trial.levels for trial in (stock, *trials)):
                break
        else:  # no plan lies inside the bracket
            break
        dense_ms, ours = timed(levels)
        if config.target_speedup:  # a ratio: both sides drift with the machine
            dense_ms, ours = stock_ms, ours * stock_ms / dense_ms
        slope, offset = line
        trials.append(_Trial(levels, plan, offset + slope * plan.time, dense_ms, ours))
        log.info("%.0f us of layers: predicted %.3f ms, measured %.3f ms", plan.time * unit, trials[-1].predicted, ours)
        if abs(ours / target - 1) <= TOLERANCE:
            break
    best = _best(trials, stock, target)
    speed = Speed(
        dense_ms=best.dense,
        target_ms=target,
        predicted_ms=best.predicted,
        measured_ms=best.measured,
        iterations=len(trials),
        retained=retained(groups, best.plan, whole),
        levels=best.levels,
        least=best.levels in ({}, levels_of(groups, touched(items, allocate(items, whole.time - 1)))),
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


def _bracket(trials: Sequence[_Trial], stock: _Trial, target: float) -> tuple[_Trial | None, _Trial]:
    """Return the loosest plan that was fast enough, and the tightest looser one that was not, at last ``stock``."""
    fast = max((t for t in trials if t.measured <= target), key=_time, default=None)
    slow = (t for t in trials if t.measured > target and (fast is None or _time(t) > _time(fast)))
    return fast, min(slow, key=_time, default=stock)


def _line(trials: Sequence[_Trial], stock: _Trial, target: float, rest: float) -> tuple[float, float]:
    """Return slope and offset of the model's time over that of its layers: the secant through both ends of the bracket.

    An end that was not measured gives way to the next nearest plan; a single plan is joined with ``rest`` at no layers.
    """
    fast, slow = _bracket(trials, stock, target)
    near = sorted(trials, key=lambda t: abs(t.measured - target))[:2]
    first, *others = [fast, slow] if fast and slow is not stock else near or [stock]
    for other in others:
        if _time(other) != _time(first):
            slope = (other.measured - first.measured) / (_time(other) - _time(first))
            return slope, first.measured - slope * _time(first)
    rest = min(rest, target / 2, first.measured / 2)
    return (first.measured - rest) / max(_time(first), 1), rest


def _budgets(line: tuple[float, float], fast: _Trial | None, slow: _Trial, target: float, tightest: int) -> tuple[int, ...]:
    """Return the times to try inside the bracket: by the line, its middle, and the end that may hide one more plan."""
    low, high = _time(fast) if fast else tightest, _time(slow) - 1
    if high < low:
        return ()
    slope, offset = line
    middle, last = (low + high) // 2, high if fast else low
    wanted = (target - offset) / slope if slope > 0 else middle
    if wanted < low and not fast:  # out of reach by the line
        wanted = low
    return (int(wanted) if low <= wanted <= high else middle), middle, last


def _time(trial: _Trial) -> int:
    return trial.plan.time


def _best(trials: Sequence[_Trial], stock: _Trial, target: float) -> _Trial:
    """Return what retains most of the plans that are fast enough, else the fastest, that of ``stock`` included."""
    enough = [trial for trial in trials if trial.measured <= (1 + TOLERANCE) * target]
    return max(enough, key=lambda t: t.plan.value) if enough else min((stock, *trials), key=lambda t: t.measured)
