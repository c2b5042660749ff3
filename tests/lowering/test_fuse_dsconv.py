"""Where a depthwise and a 1x1 convolution become one operator on a GPU: structure on fake tensors, numbers on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fxprune.lowering import fuse_dsconv, measure_fusion
from fxprune.lowering.kernels.cuda import dsconv_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from fxprune.ops.dsconv import samples
from tests.cuda.simulator import library

NAMES = (
    "x", "weight", "taps", "depthwise_bias", "values", "index", "tile_ptr", "columns", "bias", "residual", "kernel_size",
    "stride", "padding", "dilation", "out_features", "granularity", "depthwise_activation", "activation",
)  # fmt: skip
GIVEN = dict(zip(NAMES, next(samples()), strict=True)) | {"depthwise_activation": "relu6", "activation": "relu"}
CALLS = torch.ops.fxprune


def graph_of(
    given: dict[str, Any], dtype: torch.dtype = torch.bfloat16, device: str = "cuda", gate: bool = False, twice: bool = False
) -> tuple[GraphModule, list[Tensor]]:
    """Return the pair as a graph whose metadata is on ``device``, and its inputs on the CPU."""
    graph, mode = Graph(), FakeTensorMode()
    inputs: list[Tensor] = []

    def node(name: str) -> Any:
        value = given[name]
        if not isinstance(value, Tensor):
            return value
        inputs.append(value.to(dtype) if value.is_floating_point() else value)
        made = graph.placeholder(name)
        with mode:
            made.meta["example_value"] = torch.empty(inputs[-1].shape, dtype=inputs[-1].dtype, device=device)
        return made

    n = {name: node(name) for name in NAMES}
    if gate:
        n["gate"] = graph.placeholder("gate")
        inputs.append(torch.ones(given["x"].shape[0], given["x"].shape[1], dtype=dtype))
    window = [n[name] for name in ("kernel_size", "stride", "padding", "dilation")]
    first = [n[name] for name in ("x", "weight", "taps", "depthwise_bias")]
    between = graph.call_function(CALLS.depthwise_taps.default, (*first, *window, n["depthwise_activation"]))
    packed = [n[name] for name in ("values", "index", "tile_ptr", "columns", "bias", "residual")]
    rest = (n.get("gate"), n["out_features"], n["granularity"], 1, n["activation"])
    y = graph.call_function(CALLS.tile_gemm.default, (between, *packed, *rest))
    graph.output((y, between) if twice else y)
    return GraphModule(torch.nn.Module(), graph), inputs


def fuse(gm: GraphModule, times: tuple[float, float] = (1.0, 2.0), **settings: Any) -> int:
    config = SimpleNamespace(autotune="fast", min_speedup=1.02)
    ctx: Any = SimpleNamespace(inference=True, config=config)
    for name, value in settings.items():
        setattr(config if hasattr(config, name) else ctx, name, value)
    return fuse_dsconv.fuse_dsconv(gm, ctx, lambda fused, apart, nodes: times)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_dsconv, "shared_memory", lambda device: 232448)


def targets(gm: GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("number", range(len(list(samples()))))
def test_a_pair_becomes_one_operator(number: int) -> None:
    given = dict(zip(NAMES, list(samples())[number], strict=True))
    gm, inputs = graph_of(given)
    before = gm(*inputs)
    assert fuse(gm) == 1 and targets(gm) == ["fxprune.dsconv.default"]
    gm.graph.lint()
    gm.recompile()
    assert torch.equal(gm(*inputs), before)


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"}, {"dtype": torch.float32}, {"gate": True}, {"twice": True},
        {"given": {**GIVEN, "padding": [0, 0]}}, {"given": {**GIVEN, "stride": [3, 3]}},
        {"given": {**GIVEN, "dilation": [2, 2], "padding": [2, 2]}},
    ],
    ids=("cpu", "float32", "gate", "two users", "padding", "stride", "dilation"),
)  # fmt: skip
def test_other_pairs_stay(change: dict[str, Any]) -> None:
    gm, _ = graph_of(**{"given": GIVEN, **change})
    assert fuse(gm) == 0 and targets(gm) == ["fxprune.depthwise_taps.default", "fxprune.tile_gemm.default"]


@pytest.mark.parametrize(
    "settings", [{"times": (2.0, 1.0)}, {"times": (1.0, 1.01)}, {"inference": False}, {"autotune": "off"}], ids=str
)
def test_only_what_is_measured_faster_is_fused(settings: dict[str, Any]) -> None:
    gm, _ = graph_of(GIVEN)
    assert fuse(gm, **settings) == 0


def test_channels_that_do_not_fit_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = graph_of(GIVEN)
    needed = dsconv_bytes(6, 3, 1)
    monkeypatch.setattr(fuse_dsconv, "shared_memory", lambda device: needed - 1)
    assert fuse(gm) == 0
    monkeypatch.setattr(fuse_dsconv, "shared_memory", lambda device: needed)
    assert fuse(gm) == 1


def test_shared_memory_is_the_kernels_own() -> None:
    for channels in (1, 64, 576, 1152):
        for kernel in (3, 5, 7):
            for stride in (1, 2):
                assert dsconv_bytes(channels, kernel, stride) == library().fxprune_sim_dsconv_bytes(channels, kernel, stride)


def test_timing_uses_real_weights_and_random_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default comparison on the CPU, where both forms run: they are given the same tensors and agree."""
    gm, inputs = graph_of(GIVEN, torch.float32)
    known = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    x = next(iter(known))
    known.pop(x)  # which is computed
    with FakeTensorMode():
        x.meta["example_value"] = torch.empty(inputs[0].shape)
    ctx: Any = SimpleNamespace(
        inference=True, weights=SimpleNamespace(value=known.get), config=SimpleNamespace(autotune="fast", min_speedup=1.0)
    )
    results: list[Tensor] = []

    def interleave(runs: Any, rounds: int) -> Any:
        results.extend(run() for run in runs)
        return [1.0, 2.0], True

    monkeypatch.setattr(measure_fusion, "interleave", interleave)
    node = next(n for n in gm.graph.nodes if n.target is CALLS.tile_gemm.default)
    first = node.args[0]
    args = (
        *first.args[:4], *node.args[1:7], *first.args[4:8], *node.args[8:10], first.args[8], node.args[11],
    )  # fmt: skip
    assert fuse_dsconv._faster(node, args, ctx, measure_fusion.comparer(ctx))
    assert len(results) == 2 and torch.equal(*results) and results[0].any()
