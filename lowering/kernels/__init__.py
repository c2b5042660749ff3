"""The kernel tables. A kernel is one row: who provides it, what it runs, and the reason it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from ...context import Unit
from ...graph import fake
from ...match import Match
from . import cpu, cuda, libraries, reference
from .impl import Impl

TABLES: tuple[tuple[Impl, ...], ...] = (cpu.IMPLS, cuda.IMPLS, libraries.IMPLS, reference.IMPLS)  # in order of preference


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

    def unit(self, kind: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Unit:
        """Return what the kernels like: of a device, or of a key of :data:`cuda.UNITS` where the GPU is not at hand."""
        if device in cuda.UNITS or torch.device(device).type == "cuda":
            return cuda.UNITS[cuda.card(device)][kind]
        return (cpu.BF16_UNITS if dtype == torch.bfloat16 else cpu.UNITS)[kind]

    def units(self, matches: Iterable[Match]) -> Callable[[str], Unit]:
        """Return :meth:`unit` for weights that are pruned together: that of their type and card when all agree."""
        found = {(m.value.dtype, cuda.card(m.value.device) if m.value.is_cuda else "cpu") for m in matches}
        dtype, device = found.pop() if len(found) == 1 else (torch.float32, "cpu")
        return partial(self.unit, dtype=dtype, device=device)
