"""The operators on bfloat16 against fp64, on each instruction set: integers bit for bit, accuracy beside dense torch's.

Sums are float32 and rounded once, so integers give the rounding of the exact sum whatever the order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops import region
from fxprune.ops.bundle import bundle, unbundle
from fxprune.ops.tile_image import from_image, image
from fxprune.ops.tile_pack import whole_structure
from tests.csrc.kernels import BF16_ISAS, EXACT, OPS, check_conv, every_isa, gemm_reference, use_isa
from tests.csrc.programs import as_text, program
from tests.csrc.test_memory import Fenced
from tests.integers import bitmap, generator, integers, tiles

GRANULARITIES = (1, 8, 9, 16, 24, 32, 64, 100)
Place = Callable[[Tensor], Tensor]


@pytest.fixture(params=BF16_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine has, those for bfloat16 included."""
    yield from use_isa(request.param)


def check_gemm(
    shape: tuple[int, ...], n: int, g: int, dim: int, *, keep: float = 0.5, columns: float = 1.0, extras: str = "",
    activation: str = "none", seed: int = 0, place: Place = lambda t: t,
) -> None:  # fmt: skip
    """Compare packed values and their image with fp64. `extras`: b bias, B rounded bias, r residual, g gate."""
    gen = generator(seed, n, g, *shape)
    k = shape[dim]
    weight, (values, *structure) = tiles(gen, n, k, g, keep, columns)
    x, held = place(integers(gen, *shape).bfloat16()), values.bfloat16()
    out = (shape[0], n, *shape[2:]) if dim == 1 else (*shape[:-1], n)
    bias = place(integers(gen, n).to(torch.bfloat16 if "B" in extras else torch.float32)) if "b" in extras.lower() else None
    residual = place(integers(gen, *out).bfloat16()) if "r" in extras else None
    gate = place(integers(gen, shape[0], k).bfloat16()) if "g" in extras and dim == 1 else None
    wide = [None if t is None else t.float() for t in (bias, residual, gate)]
    expected = EXACT[activation](gemm_reference(x.float(), weight, *wide, dim)).bfloat16()
    case = f"x {shape} n {n} g {g} dim {dim} keep {keep} columns {columns} {extras} {activation} seed {seed}"
    structure = [place(t) for t in structure]
    for operand in (place(held), place(image(held, *structure[1:], g))):
        y = OPS.tile_gemm(x, operand, *structure, bias, residual, gate, n, g, dim, activation)
        assert y.shape == expected.shape and y.is_contiguous() and y.dtype == torch.bfloat16, case
        assert torch.equal(y, expected), case


@pytest.mark.parametrize("g", GRANULARITIES)
@pytest.mark.parametrize("dim", (1, -1))
def test_shape_classes(isa: str, dim: int, g: int) -> None:
    for m in (1, 15, 16, 17, 31, 32, 33, 49, 97):
        for n in sorted({1, g, g + 1, 2 * g + 3}):
            check_gemm((1, 5, m) if dim == 1 else (m, 5), n, g, dim, extras="b", seed=m)
    for k in (31, 32, 33, 64, 300):  # one block of input features, several, several parts
        check_gemm((2, k, 20) if dim == 1 else (40, k), 2 * g + 1, g, dim, columns=0.7, extras="Brg", activation="relu")
        check_gemm((1, k, 33) if dim == 1 else (33, k), 2 * g, g, dim, keep=1.0, extras="r")


@pytest.mark.parametrize("g", (*GRANULARITIES, 24, 40))
def test_single_rows(isa: str, g: int) -> None:
    """One row is multiplied as it lies: kept input features that are neighbours and others, pruned output features."""
    for k in (1, 31, 32, 33, 300):
        for keep, columns in ((0.4, 1.0), (0.4, 0.6), (1.0, 0.6), (0.0, 0.6)):
            for activation in ("relu", "hardswish"):
                check_gemm((1, k), 2 * g + 3, g, -1, keep=keep, columns=columns, extras="br", activation=activation)
        check_gemm((1, k, 1), 2 * g + 1, g, 1, columns=0.6, extras="brg")


