"""The image of tile-packed bfloat16 weights: the order in which matrix units and dot products take them.

    tile by tile, strips of 16 output features (one of 8 where the tile is no wider), each [ceil(k_t / 32)][strip][32]

``fxprune::tile_gemm`` takes it as ``values`` of shape (R, 32). It is derived from the packed values, which remain the
format; ``csrc/include/fxprune/tile_image.h`` describes the same layout to the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEEP = 32  # kept input features in a row of the image


def image_positions(tile_ptr: Tensor, columns: Tensor, granularity: int) -> tuple[Tensor, int]:
    """Return int64 (nnz,): where each packed value lies in the flattened image, and the image's rows."""
    counts = tile_ptr.tolist()
    parts, base = [], 0
    for t in range(len(counts) - 1):
        count, width = counts[t + 1] - counts[t], min(granularity, len(columns) - t * granularity)
        strip = 8 if width <= 8 else 16
        depth, padded = -(-count // DEEP), -(-width // strip) * strip
        row, feature = torch.arange(count)[:, None], torch.arange(width)[None, :]
        first = base + feature // strip * (depth * strip * DEEP)
        parts.append((first + (row // DEEP * strip + feature % strip) * DEEP + row % DEEP).reshape(-1))
        base += depth * DEEP * padded
    where = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    return where, base // DEEP


def image(values: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int) -> Tensor:
    """values: (nnz,) -> (R, 32), zero where a strip or a block is not full."""
    where, rows = image_positions(tile_ptr, columns, granularity)
    return values.new_zeros(rows * DEEP).index_put((where,), values).reshape(rows, DEEP)


def from_image(held: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int) -> Tensor:
    """Inverse of :func:`image`."""
    where, _ = image_positions(tile_ptr, columns, granularity)
    return held.reshape(-1)[where]
