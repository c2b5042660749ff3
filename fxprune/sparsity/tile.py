"""Tile-wise sparsity, TW (SC'20, arXiv 2008.13006): whole output features go, then K rows inside each tile.

A weight (N, K) loses columns (output features) first; the kept ones, walked left to right, form tiles of G;
each tile then loses K rows of its own, so a tile is a dense block addressed through a list of kept rows.

    values    f32 flat   tile t is a row-major [k_t][g_t] block; blocks follow each other
    index     i32 (sum k_t)   kept K rows, strictly increasing inside a tile
    tile_ptr  i32 (tiles+1)   offsets into index
    columns   i32 (N')        kept output features, strictly increasing
    header    out_features (N), in_features (K), granularity (G)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxprune.errors import TileMismatch
from fxprune.ops import cuda_nm_image, cuda_tf32_image, cuda_tile_image, tile_image
from fxprune.sparsity.pattern import (
    Ask,
    Counts,
    LayerMask,
    Packed,
    Tiling,
    any_along,
    keep_largest,
    kept,
    require,
    require_layout,
)
from fxprune.sparsity.tile_plan import (
    expand_rows,
    full_tiling,
    mismatch,
    plan_layers,
    ranked,
    require_packable,
    require_shape,
    row_scores,
    tile_counts,
    tile_widths,
    width_in_groups,
)

__all__ = ["OPERANDS", "Tile", "infer", "is_tile_wise", "keep_all", "operands", "plan_layers"]
OPERANDS = ("values", "index", "tile_ptr", "columns")
_LIMIT = 2**31 - 1  # offsets and indices are int32


class Tile:
    """K rows of a tile of output features; a unit is one row, ``g_t`` weights."""

    name = "tile"
    kinds: tuple[str, ...] = ("pointwise", "conv", "linear", "rnn")
    fixed: float | None = None

    def choose(self, ask: Ask, sparsity: Mapping[str, float] | None = None, step: int = 1) -> dict[str, LayerMask]:
        """Plan each kind with its own granularity, columns and steps.

        ``sparsity`` instead of what was asked for, and a further ``step`` of rows: for patterns built on this one.
        """
        sparsity = ask.sparsity if sparsity is None else sparsity
        config, masks = ask.config, {}
        for kind in sorted(set(ask.kinds.values())):
            names = [name for name in ask.importances if ask.kinds[name] == kind]
            row, columns = ask.unit(kind), config.by_kind("columns", kind)
            columns = kind == "linear" if columns is None else columns
            size = {n: (len(ask.importances[n]), ask.groups.get(n, 1)) for n in names}
            width = config.by_kind("granularity", kind)
            aligned = config.recalibration != "off"
            plan = plan_layers(
                {name: ask.importances[name] for name in names},
                {name: sparsity[name] for name in names},
                granularity={n: width_in_groups(*size[n], width or row.width(size[n][0] // size[n][1])) for n in names},
                columns={n: columns and ask.groups.get(n, 1) == 1 for n in names},
                scope=config.scope,
                ranking=config.ranking,
                step={n: math.lcm(row.row_step(ask.importances[n].shape[1]), step) if aligned else 1 for n in names},
                column_step=row.column_step if aligned else None,
                apriori=config.apriori,
            )
            masks.update(plan)
        return {name: masks[name] for name in ask.importances}

    def tiles(self, shape: Sequence[int], granularity: int | None = None) -> Tiling:
        """Cut (N, K) in tiles of ``granularity`` output features (64 by default), all of them kept."""
        return full_tiling(shape, granularity)

    def score(self, importance: Tensor, tiling: Tiling) -> list[Tensor]:
        """Return per tile the RMS over its kept output features of each K row, (K,)."""
        require_shape(importance, tiling)
        return list(row_scores(ranked(importance), tiling, "weight"))

    def unit_size(self, tiling: Tiling, tile: int) -> int:
        """Return the width of the tile: a row spans its output features."""
        return len(tiling.members(tile))

    def legal_counts(self, tiling: Tiling, tile: int, step: int = 1) -> Counts:
        """Return multiples of ``step`` rows, up to all of K; a tile never loses all its rows."""
        return Counts(min(step, tiling.shape[1]), tiling.shape[1], step)

    def select(self, scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Return a bool (K,) per tile: its ``counts[t]`` best rows, ties to the lower index."""
        return keep_largest(scores, counts)

    def mask(self, tiling: Tiling, selection: Sequence[Tensor]) -> Tensor:
        """Return bool (N, K): a weight is kept when its output feature and its row in that tile are."""
        return expand_rows(tiling, selection)

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Pack ``weight`` (N, K) f32. Raises :class:`TileMismatch` when ``mask`` is not tile-wise in ``tiling``."""
        require_packable(weight, mask, tiling)
        n, k = tiling.shape
        if tiling.tiles * k > _LIMIT:
            raise mismatch(weight.shape, tiling.granularity, "its indices do not fit in 32 bits", "Leave it dense.")
        rows = _kept_rows(mask.bool(), tiling)
        counts = rows.sum(1)
        pointer = torch.zeros(tiling.tiles + 1, dtype=torch.int32)
        pointer[1:] = counts.cumsum(0)
        index, columns = rows.nonzero()[:, 1].int(), tiling.columns.int()
        nnz = int(counts @ tile_widths(len(columns), tiling.granularity))
        bits = weight.detach().view(torch.bfloat16) if weight.dtype == torch.float16 else weight.detach()
        values = torch.ops.fxprune.tile_pack(bits, index, pointer, columns, tiling.granularity, nnz)
        tensors = {"values": values.view(weight.dtype), "index": index, "tile_ptr": pointer, "columns": columns}
        header = {"out_features": n, "in_features": k, "granularity": tiling.granularity}
        return Packed(self.name, header, tensors)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (N, K) weight, zero where nothing is kept."""
        self.check(packed)
        k, granularity = packed.header["in_features"], packed.header["granularity"]
        values, columns = packed.tensors["values"], packed.tensors["columns"].long()
        counts = packed.tensors["tile_ptr"].long().diff()
        tile = torch.arange(len(counts)).repeat_interleave(counts)
        width = tile_widths(len(columns), granularity)[tile]
        row = packed.tensors["index"].long().repeat_interleave(width)
        first = (width.cumsum(0) - width).repeat_interleave(width)
        offset = torch.arange(len(values)) - first
        feature = columns[(tile * granularity).repeat_interleave(width) + offset]
        dense = values.new_zeros(packed.header["out_features"], k)
        dense[feature, row] = values
        return dense

    def check(self, packed: Packed) -> None:
        """Raise :class:`PackedFormatError` on any header, shape, offset, index or column that breaks the format."""
        ints = {"index": torch.int32, "tile_ptr": torch.int32, "columns": torch.int32}
        header = ("out_features", "in_features", "granularity")
        require_layout(packed, self.name, header, {"values": torch.float32, **ints})
        n, k, granularity = (packed.header[key] for key in header)
        require(granularity >= 1, "header['granularity']", granularity, "at least 1")
        for key, tensor in packed.tensors.items():
            require(tensor.dim() == 1, f"{key} rank", tensor.dim(), 1)
        index, pointer, columns = (packed.tensors[key].long() for key in ints)
        tiles = -(-len(columns) // granularity)
        _check_sorted("columns", columns, n)
        require(len(pointer) == tiles + 1, "tile_ptr length", len(pointer), tiles + 1)
        require(int(pointer[0]) == 0, "tile_ptr[0]", int(pointer[0]), 0)
        require(int(pointer[-1]) == len(index), "tile_ptr[-1]", int(pointer[-1]), f"len(index) = {len(index)}")
        counts = pointer.diff()
        require(bool((counts >= 0).all()), "tile_ptr", "a decreasing offset", "offsets in order")
        tile = torch.arange(tiles).repeat_interleave(counts)
        if len(index):
            low, high = int(index.min()), int(index.max())
            require(low >= 0 and high < k, "index", f"{low}..{high}", f"0..{k - 1}")
        _check_sorted("index", index + tile * k, tiles * k)
        nnz = int((counts * tile_widths(len(columns), granularity)).sum())
        require(len(packed.tensors["values"]) == nnz, "values length", len(packed.tensors["values"]), nnz)


def infer(weight: Tensor, granularity: int, drop_columns: bool) -> LayerMask:
    """Find a tiling in the zeros of ``weight`` (N, K), for weights without a plan.

    A row of a tile is kept when any of its weights in the kept columns is non-zero (-0.0 is zero, NaN is not),
    so the mask covers every non-zero. All-zero output features are removed only if ``drop_columns``.
    """
    tiling = Tile().tiles(tuple(weight.shape), granularity)
    nonzero = weight if weight.dtype == torch.bool else weight.detach() != 0
    if drop_columns:
        tiling = Tiling(tiling.shape, any_along(nonzero, 1).nonzero().flatten(), granularity)
    rows = tile_counts(nonzero, tiling) > 0
    return LayerMask(tiling, Tile().mask(tiling, list(rows)), tuple(rows.sum(1).tolist()))


def keep_all(shape: Sequence[int], granularity: int) -> LayerMask:
    """Return the mask that keeps everything: the tile format of a dense weight (N, K)."""
    tiling = Tile().tiles(shape, granularity)
    mask = torch.ones(tiling.shape, dtype=torch.bool)
    return LayerMask(tiling, mask, (tiling.shape[1],) * tiling.tiles)


def operands(matrix: Tensor, mask: Tensor, tiling: Tiling) -> list[Tensor]:
    """Return (values, index, tile_ptr, columns) of ``matrix`` (N, K) under ``mask``, as the operators take them."""
    tensors = Tile().pack(matrix, mask, tiling).tensors
    return [tensors[name] for name in OPERANDS]


def imaged(
    operands: list[Tensor], tiling: Tiling, device: torch.device, halved: bool = False, tf32: bool = False
) -> list[Tensor]:
    """Return the operands (on the CPU) with the values as the image that the kernels of ``device`` multiply by.

    halved: that of values kept two in four. Raises :class:`TileMismatch` where they are not. tf32: float32 values on a GPU
    as TF32; otherwise they stay as they are.
    """
    values, index, pointer, columns = operands
    if halved:
        image = cuda_nm_image.build(values, pointer, tiling.granularity, len(columns))
        if image is None:
            reason = "a feature uses more than two of four rows of its tile"
            raise mismatch(tiling.shape, tiling.granularity, reason, "Keep two of four.")
        values = image
    elif device.type == "cuda" and values.dtype in (torch.float16, torch.bfloat16):
        values = cuda_tile_image.build(values, pointer, tiling.granularity, len(columns))
    elif device.type == "cuda" and values.dtype == torch.float32 and tf32:
        values = cuda_tf32_image.build(values)
    elif device.type == "cpu" and values.dtype == torch.bfloat16:
        values = tile_image.image(values, pointer, columns, tiling.granularity)
    return [values, index, pointer, columns]


def is_tile_wise(mask: Tensor, tiling: Tiling) -> bool:
    """True when each tile keeps whole rows and nothing is kept outside its output features."""
    try:
        _kept_rows(mask, tiling)
    except TileMismatch:
        return False
    return True


def _kept_rows(mask: Tensor, tiling: Tiling) -> Tensor:
    """Return bool (tiles, K) of a mask that is tile-wise in ``tiling``."""
    members = tile_counts(mask, tiling)
    widths = tile_widths(len(tiling.columns), tiling.granularity)[:, None]
    if not bool(((members == 0) | (members == widths)).all()):
        reason = "a row of a tile is kept in part"
    elif int(members.sum()) != kept(mask):
        reason = "the mask keeps weights outside the kept output features"
    else:
        return members > 0
    raise mismatch(mask.shape, tiling.granularity, reason, "Build mask and tiling together, or use infer().")


def _check_sorted(what: str, values: Tensor, limit: int) -> None:
    if not len(values):
        return
    low, high = int(values.min()), int(values.max())
    require(low >= 0 and high < limit, what, f"{low}..{high}", f"0..{limit - 1}")
    require(bool((values.diff() > 0).all()), what, "entries out of order or repeated", "strictly increasing entries")
