"""The CUDA kernels of tile_gemm on the simulator: mma.sync, wgmma and FFMA, bit for bit on integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda.activations import EXACT, SMOOTH
from tests.cuda.simulator import ELEMENTS, SEEDS, Fault, Plant, shifted, tile_gemm, tile_pack, transpose
from tests.integers import generator, integers, tiles

HALVES = (torch.float16, torch.bfloat16)


def check(
    shape: tuple[int, int, int], n: int, g: int, *, dtype: torch.dtype = torch.bfloat16, keep: float = 0.5,
    columns: float = 1.0, extras: str = "b", activation: str = "none", hopper: bool = False, seed: int = 0, shift: int = 0,
    empty_tile: bool = False, processors: int = 3, tf32: bool = False, plant: Plant = Plant.NONE,
) -> None:  # fmt: skip
    """Compare one run with dense torch in fp64. ``extras``: b bias, r residual, g gate."""
    gen = generator(seed, n, g, *shape)
    batch, k, m = shape
    weight, (values, *structure) = tiles(gen, n, k, g, keep, columns, empty_tile)
    x = integers(gen, *shape)
    bias = integers(gen, n) if "b" in extras else None
    residual = integers(gen, batch, n, m) if "r" in extras else None
    gate = integers(gen, batch, k) if "g" in extras else None
    y = weight.double() @ (x if gate is None else x * gate[:, :, None]).double()
    if bias is not None:
        y = y + bias[:, None]
    if residual is not None:
        y = y + residual
    expected = (EXACT | SMOOTH)[activation](y.float()).to(dtype)
    given_x, given_residual = (None if t is None else shifted(t.to(dtype), shift) for t in (x, residual))
    assert given_x is not None
    operands = [t if t is None else t.to(dtype) for t in (bias, given_residual, gate)]
    got = tile_gemm(
        given_x, values.to(dtype), *structure, *operands, n, g, activation,
        hopper=hopper, seed=seed, shift=shift, processors=processors, tf32=tf32, plant=plant,
    )  # fmt: skip
    case = f"x {shape} n {n} g {g} {dtype} keep {keep} columns {columns} {extras} {activation} seed {seed}"
    case += f" hopper {hopper} tf32 {tf32}"
    if activation in EXACT:
        assert torch.equal(got, expected), case
    else:
        torch.testing.assert_close(got, expected, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("g", (8, 64, 128))
def test_tile_widths(g: int, dtype: torch.dtype) -> None:
    for number, (shape, n) in enumerate((((1, 40, 8), 8), ((1, 100, 136), 200), ((2, 70, 40), 130))):
        check(shape, n, g, dtype=dtype, activation="relu", seed=SEEDS[number])


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    for m in (1, 7, 49):
        check((2, 33, m), 70, 64, dtype=dtype, extras="br")
    check((1, 33, 64), 70, 64, dtype=dtype, extras="br", shift=1)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("g", (1, 2, 5))
def test_tiles_of_few_features(g: int, dtype: torch.dtype) -> None:
    """Single elements, with many tokens and with fewer than a block has threads; more rows than an image's block."""
    check((2, 140, 7), 9, g, dtype=dtype, keep=0.7, extras="br", activation="relu6", seed=1)
    check((1, 20, 1040), 5, g, dtype=dtype, keep=0.3, extras="bg", columns=0.8)
    check((1, 20, 64), 5, g, dtype=dtype, shift=1, empty_tile=True, seed=2)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("extras", ("", "r", "g", "brg"))
def test_epilogues(extras: str, dtype: torch.dtype) -> None:
    check((2, 40, 24), 72, 64, dtype=dtype, extras=extras, activation="relu6")


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_features_without_a_tile(dtype: torch.dtype) -> None:
    for columns in (0.0, 0.3, 0.9):
        check((2, 20, 16), 150, 64, dtype=dtype, columns=columns, extras="br", activation="relu")
        check((1, 20, 16), 300, 128, dtype=dtype, columns=columns, hopper=True, activation="relu")


@pytest.mark.parametrize("hopper", (False, True))
def test_tiles_without_rows(hopper: bool) -> None:
    for dtype in ELEMENTS:
        check((1, 70, 16), 256, 128, dtype=dtype, empty_tile=True, hopper=hopper)
        check((1, 70, 16), 128, 128, dtype=dtype, keep=0.0, hopper=hopper)


