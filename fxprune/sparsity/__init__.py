"""Sparsity patterns. A new pattern is one file here and its instance in :data:`PATTERNS`."""

from __future__ import annotations

from fxprune.errors import UnknownPattern, nearest
from fxprune.sparsity.dcp import Dcp
from fxprune.sparsity.pattern import Pattern
from fxprune.sparsity.tile import Tile

PATTERNS: tuple[Pattern, ...] = (Dcp(), Tile())


def get(name: str) -> Pattern:
    """Return the pattern called ``name``; raises :class:`UnknownPattern` with the nearest legal name."""
    for pattern in PATTERNS:
        if pattern.name == name:
            return pattern
    legal = [p.name for p in PATTERNS]
    raise UnknownPattern(name=name, context="", nearest=nearest(str(name), legal), legal=", ".join(legal))
