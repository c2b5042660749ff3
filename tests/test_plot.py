"""``report.plot(path)``: a picture of every report, and what is said where there is none to draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import fxprune
from fxprune.errors import ConfigError, MissingPackage
from fxprune.report import Table
from tests.toys import image, mobile, pruned


@pytest.fixture(scope="module")
def reports() -> dict[str, Table]:
    torch._dynamo.reset()
    model = pruned(mobile(), image(), granularity=8)
    return {
        "explain": fxprune.explain(model, image(), autotune="off", min_speedup=0.0),
        "levels": fxprune.levels(mobile(), image(), autotune="off"),
        "sensitivity": fxprune.sensitivity(mobile(), image(), sparsities=(0.5, 0.75)),
        "benchmark": fxprune.benchmark(model, image(), engines={"a": model, "b": model}, rounds=2, burst_ms=1.0),
    }


@pytest.mark.parametrize("name", ["explain", "levels", "sensitivity", "benchmark"])
def test_a_picture_of_each_report(name: str, reports: dict[str, Table], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra fxprune[plot] is not installed: no matplotlib")
    reports[name].plot(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] == 900 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    reports[name].plot(tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert "<svg" in text and text.count("<path") > 10


def test_nothing_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra fxprune[plot] is not installed: no matplotlib")
    with pytest.raises(ConfigError, match="option 'plot' got 'doctor'; expected a report of explain"):
        Table("doctor", ("what", "found"), [("a", "b")]).plot(tmp_path / "p.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"plot\(path\) needs matplotlib, .*pip install 'fxprune\[plot\]'"):
        Table("t", ("engine",), []).plot(tmp_path / "p.png")
