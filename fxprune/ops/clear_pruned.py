"""``fxprune::clear_pruned``: zeros at the pruned elements of many tensors, in one pass over each.

    values[i] = where(kept[i], values[i], 0)        values: (N, ...), changed in place; kept: integers (N / g, ...)

``kept`` has all bits set or none; each of its rows is that of g rows of the values. An AND, so that NaN and Inf go as well.
It has no gradient and is no part of a graph: ``fxprune/hold_steps.py`` calls it beside an optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def reference(values: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    for tensor, bits in zip(values, kept, strict=True):
        if tensor.numel():
            rows = tensor.view(_INTEGERS[tensor.element_size()]).unflatten(0, (len(bits), -1))
            rows.bitwise_and_(bits.unsqueeze(1))
