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

# a matrix unit multiplies 16 output features at once, and what is gathered for a tile is shared by all of them
_WIDE = Unit(granularity=64, narrow=32, column_step=8)
BF16_UNITS = {**UNITS, "pointwise": _WIDE, "conv": _WIDE}

_SINGLE, _BOTH = (torch.float32,), (torch.float32, torch.bfloat16)
_DTYPES = {
    "rnn_steps": _SINGLE,
    "attention": (torch.bfloat16,),
    "attention_rows": _SINGLE,
}  # operators with fewer than the others


def _supports(op: str) -> Callable[..., str | None]:
    dtypes = _DTYPES.get(op, _BOTH)
    needed = " or ".join(map(_short, dtypes))

    def supports(x: Any, weight: Any = None) -> str | None:
        """On the CPU, in one of the operator's dtypes, with the library built."""
        if not library.available():
            return "the compiled library is missing"
        for tensor in (x, weight):
            if isinstance(tensor, torch.Tensor):
                if tensor.device.type != "cpu":
                    return f"needs the CPU, got {tensor.device.type}"
                if tensor.dtype not in dtypes:
                    return f"needs {needed}, got {_short(tensor.dtype)}"
        return None

    return supports


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operator(name: str) -> Callable[..., Any]:
    """Return the call of an operator, which dispatches on the device of its tensors."""
    return lambda *args: getattr(torch.ops.fxprune, name)(*args)


# only the backward of a GPU calls them: their references run here
REFERENCE_ONLY = (
    "depthwise_grad_input", "depthwise_grad_weight", "tile_grad_input", "tile_grad_weight", "tile_conv_grad_input",
    "tile_conv_grad_weight", "nm_mm",
)  # fmt: skip
IMPLS = tuple(Impl(op.name, "cpu", operator(op.name), _supports(op.name)) for op in OPS if op.name not in REFERENCE_ONLY)
