"""What the kernel tests share: random packed weights, plain torch beside a kernel, and the instruction sets there are.

Small-integer data make every order of summation exact, so results are compared bit for bit. Without the library every
test that imports this is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from fxprune.lowering import library
from torch import Tensor

from fxprune.ops.tile_image import image
from tests.integers import CLAMPS, DIVIDED, bitmap, generator, integers, tiles

if not library.load():
    pytest.skip("the C++ library is not built", allow_module_level=True)
OPS = torch.ops.fxprune
BEST = OPS.isa()

EXACT = CLAMPS | DIVIDED


BF16_ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


def use_isa(name: str) -> Iterator[str]:
    """What a fixture runs that gives a test one instruction set."""
    try:
        OPS.set_isa(name)
    except RuntimeError:
        pytest.skip(f"this machine has no {name}")
    yield name
    OPS.set_isa(BEST)


def every_isa(names: Sequence[str] = ("scalar", "avx2", "avx512")) -> Iterator[str]:
    """Switch through the instruction sets this machine has."""
    try:
        for name in names:
            try:
                OPS.set_isa(name)
            except RuntimeError:
                continue
            yield name
    finally:
        OPS.set_isa(BEST)


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
    columns: float = 1.0, extras: str = "", activation: str = "none", seed: int = 0, dtype: torch.dtype = torch.float32,
    place: Callable[[Tensor], Tensor] = lambda t: t,
) -> None:  # fmt: skip
    """Compare one call with dense torch; skip geometries whose window does not fit. `extras`: b bias, r residual.

    In bfloat16 both with packed values and with their image. place: puts operands somewhere.
    """
    if any(s + 2 * p < d * (r - 1) + 1 for s, p, d, r in zip(shape[2:], padding, dilation, kernel, strict=True)):
        return
    gen = generator(seed, n, g, *shape, *kernel)
    channels = shape[1] // groups
    weight, (values, *lists) = tiles(gen, n, channels * kernel[0] * kernel[1], g, keep, columns)
    x, bias = integers(gen, *shape), integers(gen, n) if "b" in extras else None
    y = F.conv2d(x, weight.view(n, channels, *kernel), bias, stride, padding, dilation, groups)
    residual = integers(gen, *y.shape) if "r" in extras else None
    expected = EXACT[activation](y if residual is None else y + residual).to(dtype)
    windows = [list(v) for v in (kernel, stride, padding, dilation)]
    case = f"x {shape} n {n} g {g} {windows} groups {groups} keep {keep} columns {columns} {extras} {activation} seed {seed}"
    x, values, residual = (None if t is None else place(t.to(dtype)) for t in (x, values, residual))
    lists, bias = [place(t) for t in lists], None if bias is None else place(bias)
    for held in (values, place(image(values, *lists[1:], g))) if dtype == torch.bfloat16 else (values,):
        y = OPS.tile_conv(x, held, *lists, bias, residual, n, g, *windows, groups, activation)
        assert y.shape == expected.shape and y.is_contiguous() and y.dtype == dtype, case
        assert torch.equal(y, expected), case


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
