"""How long interleaved timings go on: until they agree, or for a time that is bounded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from fxprune.lowering import measure


class Clock:
    """Time passes in the calls that are timed alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def call(self, seconds: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.now += next(seconds)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def growing(start: float) -> Iterator[float]:
    return (start * 1.2**i for i in itertools.count())


def test_times_that_agree_end_after_the_rounds_asked_for(clock: Clock) -> None:
    micros, settled = measure.interleave([clock.call(itertools.repeat(s)) for s in (0.25, 0.5)], 5)
    assert settled and micros == pytest.approx([0.25e6, 0.5e6])
    assert clock.now == pytest.approx((2 + 5 * 2) * 0.75)  # a first call, one that is timed, rounds of two calls


def test_long_calls_that_never_agree_end_with_the_patience(clock: Clock) -> None:
    _, settled = measure.interleave([clock.call(growing(1.0))], 5)
    calls = 2 + 5 * 2
    assert not settled and clock.now == pytest.approx(sum(1.2**i for i in range(calls)))


def test_short_calls_that_never_agree_end_after_eight_times_the_rounds(clock: Clock) -> None:
    seconds = growing(1e-9)
    bursts = itertools.chain.from_iterable(itertools.repeat(next(seconds), 50) for _ in itertools.count())
    _, settled = measure.interleave([clock.call(itertools.chain([1e-9, 1e-9], bursts))], 5)
    assert not settled and next(seconds) == pytest.approx(1e-9 * 1.2 ** (8 * 5))
