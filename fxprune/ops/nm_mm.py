"""``fxprune::nm_mm``: a matrix product whose left operand is pruned to 2:4, for a GPU's sparse tensor cores.

    out = kept(x) @ weight        x: (rows, K); weight: (K, N)

kept() is ``nm_prune(x, magnitude, 2:4)`` along K: the two largest of every four stay, ties to the lower index, so what is
2:4 already stays as it is. Compiled for GPUs in 16 bits (mma.sp); elsewhere the reference runs. It is the data gradient
of a linear layer where SDGP prunes dL/dO, if it was measured to be faster than a dense product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import nm_prune
from fxprune.ops.operator import Args, Operator, widened


def reference(x: Tensor, weight: Tensor) -> Tensor:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise RuntimeError(
            f"x and weight must have shapes (rows, K) and (K, N), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise RuntimeError(f"weight must have the type of x, {x.dtype}, got {weight.dtype}")
    kept = nm_prune.reference(x.contiguous(), None, 2, 4, -1, 1, "magnitude", 0)
    wide, w = widened(kept, weight)
    return (wide @ w).to(x.dtype)


def fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def runs(x: Tensor, weight: Tensor, n: int, m: int) -> bool:
    """Whether x (rows, K), once it is pruned n:m, can be multiplied by weight (K, N) on the sparse tensor cores."""
    halves = x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == x.dtype
    return x.is_cuda and halves and m == 4 and n <= 2 and x.shape[-1] % 4 == 0


def prunes(function: str, n: int, m: int) -> bool:
    """Whether the operator itself prunes as asked, so that nobody needs to prune before."""
    return function == "magnitude" and (n, m) == (2, 4)


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    pass


def backward(ctx: Any, grad: Tensor) -> Args:
    raise RuntimeError(
        "fxprune::nm_mm has no gradient: it approximates one. Compile without grad_sparsity for double backward."
    )


def samples() -> Iterator[Args]:
    for rows, k, n, dtype in ((5, 24, 17, torch.bfloat16), (33, 130, 8, torch.float16), (1, 7, 70, torch.bfloat16)):
        gen = torch.Generator().manual_seed(k)
        yield torch.randn(rows, k, generator=gen).to(dtype), torch.randn(k, n, generator=gen).to(dtype)


def bad_samples() -> Iterator[tuple[Args, str]]:
    x, weight = next(samples())
    yield (x[0], weight), r"must have shapes \(rows, K\) and \(K, N\)"
    yield (x, weight[1:]), r"must have shapes \(rows, K\) and \(K, N\)"
    yield (x, weight.half()), r"weight must have the type of x"


OPERATOR = Operator("nm_mm", reference, fake, setup_context, backward, samples, bad_samples)
