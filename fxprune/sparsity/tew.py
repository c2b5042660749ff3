"""TEW, tile-wise sparsity with an element overlay (SC'20): tiles to ``s + d``, then the best share d comes back.

``B = B_tw + B_ew`` and so ``A @ B = A @ B_tw + A @ B_ew``: the tiles run as tiles, the remainder as a sparse matrix whose
result they are added to, unless one element-wise kernel for everything is faster.

The packed form holds both: ``tile_*`` tensors in the format of "tile", ``rest_*`` ones in that of "unstructured".
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fxprune.errors import ConfigError
from fxprune.sparsity.elements import budgets, elements, keep_elements
from fxprune.sparsity.pattern import Ask, LayerMask, Packed, Tiling, rename, require
from fxprune.sparsity.tile import OPERANDS, Tile
from fxprune.sparsity.unstructured import Unstructured

_HEADER = ("out_features", "in_features", "granularity")


class Tew:
    """Tiles that keep K rows, and single elements beside them; ``overlay`` is the share of all weights they are."""

    kinds: tuple[str, ...] = ("pointwise", "linear")
    fixed: float | None = None

    def __init__(self, overlay: float = 0.05, name: str = "tew") -> None:
        self.overlay, self.name = overlay, name

    @classmethod
    def parse(cls, name: str) -> Tew | None:
        """Return the pattern called ``tew:<share>``; ``None`` for another name or a share that is not in (0, 1)."""
        found = re.fullmatch(r"tew:(0?\.\d+)", name)
        share = float(found.group(1)) if found else 0.0
        return cls(share, name) if 0.0 < share < 1.0 else None

    def choose(self, ask: Ask) -> dict[str, LayerMask]:
        """Choose tiles at ``sparsity + overlay``, then restore elements until ``n - round(sparsity * n)`` are kept."""
        for name, ratio in ask.sparsity.items():
            if ratio + self.overlay >= 1.0:
                expected = f"less than {1.0 - self.overlay:g}: the overlay takes {self.overlay:g} of the weights"
                raise ConfigError(name=f"sparsity[{name!r}]", given=ratio, expected=expected)
        more = {name: ratio + self.overlay for name, ratio in ask.sparsity.items()}
        base = Tile().choose(ask, more)
        plan: dict[str, LayerMask] = {}
        for names, count in budgets(ask.importances, ask.sparsity, ask.config.scope):
            missing = count - sum(int(base[name].mask.sum()) for name in names)
            dropped = [ask.importances[name].detach().masked_fill(base[name].mask, -1.0) for name in names]
            for name, kept in zip(names, keep_elements(dropped, missing), strict=True):
                plan[name] = with_rest(base[name], kept & ~base[name].mask)
        return plan

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Pack ``weight`` (N, K) f32: rows that a tile keeps whole as its rows, all else as elements."""
        mask = mask.bool()
        rows = [mask[tiling.members(t)].all(0) for t in range(tiling.tiles)] if mask.shape == tiling.shape else []
        tiles = Tile().mask(tiling, rows)
        base = Tile().pack(weight, tiles if rows else mask, tiling)
        rest = elements(mask & ~tiles)
        overlay = Unstructured().pack(weight, rest.mask, rest.tiling)
        tensors = {f"tile_{name}": base.tensors[name] for name in OPERANDS}
        tensors.update({f"rest_{name}": overlay.tensors[name] for name in OPERANDS})
        return Packed(self.name, base.header, tensors)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (N, K) weight, zero where nothing is kept."""
        self.check(packed)
        base, rest = self._parts(packed)
        dense, other = Tile().unpack(base), Tile().unpack(rest)
        return torch.where(_places(rest), other, dense)

    def check(self, packed: Packed) -> None:
        """Raise :class:`PackedFormatError` when either part breaks its format, or both hold one element."""
        require(packed.pattern == self.name, "pattern", packed.pattern, self.name)
        require(set(packed.header) == set(_HEADER), "header", sorted(packed.header), sorted(_HEADER))
        names = {f"{part}_{name}" for part in ("tile", "rest") for name in OPERANDS}
        require(set(packed.tensors) == names, "tensors", sorted(packed.tensors), sorted(names))
        base, rest = self._parts(packed)
        Tile().check(base)
        Unstructured().check(rename(rest, Unstructured.name))
        both = int((_places(base) & _places(rest)).sum())
        require(both == 0, "rest_index", f"{both} elements that the tiles hold too", "elements beside the tiles")

    def _parts(self, packed: Packed) -> tuple[Packed, Packed]:
        parts = [{name: packed.tensors[f"{part}_{name}"] for name in OPERANDS} for part in ("tile", "rest")]
        header = {**packed.header, "granularity": 1}
        return Packed(Tile.name, dict(packed.header), parts[0]), Packed(Tile.name, header, parts[1])


def with_rest(base: LayerMask, rest: Tensor) -> LayerMask:
    """Return the tile mask ``base`` with the elements of ``rest`` (bool, disjoint from it) beside it."""
    overlay = elements(rest)
    return LayerMask(base.tiling, base.mask | rest, base.counts, base.note, overlay if overlay.counts else None)


def _places(packed: Packed) -> Tensor:
    """Return bool (N, K): what a packed tile weight holds, its zeros included."""
    ones = {**packed.tensors, "values": torch.ones_like(packed.tensors["values"])}
    return Tile().unpack(Packed(Tile.name, packed.header, ones)) != 0
