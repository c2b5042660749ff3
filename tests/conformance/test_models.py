"""Real architectures: what is detected, that no zeros means no rewrite, and that each pattern equals the masked model."""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import fxprune
from fxprune import backend, pipeline
from fxprune.capture import Captured, capture, detect
from fxprune.config import Config
from tests.oracle import FORCED, assert_close_fp64, operators, widened

fxprune.register()
TABLE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "matches.json").read_text())
NAMES = sorted(n for n in TABLE if n in (*zoo.VISION, *zoo.BERT))
SIDE = 64
KERNELS = ("depthwise_taps", "tile_gemm", "tile_conv", "permute", "transpose", "conv2d")


@functools.cache
def model(name: str) -> nn.Module:
    return zoo.build(name)[0]


def inputs(name: str, batch: int) -> tuple[Tensor, ...]:
    """Small images: the architectures are the same at any size."""
    given = zoo.build(name)[1](batch) if name in zoo.BERT else zoo.images(batch)
    return tuple(t[..., :SIDE, :SIDE] if t.dim() == 4 else t[:, :16] for t in given)


@functools.cache
def pruned(name: str) -> nn.Module:
    return fxprune.prune(model(name), inputs(name, 1), sparsity=0.75).model


def output(call: Any, args: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return call(*args)


def exact(network: nn.Module, args: tuple[Tensor, ...]) -> Any:
    return output(copy.deepcopy(network).double(), tuple(t.double() if t.is_floating_point() else t for t in args))


@functools.cache
def dense_graphs(name: str) -> list[Captured]:
    return capture(model(name), inputs(name, 2))


def handed(graph: Captured, **options: Any) -> Any:
    """The output of a graph that is handed to the backend as Dynamo hands it over, without being traced anew."""
    with torch.no_grad():
        return backend.hwprune(graph.gm, graph.inputs, options={**FORCED, **options})(*graph.inputs)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_matches_and_blocks(name: str) -> None:
    kinds: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    graphs = dense_graphs(name)
    for graph in graphs:
        context = detect(graph, Config())
        kinds.update(m.kind for m in context.matches)
        blocks.update(b.kind for b in context.blocks)
        blocks["squeeze_excite"] += sum(b.squeeze_excite for b in context.blocks)
        blocks["residual"] += sum(b.residual for b in context.blocks)
    found = {"graphs": len(graphs), "matches": dict(kinds), "blocks": {k: v for k, v in blocks.items() if v}}
    assert found == TABLE[name]["detect"], f"{name}: {json.dumps(found)}"


@pytest.mark.parametrize("name", NAMES)
def test_without_zeros_nothing_is_rewritten(name: str) -> None:
    """`test_more_models.py` has whole models compiled before they hold zeros."""
    for graph in dense_graphs(name):
        given, expected = handed(graph, min_speedup=1.02), output(graph.gm, graph.inputs)
        for a, b in zip(leaves(given), leaves(expected), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            clone, _, changed = pipeline.rewrite(graph.gm, graph.inputs, Config(**{**FORCED, "min_speedup": 1.02}))
        assert not changed and not any("fxprune" in str(n.target) for n in clone.graph.nodes)


@pytest.mark.parametrize("name", NAMES)
def test_one_image_runs_our_kernels_and_equals_masked_dense(name: str) -> None:
    (graph,) = capture(pruned(name), inputs(name, 1))
    with torch.no_grad():
        clone, context, _ = pipeline.rewrite(graph.gm, graph.inputs, Config(**FORCED))
    counts = {k: v for k, v in operators(clone).items() if k in KERNELS}
    assert counts == TABLE[name]["pruned"], f"{name}: {json.dumps(counts)}"
    left = [d.match.name for d in context.decisions if d.mask is not None and not d.chosen]
    assert not left, f"{name}: pruned and dense: {left}"
    expected, wide = output(graph.gm, graph.inputs), output(graph.gm, widened(graph.inputs))
    assert_close_fp64(handed(graph), expected, wide, tolerance=1e-4, repro=f"{name}, batch 1")


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_masked_dense(name: str) -> None:
    network, args = pruned(name), inputs(name, 3)
    fast = torch.compile(network, backend="hwprune", options=FORCED)
    expected = output(network, args)
    given = output(fast, args)
    assert_close_fp64(given, expected, exact(network, args), tolerance=1e-4, repro=f"{name}, batch 3")


def test_no_transpose_is_added_to_bert_and_none_stays_in_convnext() -> None:
    for name in ("bert_tiny", "convnext_tiny"):
        (graph,) = dense_graphs(name)
        before = operators(graph.gm)
        after = TABLE[name]["pruned"]
        transposes = before["permute"] + before["transpose"]
        assert after.get("permute", 0) + after.get("transpose", 0) <= transposes
        if name == "convnext_tiny":  # two around each of 18 blocks before
            assert transposes >= 36 and after.get("permute", 0) <= transposes - 36


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert_tiny", "mobilenetv3_small_100"])
def test_with_inductor(name: str) -> None:
    network, args = pruned(name), inputs(name, 3)
    fast = torch.compile(network, backend="hwprune", options={"autotune": "off", "min_speedup": 0.0})
    assert_close_fp64(output(fast, args), output(network, args), exact(network, args), tolerance=1e-3, repro=name)


def leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]
