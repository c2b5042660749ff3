"""Times the C++ operators against the best dense torch operator at the shapes of real layers.

    python benchmarks/bench_ops.py [--filter REGEX] [--threads N] [--seconds S] [--quantile Q] [--json FILE]

Candidates are interleaved in many short rounds and every call is timed by itself; the median call is reported, or on a
busy machine a lower quantile. GF/s counts kept multiply-adds as two operations; "peak" is their share of what torch's
product of two 512 x 512 matrices reaches in this run. Large outputs pay for fresh pages unless malloc keeps them, for
all candidates alike:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000 in the environment makes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from machine import Gate
from op_timing import Calls, arguments, measure, write
from torch import Tensor


@dataclass
class Row:
    name: str
    us: float
    gflops: float
    peak: float
    dense_us: float
    dense: str
    ratio: float


def structure(n: int, k: int, granularity: int, sparsity: float, gen: torch.Generator) -> tuple[Tensor, ...]:
    """Return (weight, values, index, tile_ptr, columns) with equal random row lists of the given sparsity."""
    kept = max(1, round(k * (1 - sparsity)))
    weight = torch.zeros(n, k)
    index, values, ptr = [], [], [0]
    for first in range(0, n, granularity):
        rows = torch.randperm(k, generator=gen)[:kept].sort().values
        block = torch.randn(kept, min(granularity, n - first), generator=gen)
        weight[first : first + granularity][:, rows] = block.t()
        index.append(rows)
        values.append(block.reshape(-1))
        ptr.append(ptr[-1] + kept)
    return weight, torch.cat(values), torch.cat(index).int(), torch.tensor(ptr).int(), torch.arange(n).int()


def conv1x1(b: int, k: int, n: int, side: int, sparsity: float, g: int = 8, act: str = "none") -> tuple[Calls, float]:
    gen = torch.Generator().manual_seed(0)
    weight, *packed = structure(n, k, g, sparsity, gen)
    x, bias = torch.randn(b, k, side, side, generator=gen), torch.randn(n, generator=gen)
    dense = weight.view(n, k, 1, 1)
    last, dense_last = x.to(memory_format=torch.channels_last), dense.to(memory_format=torch.channels_last)
    calls = {
        "ours": lambda: torch.ops.fxprune.tile_gemm(x, *packed, bias, None, None, n, g, 1, act),
        "conv nchw": lambda: F.conv2d(x, dense, bias),
        "conv nhwc": lambda: F.conv2d(last, dense_last, bias),
    }
    return calls, 2.0 * b * side * side * packed[0].numel()


def linear(m: int, k: int, n: int, sparsity: float, g: int = 64, act: str = "none") -> tuple[Calls, float]:
    gen = torch.Generator().manual_seed(0)
    weight, *packed = structure(n, k, g, sparsity, gen)
    x, bias = torch.randn(m, k, generator=gen), torch.randn(n, generator=gen)
    calls = {
        "ours": lambda: torch.ops.fxprune.tile_gemm(x, *packed, bias, None, None, n, g, -1, act),
        **dense_linear(x, weight, bias),
    }
    return calls, 2.0 * m * packed[0].numel()


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Calls:
    """Return the dense calls: plain, and those whose weights are packed ahead, as Inductor's freezing does."""
    m = x.shape[0]
    onednn = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    calls: Calls = {
        "linear": lambda: F.linear(x, weight, bias),
        "oneDNN packed": lambda: torch.ops.mkldnn._linear_pointwise(x, onednn, bias, "none", [], ""),
    }
    if torch.backends.mkl.is_available():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, m)
        calls["MKL packed"] = lambda: torch.ops.mkl._mkl_linear(x, packed, weight, bias, m)
    return calls


