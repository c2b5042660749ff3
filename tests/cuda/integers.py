"""Small-integer data, on which every order of summation is exact, and plain torch beside a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def generator(*key: int) -> torch.Generator:
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % 2**31
    return torch.Generator().manual_seed(seed)


def integers(gen: torch.Generator, *shape: int) -> Tensor:
    """fp32 in [-4, 4]: sums of up to 1024 products are exact in fp32, and in the result's rounding."""
    return torch.randint(-4, 5, shape, generator=gen).float()


def bitmap(mask: Tensor) -> Tensor:
    """mask: (C, taps) bool -> taps: (C, words) int64."""
    channels, count = mask.shape
    words = torch.zeros(channels, -(-count // 64), dtype=torch.int64)
    for t in range(count):
        words[:, t // 64] |= mask[:, t].long() << t % 64
    return words
