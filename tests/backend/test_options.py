"""Every option: what is legal, what an illegal value says, and what it does."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune import dump
from fxprune.decisions import LAST_REPORTS
from fxprune.errors import ConfigError, RequireSparse, UnknownOption
from tests.oracle import assert_exact, compiled
from tests.toys import image, mlp, mobile, pruned, rows, run

ROOT = Path(__file__).resolve().parents[2]
LEGAL: dict[str, list[Any]] = {
    "sparsity": [None, 0, 0.5, {"linear": 0.5}, {"fc*": 0.25, "depthwise": 0.0}],
    "target_speedup": [None, 1, 2.5],
    "target_latency_ms": [None, 0.5, 3],
    "max_sparsity": [0.5, 0.99],
    "pattern": ["auto", "tile", "dcp", "channel", "2:4", "block:8x8", {"linear": "tile"}],
    "importance": ["magnitude", "l1", "l2", "random", "taylor", "wanda", lambda name, weight: weight.abs()],
    "seed": [0, 7],
    "ignored_layers": [(), ("fc",), ["*.head"]],
    "group": [1, 32, 7],
    "balance": [True, False],
    "recalibration": ["deprune", "deterministic", "off"],
    "granularity": [None, 8, {"linear": 64}],
    "columns": [None, True, False, {"pointwise": True}],
    "scope": ["layer", "global"],
    "ranking": ["corrected", "published"],
    "apriori": [0, 0.1, 0.5],
    "channel_score": ["l1", "l2", "fpgm"],
    "min_speedup": [0, 1.02, 100],
    "autotune": ["fast", "full", "off"],
    "cache_dir": [None, "folder"],
    "freeze": [True, False],
    "require_sparse": [True, False],
    "fallback": ["inductor", "eager"],
    "verify": [True, False],
    "dump": [None, "folder"],
    "tolerance": [0, 1e-3, 1],
    "mode": [None, "default", "max-autotune"],
    "inductor": [{}, {"max_autotune": True}],
    "tensorrt": [{}, {"min_block_size": 1}],
    "grad_sparsity": [None, "off", "2:4", "1:32", "4:4", "auto", "auto:4:8", {0: "off", 100: "2:4"}, {}],
    "grad_pruning": ["magnitude", "rescaled_magnitude", "group_rescaled_magnitude", "random", "mvue"],
    "grad_target": ["dX", "dW", "both"],
}
NAN = float("nan")
ILLEGAL: dict[str, list[Any]] = {
    "sparsity": [1.0, -0.1, NAN, "half", True, {"linear": 1.5}, {"linear": None}, {3: 0.5}],
    "target_speedup": [0, 0.9, -2.0, NAN, "2x", True],
    "target_latency_ms": [0, -1.0, NAN, "3 ms", True],
    "max_sparsity": [0, 0.0, 1, 1.0, 1.5, NAN, None, True],
    "pattern": [5, None, {"pool": "tile"}, {"linear": 3}],
    "importance": ["tailor", 3, None],
    "seed": [-1, 1.5, True, None],
    "ignored_layers": ["fc", (3,)],
    "group": [0, -1, 1.5, True, None],
    "balance": ["yes", 1, None],
    "recalibration": ["on", "auto", True, None],
    "granularity": [0, "64", True, {"pool": 8}, {"linear": 0}],
    "columns": ["yes", 1, {"pool": True}],
    "scope": ["model", None],
    "ranking": ["best", None],
    "apriori": [-0.1, 0.6, NAN, "a", True],
    "channel_score": ["L2", 2, None],
    "min_speedup": [-1, NAN, "fast", True, None],
    "autotune": ["on", True, None],
    "cache_dir": [3, True],
    "freeze": ["no", 0],
    "require_sparse": ["no", 1],
    "fallback": ["aot_eager", None],
    "verify": [None, "yes"],
    "dump": [True, 3],
    "tolerance": [-1e-3, 2, NAN],
    "mode": ["fastest", 3],
    "inductor": [None, "max_autotune", [("a", 1)]],
    "tensorrt": [None, "dryrun"],
    "grad_sparsity": [
        "3:2",
        "2:33",
        "0:4",
        "-1:4",
        "2-4",
        "auto:4",
        "",
        2,
        0.5,
        True,
        {"0": "2:4"},
        {-1: "2:4"},
        {0: 1},
    ],
    "grad_pruning": ["largest", None, 1],
    "grad_target": ["dB", None],
}
FIELDS = [f.name for f in dataclasses.fields(fxprune.Config)]


def test_the_tables_cover_every_field() -> None:
    assert sorted(LEGAL) == sorted(ILLEGAL) == sorted(FIELDS)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in FIELDS for v in LEGAL[n]])
def test_legal_value(name: str, value: Any) -> None:
    given = getattr(fxprune.Config.from_options({name: value}), name)
    assert given == (tuple(value) if name == "ignored_layers" else value)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in FIELDS for v in ILLEGAL[n]], ids=repr)
def test_illegal_value_names_option_and_expectation(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"option ['\"]{name}.*['\"] got .*; expected .+\.$") as caught:
        fxprune.Config.from_options({name: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("wrong", "right"), [("sparsty", "sparsity"), ("min_speed", "min_speedup"), ("auto_tune", "autotune"), ("skip", None)]
)
def test_unknown_option_names_the_nearest(wrong: str, right: str | None) -> None:
    with pytest.raises(UnknownOption, match=f"unknown option '{wrong}'; did you mean '{right or ''}") as caught:
        fxprune.prune(mlp(), rows(), sparsity=0.5, **{wrong: 1})
    assert all(name in str(caught.value) for name in FIELDS)


def test_an_error_in_the_options_leaves_torch_compile() -> None:
    for options, word in (({"sparsty": 0.5}, "sparsity"), ({"sparsity": 2.0}, "expected a fraction")):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=word):
            run(torch.compile(mlp(), backend="hwprune", options=options), rows())


def test_config_is_frozen_and_by_kind() -> None:
    config = fxprune.Config(pattern={"linear": "tile"}, granularity=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.group = 3  # type: ignore[misc]
    assert config.by_kind("pattern", "linear") == "tile" and config.by_kind("pattern", "depthwise") is None
    assert config.by_kind("granularity", "depthwise") == 8


def test_sparsity_prunes_inside_and_leaves_the_users_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    fast = compiled(model, sparsity=0.5)
    with caplog.at_level(logging.INFO, logger="fxprune"):
        given = run(fast.call, rows())
    assert_exact(given, run(fxprune.prune(model, rows(), sparsity=0.5).model, rows()))
    assert not torch.equal(given, run(model, rows()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "2 of 2 matches run sparse kernels (2 hold zeros)" in caplog.text


def test_sparsity_inside_compile_follows_kinds_and_globs() -> None:
    fast = compiled(mobile(), sparsity={"depthwise": 80 / 144, "fc": 0.25})
    run(fast.call, image())
    achieved = {d.match.name: d.sparsity for d in fast.contexts[0].decisions if d.mask is not None}
    assert achieved == {"dw": pytest.approx(80 / 144), "fc": pytest.approx(0.25, abs=0.05)}


def test_require_sparse_names_the_dense_layers() -> None:
    with pytest.raises(Exception, match=r"1 pruned layer\(s\) stay dense: 0 \(kept dense"):
        run(compiled(pruned(mlp(), rows(), ignored_layers=("2",)), require_sparse=True, min_speedup=100).call, rows())
    torch._dynamo.reset()
    model = pruned(mlp(), rows())
    assert_exact(run(compiled(model, require_sparse=True).call, rows()), run(model, rows()))


def test_require_sparse_is_a_class_of_its_own() -> None:
    from fxprune import backend
    from fxprune.capture import capture

    (graph,) = capture(pruned(mlp(), rows()), rows())
    with pytest.raises(RequireSparse), torch.no_grad():
        backend.hwprune(graph.gm, graph.inputs, options={"require_sparse": True, "min_speedup": 100, "autotune": "off"})


@pytest.mark.usefixtures("uncut")
def test_min_speedup_out_of_reach_keeps_everything_dense_with_reasons() -> None:
    model = pruned(mobile(), image())
    fast = compiled(model, min_speedup=100)
    assert_exact(run(fast.call, image()), run(model, image()))
    decisions = LAST_REPORTS[-1].decisions
    assert [d.chosen for d in decisions] == [False] * 3 and not fast.contexts
    assert all("kept dense" in d.reason and "x of dense" in d.reason for d in decisions)


def test_dump_writes_numbered_graphs_that_run(tmp_path: Path) -> None:
    model = pruned(mobile(), image())
    expected = run(model, image())
    assert_exact(run(compiled(model, dump=str(tmp_path)).call, image()), expected)
    folder = tmp_path / "graph-1"
    names = sorted(p.name for p in folder.glob("*.py"))
    assert names[0] == "00-captured.py"
    for stage in ("normalize", "fold_batchnorm", "rewrite_depthwise", "rewrite_gemm", "form_regions"):
        (before,) = [n for n in names if n.endswith(f"-{stage}.before.py")]
        after = before.replace("before", "after")
        assert before[:2].isdigit() and after in names
        assert (folder / before).read_text() != (folder / after).read_text()
    assert not any("match" in n for n in names), "a pass that changes nothing writes nothing"
    for name in names:
        forward = runpy.run_path(str(folder / name))["forward"]
        assert_exact(dump.run(forward, str(folder / name))[0], expected)
    assert "fxprune.region" in (folder / names[-2]).read_text()


def test_a_dumped_graph_is_a_script(tmp_path: Path) -> None:
    model = pruned(mlp(), rows())
    expected = run(compiled(model, dump=str(tmp_path)).call, rows())
    (last,) = (tmp_path / "graph-1").glob("*-rewrite_gemm.after.py")
    printed = subprocess.run([sys.executable, str(last)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"{expected[0, 0].item():.4e}" in printed.stdout or f"{expected[0, 0].item():.0f}." in printed.stdout


def test_dump_of_two_graphs_and_of_another_compile(tmp_path: Path) -> None:
    run(compiled(mlp(), dump=str(tmp_path)).call, rows())
    torch._dynamo.reset()
    run(compiled(mlp(), dump=str(tmp_path)).call, rows())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph-1", "graph-2"]
    assert (tmp_path / "graph-2" / "00-captured.py").is_file()


def test_fallback_eager_runs_no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.lowering import codegen

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Inductor was called")

    monkeypatch.setattr(codegen, "compile_fx", refuse)
    for model in (pruned(mlp(), rows()), mlp(1)):
        assert_exact(run(compiled(model).call, rows()), run(model, rows()))


PASSED_ON = [{}, {"mode": "max-autotune-no-cudagraphs"}, {"inductor": {"epilogue-fusion": False}}]


@pytest.mark.parametrize("options", PASSED_ON, ids=repr)
def test_inductor_and_its_options_reach_it(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.lowering import codegen

    seen: list[dict[str, Any]] = []
    real = codegen.compile_fx

    def spy(*args: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return real(*args, config_patches=config_patches)

    monkeypatch.setattr(codegen, "compile_fx", spy)
    model = pruned(mlp(), rows())
    fast = torch.compile(model, backend="hwprune", options={"autotune": "off", "min_speedup": 0.0, **options})
    assert_exact(run(fast, rows()), run(model, rows()))
    assert seen[0].get("max_autotune", False) == ("mode" in options)
    assert seen[0].get("epilogue_fusion", True) == ("inductor" not in options)


def test_torch_compiles_own_mode_argument() -> None:
    model = pruned(mlp(), rows())
    fast = torch.compile(model, backend="hwprune", mode="reduce-overhead")
    torch.testing.assert_close(run(fast, rows()), run(model, rows()))


@pytest.mark.parametrize("training", [False, True])
def test_verify_passes_on_right_graphs(training: bool) -> None:
    model = pruned(torch.nn.Sequential(mlp(), torch.nn.Dropout(0.5)), rows()).train(training)
    fast = compiled(model, verify=True)
    assert fast.call(rows()).requires_grad and (fast.contexts or training)


def test_decisions_are_in_torch_logs_and_torch_trace(tmp_path: Path) -> None:
    code = """
import torch, fxprune
fxprune.register()
model = torch.nn.Linear(64, 64)
model = fxprune.prune(model, torch.ones(2, 64), sparsity=0.5, columns=False).model
options = {"autotune": "off", "min_speedup": 0.0, "fallback": "eager"}
with torch.no_grad():
    torch.compile(model, backend="hwprune", options=options)(torch.ones(2, 64))
"""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "TORCH_LOGS": "+fxprune", "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "matches run sparse kernels" in done.stderr and "-> tile_gemm" in done.stderr
    traced = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "fxprune_decisions" in traced and "-> tile_gemm" in traced
