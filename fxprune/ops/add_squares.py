"""``fxprune::add_squares``: Taylor scores of many weights, in one pass over each.

    sums[i] += (a[i] * b[i])^2        float32, contiguous, of one shape for each i; ``sums`` is changed in place

It has no gradient and is no part of a graph: ``fxprune/taylor.py`` calls it beside an optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def reference(sums: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    for total, left, right in zip(sums, a, b, strict=True):
        product = left * right
        total.addcmul_(product, product)
