"""The image of a tile-packed float32 weight that a GPU's tensor cores multiply: its values, rounded to TF32, as bytes.

TF32 keeps 10 bits behind the point; products are summed in float32. PyTorch multiplies so where the user allows it:
matrices after ``torch.set_float32_matmul_precision("high")`` or ``torch.backends.cuda.matmul.allow_tf32 = True``,
convolutions unless ``torch.backends.cudnn.allow_tf32`` is off. We follow the same switches, as they stand when a graph is
compiled; a weight that changes later is packed in the same way again. Never saved: it belongs to the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DROPPED = 13  # of float32's 23 bits behind the point


def allowed(convolution: bool) -> bool:
    """Whether PyTorch may multiply float32 matrices, or convolve, in TF32 on a GPU now."""
    settings = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return bool(settings.fp32_precision == "tf32")


def rounded(values: Tensor) -> Tensor:
    """values: float32 -> the nearest TF32 numbers, ties away from zero; infinities and NaN as they are."""
    bits = values.view(torch.int32)
    nearest = ((bits + (1 << (_DROPPED - 1))) >> _DROPPED << _DROPPED).view(torch.float32)
    return torch.where(values.isfinite(), nearest, values)


def build(values: Tensor) -> Tensor:
    """values: float32 (nnz,) -> uint8 (4 * nnz,)."""
    return rounded(values.contiguous()).view(torch.uint8)
