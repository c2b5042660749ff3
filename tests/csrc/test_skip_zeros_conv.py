"""``skip_zeros_conv`` at the ends of its panels, blocks, bands and images, in every memory format, on every instruction set.

Small integers make every order of summation exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.csrc.kernels import OPS, every_isa
from tests.integers import generator, integers

# B, N, H, W of dL/dO; K, window, padding: one, less than a vector, past a part of 128 channels and a block of outputs
CASES = (
    ((1, 1, 1, 1), 1, (1, 1), (0, 0)),
    ((2, 5, 3, 4), 7, (3, 3), (1, 1)),
    ((1, 130, 5, 6), 19, (3, 3), (1, 1)),
    ((2, 33, 4, 3), 150, (3, 3), (0, 0)),
    ((3, 17, 2, 9), 261, (2, 5), (1, 2)),
    ((1, 20, 40, 17), 18, (3, 3), (1, 1)),  # several bands
    ((9, 12, 3, 3), 16, (3, 3), (1, 1)),  # several samples in a unit
    ((2, 8, 1, 7), 8, (1, 3), (0, 2)),
    ((1, 8, 6, 2), 8, (5, 4), (4, 3)),
    ((1, 4, 3, 700), 8, (3, 3), (2, 2)),  # a row longer than a unit
)


def sparse(share: float, *shape: int) -> Tensor:
    """Integers of which about ``share`` are not zero."""
    gen = generator(*shape)
    x = torch.where(integers(gen, *shape) > 0, 3.0, -2.0)
    return torch.where(torch.rand(*shape, generator=gen) < share, x, 0)


def check(x: Tensor, weight: Tensor, padding: tuple[int, int], what: str) -> None:
    expected = F.conv_transpose2d(x.double(), weight.double(), padding=padding).float()
    y = OPS.skip_zeros_conv(x, weight, padding)
    assert torch.equal(y, expected), what
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), what


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_every_shape_in_both_memory_formats(share: float) -> None:
    for isa in every_isa():
        for shape, k, window, padding in CASES:
            x, weight = sparse(share, *shape), integers(generator(k, *window), shape[1], k, *window)
            if x.shape[2] + window[0] - 1 - 2 * padding[0] < 0 or x.shape[3] + window[1] - 1 - 2 * padding[1] < 0:
                continue
            last = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]
            for i, (given, kernel) in enumerate(((x, weight), (last[0], last[1]), (x, last[1]), (last[0], weight))):
                check(given, kernel, padding, f"{isa} {shape} {k} {window} {padding} {i}")
            check(x.transpose(2, 3).contiguous().transpose(2, 3), weight, padding, f"{isa} {shape} strided")


def test_units_of_several_threads() -> None:
    threads, weight = torch.get_num_threads(), integers(generator(1), 24, 40, 3, 3)
    try:
        for count, (samples, size) in itertools.product((1, 2, 3), ((1, 2), (5, 7), (2, 31), (40, 3))):
            torch.set_num_threads(count)
            x = sparse(0.3, samples, 24, size, size)
            check(x, weight, (1, 1), f"{count} threads, {samples} of {size}x{size}")
    finally:
        torch.set_num_threads(threads)


def test_the_cut_does_not_change_a_bit() -> None:
    """Sums follow parts, window and channels alone, so an image by itself is an image among others."""
    x, weight = torch.randn(7, 200, 9, 6), torch.randn(200, 150, 3, 3)
    x = torch.where(torch.rand(x.shape) < 0.5, x, 0)
    for isa in every_isa():
        whole = OPS.skip_zeros_conv(x, weight, (1, 1))
        assert torch.equal(torch.cat([OPS.skip_zeros_conv(part, weight, (1, 1)) for part in x.split(2)]), whole), isa
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(OPS.skip_zeros_conv(last, weight, (1, 1)), whole), isa


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_zero(bad: float) -> None:
    for isa in every_isa():
        x = torch.zeros(1, 4, 5, 5)
        x[0, 2, 1, 1], x[0, 1, 4, 4] = bad, -0.0
        y = OPS.skip_zeros_conv(x, torch.ones(4, 3, 3, 3), (1, 1))
        assert not torch.isfinite(y[..., :3, :3]).any(), isa
        assert not y[..., 3:, :].any() and not y[..., 3:].any(), isa


def test_empty_operands() -> None:
    for shape, k in (((0, 4, 3, 3), 5), ((2, 0, 3, 3), 5), ((2, 4, 0, 3), 5), ((2, 4, 3, 3), 0)):
        y = OPS.skip_zeros_conv(torch.zeros(shape), torch.ones(shape[1], k, 3, 3), (0, 0))
        assert y.shape == (shape[0], k, shape[2] + 2, shape[3] + 2) and not y.any()
