"""Unstructured sparsity: the largest elements of a GEMM weight stay, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxprune.sparsity.elements import budgets, elements, keep_elements
from fxprune.sparsity.pattern import Ask, Counts, LayerMask, Packed, Tiling, keep_largest, rename, require
from fxprune.sparsity.tile import Tile
from fxprune.sparsity.tile_plan import expand_rows


class Unstructured:
    """Single elements; a tile is one output feature (CSR), a unit one weight of it."""

    name = "unstructured"
    kinds: tuple[str, ...] = ("pointwise", "conv", "linear")
    fixed: float | None = None
    _rows = Tile()

    def choose(self, ask: Ask) -> dict[str, LayerMask]:
        """Keep exactly ``n - round(sparsity * n)`` elements of each layer, or of all with ``scope="global"``."""
        plan: dict[str, LayerMask] = {}
        for names, count in budgets(ask.importances, ask.sparsity, ask.config.scope):
            kept = keep_elements([ask.importances[name] for name in names], count)
            plan.update({name: elements(mask) for name, mask in zip(names, kept, strict=True)})
        return plan

    def tiles(self, shape: Sequence[int], granularity: int | None = None) -> Tiling:
        """Cut (N, K) in single output features; ``granularity`` has no other legal meaning here."""
        tiling = self._rows.tiles(shape, granularity)
        return Tiling(tiling.shape, tiling.columns, 1)

    def score(self, importance: Tensor, tiling: Tiling) -> list[Tensor]:
        """Return per output feature the scores of its elements, (K,)."""
        return list(importance.detach()[tiling.columns])

    def unit_size(self, tiling: Tiling, tile: int) -> int:
        """Return 1: a unit is one weight."""
        return 1

    def legal_counts(self, tiling: Tiling, tile: int, step: int = 1) -> Counts:
        """Return multiples of ``step`` elements, up to all of K."""
        return self._rows.legal_counts(tiling, tile, step)

    def select(self, scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Return a bool (K,) per output feature: its ``counts[t]`` largest, ties to the lower index."""
        return keep_largest(scores, counts)

    def mask(self, tiling: Tiling, selection: Sequence[Tensor]) -> Tensor:
        """Return bool (N, K)."""
        return expand_rows(tiling, selection)

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Pack in the tile format of granularity 1: values and K indices by output feature."""
        return rename(self._rows.pack(weight, mask, tiling), self.name)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (N, K) weight, zero where nothing is kept."""
        self.check(packed)
        return self._rows.unpack(rename(packed, self._rows.name))

    def check(self, packed: Packed) -> None:
        """Raise :class:`PackedFormatError` on anything that is not the tile format of granularity 1."""
        require(packed.pattern == self.name, "pattern", packed.pattern, self.name)
        self._rows.check(rename(packed, self._rows.name))  # the header's keys and types first
        require(packed.header["granularity"] == 1, "header['granularity']", packed.header["granularity"], 1)
