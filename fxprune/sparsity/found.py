"""What a mask can run as, and what it looks like: for weights with zeros, planned or not.

Any mask runs as single elements, and as tiles that cover it: a row of a tile is kept when any element of it is. A cover
keeps more than the mask, never less, so the function stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.sparsity import tile
from fxprune.sparsity.elements import elements, keep_groups
from fxprune.sparsity.pattern import LayerMask, kept

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
    found: list[tuple[float, LayerMask]] = []
    elements_kept = kept(mask)
    if planned is not None and (planned.rest is not None or tile.is_tile_wise(planned.mask, planned.tiling)):
        found.append((_cost(planned), planned))
    for granularity in sorted(set(widths), reverse=True):
        if found and _COST.get(granularity, 1.0) * elements_kept >= 0.97 * found[0][0]:
            continue  # a cover keeps no less than the mask
        cover = tile.infer(mask, granularity, drop_columns=drops)
        allowed = cover.share <= _FULL if covers else torch.equal(cover.mask, mask)
        cost = _cost(cover)
        if allowed and all(cost < 0.97 * other for other, _ in found):
            found.append((cost, cover))
    sparse = _COST[1] * elements_kept <= mask.numel()  # else single elements cannot win
    if drops and (sparse or not (covers or found)) and (planned is None or planned.tiling.granularity != 1):
        found.append((_COST[1] * elements_kept, elements(mask)))
    found.sort(key=lambda pair: pair[0])
    return [form for cost, form in found[:_MOST] if cost <= _WITHIN * max(found[0][0], 1.0)]


def halved(mask: Tensor, width: int, planned: LayerMask | None = None, drops: bool = True) -> LayerMask | None:
    """Return tiles that cover a mask (N, K) and of whose rows each feature uses at most two in four; ``None`` without such.

    TVW's own tiles, those that fit the mask most closely, or all rows (plain 2:4).
    """
    covers = [tile.infer(mask, width, drop_columns=drops), tile.keep_all((mask.shape[0], mask.shape[1]), width)]
    rows = None if planned is None else planned.tiling.rows
    if planned is not None and rows is not None:
        whole = tile.Tile().mask(planned.tiling, list(rows))
        covers.insert(0, LayerMask(planned.tiling, whole, tuple(rows.sum(1).tolist())))
    return next((replace(cover, halved=True) for cover in covers if _is_halved(mask, cover)), None)


def _is_halved(mask: Tensor, cover: LayerMask) -> bool:
    if bool((mask & ~cover.mask).any()):
        return False
    for t in range(cover.tiling.tiles):
        members = cover.tiling.members(t)
        used = mask[members][:, cover.mask[members[0]]]
        groups = F.pad(used, (0, -used.shape[1] % 4)).unflatten(1, (-1, 4))
        if bool((groups.sum(2) > 2).any()):
            return False
    return True


def describe(mask: Tensor, native: int, drops: bool = True) -> str:
    """Return what the zeros of a mask (N, K) look like: "tile", an n:m that holds in every group, or "unstructured"."""
    if tile.infer(mask, native, drop_columns=drops).kept <= 1.03 * kept(mask):
        return "tile"
    for n, m in _GROUPS:
        if mask.shape[1] >= m and torch.equal(keep_groups(mask.float(), n, m) & mask, mask):
            return f"{n}:{m}"
    return "unstructured"


def _cost(layer: LayerMask) -> float:
    rest = 0 if layer.rest is None else layer.rest.kept
    return _COST.get(layer.tiling.granularity, 1.0) * (layer.kept - rest) + _COST[1] * rest
