"""The image of a tile-packed 16-bit weight that keeps two in four, as the GPU's sparse tensor cores read it.

Each output feature has at most two elements that are not zero in every four consecutive K rows of its tile (TVW with 2:4).
As :mod:`fxprune.ops.cuda_tile_image`, but a panel of 64 features and 64 K rows holds 32 kept elements a feature and their
places, two bits each: ``csrc/include/fxprune/cuda/nm_multiply.cuh`` describes it. int8, which tells it from the other.
Never saved: it belongs to the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.ops import cuda_tile_image

_ROWS, _PANEL = 64, 64
_KEPT_BYTES = _PANEL * _ROWS  # half of the elements, two bytes each
_PANEL_BYTES = _KEPT_BYTES + _PANEL * _ROWS // 8


def build(values: Tensor, tile_ptr: Tensor, granularity: int, kept: int) -> Tensor | None:
    """Return the image; ``None`` where four rows of a feature keep more than two. Arguments as of the other image."""
    tiles = len(tile_ptr) - 1
    granularity = min(granularity, max(kept, 1))
    counts = (tile_ptr[1:] - tile_ptr[:-1]).long().tolist()
    table = cuda_tile_image.table(tile_ptr)
    panels = -(-granularity // _PANEL)
    most_blocks = int(tile_ptr[-1]) // _ROWS + tiles
    image = torch.zeros(len(table) + most_blocks * panels * _PANEL_BYTES, dtype=torch.uint8)
    image[: len(table)] = table
    end, at = len(table), 0
    for t, rows in enumerate(counts):
        width = min(granularity, kept - t * granularity)
        block = values[at : at + rows * width].view(torch.int16).reshape(rows, width)
        at += rows * width
        fill = (0, panels * _PANEL - width, 0, -rows % _ROWS)
        packed = _panels(
            F.pad(block, fill).reshape(-1, _ROWS, panels, _PANEL).permute(0, 2, 3, 1).reshape(-1, _PANEL, _ROWS)
        )
        if packed is None:
            return None
        image[end : end + packed.numel()] = packed.flatten()
        end += packed.numel()
    return image.view(torch.int8)


def _panels(elements: Tensor) -> Tensor | None:
    """elements: int16 (panels, 64 features, 64 K rows) -> uint8 (panels, bytes)."""
    groups = elements.reshape(-1, _PANEL, _ROWS // 4, 4)
    used = (groups & 0x7FFF) != 0  # -0.0 is nothing to keep
    if bool((used.sum(3) > 2).any()):
        return None
    place = torch.arange(4)
    chosen = (place + 4 * ~used).sort(3).values[..., :2] % 4  # what is not zero first, else any other place
    chosen = chosen.sort(3).values
    kept = groups.gather(3, chosen).reshape(-1, _PANEL, _ROWS // 2)
    feature, element = torch.arange(_PANEL)[:, None], torch.arange(_ROWS // 2)[None, :]
    at = feature * _ROWS + ((element // 8) ^ (feature // 2 % 4)) * 16 + element % 8 * 2
    result = torch.zeros(len(kept), _PANEL_BYTES // 2, dtype=torch.int16)
    result[:, (at // 2).flatten()] = kept.flatten(1)
    # four groups of two places of two bits: 16 k of a feature
    bits = chosen[..., 0] | chosen[..., 1] << 2
    bits = (bits.reshape(-1, _PANEL, _ROWS // 16, 4) << torch.tensor([0, 4, 8, 12])).sum(3)
    sixteen = torch.arange(_ROWS // 16)[None, :]
    at = feature // 16 * 64 + (feature % 8 * 4 + sixteen) * 2 + feature % 16 // 8
    result[:, _KEPT_BYTES // 2 + at.flatten()] = bits.to(torch.int16).flatten(1)
    return result.view(torch.uint8)
