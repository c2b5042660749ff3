"""The gradients of depthwise_taps on the simulator, bit for bit on integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda.simulator import ELEMENTS, SEEDS, Fault, Plant, depthwise_gradient
from tests.integers import bitmap, generator, integers


def check(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], stride: int = 1, padding: int = 0, dilation: int = 1, *,
    dtype: torch.dtype = torch.float32, keep: float = 0.4, seed: int = 0, plant: Plant = Plant.NONE,
) -> None:  # fmt: skip
    gen = generator(seed, *shape, *kernel, stride)
    channels, count = shape[1], kernel[0] * kernel[1]
    mask = torch.rand(channels, count, generator=gen) < keep
    x, weight = integers(gen, *shape), integers(gen, channels, count)
    window = ([*kernel], [stride] * 2, [padding] * 2, [dilation] * 2)
    size = [(shape[2 + i] + 2 * padding - dilation * (kernel[i] - 1) - 1) // stride + 1 for i in (0, 1)]
    grad = integers(gen, shape[0], channels, *size)
    dense = (weight * mask).view(channels, 1, *kernel).double()
    backward = torch.ops.aten.convolution_backward.default
    expected_x, expected_w, _ = backward(
        grad.double(), x.double(), dense, None, *window[1:], False, [0, 0], channels, [True, True, False]
    )
    expected_w = expected_w.reshape(channels, count) * mask
    bits, sizes, options = bitmap(mask), (shape[2], shape[3]), {"seed": seed, "plant": plant}
    got_x = depthwise_gradient(grad.to(dtype), weight.to(dtype), bits, sizes, window, **options)
    got_w = depthwise_gradient(grad.to(dtype), x.to(dtype), bits, sizes, window, **options)
    case = f"x {shape} {kernel} {window} {dtype} seed {seed}"
    assert torch.equal(got_x, expected_x.float().to(dtype)), case
    assert torch.equal(got_w, expected_w.float().to(dtype)), case


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("kernel", (3, 5, 7))
def test_square_windows(kernel: int, stride: int, dtype: torch.dtype) -> None:
    for seed, plane in enumerate(((7, 7), (9, 16), (1, 5))):
        check((2, 3, *plane), (kernel, kernel), stride, kernel // 2, dtype=dtype, seed=seed)


def test_other_windows() -> None:
    check((2, 2, 11, 13), (3, 5), 1, 1, 2)
    check((1, 2, 12, 12), (9, 9), 1, 4)  # more taps than a word has bits
    check((1, 3, 10, 9), (3, 2), 3, 1)
    check((1, 2, 8, 8), (3, 3), 1, 0)


@pytest.mark.parametrize("keep", (0.0, 1.0))
def test_no_tap_and_every_tap(keep: float) -> None:
    check((1, 2, 9, 9), (3, 3), 1, 1, keep=keep)
    check((1, 2, 9, 9), (3, 3), 2, 1, keep=keep)


def test_a_missing_barrier_is_caught() -> None:
    for seed in SEEDS:
        with pytest.raises(Fault):
            check((1, 1, 20, 20), (3, 3), 2, 1, keep=1.0, seed=seed, plant=Plant.NO_BARRIER)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    dilation = draw(st.integers(1, 2))
    least = max(kernel) * dilation
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *(least + draw(st.integers(0, 9)) for _ in "hw"))
    check(
        shape, kernel, draw(st.integers(1, 3)), draw(st.integers(0, 3)), dilation,
        dtype=draw(st.sampled_from(ELEMENTS)), seed=draw(st.sampled_from(SEEDS)),
    )  # fmt: skip
