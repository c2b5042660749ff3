"""``fxprune::add_squares``: Taylor scores of many weights, in one pass over each.

    sums[i] += (a[i] * b[i])^2        float32, contiguous, of one shape for each i; ``sums`` is changed in place

It has no gradient and is no part of a graph: ``fxprune/taylor.py`` calls it beside an optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def define(compiled: bool) -> torch.library.Library:
    """Attach what PyTorch needs, and the reference where no library is; both live as long as the result."""
    lib = torch.library.Library("fxprune", "FRAGMENT")
    torch.library.register_fake("fxprune::add_squares", lambda sums, a, b: None, lib=lib)
    if not compiled:
        lib.impl("add_squares", reference, "CompositeExplicitAutograd")
    return lib


def reference(sums: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    for total, left, right in zip(sums, a, b, strict=True):
        product = left * right
        total.addcmul_(product, product)