@pytest.mark.parametrize("activation", (*EXACT, *SMOOTH))
def test_activations(activation: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check((1, 12, 16), 64, 64, dtype=dtype, keep=0.2, activation=activation)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("g", (128, 256))
def test_wgmma(g: int, seed: int) -> None:
    check((1, 70, 136), 256, g, dtype=torch.bfloat16, extras="br", hopper=True, seed=seed)
    check((1, 64, 128), g, g, dtype=torch.float16, keep=1.0, hopper=True, seed=seed)


def test_wgmma_longer_than_its_ring() -> None:
    check((1, 800, 128), 128, 128, keep=0.9, hopper=True, processors=1)


def test_wgmma_many_items_per_block() -> None:
    check((2, 130, 200), 384, 128, keep=0.6, extras="b", hopper=True, processors=2, seed=2)


# with so many tokens, K of at most 128 stays in shared memory; rows of 16-byte copies and without, parts of a tile
RESIDENT = (((1, 40, 840), 70, 64), ((13, 100, 49), 130, 128), ((2, 128, 400), 200, 256), ((3, 17, 263), 20, 8))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", RESIDENT, ids=str)
def test_weights_that_stay(case: tuple[tuple[int, int, int], int, int], dtype: torch.dtype) -> None:
    shape, n, g = case
    check(shape, n, g, dtype=dtype, keep=0.6, extras="br", activation="relu6", seed=n % 3)
    check(shape, n, g, dtype=dtype, keep=1.0, extras="bg", hopper=True, processors=1, columns=0.8)
    check(shape, n, g, dtype=dtype, extras="", empty_tile=True, shift=g == 64)


@pytest.mark.parametrize("plant", (Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.LANE_MAP, Plant.SWIZZLE), ids=lambda p: p.name)
def test_mistakes_in_weights_that_stay_are_caught(plant: Plant) -> None:
    for seed in SEEDS:
        gen = generator(9)
        weight, (values, *structure) = tiles(gen, 64, 100, 64, 0.9, 1.0)
        x = integers(gen, 1, 100, 1600)
        arguments = (x.bfloat16(), values.bfloat16(), *structure, None, None, None, 64, 64)
        expected = (weight @ x).bfloat16()
        assert torch.equal(tile_gemm(*arguments, processors=1, seed=seed), expected)
        try:
            got = tile_gemm(*arguments, processors=1, seed=seed, plant=plant)
        except Fault:
            continue
        assert not torch.equal(got, expected), f"{plant.name} passed with seed {seed}"


def test_special_values_of_dropped_rows_do_not_spread() -> None:
    for dtype in ELEMENTS:
        for hopper in (False, True):
            gen = generator(3)
            _, (values, index, ptr, columns) = tiles(gen, 128, 20, 128, 0.5, 1.0)
            x = integers(gen, 1, 20, 16)
            dropped = torch.tensor([k for k in range(20) if k not in index.tolist()])
            clean = tile_gemm(x.to(dtype), values.to(dtype), index, ptr, columns, None, None, None, 128, 128, hopper=hopper)
            x[:, dropped[::2]], x[:, dropped[1::2]] = float("nan"), float("inf")
            dirty = tile_gemm(x.to(dtype), values.to(dtype), index, ptr, columns, None, None, None, 128, 128, hopper=hopper)
            assert torch.equal(clean, dirty)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_transpose(dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (1, 40), (33, 31), (64, 70)):
        x = torch.arange(rows * columns).view(rows, columns).to(dtype)
        assert torch.equal(transpose(x, seed=2), x.t())


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_pack_and_unpack(dtype: torch.dtype) -> None:
    for n, k, g in ((8, 6, 4), (70, 33, 64), (5, 12, 64)):
        weight, (values, *structure) = tiles(generator(n), n, k, g, 0.5, 0.8)
        packed = tile_pack(weight.to(dtype), *structure, g, len(values))
        assert torch.equal(packed, values.to(dtype))
        assert torch.equal(tile_pack(packed, *structure, g, (n, k)), weight.to(dtype))


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 90)), draw(st.integers(1, 70)))
    hopper = draw(st.booleans())
    check(
        shape, draw(st.integers(1, 150)), draw(st.sampled_from((1, 24, 64, 100, 128))), hopper=hopper,
        dtype=draw(st.sampled_from(HALVES if hopper else ELEMENTS)), keep=draw(st.sampled_from((0.1, 0.6, 1.0))),
        columns=draw(st.sampled_from((0.5, 1.0))), extras=draw(st.sampled_from(("", "b", "br", "bg"))),
        seed=draw(st.sampled_from(SEEDS)), shift=draw(st.sampled_from((0, 0, 1))),
    )  # fmt: skip
