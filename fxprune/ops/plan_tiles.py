"""What a plan of tiles counts and compares; ``fxprune/sparsity/tile_plan.py`` and ``fxprune/hold.py`` call these.

    tile_scores(importance, columns, granularity)   importance: float32 (N, K), columns: int64 (N'), features of the
        tiles, ``granularity`` to each and the rest to the last -> float32 (tiles, K), the root mean square of each K row
        over the features of a tile, rounded once
    keep_best(scores, weights, budget, guarded)     scores: float32 (tiles, U) of several layers, ranked together;
        weights: int64 (tiles), of one unit of each tile -> bool (tiles, U): the best units whose weights add up to
        ``budget``, to the nearest unit, ties to the earlier layer and the lower index. An infinite score is always kept, a
        negative infinite one never; with ``guarded`` the best unit of each tile is kept as well
    held_scores(scores, kept, share, magnitudes)    scores: float32, or with ``magnitudes`` those of them; kept: bool, of
        the same shape -> 0 where pruned, elsewhere the score, at least ``share * max(largest score, share)``, so that it
        is above everything pruned
    shared_rows(mask, groups)                       mask: bool (N, ...) -> the first of ``groups`` (sizes) such that the
        rows of each run of so many are the same, else 1
    tile_counts(mask, columns, granularity)         mask: bool (N, K), columns and tiles as of tile_scores -> int32
        (tiles, K), how many features of a tile keep each K row
    zero_outside(values, mask)                      values: floats, mask: bool, of one shape -> True when all values that
        the mask does not keep are zero (-0.0 is, NaN is not)

They have no gradient and are no part of a graph. Source of the ranking: tile-wise sparsity (SC'20).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tile_scores(importance: Tensor, columns: Tensor, granularity: int) -> Tensor:
    tiles = columns.split(granularity) if len(columns) else ()
    rows = [(importance[tile].double().square().sum(0) / len(tile)).sqrt().float() for tile in tiles]
    return torch.stack(rows) if rows else importance.new_zeros(0, importance.shape[1])


def keep_best(scores: Sequence[Tensor], weights: Sequence[Tensor], budget: float, guarded: bool) -> list[Tensor]:
    guards = [_guarded(s) if guarded and s.numel() else s for s in scores]
    flat = torch.cat([s.flatten() for s in guards]) if scores else torch.zeros(0)
    units = [w.repeat_interleave(s.shape[1]) for s, w in zip(scores, weights, strict=True)]
    weight = torch.cat(units).double() if scores else torch.zeros(0)
    order = flat.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order] = weight[order].cumsum(0) - weight[order] / 2 <= budget
    chosen = (chosen | (flat == torch.inf)) & (flat != -torch.inf)
    return [part.reshape(s.shape) for part, s in zip(chosen.split([s.numel() for s in scores]), scores, strict=True)]


def held_scores(scores: Tensor, kept: Tensor, share: float, magnitudes: bool) -> Tensor:
    scores = scores.abs() if magnitudes else scores
    floor = share * scores.max().clamp_min(share) if scores.numel() else 0.0
    return torch.where(kept, scores.clamp_min(floor), 0)


def shared_rows(mask: Tensor, groups: Sequence[int]) -> int:
    for group in groups if mask.numel() else ():
        if len(mask) % group == 0:
            blocks = mask.unflatten(0, (-1, group))
            if torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
                return group
    return 1


def tile_counts(mask: Tensor, columns: Tensor, granularity: int) -> Tensor:
    tiles = columns.split(granularity) if len(columns) else ()
    rows = [mask[tile].sum(0, dtype=torch.int32) for tile in tiles]
    return torch.stack(rows) if rows else mask.new_zeros(0, mask.shape[1], dtype=torch.int32)


def zero_outside(values: Tensor, mask: Tensor) -> bool:
    return not bool(((values != 0) & ~mask).any())


def _guarded(scores: Tensor) -> Tensor:
    """Make the best score of each row of ``scores`` infinite, so that something of it stays."""
    best = scores.argmax(-1, keepdim=True)
    return scores.scatter(-1, best, torch.inf)
