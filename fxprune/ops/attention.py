"""``fxprune::attention``: scaled dot-product attention by heads, on feature-major activations.

    p[b, h, j, i] = softmax over j of (scale * sum over e of k[b, h, e, j] * q[b, h, e, i] + mask[b, j, i])
    y[b, h, e, i] = sum over j of p[b, h, j, i] * v[b, h, e, j]

A query i of which the mask leaves no key (all -inf) gives zeros. bfloat16, with scores and sums in float32; p is rounded
before it multiplies v, as in torch's own kernel. Made by ``lowering/sequence.py`` for inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops.operator import Args, Operator, widened, without_gradient


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    """q: (B, heads * D, queries); k, v: (B, heads * D, keys); mask: (B, keys, queries) or None -> the shape of q."""
    dtype = q.dtype
    q, k, v, mask = widened(q, k, v, mask)
    q, k, v = (t.unflatten(1, (heads, t.shape[1] // heads)) for t in (q, k, v))
    scores = torch.matmul(k.transpose(2, 3), q) * scale
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    # a maximum of -inf would leave NaN
    most = scores.amax(2, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    shares = torch.exp(scores - most)
    total = shares.sum(2, keepdim=True)
    shares = shares / torch.where(total > 0, total, torch.ones_like(total))
    return torch.matmul(v, shares).flatten(1, 2).to(dtype).contiguous()


def fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def samples() -> Iterator[Args]:
    gen = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Any:
        return torch.randn(size, generator=gen).bfloat16()

    for batch, heads, depth, queries, keys, masked in (
        (1, 2, 8, 5, 5, False),
        (2, 3, 33, 40, 7, True),
        (1, 1, 64, 32, 70, False),
    ):
        features = heads * depth
        mask = torch.where(torch.rand(batch, keys, queries, generator=gen) < 0.3, -torch.inf, 0.0).bfloat16()
        yield (
            draw(batch, features, queries),
            draw(batch, features, keys),
            draw(batch, features, keys),
            mask if masked else None,
            heads,
            0.25,
        )


def bad_samples() -> Iterator[tuple[Args, str]]:
    q, k, v, mask, heads, scale = list(samples())[1]
    yield (q.float(), k, v, mask, heads, scale), r"bfloat16"
    yield (q[0], k, v, mask, heads, scale), r"q must have shape"
    yield (q, k[:, :-1], v, mask, heads, scale), r"k must have shape"
    yield (q, k, v[:, :, :-1], mask, heads, scale), r"v must have shape"
    yield (q, k, v, mask.transpose(1, 2), heads, scale), r"mask must have shape"
    yield (q, k, v, mask, 7, scale), r"heads must divide"
    yield (q, k, v, mask, heads, 0.0), r"scale must be above 0"


OPERATOR = Operator("attention", reference, fake, *without_gradient("attention"), samples, bad_samples)
