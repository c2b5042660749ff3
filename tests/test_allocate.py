"""The knapsack behind a target speed: optimal, monotone, and honest about what does not fit."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fxprune.allocate import Choice, Group, Level, allocate, total

levels = st.builds(Level, time=st.integers(0, 12), value=st.integers(0, 20).map(float))
groups = st.lists(
    st.builds(
        Group,
        layers=st.lists(st.lists(levels, min_size=1, max_size=3).map(tuple), min_size=1, max_size=2).map(tuple),
        dense=levels,
    ),
    max_size=4,
)


def every_choice(given: list[Group]) -> list[list[Choice]]:
    options = [[None, *itertools.product(*(range(len(layer)) for layer in group.layers))] for group in given]
    return [list(choice) for choice in itertools.product(*options)]


@given(groups, st.integers(-1, 60))
def test_nothing_that_fits_is_better(given: list[Group], budget: int) -> None:
    """Integers, so that brute force and the program agree to the last bit."""
    every = [total(given, choice) for choice in every_choice(given)]
    fits = [found.value for found in every if found.time <= budget]
    found = total(given, allocate(given, budget))
    if fits:
        assert found.time <= budget
        assert found.value == max(fits)
    else:
        assert found.time == min(choice.time for choice in every), "nothing fits, so the fastest"


@given(groups, st.integers(0, 60), st.integers(0, 20))
def test_a_tighter_budget_never_retains_more(given: list[Group], budget: int, less: int) -> None:
    tight, loose = (total(given, allocate(given, b)) for b in (budget - less, budget))
    if tight.time <= budget - less:
        assert tight.value <= loose.value


def test_ties_stay_dense_and_whole() -> None:
    group = Group(((Level(5, 1.0), Level(5, 1.0)),), dense=Level(5, 1.0))
    assert allocate([group], 5) == [None]
    quick = Group(((Level(4, 1.0), Level(4, 1.0), Level(3, 0.5)),), dense=Level(5, 1.0))
    assert allocate([quick], 4) == [(0,)]
    assert allocate([quick], 3) == [(2,)]
    assert allocate([quick], 2) == [(2,)], "the fastest where nothing fits"
    assert allocate([], 3) == []


def test_a_group_leaves_dense_as_a_whole() -> None:
    """One layer alone would gain, but its neighbour loses more by leaving dense."""
    together = Group(((Level(10, 1.0), Level(2, 0.6)), (Level(30, 1.0), Level(25, 0.1))), dense=Level(20, 2.0))
    assert allocate([together], 20) == [None]
    assert allocate([together], 40) == [None]
    assert allocate([together], 19) == [None], "27 is the fastest without dense, so dense it is"
