"""The CUDA kernels of ``csrc/cuda`` and what they run."""

from __future__ import annotations

from typing import Any

import torch

from ...context import Unit
from .. import library
from .cpu import operator
from .impl import Impl

# The other operators have no CUDA kernel: their layers stay dense on a GPU.
OPERATORS = (
    "depthwise_taps", "depthwise_pool", "depthwise_grad_input", "depthwise_grad_weight", "dsconv", "nm_mm", "nm_prune",
    "tile_conv", "tile_conv_grad_input", "tile_conv_grad_weight", "tile_gemm", "tile_grad_input", "tile_grad_weight",
    "tile_pack", "tile_unpack",
)  # fmt: skip
# The tensor cores' kernels take 64 output features at a time, two panels of them on Hopper; a tile that is narrower runs as
# wide. Depthwise, each channel has its own taps. K rows go by stages of 32 (mma.sync) or 64 (wgmma, which is sm_90a's);
# layers of few rows run on kernels with finer stages there too. What a plan for the other one lacks, an image pads.
_MMA = Unit(granularity=128, k_step=32, column_step=64)
_WGMMA = Unit(granularity=128, k_step=64, column_step=64, few_rows=128, few_rows_step=32)
UNITS = {
    card: {"depthwise": Unit(granularity=32), "pointwise": wide, "conv": wide, "linear": wide, "rnn": wide}
    for card, wide in (("sm_80", _MMA), ("sm_90a", _WGMMA))
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_IMAGES = (torch.uint8, torch.int8)  # of packed weights, the second one of those kept two in four
OLDEST = (8, 0)  # compute capability of the code in the library


def card(device: torch.device | str) -> str:
    """Return which code of the library runs on a GPU, a key of :data:`UNITS`; a key is returned as it is.

    Where there is no GPU to ask, "cuda" is sm_90a: multiples of its steps have no waste on sm_80 either.
    """
    if isinstance(device, str) and device in UNITS:
        return device
    wgmma = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) == (9, 0)
    return "sm_90a" if wgmma else "sm_80"


def supports(x: Any, weight: Any = None) -> str | None:
    """float32, float16 or bfloat16 on one GPU of compute capability 8.0 or more, with the CUDA library loaded."""
    for tensor in (x, weight):
        if isinstance(tensor, torch.Tensor):
            if tensor.device.type != "cuda":
                return f"needs a GPU, got {tensor.device.type}"
            if tensor.dtype not in DTYPES and not (tensor is weight and tensor.dtype in _IMAGES):
                return f"needs float32, float16 or bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    if isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor):
        if weight.dtype not in (x.dtype, *_IMAGES):
            return f"needs x and the weight in one type, got {x.dtype} and {weight.dtype}"
        if x.device != weight.device:
            return f"needs x and the weight on one GPU, got {x.device} and {weight.device}"
    reason = library.cuda_missing()
    if reason is not None:
        return reason
    if isinstance(x, torch.Tensor) and (found := torch.cuda.get_device_capability(x.device)) < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, got {found[0]}.{found[1]}"
    return None


def dsconv_bytes(channels: int, kernel: int, stride: int) -> int:
    """Return the shared memory that the fused depthwise-separable kernel needs for 8x8 pixels (Dsconv::shared_bytes)."""
    rows, pitch = 7 * stride + kernel, 16 + 8 * stride  # of a staged plane with its halo
    planes = 64 * (kernel * 16 + 32 if kernel == 3 else kernel * 32 + 16) + 64 * rows * pitch * 2
    ring = 4 * (32 * 64 * 2 + 32 * 4)
    return (channels + 1) * 128 + max(planes, ring)


def supports_gradient(grad: Any, key: Any = None) -> str | None:
    """As :func:`supports`; ``key`` holds counters, on the CPU or on the GPU."""
    return supports(grad)


IMPLS = tuple(
    Impl(name, "cuda", operator(name), supports_gradient if name == "nm_prune" else supports) for name in OPERATORS
)
