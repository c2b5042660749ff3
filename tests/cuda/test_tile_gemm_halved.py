"""tile_gemm on weights kept two in four (TVW) through mma.sp on the simulator, and the image it reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops import cuda_nm_image
from fxprune.sparsity.elements import keep_groups
from tests.cuda.activations import EXACT
from tests.cuda.simulator import SEEDS, Fault, Plant, shifted, tile_gemm
from tests.integers import generator, integers, tiles

HALVES = (torch.float16, torch.bfloat16)


def halved(values: Tensor, tile_ptr: Tensor, g: int, kept: int, gen: torch.Generator) -> Tensor:
    """Set all but two of every four rows of a feature to zero, at random."""
    parts, at = [], 0
    for t, rows in enumerate((tile_ptr[1:] - tile_ptr[:-1]).tolist()):
        width = min(g, kept - t * g)
        block = values[at : at + rows * width].view(rows, width)
        at += rows * width
        keep = keep_groups(torch.rand(width, rows, generator=gen), 2, 4).t()
        parts.append((block * keep).flatten())
    return torch.cat([values[:0], *parts])


def case(
    shape: tuple[int, int, int], n: int, g: int, keep: float, columns: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Return (x, values, structure, product in float64)."""
    gen = generator(n, g, *shape)
    _, (values, *structure) = tiles(gen, n, shape[1], g, keep, columns)
    index, tile_ptr, kept = structure
    values = halved(values, tile_ptr, g, len(kept), gen)
    x, weight, at = integers(gen, *shape), torch.zeros(n, shape[1]), 0
    for t, rows in enumerate((tile_ptr[1:] - tile_ptr[:-1]).tolist()):
        members, own = kept[t * g : (t + 1) * g].long(), index[tile_ptr[t] : tile_ptr[t + 1]].long()
        block = values[at : at + rows * len(members)].view(rows, len(members))
        weight[members[:, None], own[None, :]] = block.t()
        at += block.numel()
    return x, values, structure, weight.double() @ x.double()


def check(
    shape: tuple[int, int, int], n: int, g: int, dtype: torch.dtype, *, keep: float = 0.6, columns: float = 1.0,
    extras: str = "b", activation: str = "none", seed: int = 0, shift: int = 0,
) -> None:  # fmt: skip
    gen = generator(seed, n)
    x, values, structure, y = case(shape, n, g, keep, columns)
    bias = integers(gen, n) if "b" in extras else None
    residual = integers(gen, shape[0], n, shape[2]) if "r" in extras else None
    y = y if bias is None else y + bias[:, None]
    y = y if residual is None else y + residual
    operands = [t if t is None else t.to(dtype) for t in (bias, residual, None)]
    got = tile_gemm(
        shifted(x.to(dtype), shift), values.to(dtype), *structure, *operands, n, g, activation,
        seed=seed, shift=shift, halved=True, hopper=True,
    )  # fmt: skip
    assert torch.equal(got, EXACT[activation](y.float()).to(dtype)), (shape, n, g, dtype, keep, extras, seed)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("g", (1, 8, 64, 128, 200))
def test_tile_widths(g: int, dtype: torch.dtype) -> None:
    for number, (shape, n) in enumerate((((1, 40, 8), 8), ((1, 200, 136), 200), ((2, 70, 40), 130))):
        check(shape, n, g, dtype, activation="relu", seed=SEEDS[number])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_edges(dtype: torch.dtype) -> None:
    for m in (1, 7, 49):
        check((2, 33, m), 70, 64, dtype, extras="br")
    check((1, 33, 64), 70, 64, dtype, shift=1)
    check((2, 90, 24), 72, 64, dtype, columns=0.6, extras="br", activation="relu6")
    check((1, 300, 64), 128, 128, dtype, keep=1.0)


def test_a_gate() -> None:
    x, values, structure, _ = case((2, 40, 24), 72, 64, 0.6)
    gate = integers(generator(7), 2, 40)
    plain = [t.half() for t in (x * gate[:, :, None], values)]
    expected = tile_gemm(*plain, *structure, None, None, None, 72, 64, halved=True)
    got = tile_gemm(x.half(), values.half(), *structure, None, None, gate.half(), 72, 64, halved=True)
    assert torch.equal(got, expected)


