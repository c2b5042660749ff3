"""Where these tests put their tensors. A dry run (tests/cuda/test_gpu_suite.py) puts them on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_gpu(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a tensor there, in ``dtype`` if it holds floats; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(DEVICE, dtype) if value.is_floating_point() and dtype is not None else value.to(DEVICE)
