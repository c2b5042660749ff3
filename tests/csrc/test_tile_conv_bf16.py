"""tile_conv in bfloat16 against plain torch, bit for bit, on each instruction set; and max pooling."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxprune.ops.bundle import bundle
from fxprune.ops.region import POOL, text
from tests.csrc.kernels import BF16_ISAS, EXACT, OPS, every_isa, use_isa
from tests.csrc.kernels import check_conv as check_any
from tests.integers import generator, integers, tiles

KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7), (2, 3), (1, 7), (4, 1), (6, 6))
check_conv = partial(check_any, dtype=torch.bfloat16)


@pytest.fixture(params=BF16_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from use_isa(request.param)


@pytest.mark.parametrize("kernel", KERNELS)
def test_shape_classes(isa: str, kernel: tuple[int, int]) -> None:
    """Planes of one row to several bands, narrower and wider than a block, every phase of a stride."""
    half = (kernel[0] // 2, kernel[1] // 2)
    for size in ((7, 7), (8, 8), (14, 14), (15, 17), (1, 33), (31, 1), (9, 64)):
        for stride in ((1, 1), (2, 2), (3, 3), (1, 2), (2, 1)):
            check_conv((1, 3, *size), 9, 8, kernel, stride, half, extras="br", activation="relu")
    check_conv((3, 5, 14, 15), 17, 8, kernel, (1, 1), half, (2, 3), columns=0.6, extras="br")
    check_conv((2, 5, 12, 11), 70, 32, kernel, (1, 1), (0, 0), extras="b")
    check_conv((1, 2, 6, 5), 8, 8, kernel, (2, 1), (9, 11), extras="b")  # more padding than image


def test_bands_of_a_large_image(isa: str) -> None:
    for stride in (1, 2):
        check_conv((1, 48, 60, 57), 40, 32, (3, 3), (stride, stride), (1, 1), keep=0.1, extras="br")
        check_conv((3, 40, 90, 41), 8, 8, (5, 3), (stride, stride), (2, 1), keep=0.05)


@pytest.mark.parametrize("groups", (2, 3, 8))
def test_groups(isa: str, groups: int) -> None:
    for channels, features, g in ((1, 1, 1), (1, 4, 2), (3, 8, 8), (2, 9, 3), (8, 24, 8), (4, 32, 32)):
        for size, stride in (((7, 7), 1), ((14, 14), 2), ((20, 33), 1)):
            shape = (2, groups * channels, *size)
            check_conv(shape, groups * features, g, (3, 3), (stride, stride), (1, 1), groups=groups, extras="br")


def test_degenerate_structures(isa: str) -> None:
    for g in (1, 8, 64):
        for keep, columns in ((0.0, 1.0), (0.0, 0.5), (1.0, 1.0), (0.5, 0.0), (0.05, 0.3), (1.0, 0.5)):
            for extras in ("", "br"):
                check_conv((2, 3, 9, 7), 70, g, (3, 3), padding=(1, 1), keep=keep, columns=columns, extras=extras)
    check_conv((0, 4, 5, 5), 6, 4, (3, 3), padding=(1, 1), extras="br")


@pytest.mark.parametrize("activation", EXACT)
def test_exact_activations(isa: str, activation: str) -> None:
    for size in ((7, 7), (5, 19), (17, 16)):
        check_conv((2, 4, *size), 37, 32, (3, 3), padding=(1, 1), columns=0.7, extras="br", activation=activation)


def test_takes_any_strides_and_a_rounded_bias(isa: str) -> None:
    gen = generator(1)
    weight, (values, *lists) = tiles(gen, 20, 4 * 9, 8)
    base, bias = integers(gen, 4, 4, 9, 9).bfloat16(), integers(gen, 40)[::2].bfloat16()
    spread = [torch.stack((t, t), 1)[:, 0] for t in (values.bfloat16(), *lists)]
    for x in (base.transpose(2, 3), base[::2], base[:1].expand(3, -1, -1, -1), base.to(memory_format=torch.channels_last)):
        residual = integers(gen, 9, 9, 20, x.shape[0]).bfloat16().permute(3, 2, 1, 0)
        y = OPS.tile_conv(x, *spread, bias, residual, 20, 8, [3, 3], [1, 1], [1, 1], [1, 1], 1, "relu")
        exact = F.conv2d(x.float(), weight.view(20, 4, 3, 3), bias.float(), 1, 1) + residual.float()
        assert torch.equal(y, F.relu(exact).bfloat16())


@given(
    st.integers(0, 2**20), st.sampled_from((1, 1, 2, 3)), st.sampled_from((1, 3)), st.integers(1, 11), st.integers(1, 40),
    st.sampled_from((1, 2, 8, 13, 32)), st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from((0.2, 0.5, 1.0)), st.sampled_from(("", "b", "r", "br")), st.sampled_from(sorted(EXACT)),
)  # fmt: skip
def test_property(
    seed: int, groups: int, b: int, channels: int, features: int, g: int, size: tuple[int, int], kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], keep: float, extras: str, act: str,
) -> None:  # fmt: skip
    width = g if groups == 1 else max(d for d in range(1, g + 1) if features % d == 0)
    columns = 0.7 if groups == 1 and seed % 2 else 1.0
    for _ in every_isa(BF16_ISAS):
        check_conv(
            (b, groups * channels, *size), groups * features, width, kernel, stride, padding, dilation, groups,
            keep=keep, columns=columns, extras=extras, activation=act, seed=seed,
        )  # fmt: skip


def test_a_pruned_tap_never_meets_a_pixel(isa: str) -> None:
    """Inf and NaN of a channel that no tile keeps leave no trace, as in the masked dense layer."""
    x = integers(generator(3), 1, 3, 9, 9).bfloat16()
    clean, x[0, 1] = x.clone(), float("nan")
    clean[0, 1] = 0
    index = torch.tensor([0, 4, 8, 18, 22, 26]).int()
    ptr, columns = torch.tensor([0, 6]).int(), torch.arange(8).int()
    weight = torch.zeros(8, 27)
    weight[:, index.long()] = 1
    window = [3, 3], [1, 1], [1, 1], [1, 1]
    y = OPS.tile_conv(x, torch.ones(48).bfloat16(), index, ptr, columns, None, None, 8, 8, *window, 1, "none")
    assert torch.equal(y, F.conv2d(clean.float(), weight.view(8, 3, 3, 3), None, 1, 1).bfloat16())


def test_max_pooling(isa: str) -> None:
    """Behind a product, as a region has it; a NaN in the window is the result."""
    for size in ((1, 1), (7, 7), (9, 33), (14, 40), (5, 17)):
        for kernel, stride, padding in (((3, 3), 2, 1), ((1, 1), 2, 0), ((2, 2), 2, 0), ((3, 2), 1, 1), ((5, 3), 3, 1)):
            if min(s + 2 * padding - k for s, k in zip(size, kernel, strict=True)) < 0:
                continue
            x = integers(generator(*size), 2, 5, *size).bfloat16()
            x[0, 2, size[0] // 2, size[1] // 2] = float("nan")
            window = [*kernel, stride, stride, padding, padding, 1, 1]
            weights, layout = bundle([torch.zeros(0)])
            y = OPS.region([x], weights, text(layout), text([POOL, 9, 0, *window]), [1])[0]
            expected = F.max_pool2d(x.float(), kernel, stride, padding).bfloat16()
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
