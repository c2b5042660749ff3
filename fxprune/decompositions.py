"""Our operators as core ATen, for consumers of exported programs that do not know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxprune.ops import OPS

# operators that backward graphs alone hold
BACKWARD = (
    "nm_prune", "skip_zeros_mm", "skip_zeros_conv", "depthwise_grad_input", "depthwise_grad_weight", "tile_grad_input",
    "tile_grad_weight", "tile_conv_grad_input", "tile_conv_grad_weight", "nm_mm",
)  # fmt: skip


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the table for ``program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})``.

    Every operator becomes its reference: the packed weight is scattered into a dense one by index arithmetic. It computes
    the same function and needs nothing of fxprune; the saving stays only where ``fxprune.export`` can see the weights.
    What only backward graphs hold is not in it.
    """
    return {getattr(torch.ops.fxprune, op.name).default: op.reference for op in OPS if op.name not in BACKWARD}
