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

from fxprune.ops import depthwise_taps, tile_gradients
from tests.cuda.binding import binding, in_place_of_the_cpus
from tests.gpu import (
    place,
    test_convolutions,
    test_gradients,
    test_large,
    test_nm_mm,
    test_nm_prune,
    test_operators,
    test_small,
    test_two_in_four,
)
from tests.gpu import test_tile_gradients as gradients

FLOAT = torch.float32
# rivals that need a GPU or packages, and a choice of depthwise kernels that torch before 2.13 has not
MAY_BE_MISSING = {"cuSPARSELt 2:4", "QuACK", "QuACK gather", "grouped_mm"}
MAY_BE_MISSING |= {f"{layout} {kernel}" for layout in ("nchw", "nhwc") for kernel in ("cudnn", "native")}


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
    test_operators.test_tile_gemm_in_tf32(test_operators.GEMMS[1])


def test_gradients_of_tiles_are_built_right() -> None:
    for shape in gradients.GEMMS[:4]:
        gradients.test_gemm(shape, FLOAT)
    for shape in gradients.CONVOLUTIONS[:4]:
        gradients.test_convolution(shape, FLOAT)


def test_every_sample_is_one_that_a_gpu_takes() -> None:
    for op, args in (sample.values for sample in place.OPERATOR_SAMPLES):
        given = place.in_one_type(args)
        binding()(op.name, *given)
        assert len({a.dtype for a in given if isinstance(a, torch.Tensor) and a.is_floating_point()}) == 1, op.name


@pytest.mark.parametrize("case", ("tile_gemm with all", "tile_conv in groups", "depthwise 5x5, stride 2"))
def test_gradients_of_the_kernels_are_right(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the simulator, over kept weights as on a GPU."""
    monkeypatch.setattr(tile_gradients, "pays", lambda *_: True)
    monkeypatch.setattr(depthwise_taps, "_dense", depthwise_taps._sparse)
    with in_place_of_the_cpus() as ran:
        test_gradients.check(*test_gradients.KEPT[case], torch.bfloat16)
        operator = test_gradients.KEPT[case][0]
        backward = {"tile_gemm": "tile_grad", "tile_conv": "tile_conv_grad", "depthwise_taps": "depthwise_grad"}[operator]
        assert {operator, f"{backward}_input", f"{backward}_weight"} <= {*ran}, ran


def test_gradients_of_samples_are_compared() -> None:
    for sample in test_gradients.SAMPLES[::5]:
        if test_gradients.few(*sample.values):
            test_gradients.test_gradcheck(*sample.values)
        test_gradients.test_gradients_match_the_cpu(*sample.values)


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the second feature of a tile for the first."""
    weight = tile_gradients.dense_weight
    monkeypatch.setattr(tile_gradients, "dense_weight", lambda *args: weight(args[0].roll(1, 1), *args[1:]))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_gradients.check(*test_gradients.KEPT["tile_gemm"], FLOAT)


def test_weights_kept_two_in_four_are_built_right() -> None:
    test_two_in_four.test_tile_gemm(*test_two_in_four.SHAPES[0], torch.bfloat16)
    with pytest.raises(pytest.skip.Exception, match="cutlass: needs a GPU, got cpu"):
        test_two_in_four.test_libraries("cutlass", torch.bfloat16)


def test_large_cases_are_built_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_large, "DTYPE", FLOAT)
    for name in test_large.CASES:
        test_large.check(name, 3, 12)


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
        assert set(row["left_out"]) <= MAY_BE_MISSING, row
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
        target = {"us": 120} if name == "mobilenetv2_100" else None
        assert row["target"] == target and (row["floor_us"] == 46) == (target is not None), row
    assert [how.get("backend") for how in calls] == ["hwprune", None, None, "hwprune", None]


def test_every_model_of_the_benchmark_has_predictions(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "model_row", lambda *case: case)
    cases = list(benchmark.model_rows())
    assert {case[0] for case in cases} == set(benchmark.PREDICTED_FLOORS) == set(benchmark.PREDICTED_MODEL)
    assert {case[1] for case in cases} == {1, 32, 256}
    for name, batch in {case[:2] for case in cases}:
        dense, ours = benchmark.PREDICTED_FLOORS[name][batch]
        assert ours < dense
    assert set(benchmark.TARGETS) <= {case[:2] for case in cases}


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


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/gpu.py, its reports in a folder of the test."""
    spec = importlib.util.spec_from_file_location("gpu", Path(__file__).resolve().parents[2] / "tools/gpu.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    monkeypatch.setattr(loaded, "REPORTS", tmp_path)
    monkeypatch.setattr(loaded, "ROOT", tmp_path)
    return loaded


def test_one_that_hangs_takes_no_other_along(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is stopped with the processes it started, and named; the end of what it said is shown."""
    hang = "import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    jobs = {"good": ("-c", "print('1 passed')"), "bad": ("-c", "raise SystemExit(3)"), "hung": ("-c", hang)}
    monkeypatch.setattr(tool.os, "cpu_count", lambda: 6)
    bad, hung = tool.together(9.0, jobs, {})
    assert bad == "bad ended with 3" and hung.startswith("hung ran past")
    said = capfd.readouterr().out
    assert "1 passed" in said and "begun" in said and "hung.log" in said
    assert tool.together(2.0, jobs, {}) == [f"{name} was not begun, no time was left" for name in jobs]


