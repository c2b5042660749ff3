"""What one unit of a kernel's work takes on each kind of machine: the constants of the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fxprune.errors import ConfigError, nearest

Rates = Mapping[str, Mapping[str, float]]

# By operator and term, in microseconds: per call ("call", "batched"), per megabyte ("weights", "near", "far", "beyond"),
# per thousand of the rest. Fitted on two server cores with AVX-512, the rows of k x k convolutions on a machine some 10 %
# faster than the others; what counts vectors holds for narrower vectors as well, because there are more of them.
RATES: Rates = {
    "conv1x1_nchw": {"beyond": 54.5, "call": 45.8, "loads": 9.74, "products": 0.216, "stores": 8.06},
    "conv1x1_nhwc": {"beyond": 48, "call": 38.3, "loads": 5.58, "products": 0.211, "weights": 59.3},
    "conv_nchw": {"call": 13, "loads": 1.8, "near": 63, "products": 0.143, "strided": 0.172, "weights": 57},
    "conv_nhwc": {"call": 12, "near": 5.7, "products": 0.133, "stores": 6, "strided": 0.141, "weights": 52},
    "conv_pixel": {"batched": 69.9, "call": 6.17, "near": 5.82, "products": 1.52},
    "depthwise_nchw": {
        "beyond": 76.2,
        "call": 72.8,
        "far": 9.34,
        "loads": 4.17,
        "near": 45.5,
        "products": 0.291,
        "strided": 0.665,
    },
    "depthwise_nhwc": {
        "beyond": 23.6,
        "call": 40.4,
        "far": 2.17,
        "loads": 0.31,
        "near": 16.8,
        "products": 0.443,
        "strided": 0.641,
    },
    "depthwise_taps": {
        "beyond": 21.9,
        "call": 13.6,
        "near": 7.8,
        "planes": 13.2,
        "strided": 1.85,
        "taps": 0.872,
        "vectors": 0.644,
    },
    "linear": {"batched": 29.5, "call": 3.83, "far": 17.9, "near": 5.75, "products": 0.172, "weights": 4.38},
    "tile_conv": {"beyond": 2.6, "call": 23, "copied": 40.6, "edges": 1.41, "loads": 1.53, "products": 0.0977},
    "tile_gemm_pixels": {
        "beyond": 112,
        "call": 8.04,
        "edges": 1.19,
        "far": 9.34,
        "loads": 1.83,
        "near": 3.28,
        "products": 0.141,
        "stores": 1.14,
    },
    "tile_gemm_rows": {"call": 7.99, "far": 28.7, "loads": 1.26, "products": 0.117, "stores": 4.81},
    # bfloat16, with AMX
    "conv1x1_nchw_bf16": {"call": 101, "far": 20.8, "near": 52.3, "products": 0.0642, "stores": 10.2, "weights": 106},
    "conv1x1_nhwc_bf16": {"call": 55.4, "far": 18.9, "products": 0.0414, "stores": 0.969, "weights": 86.6},
    "conv_nchw_bf16": {
        "call": 124,
        "loads": 11.2,
        "near": 10.8,
        "products": 0.0282,
        "stores": 6.44,
        "strided": 0.065,
        "weights": 106,
    },
    "conv_nhwc_bf16": {"call": 48.7, "products": 0.0238, "stores": 2.22, "strided": 0.0375, "weights": 109},
    "conv_pixel_bf16": {"batched": 5.15, "call": 66.2, "weights": 376},
    "depthwise_nchw_bf16": {"call": 77.1, "loads": 7.58, "near": 32.4, "products": 0.826, "strided": 1.88},
    "depthwise_nhwc_bf16": {
        "call": 48.1,
        "far": 17.5,
        "loads": 1.58,
        "near": 11.6,
        "products": 0.292,
        "strided": 0.524,
        "weights": 319,
    },
    "depthwise_taps_bf16": {"call": 16.4, "near": 10.3, "planes": 21.5, "strided": 1.37, "taps": 0.741},
    "linear_bf16": {"call": 18.9, "far": 13.4, "near": 2.62, "products": 0.0282, "weights": 39.5},
    "tile_conv_bf16": {"call": 27.5, "copied": 112, "loads": 1.17, "products": 34},
    "tile_gemm_pixels_bf16": {"call": 5.49, "copied": 0.481, "far": 3.31, "products": 48.9, "stores": 3.01, "tiles": 9.7},
    "tile_gemm_rows_bf16": {
        "call": 5.32,
        "copied": 5.38,
        "far": 54.4,
        "loads": 0.812,
        "products": 19.6,
        "stores": 11.7,
        "tiles": 13,
    },
}


@dataclass(frozen=True)
class Device:
    """One instruction set of one machine. lanes: floats per vector. rates: by operator and term.

    l2_bytes: of one thread; l3_bytes: of all together.
    """

    name: str
    lanes: int
    threads: int = 2
    l2_bytes: int = 5 << 18
    l3_bytes: int = 24 << 20
    rates: Rates = field(default_factory=lambda: RATES, repr=False)


DEVICES: Mapping[str, Device] = {
    "amx": Device("amx", lanes=16),
    "avx512_bf16": Device("avx512_bf16", lanes=16),
    "avx512": Device("avx512", lanes=16),
    "avx2": Device("avx2", lanes=8),
    "scalar": Device("scalar", lanes=1),
}


def device(name: str, threads: int | None = None, rates: Rates | None = None) -> Device:
    """Return a row of :data:`DEVICES`, for ``threads`` threads; raises :class:`ConfigError` for another name.

    rates: what ``fxprune.calibrate()`` found, by operator; operators it lacks keep the row's own.
    """
    if name not in DEVICES:
        expected = f"one of {', '.join(DEVICES)}; did you mean {nearest(name, DEVICES)!r}?"
        raise ConfigError(name="device", given=name, expected=expected)
    row = DEVICES[name]
    return replace(row, threads=threads or row.threads, rates={**row.rates, **(rates or {})})
