"""The closed-form cost model: monotone, quantised, symbolic in the batch, and not far from what was measured."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError
from functools import partial
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
from fxprune.sparsity.tile_plan import width_in_groups

AVX512 = cost.device("avx512")
names = st.sampled_from(sorted(cost.DEVICES))


def gemm(dev: cost.Device = AVX512, **changes: object) -> cost.Cost:
    options = {"counts": [192] * 12, "columns": 768, "granularity": 64, "out_features": 768, "in_features": 768}
    options |= {"batch": 128, "feature_dim": -1, **changes}
    operator = "tile_gemm_rows" if options["feature_dim"] == -1 else "tile_gemm_pixels"
    return cost.price(dev, operator, cost.tile_gemm_terms(dev, **options))  # type: ignore[arg-type]


def taps(dev: cost.Device = AVX512, **changes: object) -> cost.Cost:
    options = {"batch": 1, "channels": 144, "kept": 144 * 9, "height": 56, "width": 56}
    return cost.price(dev, "depthwise_taps", cost.depthwise_terms(dev, **{**options, **changes}))  # type: ignore[arg-type]


def linear(rows: object, k: int, n: int) -> cost.Cost:
    return cost.price(AVX512, "linear", cost.dense_linear_terms(AVX512, rows=rows, in_features=k, out_features=n))  # type: ignore[arg-type]


@given(name=names, kept=st.integers(1, 8), batch=st.integers(1, 64), side=st.integers(1, 60), stride=st.sampled_from([1, 2]))
def test_depthwise_cost_is_monotone(name: str, kept: int, batch: int, side: int, stride: int) -> None:
    dev = cost.device(name)

    def time(taps_per_channel: int, b: int, h: int) -> float:
        return cost.evaluate(taps(dev, batch=b, kept=144 * taps_per_channel, height=h, width=side, stride=stride))

    assert dev.rates["depthwise_taps"]["call"] < time(kept, batch, side) < time(kept + 1, batch, side)
    assert time(kept, batch, side) < time(kept, batch + 1, side)
    assert time(kept, batch, side) < time(kept, batch, side + dev.lanes)


@given(name=names, kept=st.integers(1, 700), rows=st.integers(1, 2000), feature_dim=st.sampled_from([1, -1]))
def test_tile_gemm_cost_is_monotone(name: str, kept: int, rows: int, feature_dim: int) -> None:
    dev = cost.device(name)

    def time(count: int, m: int) -> float:
        where = {"batch": 1, "pixels": m} if feature_dim == 1 else {"batch": m}
        return cost.evaluate(gemm(dev, counts=[count] * 12, feature_dim=feature_dim, **where))

    assert 0 < time(kept, rows) < time(kept + 16, rows)
    assert time(kept, rows) <= time(kept, rows + 64)


def test_terms_count_whole_units() -> None:
    def rows(batch: int) -> dict[str, float]:
        options = {"counts": [192] * 12, "columns": 768, "granularity": 64, "out_features": 768, "in_features": 768}
        return cost.tile_gemm_terms(AVX512, batch=batch, feature_dim=-1, **options)  # type: ignore[arg-type]

    assert rows(4093)["products"] == rows(4098)["products"] < rows(4099)["products"]  # 683 blocks of 6 rows, then one more

    def pixels(m: int) -> dict[str, float]:
        options = {"counts": [9, 9], "columns": 12, "granularity": 8, "out_features": 12, "in_features": 16}
        return cost.tile_gemm_terms(AVX512, batch=1, pixels=m, **options)  # type: ignore[arg-type]

    assert pixels(35)["products"] == pixels(48)["products"] < pixels(51)["products"]
    assert pixels(48)["edges"] == 0 and pixels(49)["edges"] == pixels(50)["edges"] / 2 == 9 / 1000
    assert pixels(49)["products"] == pixels(48)["products"], "one pixel more than whole vectors starts no vector"
    wide, narrow = (cost.depthwise_terms(AVX512, batch=1, channels=2, kept=18, height=14, width=w) for w in (17, 16))
    assert narrow["taps"] == 18 * 14 / 2 / 1000, "one vector a row"
    assert wide["taps"] == 18 * 28 / 2 / 1000
    flat = cost.depthwise_terms(AVX512, batch=1, channels=2, kept=18, height=7, width=7)
    assert flat["taps"] == 18 * 4 / 2 / 1000, "49 pixels are four vectors of the flattened plane"


def test_the_last_tile_may_be_narrower() -> None:
    whole = gemm(counts=[768] * 12, columns=768, batch=4096)
    assert gemm(counts=[768] * 12, columns=705, batch=4096) < whole
    assert gemm(counts=[], columns=0, batch=4096) < whole
    free = gemm(counts=["k"] * 12, columns="n", batch=4096)
    assert cost.evaluate(free, k=768, n=768) == pytest.approx(float(whole))


@pytest.mark.parametrize(
    ("time", "measured"),
    [
        (taps(kept=144 * 4), 110),
        (taps(channels=192, kept=192 * 9, height=28, width=28), 70),
        (taps(channels=240, kept=240 * 25, height=28, width=28), 165),
        (taps(channels=480, kept=480 * 4, height=14, width=14), 33),
        (gemm(counts=[384] * 12), 240),
        (gemm(), 124),
        (gemm(counts=[72] * 3, columns=24, granularity=8, out_features=24, in_features=144, batch=1, pixels=3136,
              feature_dim=1), 60),
        (linear(128, 768, 768), 468),
        (linear(512, 3072, 768), 9500),
    ],
)  # fmt: skip
def test_predictions_are_within_half_of_the_measurement(time: cost.Cost, measured: float) -> None:
    assert 0.6 < cost.evaluate(time) / measured < 1.5


@given(batch=st.integers(1, 64), side=st.sampled_from([1, 7, 14, 17, 28]))
def test_numbers_and_symbols_agree(batch: int, side: int) -> None:
    """The closed expression holds at every batch what plain numbers give."""
    for kind, shape in (("depthwise", (96, 9)), ("pointwise", (40, 96)), ("conv", (40, 96 * 9)), ("linear", (48, 96))):
        x, y = ((batch, 96, side, side), (batch, shape[0], side, side)) if kind != "linear" else ((batch, 96), (batch, 48))
        found = match(kind, shape, x, y, kernel=(3, 3) if kind in ("depthwise", "conv") else (1, 1))
        for (operator, terms), (again, free) in zip(
            cost.work(AVX512, found, None), cost.work(AVX512, found, None, batch="b"), strict=True
        ):
            assert operator == again
            assert cost.evaluate(cost.price(AVX512, operator, free), b=batch) == pytest.approx(
                cost.price(AVX512, operator, terms)
            )


def test_a_symbolic_batch_stays_symbolic() -> None:
    for expr in (
        taps(batch="b"),
        gemm(batch="b"),
        linear("b", 64, 64),
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
        linear(128, 768, 768),
    )
    first = cost.crossover(sparse, dense, "k", high=2000)
    assert first is not None
    assert cost.evaluate(sparse, k=first - 1) < cost.evaluate(dense) <= cost.evaluate(sparse, k=first)
    assert 500 < first < 1200  # where nothing is skipped, the two kernels are about as fast
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


def match(
    kind: str,
    matrix_shape: tuple[int, int],
    x: tuple[int, ...],
    y: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    **window: object,
) -> Match:
    """What the model reads of a match."""
    geometry = Geometry(x, y, **window)  # type: ignore[arg-type]
    value = torch.empty(*matrix_shape, *[1] * (len(x) - 2 if len(x) == 4 else 0), dtype=dtype)
    sizes = {"matrix_shape": matrix_shape, "geometry": geometry, "value": value}
    return SimpleNamespace(kind=kind, tile_width=partial(width_in_groups, matrix_shape[0], geometry.groups), **sizes)  # type: ignore


@pytest.mark.parametrize("granularity", [8, 64])
def test_a_vector_is_one_row(granularity: int) -> None:
    layer = tile.keep_all((48, 96), granularity)
    vector, row = (cost.work(AVX512, match("linear", (48, 96), (*b, 96), (*b, 48)), layer) for b in ((), (1,)))
    assert vector == row
    assert all(cost.price(AVX512, *item) > 0 for item in vector)


HALVES = (
    ("depthwise", (144, 9), (1, 144, 56, 56), (1, 144, 56, 56), (3, 3)),
    ("pointwise", (96, 576), (1, 576, 14, 14), (1, 96, 14, 14), (1, 1)),
    ("linear", (768, 768), (128, 768), (128, 768), (1, 1)),
    ("linear", (768, 768), (4, 768, 1, 1), (4, 768, 1, 1), (1, 1)),
)


@pytest.mark.parametrize(("kind", "weight", "x", "y", "kernel"), HALVES)
def test_bfloat16_has_rates_of_its_own(
    kind: str, weight: tuple[int, int], x: tuple[int, ...], y: tuple[int, ...], kernel: tuple[int, int]
) -> None:
    found, float32 = (match(kind, weight, x, y, dtype, kernel=kernel) for dtype in (torch.bfloat16, torch.float32))
    operators = [name for name, _ in cost.work(AVX512, found, None)]
    assert operators == [f"{name}_bf16" for name, _ in cost.work(AVX512, float32, None)]
    assert set(operators) <= set(AVX512.rates)
    plan = dcp.plan_layers if kind == "depthwise" else tile.plan_layers
    mask = plan({"w": torch.rand(weight)}, {"w": 0.75})["w"]
    timing, full = cost.predict(found, mask, "amx"), cost.predict(found, None, "amx")
    assert 0 < timing.sparse < full.sparse and timing.sparse < timing.dense
    for symbolic, numeric in zip(cost.work(AVX512, found, mask, "B"), cost.work(AVX512, found, mask, 7), strict=True):
        assert cost.evaluate(cost.price(AVX512, *symbolic), B=7) == pytest.approx(cost.price(AVX512, *numeric))


def test_larger_convolutions_in_bfloat16_have_rates_of_their_own() -> None:
    half = match("conv", (96, 64 * 9), (1, 64, 28, 28), (1, 96, 28, 28), torch.bfloat16, kernel=(3, 3))
    (name, ours), (nchw, _), (nhwc, _) = cost.work(AVX512, half, None)
    assert (name, nchw, nhwc) == ("tile_conv_bf16", "conv_nchw_bf16", "conv_nhwc_bf16")
    assert ours["copied"] == pytest.approx(2 * 64 * 28 * 28 / 1e6)  # bytes of the planes
    assert ours["products"] == pytest.approx(25 * 3 * 18 * 2 / AVX512.threads / 1e3)  # blocks, tiles, depth, strips


def test_bfloat16_blocks_are_whole() -> None:
    def blocks(batch: int, pixels: int, kept: int, feature_dim: int) -> float:
        sizes = {"columns": 40, "granularity": 32, "out_features": 40, "in_features": 96}
        return cost.tile_gemm_bf16_terms(  # type: ignore[arg-type]
            AVX512, counts=[kept, kept], batch=batch, pixels=pixels, feature_dim=feature_dim, **sizes
        )["products"]

    one = 3 / AVX512.threads / 1e3  # strips of 16 of tiles 32 and 8 wide
    assert blocks(1, 1, 1, 1) == blocks(1, 32, 32, 1) == blocks(32, 1, 32, -1) == pytest.approx(one)
    assert (
        blocks(1, 33, 32, 1) == blocks(2, 1, 1, 1) == blocks(33, 1, 1, -1) == blocks(1, 1, 33, 1) == pytest.approx(2 * one)
    )


def test_no_rows_take_no_negative_time() -> None:
    empty = cost.dense_linear_terms(AVX512, rows=0, in_features=96, out_features=48)
    assert all(amount >= 0 for amount in empty.values())


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar", "unheard of"])
def test_predict_ranks_sparse_before_dense(isa: str) -> None:
    slower = {name: {k: 2 * v for k, v in rates.items()} for name, rates in cost.device("avx512").rates.items()}
    slower = {
        name: rates
        for name, rates in slower.items()
        if name in ("depthwise_taps", "tile_gemm_pixels", "tile_gemm_rows", "tile_conv")
    }
    depthwise = match("depthwise", (144, 25), (1, 144, 56, 56), (1, 144, 56, 56), kernel=(5, 5))
    pointwise = match("pointwise", (96, 576), (1, 576, 14, 14), (1, 96, 14, 14))
    linear = match("linear", (768, 768), (2, 64, 768), (2, 64, 768))
    conv = match("conv", (96, 64 * 9), (1, 64, 28, 28), (1, 96, 28, 28), kernel=(3, 3))
    cases = [(depthwise, dcp.plan_layers({"w": torch.rand(144, 25)}, {"w": 0.84})["w"])]
    for other in (pointwise, conv, linear):
        e = {"w": torch.rand(other.matrix_shape)}
        cases.append((other, tile.plan_layers(e, {"w": 0.75}, granularity=8, columns=False)["w"]))
    for found, mask in cases:
        timing, full = cost.predict(found, mask, isa), cost.predict(found, None, isa)
        assert not timing.measured
        assert 0 < timing.sparse < full.sparse
        assert timing.dense == full.dense <= timing.dense_feature_major
        if isa == "avx512":
            assert timing.sparse < timing.dense
        assert cost.predict(found, mask, isa, slower).sparse == pytest.approx(2 * timing.sparse)
        assert cost.predict(found, mask, isa, slower).dense == pytest.approx(timing.dense)


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
