"""``format="torch_tensorrt"`` on a machine without TensorRT: what is handed over, and what is said where it is missing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.errors import MissingPackage
from tests.oracle import assert_exact
from tests.toys import image, mobile, pruned, run


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingPackage, match=r"needs torch_tensorrt with TensorRT and a GPU \(.*fxprune\[tensorrt\]"):
        fxprune.export(mobile(), image(), tmp_path / "m.trt", format="torch_tensorrt")


def test_the_compiler_gets_standard_operators_and_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def compile(program: torch.export.ExportedProgram, inputs: list[torch.Tensor]) -> str:
        seen.update(program=program, inputs=inputs)
        return "engine"

    def save(module: str, path: str, output_format: str, inputs: list[torch.Tensor]) -> None:
        Path(path).write_text(f"{module} {output_format} {len(inputs)}")

    module = types.SimpleNamespace(dynamo=types.SimpleNamespace(compile=compile), save=save)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)  # type: ignore[misc]
    torch._dynamo.reset()
    model = pruned(mobile(), image(), granularity=8)
    written = fxprune.export(model, image(), tmp_path / "m.trt", format="torch_tensorrt")
    assert (tmp_path / "m.trt").read_text() == "engine exported_program 1" and written.format == "torch_tensorrt"
    names = {getattr(n.target, "namespace", "aten") for n in seen["program"].graph.nodes if n.op == "call_function"}
    assert names <= {"aten", "_operator"}
    (x,) = seen["inputs"]
    assert torch.equal(x, image())
    assert_exact(run(seen["program"].module(), x), run(model, x))
