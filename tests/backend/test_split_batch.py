"""A symbolic batch whose small sizes want other kernels than its large ones: two builds of ours, no compile of Dynamo's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxprune.lowering import codegen
from fxprune.passes import split_batch as split_module
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fxprune
from fxprune import backend, pipeline
from fxprune.compiled import CompiledGraph
from fxprune.context import Timing
from fxprune.match import Match
from tests.oracle import Compiled, assert_exact, compiled, integer_model, integers, zero_some
from tests.toys import image, mobile, pruned, rows, run


def deep(seed: int = 0) -> nn.Module:
    """Two layers with zeros, of which none empties a row or a column, and a head without."""
    layers = (nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    model = integer_model(nn.Sequential(*layers), seed)
    zero_some(model[:3], seed, step=1)
    return model


ORDER = sorted(range(2, 65), key=lambda batch: (batch * 37) % 64)  # every batch size, small and large in turns


def timed(monkeypatch: pytest.MonkeyPatch, micros: Callable[[Match, int], tuple[float, float]]) -> list[int]:
    """Replace times by ``micros(match, batch)``, sparse and dense; returns the batch sizes that get measured."""
    measured: list[int] = []

    class Fake:
        seconds = 0.0

        def __init__(self, *_: object) -> None:
            return

        def predict(self, match: Match, mask: object) -> Timing:
            batch = match.geometry.x[0]
            sparse, dense = micros(match, getattr(getattr(batch, "node", None), "hint", batch))
            return Timing(sparse, dense, dense, measured=False)

        def __call__(self, match: Match, mask: object) -> Timing:
            measured.append(match.geometry.x[0])
            return self.predict(match, mask)

    monkeypatch.setattr(pipeline, "Measure", Fake)
    return measured


def below(threshold: int) -> Callable[[Match, int], tuple[float, float]]:
    """Sparse wins at batch sizes below ``threshold``."""
    return lambda _, batch: (1.0, 2.0) if batch < threshold else (2.0, 1.0)


def dynamic_call(model: nn.Module, first: Tensor, **options: Any) -> Compiled:
    """Compile with the first dimension marked symbolic, and call once."""
    fast = compiled(model, **{"min_speedup": 1.0, **options})
    torch._dynamo.mark_dynamic(first, 0)
    assert_exact(run(fast.call, first), run(model, first))
    return fast


def variants(fast: Compiled) -> list[Any]:
    (graph,) = fast.graphs
    assert isinstance(graph, CompiledGraph)
    return graph._variants


def chosen(variant: Any) -> list[bool]:
    return [] if variant.context is None else [d.chosen for d in variant.context.decisions]


def builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that grows by the context of every rewrite."""
    seen: list[Any] = []
    real = backend.rewrite

    def spy(*args: Any) -> Any:
        result = real(*args)
        seen.append(result[1])
        return result

    monkeypatch.setattr(backend, "rewrite", spy)
    return seen


@pytest.mark.parametrize("threshold", [3, 17, 40])
def test_every_batch_with_two_builds(monkeypatch: pytest.MonkeyPatch, threshold: int) -> None:
    model = deep()
    measured, built = timed(monkeypatch, below(threshold)), builds(monkeypatch)
    fast = dynamic_call(model, rows(9))
    for batch in ORDER:
        assert_exact(run(fast.call, rows(batch)), run(model, rows(batch)), f"batch {batch}, threshold {threshold}")
    assert len(fast.graphs) == 1, "Dynamo compiled again"
    assert len(built) == 2 and len(variants(fast)) == 2
    sides = {v.side.above: v for v in variants(fast)}
    assert chosen(sides[False])[:2] == [True, True] and sides[True].context is None
    assert {v.side.threshold for v in sides.values()} == {threshold}
    assert set(measured) == {v.side.decided_at for v in sides.values()}
    assert sides[False].side.decided_at < threshold <= sides[True].side.decided_at
    assert [str(c.side).partition(",")[0] for c in built].count(f"batches below {threshold}") == 1


@pytest.mark.parametrize("threshold", [6, 30])
def test_convolutions(monkeypatch: pytest.MonkeyPatch, threshold: int) -> None:
    """Dynamo itself compiles a convolution twice, for batch sizes below 16 and from there on: one of the two splits."""
    model = pruned(mobile(), image())
    plain = CompileCounter()
    stock = torch.compile(model, backend=plain)
    x = image(4)
    torch._dynamo.mark_dynamic(x, 0)
    for data in (x, *map(image, ORDER)):
        run(stock, data)
    torch._dynamo.reset()
    timed(monkeypatch, below(threshold))
    built = builds(monkeypatch)
    fast = dynamic_call(model, image(4))
    for batch in ORDER:
        assert_exact(run(fast.call, image(batch)), run(model, image(batch)), f"batch {batch}, threshold {threshold}")
    assert len(fast.graphs) == plain.frame_count
    sides = [v.side for g in fast.graphs for v in g._variants]
    assert len(built) == len(sides) == plain.frame_count + 1
    assert sorted(s.above for s in sides if s is not None) == [False, True]
    assert {s.threshold for s in sides if s is not None} == {threshold}


