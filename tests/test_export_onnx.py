"""ONNX files against PyTorch, run by ONNX Runtime; without the extra packages these tests are skipped by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ExportFileError
from fxprune.manifest import MANIFEST, PLAN
from fxprune.plan_file import decode
from tests.oracle import assert_exact
from tests.test_export import MODELS, called, random_model
from tests.test_plan_file import same_plan
from tests.toys import image, mobile, pruned, run

onnx = pytest.importorskip("onnx", reason="the extra fxprune[onnx] is not installed: no onnx")
pytest.importorskip("onnxscript", reason="the extra fxprune[onnx] is not installed: no onnxscript")
ort = pytest.importorskip("onnxruntime", reason="the extra fxprune[onnx] is not installed: no onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def runtime(path: Path, inputs: Any) -> torch.Tensor:
    session = ort.InferenceSession(str(path))
    values = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    feed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), values, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


SLOW = [pytest.param(name, marks=pytest.mark.slow if name == "recurrent" else ()) for name in MODELS]


@pytest.mark.parametrize("name", SLOW)
def test_the_numbers_of_the_model(name: str, tmp_path: Path) -> None:
    build, example, _ = MODELS[name]
    model = fxprune.prune(build(), example(2), sparsity=0.5, granularity=8, columns=False).model
    path = tmp_path / "m.onnx"
    fxprune.export(model, example(2), path, format="onnx", dynamic_shapes="batch")
    onnx.checker.check_model(str(path))
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    for batch in (1, 2, 5):
        torch.testing.assert_close(runtime(path, example(batch)), called(model, example(batch)), rtol=1e-4, atol=1e-5)


def test_integers_bit_for_bit(tmp_path: Path) -> None:
    model = pruned(mobile(), image(), granularity=8)
    fxprune.export(model, image(), tmp_path / "m.onnx", format="onnx")
    assert_exact(runtime(tmp_path / "m.onnx", image()), run(model, image()))


def test_the_saving_stays(tmp_path: Path) -> None:
    """Rows are gathered per tile, output features that went are not computed, and the file is smaller."""
    dense, x = random_model(nn.Linear(256, 512)), torch.randn(2, 3, 256)
    sizes = {}
    for sparsity in (0.0, 0.5, 0.875):
        model = fxprune.prune(dense, x, sparsity=sparsity, columns=False).model if sparsity else dense
        path = tmp_path / f"{sparsity}.onnx"
        written = fxprune.export(model, x, path, format="onnx")
        torch.testing.assert_close(runtime(path, x), run(model, x), rtol=1e-4, atol=1e-5)
        sizes[sparsity] = written.bytes
        assert written.bytes == path.stat().st_size
        found = nodes(path)
        if sparsity:
            assert found["Gather"] == found["MatMul"] == 8, found  # one for each of 512 / 64 tiles
    assert sizes[0.5] < 0.6 * sizes[0.0] and sizes[0.875] < 0.25 * sizes[0.0]


def test_plan_and_record_are_metadata(tmp_path: Path) -> None:
    written = fxprune.export(pruned(mobile(), image()), image(), tmp_path / "m.onnx", format="onnx")
    texts = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert same_plan(decode(texts[PLAN]), written.plan) and '"kind": "onnx"' in texts[MANIFEST]


def test_load_says_what_runs_it(tmp_path: Path) -> None:
    fxprune.export(pruned(mobile(), image()), image(), tmp_path / "m.onnx", format="onnx")
    with pytest.raises(ExportFileError, match=r"run it with onnxruntime\.InferenceSession\(path\)"):
        fxprune.load(tmp_path / "m.onnx")
