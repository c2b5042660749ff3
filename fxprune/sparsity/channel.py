"""Channel pruning: whole output features (filters) go, and with them the input features of whoever reads them.

DEPrune (NeurIPS 2024, Sec. 4.2) prunes the filters of PW2 so. Filters that are coupled, by a residual add for instance,
share one score and one fate. Scores: L1, L2 (the default) or FPGM (He et al., CVPR 2019), DEPrune's Table 5.

A pruned weight is the tile-wise form with every tile holding the same K rows, so the packed format is `tile`'s, with
the kept filters as its columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.sparsity.pattern import Counts, LayerMask, Packed, Tiling
from fxprune.sparsity.tile import Tile
from fxprune.sparsity.tile_plan import full_tiling, real, require_shape, scale_of


class Channel(Tile):
    """A unit is one output feature; by default all of them are one tile."""

    name = "channel"
    kinds: tuple[str, ...] = ("pointwise", "conv", "linear")

    def tiles(self, shape: Sequence[int], granularity: int | None = None) -> Tiling:
        """Cut (N, K) in tiles of ``granularity`` output features, one tile by default."""
        return full_tiling(shape, max(shape[0], 1) if granularity is None else granularity)

    def score(self, importance: Tensor, tiling: Tiling) -> list[Tensor]:
        """Return per tile the L2 norm of each output feature, (g_t,)."""
        require_shape(importance, tiling)
        norms = filter_scores(importance, importance, "l2").sqrt()
        return [norms[tiling.members(tile)] for tile in range(tiling.tiles)]

    def unit_size(self, tiling: Tiling, tile: int) -> int:
        """Return K: a unit is a whole output feature."""
        return tiling.shape[1]

    def legal_counts(self, tiling: Tiling, tile: int, step: int = 1) -> Counts:
        """Return multiples of ``step`` output features, up to all of the tile; it never loses all of them."""
        width = len(tiling.members(tile))
        return Counts(min(step, width), width, step)

    def mask(self, tiling: Tiling, selection: Sequence[Tensor]) -> Tensor:
        """Return bool (N, K): a weight is kept when its output feature is."""
        mask = torch.zeros(tiling.shape, dtype=torch.bool)
        if selection:
            mask[tiling.columns[torch.cat(list(selection))]] = True
        return mask

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Pack the kept output features; raises :class:`TileMismatch` when one is kept in part."""
        kept = mask.bool().any(1).nonzero().flatten()
        return super().pack(weight, mask, Tiling(tiling.shape, kept, tiling.granularity))


def filter_scores(weight: Tensor, importance: Tensor, criterion: str) -> Tensor:
    """Return one score per output feature of (N, K) tensors, in a form that adds up over coupled layers.

    "l1": sum of the element scores ``importance``. "l2": sum of their squares. "fpgm": sum of the distances of
    ``weight``'s output feature to the others of its layer: what the geometric median replaces best goes first.
    """
    scores = real(importance)
    if criterion == "l1":
        return scores.abs().sum(1)
    if criterion == "l2":
        return scores.double().square().sum(1)
    filters = real(weight)
    return torch.cdist(filters / scale_of("weight", filters.abs()), filters / scale_of("weight", filters.abs())).sum(1)


def coupled_mask(shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None, granularity: int) -> LayerMask:
    """Return the mask of (N, K) that keeps ``rows`` (bool (N,)) and ``columns`` (bool (K,)); ``None`` keeps all."""
    rows = torch.ones(shape[0], dtype=torch.bool) if rows is None else rows
    columns = torch.ones(shape[1], dtype=torch.bool) if columns is None else columns
    tiling = Tiling(shape, rows.nonzero().flatten(), granularity)
    return LayerMask(tiling, rows[:, None] & columns, (int(columns.sum()),) * tiling.tiles)


def within(shape: tuple[int, int], rows: Tensor, columns: Tensor, inner: LayerMask) -> LayerMask:
    """Return a mask of the submatrix of kept ``rows`` and ``columns`` (bool) as one of the whole (N, K)."""
    kept = rows.nonzero().flatten()
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[rows.nonzero(), columns.nonzero().flatten()] = inner.mask
    tiling = Tiling(shape, kept[inner.tiling.columns], inner.tiling.granularity)
    return LayerMask(tiling, mask, inner.counts, inner.note)
