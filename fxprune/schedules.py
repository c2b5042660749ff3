"""When a :class:`~fxprune.Pruner` prunes, and how much of the final sparsity by then.

Steps are optimizer steps, counted from 1. ``sparsity(step, final)`` is the sparsity after a round at ``step``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fxprune.errors import ConfigError


class Schedule(Protocol):
    """What a pruner asks. ``last``: the step of the last round."""

    @property
    def last(self) -> int: ...

    def is_round(self, step: int) -> bool: ...

    def sparsity(self, step: int, final: float) -> float: ...


def _check(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(name=f"schedule.{name}", given=value, expected=f"an integer from {least} on")


@dataclass(frozen=True)
class OneShotSchedule:
    """One round after step ``at``; 0 prunes when the pruner is made."""

    at: int = 0

    def __post_init__(self) -> None:
        _check("at", self.at, 0)

    @property
    def last(self) -> int:
        return self.at

    def is_round(self, step: int) -> bool:
        return step == self.at

    def sparsity(self, step: int, final: float) -> float:
        return final


@dataclass(frozen=True)
class LinearSchedule:
    """Rounds every ``every`` steps after ``begin`` up to ``end``, in equal parts."""

    begin: int
    end: int
    every: int

    def __post_init__(self) -> None:
        _check("begin", self.begin, 0)
        _check("end", self.end, self.begin + 1)
        _check("every", self.every, 1)

    @property
    def last(self) -> int:
        return self.end

    def is_round(self, step: int) -> bool:
        inside = self.begin < step <= self.end
        return inside and (step == self.end or (step - self.begin) % self.every == 0)

    def sparsity(self, step: int, final: float) -> float:
        return final * self._progress(step)

    def _progress(self, step: int) -> float:
        return (step - self.begin) / (self.end - self.begin)


@dataclass(frozen=True)
class CubicSchedule(LinearSchedule):
    """``final * (1 - (1 - t)^3)``, t from 0 at ``begin`` to 1 at ``end`` (Zhu & Gupta 2017, arXiv 1710.01878, Eq. 1)."""

    def sparsity(self, step: int, final: float) -> float:
        return final * (1.0 - (1.0 - self._progress(step)) ** 3)


@dataclass(frozen=True)
class IterativeSchedule:
    """``rounds`` rounds ``every`` steps apart, each of which keeps the same share of what is left."""

    rounds: int
    every: int
    begin: int = 0

    def __post_init__(self) -> None:
        _check("rounds", self.rounds, 1)
        _check("every", self.every, 1)
        _check("begin", self.begin, 0)

    @property
    def last(self) -> int:
        return self.begin + self.rounds * self.every

    def is_round(self, step: int) -> bool:
        return self.begin < step <= self.last and (step - self.begin) % self.every == 0

    def sparsity(self, step: int, final: float) -> float:
        number = (step - self.begin) // self.every
        return 1.0 - (1.0 - final) ** (number / self.rounds)