@pytest.mark.parametrize("dim", (1, -1))
def test_degenerate_structures(isa: str, dim: int) -> None:
    for g in (1, 8, 64):
        for shape in ((2, 9, 10), (3, 1, 1)):
            for keep, columns in ((0.0, 1.0), (0.0, 0.5), (0.5, 0.0), (0.05, 0.3), (1.0, 0.5)):
                check_gemm(shape, 70, g, dim, keep=keep, columns=columns, extras="br", activation="relu")
    for empty in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        check_gemm(empty, 6, 4, dim, extras="br")
    check_gemm((2, 4, 5), 0, 4, dim, extras="br")


@pytest.mark.parametrize("dim", (1, -1))
@pytest.mark.parametrize("activation", EXACT)
def test_exact_activations(isa: str, dim: int, activation: str) -> None:
    for extras, columns in (("", 1.0), ("br", 0.6)):
        check_gemm((2, 8, 19), 37, 8, dim, columns=columns, extras=extras, activation=activation)


@given(
    st.integers(0, 2**20), st.sampled_from((1, -1)), st.integers(1, 3), st.integers(0, 70), st.integers(0, 70),
    st.integers(0, 100), st.integers(1, 140), st.sampled_from((0.0, 0.2, 0.5, 1.0)), st.sampled_from((0.1, 0.6, 1.0)),
    st.sampled_from(("", "b", "r", "Br", "g", "brg")), st.sampled_from(sorted(EXACT)),
)  # fmt: skip
def test_gemm_property(
    seed: int, dim: int, b: int, k: int, m: int, n: int, g: int, keep: float, columns: float, extras: str, act: str
) -> None:
    for _ in every_isa(BF16_ISAS):
        shape = (b, k, m) if dim == 1 else (b, m, k)
        check_gemm(shape, n, g, dim, keep=keep, columns=columns, extras=extras, activation=act, seed=seed)


def test_any_strides(isa: str) -> None:
    gen = generator(1)
    weight, (values, *structure) = tiles(gen, 20, 12, 8)
    base = integers(gen, 4, 12, 6, 12).bfloat16()
    spread = torch.stack((values, values), 1).bfloat16()[:, 0]
    for x in (base.transpose(1, 3), base[::2], base[:1].expand(3, -1, -1, -1), base.to(memory_format=torch.channels_last)):
        residual = integers(gen, x.shape[3], x.shape[2], 20, x.shape[0]).bfloat16().permute(3, 2, 1, 0)
        y = OPS.tile_gemm(x, spread, *structure, None, residual, None, 20, 8, 1, "relu")
        assert torch.equal(y, F.relu(gemm_reference(x.float(), weight, None, residual.float(), None, 1)).bfloat16())


def test_image_holds_the_values_and_zeros() -> None:
    for n, k, g in ((1, 1, 1), (8, 40, 8), (20, 33, 16), (70, 9, 64), (5, 0, 4), (0, 5, 4)):
        _, (values, _, ptr, columns) = tiles(generator(n, k), n, k, g)
        values = values.bfloat16() + 8  # no zero among them
        held = image(values, ptr, columns, g)
        assert held.shape[1] == 32 and torch.equal(from_image(held, ptr, columns, g), values)
        assert int((held != 0).sum()) == len(values)


