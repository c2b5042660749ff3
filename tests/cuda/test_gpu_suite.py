"""A dry run of tests/gpu on the CPU's operators: what those tests build and compare is right before a GPU runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.gpu import place, test_convolutions, test_nm_mm, test_nm_prune, test_operators, test_small
from tests.gpu import test_tile_gradients as gradients

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


def test_gradients_of_tiles_are_built_right() -> None:
    for shape in gradients.GEMMS[:4]:
        gradients.test_gemm(shape, FLOAT)
    for shape in gradients.CONVOLUTIONS[:4]:
        gradients.test_convolution(shape, FLOAT)


def test_sparse_products_are_built_right() -> None:
    for shape in test_nm_mm.SHAPES[:5]:
        test_nm_mm.test_products(shape, torch.float16)
    test_nm_mm.test_one_kept_element_in_four(3)


@pytest.mark.parametrize("function", ("random", "rescaled_magnitude", "mvue"))
def test_gradients_are_built_right(function: str) -> None:
    test_nm_prune.test_equals_the_reference_bit_for_bit(function, FLOAT)


def test_small_cases_are_built_right() -> None:
    test_small.test_gemms_and_convolutions(FLOAT)
    for op in test_small.PLAIN:
        test_small.test_samples(op, FLOAT)


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = test_convolutions.pairs.case
    monkeypatch.setattr(test_convolutions.pairs, "case", lambda *a, **k: (case(*a, **k)[0], case(*a, **k)[1] + 1))
    with pytest.raises(AssertionError):
        test_convolutions.test_dsconv(test_convolutions.PAIRS[0], 3, FLOAT)


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu_fusions.py on the CPU: every call runs once, and no time is taken."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    loaded = {}
    for name in ("gpu_timing", "gpu_fusions"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        loaded[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded[name])
        spec.loader.exec_module(loaded[name])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(loaded["gpu_timing"], "micros", lambda calls: dict.fromkeys(calls, 2.0))
    monkeypatch.setattr(loaded["gpu_fusions"], "DEVICE", "cpu")
    monkeypatch.setattr(loaded["gpu_fusions"], "DTYPE", FLOAT)
    return loaded["gpu_fusions"]


def test_benchmarks_are_built_right(fusions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAIRS", "WINDOWS"):
        monkeypatch.setattr(fusions, name, ((2, 16, 9, 70, 3, 1),))
    monkeypatch.setattr(fusions, "POOLS", ((2, 16, 9, 3, 1),))
    monkeypatch.setattr(fusions, "GRADIENTS", ((1, 64, 4),))
    monkeypatch.setattr(fusions, "LINEARS", ((40, 64, 256, 0.5),))
    monkeypatch.setattr(fusions, "WIDE", ((40, 64, 48),))
    monkeypatch.setattr(fusions, "backward_row", lambda *shape, run=fusions.backward_row: run(2, 16, 9, shape[-1]))
    rows = list(fusions.fusion_rows({"copy_tb_s": 4.3}))
    assert len(rows) == 11
    for row in rows:
        assert not set(row["left_out"]) - {"cusparselt"}, row
        assert row["us"]["ours"] == 2.0 and row["speedup"] == 1.0
