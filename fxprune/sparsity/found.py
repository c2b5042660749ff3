"""What a mask can run as, and what it looks like: for weights with zeros, planned or not.

Any mask runs as single elements, and as tiles that cover it: a row of a tile is kept when any element of it is. A cover
keeps more than the mask, never less, so the function stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fxprune.sparsity import tile
from fxprune.sparsity.elements import elements, keep_groups
from fxprune.sparsity.pattern import LayerMask

# what a kept weight costs at a granularity, relative to wide tiles; enough to leave out what cannot win
_COST = {1: 2.0, 2: 1.5, 4: 1.1}
_GROUPS = ((1, 4), (2, 8), (2, 4), (1, 2), (4, 8), (8, 16), (16, 32))
_WITHIN, _MOST = 1.6, 3
_FULL = 0.95  # a cover that keeps more skips nothing


def forms(
    mask: Tensor, widths: Iterable[int], planned: LayerMask | None = None, covers: bool = True, drops: bool = True
) -> list[LayerMask]:
    """Return the forms of a mask (N, K) that may be fastest, by estimated cost, the best first; at most three.

    widths: granularities that the kernel likes. planned: how a plan cut the weight. covers: more than the mask may be
    kept, because what lies outside it is zero. drops: empty output features may go (else nothing runs as elements).
    """
    found = []
    if planned is not None and (planned.rest is not None or tile.is_tile_wise(planned.mask, planned.tiling)):
        found.append(planned)
    for granularity in sorted(set(widths), reverse=True):
        cover = tile.infer(mask, granularity, drop_columns=drops)
        allowed = cover.mask.float().mean() <= _FULL if covers else torch.equal(cover.mask, mask)
        if allowed and all(_cost(cover) < 0.97 * _cost(other) for other in found):
            found.append(cover)
    sparse = mask.float().mean() <= 1 / _COST[1]  # else single elements cannot win
    if drops and (sparse or not (covers or found)) and (planned is None or planned.tiling.granularity != 1):
        found.append(elements(mask))
    found.sort(key=_cost)
    return [form for form in found[:_MOST] if _cost(form) <= _WITHIN * max(_cost(found[0]), 1.0)]


def describe(mask: Tensor, native: int, drops: bool = True) -> str:
    """Return what the zeros of a mask (N, K) look like: "tile", an n:m that holds in every group, or "unstructured"."""
    kept = int(mask.sum())
    if int(tile.infer(mask, native, drop_columns=drops).mask.sum()) <= 1.03 * kept:
        return "tile"
    for n, m in _GROUPS:
        if mask.shape[1] >= m and torch.equal(keep_groups(mask.float(), n, m) & mask, mask):
            return f"{n}:{m}"
    return "unstructured"


def _cost(layer: LayerMask) -> float:
    tiles = layer.mask.sum().item() - (0 if layer.rest is None else layer.rest.mask.sum().item())
    rest = 0.0 if layer.rest is None else _COST[1] * layer.rest.mask.sum().item()
    return _COST.get(layer.tiling.granularity, 1.0) * tiles + rest