HANGS = """
import time
def test_before(): pass
def test_hangs(): time.sleep(600)
def test_behind(): assert False, "seen all the same"
"""


def test_a_test_that_hangs_is_named_and_left_out(
    tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rest of its file runs again, so that nothing that it would have shown is lost."""
    (tmp_path / "test_file.py").write_text(HANGS)
    (tmp_path / "pytest.ini").touch()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("FXPRUNE_TEST_SECONDS", "1")
    jobs = {"file": (*tool.PYTEST, *tool.WATCHED, "test_file.py")}
    assert tool.together(90.0, jobs, {}) == ["test_file.py::test_hangs hung", "file ended with 1"]
    said = capfd.readouterr().out
    assert "in test_hangs" in said and "seen all the same" in said and "1 failed, 1 passed, 1 deselected" in said


def run_main(tool: Any, monkeypatch: pytest.MonkeyPatch, only: str, loads: bool) -> tuple[int, list[tuple[str, float]]]:
    """tools/gpu.py without a GPU: the status, and the steps with their seconds."""
    steps: list[tuple[str, float]] = []
    monkeypatch.setattr(tool, "missing", lambda: None)
    monkeypatch.setattr(tool, "call", lambda name, *_, **__: [] if loads else [f"{name} ended with 1"])
    monkeypatch.setattr(tool, "run_step", lambda step, seconds, out: steps.append((step, seconds)) or [])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", only])
    return tool.main(), steps


def test_the_last_step_has_the_time_that_is_left(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status, steps = run_main(tool, monkeypatch, "build,tests", True)
    assert status == 0 and [step for step, _ in steps] == ["build", "tests"]
    assert steps[0][1] == pytest.approx(0.35 * 540, abs=5) and steps[1][1] == pytest.approx(540, abs=5)


def test_without_kernels_nothing_passes(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tests that are all skipped must not look like tests that passed."""
    status, steps = run_main(tool, monkeypatch, "build,tests,bench", False)
    assert status == 1 and [step for step, _ in steps] == ["build"]
    assert "failed: loading the kernels ended with 1; tests was not run" in capfd.readouterr().out


def test_the_benchmarks_have_a_third_of_the_time(tool: Any) -> None:
    left = 1.0
    for step in tool.STEPS[:-1]:
        left *= 1 - tool.SHARES[step]
    assert left > 1 / 3 and tool.SHARES["bench"] == 1.0


def test_steps_are_called_as_a_gpu_wants_them(tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: dict[str, tuple[str, ...]] = {}

    def call(name: str, seconds: float, *arguments: str, prefix: tuple[str, ...] = (), **more: Any) -> list[str]:
        called[name] = (*prefix, *arguments)
        return []

    monkeypatch.setattr(tool, "call", call)
    monkeypatch.setattr(tool, "find", lambda name: f"/somewhere/{name}")
    (tmp_path / "tests/gpu").mkdir(parents=True)
    (tmp_path / "tests/gpu/test_small.py").touch()
    for step in tool.STEPS:
        assert tool.run_step(step, 100.0, tmp_path) == []
    assert set(called) == {"build", "test_small", *tool.SANITIZERS, "bench"}
    assert called["racecheck"][:3] == ("/somewhere/compute-sanitizer", "--tool", "racecheck")
    assert called["bench"][1:] == ("--seconds", "90", "--out", str(tmp_path / "gpu.json"))
    monkeypatch.setattr(tool, "find", lambda name: None)
    assert tool.run_step("sanitizer", 100.0, None) == [] and "torch" in str(tool.missing())


def test_benchmarks_are_built_right(fusions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAIRS", "WINDOWS"):
        monkeypatch.setattr(fusions, name, ((2, 16, 9, 70, 3, 1),))
    monkeypatch.setattr(fusions, "POOLS", ((2, 16, 9, 3, 1),))
    monkeypatch.setattr(fusions, "GRADIENTS", ((1, 64, 4),))
    monkeypatch.setattr(fusions, "LINEARS", ((40, 64, 256, 0.5),))
    monkeypatch.setattr(fusions, "WIDE", ((40, 64, 48),))
    monkeypatch.setattr(fusions, "STEPS", ((32, 16, 1.0),))
    monkeypatch.setattr(fusions, "backward_row", lambda *shape, run=fusions.backward_row: run(2, 16, 9, shape[-1]))
    rows = list(fusions.fusion_rows({"copy_tb_s": 4.3}))
    assert len(rows) == 12
    for row in rows:
        assert not set(row["left_out"]) - {"cusparselt"}, row
        assert row["us"]["ours"] == 2.0 and row["speedup"] == 1.0
