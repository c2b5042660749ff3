"""What one compile knows: the config, the tensors, what was matched and what was decided about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fxprune.config import Config
from fxprune.match import Block, Match
from fxprune.sparsity.pattern import LayerMask
from fxprune.weights import Weights


class Kernels(Protocol):
    """The kernel tables as the planner sees them."""

    def supports(self, op: str, match: Match) -> str | None:
        """Return ``None`` when some compiled implementation runs ``match``, else the reasons why not."""

    def unit(self, kind: str) -> Unit:
        """Return the granularity and steps of the kernel row that runs ``kind``."""


@dataclass(frozen=True)
class Unit:
    """What a kernel row likes: output features per tile, and multiples of kept K rows and kept features."""

    granularity: int
    k_step: int = 1
    column_step: int = 1


Measure = Callable[[Match, "LayerMask | None"], "Timing"]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one match: our kernel, the fastest dense layout, and dense in feature-major layout."""

    sparse: float
    dense: float
    dense_feature_major: float
    measured: bool


@dataclass(frozen=True)
class Decision:
    """One line of the report: what a match became and why."""

    match: Match
    mask: LayerMask | None
    chosen: bool
    reason: str
    timing: Timing | None = None
    pattern: str = ""
    kernel: str = "dense"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros the kernel skips (of the weight itself when there is no mask)."""
        if self.mask is not None:
            return 1.0 - self.mask.mask.sum().item() / max(self.mask.mask.numel(), 1)
        value = self.match.value
        return (value == 0).sum().item() / max(value.numel(), 1)


@dataclass(frozen=True)
class Refusal:
    """A layer that was seen but is no match, and why."""

    name: str
    kind: str
    shape: str
    reason: str


@dataclass
class Context:
    """State of one compile; passes read it and add to it, nothing outlives it."""

    config: Config
    weights: Weights
    inference: bool
    kernels: Kernels
    measure: Measure
    matches: list[Match] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def decision(self, match: Match) -> Decision | None:
        return next((d for d in self.decisions if d.match is match), None)

    def uses(self) -> set[int]:
        """Return the ids of the user's tensors that the rewritten graph was built from."""
        chosen = [self.weights.value(self.weights.origin(d.match.weight)) for d in self.decisions if d.chosen]
        return {id(t) for t in (*chosen, *self.weights.watched()) if t is not None}
