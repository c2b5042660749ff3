"""Exported programs: the bits of the compiled model, packed weights only, and a fresh process that needs no model source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError, ConfigError, ExportFileError, PlanFileError
from fxprune.plan import lookup
from tests.oracle import FORCED, assert_exact, compiled, integers
from tests.test_plan_file import same_plan
from tests.toys import image, mlp, mobile, pruned, rows, run

CHOSEN = {"autotune": "off", "min_speedup": 0.0}


@pytest.fixture(autouse=True)
def fresh_compiles() -> None:
    torch._dynamo.reset()


class Convolutions(nn.Module):
    """k x k, grouped and one-dimensional convolutions, and a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.line = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y = torch.relu(self.grouped(torch.relu(self.first(x))))
        return self.line(y.flatten(2)) + shift


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class SqueezeExcite(nn.Module):
    """A block with a gate and a residual, for a region with branches."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(16, 32, 1)
        self.dw = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.down, self.up = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.silu(self.dw(torch.nn.functional.silu(self.expand(x))))
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y * gate)


def random_model(model: nn.Module) -> nn.Module:
    gen = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=gen) * 0.2)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], str]] = {
    "mobile": (lambda: random_model(mobile()), image, "region"),
    "mlp": (lambda: random_model(mlp()), rows, "tile_gemm"),
    "convolutions": (
        lambda: random_model(Convolutions()),
        lambda batch: {"x": integers(batch, 3, 16, 16), "shift": integers(batch, 16, 64)},
        "tile_conv",
    ),
    "squeeze-excite": (lambda: random_model(SqueezeExcite()), image, "region"),
    "recurrent": (lambda: random_model(Recurrent()), lambda batch: integers(batch, 5, 24), "rnn_steps"),
}


def called(call: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return call(**inputs) if isinstance(inputs, dict) else call(inputs)


@pytest.mark.parametrize("name", MODELS)
def test_the_bits_of_the_compiled_model(name: str, tmp_path: Path) -> None:
    """Without Inductor, whose own fusions round differently, both run the same operators on the same packed weights."""
    build, example, operator = MODELS[name]
    model = fxprune.prune(build(), example(2), sparsity=0.5, granularity=8, columns=False).model
    written = fxprune.export(model, example(2), tmp_path / "m.pt2", dynamic_shapes="batch", **CHOSEN)
    loaded = fxprune.load(tmp_path / "m.pt2")
    assert f"fxprune.{operator}.default" in loaded.manifest.operators
    fast = compiled(model, dynamic=False, **FORCED)
    for batch in (1, 2, 5):
        torch._dynamo.reset()
        expected = called(fast.call, example(batch))
        assert_exact(called(loaded, example(batch)), expected, repro=f"{name}, batch {batch}")
    chosen = [d.match.parameter for ctx in fast.contexts for d in ctx.decisions if d.chosen]
    assert len([r for r in written.report.to_dict()["rows"] if r["kernel"] != "dense"]) * 3 == len(chosen)


def test_integers_bit_for_bit_with_eager_and_inductor(tmp_path: Path) -> None:
    model = pruned(mobile(), image(), granularity=8)
    fxprune.export(model, image(), tmp_path / "m.pt2", **CHOSEN)
    given = fxprune.load(tmp_path / "m.pt2")(image())
    assert_exact(given, run(model, image()))
    assert_exact(given, run(torch.compile(model, backend="hwprune", options=CHOSEN), image()))


def test_only_packed_weights_are_in_the_file(tmp_path: Path) -> None:
    sizes = []
    for sparsity in (0.0, 0.5, 0.9):
        model = random_model(nn.Linear(512, 512))
        if sparsity:
            model = fxprune.prune(model, torch.ones(2, 512), sparsity=sparsity, columns=False).model
        path = tmp_path / f"{sparsity}.pt2"
        written = fxprune.export(model, torch.ones(2, 512), path, **CHOSEN)
        assert written.bytes == path.stat().st_size and written.dense_bytes == 4 * (512 * 512 + 512)
        sizes.append(written.bytes)
        state = fxprune.load(path).program.state_dict  # type: ignore[union-attr]
        assert ("weight" in state) == (sparsity == 0.0)
    assert sizes[0] > 1 << 20 and sizes[1] < 0.55 * sizes[0] and sizes[2] < 0.15 * sizes[0]


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    model = pruned(mobile(), image(), granularity=8).train()
    model.fc.weight.requires_grad_(False)
    before = {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    fxprune.export(model, image(), tmp_path / "m.pt2", **CHOSEN)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].data_ptr() == at for k, (v, at) in before.items())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags and model.training
    assert lookup(model.dw.weight) is not None


def test_the_plan_is_inside(tmp_path: Path) -> None:
    model = pruned(mobile(), image(), granularity=8)
    written = fxprune.export(model, image(), tmp_path / "m.pt2", **CHOSEN)
    loaded = fxprune.load(tmp_path / "m.pt2")
    assert same_plan(loaded.plan, written.plan) and set(loaded.plan.weights) == {"dw.weight", "pw.weight", "fc.weight"}
    assert [row["layer"] for row in loaded.manifest.layers] == ["dw", "pw", "fc"]
    assert loaded.manifest.bytes["packed"] < loaded.manifest.bytes["dense"]
    assert loaded.program is not None and not loaded.program.example_inputs  # the user's data stay out of the file
    assert "3 of 3 matches run sparse kernels" in str(written) and str(tmp_path) in str(written)


def test_without_zeros_it_is_a_plain_export(tmp_path: Path) -> None:
    model = random_model(mlp())
    fxprune.export(model, rows(), tmp_path / "m.pt2")
    loaded = fxprune.load(tmp_path / "m.pt2")
    assert loaded.manifest.operators == () and not loaded.plan.weights
    assert_exact(loaded(rows()), run(model, rows()))


def test_a_fresh_process(tmp_path: Path) -> None:
    model = pruned(mobile(), image(), granularity=8)
    fxprune.export(model, image(), tmp_path / "m.pt2", dynamic_shapes="batch", **CHOSEN)
    torch.save({"x": image(5), "y": run(model, image(5))}, tmp_path / "data.pt")
    code = f"""
