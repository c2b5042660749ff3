"""Which transformers run feature-major in one region, and which stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxprune.lowering import library
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune import pipeline
from fxprune.capture import capture
from fxprune.config import Config
from fxprune.context import Timing
from fxprune.ops.region import ATTENTION, GEMM, NORM, numbers, records
from tests.oracle import FORCED, copied, operators, zero_some

needs_products = pytest.mark.skipif(library.isa() not in ("amx", "avx512_bf16"), reason="the machine has no bf16 products")
pytestmark = needs_products


class Layer(nn.Module):
    """A layer of an encoder. shape: how heads are cut. act: between the products of its second half."""

    def __init__(self, c: int = 64, heads: int = 2, *, causal: bool = False, act: Any = F.gelu, first: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(c, c) for _ in range(4))
        self.up, self.down = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(2))
        self.heads, self.causal, self.act, self.first = heads, causal, act, first

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        shape = (*x.shape[:-1], self.heads, -1)
        q, k, v = (linear(x).view(shape).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(x.shape).contiguous())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.first:  # norms in front
            x = x + self.attend(self.norms[0](x), mask)
            return x + self.down(self.act(self.up(self.norms[1](x))))
        x = self.norms[0](self.attend(x, mask) + x)
        return self.norms[1](self.down(self.act(self.up(x))) + x)


class Encoder(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def half(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return zero_some(model.eval(), step=8).bfloat16()


def tokens(batch: int = 2, count: int = 32, c: int = 64) -> Tensor:
    return torch.randn(batch, count, c, generator=torch.Generator().manual_seed(count)).bfloat16()


def formed(model: nn.Module, *inputs: Any, **options: Any) -> GraphModule:
    """Rewrite ``model``; its result is as near to float64 as the model's own."""
    (graph,) = capture(model, inputs)
    with torch.no_grad():
        clone, context, _ = pipeline.rewrite(graph.gm, graph.inputs, Config(**{**FORCED, **options}))
        pipeline.chain(clone, context)
        packs = context.weights.appended()
        clone.recompile()
        clone.graph.lint()
        expected = graph.gm(*copied(graph.inputs))
        given = clone(*copied(graph.inputs), *packs)
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
        exact = copy.deepcopy(model).double()(*wide)
    for ours, theirs, right in zip(*([t] if isinstance(t, Tensor) else t for t in (given, expected, [exact])), strict=True):
        assert ours.shape == theirs.shape and ours.stride() == theirs.stride()
        errors = [(t.double() - right).square().mean().sqrt().item() for t in (ours, theirs)]
        assert errors[0] <= 1.2 * errors[1] and errors[1] < 0.1, errors
    return clone


def codes(graph: GraphModule) -> list[list[int]]:
    """The step codes of each region."""
    found = [n for n in graph.graph.nodes if n.target is torch.ops.fxprune.region.default]
    return [[code for code, _ in records(numbers(str(n.args[3])))] for n in found]


LAYER = [GEMM, GEMM, GEMM, ATTENTION, GEMM, NORM, GEMM, GEMM, NORM]


@pytest.mark.parametrize("batch", (1, 2, 3))
def test_layers_are_one_region_between_two_transposes(batch: int) -> None:
    graph = formed(half(Encoder(Layer(), Layer(heads=4))), tokens(batch))
    assert codes(graph) == [2 * LAYER]
    assert operators(graph)["transpose"] == 2 and "scaled_dot_product_attention" not in operators(graph)


def test_norms_in_front_and_a_final_one() -> None:
    model = half(Encoder(Layer(first=True), Layer(first=True)))
    assert codes(formed(model, tokens())) == [[*LAYER[:5], NORM, GEMM, GEMM, NORM, *LAYER[:5], NORM, GEMM, GEMM]]


def masks(batch: int, count: int) -> Iterator[Tensor]:
    gen = torch.Generator().manual_seed(1)
    for sizes in ((batch, 1, count, count), (batch, 1, 1, count), (1, 1, count, count)):
        seen = torch.rand(sizes, generator=gen) < 0.7
        seen[..., 0] = True
        yield seen
        yield torch.where(seen, 0.5, -torch.inf).bfloat16()


def test_masks_are_added() -> None:
    model = half(Encoder(Layer(), Layer()))
    for mask in masks(2, 48):
        graph = formed(model, tokens(2, 48), mask)
        assert codes(graph) == [2 * LAYER]
        assert operators(graph)["transpose"] == 3  # one mask for all layers


def test_masks_of_every_head_stay() -> None:
    mask = torch.zeros(2, 2, 32, 32).bfloat16()
    assert codes(formed(half(Encoder(Layer(), Layer())), tokens(), mask)) == []


@pytest.mark.parametrize("count", (1, 4, 33, 48))
def test_tokens_that_leave_lanes_empty_stay(count: int) -> None:
    graph = formed(half(Encoder(Layer(), Layer())), tokens(count=count))
    assert bool(codes(graph)) == (count == 48) == ("scaled_dot_product_attention" not in operators(graph))


def test_what_is_no_such_attention_stays() -> None:
    for model in (Layer(causal=True), Encoder(Layer(act=torch.sin), Layer(act=torch.sin))):
        assert codes(formed(half(model), tokens())) == []


def test_float32_stays() -> None:
    (graph,) = capture(half(Layer()).float(), (tokens().float(),))
    with torch.no_grad():
        clone, context, _ = pipeline.rewrite(graph.gm, graph.inputs, Config(**FORCED))
        pipeline.chain(clone, context)
    assert codes(clone) == [] and "scaled_dot_product_attention" in operators(clone)


def test_a_value_inside_may_be_read_outside() -> None:
    class Seen(Encoder):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:  # type: ignore[override]
            middle = self.layers[0](x)
            return self.layers[1](middle) + torch.sin(middle)

    graph = formed(half(Seen(Layer(), Layer())), tokens())
    assert codes(graph) == [2 * LAYER] and operators(graph)["transpose"] == 3


@pytest.mark.parametrize(("slower", "joins"), ((1.2, True), (1.5, False)))
def test_a_layer_that_is_a_little_slower_alone_joins(slower: float, joins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        seconds = 0.0

        def __init__(self, *_: object) -> None:
            return

        def __call__(self, match: Any, mask: object) -> Timing:
            return Timing(slower if match.name.endswith("up") else 0.5, 1.0, 1.0, measured=True)

        predict = __call__

    monkeypatch.setattr(pipeline, "Measure", Fake)
    graph = formed(half(Encoder(Layer(), Layer())), tokens(), min_speedup=1.02)
    assert (codes(graph) == [2 * LAYER]) == joins
