"""A speed instead of a sparsity: the loop that meets it, on a made-up machine, and what ``prune`` makes of it."""

from __future__ import annotations

import dataclasses
import random
import statistics
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import fxprune
from fxprune import cost, staircase, target
from fxprune.allocate import allocate, total
from fxprune.capture import capture, detect
from fxprune.config import Config
from fxprune.context import Timing
from fxprune.decisions import LAST_REPORTS
from fxprune.errors import ConfigError, NothingToPrune, TargetNotReached
from fxprune.match import Match
from fxprune.plan import lookup
from fxprune.staircase import Staircase, Step, staircases
from fxprune.target import levels_of
from tests.oracle import assert_exact, integer_model, integers
from tests.toys import Tied, image, mlp, mobile, rows, run


def stair(name: str, dense: float, kind: str = "linear", start: float | None = None, floor: float = 0.1) -> Staircase:
    """Ten levels; the last takes ``floor`` of the time of the first."""
    first = dense if start is None else start
    steps = tuple(Step(i / 10, 1 - (i / 10) ** 2, first * (1 - (1 - floor) * i / 9)) for i in range(10))
    match = SimpleNamespace(parameter=name, kind=kind)
    return Staircase((match,), steps, dense)  # type: ignore[arg-type]


class Machine:
    """Milliseconds of a model: what is not pruned, and ``scale`` times its layers. clock: what is measured of them."""

    def __init__(
        self, groups: list[list[Staircase]], rest: float, scale: float, clock: Callable[[float], float] = float
    ) -> None:
        self.groups, self.rest, self.scale, self.clock = groups, rest, scale, clock
        self.tried: list[tuple[float, float]] = []  # milliseconds measured and retained importance

    def milliseconds(self, levels: Mapping[str, float]) -> float:
        time = 0.0
        for group in self.groups:
            sparse = any(s.parameter in levels for s in group)
            for s in group:
                time += self.step(s, levels).micros if sparse else s.dense
        return self.rest + self.scale * time / 1e3

    def step(self, stair: Staircase, levels: Mapping[str, float]) -> Step:
        return next(step for step in stair.steps if step.sparsity == levels.get(stair.parameter, 0.0))

    def build(self, levels: Mapping[str, float]) -> Callable[[], float]:
        stairs = [s for group in self.groups for s in group]
        measured = self.clock(self.milliseconds(levels))
        shares = [self.step(s, levels).retained for s in stairs]
        self.tried.append((measured, statistics.geometric_mean(shares)))
        return lambda: measured

    def search(self, **options: Any) -> target.Speed:
        def clock(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
            return {name: run() for name, run in runs.items()}

        return target.search(self.groups, Config(**options), lambda: self.milliseconds({}), self.build, clock)


def noisy(seed: int, share: float) -> Callable[[float], float]:
    draw = random.Random(seed)
    return lambda time: time * draw.gauss(1.0, share)


def linears(count: int = 12) -> list[list[Staircase]]:
    return [[stair(f"l{i}", 300.0 + 75 * i)] for i in range(count)]


@given(speedup=st.floats(1.2, 3.0), rest=st.floats(0.0, 2.0), scale=st.sampled_from([0.6, 1.0, 1.5]), latency=st.booleans())
def test_the_target_is_met_on_a_machine_that_differs(speedup: float, rest: float, scale: float, latency: bool) -> None:
    machine = Machine(linears(), rest, scale)
    stock = machine.milliseconds({})
    goal = {"target_latency_ms": stock / speedup} if latency else {"target_speedup": speedup}
    speed = machine.search(**goal)
    assert speed.reached and speed.close and speed.iterations == len(machine.tried) <= 4
    assert abs(speed.measured_ms * speedup / stock - 1) <= 0.05 + 1e-9
    assert speed.measured_ms == pytest.approx(machine.milliseconds(speed.levels))
    assert speed.dense_ms == pytest.approx(stock)
    assert speed.target_ms == pytest.approx(stock / speedup)
    assert speed.speedup == pytest.approx(stock / speed.measured_ms)


@pytest.mark.parametrize(("share", "small"), [(1 / 2, {0.0}), (1 / 3, {0.3, 0.4})])
def test_large_layers_are_not_stripped_before_small_ones_lose_anything(share: float, small: set[float]) -> None:
    def line(name: str, dense: float) -> Staircase:  # what is kept is what it takes
        steps = tuple(Step(i / 10, 1 - i / 10, dense * (1 - i / 10)) for i in range(10))
        return dataclasses.replace(stair(name, dense), steps=steps)

    sizes = {"query": 1000.0, "key": 1000.0, "value": 1000.0, "output": 1000.0, "up": 4000.0, "down": 4000.0}
    groups = [[line(name, dense)] for name, dense in sizes.items()]
    items, _ = staircase.rounded(groups)
    whole = total(items, [None] * len(items))
    chosen = allocate(items, int(whole.time * share))
    levels = target.levels_of(groups, chosen)
    assert {levels.get(name, 0.0) for name in ("query", "key", "value", "output")} <= small
    assert {levels["up"], levels["down"]} <= {0.7, 0.8}, "0.9 and less by the sum of shares"
    kept = [1 - levels.get(name, 0.0) for name in sizes]
    assert staircase.retained(groups, total(items, chosen), whole) == pytest.approx(statistics.geometric_mean(kept))


def test_with_a_global_scope_shares_count_by_importance() -> None:
    groups = [[dataclasses.replace(stair(name, 100.0), importance=size)] for name, size in (("a", 3.0), ("b", 1.0))]
    items, _ = staircase.rounded(groups)
    whole = total(items, [None, None])
    assert whole.value == 4.0
    some = total(items, [(0,), (5,)])
    assert staircase.retained(groups, some, whole) == pytest.approx((3 + 0.75) / 4)


def test_a_tighter_target_retains_less() -> None:
    found = [Machine(linears(), 0.5, 1.0).search(target_speedup=s) for s in (1.0, 1.2, 1.5, 2.0, 2.5, 3.0)]
    retained = [speed.retained for speed in found]
    assert retained == sorted(retained, reverse=True) and retained[0] == 1.0 and not found[0].levels
    assert all(a.levels.get(n, 0.0) <= 0.9 for a in found for n in a.levels)


def test_the_same_times_give_the_same_plan() -> None:
    one, two = (Machine(linears(), 0.5, 1.3).search(target_speedup=1.7) for _ in range(2))
    assert one.levels == two.levels


@pytest.mark.parametrize("seed", range(12))
def test_noise_neither_stalls_nor_fools(seed: int) -> None:
    machine = Machine(linears(), 0.5, 1.3, noisy(seed, 0.02))
    speed = machine.search(target_speedup=1.3 + 0.1 * seed)
    assert speed.reached and speed.close and speed.iterations == len(machine.tried) <= 4
    assert machine.milliseconds(speed.levels) == pytest.approx(speed.target_ms, rel=0.1)


@pytest.mark.parametrize("speedup", [1.1, 1.2, 1.3])
def test_most_of_the_time_is_not_in_the_layers(speedup: float) -> None:
    """Every layer at its last level makes the model 1.32 times faster."""
    machine = Machine(linears(), 18.0, 0.77)
    speed = machine.search(target_speedup=speedup)
    assert speed.close and speed.iterations <= 4 and not speed.least


def test_a_looser_plan_that_measures_no_slower_is_followed_by_a_looser_one() -> None:
    times = iter((3.7, 3.6, 3.5, 4.9))
    machine = Machine(linears(), 0.0, 1.0, lambda time: next(times))
    machine.rest = 10.0 - machine.milliseconds({})
    speed = machine.search(target_latency_ms=5.0)
    retained = [share for _, share in machine.tried]
    assert retained == sorted(set(retained)) and len(retained) == 4
    assert speed.close and speed.measured_ms == 4.9 and speed.retained == pytest.approx(retained[-1])


def test_a_jump_over_the_target_ends_beside_it() -> None:
    """Nothing takes between 0.8 and 1.2 of the target: reached, not close, and the bracket has closed from both sides."""
    machine = Machine(linears(2), 0.0, 1.0)
    goal = machine.milliseconds({}) / 2
    machine.clock = lambda time: time * (0.8 if time <= goal else 1.2)
    speed = machine.search(target_latency_ms=goal)
    assert speed.reached and not speed.close and not speed.least
    assert "reached, faster than asked, in" in str(speed)
    assert speed.measured_ms == max(time for time, _ in machine.tried if time <= goal)


def test_a_few_steps_are_exhausted_before_the_builds_are() -> None:
    """Two levels, one too fast and the stock model too slow: nothing is left between them."""
    few = [[Staircase(stair("l", 100.0).matches, stair("l", 100.0).steps[:9:8], 100.0)]]
    speed = Machine(few, 0.0, 1.0).search(target_speedup=2.0)
    assert speed.reached and speed.least and speed.iterations == 1 and speed.levels == {"l": 0.8}


@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.03, 0.3]), speedup=st.floats(1.1, 4.0))
@settings(max_examples=30)
def test_nothing_tried_was_fast_enough_and_retains_more(seed: int, share: float, speedup: float) -> None:
    machine = Machine(linears(5), 0.3, 1.0, noisy(seed, share))
    stock = machine.milliseconds({})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TargetNotReached)
        speed = machine.search(target_latency_ms=stock / speedup)
    enough = [share for time, share in machine.tried if time <= 1.05 * speed.target_ms]
    assert speed.reached == bool(enough) and speed.iterations == len(machine.tried) <= 4
    if enough:
        assert speed.retained == pytest.approx(max(enough))
    else:
        assert speed.measured_ms == min([stock, *(time for time, _ in machine.tried)])


