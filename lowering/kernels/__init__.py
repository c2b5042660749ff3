"""The kernel tables. A kernel is one row: who provides it, what it runs, and the reason it does not."""

from __future__ import annotations

from ...context import Unit
from ...graph import fake
from ...match import Match
from . import cpu, cuda, reference
from .impl import Impl

TABLES: tuple[tuple[Impl, ...], ...] = (cpu.IMPLS, cuda.IMPLS, reference.IMPLS)  # in order of preference


class KernelTables:
    """The tables as the planner and the lowering see them."""

    def __init__(self, tables: tuple[tuple[Impl, ...], ...] = TABLES) -> None:
        self._impls = [impl for table in tables for impl in table]

    def candidates(self, op: str) -> list[Impl]:
        return [impl for impl in self._impls if impl.op == op]

    def supports(self, op: str, match: Match) -> str | None:
        """Return ``None`` when a compiled kernel runs the match, else every provider's reason."""
        x = fake(match.x)
        reasons = []
        for impl in self.candidates(op):
            if impl.provider == "reference":
                continue
            reason = impl.supports(x, match.value)
            if reason is None:
                return None
            reasons.append(f"{impl.provider}: {reason}")
        return "; ".join(reasons) or "no compiled kernel"

    def unit(self, kind: str) -> Unit:
        return cpu.UNITS[kind]
