"""The ``hwprune`` command, in this process: what it prints, its exit status, and errors in one line with the remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import fxprune
from fxprune import cli, model_spec
from fxprune.errors import MissingPackage, ModelSpecError

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pw = nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(32, 24)

    def forward(self, x):
        return self.fc(torch.relu(self.pw(self.dw(x))).mean((2, 3)))

def build():
    return Net(), torch.randn(2, 16, 8, 8)

def bare():
    return Net()

def broken():
    raise ValueError("no weights\\nhere")

number = 3
"""
OFF = ["--option", "autotune=off", "--option", "min_speedup=0.0"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch._dynamo.reset()
    (tmp_path / "net.py").write_text(MODEL)
    return f"{tmp_path / 'net.py'}:build"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    seen = capsys.readouterr()
    return status, seen.out, seen.err


def table(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    status, out, err = run(capsys, *argv, "--json")
    assert status == 0 and not err, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_explain(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = table(capsys, "explain", model, "--sparsity", "depthwise=0.5,linear=0.5", *OFF, "--html", str(page))
    patterns = {row["layer"]: row["pattern"] for row in found["rows"]}
    assert patterns == {"dw": "dcp", "pw": "-", "fc": "tile"}
    assert "BWT: equal per group" in page.read_text()
    status, out, _ = run(capsys, "explain", model, "--option", "autotune=off")
    assert status == 0 and out.startswith("matches\nlayer  kind") and "chosen: 0 of 3" in out


def test_prune_then_verify_and_export(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    state, plan, program = (str(tmp_path / name) for name in ("w.pt", "p.json", "m.pt2"))
    found = table(capsys, "prune", model, "--sparsity", "0.5", "-o", state, "--save-plan", plan)
    assert found["summary"]["sparsity"]["all"] == pytest.approx(0.5, abs=0.05) and len(fxprune.load_plan(plan).weights) == 3
    again = [model, "--weights", state, "--plan", plan, *OFF]
    status, out, err = run(capsys, "verify", *again)
    assert status == 0 and out.startswith("relative error against fp64") and not err
    status, out, err = run(capsys, "export", *again, "-o", program, "--dynamic-batch")
    assert status == 0 and out.startswith(f"{program}: exported_program") and "3 of 3 matches" in out and not err
    x = torch.randn(5, 16, 8, 8)
    net = model_spec.build(model).model
    net.load_state_dict(torch.load(state, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(fxprune.load(program)(x), net(x))
    rows = table(capsys, "export", *again, "-o", program)
    assert rows["summary"]["bytes"] == Path(program).stat().st_size


def test_an_exported_program_is_a_model(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    """Its module has no ``eval``: what was exported has one mode."""
    state, program = str(tmp_path / "w.pt"), tmp_path / "dense.pt2"
    subject = model_spec.build(model)
    torch.export.save(torch.export.export(subject.model, (subject.inputs,)), program)
    spec = [str(program), "--shape", "2x16x8x8"]
    assert len(table(capsys, "explain", *spec, "--sparsity", "0.5", *OFF)["rows"]) == 3
    table(capsys, "prune", *spec, "--sparsity", "0.5", "-o", state)
    for command in (["verify", *spec], ["export", *spec, "-o", str(tmp_path / "sparse.pt2")]):
        status, _, err = run(capsys, *command, "--weights", state, *OFF)
        assert status == 0 and not err, command


def test_verify_fails_with_status_1(capsys: pytest.CaptureFixture[str], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = fxprune.verify
    monkeypatch.setattr(fxprune, "verify", lambda m, x: verify(m, x, compiled=lambda v: torch.zeros(2, 24)))
    status, out, err = run(capsys, "verify", model)
    assert status == 1 and not out
    assert err.startswith("hwprune: VerificationError: verify: output 0: got error 1") and err.count("\n") == 1


def test_a_missed_target_has_status_1(capsys: pytest.CaptureFixture[str], model: str) -> None:
    status, out, err = run(capsys, "prune", model, "--speedup", "1000", "--option", "fallback=eager", *OFF[:2])
    assert (
        status == 1
        and "not reached" in out
        and err.startswith("hwprune: warning: TargetNotReached")
        and err.count("\n") == 1
    )


def test_sensitivity(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = table(capsys, "sensitivity", model, "--sparsities", "0.5", "--html", str(page))
    assert {row["layer"] for row in found["rows"]} == {"dw", "pw", "fc"} and "Sensitivity" in page.read_text()
    status, _, err = run(capsys, "sensitivity", model, "--sparsity", "0.5")
    assert status == 2 and "expected --sparsities 0.25 0.5" in err


@pytest.mark.slow
def test_bench(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    plain = ["--sparsity", "0.5", *OFF, "--option", "fallback=eager"]
    found = table(capsys, "bench", model, *plain, "--rounds", "2", "--threads", "1", "--html", str(page))
    assert [row["engine"] for row in found["rows"]] == ["eager", "inductor", "hwprune"]
    assert "Whole model" in page.read_text() and "Masks" in page.read_text()
    assert found["summary"]["threads"] == 1
    torch.set_num_threads(2)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["what"]: row for row in table(capsys, "doctor")["rows"]}
    assert found["torch"]["found"] == torch.__version__ and found["fxprune"]["found"] == fxprune.__version__
    assert found["instruction set"]["found"] == torch.ops.fxprune.isa()
    assert found["fxprune::tile_gemm"]["found"].startswith("cpu") and "GPU" in found
    for name in ("onnx", "matplotlib", "timm"):
        assert (found[name]["found"] == "not installed") == bool(found[name]["remedy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nope"], "model 'nope': it is none of the known forms. Known forms: timm:NAME"),
        (["explain", "{dir}/none.py:build"], "FileNotFoundError: no such file: "),
        (["explain", "{dir}/net.py:missing"], "AttributeError: module 'net' has no attribute 'missing'"),
        (["explain", "{dir}/net.py:broken"], "ValueError: no weights. Known forms"),
        (["explain", "{dir}/net.py:number"], "TypeError: number is a int, expected a torch.nn.Module"),
        (["explain", "{dir}/net.py:bare"], "nothing says what its inputs are; pass --shape"),
        (["explain", "{dir}/none.pt2"], "FileNotFoundError"),
        (["explain", "{dir}/net.py:build", "--shape", "2x3x8x8"], "CaptureError: the model could not be captured"),
        (["explain", "{dir}/net.py:build", "--option", "patern=x"], "unknown option 'patern'; did you mean 'pattern'"),
        (["prune", "{dir}/net.py:build"], "option 'sparsity' got None; expected a fraction"),
        (["prune", "{dir}/net.py:build", "--sparsity", "2"], "option 'sparsity' got 2.0"),
        (["verify", "{dir}/net.py:build", "--plan", "{dir}/net.py"], "net.py: the text: got"),
        (["verify", "{dir}/net.py:build", "--weights", "{dir}/none.pt"], "option '--weights' got"),
        (["export", "{dir}/net.py:build", "-o", "x", "--format", "tflite"], "option 'format' got 'tflite'"),
    ],
)
def test_bad_requests_are_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, *[a.format(dir=tmp_path) for a in arguments])
    assert status == 2 and not out and message in err and err.startswith("hwprune: ") and err.count("\n") == 1, err


def test_unexpected_errors_have_status_3(
    capsys: pytest.CaptureFixture[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise OSError("disk\nfull")

    monkeypatch.setattr(fxprune, "explain", fails)
    status, _, err = run(capsys, "explain", model)
    assert (status, err) == (3, "hwprune: OSError: disk full (--debug shows where)\n")
    assert "Traceback" in run(capsys, "explain", model, "--debug")[2]


@pytest.mark.parametrize("argv", [[], ["explain"], ["explain", "m", "--sparsity", "x"], ["explain", "m", "--shape", "1xa"]])
def test_usage_errors(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and "usage: hwprune" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and all(f"\n    {name}" in text for name in cli._COMMANDS) and "examples:" in text


def test_shapes_and_batches(model: str) -> None:
    assert model_spec.build(model, [(3, 16, 4, 4)]).inputs[0].shape == (3, 16, 4, 4)
    with zoo.torchvision_absent():
        import timm

        assert timm
    subject = model_spec.build("timm:mobilenetv3_small_050", batch=3)
    assert subject.inputs[0].shape == (3, 3, 224, 224) and not subject.model.training
    same = model_spec.build("timm:mobilenetv3_small_050", batch=3)
    assert torch.equal(same.inputs[0], subject.inputs[0])


def test_transformers_by_configuration(tmp_path: Path) -> None:
    config = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50,
              "intermediate_size": 64, "max_position_embeddings": 40}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    subject = model_spec.build(f"hf:{tmp_path}", batch=2)
    assert subject.inputs["input_ids"].shape == (2, 40) and int(subject.inputs["input_ids"].max()) < 50
    with torch.no_grad():
        assert subject.model(**subject.inputs).last_hidden_state.shape == (2, 40, 32)
    with pytest.raises(ModelSpecError, match="hf:no-such-kind"):
        model_spec.build("hf:no-such-kind")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackage, match=r"timm:x needs timm, .* Run: pip install 'fxprune\[timm\]'"):
        model_spec.build("timm:x")


def test_as_a_program(root: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "fxprune", "explain", "no"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("hwprune: ModelSpecError")
