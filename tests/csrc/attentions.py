"""What the tests of both attention operators share: sizes, and attention that is exact on integers."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.integers import integers

SIZES = ((1, 1), (5, 7), (32, 32), (40, 33), (64, 96), (31, 128))  # queries, keys


def chosen(gen: torch.Generator, batch: int, heads: int, depth: int, queries: int, keys: int) -> tuple[Tensor, ...]:
    """q, k, v and what they give, all (B, heads, depth, rows): each query reads the values of one key, or of two equal ones.

    With a scale of 8 the others are out by exp(-100).
    """
    at = torch.randint(keys, (batch, heads, queries), generator=gen)
    # keys are +1 and -1 in places of their own: the product with another one is smaller by 2 at least
    codes = torch.stack([(torch.arange(keys) // 2 ** min(bit, 62) % 2) * 2 - 1 for bit in range(depth)]).float()
    twins = codes if keys < 2 else torch.cat([codes[:, 1:2], codes[:, 1:]], 1)  # the first two keys are equal
    k = twins.expand(batch, heads, depth, keys)
    q = 8 * torch.gather(k, 3, at.unsqueeze(2).expand(-1, -1, depth, -1))
    v = 2 * (integers(gen, batch, heads, depth, keys) + 5)  # no zero, and no mean of two that is none
    equal = (q.transpose(2, 3) @ k).eq(8 * depth).double()
    y = v.double() @ (equal / equal.sum(-1, keepdim=True)).transpose(2, 3)
    return q, k, v, y.float()
