"""Many weights in one tensor per type: a call that names hundreds of tensors spends longer on that than on a small layer.

The layout holds per weight ``elements * 8 + image * 4 + tensor``: which of the tensors it lies in, and whether it is an
image of bfloat16 weights (``fxprune/ops/tile_image.py``). In its tensor, each weight begins at the next multiple of 64
bytes. ``csrc/bundle.h`` reads both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.ops.tile_image import DEEP

_LINE = 64  # bytes
_TYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64)


def bundle(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Copy tensors of any shape into one vector per type; returns those and the layout.

    A bfloat16 matrix of 32 columns is taken for an image.
    """
    types = [t for t in _TYPES if any(tensor.dtype == t for tensor in tensors)]
    layout = [t.numel() * 8 + _is_image(t) * 4 + types.index(t.dtype) for t in tensors]
    weights = []
    for number, dtype in enumerate(types):
        sizes = [_room(entry // 8, dtype) for entry in layout if entry % 4 == number]
        weights.append(torch.zeros(sum(sizes), dtype=dtype))
    for part, tensor in zip(unbundle(weights, layout), tensors, strict=True):
        part.copy_(tensor.reshape(part.shape))
    return weights, layout


def unbundle(weights: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor]:
    """View the parts: vectors, and images of shape (R, 32)."""
    parts, begin = [], [0] * len(weights)
    for entry in layout:
        number, size = entry % 4, entry // 8
        part = weights[number][begin[number] : begin[number] + size]
        parts.append(part.view(-1, DEEP) if entry & 4 else part)
        begin[number] += _room(size, weights[number].dtype)
    return parts


def _is_image(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.dim() == 2 and tensor.shape[1] == DEEP


def _room(size: int, dtype: torch.dtype) -> int:
    """The numbers from the beginning of a weight to the next one's."""
    line = _LINE // dtype.itemsize
    return (size + line - 1) // line * line
