"""``fxprune::attention_rows``: scaled dot-product attention by heads, on row-major activations.

    p[b, h, i, j] = softmax over j of (scale * sum over e of q[b, h, i, e] * k[b, h, j, e] + mask[b, h, i, j])
    y[b, i, h, e] = sum over j of p[b, h, i, j] * v[b, h, j, e]

A query i of which the mask leaves no key (all -inf) gives zeros. float32; what ``scaled_dot_product_attention`` returns is
y with its middle dimensions swapped. Made by ``lowering/row_attention.py`` for inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops.operator import Args, Operator, without_gradient


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q: (B, H, queries, D); k, v: (B, H, keys, D), the last stride 1 or copied; mask: None, or the shape of p, all but its
    last size may be 1 -> (B, queries, H, D), contiguous."""
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    # a maximum of -inf would leave NaN
    most = scores.amax(3, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    shares = torch.exp(scores - most)
    total = shares.sum(3, keepdim=True)
    shares = shares / torch.where(total == 0, torch.ones_like(total), total)
    return torch.matmul(shares, v).transpose(1, 2).contiguous()


def fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, depth = q.shape
    return q.new_empty(batch, queries, heads, depth)


def samples() -> Iterator[Args]:
    gen = torch.Generator().manual_seed(0)

    def draw(batch: int, heads: int, rows: int, depth: int) -> Any:
        return torch.randn(batch, rows, heads, depth, generator=gen).transpose(1, 2)

    for batch, heads, depth, queries, keys, masked in (
        (1, 2, 8, 5, 5, None),
        (2, 3, 33, 40, 7, (2, 1, 40, 7)),
        (1, 1, 64, 31, 70, None),
        (2, 2, 16, 9, 50, (1, 2, 1, 50)),
    ):
        mask = None if masked is None else torch.where(torch.rand(masked, generator=gen) < 0.3, -torch.inf, 0.5)
        yield (
            draw(batch, heads, queries, depth),
            draw(batch, heads, keys, depth),
            draw(batch, heads, keys, depth),
            mask,
            0.25,
        )


def bad_samples() -> Iterator[tuple[Args, str]]:
    q, k, v, mask, scale = list(samples())[1]
    yield (q.double(), k, v, mask, scale), r"q must be float32"
    yield (q, k, v, mask.double(), scale), r"mask must be float32"
    yield (q[0], k, v, mask, scale), r"q must have shape"
    yield (q, k[0], v, mask, scale), r"k must have shape"
    yield (q, k[:, :-1], v, mask, scale), r"k must have shape"
    yield (q, k, v[:, :, :-1], mask, scale), r"v must have shape"
    yield (q, k, v, mask[:, :, :-1], scale), r"mask must have shape"
    yield (q, k[:, :, :0], v[:, :, :0], None, scale), r"at least one key"
    yield (q, k, v, mask, 0.0), r"scale must be above 0"


OPERATOR = Operator("attention_rows", reference, fake, *without_gradient("attention_rows"), samples, bad_samples)
