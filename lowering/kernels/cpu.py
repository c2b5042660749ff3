"""The compiled CPU kernels of ``csrc/cpu`` and what they like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...context import Unit
from ...ops import OPS
from .. import library
from .impl import Impl

# output features per tile as the register tiles want them: 8 rows x 48 pixels feature-major, 64 lanes row-major;
# both address K row by row, so any kept count runs without waste
UNITS = {
    "depthwise": Unit(granularity=32),
    "pointwise": Unit(granularity=8, column_step=8),
    "conv": Unit(granularity=8, column_step=8),
    "linear": Unit(granularity=64, column_step=64),
    "rnn": Unit(granularity=64, column_step=64),
}


def supports(x: Any, weight: Any = None) -> str | None:
    """float32 on the CPU, with the library built."""
    if not library.available():
        return "the compiled library is missing"
    for tensor in (x, weight):
        if isinstance(tensor, torch.Tensor):
            if tensor.device.type != "cpu":
                return f"needs the CPU, got {tensor.device.type}"
            if tensor.dtype != torch.float32:
                return f"needs float32, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def operator(name: str) -> Callable[..., Any]:
    """Return the call of an operator, which dispatches on the device of its tensors."""
    return lambda *args: getattr(torch.ops.fxprune, name)(*args)


IMPLS = tuple(Impl(op.name, "cpu", operator(op.name), supports) for op in OPS)
