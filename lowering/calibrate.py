"""Fit the rates of the cost model to this machine: time a fixed set of shapes, solve for what one unit of work takes.

The shapes are those of small networks, each at three shares of kept weights, in the layouts that
:mod:`~fxprune.lowering.measure` compares. The fit minimises relative errors under rates >= 0, and trusts a time less the
further it lies from the others: a busy neighbour makes single times long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import cost
from ..context import Unit
from ..match import Geometry, Match
from ..sparsity import dcp, tile
from ..sparsity.pattern import LayerMask
from . import library, measure
from .kernels import KernelTables

KEEPS = ((1.0, 1), (0.5, 1), (0.25, 1), (0.5, 4))  # share of kept weights; narrower tiles by this factor
_ROUNDS = 4
_SWEEPS = 4000
_FLOOR = 0.03  # relative errors below this are noise

# (batch, channels, side of x, window, stride)
DEPTHWISE = (
    (1, 32, 112, 3, 1), (1, 64, 112, 3, 2), (1, 128, 56, 3, 1), (1, 128, 56, 5, 2), (1, 256, 28, 3, 1), (1, 256, 28, 5, 1),
    (1, 512, 14, 3, 1), (1, 512, 14, 5, 2), (1, 640, 14, 3, 2), (1, 1024, 7, 3, 1), (1, 1024, 7, 5, 1), (1, 768, 7, 7, 1),
    (4, 128, 56, 3, 1), (4, 128, 56, 3, 2), (8, 256, 28, 5, 1), (8, 512, 14, 3, 1), (8, 1024, 7, 3, 1), (8, 96, 112, 3, 2),
)  # fmt: skip
# (batch, in, out, side)
POINTWISE = (
    (1, 32, 16, 112), (1, 16, 64, 112), (1, 128, 24, 56), (1, 24, 128, 56), (1, 32, 224, 28), (1, 224, 40, 28),
    (1, 64, 416, 14), (1, 448, 80, 14), (1, 112, 640, 14), (1, 640, 96, 14), (1, 160, 1024, 7), (1, 1024, 192, 7),
    (1, 256, 1024, 7), (8, 32, 16, 112), (8, 24, 128, 56), (8, 128, 24, 56), (8, 224, 40, 28), (8, 64, 416, 14),
    (8, 640, 96, 14), (8, 160, 1024, 7), (8, 1024, 320, 7), (8, 16, 96, 112),
)  # fmt: skip
# (batch, in, out, side of x, window, stride)
CONV = (
    (1, 3, 32, 112, 3, 2), (1, 64, 64, 56, 3, 1), (1, 64, 128, 56, 3, 2), (1, 128, 128, 28, 3, 1), (1, 256, 256, 14, 3, 1),
    (1, 128, 256, 28, 3, 2), (1, 512, 512, 7, 3, 1), (1, 96, 96, 28, 5, 1), (4, 64, 64, 56, 3, 1), (4, 256, 256, 14, 3, 1),
)  # fmt: skip
# (rows, in, out)
LINEAR = (
    (1, 1024, 1000), (1, 128, 128), (1, 768, 768), (8, 1024, 1000), (4, 768, 768), (32, 128, 512), (32, 512, 128),
    (64, 768, 768), (128, 512, 2048), (128, 768, 768), (128, 3072, 768), (512, 768, 768), (512, 768, 3072), (512, 3072, 768),
)  # fmt: skip
# (batch, in, out) of a 1x1 map
PIXEL = ((1, 16, 64), (1, 24, 576), (1, 576, 24), (1, 1024, 48), (8, 24, 576), (8, 576, 24), (8, 1024, 48))


def calibrate(folder: str | None = None) -> dict[str, float]:
    """Time the shapes on this machine and keep the fitted rates in ``folder`` (``None``: the user's cache folder).

    Takes about twenty seconds. Returns the mean absolute relative error of the fit by operator.
    """
    samples = list(_samples())
    rates, errors = {}, {}
    for operator in sorted({name for name, _, _ in samples}):
        mine = [(terms, micros) for name, terms, micros in samples if name == operator]
        rates[operator], errors[operator] = fit(mine)
    measure.write_json(measure.cache_file(folder, "rates"), rates)
    return errors


def fit(samples: Sequence[tuple[dict[str, Any], float]]) -> tuple[dict[str, float], float]:
    """Return rates by term and their mean absolute relative error on ``samples``, pairs of amounts and microseconds."""
    names = sorted({name for terms, _ in samples for name in terms})
    amounts = torch.tensor([[float(terms.get(n, 0.0)) for n in names] for terms, _ in samples], dtype=torch.float64)
    relative = amounts / torch.tensor([micros for _, micros in samples], dtype=torch.float64)[:, None]
    weight = torch.ones(len(samples), dtype=torch.float64)
    for _ in range(8):
        rates = _non_negative(relative * weight[:, None], weight)
        error = (relative @ rates - 1).abs()
        weight = error.clamp_min(_FLOOR).rsqrt()
    return dict(zip(names, rates.tolist(), strict=True)), error.mean().item()


def _non_negative(matrix: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Least squares under rates >= 0, by coordinate descent on the normal equations."""
    scale = matrix.norm(dim=0).clamp_min(1e-30)
    matrix = matrix / scale
    gram, right = (matrix.T @ matrix).tolist(), (matrix.T @ goal).tolist()
    found = [0.0] * len(right)
    for _ in range(_SWEEPS):
        moved = 0.0
        for i, row in enumerate(gram):
            if row[i] == 0.0:
                continue
            best = max(0.0, found[i] + (right[i] - sum(a * b for a, b in zip(row, found, strict=True))) / row[i])
            moved, found[i] = max(moved, abs(best - found[i])), best
        if moved < 1e-9:
            break
    return torch.tensor(found, dtype=torch.float64) / scale


def _samples() -> Iterator[tuple[str, dict[str, Any], float]]:
    """Yield operator, amounts and microseconds."""
    unit = KernelTables().unit
    ours, torchs = cost.devices(library.isa())
    generator = torch.Generator().manual_seed(0)
    for match in (*_matches(generator), *_matches(generator, torch.bfloat16)):
        dtype = match.value.dtype
        x, row = torch.randn(match.geometry.x, generator=generator).to(dtype), unit(match.kind, dtype)
        masks = [_mask(match, *keep, row, generator) for keep in KEEPS]
        with torch.inference_mode():
            runs = [measure.sparse_call(match, mask, row, x) for mask in masks]
            micros, _ = measure.interleave([*runs, *measure.dense_calls(match, x)], _ROUNDS)
        for mask, taken in zip(masks, micros, strict=False):
            yield (*cost.work(ours, match, mask)[0], taken)
        for (operator, terms), taken in zip(cost.work(torchs, match, None)[1:], micros[len(masks) :], strict=True):
            yield operator, terms, taken


def _matches(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Iterator[Match]:
    """Matches of no graph: measuring and predicting read only kind, weight and geometry."""

    def match(kind: str, weight: tuple[int, ...], geometry: Geometry) -> Match:
        nowhere: Any = None
        value = torch.randn(weight, generator=generator).to(dtype)
        return Match(kind, nowhere, (0, None), nowhere, kind, kind, value, geometry)

    for b, c, side, window, stride in DEPTHWISE:
        out, pad = -(-side // stride), window // 2
        geometry = Geometry((b, c, side, side), (b, c, out, out), (window, window), (stride, stride), (pad, pad))
        yield match("depthwise", (c, 1, window, window), geometry)
    for b, k, n, side in POINTWISE:
        yield match("pointwise", (n, k, 1, 1), Geometry((b, k, side, side), (b, n, side, side)))
    for b, k, n, side, window, stride in CONV:
        out, pad = -(-side // stride), window // 2
        geometry = Geometry((b, k, side, side), (b, n, out, out), (window, window), (stride, stride), (pad, pad))
        yield match("conv", (n, k, window, window), geometry)
    for m, k, n in LINEAR:
        yield match("linear", (n, k), Geometry((m, k), (m, n)))
    for b, k, n in PIXEL:
        yield match("linear", (n, k, 1, 1), Geometry((b, k, 1, 1), (b, n, 1, 1)))


def _mask(match: Match, keep: float, narrower: int, unit: Unit, generator: torch.Generator) -> LayerMask | None:
    if keep == 1.0:
        return None
    scores = {"w": torch.rand(match.matrix_shape, generator=generator)}
    if match.kind == "depthwise":
        return dcp.plan_layers(scores, {"w": 1 - keep}, recalibration="off")["w"]
    granularity = unit.granularity // narrower
    return tile.plan_layers(scores, {"w": 1 - keep}, granularity=granularity, columns=match.kind == "linear")["w"]
