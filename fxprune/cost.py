"""What a layer costs, in closed form: microseconds as sympy expressions that may hold a symbolic batch.

    time = overhead + max(compute, memory)     matrix products: their loads hide behind arithmetic
    time = overhead + compute + memory         depthwise: too little arithmetic per byte to hide anything

Compute counts whole tiles (ceilings), because a kernel pays for every register block it starts. Memory is
the L2 rate up to the L2 size and the L3 rate beyond: on CPUs that step, not DRAM, is where time goes.
The figures of :data:`DEVICES` are those of a server core at 3.8 GHz; a measured time always beats a
predicted one, so they only need to rank alternatives.

Sizes may be an int, a sympy expression, a torch SymInt, or a name, which becomes a positive integer symbol.
sympy takes long to import, so it is imported on first use; no other module imports it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fxprune.errors import ConfigError, nearest

if TYPE_CHECKING:
    import sympy

    from fxprune.context import Timing
    from fxprune.match import Match
    from fxprune.sparsity.pattern import LayerMask

    Size: TypeAlias = int | str | sympy.Expr | torch.SymInt

_FLOAT = 4  # bytes
_ROWS = 6  # rows of x in the row-major kernel's register block
_NCHW_DEPTHWISE = 1.8  # dense depthwise convolution: time in NCHW over time in channels-last
_NCHW_POINTWISE = 1.1


@dataclass(frozen=True)
class Device:
    """One instruction set of one machine.

    lanes: floats per vector. peak_gflops, l2_gbps, l3_gbps, l2_bytes: per thread. overhead_us: one call of
    our operators; dense_overhead_us: one call of torch's. The rest: fraction of peak that each kernel reaches.
    """

    name: str
    lanes: int
    peak_gflops: float
    threads: int = 2
    l2_gbps: float = 100.0
    l3_gbps: float = 29.5
    l2_bytes: int = 2 << 20
    overhead_us: float = 4.0
    dense_overhead_us: float = 15.0
    depthwise: float = 0.33
    tile_gemm: float = 0.6
    elements: float = 0.2  # tile_gemm with tiles of one output feature
    dense_conv: float = 0.53
    dense_linear: float = 0.7


DEVICES: Mapping[str, Device] = {
    "avx512": Device("avx512", lanes=16, peak_gflops=240.0),
    "avx2": Device("avx2", lanes=8, peak_gflops=124.0),
    "scalar": Device("scalar", lanes=1, peak_gflops=15.0, l2_gbps=50.0, l3_gbps=20.0),
}


def device(name: str, threads: int | None = None) -> Device:
    """Return a row of :data:`DEVICES`, for ``threads`` threads; raises :class:`ConfigError` for another name."""
    if name not in DEVICES:
        expected = f"one of {', '.join(DEVICES)}; did you mean {nearest(name, DEVICES)!r}?"
        raise ConfigError(name="device", given=name, expected=expected)
    return DEVICES[name] if threads is None else replace(DEVICES[name], threads=threads)


def depthwise_cost(
    dev: Device, *, batch: Size, channels: Size, kept: Size, height: Size, width: Size, stride: int = 1
) -> sympy.Expr:
    """Return the time of ``depthwise_taps``, us.

    kept: kept taps of all channels together. height, width: of the output. Vectors run over the flattened
    plane where a row does not fill one, else along each row; threads share (image, channel) planes.
    """
    return _depthwise(dev, dev.overhead_us, batch, channels, kept, height, width, stride)


def tile_gemm_cost(
    dev: Device,
    *,
    counts: Sequence[Size],
    columns: Size,
    granularity: int,
    out_features: Size,
    in_features: Size,
    batch: Size,
    pixels: Size = 1,
    feature_dim: int = 1,
    k_step: int = 1,
) -> sympy.Expr:
    """Return the time of ``tile_gemm``, us.

    counts: kept rows per tile. columns: kept output features. batch * pixels: columns of the feature-major
    activation, rows of the row-major one. Feature-major vectors run along the pixels of one image, row-major
    ones along the tile's features; each tile pays for ``k_step`` multiples of rows.
    """
    sp = _sympy()
    b, m, n_kept = size(batch), size(pixels), size(columns)
    panel = granularity <= (1 if feature_dim == 1 else dev.lanes // 2)  # vectors along pixels or rows, as tile_gemm_panel.h
    if granularity == 1:  # thousands of tiles, all of one width
        whole = [k_step * -(-count // k_step) for count in counts if isinstance(count, int)]
        counts = [sum(whole), *(count for count in counts if not isinstance(count, int))]
    rows = [k_step * sp.ceiling(size(count) / k_step) for count in counts]
    widths = [1 if granularity == 1 else sp.Min(granularity, n_kept - t * granularity) for t in range(len(rows))]
    weights = sum((size(c) * w for c, w in zip(counts, widths, strict=True)), sp.Integer(0))
    if feature_dim == 1:
        points = b * dev.lanes * sp.ceiling(m / dev.lanes)
    elif panel:
        points = dev.lanes * sp.ceiling(b * m / dev.lanes)
    else:
        points = _ROWS * sp.ceiling(b * m / _ROWS)
        widths = [dev.lanes * sp.ceiling(w / dev.lanes) for w in widths]
    block = _total(rows, widths)
    moved = _FLOAT * (b * m * (size(in_features) + size(out_features)) + weights)
    compute = 2 * block * points / _rate(dev, dev.elements if granularity == 1 else dev.tile_gemm)
    return dev.overhead_us + sp.Max(compute, _memory(dev, moved))


def dense_conv_cost(
    dev: Device,
    *,
    batch: Size,
    in_channels: Size,
    out_channels: Size,
    height: Size,
    width: Size,
    kernel: tuple[int, int] = (1, 1),
    stride: int = 1,
    groups: Size = 1,
    feature_major: bool = False,
) -> sympy.Expr:
    """Return the time of a dense convolution, us; ``groups == in_channels`` is depthwise.

    height, width: of the output. feature_major: in NCHW instead of channels-last, the faster layout.
    """
    sp = _sympy()
    b, c, n, g = size(batch), size(in_channels), size(out_channels), size(groups)
    taps = kernel[0] * kernel[1]
    if c == g and c != 1:
        time = _depthwise(dev, dev.dense_overhead_us, b, c, c * taps, height, width, stride)
        return time * (_NCHW_DEPTHWISE if feature_major else 1)
    pixels = b * size(height) * size(width)
    lanes = dev.lanes * sp.ceiling(n / dev.lanes)
    compute = 2 * pixels * taps * (c / g) * lanes / _rate(dev, dev.dense_conv)
    moved = _FLOAT * (pixels * (c * stride**2 + n) + n * taps * c / g)
    time = dev.dense_overhead_us + sp.Max(compute, _memory(dev, moved))
    return time * (_NCHW_POINTWISE if feature_major else 1)


def dense_linear_cost(dev: Device, *, rows: Size, in_features: Size, out_features: Size) -> sympy.Expr:
    """Return the time of a dense ``linear`` on x (rows, in_features), us."""
    sp = _sympy()
    m, k, n = size(rows), size(in_features), size(out_features)
    block = _ROWS * sp.ceiling(m / _ROWS) * dev.lanes * sp.ceiling(n / dev.lanes)
    compute = 2 * k * block / _rate(dev, dev.dense_linear)
    return dev.dense_overhead_us + sp.Max(compute, _memory(dev, _FLOAT * (m * k + m * n + n * k)))


def evaluate(expr: sympy.Expr, **symbols: float) -> float:
    """Return ``expr`` with every symbol given by name; raises ``ValueError`` for one that is missing."""
    values = {s: symbols[s.name] for s in expr.free_symbols if s.name in symbols}
    missing = sorted(s.name for s in expr.free_symbols if s not in values)
    if missing:
        raise ValueError(f"got values for {sorted(symbols)}, expected one for {missing} too")
    return float(expr.subs(values))


def crossover(
    expr_sparse: sympy.Expr, expr_dense: sympy.Expr, symbol: str | sympy.Symbol, low: int = 1, high: int = 4096
) -> int | None:
    """Return the first integer in ``low..high`` where the faster of the two is not the one that is at ``low``.

    ``None`` when the same one wins everywhere; a tie counts as a win of dense. ``symbol`` must be the only
    free one, else ``ValueError``. Ceilings make costs jump, so every value is tried.
    """
    sp = _sympy()
    name = symbol if isinstance(symbol, str) else symbol.name
    gap = expr_dense - expr_sparse
    others = sorted(s.name for s in gap.free_symbols if s.name != name)
    if others:
        raise ValueError(f"got an expression in {others}, expected only {name!r} to be free")
    found = [s for s in gap.free_symbols if s.name == name]
    saved = sp.lambdify(found or [sp.Symbol(name)], gap, modules=["math"])
    wins = saved(low) > 0
    return next((value for value in range(low + 1, high + 1) if (saved(value) > 0) != wins), None)


def predict(match: Match, mask: LayerMask | None, isa: str) -> Timing:
    """Return the predicted times of a match, sparse under ``mask`` (everything kept if ``None``) and dense.

    isa: the row of :data:`DEVICES` our kernels run as; torch's run as its own best. Symbolic sizes count
    with their hints.
    """
    from fxprune.context import Timing
    from fxprune.sparsity import tile
    from fxprune.sparsity.tile_plan import GRANULARITY

    threads = torch.get_num_threads()
    ours = device(isa if isa in DEVICES else "scalar", threads)
    capability = torch.backends.cpu.get_cpu_capability().lower()
    torchs = device(capability if capability in DEVICES else "scalar", threads)
    x, y = ([_hint(s) for s in shape] for shape in (match.geometry.x, match.geometry.y))
    n, k = match.matrix_shape
    if match.kind == "linear":
        layer = mask or tile.keep_all((n, k), GRANULARITY)
        rows = math.prod(x) // max(k, 1)
        sparse = _tile_cost(ours, layer, rows, 1, feature_dim=-1)
        dense = first = float(dense_linear_cost(torchs, rows=rows, in_features=k, out_features=n))
        return Timing(float(sparse), dense, first, measured=False)
    window: dict[str, Any] = {"height": y[2], "width": math.prod(y[3:]), "stride": match.geometry.stride[0]}
    if match.kind == "depthwise":
        kept = n * k if mask is None else int(mask.mask.sum())
        sparse = depthwise_cost(ours, batch=x[0], channels=n, kept=kept, **window)
        conv: dict[str, Any] = {"in_channels": n, "out_channels": n, "groups": n, "kernel": match.geometry.kernel}
    elif match.kind == "conv":
        groups, kernel = match.geometry.groups, match.geometry.kernel
        layer = mask or tile.keep_all((n, k), match.tile_width(GRANULARITY))
        sparse = _tile_cost(ours, layer, x[0], math.prod(y[2:]), feature_dim=1)
        sparse += _memory(ours, _sympy().Integer(2 * _FLOAT * math.prod(x)))  # the copy of its input in planes
        conv = {"in_channels": x[1], "out_channels": n, "groups": groups, "kernel": kernel}
    else:
        layer = mask or tile.keep_all((n, k), GRANULARITY)
        sparse = _tile_cost(ours, layer, x[0], math.prod(y[2:]), feature_dim=1)
        conv = {"in_channels": k, "out_channels": n}
    dense, first = (
        float(dense_conv_cost(torchs, batch=x[0], feature_major=layout, **conv, **window)) for layout in (False, True)
    )
    return Timing(float(sparse), dense, first, measured=False)


def size(value: Any) -> sympy.Expr:
    """Return a size as an expression: a name is a positive integer symbol, a SymInt its own expression."""
    sp = _sympy()
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return sp.Symbol(value, integer=True, positive=True) if isinstance(value, str) else sp.sympify(value)


def _tile_cost(dev: Device, layer: LayerMask, batch: int, pixels: int, feature_dim: int) -> sympy.Expr:
    n, k = layer.tiling.shape
    rest = _sympy().Integer(0) if layer.rest is None else _tile_cost(dev, layer.rest, batch, pixels, feature_dim)
    return rest + tile_gemm_cost(
        dev,
        counts=layer.counts,
        columns=len(layer.tiling.columns),
        granularity=layer.tiling.granularity,
        out_features=n,
        in_features=k,
        batch=batch,
        pixels=pixels,
        feature_dim=feature_dim,
    )


def _depthwise(
    dev: Device, overhead: float, batch: Size, channels: Size, kept: Size, height: Size, width: Size, stride: int
) -> sympy.Expr:
    sp = _sympy()
    b, c, h, w = (size(value) for value in (batch, channels, height, width))
    along_rows = h * sp.ceiling(w / dev.lanes)
    flat = sp.ceiling(h * w / dev.lanes)
    vectors = sp.Piecewise((flat, w <= dev.lanes), (along_rows, True))
    planes = dev.threads * sp.ceiling(b * c / dev.threads)
    compute = 2 * planes * (size(kept) / c) * vectors * dev.lanes / _rate(dev, dev.depthwise)
    moved = _FLOAT * b * c * h * w * (1 + stride**2)
    return overhead + compute + _memory(dev, moved)


def _total(rows: Sequence[sympy.Expr], widths: Sequence[sympy.Expr]) -> sympy.Expr:
    return sum((k * w for k, w in zip(rows, widths, strict=True)), _sympy().Integer(0))


def _memory(dev: Device, moved: sympy.Expr) -> sympy.Expr:
    """Time to move ``moved`` bytes, us: what fits the L2 caches at their rate, the rest at L3's."""
    sp = _sympy()
    cache = dev.l2_bytes * dev.threads
    near, far = dev.l2_gbps * dev.threads * 1e3, dev.l3_gbps * dev.threads * 1e3
    return sp.Min(moved, cache) / near + sp.Max(moved - cache, 0) / far


def _rate(dev: Device, efficiency: float) -> float:
    """Floating-point operations per microsecond of all threads."""
    return dev.peak_gflops * dev.threads * efficiency * 1e3


def _hint(value: Any) -> int:
    hint = getattr(getattr(value, "node", None), "hint", None)
    return int(value if hint is None else hint)


def _sympy() -> Any:
    import sympy

    return sympy
