"""The one threshold of a symbolic batch: where it lies, when it is worth a second build, and what decides each side."""

from __future__ import annotations

from typing import Any, cast

import pytest
from fxprune.passes.split_batch import best_split
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.context import Decision, Timing
from fxprune.match import Match

SIZES = range(2, 65)
LAYERS = [cast("Match", object()) for _ in range(3)]


def plan(times: list[tuple[float, float]]) -> list[Decision]:
    """Return the decisions of some layers with (sparse, dense) times: the faster is chosen."""
    timings = [Timing(sparse, dense, dense, measured=False) for sparse, dense in times]
    return [Decision(m, None, t.sparse <= t.dense, "", t) for m, t in zip(LAYERS, timings, strict=False)]


@pytest.mark.parametrize("at", [3, 4, 20, 40])
def test_a_crossover_is_the_threshold(at: int) -> None:
    threshold, low, high = cast("tuple[int, int, int]", best_split(SIZES, [plan([(b**2, (at - 0.5) ** 2)]) for b in SIZES]))
    assert threshold == at and 2 <= low < at <= high <= 64


def test_a_layer_of_little_time_decides_nothing() -> None:
    assert best_split(SIZES, [plan([(1000, 2000), (b, 9.5)]) for b in SIZES]) is None
    assert best_split(SIZES, [plan([(1000, 2000), (40 * b, 380)]) for b in SIZES]) is not None


def test_of_two_crossovers_the_one_that_loses_less() -> None:
    def times(batch: int) -> list[tuple[float, float]]:
        return [(1, 5) if batch < 8 else (5, 1), (10, 11) if batch < 40 else (11, 10)]

    assert cast("tuple[int, ...]", best_split(SIZES, [plan(times(b)) for b in SIZES]))[0] == 8


def test_a_jump_back_does_not_move_it() -> None:
    """Ceilings make one batch size an exception."""
    plans = [plan([(1, 2) if (b < 20) != (b == 33) else (2, 1)]) for b in SIZES]
    threshold, _, high = cast("tuple[int, int, int]", best_split(SIZES, plans))
    assert threshold == 20 and high != 33


def test_untimed_matches_and_one_size() -> None:
    dense: Any = [Decision(LAYERS[0], None, False, "no zeros")]
    assert best_split(SIZES, [dense] * len(SIZES)) is None
    assert best_split(range(2, 3), [plan([(1, 2)])]) is None


times = st.lists(st.tuples(st.floats(0.5, 4), st.floats(0.5, 4)), min_size=2, max_size=2)


@settings(max_examples=50, deadline=None)
@given(st.lists(times, min_size=2, max_size=8))
def test_no_threshold_is_better(drawn: list[list[tuple[float, float]]]) -> None:
    plans = [plan(t) for t in drawn]
    sizes = range(2, 2 + len(plans))

    def loss(first: int, stop: int, decided_at: int) -> float:
        mine = [d.chosen for d in plans[decided_at - 2]]
        total = 0.0
        for batch in range(first, stop):
            t = drawn[batch - 2]
            took = sum(s if c else d for c, (s, d) in zip(mine, t, strict=True))
            total += (took / sum(map(min, t)) - 1) / batch
        return total

    def side(first: int, stop: int) -> float:
        return min(loss(first, stop, b) for b in range(first, stop))

    least = min(side(2, t) + side(t, sizes.stop) for t in sizes[1:])
    worth = side(2, sizes.stop) - 0.02 * sum(1 / b for b in sizes)
    found = best_split(sizes, plans)
    if found is None:
        assert least >= worth - 1e-9
    else:
        threshold, low, high = found
        assert loss(2, threshold, low) + loss(threshold, sizes.stop, high) == pytest.approx(least)
        assert low < threshold <= high
