"""The C++ kernels against plain torch, bit for bit: small-integer data make every order of summation exact.

Every test runs on each ISA this machine has. Outputs start as NaN, so that an element left unwritten is seen.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxprune.lowering import library
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

if not library.load():
    pytest.skip("the C++ library is not built", allow_module_level=True)
OPS = torch.ops.fxprune
BEST = OPS.isa()

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def _isas() -> list[str]:
    found = []
    for name in ("scalar", "avx2", "avx512"):
        try:
            OPS.set_isa(name)
        except RuntimeError:
            continue
        found.append(name)
    OPS.set_isa(BEST)
    return found


ISAS = _isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    OPS.set_isa(request.param)
    yield request.param
    OPS.set_isa(BEST)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


def generator(*key: int) -> torch.Generator:
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % 2**31
    return torch.Generator().manual_seed(seed)


def integers(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=gen).float()


# ---- tile_gemm ----


def tiles(
    gen: torch.Generator, n: int, k: int, g: int, keep: float = 0.5, columns: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Return the dense weight (N, K) and (values, index, tile_ptr, columns), row counts uneven between tiles."""
    kept = torch.nonzero(torch.rand(n, generator=gen) < columns).flatten()
    weight, values, index, ptr = torch.zeros(n, k), [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)], [0]
    for first in range(0, len(kept), g):
        cols = kept[first : first + g]
        rows = torch.nonzero(torch.rand(k, generator=gen) < keep).flatten()
        block = integers(gen, len(rows), len(cols))
        weight[cols[:, None], rows[None, :]] = block.t()
        values.append(block.flatten())
        index.append(rows)
        ptr.append(ptr[-1] + len(rows))
    return weight, [torch.cat(values), torch.cat(index).int(), torch.tensor(ptr, dtype=torch.int32), kept.int()]


def gemm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None, feature_dim: int
) -> Tensor:
    """Dense, in fp64, before the activation."""
    y = x.double()
    if gate is not None:
        y = y * gate.double().reshape(*gate.shape, *[1] * (x.dim() - 2))
    y = torch.movedim(torch.movedim(y, feature_dim, -1) @ weight.double().t(), -1, feature_dim)
    if bias is not None:
        y = y + (bias.reshape(-1, *[1] * (x.dim() - 2)) if feature_dim == 1 else bias)
    return y if residual is None else y + residual


def check_gemm(
    shape: tuple[int, ...], n: int, g: int, feature_dim: int, *, keep: float = 0.5, columns: float = 1.0, extras: str = "",
    activation: str = "none", seed: int = 0,
) -> None:  # fmt: skip
    """Compare one call with dense torch. `extras`: b bias, r residual, g gate."""
    gen = generator(seed, n, g, *shape)
    k = shape[feature_dim]
    weight, packed = tiles(gen, n, k, g, keep, columns)
    x = integers(gen, *shape)
    out = (shape[0], n, *shape[2:]) if feature_dim == 1 else (*shape[:-1], n)
    bias = integers(gen, n) if "b" in extras else None
    residual = integers(gen, *out) if "r" in extras else None
    gate = integers(gen, shape[0], k) if "g" in extras else None
    expected = EXACT[activation](gemm_reference(x, weight, bias, residual, gate, feature_dim).float())
    y = OPS.tile_gemm(x, *packed, bias, residual, gate, n, g, feature_dim, activation)
    case = f"x {shape} n {n} g {g} dim {feature_dim} keep {keep} columns {columns} {extras} {activation} seed {seed}"
    assert y.shape == expected.shape and y.is_contiguous(), case
    assert torch.equal(y, expected), case


GRANULARITIES = (1, 4, 8, 16, 32, 48, 64, 128)


@pytest.mark.parametrize("g", GRANULARITIES)
def test_feature_major_shape_classes(isa: str, g: int) -> None:
    for m in (1, 7, 15, 16, 17, 33, 47, 48, 49, 97):
        for n in sorted({1, max(1, g - 1), g, g + 1, 2 * g, 2 * g + 3}):
            check_gemm((1, 5, m), n, g, 1, extras="b", seed=m)
    for b, k, h, w in ((3, 1, 7, 7), (2, 33, 14, 14), (1, 9, 3, 11), (2, 4, 1, 1), (1, 2, 29, 29)):
        for extras in ("", "b", "r", "g", "brg"):
            check_gemm((b, k, h, w), 2 * g + 1, g, 1, columns=0.7, extras=extras, activation="relu")


