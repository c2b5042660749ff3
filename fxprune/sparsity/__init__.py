"""Sparsity patterns. A new pattern is one file here and its instance in :data:`PATTERNS`."""

from __future__ import annotations

from fxprune.errors import UnknownPattern, nearest
from fxprune.sparsity.block import Block
from fxprune.sparsity.dcp import Dcp
from fxprune.sparsity.n_of_m import NofM
from fxprune.sparsity.pattern import Pattern
from fxprune.sparsity.tew import Tew
from fxprune.sparsity.tile import Tile
from fxprune.sparsity.tvw import Tvw
from fxprune.sparsity.unstructured import Unstructured

PATTERNS: tuple[Pattern, ...] = (Dcp(), Tile(), Unstructured(), NofM(), Block(), Tvw(), Tew())
_PARAMETERISED = (NofM, Block, Tvw, Tew)  # whose names may hold numbers: "1:2", "block:16x8", "tvw:1:2", "tew:0.01"


def get(name: str) -> Pattern:
    """Return the pattern called ``name``; raises :class:`UnknownPattern` with the nearest legal name."""
    for pattern in PATTERNS:
        if pattern.name == name:
            return pattern
    for family in _PARAMETERISED:
        parsed = family.parse(str(name))
        if parsed is not None:
            return parsed
    legal = [p.name for p in PATTERNS]
    raise UnknownPattern(name=name, context="", nearest=nearest(str(name), legal), legal=", ".join(legal))