def test_a_target_above_stock_needs_no_pruning() -> None:
    machine = Machine(linears(), 0.5, 1.0)
    speed = machine.search(target_latency_ms=100.0)
    assert speed.reached and speed.least and not speed.close and not speed.levels and speed.iterations == 0
    assert not machine.tried and speed.retained == 1.0


def test_layers_that_stay_whole_count_as_dense() -> None:
    """Their kernels would be faster without zeros, but nothing in their region is pruned."""
    whole = stair("c", 300.0, "pointwise", start=30.0)
    machine = Machine([[Staircase(whole.matches, whole.steps[:1], 300.0)], *linears(4)], 0.0, 1.0)
    speed = machine.search(target_speedup=1.5)
    assert speed.close and speed.iterations == 1 and speed.predicted_ms == pytest.approx(speed.measured_ms, rel=1e-3)


def test_out_of_reach_warns_and_returns_the_fastest() -> None:
    machine = Machine(linears(), 5.0, 1.0)
    with pytest.warns(TargetNotReached, match=r"target .*: not reached.*max_sparsity="):
        speed = machine.search(target_speedup=4.0)
    assert not speed.reached
    assert speed.measured_ms == pytest.approx(machine.milliseconds(dict.fromkeys(speed.levels, 0.9)))
    assert speed.iterations <= 2 and not speed.close and not speed.least
    assert len(speed.levels) == len(machine.groups) and set(speed.levels.values()) == {0.9}


