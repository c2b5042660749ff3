"""Threads change no bit, and no operator reads beyond the ends of its inputs."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.csrc.kernels import OPS, gemm_reference
from tests.integers import bitmap, generator, integers, tiles


def test_threads_do_not_change_a_bit(isa: str) -> None:
    gen = generator(5)
    before = torch.get_num_threads()

    def run() -> list[Tensor]:
        results = []
        for shape, n, g, dim in (
            ((3, 40, 28, 28), 96, 8, 1),
            ((1, 40, 7, 7), 320, 8, 1),
            ((130, 64), 200, 64, -1),
            ((900, 64), 64, 48, -1),
        ):
            _, packed = tiles(generator(6), n, shape[dim], g, columns=0.8)
            results.append(OPS.tile_gemm(x[shape], *packed, bias[:n], None, None, n, g, dim, "gelu"))
        mask = torch.rand(33, 25, generator=generator(7)) < 0.4
        weight = torch.randn(33, 25, generator=generator(8)) * mask
        for stride in (1, 2, 3):
            geometry = ([5, 5], [stride] * 2, [2, 2], [1, 1])
            results.append(OPS.depthwise_taps(planes, weight, bitmap(mask), bias[:33], *geometry, "silu"))
            for images, size in ((planes, 29), (planes[:1, :, :7, :7].contiguous(), 7)):
                _, packed = tiles(generator(size), 40, 33 * 9, 8, columns=0.8)
                window = ([3, 3], [stride] * 2, [1, 1], [1, 1])
                results.append(OPS.tile_conv(images, *packed, bias[:40], None, 40, 8, *window, 1, "silu"))
        return results

    gemms = (((3, 40, 28, 28), 96, 8, 1), ((1, 40, 7, 7), 320, 8, 1), ((130, 64), 200, 64, -1), ((900, 64), 64, 48, -1))
    x = {shape: torch.randn(shape, generator=gen) for shape, *_ in gemms}
    bias, planes = torch.randn(400, generator=gen), torch.randn(2, 33, 29, 29, generator=gen)
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two = run()
        again = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))


class Fenced:
    """Places tensors between two inaccessible pages: any access beyond one end, even a read, is a crash."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.regions: list[tuple[int, int]] = []

    def __call__(self, t: Tensor) -> Tensor:
        page, size = mmap.PAGESIZE, t.numel() * t.element_size()
        inner = max(1, -(-size // page)) * page
        region = self.libc.mmap(None, inner + 2 * page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert region not in (None, ctypes.c_void_p(-1).value)
        self.regions.append((region, inner + 2 * page))
        assert self.libc.mprotect(region + page, inner, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        start = region + page + (inner - size if self.at_end else 0)
        placed = torch.frombuffer((ctypes.c_char * max(size, 1)).from_address(start), dtype=t.dtype, count=t.numel())
        return placed.copy_(t.flatten()).view(t.shape)

    def release(self) -> None:
        for region, size in self.regions:
            self.libc.munmap(region, size)


@pytest.mark.skipif(sys.platform != "linux", reason="places tensors with Linux's mmap")
@pytest.mark.parametrize("at_end", (True, False))
def test_no_input_is_read_beyond_its_ends(isa: str, at_end: bool) -> None:
    fence = Fenced(at_end)
    gen = generator(9)
    try:
        for shape, n, g, dim in (
            ((2, 5, 7, 7), 19, 8, 1), ((1, 3, 31), 9, 4, 1), ((2, 7, 50), 70, 64, 1), ((13, 9), 67, 64, -1),
            ((5, 9), 30, 16, -1), ((1, 3), 1, 1, -1),
        ):  # fmt: skip
            for columns in (1.0, 0.6):
                weight, packed = tiles(gen, n, shape[dim], g, columns=columns)
                x, bias = fence(integers(gen, *shape)), fence(integers(gen, n))
                out = (shape[0], n, *shape[2:]) if dim == 1 else (*shape[:-1], n)
                residual = fence(integers(gen, *out))
                for gate in (None, fence(integers(gen, shape[0], shape[1]))) if dim == 1 else (None,):
                    y = OPS.tile_gemm(x, *map(fence, packed), bias, residual, gate, n, g, dim, "none")
                    assert torch.equal(y, gemm_reference(x, weight, bias, residual, gate, dim).float())
        for plane, k, stride, pad in (
            ((7, 7), 3, 1, 1), ((14, 14), 5, 1, 2), ((5, 40), 3, 1, 1), ((9, 33), 3, 2, 1), ((8, 50), 5, 2, 0),
            ((6, 9), 3, 3, 2), ((3, 3), 7, 1, 3), ((4, 70), 9, 1, 4),
        ):  # fmt: skip
            mask = torch.rand(3, k * k, generator=gen) < 0.5
            weight, x = fence(integers(gen, 3, k * k) * mask), fence(integers(gen, 2, 3, *plane))
            bias, bits = fence(integers(gen, 3)), fence(bitmap(mask))
            y = OPS.depthwise_taps(x, weight, bits, bias, [k, k], [stride] * 2, [pad] * 2, [1, 1], "none")
            assert torch.equal(y, F.conv2d(x.clone(), weight.clone().view(3, 1, k, k), bias.clone(), stride, pad, 1, 3))
        for plane, k, stride, pad, groups in (
            ((7, 7), 3, 1, 1, 1), ((14, 14), 3, 2, 1, 1), ((5, 33), 3, 1, 0, 2), ((9, 20), 2, 3, 1, 1),
            ((6, 50), 7, 2, 3, 1),
        ):  # fmt: skip
            weight, packed = tiles(gen, 20, 4 // groups * k * k, 10)
            x, bias = fence(integers(gen, 2, 4, *plane)), fence(integers(gen, 20))
            y = F.conv2d(x.clone(), weight.view(20, 4 // groups, k, k), bias.clone(), stride, pad, 1, groups)
            residual, window = fence(integers(gen, *y.shape)), ([k, k], [stride] * 2, [pad] * 2, [1, 1])
            given = OPS.tile_conv(x, *map(fence, packed), bias, residual, 20, 10, *window, groups, "none")
            assert torch.equal(given, y + residual)
    finally:
        fence.release()
