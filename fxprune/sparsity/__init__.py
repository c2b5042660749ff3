"""Sparsity patterns. A new pattern is one file here and its instance in :data:`PATTERNS`."""

from __future__ import annotations

import re

from torch import Tensor

from fxprune.errors import UnknownPattern, nearest
from fxprune.sparsity import dcp, tile
from fxprune.sparsity.block import Block
from fxprune.sparsity.channel import Channel
from fxprune.sparsity.dcp import Dcp
from fxprune.sparsity.elements import elements
from fxprune.sparsity.n_of_m import MOST, NofM
from fxprune.sparsity.pattern import LayerMask, Pattern, kept
from fxprune.sparsity.tew import Tew
from fxprune.sparsity.tile import Tile
from fxprune.sparsity.tvw import Tvw
from fxprune.sparsity.unstructured import Unstructured

PATTERNS: tuple[Pattern, ...] = (Dcp(), Tile(), Channel(), Unstructured(), NofM(), Block(), Tvw(), Tew())
_PARAMETERISED = (NofM, Block, Tvw, Tew)  # whose names may hold numbers: "1:2", "block:16x8", "tvw:1:2", "tew:0.01"

_COVER = 1.1  # tiles that keep more than this share of what a mask keeps have lost its form


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
    context = f" (n:m has 1 <= n <= m <= {MOST})" if re.fullmatch(r"-?\d+:-?\d+", str(name)) else ""
    raise UnknownPattern(name=name, context=context, nearest=nearest(str(name), legal), legal=", ".join(legal))


def refit(mask: Tensor, granularity: int, depthwise: bool, drops: bool = True) -> LayerMask:
    """Return the tightest mask our kernels run that keeps all of ``mask``, bool of a weight's matrix view.

    drops: output features that are empty may go; in a grouped convolution they may not.
    """
    if depthwise:
        return dcp.infer(mask.float(), granularity)
    cover = tile.infer(mask, granularity, drop_columns=drops)
    scattered = drops and cover.kept > _COVER * kept(mask)
    return elements(mask) if scattered else cover
