"""Graph breaks, several subgraphs, and outputs of every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fxprune.compiled import CompiledGraph
from fxprune.errors import VerificationError
from tests.oracle import assert_exact, compiled
from tests.toys import image, mlp, mobile, pruned, rows, run


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Wrapped(nn.Module):
    """``finish`` turns the inner model's output into the output under test."""

    def __init__(self, inner: nn.Module, finish: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.finish = inner, finish

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.inner(x))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, y + 1),
    "list": lambda y: [y, y.sum(1)],
    "dict": lambda y: {"logits": y, "loss": y.sum()},
    "nested": lambda y: {"a": (y, [y - 1]), "b": None},
    "named tuple": lambda y: Pair(y, 2 * y),
    "integers and strings": lambda y: (y, y.shape[0], "name", 3.5, None, True),
    "the same tensor twice": lambda y: (y, y),
    "a view of the output": lambda y: (y, y[:, ::2], y.t()),
    "integer tensor": lambda y: (y, y.argmax(1)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_form(name: str) -> None:
    model = Wrapped(pruned(mlp(), rows()), OUTPUTS[name]).eval()
    fast = compiled(model)
    given, expected = run(fast.call, rows()), run(model, rows())
    assert type(given) is type(expected)
    assert_exact(given, expected, f"OUTPUTS[{name!r}]")
    if isinstance(expected, dict):
        assert given.keys() == expected.keys()
    plain = [v for v in expected if not isinstance(v, Tensor)] if isinstance(expected, tuple) else []
    assert [v for v in given if not isinstance(v, Tensor)] == plain if plain else True
    assert len(fast.contexts) == 1


class Broken(nn.Module):
    """Two halves with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(0), nn.Sequential(nn.Linear(16, 32), mlp(1))
        nn.init.constant_(self.second[0].bias, 1.0)
        self.second[0].weight.data.round_().add_(torch.eye(32, 16))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


def test_every_subgraph_of_a_broken_graph_is_rewritten() -> None:
    model = pruned(Broken().eval(), rows())
    fast = compiled(model)
    assert_exact(run(fast.call, rows()), run(model, rows()))
    assert sum(isinstance(g, CompiledGraph) for g in fast.graphs) == 2
    names = [d.match.name for context in fast.contexts for d in context.decisions if d.chosen]
    assert names == ["first.0", "first.2", "second.0", "second.1.0", "second.1.2"]


def test_a_dense_subgraph_beside_a_pruned_one() -> None:
    model = pruned(Broken().eval(), rows(), ignored_layers=("second*",))
    for parameter in model.second.parameters():
        parameter.data.masked_fill_(parameter.data == 0, 1.0)
    fast = compiled(model)
    assert_exact(run(fast.call, rows()), run(model, rows()))
    assert [isinstance(g, CompiledGraph) and g.context is not None for g in fast.graphs] == [True, False]


def test_a_break_on_data_takes_both_branches() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(0), mlp(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) if x.sum() > 0 else self.right(x)

    model = Branch().eval()
    for sign in (1, -1):
        pruned(model, rows().abs() * sign, ignored_layers=())
    fast = compiled(model)
    for sign in (1, -1, 1):
        x = rows().abs() * sign
        assert_exact(run(fast.call, x), run(model, x), f"sign {sign}")


def test_names_do_not_cross_graphs() -> None:
    """Two models with the same layer names and shapes, compiled one after the other."""
    for seed in range(3):
        model = pruned(mobile(seed), image())
        assert_exact(run(compiled(model).call, image()), run(model, image()), f"seed {seed}")


def test_fullgraph_and_inputs_by_keyword() -> None:
    model = pruned(mlp(), rows())
    options = {"fallback": "eager", "autotune": "off", "min_speedup": 0.0}
    fast = torch.compile(model, backend="hwprune", fullgraph=True, options=options)
    with torch.no_grad():
        assert_exact(fast(input=rows()), model(input=rows()))


def test_a_compiled_function_that_calls_the_model_twice() -> None:
    model = pruned(mlp(), rows())
    fast = compiled(lambda x: model(x) + model(x + 1))  # type: ignore[arg-type]
    expected = run(lambda x: model(x) + model(x + 1), rows())
    assert_exact(run(fast.call, rows()), expected)
    assert [d.chosen for d in fast.contexts[0].decisions] == [True] * 4


PLANTED = [ZeroDivisionError("planted"), VerificationError(stage="rewrite", what="planted", given=1, expected=2)]


@pytest.mark.parametrize("error", PLANTED, ids=lambda e: type(e).__name__)
def test_a_failing_rewrite_runs_dense_and_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fxprune import pipeline

    def broken(gm: Any, ctx: Any) -> int:
        raise error

    monkeypatch.setattr(pipeline, "FORWARD", (*pipeline.FORWARD, broken))
    model = pruned(mlp(), rows())
    fast = compiled(model)
    assert_exact(run(fast.call, rows()), run(model, rows()))
    assert "the sparse rewrite failed" in caplog.text and "planted" in caplog.text


@pytest.mark.parametrize("error", PLANTED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("option", ("require_sparse", "verify"))
def test_a_failing_rewrite_raises_when_sparse_is_required(
    option: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxprune import pipeline

    def broken(gm: Any, ctx: Any) -> int:
        raise error

    monkeypatch.setattr(pipeline, "FORWARD", (*pipeline.FORWARD, broken))
    with pytest.raises(Exception, match="planted"):
        run(compiled(pruned(mlp(), rows()), **{option: True}).call, rows())
