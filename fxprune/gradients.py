"""Structured data gradient pruning (SDGP): its ratios over time, and the counters its random numbers are keyed by.

    torch.compile(model, backend="hwprune", options={"grad_sparsity": "2:4"})

The counters reach the backward graph as a tensor, so that no step compiles anything; another ratio does, once.
"""

from __future__ import annotations

import re
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxprune.errors import ConfigError
from fxprune.ops.nm_prune import FUNCTIONS, MOST
from fxprune.ranks import rank_and_world
from fxprune.report import Table

TARGETS = ("dX", "dW", "both")
PRUNINGS = FUNCTIONS
_RATIO = re.compile(r"(-?\d+):(-?\d+)")
_STEPS = 20  # whose time the report has
_EXPECTED = f'"n:m" with 1 <= n <= m <= {MOST}, "auto", "auto:n:m", "off", or a dict of them by first step'


@dataclass(frozen=True)
class Ratio:
    """n of every m consecutive values stay. auto: only in layers where that was measured to be faster."""

    n: int
    m: int
    auto: bool = False

    def __str__(self) -> str:
        return f"{'auto:' if self.auto else ''}{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: Any) -> Ratio | None:
        """Return the ratio a text names, ``None`` for "off" and where all m of m stay.

        Raises :class:`~fxprune.errors.ConfigError`.
        """
        if text == "off":
            return None
        auto = isinstance(text, str) and text.partition(":")[0] == "auto"
        plain = text.partition(":")[2] or "2:4" if auto else text
        found = _RATIO.fullmatch(plain) if isinstance(plain, str) else None
        n, m = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= n <= m <= MOST:
            raise ConfigError(name="grad_sparsity", given=text, expected=_EXPECTED)
        return None if n == m else cls(n, m, auto)


def ratios(given: Any) -> dict[int, Ratio | None]:
    """Return the ratio from each step on, by increasing first step; empty when nothing is given."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {0: Ratio.parse(given)}
    for step in given:
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ConfigError(name="grad_sparsity", given=step, expected="first steps that are integers from 0 on")
    return {step: Ratio.parse(given[step]) for step in sorted(given)}


def ratio_at(given: Any, step: int) -> Ratio | None:
    """Return the ratio of one step; before the first step of a schedule gradients are dense."""
    current = None
    for first, ratio in ratios(given).items():
        if first <= step:
            current = ratio
    return current


class GradientClock:
    """Counts optimizer steps, and forward calls of pruned graphs since the last one.

    step: taken by any optimizer of this process since the first graph was compiled with ``grad_sparsity``, or what was
    set. Save :meth:`state_dict` in a checkpoint and load it again, and a resumed run draws what it would have drawn.
    """

    def __init__(self) -> None:
        self.step = 0
        self.call = 0
        self._hook: Any = None
        self._ends: deque[float] = deque(maxlen=_STEPS + 1)  # seconds
        self._calls = 0  # in the step before

    def start(self) -> None:
        """Begin to count, and forget how long earlier steps took; safe to call again."""
        self._ends.clear()
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._stepped)

    def key(self, seed: int) -> Tensor:
        """Return int64 (3,): seed, step and call; every rank of a process group draws its own numbers."""
        rank, world = rank_and_world()
        call = self.call * world + rank
        self.call += 1
        return torch.tensor([seed, self.step, call])

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "call": self.call}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step, self.call = int(state["step"]), int(state["call"])

    def last_steps(self) -> tuple[float, int] | None:
        """Return the median microseconds of the last steps and the calls of pruned graphs in one, ``None`` before two."""
        if len(self._ends) < 3:
            return None
        return 1e6 * statistics.median(b - a for a, b in pairwise(self._ends)), self._calls

    def _stepped(self, *_: Any) -> None:
        self.step += 1
        self._calls, self.call = self.call, 0
        self._ends.append(perf_counter())


gradient_clock = GradientClock()


@dataclass(frozen=True)
class GradientTimes:
    """Microseconds of one data gradient. pruned: pruning and a dense product; skipping: pruning and one that skips zeros.

    skipping is ``None`` where no such kernel exists. library: the same by a library's product, where one is right.
    """

    dense: float
    pruned: float
    skipping: float | None = None
    library: float | None = None

    @property
    def skips(self) -> bool:
        """Whether skipping zeros is the faster way to multiply."""
        return self.best < self.pruned

    @property
    def by_library(self) -> bool:
        """Whether a library's product is the fastest way to skip zeros."""
        return self.skips and self.library == self.best

    @property
    def best(self) -> float:
        """The fastest of the ways to prune."""
        return min(t for t in (self.pruned, self.skipping, self.library) if t is not None)


@dataclass(frozen=True)
class GradientLayer:
    """One layer of a graph compiled with ``grad_sparsity``: its number in the graph, and why its gradient stays dense.

    times: ``None`` when it was not timed; its product is dense then.
    """

    name: str
    number: int
    reason: str | None = None
    times: GradientTimes | None = None

    @property
    def skips(self) -> bool:
        """Whether the product of the data gradient skips the zeros."""
        return self.reason is None and self.times is not None and self.times.skips

    @property
    def by_library(self) -> bool:
        """Whether that product is a library's."""
        return self.skips and self.times is not None and self.times.by_library

    def __str__(self) -> str:
        return f"{self.name}: {'pruned' if self.reason is None else 'dense, ' + self.reason}"


def gradient_table(layers: Sequence[GradientLayer], ratio: object, step: tuple[float, float] | None = None) -> Table:
    """Return a row per layer: what its data gradient reads, how it multiplies, and the times measured.

    step: microseconds of an optimizer step, and how many times in it each layer ran.
    """
    rows, spent, dense = [], 0.0, 0.0
    for layer in layers:
        cells = ("-",) * 4
        if (times := layer.times) is not None:
            skips = [t for t in (times.skipping, times.library) if t is not None]
            skipping = f"{min(skips):.1f}" if skips else "-"
            cells = (f"{times.dense:.1f}", f"{times.pruned:.1f}", skipping, f"{times.dense / times.best:.2f}")
            dense += times.dense
            spent += times.dense if layer.reason else times.best
        reads = "dense" if layer.reason else "pruned, skipping zeros" if layer.skips else "pruned"
        reads += " by a library" if layer.by_library else ""
        rows.append((layer.name, reads, *cells, layer.reason or ""))
    head = ("layer", "data gradient reads", "dense us", "pruned us", "skipping zeros us", "gain", "reason")
    summary = {"all data gradients that were timed": f"{dense / spent:.2f} times as fast as dense"} if spent else {}
    if step is not None and spent:
        micros, calls = step
        gain = (micros + (dense - spent) * calls) / micros
        summary["whole step"] = f"{micros / 1000:.1f} ms, by these times {gain:.2f} times as fast as with dense gradients"
    return Table(f"data gradients at {ratio}", head, rows, summary)
