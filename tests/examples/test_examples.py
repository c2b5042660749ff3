"""Each example's ``main`` runs in a fast mode, in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fewer(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Let an example train and test on a third of the digits."""
    train, test = module.data()
    monkeypatch.setattr(module, "data", lambda: (tuple(t[:448] for t in train), tuple(t[:192] for t in test)))
    return module


@pytest.mark.slow
def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("demo").main(["--models", "bert_tiny", "--rounds", "2", "--layers"]) == 0
    printed = capsys.readouterr().out
    assert "encoder.layer.1.output.dense" in printed
    assert "matches: 13 linear" in printed
    assert "equal to the masked dense model" in printed
    for engine in ("inductor", "inductor freezing", "fxprune"):
        assert f"  {engine}  " in printed


@pytest.mark.slow
def test_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("digits").main(["--epochs", "3", "--tune-epochs", "2", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    steps = {line.split()[0]: line for line in printed.splitlines() if "accuracy" in line}
    assert set(steps) == {"trained", "pruned", "fine-tuned", "compiled"}
    shares = {step: float(line.partition("accuracy ")[2].partition("%")[0]) for step, line in steps.items()}
    assert shares["fine-tuned"] > 60
    assert shares["compiled"] == pytest.approx(shares["fine-tuned"], abs=0.5)
    assert "verified against fp64" in printed


@pytest.mark.slow
def test_compensation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    options = ["--epochs", "2", "--batches", "1", "--sparsities", "0.3", "--importances", "taylor"]
    assert fewer(load("compensation"), monkeypatch).main(options) == 0
    printed = capsys.readouterr().out
    (row,) = [line.split() for line in printed.partition("pruned without fine-tuning")[2].splitlines() if "taylor" in line]
    assert row[0] == "30%" and len(row) == 8 and all(cell.endswith("%") for cell in row[2:])
    errors = [float(cell.rstrip("%")) for cell in row[3::2]]
    assert min(errors) > 0 and errors[2] < errors[0]
    assert "dense accuracy" in printed


@pytest.mark.slow
def test_sdgp_order(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--nets", "mobilenet", "--ratios", "2:4", "--functions", "mvue", "--seeds", "2", "--epochs", "3"]
    assert load("sdgp_order").main([*options, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.partition("interval over the seeds")[2].splitlines() if "±" in line]
    assert [row.partition("  ")[0] for row in rows] == ["dense", "mvue 2:4"]
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 2 and all(len(r["accuracy"]) == 2 and min(r["accuracy"]) > 40 for r in results)
    assert results[0]["accuracy"] != results[1]["accuracy"]


@pytest.mark.slow
def test_gradual_transformer(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("gradual_transformer").main(["--epochs", "3", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    rows = {name: line.split() for line in printed.splitlines() for name in ("gradual", "at once") if line.startswith(name)}
    assert rows["gradual"][-2] == rows["at once"][-2] == "75.0%"
    assert all(float(row[-1].rstrip("%")) > 15 for row in rows.values())
    assert all(f"\n{engine} " in printed for engine in ("eager", "inductor", "hwprune"))


@pytest.mark.slow
def test_deprune_or_channels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    options = ["--epochs", "1", "--tune-epochs", "1", "--steps", "1", "--rounds", "2"]
    module = load("deprune_or_channels")
    fewer(module.digits, monkeypatch)
    assert module.main(options) == 0
    searched, _, printed = capsys.readouterr().out.partition("at equal latency")
    assert "45% of the channels: " in searched
    rows = {line.split()[0]: line for line in printed.splitlines() if line.endswith("%")}
    assert set(rows) == {"DEPrune-BH", "channels"}
    assert "depthwise 7" in rows["DEPrune-BH"] and "depthwise" not in rows["channels"]
    for row in rows.values():
        milliseconds, *accuracies = row.split()[-3:]
        assert float(milliseconds) > 0 and all(0 < float(share.rstrip("%")) <= 100 for share in accuracies)


@pytest.mark.slow
def test_ddp() -> None:
    """In a process of its own, since it starts others."""
    root = str(EXAMPLES.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, str(EXAMPLES / "ddp.py"), "--steps", "24"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    for name in ("pruned gradually", "fine-tuned with its plan"):
        assert "all 2 ranks have the same weights" in lines[name]
    assert lines["zeros of the second layer"].endswith("75.0%")
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("second", "last"))] == ["pruned"] * 2
