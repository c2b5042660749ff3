"""Sparsity patterns. A new pattern is one file here and its instance in :data:`PATTERNS`."""

from __future__ import annotations

from torch import Tensor

from fxprune.errors import UnknownPattern, nearest
from fxprune.sparsity import dcp, tile
from fxprune.sparsity.channel import Channel
from fxprune.sparsity.dcp import Dcp
from fxprune.sparsity.pattern import LayerMask, Pattern
from fxprune.sparsity.tile import Tile

PATTERNS: tuple[Pattern, ...] = (Dcp(), Tile(), Channel())


def get(name: str) -> Pattern:
    """Return the pattern called ``name``; raises :class:`UnknownPattern` with the nearest legal name."""
    for pattern in PATTERNS:
        if pattern.name == name:
            return pattern
    legal = [p.name for p in PATTERNS]
    raise UnknownPattern(name=name, context="", nearest=nearest(str(name), legal), legal=", ".join(legal))


def refit(mask: Tensor, granularity: int, depthwise: bool) -> LayerMask:
    """Return the tightest mask our kernels run that keeps all of ``mask``, bool of a weight's matrix view."""
    kept = mask.float()
    return dcp.infer(kept, granularity) if depthwise else tile.infer(kept, granularity, drop_columns=True)
