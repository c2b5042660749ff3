"""``fxprune.explain``: one row per match, before and after pruning, and the model untouched."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fxprune
from tests.toys import image, mlp, mobile, pruned, rows

COLUMNS = ("layer", "kind", "shape", "pattern", "sparsity", "kernel", "kernel us", "dense us", "decision")


def table(model: nn.Module, x: torch.Tensor, **options: object) -> list[dict[str, str]]:
    return fxprune.explain(model, x, **{"autotune": "off", **options}).to_dict()["rows"]


def dense(model: nn.Module) -> nn.Module:
    """Without the zeros that random integers hold."""
    for parameter in model.parameters():
        parameter.data.masked_fill_(parameter.data == 0, 1.0)
    return model


def test_before_anything_is_pruned() -> None:
    found = table(dense(mobile()), image())
    assert [(r["layer"], r["kind"]) for r in found] == [("dw", "depthwise"), ("pw", "pointwise"), ("fc", "linear")]
    assert all(r["decision"] == "no zeros" and r["kernel"] == "dense" and r["pattern"] == "-" for r in found)
    assert found[0]["shape"] == "2x16x8x8->16x8x8 k3"


def test_what_sparsity_would_do_without_doing_it() -> None:
    model = mobile()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = table(model, image(), sparsity=0.5, min_speedup=0.0)
    assert [r["pattern"] for r in found] == ["dcp", "tile", "tile"]
    assert all(r["decision"].startswith("chosen: ") and float(r["kernel us"]) > 0 for r in found)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_after_pruning_chosen_or_the_reason() -> None:
    model = pruned(mobile(), image(), granularity=8)  # tiles of one layer differ, so every channel is read and stays
    assert [r["kernel"] for r in table(model, image(), min_speedup=0.0)] == ["depthwise_taps", "tile_gemm", "tile_gemm"]
    losers = table(model, image(), min_speedup=100)
    assert all(r["kernel"] == "dense" and r["decision"].startswith("kept dense") for r in losers)
    assert [r["pattern"] for r in losers] == ["dcp", "tile", "tile"]


def test_zeros_that_were_cut_out_are_the_reason() -> None:
    """One tile per layer: what it drops is read by nobody, so the channels go and the layers behind them are full."""
    report = fxprune.explain(pruned(mobile(), image()), image(), autotune="off", min_speedup=100)
    decisions = {row["layer"]: row["decision"] for row in report.to_dict()["rows"]}
    assert decisions["fc"] == "its zeros were cut out with their channels" and "pw" in str(report.summary["cut out"])


def test_measured_times(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (row, _) = table(pruned(mlp(), rows()), rows(), autotune="fast", cache_dir=str(tmp_path), min_speedup=0.0)
    assert float(row["kernel us"]) > 0 and float(row["dense us"]) > 0 and "predicted" not in row["decision"]


def test_summary_and_forms() -> None:
    report = fxprune.explain(pruned(mobile(), image()), image(), autotune="off", min_speedup=0.0)
    assert report.head == COLUMNS
    assert report.summary["matches"] == "1 depthwise, 1 linear, 1 pointwise"
    assert report.summary["depthwise-separable blocks"] == 1 and report.summary["chosen"] == "3 of 3"
    assert json.loads(report.to_json())["rows"][0]["layer"] == "dw"
    assert all(word in str(report) for word in ("dw", "depthwise_taps", "chosen: ", "time in timed matches"))
    assert report.to_markdown().count("\n| ") >= 3


def test_a_model_with_nothing_to_explain() -> None:
    report = fxprune.explain(nn.Sequential(nn.ReLU()), rows())
    assert report.rows == [] and report.summary["matches"] == "none" and "chosen: 0 of 0" in str(report)


def test_graph_breaks_are_explained_together() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(0), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            torch._dynamo.graph_break()
            return self.b(y)

    assert [r["layer"] for r in table(Broken().eval(), rows())] == ["a.0", "a.2", "b"]


def test_training_mode_is_restored_and_options_are_checked() -> None:
    model = mobile().train()
    table(model, image())
    assert model.training and model.bn1.training
    with pytest.raises(fxprune.errors.UnknownOption, match="did you mean 'sparsity'"):
        fxprune.explain(model, image(), sparsty=0.5)
