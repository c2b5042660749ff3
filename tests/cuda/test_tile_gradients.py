"""The gradients of tile_gemm and tile_conv on the simulator, bit for bit on integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda.simulator import ELEMENTS, SEEDS, Fault, Plant, shifted, tile_gradient
from tests.cuda.test_tile_conv import grouped
from tests.integers import generator, integers, tiles

WEIGHT_PLANTS = (Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.LANE_MAP, Plant.ACCUMULATOR_ROW)
# in the weight's gradient chunks lie along the sum: swapped in both operands, they change nothing
PLANTS = [*(("w", plant) for plant in WEIGHT_PLANTS), *(("x", plant) for plant in (*WEIGHT_PLANTS, Plant.SWIZZLE))]


def packed_of(dense: Tensor, structure: list[Tensor], g: int) -> Tensor:
    """dense: (N, K) -> packed values, tile after tile."""
    index, ptr, columns = structure
    parts = [torch.zeros(0, dtype=dense.dtype)]
    for t in range(len(ptr) - 1):
        rows = index[int(ptr[t]) : int(ptr[t + 1])].long()
        parts.append(dense[columns[t * g : (t + 1) * g].long()][:, rows].t().flatten())
    return torch.cat(parts)


@dataclasses.dataclass
class Case:
    """One convolution or GEMM, and its gradients in fp64."""

    grad: Tensor
    x: Tensor
    packed: list[Tensor]  # values, index, tile_ptr, columns
    g: int
    dx: Tensor
    dw: Tensor  # packed
    window: tuple[Any, ...] = ()  # kernel, stride, padding, dilation, groups


def gemm_case(
    shape: tuple[int, int, int], n: int, g: int, *, keep: float = 0.4, columns: float = 1.0, empty_tile: bool = False
) -> Case:
    """shape: of x, (B, K, M)."""
    gen = generator(n, g, *shape)
    weight, packed = tiles(gen, n, shape[1], g, keep, columns, empty_tile)
    x, grad = integers(gen, *shape).double(), integers(gen, shape[0], n, shape[2]).double()
    dense = (grad @ x.transpose(1, 2)).sum(0)
    return Case(grad, x, packed, g, weight.t().double() @ grad, packed_of(dense, packed[1:], g))


def conv_case(
    shape: tuple[int, int, int, int], n: int, g: int, kernel: tuple[int, int], stride: int = 1, padding: int = 0,
    dilation: int = 1, groups: int = 1, *, keep: float = 0.4, columns: float = 1.0,
) -> Case:  # fmt: skip
    """shape: of x, (B, C, H, W)."""
    k = shape[1] // groups * kernel[0] * kernel[1]
    weight, packed = grouped(n, k, g, groups, keep, columns)
    window = ([*kernel], [stride] * 2, [padding] * 2, [dilation] * 2)
    size = [(shape[2 + i] + 2 * padding - dilation * (kernel[i] - 1) - 1) // stride + 1 for i in (0, 1)]
    gen = generator(*shape, n, g, *kernel)
    x, grad = integers(gen, *shape).double(), integers(gen, shape[0], n, *size).double()
    dense = weight.view(n, shape[1] // groups, *kernel).double()
    backward = torch.ops.aten.convolution_backward.default
    dx, dw, _ = backward(grad, x, dense, None, *window[1:], False, [0, 0], groups, [True, True, False])
    return Case(grad, x, packed, g, dx, packed_of(dw.reshape(n, k), packed[1:], g), (*window, groups))


def check(case: Case, dtype: torch.dtype = torch.bfloat16, which: str = "xw", *, shift: int = 0, **options: Any) -> None:
    """Run one gradient or both on the simulator. which: "x", "w" or both."""
    values, *structure = case.packed
    shape, window = tuple(case.x.shape), (case.window[:4], case.window[4]) if case.window else ()
    grad, x = (shifted(t.to(dtype), shift) for t in (case.grad, case.x))
    for name, operand, exact in (("x", values.to(dtype), case.dx), ("w", x, case.dw)):
        if name in which:
            call = (grad, operand, *structure, case.g, shape, *window)
            got = tile_gradient(*call, of_input=name == "x", shift=shift, **options)
            assert torch.equal(got, exact.float().to(dtype)), f"d{name} {shape} g {case.g} {dtype} {window} {options}"


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("g", (8, 64, 128))
def test_tile_widths(g: int, dtype: torch.dtype) -> None:
    check(gemm_case((1, 40, 8), 8, g), dtype)
    check(gemm_case((1, 100, 136), 200, g), dtype, seed=1)
    check(gemm_case((2, 70, 40), 130, g, columns=0.8), dtype, seed=2)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    for m in (1, 7, 49):
        check(gemm_case((2, 33, m), 70, 64), dtype)
    check(gemm_case((1, 33, 64), 70, 64), dtype, shift=1)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_nothing_and_everything_kept(dtype: torch.dtype) -> None:
    for case in ({"keep": 0.0}, {"keep": 1.0}, {"columns": 0.0}, {"empty_tile": True}):
        check(gemm_case((1, 70, 16), 128, 64, **case), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_sums_over_many_tokens_are_cut_in_parts(dtype: torch.dtype) -> None:
    check(gemm_case((2, 20, 520), 40, 64, keep=0.3), dtype, "w")
    check(gemm_case((9, 20, 70), 40, 64, keep=0.3), dtype, "w", seed=2)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_windows(dtype: torch.dtype) -> None:
    check(conv_case((2, 5, 9, 11), 40, 8, (3, 3), 1, 1), dtype)
    check(conv_case((1, 70, 5, 9), 70, 64, (3, 3), 2, 1), dtype, seed=1)
    check(conv_case((1, 3, 10, 12), 130, 128, (5, 2), 1, 2), dtype, seed=2)
    check(conv_case((1, 4, 12, 12), 20, 64, (3, 3), 1, 2, 2), dtype)
    check(conv_case((1, 2, 16, 7), 16, 16, (7, 7), 3, 3, columns=0.7), dtype)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_groups(dtype: torch.dtype) -> None:
    check(conv_case((2, 8, 6, 10), 16, 4, (3, 3), 1, 1, groups=2), dtype)
    check(conv_case((1, 9, 7, 5), 9, 3, (3, 2), 1, 1, groups=3), dtype, seed=1)


@pytest.mark.parametrize(("which", "plant"), PLANTS, ids=lambda value: value.name if isinstance(value, Plant) else value)
def test_mistakes_are_caught(which: str, plant: Plant) -> None:
    """Every order of threads finds the mistake, as a fault or as a wrong result."""
    cases = [(gemm_case((1, 100, 328), 256, 128, keep=0.9), torch.bfloat16)]
    if plant in (Plant.SHORT_WAIT, Plant.NO_BARRIER):
        cases.append((gemm_case((1, 70, 96), 128, 64, keep=0.9), torch.float32))
    for case, dtype in cases:
        for seed in SEEDS:
            check(case, dtype, which, seed=seed)
            with pytest.raises((Fault, AssertionError)):
                check(case, dtype, which, seed=seed, plant=plant)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    case = gemm_case(
        (draw(st.integers(1, 3)), draw(st.integers(1, 90)), draw(st.integers(1, 70))), draw(st.integers(1, 150)),
        draw(st.sampled_from((1, 24, 64, 100, 128))), keep=draw(st.sampled_from((0.1, 0.6, 1.0))),
        columns=draw(st.sampled_from((0.5, 1.0))),
    )  # fmt: skip
    dtype, shift = draw(st.sampled_from(ELEMENTS)), draw(st.sampled_from((0, 0, 1)))
    check(case, dtype, seed=draw(st.sampled_from(SEEDS)), shift=shift)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_window(data: st.DataObject) -> None:
    draw = data.draw
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    groups, dilation = draw(st.sampled_from((1, 1, 2))), draw(st.integers(1, 2))
    least = max(kernel) * dilation
    shape = (draw(st.integers(1, 2)), groups * draw(st.integers(1, 9)), *(least + draw(st.integers(0, 9)) for _ in "hw"))
    g = draw(st.sampled_from((1, 8, 64, 128)))
    n = draw(st.integers(1, 40)) if groups == 1 else groups * g  # a tile lies inside one group
    case = conv_case(
        shape, n, g, kernel, draw(st.integers(1, 3)), draw(st.integers(0, 3)), dilation, groups,
        keep=draw(st.sampled_from((0.2, 0.7))),
    )  # fmt: skip
    check(case, draw(st.sampled_from(ELEMENTS)), seed=draw(st.sampled_from(SEEDS)))
