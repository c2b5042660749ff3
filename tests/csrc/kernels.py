"""What the kernel tests share: random packed weights, plain torch beside a kernel, and the instruction sets there are.

Small-integer data make every order of summation exact, so results are compared bit for bit. Without the library every
test that imports this is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fxprune.lowering import library
from torch import Tensor

if not library.load():
    pytest.skip("the C++ library is not built", allow_module_level=True)
OPS = torch.ops.fxprune
BEST = OPS.isa()

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def every_isa() -> Iterator[str]:
    """Switch through the instruction sets this machine has."""
    try:
        for name in ("scalar", "avx2", "avx512"):
            try:
                OPS.set_isa(name)
            except RuntimeError:
                continue
            yield name
    finally:
        OPS.set_isa(BEST)


def generator(*key: int) -> torch.Generator:
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % 2**31
    return torch.Generator().manual_seed(seed)


def integers(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=gen).float()


def tiles(
    gen: torch.Generator, n: int, k: int, g: int, keep: float = 0.5, columns: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Return the dense weight (N, K) and (values, index, tile_ptr, columns), row counts uneven between tiles."""
    kept = torch.nonzero(torch.rand(n, generator=gen) < columns).flatten()
    weight, values, index, ptr = torch.zeros(n, k), [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)], [0]
    for first in range(0, len(kept), g):
        cols = kept[first : first + g]
        rows = torch.nonzero(torch.rand(k, generator=gen) < keep).flatten()
        block = integers(gen, len(rows), len(cols))
        weight[cols[:, None], rows[None, :]] = block.t()
        values.append(block.flatten())
        index.append(rows)
        ptr.append(ptr[-1] + len(rows))
    return weight, [torch.cat(values), torch.cat(index).int(), torch.tensor(ptr, dtype=torch.int32), kept.int()]


def gemm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None, feature_dim: int
) -> Tensor:
    """Dense, in fp64, before the activation."""
    y = x.double()
    if gate is not None:
        y = y * gate.double().reshape(*gate.shape, *[1] * (x.dim() - 2))
    y = torch.movedim(torch.movedim(y, feature_dim, -1) @ weight.double().t(), -1, feature_dim)
    if bias is not None:
        y = y + (bias.reshape(-1, *[1] * (x.dim() - 2)) if feature_dim == 1 else bias)
    return y if residual is None else y + residual


def check_gemm(
    shape: tuple[int, ...], n: int, g: int, feature_dim: int, *, keep: float = 0.5, columns: float = 1.0, extras: str = "",
    activation: str = "none", seed: int = 0,
) -> None:  # fmt: skip
    """Compare one call with dense torch. `extras`: b bias, r residual, g gate."""
    gen = generator(seed, n, g, *shape)
    k = shape[feature_dim]
    weight, packed = tiles(gen, n, k, g, keep, columns)
    x = integers(gen, *shape)
    out = (shape[0], n, *shape[2:]) if feature_dim == 1 else (*shape[:-1], n)
    bias = integers(gen, n) if "b" in extras else None
    residual = integers(gen, *out) if "r" in extras else None
    gate = integers(gen, shape[0], k) if "g" in extras else None
    expected = EXACT[activation](gemm_reference(x, weight, bias, residual, gate, feature_dim).float())
    y = OPS.tile_gemm(x, *packed, bias, residual, gate, n, g, feature_dim, activation)
    case = f"x {shape} n {n} g {g} dim {feature_dim} keep {keep} columns {columns} {extras} {activation} seed {seed}"
    assert y.shape == expected.shape and y.is_contiguous(), case
    assert torch.equal(y, expected), case


def check_conv(
    shape: tuple[int, int, int, int], n: int, g: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), groups: int = 1, *, keep: float = 0.5,
    columns: float = 1.0, extras: str = "", activation: str = "none", seed: int = 0,
) -> None:  # fmt: skip
    """Compare one call with dense torch; skip geometries whose window does not fit. `extras`: b bias, r residual."""
    if any(s + 2 * p < d * (r - 1) + 1 for s, p, d, r in zip(shape[2:], padding, dilation, kernel, strict=True)):
        return
    gen = generator(seed, n, g, *shape, *kernel)
    channels = shape[1] // groups
    weight, packed = tiles(gen, n, channels * kernel[0] * kernel[1], g, keep, columns)
    x, bias = integers(gen, *shape), integers(gen, n) if "b" in extras else None
    y = F.conv2d(x, weight.view(n, channels, *kernel), bias, stride, padding, dilation, groups)
    residual = integers(gen, *y.shape) if "r" in extras else None
    expected = EXACT[activation](y if residual is None else y + residual)
    windows = [list(v) for v in (kernel, stride, padding, dilation)]
    y = OPS.tile_conv(x, *packed, bias, residual, n, g, *windows, groups, activation)
    case = f"x {shape} n {n} g {g} {windows} groups {groups} keep {keep} columns {columns} {extras} {activation} seed {seed}"
    assert y.shape == expected.shape and y.is_contiguous(), case
    assert torch.equal(y, expected), case


def bitmap(mask: Tensor) -> Tensor:
    """mask: (C, taps) bool -> taps: (C, words) int64."""
    channels, count = mask.shape
    words = torch.zeros(channels, -(-count // 64), dtype=torch.int64)
    for t in range(count):
        words[:, t // 64] |= mask[:, t].long() << (t % 64)
    return words


def check_depthwise(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), *, keep: float = 0.4, bias: bool = True,
    activation: str = "none", seed: int = 0,
) -> None:  # fmt: skip
    """Compare one call with dense torch; skip geometries whose window does not fit."""
    if any(s + 2 * p < d * (r - 1) + 1 for s, p, d, r in zip(shape[2:], padding, dilation, kernel, strict=True)):
        return
    gen = generator(seed, *shape, *kernel)
    channels, count = shape[1], kernel[0] * kernel[1]
    mask = torch.rand(channels, count, generator=gen) < keep
    if keep == 0.01:  # one tap, a different one in each channel
        mask = F.one_hot(torch.arange(channels) * 5 % count, count).bool()
    weight, x = integers(gen, channels, count) * mask, integers(gen, *shape)
    b = integers(gen, channels) if bias else None
    expected = EXACT[activation](F.conv2d(x, weight.view(channels, 1, *kernel), b, stride, padding, dilation, channels))
    y = OPS.depthwise_taps(x, weight, bitmap(mask), b, list(kernel), list(stride), list(padding), list(dilation), activation)
    case = f"x {shape} kernel {kernel} stride {stride} padding {padding} dilation {dilation} keep {keep} seed {seed}"
    assert y.shape == expected.shape and y.is_contiguous(), case
    assert torch.equal(y, expected), case
