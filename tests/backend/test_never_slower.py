"""What is not faster stays dense, with the reason; times are kept on disk and a broken file is no harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.lowering import codegen, measure
from torch import nn

from fxprune import pipeline
from fxprune.capture import capture
from fxprune.config import Config
from fxprune.context import Decision, Timing
from fxprune.decisions import LAST_REPORTS, describe
from tests.oracle import assert_exact, compiled, integer_model, integers, zero_some
from tests.toys import image, mlp, mobile, pruned, rows, run

pytestmark = pytest.mark.usefixtures("uncut")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the clock: microseconds (sparse, dense, dense feature-major) by kind or layer name."""

    def use(**times: tuple[float, float, float]) -> None:
        class Fake:
            seconds = 0.0

            def __init__(self, *_: Any) -> None: ...

            def __call__(self, match: Any, mask: Any) -> Timing:
                return Timing(*times.get(match.name, times.get(match.kind)), measured=True)  # type: ignore[misc]

            predict = __call__

        monkeypatch.setattr(pipeline, "Measure", Fake)

    return use


def decided(model: torch.nn.Module, x: torch.Tensor, **options: Any) -> dict[str, Decision]:
    """Compile, check the numbers, and return the decisions by layer."""
    fast = compiled(model, min_speedup=options.pop("min_speedup", 1.02), **options)
    assert_exact(run(fast.call, x), run(model, x))
    return {d.match.name: d for d in LAST_REPORTS[-1].decisions}


@pytest.mark.parametrize(("sparse", "chosen"), [(50.0, True), (98.0, True), (98.1, False), (100.0, False), (200.0, False)])
def test_linear_layers_decide_alone_at_min_speedup(timed: Callable[..., None], sparse: float, chosen: bool) -> None:
    timed(**{"0": (sparse, 100.0, 100.0), "2": (10.0, 100.0, 100.0)})
    found = decided(pruned(mlp(), rows()), rows())
    assert found["0"].chosen is chosen and found["2"].chosen
    assert found["0"].reason == ("" if chosen else "kept dense: ") + f"{100 / sparse:.2f}x of dense"
    assert found["0"].kernel == ("tile_gemm" if chosen else "dense")


def test_a_region_wins_or_loses_as_a_whole(timed: Callable[..., None]) -> None:
    model = pruned(mobile(), image())
    timed(dw=(10.0, 20.0, 20.0), pw=(40.0, 20.0, 30.0), linear=(1.0, 2.0, 2.0))
    found = decided(model, image())  # ours 10 + 30, dense 20 + 20: not faster
    assert [found[n].chosen for n in ("dw", "pw", "fc")] == [False, False, True]
    assert found["dw"].reason == "kept dense: its region of 2 layers reaches 1.00x of dense"
    timed(dw=(5.0, 20.0, 20.0), pw=(40.0, 20.0, 30.0), linear=(3.0, 2.0, 2.0))
    found = decided(model, image())  # ours 5 + 30, dense 40
    assert [found[n].chosen for n in ("dw", "pw", "fc")] == [True, False, False]
    assert found["pw"].reason == "kept dense in its feature-major region: 0.50x of dense"


