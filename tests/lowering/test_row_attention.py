"""Which attentions in float32 run by our operator: numbers and structure, and what stays torch's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxprune.lowering import library
from fxprune.lowering.row_attention import row_attention
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune import pipeline, prune
from fxprune.capture import capture
from fxprune.config import Config
from tests.oracle import FORCED, copied, operators

pytestmark = pytest.mark.skipif(not library.available(), reason="the compiled library is missing")


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def operands(batch: int = 2, heads: int = 2, queries: int = 9, keys: int = 9, depth: int = 16) -> list[Tensor]:
    gen = torch.Generator().manual_seed(queries)
    return [torch.randn(batch, n, heads, depth, generator=gen).transpose(1, 2) for n in (queries, keys, keys)]


def formed(
    model: nn.Module, inputs: list[Tensor], times: tuple[float, float] = (1.0, 2.0), autotune: str = "fast"
) -> GraphModule:
    """Run the pass with given times of ours and torch's; the results agree."""
    (graph,) = capture(model.eval(), tuple(inputs))
    config: Any = SimpleNamespace(autotune=autotune, min_speedup=1.02)
    context: Any = SimpleNamespace(inference=True, config=config)

    def compare(ours: Any, theirs: Any, nodes: Any) -> tuple[float, float]:
        # both forms run and agree on what the pass hands over
        real = {n: torch.randn(n.meta["example_value"].shape) for n in nodes}
        forms = [form(lambda given: torch.fx.map_arg(given, real.__getitem__)) for form in (ours, theirs)]
        torch.testing.assert_close(forms[0].transpose(1, 2), forms[1])
        return times

    with torch.no_grad():
        expected = graph.gm(*copied(graph.inputs))
        count = row_attention(graph.gm, context, compare)
        graph.gm.recompile()
        graph.gm.graph.lint()
        given = graph.gm(*copied(graph.inputs))
    assert count == operators(graph.gm)["attention_rows"]
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()
    return graph.gm


def masks() -> Iterator[Tensor]:
    gen = torch.Generator().manual_seed(1)
    for sizes in ((2, 2, 9, 9), (2, 1, 9, 9), (1, 1, 1, 9), (2, 1, 1, 9)):
        seen = torch.rand(sizes, generator=gen) < 0.7
        seen[..., 0] = True
        yield seen
        yield torch.where(seen, 0.5, -torch.inf)


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("keys", (1, 9, 33))
def test_faster_is_taken(batch: int, keys: int) -> None:
    graph = formed(Attend(), operands(batch, keys=keys))
    assert operators(graph)["attention_rows"] == 1 and "scaled_dot_product_attention" not in operators(graph)


def test_slower_stays() -> None:
    assert "attention_rows" not in operators(formed(Attend(), operands(), (1.0, 1.01)))


def test_without_timing_all_stay() -> None:
    assert "attention_rows" not in operators(formed(Attend(), operands(), autotune="off"))


def test_masks_and_scales() -> None:
    for mask in masks():
        assert operators(formed(Attend(scale=0.3), [*operands(), mask]))["attention_rows"] == 1


def test_equal_sizes_are_timed_once() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), k, v)

    (graph,) = capture(Twice(), tuple(operands()))
    asked = []
    config: Any = SimpleNamespace(autotune="fast", min_speedup=1.02)
    context: Any = SimpleNamespace(inference=True, config=config)
    assert row_attention(graph.gm, context, lambda *_: asked.append(1) or (1.0, 2.0)) == 2 and len(asked) == 1


def test_layers_share_what_a_mask_of_booleans_becomes() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            once = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return F.scaled_dot_product_attention(once, k, v, attn_mask=seen)

    counts = operators(formed(Twice(), [*operands(), next(masks())]))
    assert counts["attention_rows"] == 2 and counts["where"] == 1


NEAR_MISSES = (
    (Attend(is_causal=True), operands()),
    (Attend(dropout_p=0.1), operands()),
    (Attend(), [t.double() for t in operands()]),
    (Attend(), [t.bfloat16() for t in operands()]),
    (Attend(), [t[0] for t in operands()]),  # three dimensions
    (Attend(), [*operands(), torch.zeros(9, 9)]),  # a mask of two
    (Attend(), [*operands()[:2], operands()[2][..., :8]]),  # values of another size
    (Attend(enable_gqa=True), [operands(heads=4)[0], *operands(heads=2)[1:]]),
    (Attend(), [operands(1)[0], *operands(2)[1:]]),  # one query image for two of keys
    (Attend(scale=-1.0), operands()),
)


@pytest.mark.parametrize(("model", "inputs"), NEAR_MISSES)
def test_what_is_no_such_attention_stays(model: nn.Module, inputs: list[Tensor]) -> None:
    (graph,) = capture(model.eval(), tuple(inputs))
    context: Any = SimpleNamespace(inference=True, config=SimpleNamespace(autotune="fast", min_speedup=1.02))
    assert row_attention(graph.gm, context, lambda *_: pytest.fail("timed")) == 0


def test_in_training_torchs_stays() -> None:
    (graph,) = capture(Attend(), tuple(operands()))
    context: Any = SimpleNamespace(inference=False, config=SimpleNamespace(autotune="fast", min_speedup=1.02))
    assert row_attention(graph.gm, context, lambda *_: pytest.fail("timed")) == 0


def test_in_a_pruned_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole pipeline, as a user gets it: nn.TransformerEncoderLayer compiled."""
    monkeypatch.setattr("fxprune.lowering.measure_fusion.interleave", lambda *_: ([1.0, 2.0], True))
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(128, 2, 256, batch_first=True).eval()
    x = torch.randn(2, 40, 128)
    pruned = prune(model, (x,), sparsity=0.75).model
    (graph,) = capture(pruned, (x,))
    with torch.no_grad():
        clone, context, _ = pipeline.rewrite(graph.gm, graph.inputs, Config(**{**FORCED, "autotune": "fast"}))
        pipeline.chain(clone, context)
        packs = context.weights.appended()
        clone.recompile()
        given, expected = clone(*copied(graph.inputs), *packs), pruned(x)
    assert context.counts["row_attention"] == operators(clone)["attention_rows"] == 1
    torch.testing.assert_close(given[0], expected, rtol=1e-4, atol=1e-5)