@pytest.mark.parametrize("g", GRANULARITIES)
def test_row_major_shape_classes(isa: str, g: int) -> None:
    for m in (1, 2, 5, 6, 7, 12, 13, 25):
        for n in sorted({1, max(1, g - 1), g, g + 1, 2 * g, 2 * g + 3}):
            check_gemm((m, 5), n, g, -1, extras="b", seed=m)
    for shape in ((3, 7, 33), (2, 2, 2, 1), (11,), (500, 16), (1, 40)):
        for extras in ("", "b", "r", "br"):
            check_gemm(shape, 2 * g + 1, g, -1, columns=0.7, extras=extras, activation="relu6")
            check_gemm(shape, 2 * g + 1, g, -1, columns=1.0, extras=extras)


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_gemm_degenerate_structures(isa: str, feature_dim: int) -> None:
    for g in (1, 8, 64):
        for shape in ((2, 9, 10), (1, 9, 4), (3, 1, 1)):
            for keep, columns in ((0.0, 1.0), (0.0, 0.5), (1.0, 1.0), (0.5, 0.0), (0.05, 0.3), (1.0, 0.5)):
                for extras in ("", "br"):
                    check_gemm(shape, 70, g, feature_dim, keep=keep, columns=columns, extras=extras, activation="relu")
    check_gemm((2, 9, 3) if feature_dim == 1 else (2, 3, 9), 2500, 4, feature_dim, columns=0.01, extras="br")
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        check_gemm(shape, 6, 4, feature_dim, extras="br")
    check_gemm((2, 4, 5), 0, 4, feature_dim, extras="br")


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("feature_dim", (1, -1))
def test_gemm_exact_activations(isa: str, feature_dim: int, activation: str) -> None:
    for shape in ((2, 8, 19), (1, 30, 7), (2, 3, 1)):
        for columns in (1.0, 0.6):
            check_gemm(shape, 37, 8, feature_dim, columns=columns, extras="br", activation=activation)


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_gemm_takes_any_strides(isa: str, feature_dim: int) -> None:
    gen = generator(1)
    n, k, g = 20, 12, 8
    weight, packed = tiles(gen, n, k, g)
    base = integers(gen, 4, k, 6, k)

    def views(t: Tensor) -> Iterator[Tensor]:
        yield t.transpose(1, 3)
        yield t[::2]
        yield t[:1].expand(3, -1, -1, -1)
        yield t.to(memory_format=torch.channels_last)
        yield t.as_strided((1, k, 6, k), (7, 6 * k, k, 1))

    spread = [torch.stack((t, t), 1)[:, 0] for t in packed]  # stride 2
    for x in views(base):
        shape = (x.shape[0], n, *x.shape[2:]) if feature_dim == 1 else (*x.shape[:-1], n)
        residual, bias = integers(gen, *shape[::-1]).permute(3, 2, 1, 0), integers(gen, 2 * n)[::2]
        gate = integers(gen, k, x.shape[0]).t() if feature_dim == 1 else None
        y = OPS.tile_gemm(x, *spread, bias, residual, gate, n, g, feature_dim, "relu")
        assert torch.equal(y, F.relu(gemm_reference(x, weight, bias, residual, gate, feature_dim)).float())


@given(
    st.integers(0, 2**20), st.sampled_from((1, -1)), st.integers(1, 3), st.integers(0, 40), st.integers(0, 70),
    st.integers(0, 140), st.integers(1, 140), st.sampled_from((0.0, 0.2, 0.5, 1.0)), st.sampled_from((0.1, 0.6, 1.0)),
    st.sampled_from(("", "b", "r", "br", "g", "brg")), st.sampled_from(sorted(EXACT)),
)  # fmt: skip
def test_gemm_property(
    seed: int, feature_dim: int, b: int, k: int, m: int, n: int, g: int, keep: float, columns: float, extras: str, act: str
) -> None:
    shape = (b, k, m) if feature_dim == 1 else (b, m, k)
    extras = extras if feature_dim == 1 else extras.replace("g", "")
    for name in ISAS:
        OPS.set_isa(name)
        try:
            check_gemm(shape, n, g, feature_dim, keep=keep, columns=columns, extras=extras, activation=act, seed=seed)
        finally:
            OPS.set_isa(BEST)


# ---- tile_pack, tile_unpack ----


def test_pack_and_unpack() -> None:
    for n, k, g, columns in (
        (8, 6, 4, 1.0),
        (37, 19, 8, 0.6),
        (130, 5, 64, 0.9),
        (5, 7, 64, 0.0),
        (0, 3, 4, 1.0),
        (3, 0, 4, 1.0),
    ):
        weight, packed = tiles(generator(n, k), n, k, g, columns=columns)
        values, *structure = packed
        assert torch.equal(OPS.tile_unpack(values, *structure, g, n, k), weight)
        assert torch.equal(OPS.tile_pack(weight, *structure, g, len(values)), values)
        assert torch.equal(OPS.tile_pack(weight.t().contiguous().t(), *structure, g, len(values)), values)