import sys, torch, fxprune
data = torch.load(r"{tmp_path / "data.pt"}", weights_only=True)
assert torch.equal(fxprune.load(r"{tmp_path / "m.pt2"}")(data["x"]), data["y"])
assert torch.equal(torch.export.load(r"{tmp_path / "m.pt2"}").module()(data["x"]), data["y"])
assert "tests" not in sys.modules
"""
    env = {**os.environ, "PYTHONPATH": str(Path(fxprune.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy an archive; ``change`` returns what a member becomes, ``None`` drops it."""
    other = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info, data)
    return other


def record(**values: Any) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        return json.dumps({**json.loads(data), **values}).encode() if name.endswith("/fxprune.json") else data

    return change


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "m.pt2"
    fxprune.export(pruned(mlp(), rows(), granularity=4), rows(), path, **CHOSEN)
    return path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda n, d: None if n.endswith("/fxprune.json") else d, ExportFileError, "not written by fxprune.export; use"),
        (record(version=9), ExportFileError, "its version is 9, this fxprune reads 2"),
        (record(kind="tflite"), ExportFileError, "its format is 'tflite', this fxprune loads exported_program"),
        (record(operators=["fxprune.warp.default"]), ExportFileError, "calls fxprune.warp.default, which fxprune 0.1.0"),
        (record(surprise=1), ExportFileError, "its record cannot be read"),
        (lambda n, d: b"{" if n.endswith("/fxprune.json") else d, ExportFileError, "its record cannot be read"),
        (lambda n, d: b"{}" if n.endswith("plan.json") else d, PlanFileError, "fxprune.plan.json: format: got None"),
        (lambda n, d: b"{}" if n.endswith("model.json") else d, ExportFileError, r"torch 2\..* cannot read a program of"),
    ],
)
def test_what_cannot_be_loaded(good: Path, change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fxprune.load(rewritten(good, change))


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"PK no")
    with pytest.raises(ExportFileError, match=r"m\.pt2 cannot be loaded: it is no readable archive"):
        fxprune.load(tmp_path / "m.pt2")
    with pytest.raises(ExportFileError, match="No such file"):
        fxprune.load(tmp_path / "none.pt2")


def test_bad_requests(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with pytest.raises(ConfigError, match=r"option 'format' got 'exportd'; expected one of 'exported_program'"):
        fxprune.export(mlp(), rows(), path, format="exportd")
    with pytest.raises(ConfigError, match=r"a target is met by fxprune\.prune"):
        fxprune.export(mlp(), rows(), path, target_speedup=2.0)
    with pytest.raises(ConfigError, match=r"'dynamic_shapes' got \"'batch' with first dimensions \[2, 4\]\""):
        fxprune.export(Convolutions(), (image(2), rows(4)), path, dynamic_shapes="batch")
    with pytest.raises(CaptureError, match=r"example_inputs \[\(2, 31\)\].*draft_export"):
        fxprune.export(mlp(), torch.ones(2, 31), path)
    assert not path.exists()


def test_pruning_while_exporting_leaves_the_model(tmp_path: Path) -> None:
    model = random_model(mlp())
    before = model[0].weight.detach().clone()
    fxprune.export(model, rows(), tmp_path / "m.pt2", sparsity=0.5, **CHOSEN)
    loaded = fxprune.load(tmp_path / "m.pt2")
    assert "fxprune.tile_gemm.default" in loaded.manifest.operators and torch.equal(model[0].weight, before)
    wanted = fxprune.prune(model, rows(), sparsity=0.5).model
    torch.testing.assert_close(loaded(rows()), run(wanted, rows()))


def test_a_loaded_program_looks_nothing_up_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``nn.Module.__getattr__`` runs for each tensor of a program, and a region has hundreds."""
    model = pruned(mobile(), image(), granularity=8)
    expected = run(model, image())
    fxprune.export(model, image(), tmp_path / "m.pt2", **CHOSEN)
    loaded = fxprune.load(tmp_path / "m.pt2")
    asked: list[str] = []
    real = nn.Module.__getattr__
    monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: asked.append(name) or real(self, name))
    given = image().requires_grad_()
    output = loaded(given)
    assert_exact(output, expected)
    assert set(asked) <= {"_guards_fn"} and not output.requires_grad
