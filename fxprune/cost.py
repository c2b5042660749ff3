"""What a layer costs, in closed form: microseconds, as numbers or as sympy expressions that hold a symbolic batch.

    time = sum over terms of  rate[operator][term] * amount

An amount counts one kind of work in whole units of the kernel: vector multiply-adds (ceilings, because a kernel pays for
every vector it starts), loads and epilogues beside them, bytes within and beyond a cache. A rate is what one unit takes;
:mod:`fxprune.devices` holds rates of a server core, ``fxprune.calibrate()`` fits them to this machine. A measured time
always beats a predicted one.

Sizes may be an int, a sympy expression, a torch SymInt, or a name, which becomes a positive integer symbol. With ints
alone nothing symbolic happens, so a planner may ask thousands of times. sympy takes long to import, so it is imported on
first use; no other module imports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fxprune.devices import DEVICES, Device, Rates, device

if TYPE_CHECKING:
    import sympy

    from fxprune.context import Timing
    from fxprune.match import Match
    from fxprune.sparsity.pattern import LayerMask

    Size: TypeAlias = int | str | sympy.Expr | torch.SymInt
    Cost: TypeAlias = float | sympy.Expr
    Terms: TypeAlias = dict[str, Any]

_FLOAT, _HALF = 4, 2  # bytes
_ROWS = 6  # rows of x in the row-major kernel's register block
_VECTORS = 3  # vectors of pixels in the feature-major kernel's
_EDGE = 2  # pixels that kernel computes without starting a vector
_BLOCK = 32  # pixels or rows of x, and input features, that the bfloat16 kernel multiplies at once
_STRIP = {1: 8, -1: 4}  # output features (feature-major) or vectors of them (row-major) that share a load of x
_GUESS = 256  # a size that only the data decide, such as a number of chosen rows

# our operator, dense feature-major, dense channels-last
_DEPTHWISE = ("depthwise_taps", "depthwise_nchw", "depthwise_nhwc")
_POINTWISE = ("tile_gemm_pixels", "conv1x1_nchw", "conv1x1_nhwc")
_CONV = ("tile_conv", "conv_nchw", "conv_nhwc")


def depthwise_terms(
    dev: Device,
    *,
    batch: Size,
    channels: Size,
    kept: Size,
    height: Size,
    width: Size,
    stride: int = 1,
    item: int = _FLOAT,
) -> Terms:
    """Return the amounts of ``depthwise_taps``; item: bytes of a number.

    kept: kept taps of all channels together. height, width: of the output. Vectors run over the flattened plane where
    a row does not fill one, else along each row; a stride makes every load a shuffle.
    """
    sp = _algebra(batch, channels, kept, height, width)
    b, c, h, w, k = (size(value) for value in (batch, channels, height, width, kept))
    flat, along = sp.ceiling(h * w / dev.lanes), h * sp.ceiling(w / dev.lanes)
    vectors = along if stride != 1 else sp.choose(w <= dev.lanes, flat, along)
    taps = b * k * vectors / dev.threads
    return {
        "call": 1,
        "taps" if stride == 1 else "strided": taps / 1e3,
        "vectors": b * c * vectors / dev.threads / 1e3,
        "planes": b * c / dev.threads / 1e3,
        **_memory(dev, sp, item * b * c * h * w * (1 + stride**2)),
    }


def tile_gemm_terms(
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
) -> Terms:
    """Return the amounts of ``tile_gemm``.

    counts: kept rows per tile. columns: kept output features. batch * pixels: columns of the feature-major
    activation, rows of the row-major one. Feature-major vectors run along the pixels of one image, row-major ones
    along the tile's features.
    """
    sp = _algebra(*counts, columns, out_features, in_features, batch, pixels)
    b, m, n, k, n_kept = (size(value) for value in (batch, pixels, out_features, in_features, columns))
    rows = [size(count) for count in counts]
    widths = [sp.Max(sp.Min(granularity, n_kept - t * granularity), 0) for t in range(len(rows))]
    strip = _STRIP[feature_dim] * (1 if feature_dim == 1 else dev.lanes)
    total = sum(r * sp.ceiling(w / strip) for r, w in zip(rows, widths, strict=True))
    weights = sum(r * w for r, w in zip(rows, widths, strict=True))
    moved = _FLOAT * (b * m * (k + n) + weights)
    if feature_dim == 1:
        vectors = sp.Max(sp.ceiling((m - _EDGE) / dev.lanes), 1)
        left = m - dev.lanes * (sp.ceiling((m + 1) / dev.lanes) - 1)
        return {
            "call": 1,
            "products": b * vectors * weights / dev.threads / 1e3,
            "loads": b * sp.ceiling(vectors / _VECTORS) * total / dev.threads / 1e3,
            "edges": b * sp.choose(left <= _EDGE, left, 0) * total / dev.threads / 1e3,
            "stores": b * vectors * n / dev.threads / 1e3,
            **_memory(dev, sp, moved),
        }
    blocks = sp.ceiling(b * m / _ROWS)
    lanes = sum(r * sp.ceiling(w / dev.lanes) for r, w in zip(rows, widths, strict=True))
    return {
        "call": 1,
        "products": blocks * _ROWS * lanes / dev.threads / 1e3,
        "loads": blocks * total / dev.threads / 1e3,
        "stores": b * m * n / dev.lanes / dev.threads / 1e3,
        "weights": _FLOAT * weights / 1e6,
        **_memory(dev, sp, moved),
    }


def tile_gemm_bf16_terms(
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
) -> Terms:
    """Return the amounts of ``tile_gemm`` in bfloat16; arguments as for :func:`tile_gemm_terms`.

    A block of 32 pixels (of one image) or rows is copied once, its kept rows are gathered for every tile, and strips of
    16 output features are multiplied with 32 of them at a time.
    """
    sp = _algebra(*counts, columns, out_features, in_features, batch, pixels)
    b, m, n, k, n_kept = (size(value) for value in (batch, pixels, out_features, in_features, columns))
    blocks = b * sp.ceiling(m / _BLOCK) if feature_dim == 1 else sp.ceiling(b * m / _BLOCK)
    products = gathered = weights = 0
    for t, count in enumerate(counts):
        rows, width = size(count), sp.Max(sp.Min(granularity, n_kept - t * granularity), 0)
        products += sp.ceiling(rows / _BLOCK) * sp.ceiling(width / 16)
        gathered, weights = gathered + rows, weights + rows * width
    shared = dev.threads * 1e3
    return {
        "call": 1,
        "tiles": blocks * len(counts) / shared,
        "products": blocks * products / shared,
        "loads": blocks * gathered / shared,
        "copied": blocks * k / shared,
        "stores": blocks * n / shared,
        **_memory(dev, sp, _HALF * (b * m * (k + n) + weights)),
    }


def dense_conv_terms(
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
    item: int = _FLOAT,
) -> Terms:
    """Return the amounts of a dense convolution; height, width: of the output; item: bytes of a number."""
    sp = _algebra(batch, in_channels, out_channels, height, width, groups)
    b, c, n, g = (size(value) for value in (batch, in_channels, out_channels, groups))
    pixels, taps = b * size(height) * size(width), kernel[0] * kernel[1]
    lanes = sp.ceiling(n / dev.lanes)
    products = pixels * taps * (c / g) * lanes / dev.threads / 1e3
    return {
        "call": 1,
        "products" if stride == 1 else "strided": products,
        "loads": pixels * c / dev.lanes / dev.threads / 1e3,
        "stores": pixels * lanes / dev.threads / 1e3,
        "weights": item * n * taps * c / g / 1e6,
        **_memory(dev, sp, item * pixels * (c * stride**2 + n)),
    }


def dense_linear_terms(dev: Device, *, rows: Size, in_features: Size, out_features: Size, item: int = _FLOAT) -> Terms:
    """Return the amounts of a dense ``linear`` on x (rows, in_features); one row is a product with a vector."""
    sp = _algebra(rows, in_features, out_features)
    m, k, n = size(rows), size(in_features), size(out_features)
    return {
        "call": 1,
        "batched": sp.Max(sp.Min(m - 1, 1), 0),
        "products": m * k * sp.ceiling(n / dev.lanes) / dev.threads / 1e3,
        "weights": item * n * k / 1e6,
        **_memory(dev, sp, item * (m * k + m * n + n * k)),
    }


def price(dev: Device, operator: str, terms: Terms) -> Cost:
    """Return the microseconds of the amounts of one call."""
    rates = dev.rates[operator]
    return sum(rates.get(term, 0.0) * amount for term, amount in terms.items())


def work(dev: Device, match: Match, mask: LayerMask | None, batch: Size | None = None) -> list[tuple[str, Terms]]:
    """Return operator and amounts of a match: ours under ``mask`` (``None`` keeps all), dense feature-major, other layouts.

    batch: replaces the first size of the activation, which may be symbolic. Other symbolic sizes count with their hints.
    A new kind of match is one more branch here and rows for its operators in :mod:`fxprune.devices`.
    """
    from fxprune.sparsity import tile
    from fxprune.sparsity.tile_plan import GRANULARITY

    x, y = ([hint(s) for s in shape] for shape in (match.geometry.x, match.geometry.y))
    b, (n, k) = x[0] if batch is None else size(batch), match.matrix_shape
    half = match.value.dtype == torch.bfloat16
    item, suffix = (_HALF, "_bf16") if half else (_FLOAT, "")
    if match.kind == "depthwise":
        window: dict[str, Any] = {"height": y[2], "width": math.prod(y[3:]), "stride": match.geometry.stride[0]}
        window["item"] = item
        kept = n * k if mask is None else int(mask.mask.sum())
        conv = dense_conv_terms(
            dev, batch=b, in_channels=n, out_channels=n, groups=n, kernel=match.geometry.kernel, **window
        )
        ours = depthwise_terms(dev, batch=b, channels=n, kept=kept, **window)
        return [(name + suffix, t) for name, t in zip(_DEPTHWISE, (ours, conv, conv), strict=True)]
    if match.kind == "linear":
        rows = b * (math.prod(x[1:]) // max(k, 1)) if len(x) > 1 else 1
        layer = mask or tile.keep_all((n, k), GRANULARITY)
        # in float32 narrow tiles run with vectors along the rows
        narrow = not half and layer.tiling.granularity <= dev.lanes // 2
        ours = _tiles(dev, layer, 1, rows, 1) if narrow else _tiles(dev, layer, rows, 1, -1, half)
        dense = dense_linear_terms(dev, rows=rows, in_features=k, out_features=n, item=item)
        name = "tile_gemm_pixels" if narrow else "tile_gemm_rows" + suffix
        if match.value.dim() == 4:  # a 1x1 convolution of a 1x1 map
            return [(name, ours), ("conv_pixel" + suffix, dense), ("conv_pixel" + suffix, dense)]
        return [(name, ours), ("linear" + suffix, dense)]
    g = match.geometry
    window = {"height": y[2], "width": math.prod(y[3:]), "stride": max(g.stride), "item": item}
    layer = mask or tile.keep_all((n, k), match.tile_width(32 if half else 8))
    ours = _tiles(dev, layer, b, math.prod(y[2:]), 1, half)
    if match.kind == "pointwise":
        conv = dense_conv_terms(dev, batch=b, in_channels=k, out_channels=n, **window)
        return [(name + suffix, t) for name, t in zip(_POINTWISE, (ours, conv, conv), strict=True)]
    conv = dense_conv_terms(dev, batch=b, in_channels=x[1], out_channels=n, kernel=g.kernel, groups=g.groups, **window)
    ours["copied"] = item * b * math.prod(x[1:]) / 1e6  # the planes that the taps are read from
    return [(name + suffix, t) for name, t in zip(_CONV, (ours, conv, conv), strict=True)]


def _tiles(dev: Device, layer: LayerMask, batch: Size, pixels: Size, feature_dim: int, half: bool = False) -> dict[str, Any]:
    """Return the amounts of the tiles of a mask and of the elements beside them; half: in bfloat16."""
    n, k = layer.tiling.shape
    of = tile_gemm_bf16_terms if half else tile_gemm_terms
    terms = dict(
        of(
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
    )
    if layer.rest is not None:
        for term, amount in _tiles(dev, layer.rest, batch, pixels, feature_dim, half).items():
            terms[term] = terms.get(term, 0) + amount
    return terms


def predict(match: Match, mask: LayerMask | None, isa: str, rates: Rates | None = None) -> Timing:
    """Return the predicted times of a match, sparse under ``mask`` (everything kept if ``None``) and dense.

    isa: the row of :data:`DEVICES` our kernels run as; torch's run as its own best. rates: as for :func:`device`.
    """
    from fxprune.context import Timing

    ours, torchs = devices(isa, rates)
    sparse = price(ours, *work(ours, match, mask)[0])
    dense = [price(torchs, *item) for item in work(torchs, match, mask)[1:]]
    return Timing(float(sparse), float(min(dense)), float(dense[0]), measured=False)


def evaluate(expr: Cost, **symbols: float) -> float:
    """Return ``expr`` with every symbol given by name; raises ``ValueError`` for one that is missing."""
    if isinstance(expr, (int, float)):
        return float(expr)
    values = {s: symbols[s.name] for s in expr.free_symbols if s.name in symbols}
    missing = sorted(s.name for s in expr.free_symbols if s not in values)
    if missing:
        raise ValueError(f"got values for {sorted(symbols)}, expected one for {missing} too")
    return float(expr.subs(values))


def crossover(expr_sparse: Cost, expr_dense: Cost, symbol: str | sympy.Symbol, low: int = 1, high: int = 4096) -> int | None:
    """Return the first integer in ``low..high`` where the faster of the two is not the one that is at ``low``.

    ``None`` when the same one wins everywhere; a tie counts as a win of dense. ``symbol`` must be the only
    free one, else ``ValueError``. Ceilings make costs jump, so every value is tried.
    """
    import sympy

    name = symbol if isinstance(symbol, str) else symbol.name
    gap = sympy.sympify(expr_dense - expr_sparse)
    others = sorted(s.name for s in gap.free_symbols if s.name != name)
    if others:
        raise ValueError(f"got an expression in {others}, expected only {name!r} to be free")
    found = [s for s in gap.free_symbols if s.name == name]
    saved = sympy.lambdify(found or [sympy.Symbol(name)], gap, modules=["math"])
    wins = saved(low) > 0
    return next((value for value in range(low + 1, high + 1) if (saved(value) > 0) != wins), None)


def size(value: Any) -> Any:
    """Return a size as a number or expression: a name is a positive integer symbol, a SymInt its own expression."""
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, str):
        import sympy

        return sympy.Symbol(value, integer=True, positive=True)
    return value


class _Numbers:
    """What the formulas need of sympy, on plain numbers."""

    ceiling, Min, Max = math.ceil, min, max

    @staticmethod
    def choose(condition: bool, then: float, otherwise: float) -> float:
        return then if condition else otherwise


def _algebra(*sizes: Any) -> Any:
    if all(isinstance(value, (int, float)) for value in sizes):
        return _Numbers
    import sympy

    class Symbolic(_Numbers):
        ceiling, Min, Max = sympy.ceiling, sympy.Min, sympy.Max

        @staticmethod
        def choose(condition: Any, then: Any, otherwise: Any) -> Any:
            return sympy.Piecewise((then, condition), (otherwise, True))

    return Symbolic


def _memory(dev: Device, sp: Any, moved: Any) -> Terms:
    """Megabytes moved, those of them that do not fit the L2 caches, and those beyond L3's share."""
    l2 = dev.l2_bytes * dev.threads
    return {
        "near": moved / 1e6,
        "far": sp.Max(moved - l2, 0) / 1e6,
        "beyond": sp.Max(moved - dev.l3_bytes, 0) / 1e6,
    }


def hint(value: Any) -> int:
    """Return a size, or the hint of a symbolic one without adding a guard; of one that data decide, a guess."""
    node = getattr(value, "node", None)
    if node is None or node.hint is not None:
        return int(value if node is None else node.hint)
    env = node.shape_env
    known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # of torch before 2.13
    return int(node.expr.subs({symbol: known.get(symbol, _GUESS) for symbol in node.expr.free_symbols}))


def devices(isa: str, rates: Rates | None = None) -> tuple[Device, Device]:
    """Return the rows our kernels (compiled for ``isa``) and torch's run as, with the threads of this process."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    names = [name if name in DEVICES else "scalar" for name in (isa, capability)]
    ours, torchs = (device(name, torch.get_num_threads(), rates) for name in names)
    return ours, torchs
