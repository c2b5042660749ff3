"""Where these tests put their tensors. A dry run (tests/cuda/test_gpu_suite.py) puts them on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fxprune.lowering.kernels.cuda import OPERATORS
from torch import Tensor

from fxprune.ops import OPS

# (operator, arguments) of all that a GPU has
OPERATOR_SAMPLES = [
    pytest.param(op, args, id=f"{op.name}-{i}") for op in OPS if op.name in OPERATORS for i, args in enumerate(op.samples())
]
DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_gpu(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a tensor there, in ``dtype`` if it holds floats; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(DEVICE, dtype) if value.is_floating_point() and dtype is not None else value.to(DEVICE)


def in_one_type(args: Sequence[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Return arguments there, all floats in one type, as a GPU wants them; by default in that of the first float."""
    floats = (a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    chosen = next(floats) if dtype is None else dtype
    return tuple(on_gpu(a, chosen) for a in args)
