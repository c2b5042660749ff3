"""Small-integer data, on which every order of summation is exact, for tests that call kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}
DIVIDED: dict[str, Callable[[Tensor], Tensor]] = {"hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
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
        words[:, t // 64] |= mask[:, t].long() << (t % 64)
    return words


def tiles(
    gen: torch.Generator, n: int, k: int, g: int, keep: float = 0.5, columns: float = 1.0, empty_tile: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return the dense weight (N, K) and (values, index, tile_ptr, columns), row counts uneven between tiles.

    empty_tile: the first tile keeps no row.
    """
    kept = torch.nonzero(torch.rand(n, generator=gen) < columns).flatten()
    weight, values, index, ptr = torch.zeros(n, k), [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)], [0]
    for first in range(0, len(kept), g):
        features = kept[first : first + g]
        rows = torch.nonzero(torch.rand(k, generator=gen) < (0 if empty_tile and first == 0 else keep)).flatten()
        block = integers(gen, len(rows), len(features))
        weight[features[:, None], rows[None, :]] = block.t()
        values.append(block.flatten())
        index.append(rows)
        ptr.append(ptr[-1] + len(rows))
    return weight, [torch.cat(values), torch.cat(index).int(), torch.tensor(ptr, dtype=torch.int32), kept.int()]
