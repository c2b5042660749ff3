"""What one unit of a kernel's work takes on each kind of machine: the constants of the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fxprune.errors import ConfigError, nearest

Rates = Mapping[str, Mapping[str, float]]

# By operator and term, in microseconds: per call ("call", "batched"), per megabyte ("weights", "near", "far", "beyond"),
# per thousand of the rest. Fitted on two server cores at 2.8 GHz with AVX-512; what counts vectors holds for narrower
# vectors as well, because there are more of them.
RATES: Rates = {
    "conv1x1_nchw": {"beyond": 91.8, "call": 35.8, "loads": 3.79, "near": 49.5, "products": 0.248},
    "conv1x1_nhwc": {"beyond": 56.7, "call": 23.1, "loads": 7.35, "products": 0.186, "stores": 0.525, "weights": 107},
    "conv_pixel": {"batched": 125, "call": 9.68, "near": 9.18, "products": 0.45},
    "depthwise_nchw": {"call": 70, "far": 55.5, "loads": 4.04, "near": 36.4, "products": 0.434, "strided": 0.786},
    "depthwise_nhwc": {"call": 50.4, "far": 29.1, "loads": 0.504, "near": 4.52, "products": 0.471, "strided": 0.683},
    "depthwise_taps": {"call": 13.9, "far": 21.1, "planes": 9.48, "strided": 2.01, "taps": 1.03, "vectors": 1.54},
    "linear": {"batched": 31.7, "call": 3.98, "far": 20.9, "near": 4.86, "products": 0.181, "weights": 5.32},
    "tile_gemm_pixels": {
        "beyond": 173,
        "call": 7.75,
        "edges": 1.45,
        "far": 8.67,
        "loads": 4.56,
        "near": 3.92,
        "stores": 1.35,
    },
    "tile_gemm_rows": {"call": 10.2, "far": 26.2, "loads": 4.4, "stores": 2.91},
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
