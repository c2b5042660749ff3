"""Block sparsity: whole blocks of R output features x C inputs go, those with the smallest L2 norm first.

values  f32 (blocks, R, C)   kept blocks by row of blocks; what sticks out of the weight is 0 (BSR)
index   i32 (blocks)         block column of each, increasing in a row of blocks
row_ptr i32 (rows + 1)       offsets into index
header  out_features (N), in_features (K), rows (R), columns (C)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxprune.sparsity.elements import budgets, keep_elements
from fxprune.sparsity.pattern import Ask, Counts, LayerMask, Packed, Tiling, keep_largest, require, require_layout
from fxprune.sparsity.tile_plan import expand_rows, full_tiling, mismatch, require_packable


class Block:
    """R x C blocks; a tile is R output features, a unit is C consecutive K rows of it."""

    kinds: tuple[str, ...] = ("pointwise", "conv", "linear")
    fixed: float | None = None

    def __init__(self, rows: int = 32, columns: int = 32, name: str = "block") -> None:
        self.rows, self.columns, self.name = rows, columns, name

    @classmethod
    def parse(cls, name: str) -> Block | None:
        """Return the pattern called ``block:RxC``; ``None`` for another name or an empty block."""
        found = re.fullmatch(r"block:(\d+)x(\d+)", name)
        rows, columns = map(int, found.groups()) if found else (0, 0)
        return cls(rows, columns, name) if min(rows, columns) > 0 else None

    def choose(self, ask: Ask) -> dict[str, LayerMask]:
        """Keep the nearest number of blocks, at least one, in each layer or in all with ``scope="global"``."""
        norms = {name: self._norms(scores) for name, scores in ask.importances.items()}
        plan: dict[str, LayerMask] = {}
        for names, count in budgets(norms, ask.sparsity, ask.config.scope):
            kept = keep_elements([norms[name] for name in names], max(count, 1))
            for name, blocks in zip(names, kept, strict=True):
                n, k = ask.importances[name].shape
                tiling = self.tiles((n, k))
                rows = blocks.repeat_interleave(self.columns, 1)[:, :k]
                plan[name] = LayerMask(tiling, expand_rows(tiling, list(rows)), tuple(rows.sum(1).tolist()))
        return plan

    def tiles(self, shape: Sequence[int], granularity: int | None = None) -> Tiling:
        """Cut (N, K) in rows of blocks; their height is the pattern's, whatever ``granularity`` says."""
        tiling = full_tiling(shape, granularity)
        return Tiling(tiling.shape, tiling.columns, self.rows)

    def score(self, importance: Tensor, tiling: Tiling) -> list[Tensor]:
        """Return per row of blocks the L2 norm of each block."""
        return list(self._norms(importance))

    def unit_size(self, tiling: Tiling, tile: int) -> int:
        """Return the weights of a block; the last one of a row may stick out of the weight."""
        return len(tiling.members(tile)) * min(self.columns, tiling.shape[1])

    def legal_counts(self, tiling: Tiling, tile: int, step: int = 1) -> Counts:
        """Return 1 block to all of them."""
        return Counts(1, -(-tiling.shape[1] // self.columns))

    def select(self, scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Return a bool tensor per row of blocks: its ``counts[t]`` largest, ties to the lower index."""
        return keep_largest(scores, counts)

    def mask(self, tiling: Tiling, selection: Sequence[Tensor]) -> Tensor:
        """Return bool (N, K)."""
        return expand_rows(tiling, [s.repeat_interleave(self.columns)[: tiling.shape[1]] for s in selection])

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Pack ``weight`` (N, K) f32 as BSR. Raises :class:`TileMismatch` when a block is kept in part."""
        require_packable(weight, mask, tiling)
        inside = self._blocks(torch.ones(mask.shape)).sum((2, 3))
        members = self._blocks(mask.float()).sum((2, 3))
        if not bool(((members == 0) | (members == inside)).all()):
            raise mismatch(mask.shape, self.rows, "a block is kept in part", "Use pattern 'unstructured'.")
        kept = members > 0
        pointer = torch.zeros(len(kept) + 1, dtype=torch.int32)
        pointer[1:] = kept.sum(1).cumsum(0)
        header = dict(zip(("out_features", "in_features"), tiling.shape, strict=True))
        header.update(rows=self.rows, columns=self.columns)
        tensors = {"values": self._blocks(weight.detach())[kept], "index": kept.nonzero()[:, 1].int(), "row_ptr": pointer}
        return Packed(self.name, header, tensors)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (N, K) weight, zero where nothing is kept."""
        self.check(packed)
        n, k = packed.header["out_features"], packed.header["in_features"]
        grid = self._grid(n, k)
        dense = packed.tensors["values"].new_zeros(*grid, self.rows, self.columns)
        row = torch.arange(grid[0]).repeat_interleave(packed.tensors["row_ptr"].long().diff())
        dense[row, packed.tensors["index"].long()] = packed.tensors["values"]
        return dense.transpose(1, 2).reshape(grid[0] * self.rows, grid[1] * self.columns)[:n, :k].contiguous()

    def check(self, packed: Packed) -> None:
        """Raise :class:`PackedFormatError` on a bad header, shape, offset or index, or a value outside the weight."""
        tensors = {"values": torch.float32, "index": torch.int32, "row_ptr": torch.int32}
        require_layout(packed, self.name, ("out_features", "in_features", "rows", "columns"), tensors)
        size = (packed.header["rows"], packed.header["columns"])
        require(size == (self.rows, self.columns), "block", size, (self.rows, self.columns))
        n, k = packed.header["out_features"], packed.header["in_features"]
        rows, columns = self._grid(n, k)
        values, index, pointer = (packed.tensors[key] for key in tensors)
        require(index.dim() == 1, "index rank", index.dim(), 1)
        require(tuple(pointer.shape) == (rows + 1,), "row_ptr shape", tuple(pointer.shape), (rows + 1,))
        require(int(pointer[0]) == 0, "row_ptr[0]", int(pointer[0]), 0)
        require(int(pointer[-1]) == len(index), "row_ptr[-1]", int(pointer[-1]), f"len(index) = {len(index)}")
        counts = pointer.long().diff()
        require(bool((counts >= 0).all()), "row_ptr", "a decreasing offset", "offsets in order")
        require(tuple(values.shape) == (len(index), *size), "values shape", tuple(values.shape), (len(index), *size))
        row = torch.arange(rows).repeat_interleave(counts)
        place = row * columns + index.long()
        if len(index):
            low, high = int(index.min()), int(index.max())
            require(low >= 0 and high < columns, "index", f"{low}..{high}", f"0..{columns - 1}")
            require(bool((place.diff() > 0).all()), "index", "blocks out of order or repeated", "increasing columns")
            outside = self._blocks(torch.ones(n, k))[row, index.long()] == 0
            require(not bool((values[outside] != 0).any()), "values", "a weight past the edge", "0 outside the weight")

    def _grid(self, n: int, k: int) -> tuple[int, int]:
        return -(-n // self.rows), -(-k // self.columns)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """View (N, K) as (block rows, block columns, R, C), padded with zeros."""
        n, k = matrix.shape
        rows, columns = self._grid(n, k)
        padded = pad(matrix, (0, columns * self.columns - k, 0, rows * self.rows - n))
        return padded.reshape(rows, self.rows, columns, self.columns).transpose(1, 2)

    def _norms(self, importance: Tensor) -> Tensor:
        return self._blocks(importance.detach()).double().square().sum((2, 3)).sqrt()