def test_batch_one_and_more_than_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles batch 1 by itself, decided at 1; what is above 64 belongs to the upper side."""
    model = deep()
    timed(monkeypatch, below(9))
    fast = compiled(model, min_speedup=1.0)
    for batch in (1, 5, 65, 1, 200, 8):
        assert_exact(run(fast.call, rows(batch)), run(model, rows(batch)), f"batch {batch}")
    assert [[v.side is None for v in g._variants] for g in fast.graphs] == [[True], [False, False]]


def test_layers_decide_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer wins at small batch sizes, the other at large ones; both sides are sparse graphs."""

    def micros(match: Match, batch: int) -> tuple[float, float]:
        sparse, dense = below(20)(match, batch)
        return (sparse, dense) if match.name == "0" else (dense, sparse)

    model = deep()
    timed(monkeypatch, micros)
    fast = dynamic_call(model, rows(40))
    for batch in (3, 19, 20, 64):
        assert_exact(run(fast.call, rows(batch)), run(model, rows(batch)), f"batch {batch}")
    assert {v.side.above: chosen(v)[:2] for v in variants(fast)} == {True: [False, True], False: [True, False]}


def test_weights_change_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    timed(monkeypatch, lambda m, batch: (1.0, 2.0) if m.name == "0" else below(10)(m, batch))
    fast = dynamic_call(model, rows(4))

    def agree(what: str) -> None:
        for batch in (5, 30, 6):
            assert_exact(run(fast.call, rows(batch)), run(model, rows(batch)), f"{what}, batch {batch}")
        assert len(fast.graphs) == 1

    agree("first")
    contexts = [v.context for v in variants(fast)]
    with torch.no_grad():
        model[0].weight.mul_(2)
    agree("values")
    assert [v.context for v in variants(fast)] == contexts, "a change of values must not rebuild"
    with torch.no_grad():
        model[0].weight[:, :5] = 1.0
    agree("support")
    assert len(variants(fast)) == 2 and not any(v.context is c for v in variants(fast) for c in contexts)
    model[2].weight.data.mul_(-1)
    assert fxprune.refresh(model) == 1
    agree("data and refresh")
    model.load_state_dict(deep(3).state_dict(), assign=True)
    agree("other weights")
    assert len(variants(fast)) == 2, "those of the weights that are gone went with them"


def test_a_threshold_that_moves_leaves_two_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    timed(monkeypatch, below(10))
    fast = dynamic_call(model, rows(4))
    assert_exact(run(fast.call, rows(30)), run(model, rows(30)))
    timed(monkeypatch, below(25))
    with torch.no_grad():
        model[0].weight[:, :5] = 1.0
    for batch in (4, 30, 15, 24, 25, 9):
        assert_exact(run(fast.call, rows(batch)), run(model, rows(batch)), f"batch {batch}")
    assert sorted((v.side.threshold, v.side.above) for v in variants(fast)) == [(25, False), (25, True)]


def test_a_side_that_cannot_be_built_runs_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = deep()
    timed(monkeypatch, below(10))
    fast = dynamic_call(model, rows(4))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "fxprune"):
        patch.setattr(codegen, "stock", lambda *_: 1 / 0)
        assert_exact(run(fast.call, rows(30)), run(model, rows(30)))
    assert "another batch size" in caplog.text
    for batch in (30, 4, 31):
        assert_exact(run(fast.call, rows(batch)), run(model, rows(batch)), f"batch {batch}")
    assert chosen(variants(fast)[0])[:2] == [True, True] and len(variants(fast)) == 2


def test_under_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    timed(monkeypatch, lambda m, batch: (1.0, 2.0) if m.name == "0" else below(10)(m, batch))
    fast = dynamic_call(model, rows(4), fallback="inductor")
    for batch in (30, 5, 64, 2, 11):
        assert_exact(run(fast.call, rows(batch)), run(model, rows(batch)), f"batch {batch}")
    assert len(fast.graphs) == 1
    assert {v.side.above: chosen(v)[:2] for v in variants(fast)} == {False: [True, True], True: [True, False]}


def refuse(*_: Any) -> Any:
    raise AssertionError("the batch must not be tried")


def test_no_symbolic_batch_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed batch, and a batch beside another symbolic size."""
    timed(monkeypatch, below(10))
    model = deep()
    monkeypatch.setattr(split_module, "best_split", refuse)
    fixed = compiled(model, dynamic=False, min_speedup=1.0)
    for batch in (4, 20):
        assert_exact(run(fixed.call, rows(batch)), run(model, rows(batch)))
    assert [[v.side for v in g._variants] for g in fixed.graphs] == [[None]] * 2
    torch._dynamo.reset()
    sequence = integers(4, 5, 32)
    both = compiled(model, min_speedup=1.0)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(sequence, dim)
    assert_exact(run(both.call, sequence), run(model, sequence))
    assert [v.side for v in variants(both)] == [None]


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"require_sparse": True}])
def test_one_function_for_all_batches(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Masks that the compile itself chooses, and sparse kernels that must run, do not depend on the batch."""
    timed(monkeypatch, below(10))
    monkeypatch.setattr(split_module, "best_split", refuse)
    fast = compiled(deep(), min_speedup=1.0, **options)
    x = rows(4)
    torch._dynamo.mark_dynamic(x, 0)
    run(fast.call, x)
    assert [v.side for v in variants(fast)] == [None]


def test_training_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    timed(monkeypatch, below(10))
    monkeypatch.setattr(split_module, "best_split", refuse)
    fast = compiled(model, min_speedup=1.0)
    x = rows(4)
    torch._dynamo.mark_dynamic(x, 0)
    assert_exact(fast.call(x).detach(), run(model, x))
    assert [v.side for v in variants(fast)] == [None]
