"""Where the depthwise kernel of a GPU takes the mean of its planes: structure on fake tensors, numbers on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fxprune.lowering import measure_fusion
from fxprune.lowering.fuse_pool import _faster, fuse_pool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from fxprune.ops.depthwise_taps import samples

aten = torch.ops.aten
DEPTHWISE = torch.ops.fxprune.depthwise_taps.default


def graph_of(dims: list[int], keepdim: bool, device: str = "cuda") -> tuple[GraphModule, list[Tensor]]:
    """Return depthwise -> (mean, result) with metadata on ``device``, and its inputs on the CPU."""
    graph, mode, args = Graph(), FakeTensorMode(), next(samples())
    inputs = [a for a in args if isinstance(a, Tensor)]
    nodes = [graph.placeholder(f"input{i}") for i in range(len(inputs))]
    with mode:
        for node, value in zip(nodes, inputs, strict=True):
            node.meta["example_value"] = torch.empty(value.shape, dtype=value.dtype, device=device)
        made = iter(nodes)
        given = [next(made) if isinstance(a, Tensor) else a for a in args]
        y = graph.call_function(DEPTHWISE, tuple(given))
        y.meta["example_value"] = DEPTHWISE(*[g.meta["example_value"] if hasattr(g, "meta") else g for g in given])
        mean = graph.call_function(aten.mean.dim, (y, dims, keepdim))
        mean.meta["example_value"] = aten.mean.dim(y.meta["example_value"], dims, keepdim)
    graph.output((mean, y))
    return GraphModule(torch.nn.Module(), graph), inputs


def context(**settings: Any) -> Any:
    config = SimpleNamespace(autotune=settings.pop("autotune", "fast"), min_speedup=1.02)
    return SimpleNamespace(**{"inference": True, "config": config, **settings})


def fuse(gm: GraphModule, times: tuple[float, float] = (1.0, 2.0), **settings: Any) -> int:
    return fuse_pool(gm, context(**settings), lambda fused, apart, nodes: times)


def targets(gm: GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("keepdim", (False, True))
@pytest.mark.parametrize("dims", ([2, 3], [-1, -2]))
def test_the_mean_comes_from_the_kernel(dims: list[int], keepdim: bool) -> None:
    gm, inputs = graph_of(dims, keepdim)
    before = gm(*inputs)
    assert fuse(gm) == 1
    assert "fxprune.depthwise_pool.default" in targets(gm) and "aten.mean.dim" not in targets(gm)
    assert str(DEPTHWISE) not in targets(gm)
    gm.graph.lint()
    gm.recompile()
    for got, expected in zip(gm(*inputs), before, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_other_means_stay() -> None:
    for gm, _ in (graph_of([2], True), graph_of([1, 2], False), graph_of([2, 3], True, "cpu")):
        assert fuse(gm) == 0 and "aten.mean.dim" in targets(gm)


@pytest.mark.parametrize(
    "settings", [{"times": (2.0, 1.0)}, {"times": (1.0, 1.01)}, {"inference": False}, {"autotune": "off"}], ids=str
)
def test_only_what_is_measured_faster_is_fused(settings: dict[str, Any]) -> None:
    gm, _ = graph_of([2, 3], True)
    assert fuse(gm, **settings) == 0


def test_both_forms_that_are_timed_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, inputs = graph_of([2, 3], False, "cpu")
    known = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    results: list[Any] = []

    def interleave(runs: Any, rounds: int) -> Any:
        results.extend(run() for run in runs)
        return [1.0, 2.0], True

    monkeypatch.setattr(measure_fusion, "interleave", interleave)
    ctx = context(weights=SimpleNamespace(value=known.get))
    node = next(n for n in gm.graph.nodes if n.target is DEPTHWISE)
    mean = next(n for n in gm.graph.nodes if n.target is aten.mean.dim)
    assert _faster(node, mean, ctx, measure_fusion.comparer(ctx))
    torch.testing.assert_close(results[0][1], results[1], rtol=1e-6, atol=1e-6)
