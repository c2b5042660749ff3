"""TVW (arXiv 2402.10876): tile-wise sparsity, and n:m inside each tile, along the K rows that the tile keeps.

The tiles lose ``s_tw = 1 - (1 - s) / (n/m)``; then each output feature keeps n of m consecutive *compacted* rows, which is
what a sparse matrix unit would see. A tail group of r rows keeps ``ceil(n * r / m)``.

    values    f32   tile after tile a row-major [kept][g_t] block
    place     u8    of the same shape: the place of each value in its group of m, low first
    index, tile_ptr, columns   as in the format of "tile"
    header    out_features (N), in_features (K), granularity (G), n, m
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from fxprune.errors import ConfigError
from fxprune.sparsity.elements import keep_groups
from fxprune.sparsity.pattern import Ask, LayerMask, Packed, Tiling, require, require_layout
from fxprune.sparsity.tile import Tile
from fxprune.sparsity.tile_plan import mismatch, require_packable

_TILE = ("index", "tile_ptr", "columns")
_HEADER = ("out_features", "in_features", "granularity")


class Tvw:
    """Tiles of output features that keep K rows, n of m of them for each feature."""

    kinds: tuple[str, ...] = ("pointwise", "conv", "linear")
    fixed: float | None = None

    def __init__(self, n: int = 2, m: int = 4, name: str = "tvw") -> None:
        self.n, self.m, self.name = n, m, name

    @classmethod
    def parse(cls, name: str) -> Tvw | None:
        """Return the pattern called ``tvw:n:m``; ``None`` for another name or n > m or m > 32."""
        found = re.fullmatch(r"tvw:(\d+):(\d+)", name)
        n, m = map(int, found.groups()) if found else (0, 0)
        return cls(n, m, name) if 1 <= n <= m <= 32 else None

    def choose(self, ask: Ask) -> dict[str, LayerMask]:
        """Choose tiles, then n of m in each. Raises :class:`ConfigError` below the sparsity that n:m alone has."""
        share = self.n / self.m
        for name, ratio in ask.sparsity.items():
            if ratio < 1.0 - share:
                expected = f"at least {1.0 - share:.4g}, which {self.n}:{self.m} alone leaves; or pattern 'tile'"
                raise ConfigError(name=f"sparsity[{name!r}]", given=ratio, expected=expected)
        tiles = {name: 1.0 - (1.0 - ratio) / share for name, ratio in ask.sparsity.items()}
        base = Tile().choose(ask, tiles, self.m)
        return {name: self._thin(ask.importances[name], layer) for name, layer in base.items()}

    def _thin(self, importance: Tensor, layer: LayerMask) -> LayerMask:
        mask, tiling = layer.mask.clone(), layer.tiling
        rows = layer.mask[tiling.columns[:: tiling.granularity]]
        for t in range(tiling.tiles):
            at = (tiling.members(t)[:, None], rows[t].nonzero().flatten()[None, :])
            mask[at] = keep_groups(importance.detach()[at], self.n, self.m)
        return LayerMask(replace(tiling, rows=rows), mask, layer.counts, layer.note)

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Pack ``weight`` (N, K) f32. Raises :class:`TileMismatch` when a tile's rows do not keep n of m."""
        mask = mask.bool()
        require_packable(weight, mask, tiling)
        rows = [mask[tiling.members(t)].any(0) for t in range(tiling.tiles)] if tiling.rows is None else list(tiling.rows)
        packed = Tile().pack(weight, Tile().mask(tiling, rows), tiling)
        if bool((mask & ~Tile().mask(tiling, rows)).any()):
            raise mismatch(
                mask.shape, tiling.granularity, "the mask keeps weights outside its tiles", "Build both together."
            )
        values, places = [weight.new_zeros(0)], [torch.zeros(0, dtype=torch.uint8)]
        for t, kept in enumerate(rows):
            members, index = tiling.members(t), kept.nonzero().flatten()
            chosen = mask[members[:, None], index[None, :]]
            if not torch.equal(keep_groups(chosen.float(), self.n, self.m), chosen):
                reason = f"a group of {self.m} kept rows does not keep its {self.n}"
                raise mismatch(mask.shape, tiling.granularity, reason, "Use pattern 'unstructured'.")
            shape = (len(members), self._kept(len(index)))
            place = (torch.arange(len(index)) % self.m).to(torch.uint8).expand_as(chosen)
            block = weight.detach()[members[:, None], index[None, :]]
            values.append(block[chosen].reshape(shape).t().flatten())
            places.append(place[chosen].reshape(shape).t().flatten())
        tensors = {name: packed.tensors[name] for name in _TILE}
        tensors.update(values=torch.cat(values), place=torch.cat(places))
        return Packed(self.name, {**packed.header, "n": self.n, "m": self.m}, tensors)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (N, K) weight, zero where nothing is kept."""
        self.check(packed)
        header, tensors = packed.header, packed.tensors
        dense = tensors["values"].new_zeros(header["out_features"], header["in_features"])
        for members, index, values, place in self._tiles(packed):
            group = torch.arange(len(place)) // self.n
            dense[members[None, :], index[group[:, None] * self.m + place.long()]] = values
        return dense

    def check(self, packed: Packed) -> None:
        """Raise :class:`PackedFormatError` on a bad tile structure, or a place out of order or outside its group."""
        ints = dict.fromkeys(_TILE, torch.int32)
        require_layout(packed, self.name, (*_HEADER, "n", "m"), {"values": torch.float32, "place": torch.uint8, **ints})
        header, tensors = packed.header, packed.tensors
        require((header["n"], header["m"]) == (self.n, self.m), "n:m", (header["n"], header["m"]), (self.n, self.m))
        for key, tensor in tensors.items():
            require(tensor.dim() == 1, f"{key} rank", tensor.dim(), 1)
        require(header["granularity"] >= 1, "header['granularity']", header["granularity"], "at least 1")
        columns, pointer = tensors["columns"].long(), tensors["tile_ptr"].long()
        require(len(pointer) == -(-len(columns) // header["granularity"]) + 1, "tile_ptr length", len(pointer), "tiles + 1")
        counts = pointer.diff()
        require(bool((counts >= 0).all()), "tile_ptr", "a decreasing offset", "offsets in order")
        require(int(pointer[0]) == 0, "tile_ptr[0]", int(pointer[0]), 0)
        require(int(pointer[-1]) == len(tensors["index"]), "tile_ptr[-1]", int(pointer[-1]), len(tensors["index"]))
        widths = [len(part) for part in columns.split(header["granularity"])] if len(columns) else []
        blocks = zip(counts.tolist(), widths, strict=True)
        tile = Packed("tile", {key: header[key] for key in _HEADER}, {name: tensors[name] for name in _TILE})
        tile.tensors["values"] = torch.zeros(sum(c * w for c, w in blocks))
        Tile().check(tile)
        total = sum(self._kept(c) * w for c, w in zip(counts.tolist(), widths, strict=True))
        for key in ("values", "place"):
            require(len(tensors[key]) == total, f"{key} length", len(tensors[key]), total)
        for _, index, _, place in self._tiles(packed):
            position = (torch.arange(len(place)) // self.n)[:, None] * self.m + place.long()
            if place.numel():
                require(int(place.max()) < self.m, "place", int(place.max()), f"below {self.m}")
                require(int(position.max()) < len(index), "place", int(position.max()), f"below {len(index)} with its group")
                require(bool((position.diff(dim=0) > 0).all()), "place", "places out of order", "low place first")

    def _kept(self, k: int) -> int:
        return self.n * (k // self.m) + -(-self.n * (k % self.m) // self.m)

    def _tiles(self, packed: Packed) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return (output features, kept rows, values [kept][g], places) of every tile."""
        tensors, result, at = packed.tensors, [], 0
        pointer = tensors["tile_ptr"].tolist()
        for t, members in enumerate(tensors["columns"].long().split(packed.header["granularity"])):
            if t + 1 == len(pointer):  # no columns at all still split into one empty part
                break
            index = tensors["index"][pointer[t] : pointer[t + 1]].long()
            shape = (self._kept(len(index)), len(members))
            end = at + shape[0] * shape[1]
            values, place = (tensors[key][at:end].reshape(shape) for key in ("values", "place"))
            result.append((members, index, values, place))
            at = end
        return result
