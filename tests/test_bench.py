"""The benchmarks' arithmetic: a rival that is missing is never a win, tables show what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import bench_models
import bench_sweep
import cases
import channels
import pytest
import render
import torch
from torch import nn

from fxprune.benchmark import interleave


def test_speedups_are_ratios_to_the_fastest_of_each_kind() -> None:
    samples = {
        "eager channels_last": [9.0],
        "inductor": [8.0, 8.0, 80.0],
        "inductor freezing": [6.0],
        "inductor max-autotune": [7.0],
        "fxprune": [3.0],
        "fxprune exported": [2.0],
        "openvino": [4.0],
        "channels: openvino": [1.0],
    }
    found = bench_models.speedups(samples, {})
    assert (found["fastest_stock"], found["speedup"]) == ("inductor freezing", 2.0)
    assert (found["fastest_dense"], found["speedup_over_dense"]) == ("openvino", 2.0)
    assert (found["fastest_channels"], found["speedup_over_channels"]) == ("channels: openvino", 0.5)
    found = bench_models.speedups(samples, {"onnxruntime": "ImportError"})
    assert found["speedup_over_dense"] is None and found["speedup_over_channels"] == 0.5
    found = bench_models.speedups(samples, {"channels: onnxruntime": "ImportError"})
    assert found["speedup_over_dense"] == 2.0 and found["speedup_over_channels"] is None


def test_disturbed_rounds_are_run_again_but_not_for_ever() -> None:
    asked = iter([False, True, True, True])
    calls = {"a": lambda: None}
    assert len(interleave(calls, 3, 0.01, undisturbed=lambda: next(asked))["a"]) == 3
    assert next(asked, None) is None  # four rounds were run
    assert len(interleave(calls, 3, 0.01, undisturbed=lambda: False)["a"]) == 3


def test_multiplications_count_weights_that_are_not_zero() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 25, 6)).eval()
    x = torch.randn(2, 4, 5, 5)
    assert channels.multiplications(model, (x,)) == 2 * (25 * 8 * 4 * 9 + 200 * 6)
    with torch.no_grad():
        model[0].weight[:, :2] = 0
    assert channels.multiplications(model, (x,)) == 2 * (25 * 8 * 2 * 9 + 200 * 6)


def test_lower_bound_of_a_median() -> None:
    assert bench_sweep.lower_bound([1.0] * 9) == 1.0
    assert bench_sweep.lower_bound([0.5] * 5 + [2.0] * 6) == 0.5


def test_cases_are_distinct_and_start_with_the_goals() -> None:
    every = list(cases.cases())
    assert len({c.name for c in every}) == len(every)
    assert every[0].name == "mobilenetv2_100-b1-float32-2t"
    assert all((c.threads, c.batch) == (2, 1) for c in every[: 2 * len(cases.MODELS)])


@pytest.mark.parametrize("dense, cell", [(1.5, "**1.50x**"), (None, "not comparable")])
def test_a_row_shows_the_fastest_rivals(tmp_path: Path, dense: float | None, cell: str) -> None:
    numbers = {"p10": 1.0, "p90": 2.0, "error": 1e-6, "compile_s": 3.0}
    record = {
        "model": "mobilenetv2_100",
        "batch": 1,
        "dtype": "float32",
        "threads": 2,
        "rounds": 5,
        "sparsity": {"depthwise": 0.78},
        "machine": {"cpu": "Some CPU", "cores": 2, "isa": ["avx2"]},
        "versions": {"torch": "2.13.0"},
        "date": "2026-01-01",
        "commit": "abc",
        "gate": {"repeated rounds": 1, "gflops": 100.0},
        "engines": {
            name: {"ms": ms, **numbers}
            for name, ms in (("inductor freezing", 4.0), ("openvino", 3.0), ("fxprune", 2.5), ("fxprune exported", 2.0))
        },
        "artifact_mb": {"fxprune exported": 5.0, "torch.export": 14.0},
        "channels": {"multiplications": 1e8},
        "fastest_stock": "inductor freezing",
        "speedup": 1.6,
        "fastest_dense": "openvino",
        "speedup_over_dense": dense,
        "not_comparable": {} if dense else {"onnxruntime": "ImportError: none"},
        "unpruned": {"ratio": 1.0},
    }
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "x.json").write_text(json.dumps(record))
    row = next(line for line in render.table(tmp_path).splitlines() if line.startswith("| mobilenetv2_100"))
    assert f"| 4.00 freezing | 3.00 openvino | - | **2.00** exported | 1.60x | {cell} | - | 1.00x |" in row
    assert "5.0 MB, torch.export 14.0 MB" in render.page(tmp_path)
    assert ("not comparable: ImportError" in render.page(tmp_path)) == (dense is None)


@pytest.mark.slow
def test_one_case_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS", "ATEN")  # without what stock compiles to choose from
    child = bench_models.child
    others = ("inductor", "fxprune exported")  # whose footprints are taken as ours is
    monkeypatch.setattr(bench_models, "child", lambda line, env: None if line[-1] in others else child(line, env))
    assert bench_models.main(["--models", "bert_tiny", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bert_tiny-b1-float32-2t.json").read_text())
    for name in (
        "eager channels_last",
        "inductor",
        "inductor freezing",
        "inductor max-autotune",
        "fxprune",
        "fxprune exported",
    ):
        assert 0 < record["engines"][name]["p10"] <= record["engines"][name]["p90"]
        assert record["engines"][name]["error"] < 1e-5
    assert {"onnxruntime", "openvino"} <= record["engines"].keys() | record["not_comparable"].keys()
    assert (record["speedup_over_dense"] is None) == bool(record["not_comparable"])
    assert record["artifact_mb"]["fxprune exported"] < record["artifact_mb"]["torch.export"]
    assert record["engines"]["fxprune"]["peak_mb"] > 0 and record["matches"]["linear"]["pruned"] == 12
