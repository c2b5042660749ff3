"""The product of a left operand pruned to 2:4 on the simulator, bit for bit on integers, and the packing it reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops.nm_prune import OPERATOR
from tests.cuda.simulator import SEEDS, Fault, Plant, nm_gemm, shifted
from tests.integers import generator, integers

HALVES = (torch.float16, torch.bfloat16)


def pruned(x: Tensor) -> Tensor:
    y: Tensor = OPERATOR.reference(x, None, 2, 4, -1, 1, "magnitude", 0)
    return y


def case(rows: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x, weight, product)."""
    gen = generator(rows, k, n)
    x, weight = integers(gen, rows, k), integers(gen, k, n)
    return x, weight, pruned(x) @ weight


def check(rows: int, k: int, n: int, dtype: torch.dtype = torch.bfloat16, shift: int = 0, seed: int = 0) -> None:
    x, weight, y = case(rows, k, n)
    got, *_ = nm_gemm(*(shifted(t.to(dtype), shift) for t in (x, weight)), seed=seed, shift=shift)
    assert torch.equal(got, y.to(dtype)), (rows, k, n, dtype, shift, seed)


def unpacked(packed: Tensor, places: Tensor, k: int) -> Tensor:
    """What the kernel multiplies, read as the PTX manual describes the operands of mma.sp.m16n8k32.

    Of 16 rows and 64 k, the instruction for k 0..31 takes places from lanes 0 and 1 of each four, that for k 32..63 from
    lanes 2 and 3; a lane's register holds those of 16 k for row lane // 4 in its low half, and for the row 8 below in its
    high half.
    """
    rows, blocks = packed.shape[0], packed.shape[1] // 32
    words = places.view(-(-rows // 16), blocks, 32, 2)
    dense = torch.zeros(rows, blocks * 64, dtype=packed.dtype)
    for row in range(rows):
        for group in range(blocks * 16):  # of four k
            block, within = divmod(group, 16)
            instruction, rest = divmod(within, 8)
            lane = row % 8 * 4 + 2 * instruction + rest // 4
            bits = int(words[row // 16, block, lane, row % 16 // 8]) >> (rest % 4 * 4) & 15
            low, high = bits & 3, bits >> 2
            assert low < high
            dense[row, 4 * group + low] = packed[row, 2 * group]
            dense[row, 4 * group + high] = packed[row, 2 * group + 1]
    return dense[:, :k]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products(dtype: torch.dtype) -> None:
    for number, shape in enumerate(((1, 4, 8), (17, 64, 40), (130, 200, 136), (40, 96, 130), (16, 400, 16))):
        check(*shape, dtype, seed=SEEDS[number % 3])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    for k in (1, 2, 3, 5, 63, 70):
        check(9, k, 13, dtype)
    check(20, 64, 64, dtype, shift=1)


@pytest.mark.parametrize("k", (64, 70))
def test_packing(k: int) -> None:
    """Against a derivation of its own, for every pattern of zeros in a group and for ties."""
    gen = generator(k)
    x = torch.randint(-2, 3, (37, k), generator=gen).bfloat16()
    _, packed, places = nm_gemm(x, torch.zeros(k, 8, dtype=x.dtype))
    assert torch.equal(unpacked(packed, places, k), pruned(x))
    assert packed.shape == (37, 64 * -(-k // 64) // 2)


def test_what_is_pruned_already_stays() -> None:
    x, weight, y = case(33, 128, 24)
    sparse = pruned(x)
    assert torch.equal(nm_gemm(sparse.half(), weight.half())[0], y.half())
    for lone in range(4):  # one kept element in each group
        one = torch.zeros(16, 64)
        one[:, lone::4] = x[:16, :64][:, lone::4]
        assert torch.equal(nm_gemm(one.half(), weight[:64].half())[0], (one @ weight[:64]).half()), lone


def test_special_values_stay_and_do_not_spread() -> None:
    x, weight, _ = case(20, 64, 16)
    x[3, 5], x[7, 9] = float("nan"), float("inf")
    weight = weight.abs() + 1
    got = nm_gemm(x.bfloat16(), weight.bfloat16())[0]
    assert got[3].isnan().all() and got[7].isinf().all()
    others = [row for row in range(20) if row not in (3, 7)]
    assert torch.equal(got[others], (pruned(x) @ weight).bfloat16()[others])


PLANTS = (Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.LANE_MAP, Plant.SWIZZLE, Plant.ACCUMULATOR_ROW, Plant.PLACES)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: p.name)
def test_mistakes_are_caught(plant: Plant) -> None:
    """Every order of threads finds the mistake, as a fault or as a wrong result."""
    x, weight, y = case(40, 400, 72)
    for seed in SEEDS:
        try:
            got, *_ = nm_gemm(x.bfloat16(), weight.bfloat16(), seed=seed, plant=plant)
        except Fault:
            continue
        assert not torch.equal(got, y.bfloat16()), f"{plant.name} passed with seed {seed}"


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 140)), draw(st.integers(1, 150)), draw(st.integers(1, 140)))
    shift, seed = draw(st.sampled_from((0, 0, 1))), draw(st.sampled_from(SEEDS))
    check(*shape, draw(st.sampled_from(HALVES)), shift, seed)
