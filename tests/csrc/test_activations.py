"""The activations of the epilogues: smooth ones within a few units in the last place, NaN and infinities kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.csrc.kernels import EXACT, OPS, gemm_reference
from tests.integers import SMOOTH, generator, integers, tiles


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
