"""Our operators as core ATen, for consumers of exported programs that do not know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxprune.ops import OPS


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the table for ``program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})``.

    Every operator becomes its reference: the packed weight is scattered into a dense one by index arithmetic. It computes
    the same function and needs nothing of fxprune; the saving stays only where ``fxprune.export`` can see the weights.
    ``nm_prune`` is not in it: it reads the step from memory, and only backward graphs hold it.
    """
    return {getattr(torch.ops.fxprune, op.name).default: op.reference for op in OPS if op.name != "nm_prune"}