def test_no_layer_that_gains_stays_dense() -> None:
    whole = Staircase(stair("l", 100.0).matches, stair("l", 100.0).steps[:1], 100.0)
    with pytest.warns(TargetNotReached):
        speed = Machine([[whole]], 1.0, 1.0).search(target_speedup=1.5)
    assert not speed.levels and speed.measured_ms == speed.dense_ms
    with pytest.raises(NothingToPrune, match="no layer has a compiled kernel"):
        Machine([], 1.0, 1.0).search(target_speedup=1.5)


def test_convolutions_leave_dense_with_a_few_zeros() -> None:
    """Our kernels beat dense without any zeros, but the compiler takes a region only when something in it is pruned."""
    group = [stair(f"c{i}", 200.0, "pointwise", start=100.0) for i in range(4)]
    speed = Machine([group], 0.0, 1.0).search(target_speedup=1.3)
    assert speed.reached and speed.speedup >= 2.0
    assert list(speed.levels.values()) == [0.1], "one layer, its first level"
    assert speed.least and not speed.close and speed.iterations == 1
    assert "reached, already faster with the least pruning, in 1 iteration(s)" in str(speed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_speedup": 2.0, "target_latency_ms": 3.0}, "'target_latency_ms' got 3.0; expected no target_speedup"),
        ({"target_speedup": 2.0, "sparsity": 0.5}, "'target_speedup' got 2.0; expected no sparsity"),
        ({"target_speedup": 0.5}, "'target_speedup' got 0.5; expected a number from 1"),
        ({"target_speedup": 0}, "'target_speedup' got 0;"),
        ({"target_speedup": -1.0}, "'target_speedup' got -1.0;"),
        ({"target_speedup": "2x"}, "'target_speedup' got '2x'"),
        ({"target_latency_ms": 0}, "'target_latency_ms' got 0;"),
        ({"target_latency_ms": float("nan")}, "'target_latency_ms' got nan;"),
        ({"target_speedup": 2.0, "max_sparsity": 1.0}, "'max_sparsity' got 1.0; expected a fraction between 0 and 1"),
        ({}, "'sparsity' got None; expected a fraction of zeros, or target_speedup="),
    ],
)
def test_bad_targets(options: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(ConfigError) as caught:
        fxprune.prune(model, rows(), **options)
    assert message in str(caught.value)
    assert not any(lookup(p) for p in model.parameters())


def test_a_target_without_layers_or_in_the_wrong_place() -> None:
    with pytest.raises(NothingToPrune, match="no convolution, linear or recurrent layer"):
        fxprune.prune(nn.ReLU(), torch.ones(2), target_speedup=2.0)
    with pytest.raises(NothingToPrune, match="no layer has a compiled kernel"):
        fxprune.prune(mlp().double(), rows().double(), target_speedup=2.0, fallback="eager", autotune="off")
    with pytest.raises(ConfigError, match=r"a target is met by fxprune\.prune"):
        fxprune.explain(mlp(), rows(), target_speedup=2.0)
    trained = torch.compile(mlp(), backend="hwprune", options={"target_speedup": 2.0, "fallback": "eager"})
    with pytest.raises(BackendCompilerFailed, match=r"expected inference: .*torch\.no_grad"):
        trained(rows())


def test_staircases_fall_and_follow_the_measured_points() -> None:
    (graph,) = capture(mobile(), image())
    context = detect(graph, Config())
    unit = context.kernels.unit

    def predicted(match: Match, mask: Any) -> Timing:
        return cost.predict(match, mask, "avx512")

    def measured(match: Match, mask: Any) -> Timing:
        timing = predicted(match, mask)
        return Timing(3 * timing.sparse, 9 * timing.dense, 9 * timing.dense_feature_major, True)

    config = Config(target_speedup=2.0, ignored_layers=("pw",), max_sparsity=0.8)
    stairs = {s.parameter: s for s in staircases(context.matches, config, unit, measured, predicted)}
    assert list(stairs) == ["dw.weight", "pw.weight", "fc.weight"]
    for s in stairs.values():
        (match,) = s.matches
        micros, retained = [step.micros for step in s.steps], [step.retained for step in s.steps]
        assert micros == sorted(micros, reverse=True) and retained == sorted(retained, reverse=True)
        assert retained[0] == 1.0 and all(step.sparsity <= 0.8 for step in s.steps)
        for step in s.steps[1:]:
            (choice,) = staircase.choose_levels([match], config, unit, {s.parameter: step.sparsity}).values()
            scores = match.matrix(match.value.detach()).double().square()
            assert step.retained == pytest.approx(float((scores * choice.layer.mask).sum() / scores.sum()))
            assert step.micros == pytest.approx(3 * predicted(match, choice.layer).sparse), "scaled by what was measured"
    assert len(stairs["pw.weight"].steps) == 1, "ignored"
    assert len(stairs["fc.weight"].steps) >= 2 and len(stairs["dw.weight"].steps) >= 3


def instant(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Half the time of dense for whatever was built; every run is called."""
    for call in runs.values():
        call()
    return {name: 10.0 if name == "dense" else 5.0 for name in runs}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No timing: predicted kernels, eager rest, a clock that says twice as fast."""
    monkeypatch.setattr(target.search, "__defaults__", (instant, 0.0))
    return {"autotune": "off", "fallback": "eager", "min_speedup": 0.0}


def test_prune_reports_what_it_did(quick: dict[str, Any]) -> None:
    model = mobile()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = fxprune.prune(model, image(), target_speedup=2.0, **quick)
    speed = result.speed
    assert speed is not None and speed.reached and speed.iterations == 1
    assert (speed.dense_ms, speed.measured_ms, speed.target_ms, speed.speedup) == (10.0, 5.0, 5.0, 2.0)
    assert {layer.parameter for layer in result.plan} == set(speed.levels)
    assert {layer.parameter: layer.target for layer in result.plan} == dict(speed.levels)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model passed in is untouched"
    assert not any(lookup(p) for p in model.parameters())
    assert "reached" in str(result.report) and set(speed.seconds) == {"plan", "build"}
    again = fxprune.prune(model, image(), target_speedup=2.0, inplace=True, **quick)
    assert again.model is model and again.speed is not None and again.speed.levels == speed.levels
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_failure_leaves_the_model_alone(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = mobile().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def broken(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
        if len(runs) > 1:
            raise RuntimeError("the clock stopped")
        return {"dense": 10.0}

    monkeypatch.setattr(target.search, "__defaults__", (broken, 0.0))
    with pytest.raises(RuntimeError, match="the clock stopped"):
        fxprune.prune(model, image(), target_speedup=2.0, inplace=True, **quick)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not any(lookup(p) for p in model.parameters())


def test_a_target_inside_the_compile(quick: dict[str, Any]) -> None:
    model = mobile()
    fast = torch.compile(model, backend="hwprune", options={"target_speedup": 2.0, **quick})
    fxprune.register()
    LAST_REPORTS.clear()
    output = run(fast, image())
    decided = LAST_REPORTS[-1].decisions
    assert any(d.mask is not None and d.chosen for d in decided)
    masked = mobile()
    with torch.no_grad():
        for decision in decided:
            if decision.mask is not None:
                weight = dict(masked.named_parameters())[decision.match.parameter]
                weight.mul_(decision.match.restore(decision.mask.mask).reshape(weight.shape))
    assert_exact(output, run(masked, image()), "the masked model")
    with torch.no_grad():
        model.fc.weight.mul_(2.0)
    run(fast, image())  # other values, the same levels: nothing is searched again


def test_a_target_inside_the_compile_leaves_what_prune_leaves(quick: dict[str, Any]) -> None:
    model, tokens = integer_model(Tied()), integers(2, 5, low=0, high=47).long()
    before = model.head.weight.detach().clone()
    fast = torch.compile(model, backend="hwprune", options={"target_speedup": 2.0, **quick})
    LAST_REPORTS.clear()
    run(fast, tokens)
    masked = {d.match.parameter for d in LAST_REPORTS[-1].decisions if d.mask is not None}
    assert masked == {"middle.weight"}
    assert torch.equal(model.embedding.weight, before)


def test_a_real_target_is_consistent() -> None:
    """Measured, so no time is asserted: the report agrees with itself and the model with its plan."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    x = torch.randn(64, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TargetNotReached)
        result = fxprune.prune(model, x, target_speedup=1.5, fallback="eager", autotune="off")
    speed = result.speed
    assert speed is not None and 1 <= speed.iterations <= 4
    assert speed.dense_ms > 0 and speed.measured_ms > 0 and 0 < speed.retained <= 1
    assert speed.reached == (speed.measured_ms <= 1.05 * speed.target_ms)
    assert speed.target_ms == pytest.approx(speed.dense_ms / 1.5)
    assert len(result.plan) == len(speed.levels)


def test_levels_of_names_only_what_loses() -> None:
    groups = [[stair("a", 10.0), stair("b", 10.0)], [stair("c", 10.0)]]
    assert levels_of(groups, [(0, 3), None]) == {"b": 0.3}