# ---- depthwise_taps ----


def bitmap(mask: Tensor) -> Tensor:
    """mask: (C, taps) bool -> taps: (C, words) int64."""
    channels, count = mask.shape
    words = torch.zeros(channels, -(-count // 64), dtype=torch.int64)
    for t in range(count):
        words[:, t // 64] |= mask[:, t].long() << (t % 64)
    return words


def check_depthwise(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), *, keep: float = 0.4, bias: bool = True,
    activation: str = "none", seed: int = 0,
) -> None:  # fmt: skip
    """Compare one call with dense torch; skip geometries whose window does not fit."""
    if any(s + 2 * p < d * (r - 1) + 1 for s, p, d, r in zip(shape[2:], padding, dilation, kernel, strict=True)):
        return
    gen = generator(seed, *shape, *kernel)
    channels, count = shape[1], kernel[0] * kernel[1]
    mask = torch.rand(channels, count, generator=gen) < keep
    if keep == 0.01:  # one tap, a different one in each channel
        mask = F.one_hot(torch.arange(channels) * 5 % count, count).bool()
    weight, x = integers(gen, channels, count) * mask, integers(gen, *shape)
    b = integers(gen, channels) if bias else None
    expected = EXACT[activation](F.conv2d(x, weight.view(channels, 1, *kernel), b, stride, padding, dilation, channels))
    y = OPS.depthwise_taps(x, weight, bitmap(mask), b, list(kernel), list(stride), list(padding), list(dilation), activation)
    case = f"x {shape} kernel {kernel} stride {stride} padding {padding} dilation {dilation} keep {keep} seed {seed}"
    assert y.shape == expected.shape and y.is_contiguous(), case
    assert torch.equal(y, expected), case


PLANES = ((1, 1), (1, 7), (7, 1), (7, 7), (14, 14), (28, 28), (15, 33), (9, 40), (3, 17), (2, 65))


@pytest.mark.parametrize("kernel", ((1, 1), (3, 3), (5, 5), (7, 7), (3, 5), (9, 9)), ids=str)
def test_depthwise_shape_classes(isa: str, kernel: tuple[int, int]) -> None:
    half = (kernel[0] // 2, kernel[1] // 2)
    for plane in PLANES:
        for stride in (1, 2, 3):
            for padding in {(0, 0), half, kernel, (0, half[1])}:
                check_depthwise((2, 3, *plane), kernel, (stride, stride), padding, activation="relu6")
        for keep in (0.0, 0.01, 1.0):
            check_depthwise((1, 5, *plane), kernel, padding=half, keep=keep, bias=keep == 1.0)


@pytest.mark.parametrize("dilation", ((2, 2), (1, 3), (3, 1)), ids=str)
def test_depthwise_dilation_and_mixed_strides(isa: str, dilation: tuple[int, int]) -> None:
    for plane in PLANES:
        for kernel in ((3, 3), (3, 5), (5, 1)):
            for stride in ((1, 1), (2, 1), (1, 2), (3, 2), (2, 3)):
                same = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
                for padding in {(0, 0), same, (1, 0)}:
                    check_depthwise((3, 2, *plane), kernel, stride, padding, dilation, activation="hardswish")


def test_depthwise_planes_of_real_layers(isa: str) -> None:
    for channels, side, k, stride in ((8, 112, 3, 2), (6, 56, 5, 2), (6, 56, 7, 1), (40, 14, 5, 1), (70, 7, 3, 1)):
        check_depthwise((2, channels, side, side), (k, k), (stride, stride), (k // 2, k // 2), activation="relu")


def test_depthwise_empty(isa: str) -> None:
    for shape in ((0, 3, 5, 5), (2, 0, 5, 5)):
        y = OPS.depthwise_taps(
            torch.zeros(shape), torch.zeros(shape[1], 9), torch.zeros(shape[1], 1, dtype=torch.int64), None,
            [3, 3], [1, 1], [1, 1], [1, 1], "none",
        )  # fmt: skip
        assert y.shape == shape


def test_depthwise_takes_any_strides(isa: str) -> None:
    gen = generator(2)
    mask = torch.rand(6, 9, generator=gen) < 0.5
    weight, bias, base = integers(gen, 6, 9) * mask, integers(gen, 12)[::2], integers(gen, 4, 6, 8, 10)
    spread = torch.stack((bitmap(mask), bitmap(mask)), 1)[:, 0]
    for x in (
        base[::2],
        base[:1].expand(2, -1, -1, -1),
        base.to(memory_format=torch.channels_last),
        base[..., 1::2],
        base.mT,
    ):
        y = OPS.depthwise_taps(x, weight.t().contiguous().t(), spread, bias, [3, 3], [1, 1], [1, 1], [1, 1], "none")
        assert torch.equal(y, F.conv2d(x.contiguous(), weight.view(6, 1, 3, 3), bias, 1, 1, 1, 6))


def test_pruned_taps_are_not_read(isa: str) -> None:
    """A pruned tap's weight has no influence, whatever it holds."""
    x, weight = integers(generator(3), 1, 2, 9, 9), torch.full((2, 9), float("nan"))
    weight[:, 4] = 2.0
    taps = torch.tensor([[1 << 4], [1 << 4]])
    assert torch.equal(OPS.depthwise_taps(x, weight, taps, None, [3, 3], [1, 1], [1, 1], [1, 1], "none"), 2 * x)


@given(
    st.integers(0, 2**20), st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from((0.0, 0.01, 0.3, 1.0)), st.booleans(), st.sampled_from(sorted(EXACT)),
)  # fmt: skip
def test_depthwise_property(
    seed: int, shape: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, keep: float, bias: bool, act: str
) -> None:
    for name in ISAS:
        OPS.set_isa(name)
        try:
            check_depthwise(shape, kernel, stride, padding, dilation, keep=keep, bias=bias, activation=act, seed=seed)
        finally:
            OPS.set_isa(BEST)


# ---- activations ----


def activate(x: Tensor, name: str) -> Tensor:
    """The activation alone: a depthwise 1x1 convolution by one."""
    ones, tap = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64)
    return OPS.depthwise_taps(x.view(1, 1, 1, -1), ones, tap, None, [1, 1], [1, 1], [0, 0], [1, 1], name).flatten()


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations(isa: str, name: str) -> None:
    x = torch.cat((torch.linspace(-20, 20, 400_001), torch.linspace(-0.01, 0.01, 1001), torch.tensor([-200.0, 200.0])))
    y, exact = activate(x, name), SMOOTH[name](x.double())
    # the factor beside x is right to 2e-7, so the error grows with |x| and not with the result
    assert ((y - exact).abs() <= 2e-7 * x.abs().clamp_min(1.0) + 1e-7 * exact.abs()).all()
    if name in ("silu", "sigmoid"):
        near = x.abs() <= 80
        assert ((y - exact).abs() <= 4e-7 * exact.abs())[near].all()


@pytest.mark.parametrize("name", (*EXACT, *SMOOTH))
def test_activations_propagate_non_finite(isa: str, name: str) -> None:
    y = activate(torch.tensor([float("nan"), float("inf"), 3.0, float("-inf")]), name)
    assert y[0].isnan()
    assert y[1] == {"relu6": 6.0, "sigmoid": 1.0, "hardsigmoid": 1.0}.get(name, float("inf"))
    assert y[2].isfinite()
    scalar = {**EXACT, **SMOOTH}[name](torch.tensor([float("-inf")]))
    assert torch.equal(y[3:].nan_to_num(7.0), scalar.nan_to_num(7.0))


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_gemm_smooth_activations(isa: str, feature_dim: int) -> None:
    gen = generator(4)
    weight, packed = tiles(gen, 37, 11, 8, columns=0.7)
    x = integers(gen, 2, 11, 11)
    bias, y = integers(gen, 37), gemm_reference(x, weight, None, None, None, feature_dim)
    y = y + (bias[:, None] if feature_dim == 1 else bias)
    for name, function in SMOOTH.items():
        out = OPS.tile_gemm(x, *packed, bias, None, None, 37, 8, feature_dim, name)
        torch.testing.assert_close(out, function(y).float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_non_finite_inputs_of_kept_weights_propagate(isa: str, feature_dim: int) -> None:
    x = torch.ones(1, 4, 4)
    x[0, 1, 1] = float("nan")
    packed = [torch.ones(2), torch.tensor([1]).int(), torch.tensor([0, 1]).int(), torch.tensor([0, 1]).int()]
    y = OPS.tile_gemm(x, *packed, None, None, None, 2, 2, feature_dim, "relu")
    assert y.isnan().sum() == 2
    packed[1] += 1  # the row that holds NaN is pruned now
    if feature_dim == 1:
        assert OPS.tile_gemm(x, *packed, None, None, None, 2, 2, feature_dim, "relu6").isfinite().all()


# ---- determinism, memory ----


def test_threads_do_not_change_a_bit(isa: str) -> None:
    gen = generator(5)
    before = torch.get_num_threads()

    def run() -> list[Tensor]:
        results = []
        for shape, n, g, dim in (
            ((3, 40, 28, 28), 96, 8, 1),
            ((1, 40, 7, 7), 320, 8, 1),
            ((130, 64), 200, 64, -1),
            ((900, 64), 64, 48, -1),
        ):
            _, packed = tiles(generator(6), n, shape[dim], g, columns=0.8)
            results.append(OPS.tile_gemm(x[shape], *packed, bias[:n], None, None, n, g, dim, "gelu"))
        mask = torch.rand(33, 25, generator=generator(7)) < 0.4
        weight = torch.randn(33, 25, generator=generator(8)) * mask
        for stride in (1, 2, 3):
            geometry = ([5, 5], [stride] * 2, [2, 2], [1, 1])
            results.append(OPS.depthwise_taps(planes, weight, bitmap(mask), bias[:33], *geometry, "silu"))
        return results

    gemms = (((3, 40, 28, 28), 96, 8, 1), ((1, 40, 7, 7), 320, 8, 1), ((130, 64), 200, 64, -1), ((900, 64), 64, 48, -1))
    x = {shape: torch.randn(shape, generator=gen) for shape, *_ in gemms}
    bias, planes = torch.randn(400, generator=gen), torch.randn(2, 33, 29, 29, generator=gen)
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two = run()
        again = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))


class Fenced:
    """Places tensors between two inaccessible pages: any access beyond one end, even a read, is a crash."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.regions: list[tuple[int, int]] = []

    def __call__(self, t: Tensor) -> Tensor:
        page, size = mmap.PAGESIZE, t.numel() * t.element_size()
        inner = max(1, -(-size // page)) * page
        region = self.libc.mmap(None, inner + 2 * page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert region not in (None, ctypes.c_void_p(-1).value)
        self.regions.append((region, inner + 2 * page))
        assert self.libc.mprotect(region + page, inner, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        start = region + page + (inner - size if self.at_end else 0)
        placed = torch.frombuffer((ctypes.c_char * max(size, 1)).from_address(start), dtype=t.dtype, count=t.numel())
        return placed.copy_(t.flatten()).view(t.shape)

    def release(self) -> None:
        for region, size in self.regions:
            self.libc.munmap(region, size)


@pytest.mark.skipif(sys.platform != "linux", reason="places tensors with Linux's mmap")
@pytest.mark.parametrize("at_end", (True, False))
def test_no_input_is_read_beyond_its_ends(isa: str, at_end: bool) -> None:
    fence = Fenced(at_end)
    gen = generator(9)
    try:
        for shape, n, g, dim in (
            ((2, 5, 7, 7), 19, 8, 1), ((1, 3, 31), 9, 4, 1), ((2, 7, 50), 70, 64, 1), ((13, 9), 67, 64, -1),
            ((5, 9), 30, 16, -1), ((1, 3), 1, 1, -1),
        ):  # fmt: skip
            for columns in (1.0, 0.6):
                weight, packed = tiles(gen, n, shape[dim], g, columns=columns)
                x, bias = fence(integers(gen, *shape)), fence(integers(gen, n))
                out = (shape[0], n, *shape[2:]) if dim == 1 else (*shape[:-1], n)
                residual = fence(integers(gen, *out))
                for gate in (None, fence(integers(gen, shape[0], shape[1]))) if dim == 1 else (None,):
                    y = OPS.tile_gemm(x, *map(fence, packed), bias, residual, gate, n, g, dim, "none")
                    assert torch.equal(y, gemm_reference(x, weight, bias, residual, gate, dim).float())
        for plane, k, stride, pad in (
            ((7, 7), 3, 1, 1), ((14, 14), 5, 1, 2), ((5, 40), 3, 1, 1), ((9, 33), 3, 2, 1), ((8, 50), 5, 2, 0),
            ((6, 9), 3, 3, 2), ((3, 3), 7, 1, 3), ((4, 70), 9, 1, 4),
        ):  # fmt: skip
            mask = torch.rand(3, k * k, generator=gen) < 0.5
            weight, x = fence(integers(gen, 3, k * k) * mask), fence(integers(gen, 2, 3, *plane))
            bias, bits = fence(integers(gen, 3)), fence(bitmap(mask))
            y = OPS.depthwise_taps(x, weight, bits, bias, [k, k], [stride] * 2, [pad] * 2, [1, 1], "none")
            assert torch.equal(y, F.conv2d(x.clone(), weight.clone().view(3, 1, k, k), bias.clone(), stride, pad, 1, 3))
    finally:
        fence.release()
