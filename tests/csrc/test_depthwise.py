"""depthwise_taps against plain torch, bit for bit, on each instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.csrc.kernels import EXACT, OPS, check_depthwise, every_isa
from tests.integers import bitmap, generator, integers

PLANES = ((1, 1), (1, 7), (7, 1), (7, 7), (14, 14), (28, 28), (15, 33), (9, 40), (3, 17), (2, 65))


@pytest.mark.parametrize("kernel", ((1, 1), (3, 3), (5, 5), (7, 7), (3, 5), (9, 9)), ids=str)
def test_depthwise_shape_classes(isa: str, kernel: tuple[int, int]) -> None:
    half = (kernel[0] // 2, kernel[1] // 2)
    for plane in PLANES:
        for stride in (1, 2, 3):
            for padding in {(0, 0), half, kernel, (0, half[1])}:
                check_depthwise((2, 3, *plane), kernel, (stride, stride), padding, activation="relu6")
        for keep in (0.0, 0.01, 1.0):
            check_depthwise((1, 5, *plane), kernel, padding=half, keep=keep, bias=keep == 1.0)


@pytest.mark.parametrize("dilation", ((2, 2), (1, 3), (3, 1)), ids=str)
def test_depthwise_dilation_and_mixed_strides(isa: str, dilation: tuple[int, int]) -> None:
    for plane in PLANES:
        for kernel in ((3, 3), (3, 5), (5, 1)):
            for stride in ((1, 1), (2, 1), (1, 2), (3, 2), (2, 3)):
                same = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
                for padding in {(0, 0), same, (1, 0)}:
                    check_depthwise((3, 2, *plane), kernel, stride, padding, dilation, activation="hardswish")


def test_depthwise_planes_of_real_layers(isa: str) -> None:
    for channels, side, k, stride in ((8, 112, 3, 2), (6, 56, 5, 2), (6, 56, 7, 1), (40, 14, 5, 1), (70, 7, 3, 1)):
        check_depthwise((2, channels, side, side), (k, k), (stride, stride), (k // 2, k // 2), activation="relu")


def test_depthwise_empty(isa: str) -> None:
    for shape in ((0, 3, 5, 5), (2, 0, 5, 5)):
        y = OPS.depthwise_taps(
            torch.zeros(shape), torch.zeros(shape[1], 9), torch.zeros(shape[1], 1, dtype=torch.int64), None,
            [3, 3], [1, 1], [1, 1], [1, 1], "none",
        )  # fmt: skip
        assert y.shape == shape


def test_depthwise_takes_any_strides(isa: str) -> None:
    gen = generator(2)
    mask = torch.rand(6, 9, generator=gen) < 0.5
    weight, bias, base = integers(gen, 6, 9) * mask, integers(gen, 12)[::2], integers(gen, 4, 6, 8, 10)
    spread = torch.stack((bitmap(mask), bitmap(mask)), 1)[:, 0]
    for x in (
        base[::2],
        base[:1].expand(2, -1, -1, -1),
        base.to(memory_format=torch.channels_last),
        base[..., 1::2],
        base.mT,
    ):
        y = OPS.depthwise_taps(x, weight.t().contiguous().t(), spread, bias, [3, 3], [1, 1], [1, 1], [1, 1], "none")
        assert torch.equal(y, F.conv2d(x.contiguous(), weight.view(6, 1, 3, 3), bias, 1, 1, 1, 6))


def test_pruned_taps_are_not_read(isa: str) -> None:
    """A pruned tap's weight has no influence, whatever it holds."""
    x, weight = integers(generator(3), 1, 2, 9, 9), torch.full((2, 9), float("nan"))
    weight[:, 4] = 2.0
    taps = torch.tensor([[1 << 4], [1 << 4]])
    assert torch.equal(OPS.depthwise_taps(x, weight, taps, None, [3, 3], [1, 1], [1, 1], [1, 1], "none"), 2 * x)


@given(
    st.integers(0, 2**20), st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from((0.0, 0.01, 0.3, 1.0)), st.booleans(), st.sampled_from(sorted(EXACT)),
)  # fmt: skip
def test_depthwise_property(
    seed: int, shape: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, keep: float, bias: bool, act: str
) -> None:
    for _ in every_isa():
        check_depthwise(shape, kernel, stride, padding, dilation, keep=keep, bias=bias, activation=act, seed=seed)