def depthwise(b: int, c: int, side: int, k: int, stride: int, taps: int, act: str = "none") -> tuple[Calls, float]:
    gen = torch.Generator().manual_seed(0)
    mask = torch.zeros(c, k * k, dtype=torch.bool)
    for channel in range(c):
        mask[channel, torch.randperm(k * k, generator=gen)[:taps]] = True
    weight = torch.randn(c, k * k, generator=gen) * mask
    bits = torch.zeros(c, 1, dtype=torch.int64)
    for tap in range(k * k):
        bits[:, 0] |= mask[:, tap].long() << tap
    x, bias = torch.randn(b, c, side, side, generator=gen), torch.randn(c, generator=gen)
    dense = weight.view(c, 1, k, k)
    last, pad = x.to(memory_format=torch.channels_last), k // 2
    geometry = ([k, k], [stride] * 2, [pad] * 2, [1, 1])
    calls = {
        "ours": lambda: torch.ops.fxprune.depthwise_taps(x, weight, bits, bias, *geometry, act),
        "conv nchw": lambda: F.conv2d(x, dense, bias, stride, pad, 1, c),
        "conv nhwc": lambda: F.conv2d(last, dense, bias, stride, pad, 1, c),
    }
    out = (side + 2 * pad - k) // stride + 1
    return calls, 2.0 * b * c * out * out * taps


def cases() -> Iterator[tuple[str, tuple[Calls, float]]]:
    pointwise = (
        (24, 144, 56), (144, 24, 56), (32, 192, 28), (192, 32, 28), (64, 384, 14), (384, 64, 14), (96, 576, 14),
        (576, 96, 14), (160, 960, 7), (960, 160, 7), (320, 1280, 7), (240, 40, 28), (672, 112, 14), (1152, 192, 7),
    )  # fmt: skip
    for k, n, side in pointwise:
        for sparsity in (0.5, 0.75):
            yield f"conv1x1 b1 {k}->{n}@{side} {sparsity:.0%}", conv1x1(1, k, n, side, sparsity)
    for k, n, side in ((24, 144, 56), (96, 576, 14), (576, 96, 14), (160, 960, 7)):
        yield f"conv1x1 b8 {k}->{n}@{side} 50%", conv1x1(8, k, n, side, 0.5)
    for m in (1, 128, 1024):
        for k, n in ((768, 768), (768, 3072), (3072, 768)):
            yield f"linear m{m} {k}->{n} 75%", linear(m, k, n, 0.75)
    yield "linear m128 768->3072 75% gelu", linear(128, 768, 3072, 0.75, act="gelu")
    layers = (
        (96, 112, 3, 2, (9, 4)), (144, 56, 3, 1, (9, 4)), (192, 28, 3, 1, (9, 4)), (384, 14, 3, 1, (9, 4)),
        (576, 14, 3, 2, (9, 4)), (960, 7, 3, 1, (9, 4)), (144, 56, 5, 2, (25, 8)), (240, 28, 5, 1, (25, 8)),
        (672, 14, 5, 1, (25, 8)), (1152, 7, 5, 1, (25, 8)), (96, 56, 7, 1, (49, 12)), (768, 7, 7, 1, (49, 12)),
    )  # fmt: skip
    for c, side, k, stride, counts in layers:
        for taps in counts:
            yield f"depthwise b1 {c}@{side} k{k}s{stride} t{taps}", depthwise(1, c, side, k, stride, taps)
    for c, side, k, stride, _ in layers[1:6:2]:
        yield f"depthwise b8 {c}@{side} k{k}s{stride} t4", depthwise(8, c, side, k, stride, 4)


def main() -> None:
    options = arguments(__doc__, 0.4, "the C++ operators")
    print(f"{'case':42} {'us':>9} {'GF/s':>7} {'peak':>6} {'dense us':>9} {'ratio':>6}  best dense")
    rows = []
    with torch.inference_mode():
        peak = Gate().gflops()
        for name, (calls, flops) in cases():
            if not re.search(options.filter, name):
                continue
            times = measure(calls, options.seconds, options.quantile)
            us = times.pop("ours")
            dense = min(times, key=lambda key: times[key])
            rate = flops / us * 1e-3
            row = Row(name, us, rate, rate / peak, times[dense], dense, times[dense] / us)
            rows.append(row)
            against = f"{row.dense_us:9.1f} {row.ratio:6.2f}  {dense}"
            print(f"{name:42} {us:9.1f} {rate:7.0f} {row.peak:6.1%} {against}", flush=True)
    write(options, rows)


if __name__ == "__main__":
    main()
