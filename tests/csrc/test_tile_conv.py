"""tile_conv in float32 and bfloat16 against plain torch, bit for bit, on each instruction set; and max pooling."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxprune.ops.bundle import bundle
from fxprune.ops.region import POOL, text
from tests.csrc.kernels import BF16_ISAS, EXACT, OPS, check_conv, every_isa, use_isa
from tests.integers import generator, integers, tiles

KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7), (2, 3), (1, 7), (4, 1), (6, 6))
ISAS = {torch.float32: ("scalar", "avx2", "avx512"), torch.bfloat16: BF16_ISAS}
KINDS = [pytest.param((dtype, isa), id=f"{dtype}-{isa}") for dtype, isas in ISAS.items() for isa in isas]


@pytest.fixture(params=KINDS)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Each type on each instruction set this machine has for it."""
    for _ in use_isa(request.param[1]):
        yield request.param[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_shape_classes(dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    """Planes of one row to several bands, narrower and wider than a vector or a block, every phase of a stride."""
    half = (kernel[0] // 2, kernel[1] // 2)
    for size in ((7, 7), (8, 8), (14, 14), (15, 17), (1, 33), (31, 1), (9, 64)):
        for stride in ((1, 1), (2, 2), (3, 3), (1, 2), (2, 1)):
            check_conv((1, 3, *size), 9, 8, kernel, stride, half, extras="br", activation="relu", dtype=dtype)
    check_conv((3, 5, 14, 15), 17, 8, kernel, (1, 1), half, (2, 3), columns=0.6, extras="br", dtype=dtype)
    for features, g in ((17, 4), (70, 32)):
        check_conv((2, 5, 12, 11), features, g, kernel, (1, 1), (0, 0), extras="b", dtype=dtype)
    check_conv((1, 2, 6, 5), 8, 8, kernel, (2, 1), (9, 11), extras="b", dtype=dtype)  # more padding than image


def test_bands_of_a_large_image(dtype: torch.dtype) -> None:
    for stride in (1, 2):
        for features, g in ((11, 8), (40, 32)):
            shape = (1, 48, 60, 57)
            check_conv(shape, features, g, (3, 3), (stride, stride), (1, 1), keep=0.1, extras="br", dtype=dtype)
        check_conv((3, 40, 90, 41), 8, 8, (5, 3), (stride, stride), (2, 1), keep=0.05, dtype=dtype)


@pytest.mark.parametrize("groups", (2, 3, 8))
def test_groups(dtype: torch.dtype, groups: int) -> None:
    for channels, features, g in ((1, 1, 1), (1, 4, 2), (3, 8, 8), (2, 9, 3), (8, 24, 8), (4, 32, 32)):
        for size, step in (((7, 7), 1), ((14, 14), 2), ((20, 33), 1)):
            shape, n = (2, groups * channels, *size), groups * features
            check_conv(shape, n, g, (3, 3), (step, step), (1, 1), groups=groups, extras="br", dtype=dtype)


def test_degenerate_structures(dtype: torch.dtype) -> None:
    for g in (1, 8, 64):
        for keep, columns in ((0.0, 1.0), (0.0, 0.5), (1.0, 1.0), (0.5, 0.0), (0.05, 0.3), (1.0, 0.5)):
            for extras in ("", "br"):
                given = {"keep": keep, "columns": columns, "extras": extras}
                check_conv((2, 3, 9, 7), 70, g, (3, 3), padding=(1, 1), dtype=dtype, **given)
    check_conv((0, 4, 5, 5), 6, 4, (3, 3), padding=(1, 1), extras="br", dtype=dtype)


@pytest.mark.parametrize("activation", EXACT)
def test_exact_activations(dtype: torch.dtype, activation: str) -> None:
    for size, n, g in (((7, 7), 21, 8), ((5, 19), 37, 32), ((17, 16), 21, 8), ((17, 16), 37, 32)):
        given = {"columns": 0.7, "extras": "br", "activation": activation}
        check_conv((2, 4, *size), n, g, (3, 3), padding=(1, 1), dtype=dtype, **given)


def test_takes_any_strides_and_a_rounded_bias(dtype: torch.dtype) -> None:
    gen = generator(1)
    weight, (values, *lists) = tiles(gen, 20, 4 * 9, 8)
    base, bias = integers(gen, 4, 4, 9, 9).to(dtype), integers(gen, 40)[::2].to(dtype)
    spread = [torch.stack((t, t), 1)[:, 0] for t in (values.to(dtype), *lists)]
    for x in (base.transpose(2, 3), base[::2], base[:1].expand(3, -1, -1, -1), base.to(memory_format=torch.channels_last)):
        residual = integers(gen, 9, 9, 20, x.shape[0]).to(dtype).permute(3, 2, 1, 0)
        y = OPS.tile_conv(x, *spread, bias, residual, 20, 8, [3, 3], [1, 1], [1, 1], [1, 1], 1, "relu")
        exact = F.conv2d(x.float(), weight.view(20, 4, 3, 3), bias.float(), 1, 1) + residual.float()
        assert torch.equal(y, F.relu(exact).to(dtype))


@pytest.mark.parametrize("element", ISAS, ids=str)
@given(
    st.integers(0, 2**20), st.sampled_from((1, 1, 2, 3)), st.sampled_from((1, 3)), st.integers(1, 11), st.integers(1, 40),
    st.sampled_from((1, 2, 8, 13, 32)), st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from((0.2, 0.5, 1.0)), st.sampled_from(("", "b", "r", "br")), st.sampled_from(sorted(EXACT)),
)  # fmt: skip
def test_property(
    element: torch.dtype, seed: int, groups: int, b: int, channels: int, features: int, g: int, size: tuple[int, int],
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], keep: float,
    extras: str, act: str,
) -> None:  # fmt: skip
    width = g if groups == 1 else max(d for d in range(1, g + 1) if features % d == 0)
    columns = 0.7 if groups == 1 and seed % 2 else 1.0
    for _ in every_isa(ISAS[element]):
        check_conv(
            (b, groups * channels, *size), groups * features, width, kernel, stride, padding, dilation, groups,
            keep=keep, columns=columns, extras=extras, activation=act, seed=seed, dtype=element,
        )  # fmt: skip


def test_a_pruned_tap_never_meets_a_pixel(dtype: torch.dtype) -> None:
    """Inf and NaN of a channel that no tile keeps leave no trace, as in the masked dense layer."""
    x = integers(generator(3), 1, 3, 9, 9).to(dtype)
    clean, x[0, 1] = x.clone(), float("nan")
    clean[0, 1] = 0
    index = torch.tensor([0, 4, 8, 18, 22, 26]).int()
    ptr, columns = torch.tensor([0, 6]).int(), torch.arange(8).int()
    weight = torch.zeros(8, 27)
    weight[:, index.long()] = 1
    window = [3, 3], [1, 1], [1, 1], [1, 1]
    y = OPS.tile_conv(x, torch.ones(48, dtype=dtype), index, ptr, columns, None, None, 8, 8, *window, 1, "none")
    assert torch.equal(y, F.conv2d(clean.float(), weight.view(8, 3, 3, 3), None, 1, 1).to(dtype))


def test_max_pooling(dtype: torch.dtype) -> None:
    """Behind a product, as a region has it; a NaN in the window is the result."""
    for size in ((1, 1), (7, 7), (9, 33), (14, 40), (5, 17)):
        for kernel, stride, padding in (((3, 3), 2, 1), ((1, 1), 2, 0), ((2, 2), 2, 0), ((3, 2), 1, 1), ((5, 3), 3, 1)):
            if min(s + 2 * padding - k for s, k in zip(size, kernel, strict=True)) < 0:
                continue
            x = integers(generator(*size), 2, 5, *size).to(dtype)
            x[0, 2, size[0] // 2, size[1] // 2] = float("nan")
            window = [*kernel, stride, stride, padding, padding, 1, 1]
            weights, layout = bundle([torch.zeros(0)])
            y = OPS.region([x], weights, text(layout), text([POOL, 9, 0, *window]), [1])[0]
            expected = F.max_pool2d(x.float(), kernel, stride, padding).to(dtype)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