def settings(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """What Inductor is told about the graph that it gets."""
    (graph,) = capture(model, (x,))
    with torch.no_grad():
        clone, _, _ = pipeline.rewrite(graph.gm, graph.inputs, Config(min_speedup=1.02))
    return codegen.patches(clone.graph, Config())


def test_dense_convolutions_keep_stocks_layout_beside_linear_layers_of_ours(timed: Callable[..., None]) -> None:
    timed(dw=(10.0, 20.0, 20.0), pw=(40.0, 20.0, 30.0), linear=(1.0, 2.0, 2.0))
    beside_dense = settings(pruned(mobile(), image()), image())
    assert "layout_optimization" not in beside_dense and beside_dense["size_asserts"] is False
    timed(dw=(5.0, 20.0, 20.0), pw=(40.0, 20.0, 30.0), linear=(3.0, 2.0, 2.0))
    assert settings(pruned(mobile(), image()), image())["layout_optimization"] is False


class Channels(nn.Module):
    """A depthwise convolution and two linear layers between permutes that would cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(self.dw(x).permute(0, 2, 3, 1))))
        return y.permute(0, 3, 1, 2) + x


@pytest.mark.parametrize(("up", "stays"), [(47.0, True), (48.0, False)])
def test_linear_layers_between_permutes_are_decided_with_their_region(
    timed: Callable[..., None], up: float, stays: bool
) -> None:
    model, x = zero_some(integer_model(Channels())), integers(2, 16, 5, 6, seed=6)
    timed(dw=(1.0, 30.0, 30.0), up=(up, 20.0, 20.0), down=(5.0, 20.0, 20.0))
    found = decided(model, x)  # the two together stay up to 1.3 times 20 + 20
    assert [found[n].chosen for n in ("dw", "up", "down")] == [True, stays, stays]
    timed(dw=(30.0, 10.0, 30.0), up=(up, 20.0, 40.0), down=(5.0, 20.0, 40.0))
    assert not any(d.chosen for d in decided(model, x).values())  # ours 30 + 40 + 5, dense 10 + 20 + 20


def test_an_unpruned_convolution_joins_a_winning_region(timed: Callable[..., None]) -> None:
    model = pruned(mobile(), image(), ignored_layers=("pw", "fc"))
    with torch.no_grad():
        for layer in (model.pw, model.fc):
            layer.weight.masked_fill_(layer.weight == 0, 1.0)
    timed(dw=(5.0, 20.0, 20.0), pw=(15.0, 20.0, 30.0), fc=(120.0, 30.0, 30.0))
    found = decided(model, image())
    assert found["dw"].chosen and found["pw"].chosen and found["pw"].mask is None
    assert found["pw"].reason.startswith("no zeros, joins its feature-major region")
    assert not found["fc"].chosen and found["fc"].reason == "no zeros, one row per image beside the region: 0.25x of dense"


@pytest.mark.parametrize(("ours", "joins"), [(10.0, True), (105.0, True), (115.0, False)])
def test_an_unpruned_classifier_joins_when_it_costs_less_than_a_call(
    timed: Callable[..., None], ours: float, joins: bool
) -> None:
    model = pruned(mobile(), image(), ignored_layers=("fc",))
    timed(dw=(5.0, 20.0, 20.0), pw=(5.0, 20.0, 30.0), fc=(ours, 30.0, 30.0))
    found = decided(model, image())
    assert found["fc"].chosen == joins and found["fc"].mask is None


def test_a_loser_leaves_nothing_sparse_in_the_graph(timed: Callable[..., None]) -> None:
    timed(depthwise=(9.0, 1.0, 1.0), pointwise=(9.0, 1.0, 1.0), linear=(9.0, 1.0, 1.0))
    model = pruned(mobile(), image())
    fast = compiled(model, min_speedup=1.02)
    assert_exact(run(fast.call, image()), run(model, image()))
    assert not fast.contexts, "the graph went to the stock compiler untouched"
    for decision in LAST_REPORTS[-1].decisions:
        assert "dense: kept dense" in describe(decision) and decision.match.name in describe(decision)


def test_predictions_say_so(timed: Callable[..., None]) -> None:
    found = decided(pruned(mlp(), rows()), rows(), min_speedup=0.0, autotune="off")
    assert all(d.reason.endswith("(predicted)") and d.timing and not d.timing.measured for d in found.values())


def timings(folder: Path) -> list[Path]:
    return sorted(folder.glob("timings-*.json"))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is really measured."""
    seen: list[str] = []
    real = measure.Measure._time

    def spy(self: Any, match: Any, *rest: Any) -> tuple[list[float], bool]:
        seen.append(match.name)
        return real(self, match, *rest)[0], True  # a busy machine does not settle, and what is unsettled is not kept

    monkeypatch.setattr(measure.Measure, "_time", spy)
    return seen


def test_times_are_measured_once_and_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, model = counted(monkeypatch), pruned(mlp(), rows())
    for _ in range(2):
        torch._dynamo.reset()
        decided(model, rows(), autotune="fast", cache_dir=str(tmp_path))
    assert seen == ["0", "2"]
    (path,) = timings(tmp_path)
    stored = json.loads(path.read_text())
    assert len(stored) == 2 and all(len(v) == 3 and min(v) > 0 for v in stored.values())
    assert f"{torch.get_num_threads()}t" in path.name and torch.__version__.replace("+", "_") in path.name
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


def test_another_shape_or_thread_count_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, model, threads = counted(monkeypatch), pruned(mlp(), rows()), torch.get_num_threads()
    decided(model, rows(4), autotune="fast", cache_dir=str(tmp_path))
    torch._dynamo.reset()
    decided(model, rows(6), autotune="fast", cache_dir=str(tmp_path))
    torch._dynamo.reset()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        decided(model, rows(4), autotune="fast", cache_dir=str(tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 6 and len(timings(tmp_path)) == 2


BROKEN = ["", "{", "[]", "null", '{"a": 1}', '{"a": [1, 2]}', '{"a": [-1, 2, 3]}', '{"a": ["x", 1, 2]}', "\x00\x01"]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_corrupted_cache_is_ignored_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    seen, model = counted(monkeypatch), pruned(mlp(), rows())
    decided(model, rows(), autotune="fast", cache_dir=str(tmp_path))
    (path,) = timings(tmp_path)
    path.write_text(content)
    torch._dynamo.reset()
    decided(model, rows(), autotune="fast", cache_dir=str(tmp_path))
    assert seen == ["0", "2"] * 2 and len(json.loads(path.read_text())) == 2


def test_a_folder_that_cannot_be_written_is_no_harm(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    decided(pruned(mlp(), rows()), rows(), autotune="fast", cache_dir=str(blocked))
    assert blocked.read_text() == "not a folder"
