"""What outlives whom: a compiled graph, which Dynamo keeps with the code of a class, keeps no model alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.compiled import CompiledGraph, Variant
from fxprune.decisions import LAST_REPORTS
from tests.oracle import Compiled, assert_exact, compiled
from tests.toys import image, mlp, mobile, pruned, rows, run


def watched(model: nn.Module) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(t) for t in (*model.parameters(), *model.buffers())]


def alive(refs: list[weakref.ref[Any]]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in refs)


def filled(model: nn.Module, _: torch.Tensor) -> nn.Module:
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0)
    return model


def variants(fast: Compiled) -> list[Variant]:
    return [v for g in fast.graphs if isinstance(g, CompiledGraph) for v in g._variants]


@pytest.mark.parametrize("look", [lambda m, x: fxprune.prune(m, x, sparsity=0.5), fxprune.explain], ids=["prune", "explain"])
def test_looking_at_a_model_does_not_keep_it(look: Callable[[nn.Module, Any], Any]) -> None:
    model = mobile()
    refs = watched(model)
    result = look(model, image())
    del model
    assert alive(refs) == 0, result


@pytest.mark.parametrize("sparse", (True, False), ids=["sparse", "dense"])
@pytest.mark.parametrize("training", (False, True), ids=["inference", "training"])
def test_a_model_that_is_dropped_is_freed(training: bool, sparse: bool) -> None:
    model, x = (pruned if sparse else filled)(mobile(), image()), image()
    fast = compiled(model)
    if training:
        fast.call(x).square().mean().backward()
        model.zero_grad()
    else:
        run(fast.call, x)
    assert bool(fast.contexts) == sparse
    graphs, refs = list(fast.graphs), watched(model)
    packs = [weakref.ref(t) for v in variants(fast) for t in v.packs]
    assert len(packs) > 0 or not sparse
    del model, fast
    torch.compiler.reset()  # the module that torch.compile returned
    assert alive(refs) == alive(packs) == 0
    assert [len(g._variants) for g in graphs if isinstance(g, CompiledGraph)] == [0] * len(graphs)
    assert len(LAST_REPORTS) > 0 or not sparse, "what was decided can still be read"


def test_another_model_of_the_class_runs_after_the_first_is_gone() -> None:
    first, x = pruned(mlp(0), rows()), rows()
    fast = compiled(first)
    run(fast.call, x)
    first.load_state_dict(pruned(mlp(1), x).state_dict(), assign=True)  # the old weights die here
    assert variants(fast) == [], "ids of dead weights must not be compared with those of new ones"
    assert_exact(run(fast.call, x), run(first, x))
    assert len(variants(fast)) == 1


def test_only_what_the_graph_reads_is_held() -> None:
    """BatchNorm is folded and channels are cut on the way: neither result is read by the graph."""
    model, x = fxprune.prune(mobile(), image(), sparsity=0.5).model, image()
    fast = compiled(model)
    run(fast.call, x)
    (variant,) = variants(fast)
    assert variant.context is not None and variant.context.counts["fold_batchnorm"]
    weights = variant.context.weights
    held = [weights.value(node) for entry in weights.derived for node in entry.nodes]
    floats = [t for t in held if t is not None and t.is_floating_point()]
    packed = {t.untyped_storage().data_ptr() for t in variant.packs}
    assert {t.untyped_storage().data_ptr() for t in floats if not t.is_meta} <= packed
    assert any(t.is_meta for t in floats), "nothing was released: the test lost its subject"
    with torch.no_grad():
        model.bn1.running_mean.add_(1)  # all of them are made anew
    before = variant.context
    assert_exact(run(fast.call, x), run(model, x))
    assert variants(fast)[0].context is before, "a change of values must not rebuild"
