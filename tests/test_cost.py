"""The closed-form cost model: monotone, quantised, symbolic in the batch, and not far from what was measured."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxprune import cost
from fxprune.errors import ConfigError
from fxprune.match import Geometry, Match
from fxprune.sparsity import dcp, tile

AVX512 = cost.device("avx512")
names = st.sampled_from(sorted(cost.DEVICES))


def gemm(dev: cost.Device = AVX512, **changes: object) -> sympy.Expr:
    options = {"counts": [192] * 12, "columns": 768, "granularity": 64, "out_features": 768, "in_features": 768}
    return cost.tile_gemm_cost(dev, **{**options, "batch": 128, "feature_dim": -1, **changes})


def taps(dev: cost.Device = AVX512, **changes: object) -> sympy.Expr:
    options = {"batch": 1, "channels": 144, "kept": 144 * 9, "height": 56, "width": 56}
    return cost.depthwise_cost(dev, **{**options, **changes})


@given(name=names, kept=st.integers(1, 8), batch=st.integers(1, 64), side=st.integers(1, 60))
def test_depthwise_cost_is_monotone(name: str, kept: int, batch: int, side: int) -> None:
    dev = cost.device(name)

    def time(taps_per_channel: int, b: int, h: int) -> float:
        return cost.evaluate(taps(dev, batch=b, kept=144 * taps_per_channel, height=h, width=side))

    assert dev.overhead_us < time(kept, batch, side) < time(kept + 1, batch, side)
    assert time(kept, batch, side) < time(kept, batch + 2, side)
    assert time(kept, batch, side) < time(kept, batch, side + dev.lanes)


@given(name=names, kept=st.integers(1, 700), rows=st.integers(1, 2000), feature_dim=st.sampled_from([1, -1]))
def test_tile_gemm_cost_is_monotone(name: str, kept: int, rows: int, feature_dim: int) -> None:
    dev = cost.device(name)

    def time(count: int, m: int) -> float:
        where = {"batch": 1, "pixels": m} if feature_dim == 1 else {"batch": m}
        return cost.evaluate(gemm(dev, counts=[count] * 12, feature_dim=feature_dim, **where))

    assert dev.overhead_us < time(kept, rows) <= time(kept + 16, rows)
    assert time(kept, rows) <= time(kept, rows + 64)


def test_costs_count_whole_tiles() -> None:
    blocks = [gemm(batch=b) for b in (4093, 4098, 4099)]
    assert blocks[0] == blocks[1] < blocks[2]  # 683 blocks of 6 rows, then one more
    steps = [gemm(k_step=16, counts=[c] * 12, batch=4096) for c in (177, 192, 193)]
    assert steps[0] == pytest.approx(float(steps[1])) and steps[1] < steps[2]
    pixels = [gemm(feature_dim=1, counts=[192] * 12, batch=1, pixels=p) for p in (3121, 3136, 3137)]
    assert pixels[0] == pytest.approx(float(pixels[1]), rel=0.01) and pixels[1] < pixels[2]
    narrow = replace(AVX512, l2_gbps=1e9, l3_gbps=1e9)
    planes = [taps(narrow, channels=c, kept=9 * c) for c in (143, 144, 145)]
    assert planes[0] == pytest.approx(float(planes[1])) and planes[1] < planes[2]


def test_the_last_tile_may_be_narrower() -> None:
    whole = gemm(counts=[768] * 12, columns=768, batch=4096)
    assert gemm(counts=[768] * 12, columns=705, batch=4096) < whole
    assert gemm(counts=[], columns=0, batch=4096) < whole
    free = gemm(counts=["k"] * 12, columns="n", batch=4096)
    assert cost.evaluate(free, k=768, n=768) == pytest.approx(float(whole))


@pytest.mark.parametrize(
    ("expr", "measured"),
    [
        (taps(kept=144 * 4), 70),
        (taps(channels=192, kept=192 * 9, height=28, width=28), 25),
        (taps(channels=240, kept=240 * 25, height=28, width=28), 85),
        (taps(channels=384, kept=384 * 2, height=14, width=14), 10),
        (gemm(counts=[384] * 12), 239),
        (gemm(), 120),
        (gemm(counts=[72] * 3, columns=24, granularity=8, out_features=24, in_features=144, batch=1, pixels=3136,
              feature_dim=1), 41),
        (cost.dense_linear_cost(AVX512, rows=128, in_features=768, out_features=768), 469),
        (cost.dense_linear_cost(AVX512, rows=1024, in_features=3072, out_features=768), 13117),
        (cost.dense_conv_cost(AVX512, batch=1, in_channels=96, out_channels=576, height=14, width=14), 78),
        (cost.dense_conv_cost(AVX512, batch=1, in_channels=144, out_channels=144, groups=144, height=56, width=56,
                              kernel=(3, 3)), 112),
    ],
)  # fmt: skip
def test_predictions_are_within_half_of_the_measurement(expr: sympy.Expr, measured: float) -> None:
    assert 0.6 < cost.evaluate(expr) / measured < 1.5


def test_a_symbolic_batch_stays_symbolic() -> None:
    for expr in (
        taps(batch="b"),
        gemm(batch="b"),
        cost.dense_linear_cost(AVX512, rows="b", in_features=64, out_features=64),
    ):
        assert {s.name for s in expr.free_symbols} == {"b"}
    assert cost.evaluate(gemm(batch="b"), b=128, unused=3) == pytest.approx(cost.evaluate(gemm()))
    own = sympy.Symbol("s0")
    assert cost.evaluate(gemm(batch=own * 2), s0=64) == pytest.approx(cost.evaluate(gemm()))
    with pytest.raises(ValueError, match=r"\['c'\].*\['b'\]"):
        cost.evaluate(gemm(batch="b"), c=1)


def test_symints_are_sizes() -> None:
    seen = []

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        sizes = [v for v in inputs if isinstance(v, torch.SymInt)]
        seen.append(gemm(batch=sizes[0]))
        return gm.forward

    model = torch.compile(lambda x: x + 1, backend=backend, dynamic=True)
    model(torch.ones(128, 3))
    (symbol,) = seen[0].free_symbols
    assert cost.evaluate(seen[0], **{symbol.name: 128}) == pytest.approx(cost.evaluate(gemm()))


def test_crossover_finds_where_the_winner_changes() -> None:
    sparse, dense = (
        gemm(counts=["k"] * 12, batch=128),
        cost.dense_linear_cost(AVX512, rows=128, in_features=768, out_features=768),
    )
    first = cost.crossover(sparse, dense, "k", high=2000)
    assert first is not None
    assert cost.evaluate(sparse, k=first - 1) < cost.evaluate(dense) <= cost.evaluate(sparse, k=first)
    assert 550 < first < 768  # the dense kernel is the better one, so some sparsity is needed
    assert cost.crossover(sparse, dense, cost.size("k"), high=300) is None
    assert cost.crossover(gemm(batch="b"), dense, "b") is not None
    assert cost.crossover(gemm(), dense, "b") is None
    with pytest.raises(ValueError, match=r"\['b'\].*'k'"):
        cost.crossover(gemm(batch="b"), dense, "k")


@given(batch=st.integers(1, 512))
def test_crossover_is_exact(batch: int) -> None:
    x = sympy.Symbol("x")
    assert cost.crossover(x, sympy.Integer(batch + 1), "x") == batch + 1
    assert cost.crossover(sympy.Integer(batch + 1), x, "x") == (batch + 2)


def match(kind: str, matrix_shape: tuple[int, int], x: tuple[int, ...], y: tuple[int, ...], **window: object) -> Match:
    """What the model reads of a match."""
    return SimpleNamespace(kind=kind, matrix_shape=matrix_shape, geometry=Geometry(x, y, **window))  # type: ignore


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar", "unheard of"])
def test_predict_ranks_sparse_before_dense(isa: str) -> None:
    depthwise = match("depthwise", (144, 25), (1, 144, 56, 56), (1, 144, 56, 56), kernel=(5, 5))
    pointwise = match("pointwise", (96, 576), (1, 576, 14, 14), (1, 96, 14, 14))
    linear = match("linear", (768, 768), (2, 64, 768), (2, 64, 768))
    cases = [(depthwise, dcp.plan_layers({"w": torch.rand(144, 25)}, {"w": 0.84})["w"])]
    for other in (pointwise, linear):
        e = {"w": torch.rand(other.matrix_shape)}
        cases.append((other, tile.plan_layers(e, {"w": 0.75}, granularity=8, columns=False)["w"]))
    for found, mask in cases:
        timing, full = cost.predict(found, mask, isa), cost.predict(found, None, isa)
        assert not timing.measured
        assert 0 < timing.sparse < full.sparse
        assert timing.dense == full.dense <= timing.dense_feature_major
        if isa == "avx512":
            assert timing.sparse < timing.dense


def test_devices_are_frozen_and_named() -> None:
    with pytest.raises(FrozenInstanceError):
        AVX512.lanes = 8  # type: ignore[misc]
    assert cost.device("avx2", threads=7).threads == 7
    with pytest.raises(ConfigError, match=r"avx51.*avx512, avx2, scalar.*'avx512'"):
        cost.device("avx51")


def test_sympy_is_imported_on_first_use(root: Path) -> None:
    tree = ast.parse((root / "fxprune" / "cost.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("sympy" in ast.dump(node) for node in top)
    assert isinstance(cost.size("b"), sympy.Symbol)
