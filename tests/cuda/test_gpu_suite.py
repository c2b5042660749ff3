"""A dry run of tests/gpu on the CPU's operators: what those tests build and compare is right before a GPU runs them."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import place, test_convolutions, test_nm_prune, test_operators

FLOAT = torch.float32


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "DEVICE", "cpu")


def test_convolutions_are_built_right() -> None:
    for shape in test_convolutions.CONVOLUTIONS[:6]:
        test_convolutions.test_tile_conv(shape, FLOAT)
    for shape in test_convolutions.PAIRS[:3]:
        test_convolutions.test_dsconv(shape, 3, FLOAT)
        test_convolutions.test_dsconv(shape, 7, FLOAT)
    for kernel in (3, 9):
        test_convolutions.test_depthwise_pool(kernel, FLOAT)


def test_gemms_are_built_right() -> None:
    test_operators.test_depthwise(3, FLOAT)
    for shape in test_operators.GEMMS[:5]:
        test_operators.test_tile_gemm(shape, FLOAT)


@pytest.mark.parametrize("function", ("random", "rescaled_magnitude", "mvue"))
def test_gradients_are_built_right(function: str) -> None:
    test_nm_prune.test_equals_the_reference_bit_for_bit(function, FLOAT)


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = test_convolutions.pairs.case
    monkeypatch.setattr(test_convolutions.pairs, "case", lambda *a, **k: (case(*a, **k)[0], case(*a, **k)[1] + 1))
    with pytest.raises(AssertionError):
        test_convolutions.test_dsconv(test_convolutions.PAIRS[0], 3, FLOAT)
