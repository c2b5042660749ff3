"""tile_gemm, tile_pack and tile_unpack against plain torch, bit for bit, on each instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.kernels import EXACT, OPS, check_gemm, every_isa, gemm_reference
from tests.integers import generator, integers, tiles

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


@pytest.mark.parametrize("g", (16, 64, 128))
def test_row_major_passes_with_many_strips(isa: str, g: int) -> None:
    """More strips than share a pass over the rows, and more rows than one unit takes."""
    for rows, columns in ((30, 1.0), (29, 0.6), (1030, 0.9)):
        check_gemm((rows, 9), 40 * g + 3, g, -1, columns=columns, extras="br", activation="relu", seed=rows)


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
    for _ in every_isa():
        check_gemm(shape, n, g, feature_dim, keep=keep, columns=columns, extras=extras, activation=act, seed=seed)


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
