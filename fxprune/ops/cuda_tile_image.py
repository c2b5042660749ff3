"""The image of a tile-packed 16-bit weight as the tensor-core kernels read it, made when a layer is packed for a GPU.

``csrc/include/fxprune/cuda/tile_image.cuh`` describes the layout: a table (order of the tiles, first block of each), then
blocks of 64 K rows in panels of 64 output features, 16-byte chunks swizzled. Given to ``tile_gemm`` in place of
``values``, it saves the kernel that would derive it on every call. Never saved: it belongs to the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS, _PANEL, _PANEL_BYTES, _TABLE_ALIGN = 64, 64, 64 * 64 * 2, 1024


def build(values: Tensor, tile_ptr: Tensor, granularity: int, kept: int) -> Tensor:
    """values: (nnz,) of 16 bits, tile_ptr: int32 (tiles + 1,), kept: output features of all tiles -> uint8 image."""
    tiles = len(tile_ptr) - 1
    granularity = min(granularity, max(kept, 1))
    counts = (tile_ptr[1:] - tile_ptr[:-1]).long()
    blocks = (counts + _ROWS - 1) // _ROWS
    first = torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])
    head = table(tile_ptr)
    table_bytes = len(head)
    block_bytes = -(-granularity // _PANEL) * _PANEL_BYTES
    most_blocks = int(tile_ptr[-1]) // _ROWS + tiles
    image = torch.zeros(table_bytes + most_blocks * block_bytes, dtype=torch.uint8)
    image[:table_bytes] = head
    elements, at = image[table_bytes:].view(torch.int16), 0
    for t in range(tiles):
        width, rows = min(granularity, kept - t * granularity), int(counts[t])
        k, f = torch.arange(rows)[:, None], torch.arange(width)[None, :]
        byte = (first[t] + k // _ROWS) * block_bytes + f // _PANEL * _PANEL_BYTES + k % _ROWS * 128
        byte = byte + (((f // 8) ^ k) % 8) * 16 + f % 8 * 2
        elements[byte.reshape(-1) // 2] = values[at : at + rows * width].view(torch.int16)
        at += rows * width
    return image


def table(tile_ptr: Tensor) -> Tensor:
    """Return what is in front of an image's blocks, uint8: the tiles by falling number of rows, the first block of each."""
    counts = (tile_ptr[1:] - tile_ptr[:-1]).long()
    first = F.pad(((counts + _ROWS - 1) // _ROWS).cumsum(0), (1, 0))
    numbers = torch.cat([torch.argsort(counts, descending=True, stable=True), first]).int().view(torch.uint8)
    return F.pad(numbers, (0, -len(numbers) % _TABLE_ALIGN))