def read(image: Tensor, tile_ptr: Tensor, panels: int, t: int) -> Tensor:
    """Return (K rows, features) of a tile from the bytes that lanes of mma.sp.m16n8k32 get, by the PTX manual.

    The metadata of 32 k comes from lanes 0 and 1 of each four for the first 32 of a stage and from lanes 2 and 3 for the
    rest; a lane's low half is for row lane // 4 of 16, its high half for the row 8 below; two bits an element, low first.
    """
    tiles = len(tile_ptr) - 1
    start = -(-(2 * tiles + 1) * 4 // 1024) * 1024
    first = image[: 4 * (2 * tiles + 1)].view(torch.int32)[tiles:].tolist()
    size = 64 * 64 + 64 * 8
    dense = torch.zeros((first[t + 1] - first[t]) * 64, panels * 64, dtype=torch.int16)
    for block in range(first[t], first[t + 1]):
        for panel in range(panels):
            data = image[start + (block * panels + panel) * size :][:size]
            elements, words = data[:4096].view(torch.int16).view(64, 4, 8), data[4096:].view(torch.int32).view(4, 32)
            for f in range(64):
                row = torch.cat([elements[f, c ^ (f // 2 % 4)] for c in range(4)])
                for four in range(16):
                    lane = f % 8 * 4 + four // 8 * 2 + four % 8 // 4
                    bits = int(words[f // 16, lane]) >> (16 * (f % 16 // 8) + four % 4 * 4) & 15
                    low, high = bits & 3, bits >> 2
                    assert low < high
                    k = (block - first[t]) * 64 + four * 4
                    dense[k + low, panel * 64 + f], dense[k + high, panel * 64 + f] = row[2 * four], row[2 * four + 1]
    return dense


@settings(max_examples=8)
@given(n=st.integers(1, 150), k=st.integers(1, 150), g=st.sampled_from((8, 64, 100, 128)))
def test_image(n: int, k: int, g: int) -> None:
    """Against a reading of its own: every element is where the instruction looks for it."""
    _, values, (_, tile_ptr, columns), _ = case((1, k, 1), n, g, 0.7, 0.9)
    g, at = min(g, max(len(columns), 1)), 0
    image = cuda_nm_image.build(values.half(), tile_ptr, g, len(columns))
    assert image is not None and image.dtype == torch.int8
    for t, rows in enumerate((tile_ptr[1:] - tile_ptr[:-1]).tolist()):
        width = min(g, len(columns) - t * g)
        dense = read(image.view(torch.uint8), tile_ptr, -(-g // 64), t).view(torch.float16)
        assert torch.equal(dense[:rows, :width], values[at : at + rows * width].half().view(rows, width))
        assert not dense[rows:].any() and not dense[:, width:].any()
        at += rows * width


def test_more_than_two_in_four_have_no_image() -> None:
    values, tile_ptr = torch.ones(8 * 3, dtype=torch.float16), torch.tensor([0, 8], dtype=torch.int32)
    assert cuda_nm_image.build(values, tile_ptr, 3, 3) is None
    values.view(2, 4, 3)[:, :2] = 0
    assert cuda_nm_image.build(values, tile_ptr, 3, 3) is not None
    values.view(2, 4, 3)[1, 1, 2] = 5
    assert cuda_nm_image.build(values, tile_ptr, 3, 3) is None


PLANTS = (Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.LANE_MAP, Plant.SWIZZLE, Plant.ACCUMULATOR_ROW, Plant.PLACES)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: p.name)
def test_mistakes_are_caught(plant: Plant) -> None:
    """Every order of threads finds the mistake, as a fault or as a wrong result."""
    x, values, structure, y = case((1, 400, 72), 128, 128, 0.9)
    for seed in SEEDS:
        try:
            got = tile_gemm(
                x.bfloat16(), values.bfloat16(), *structure, None, None, None, 128, 128, halved=True, seed=seed, plant=plant
            )
        except Fault:
            continue
        assert not torch.equal(got, y.bfloat16()), f"{plant.name} passed with seed {seed}"


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 150)), draw(st.integers(1, 140)))
    n, g = draw(st.integers(1, 150)), draw(st.sampled_from((2, 8, 64, 100, 128)))
    check(
        shape, n, g, draw(st.sampled_from(HALVES)), keep=draw(st.sampled_from((0.0, 0.3, 1.0))),
        columns=draw(st.sampled_from((0.5, 1.0))), extras=draw(st.sampled_from(("", "br"))),
        seed=draw(st.sampled_from(SEEDS)), shift=draw(st.sampled_from((0, 0, 1))),
    )  # fmt: skip
