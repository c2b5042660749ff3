"""A dry run of tests/gpu on the CPU's operators: what those tests build and compare is right before a GPU runs them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.gpu import place, test_convolutions, test_nm_mm, test_nm_prune, test_operators, test_small, test_two_in_four
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


def test_weights_kept_two_in_four_are_built_right() -> None:
    test_two_in_four.test_tile_gemm(*test_two_in_four.SHAPES[0], torch.bfloat16)
    with pytest.raises(pytest.skip.Exception, match="cutlass: needs a GPU, got cpu"):
        test_two_in_four.test_libraries("cutlass", torch.bfloat16)


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
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/bench_gpu.py on the CPU: every call runs once, and no time is taken."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    loaded: dict[str, Any] = {}
    for name in ("gpu_timing", "gpu_fusions", "bench_gpu"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        loaded[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded[name])
        spec.loader.exec_module(loaded[name])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("gpu_timing", "bench_gpu"):
        monkeypatch.setattr(loaded[name], "micros", lambda calls: dict.fromkeys(calls, 2.0))
    for name in ("gpu_fusions", "bench_gpu"):
        monkeypatch.setattr(loaded[name], "DEVICE", "cpu")
    monkeypatch.setattr(loaded["gpu_fusions"], "DTYPE", FLOAT)
    return loaded["bench_gpu"]  # type: ignore[no-any-return]


@pytest.fixture
def fusions(benchmark: ModuleType) -> ModuleType:
    return sys.modules["gpu_fusions"]


def test_rows_of_operators_are_built_right(benchmark: ModuleType) -> None:
    ceilings = {"copy_tb_s": 4.3, "matmul_tflop_s": 790.0}
    rows = [
        benchmark.depthwise_row(2, 8, 14, 7, 1, 0.3, FLOAT, ceilings),
        benchmark.gemm_row(40, 96, 256, 0.5, 128, FLOAT, ceilings),
    ]
    for row in rows:
        assert set(row["left_out"]) <= {"cuSPARSELt 2:4", "QuACK", "grouped_mm"}, row
        assert row["us"]["ours"] == 2.0 and row["speedup"] == 1.0 and row["predicted"] > 1
    image = benchmark.two_in_four(torch.randn(64 * 4 * 2).half(), torch.tensor([0, 4, 8]).int(), 64, 128)
    assert image.dtype == torch.int8


def test_rows_of_models_are_built_right(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def compiled(model: Any, given: Any, **how: Any) -> Any:
        calls.append(how)
        return lambda: model(*given)

    monkeypatch.setattr(benchmark, "compiled", compiled)
    for name in ("mobilenetv2_100", "bert_tiny"):
        row = benchmark.model_row(name, 1, 0.5, FLOAT)
        assert not row["left_out"] and row["best_rival"] is not None, row
    assert [how.get("backend") for how in calls] == ["hwprune", None, None, "hwprune", None]


def test_sections_share_the_time(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A section that has had its share leaves the rest to the next one, and says so."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark.library, "cuda_missing", lambda: None)
    monkeypatch.setattr(benchmark, "machine", lambda: {"gpu": "NVIDIA Test", "date": "d", "commit": "c"})
    monkeypatch.setattr(benchmark, "measure_ceilings", dict)
    for rows in ("depthwise_rows", "gemm_rows", "fusion_rows"):
        monkeypatch.setattr(benchmark, rows, lambda ceilings: iter([{"case": "a"}] * 50))
    monkeypatch.setattr(benchmark, "model_rows", lambda: iter([{"case": "m"}] * 3))
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--seconds", "400", "--out", str(out)])
    assert benchmark.main() == 0
    report = json.loads(out.read_text())
    assert [len(report[name]) for name in ("depthwise", "gemm", "fusions", "models")] == [6, 8, 6, 3]
    assert report["left_out"] == [f"the rest of {name}: no time left" for name in ("depthwise", "gemm", "fusions")]


@pytest.mark.parametrize(("seconds", "count"), ((10.0, 1), (95.0, 2), (500.0, 4)))
def test_sanitizers_that_fit(seconds: float, count: int) -> None:
    spec = importlib.util.spec_from_file_location("gpu", Path(__file__).resolve().parents[2] / "tools/gpu.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.sanitizers(seconds) == tool.SANITIZERS[:count] and tool.SANITIZERS[0] == "memcheck"


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