def test_a_pruned_row_never_meets_an_activation(isa: str) -> None:
    """Inf and NaN in pruned rows leave no trace, as in the masked dense layer."""
    for shape, dim in (((1, 6, 40), 1), ((40, 6), -1)):
        x = integers(generator(3), *shape).bfloat16()
        x.select(dim, 1).fill_(float("nan"))
        x.select(dim, 4).fill_(float("inf"))
        weight = torch.ones(8, 6)
        weight[:, [1, 4]] = 0
        index, ptr, columns = torch.tensor([0, 2, 3, 5]).int(), torch.tensor([0, 4]).int(), torch.arange(8).int()
        y = OPS.tile_gemm(x, torch.ones(32).bfloat16(), index, ptr, columns, None, None, None, 8, 8, dim, "none")
        assert torch.equal(y, gemm_reference(x.nan_to_num(0, 0).float(), weight, None, None, None, dim).bfloat16())


def test_rounding_is_torchs(isa: str) -> None:
    """Ties to even, up and down, overflow to infinity, NaN; at every position of a vector."""
    numbers = torch.tensor([1.00390625, 1.01171875, -1.00390625, 1.005, 3.4e38, -3.4e38, float("nan"), 2.0**-100])
    index, ptr, columns = whole_structure(1, 1, 1)
    for count in (8, 21, 40):
        bias = numbers.repeat(-(-count // 8))[:count]
        for dim in (1, -1):
            x = torch.zeros((1, 1, count) if dim == 1 else (count, 1)).bfloat16()
            index, ptr, columns = whole_structure(count, 1, 64)
            y = OPS.tile_gemm(
                x, torch.zeros(count).bfloat16(), index, ptr, columns, bias, None, None, count, 64, dim, "none"
            )
            given = y[0, :, 0] if dim == 1 else y[0]
            torch.testing.assert_close(given, bias.bfloat16(), rtol=0, atol=0, equal_nan=True)


def check_depthwise(
    plane: tuple[int, int], k: int, stride: int, pad: int, act: str = "none", place: Place = lambda t: t
) -> None:
    gen = generator(k, stride, pad, *plane)
    mask = torch.rand(5, k * k, generator=gen) < 0.5
    weight, bias = integers(gen, 5, k * k) * mask, integers(gen, 5)
    x, geometry = place(integers(gen, 2, 5, *plane).bfloat16()), ([k, k], [stride] * 2, [pad] * 2, [1, 1])
    expected = EXACT[act](
        F.conv2d(x.double(), weight.view(5, 1, k, k).double(), bias.double(), stride, pad, 1, 5)
    ).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        operands = place(weight.to(dtype)), place(bitmap(mask)), place(bias.to(dtype))
        y = OPS.depthwise_taps(x, *operands, *geometry, act)
        assert y.dtype == torch.bfloat16 and torch.equal(y, expected), f"{plane} {k} {stride} {pad} {act} {dtype}"


@pytest.mark.parametrize("k", (1, 3, 5, 7))
def test_depthwise(isa: str, k: int) -> None:
    for plane in ((1, 1), (7, 7), (14, 14), (28, 28), (15, 33), (9, 40), (2, 65), (33, 35)):
        for stride in (1, 2, 3):
            for pad in {0, k // 2, k}:
                if min(plane) + 2 * pad >= k:
                    check_depthwise(plane, k, stride, pad, "relu6")
    check_depthwise((14, 14), k, 1, k // 2, "hardswish")


@pytest.mark.fuzz
@given(st.integers(0, 2**30))
def test_regions_run_the_operators(seed: int) -> None:
    """One call gives the bits of the operators one by one, on each instruction set and number of threads."""
    x, weights, layout, code, outputs = program(seed)
    if not code:
        return

    def half(held: list[Tensor]) -> list[Tensor]:
        return [t.bfloat16() if t.is_floating_point() else t for t in held]

    x, (weights, layout) = half(x), bundle(half(unbundle(weights, layout)))
    part = region.parts_of(weights, layout)
    before = torch.get_num_threads()
    try:
        for name in every_isa(BF16_ISAS):
            expected = region.interpret(
                x, part, code, outputs, OPS.depthwise_taps, OPS.tile_gemm, OPS.tile_conv, OPS.channel_norm, OPS.attention
            )
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for a, b in zip(OPS.region(*as_text((x, weights, layout, code, outputs))), expected, strict=True):
                    assert a.dtype == torch.bfloat16 and torch.equal(a, b), f"program({seed}) on {name}, {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="places tensors with Linux's mmap")
@pytest.mark.parametrize("at_end", (True, False))
def test_no_input_is_read_beyond_its_ends(isa: str, at_end: bool) -> None:
    fence = Fenced(at_end)
    try:
        for shape, n, g, dim in (
            ((2, 5, 49), 19, 8, 1), ((1, 3, 31), 9, 4, 1), ((2, 33, 50), 70, 64, 1), ((13, 9), 67, 64, -1),
            ((40, 35), 30, 16, -1), ((32, 32), 32, 32, -1), ((1, 3), 1, 1, -1), ((1, 35), 70, 24, -1), ((1, 64), 16, 16, -1),
        ):  # fmt: skip
            for columns in (1.0, 0.6):
                check_gemm(shape, n, g, dim, columns=columns, extras="brg", place=fence)
        for shape, g, kernel, stride, pad in (
            ((1, 3, 9, 11), 8, (3, 3), 1, 1), ((2, 5, 14, 13), 32, (3, 5), 2, 2), ((1, 2, 7, 7), 16, (3, 3), 1, 0),
            ((1, 4, 12, 40), 32, (2, 3), 3, 1),
        ):  # fmt: skip
            window = kernel, (stride, stride), (pad, pad)
            check_conv(shape, 37, g, *window, columns=0.7, extras="br", dtype=torch.bfloat16, place=fence)
        for plane, k, stride, pad in (((7, 7), 3, 1, 1), ((5, 40), 3, 1, 1), ((9, 33), 3, 2, 1), ((6, 9), 3, 3, 2)):
            check_depthwise(plane, k, stride, pad, place=fence)
    finally:
        fence.release()


def rmse(given: Tensor, exact: Tensor) -> float:
    return (given.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh", "sigmoid"])
def test_error_is_that_of_dense_bfloat16(isa: str, activation: str) -> None:
    """RMSE to fp64 of the rounded operands, beside torch's bfloat16 kernel: never materially more."""
    functions: dict[str, Any] = {
        "none": lambda y: y, "silu": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    }  # fmt: skip
    gen, act = generator(4), functions[activation]
    _, (values, *structure) = tiles(gen, 96, 320, 64, 0.5)
    values = (torch.randn(len(values), generator=gen) / 12).bfloat16()
    weight = OPS.tile_unpack(values, *structure, 64, 96, 320)
    x, bias = torch.randn(70, 320, generator=gen).bfloat16(), torch.randn(96, generator=gen)
    exact = act(x.double() @ weight.double().t() + bias.double())
    dense = rmse(act(F.linear(x, weight, bias.bfloat16())), exact)
    y = OPS.tile_gemm(x, values, *structure, bias, None, None, 96, 64, -1, activation)
    assert rmse(y, exact) <= 1.02 * dense
    turned = OPS.tile_gemm(x.t().contiguous()[None], values, *structure, bias, None, None, 96, 64, 1, activation)
    assert rmse(turned[0].t(), exact) <= 1.02 * dense
    window = (torch.randn(33, 25, generator=gen) / 5).bfloat16()
    planes, taps = torch.randn(2, 33, 17, 17, generator=gen).bfloat16(), bitmap(torch.ones(33, 25, dtype=torch.bool))
    geometry = ([5, 5], [1, 1], [2, 2], [1, 1])
    y = OPS.depthwise_taps(planes, window, taps, None, *geometry, activation)
    conv = window.view(33, 1, 5, 5)
    exact = act(F.conv2d(planes.double(), conv.double(), None, 1, 2, 1, 33))
    assert rmse(y, exact) <= 1.02 * rmse(act(F.conv2d(planes, conv, None, 1, 2, 1, 33)), exact)
