"""The CUDA kernel of depthwise_taps on the simulator, bit for bit on integers, and within rounding elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda.activations import EXACT, SMOOTH
from tests.cuda.simulator import ELEMENTS, SEEDS, Fault, Plant, depthwise_pool, depthwise_taps, shifted
from tests.integers import bitmap, generator, integers

PLANES = ((1, 1), (1, 7), (7, 1), (7, 7), (14, 14), (16, 16), (15, 33), (9, 40))


def check(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1), *, dtype: torch.dtype = torch.bfloat16, keep: float = 0.4, bias: bool = True,
    activation: str = "none", seed: int = 0, shift: int = 0,
) -> None:  # fmt: skip
    """Compare one run with dense torch in fp32; skip geometries whose window does not fit."""
    if any(s + 2 * p < d * (r - 1) + 1 for s, p, d, r in zip(shape[2:], padding, dilation, kernel, strict=True)):
        return
    gen = generator(seed, *shape, *kernel)
    channels, count = shape[1], kernel[0] * kernel[1]
    mask = torch.rand(channels, count, generator=gen) < keep
    weight, x = integers(gen, channels, count), integers(gen, *shape)
    b = integers(gen, channels) if bias else None
    y = F.conv2d(x, (weight * mask).view(channels, 1, *kernel), b, stride, padding, dilation, channels)
    expected = (EXACT | SMOOTH)[activation](y).to(dtype)
    given_x = shifted(x.to(dtype), shift)
    packed = (weight.to(dtype), bitmap(mask), None if b is None else b.to(dtype))
    got = depthwise_taps(given_x, *packed, *map(list, (kernel, stride, padding, dilation)), activation, seed=seed)
    case = f"x {shape} {dtype} kernel {kernel} stride {stride} padding {padding} dilation {dilation} keep {keep} seed {seed}"
    if activation in EXACT:
        assert torch.equal(got, expected), case
        again, mean = depthwise_pool(
            given_x, *packed, *map(list, (kernel, stride, padding, dilation)), activation, seed=seed
        )
        sums = expected.float().sum((2, 3)) / (expected.shape[2] * expected.shape[3])
        assert torch.equal(again, expected) and torch.equal(mean, sums.to(dtype)), case
    else:
        torch.testing.assert_close(got, expected, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("kernel", (3, 5, 7))
def test_square_windows(kernel: int, dtype: torch.dtype) -> None:
    for number, plane in enumerate(PLANES):
        for stride in (1, 2):
            geometry = ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
            check((2, 3, *plane), *geometry, dtype=dtype, activation="relu6", seed=SEEDS[number % 3])


@pytest.mark.parametrize("keep", (0.0, 0.05, 1.0))
def test_kept_shares(keep: float) -> None:
    for kernel in (3, 7):
        check((1, 3, 12, 16), (kernel, kernel), (1, 1), (kernel // 2, kernel // 2), keep=keep, bias=keep == 1.0)


def test_a_missing_barrier_of_the_sums_is_caught() -> None:
    gen = generator(4)
    x, weight, mask = integers(gen, 1, 1, 16, 40), integers(gen, 1, 9), torch.ones(1, 9, dtype=torch.bool)
    for seed in SEEDS:
        with pytest.raises(Fault):
            depthwise_pool(x, weight, bitmap(mask), None, [3, 3], [1, 1], [1, 1], [1, 1], seed=seed, plant=Plant.NO_BARRIER)


def test_many_images_share_a_block() -> None:
    for batch in (1, 5, 70):
        check((batch, 2, 7, 7), (3, 3), (1, 1), (1, 1), seed=2)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("kernel", (5, 7))
def test_eight_rows_a_thread(kernel: int, dtype: torch.dtype) -> None:
    """Where there are threads enough: small planes of many images, and more than one tile of a large one."""
    for number, (batch, plane) in enumerate(((130, (7, 7)), (33, (14, 15)), (1, (62, 136)))):
        geometry = ((kernel, kernel), (1, 1), (kernel // 2, kernel // 2))
        for keep in (0.4, 1.0):
            check((batch, 1, *plane), *geometry, dtype=dtype, keep=keep, activation="relu6", seed=SEEDS[number])


@pytest.mark.parametrize("kernel", (5, 7))
@pytest.mark.parametrize("plant", (Plant.SHORT_WAIT, Plant.NO_BARRIER), ids=lambda p: p.name)
def test_mistakes_with_eight_rows_are_caught(plant: Plant, kernel: int) -> None:
    gen = generator(3)
    x, weight = integers(gen, 130, 1, 7, 8), integers(gen, 1, kernel**2)
    packed = (weight.bfloat16(), bitmap(torch.ones(1, kernel**2, dtype=torch.bool)), None)
    window = ([kernel, kernel], [1, 1], [kernel // 2, kernel // 2], [1, 1])
    for seed in SEEDS:
        with pytest.raises(Fault):
            depthwise_taps(x.bfloat16(), *packed, *window, seed=seed, plant=plant)


def test_planes_larger_than_a_tile() -> None:
    for dtype in ELEMENTS:
        check((1, 1, 37, 136), (3, 3), (1, 1), (1, 1), dtype=dtype)
        check((1, 1, 70, 150), (5, 5), (2, 2), (2, 2), dtype=dtype)


@pytest.mark.parametrize("shift", (1, 2, 4))
def test_rows_that_are_not_aligned(shift: int) -> None:
    for dtype in ELEMENTS:
        check((2, 2, 8, 16), (3, 3), (1, 1), (1, 1), dtype=dtype, shift=shift)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_other_geometries(dtype: torch.dtype) -> None:
    for kernel, stride, padding, dilation in (
        ((1, 1), (1, 1), (0, 0), (1, 1)), ((3, 3), (1, 1), (0, 0), (1, 1)), ((3, 5), (1, 1), (1, 2), (1, 1)),
        ((3, 3), (1, 1), (2, 2), (2, 2)), ((9, 9), (1, 1), (4, 4), (1, 1)), ((3, 3), (3, 2), (1, 1), (1, 3)),
    ):  # fmt: skip
        check((2, 3, 11, 9), kernel, stride, padding, dilation, dtype=dtype, activation="hardswish")


@pytest.mark.parametrize("activation", (*EXACT, *SMOOTH))
def test_activations(activation: str) -> None:
    for dtype in (torch.float32, torch.float16):
        check((1, 2, 6, 8), (3, 3), (1, 1), (1, 1), dtype=dtype, activation=activation)


def test_special_values_stay_in_their_channel() -> None:
    """Inf and NaN under a pruned tap do not exist; under a kept one they spread as in a dense convolution."""
    x = torch.zeros(1, 2, 8, 8)
    x[0, 0, 3, 3], x[0, 1, 4, 4] = float("inf"), float("nan")
    weight = torch.ones(2, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 4] = True
    y = depthwise_taps(x, weight, bitmap(mask), None, [3, 3], [1, 1], [1, 1], [1, 1])
    assert torch.equal(y, x) or (torch.equal(y.isnan(), x.isnan()) and torch.equal(y.nan_to_num(), x.nan_to_num()))


@pytest.mark.fuzz
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.sampled_from(((3, 3), (5, 5), (7, 7), (1, 3), (2, 2))))
    stride = draw(st.sampled_from(((1, 1), (2, 2), (1, 2))))
    same = (kernel[0] // 2, kernel[1] // 2)
    padding = draw(st.sampled_from((same, (0, 0), (1, 1))))
    shape = tuple(draw(st.integers(1, limit)) for limit in (3, 3, 17, 35))
    check(
        shape, kernel, stride, padding, dtype=draw(st.sampled_from(ELEMENTS)), keep=draw(st.sampled_from((0.2, 0.7))),
        seed=draw(st.sampled_from(SEEDS)), shift=draw(st.integers(0, 3)),
    )  # fmt: skip
