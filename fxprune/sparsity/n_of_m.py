"""n:m sparsity: of every m consecutive weights of an output feature along K, the n largest stay ("2:4" keeps 2 of 4).

    values  f32  (N, kept)    kept weights of each output feature, group by group
    index   u8   (N, kept)    place of each in its group, low index first
    header  out_features (N), in_features (K), n, m

``kept = n * (K // m) + ceil(n * r / m)`` for a tail group of ``r = K % m``: a full group never keeps fewer than n.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.errors import ConfigError
from fxprune.sparsity.elements import elements, keep_groups
from fxprune.sparsity.pattern import (
    Ask,
    Counts,
    LayerMask,
    Packed,
    Tiling,
    require,
    require_layout,
)
from fxprune.sparsity.tile_plan import mismatch, require_packable
from fxprune.sparsity.unstructured import Unstructured

MOST = 32  # weights of a group
_TOLERANCE = 0.01


class NofM(Unstructured):
    """n kept of m; the count of each output feature is given by K."""

    def __init__(self, n: int = 2, m: int = 4) -> None:
        self.n, self.m = n, m
        self.name = f"{n}:{m}"
        self.fixed = 1.0 - n / m

    @classmethod
    def parse(cls, name: str) -> NofM | None:
        """Return the pattern called ``n:m``; ``None`` for another name or n > m or m > 32."""
        found = re.fullmatch(r"(\d+):(\d+)", name)
        if found is None:
            return None
        n, m = map(int, found.groups())
        return cls(n, m) if 1 <= n <= m <= MOST else None

    def choose(self, ask: Ask) -> dict[str, LayerMask]:
        """Keep n of m; ``sparsity`` must be within 1 % of ``1 - n/m``. Raises :class:`ConfigError`."""
        for name, ratio in ask.sparsity.items():
            if abs(ratio - (1.0 - self.n / self.m)) > _TOLERANCE:
                expected = f"{1.0 - self.n / self.m:.4g}, all that pattern {self.name!r} can leave, or no sparsity at all"
                raise ConfigError(name=f"sparsity[{name!r}]", given=ratio, expected=expected)
        return {name: elements(keep_groups(scores, self.n, self.m)) for name, scores in ask.importances.items()}

    def legal_counts(self, tiling: Tiling, tile: int, step: int = 1) -> Counts:
        """Return the one count there is."""
        kept = self._kept(tiling.shape[1])
        return Counts(kept, kept)

    def select(self, scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Return a bool (K,) per output feature. Raises ``ValueError`` for a count that n:m does not have."""
        if len(scores) != len(counts):
            raise ValueError(f"got {len(counts)} counts for {len(scores)} tiles")
        for tile, (score, count) in enumerate(zip(scores, counts, strict=True)):
            if count != self._kept(len(score)):
                raise ValueError(f"tile {tile}: got count {count}, expected {self._kept(len(score))}")
        return [keep_groups(score, self.n, self.m) for score in scores]

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Pack ``weight`` (N, K) f32. Raises :class:`TileMismatch` when ``mask`` does not keep n of each m."""
        require_packable(weight, mask, tiling)
        n, k = tiling.shape
        mask = mask.bool()
        if not torch.equal(keep_groups(mask.float(), self.n, self.m), mask):
            groups = f"a group of {self.m} does not keep its {self.n}"
            raise mismatch(mask.shape, 1, groups, "Use pattern 'unstructured'.")
        place = (torch.arange(k) % self.m).to(torch.uint8).expand(n, k)
        shape = (n, self._kept(k))
        tensors = {"values": weight.detach()[mask].reshape(shape), "index": place[mask].reshape(shape)}
        return Packed(self.name, {"out_features": n, "in_features": k, "n": self.n, "m": self.m}, tensors)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (N, K) weight, zero where nothing is kept."""
        self.check(packed)
        n, k = packed.header["out_features"], packed.header["in_features"]
        dense = packed.tensors["values"].new_zeros(n, k)
        return dense.scatter_(1, self._places(packed.tensors["index"]), packed.tensors["values"])

    def check(self, packed: Packed) -> None:
        """Raise :class:`PackedFormatError` on a bad header, shape, or an index out of order or outside its group."""
        tensors = {"values": torch.float32, "index": torch.uint8}
        require_layout(packed, self.name, ("out_features", "in_features", "n", "m"), tensors)
        header = packed.header
        require((header["n"], header["m"]) == (self.n, self.m), "n:m", (header["n"], header["m"]), (self.n, self.m))
        n, k = header["out_features"], header["in_features"]
        shape = (n, self._kept(k))
        for key in tensors:
            require(tuple(packed.tensors[key].shape) == shape, f"{key} shape", tuple(packed.tensors[key].shape), shape)
        index = packed.tensors["index"]
        if index.numel():
            require(int(index.max()) < self.m, "index", int(index.max()), f"below {self.m}")
            places = self._places(index)
            require(int(places.max()) < k, "index", int(places.max()), f"below {k} with its group")
            require(bool((places.diff(dim=1) > 0).all()), "index", "places out of order", "low index first")

    def _kept(self, k: int) -> int:
        return self.n * (k // self.m) + -(-self.n * (k % self.m) // self.m)

    def _places(self, index: Tensor) -> Tensor:
        """Return int64 (N, kept): the K index of every kept weight."""
        group = torch.arange(index.shape[1]) // self.n
        return group * self.m + index.long()
