"""Layers that are found and left: tied weights, weights two calls share, fused and concatenated projections."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.plan import PrunedWeight, lookup, register
from fxprune.sparsity.elements import elements
from tests.oracle import assert_exact, check, compiled, integer_model, integers

TOKENS = torch.arange(12).reshape(2, 6)


def small(model: nn.Module) -> nn.Module:
    """Integers so small that a product of three stays exact."""
    for i, parameter in enumerate(integer_model(model).parameters()):
        parameter.data.copy_(integers(*parameter.shape, seed=i, low=-1, high=1))
    return model


class Language(nn.Module):
    """GPT-2's shape: the head reads the embedding's weight."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.wte, self.fc = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.lm_head.weight = self.wte.weight
        self.broken = broken

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.wte(tokens)
        if self.broken:
            torch._dynamo.graph_break()
        return self.lm_head(F.relu(self.fc(y) + 1))


def left(result: Any) -> dict[str, str]:
    rows = result.report.to_dict()["rows"]
    return {row["layer"]: row["note"] for row in rows if row["sparsity"] == "-"}


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "embedding and head in two graphs"])
def test_a_tied_head_is_left_and_the_report_says_why(broken: bool) -> None:
    model = small(Language(broken))
    before = model.wte.weight.detach().clone()
    result = fxprune.prune(model, TOKENS, sparsity=0.5, inplace=True)
    assert [layer.name for layer in result.plan] == ["fc"] and lookup(model.wte.weight) is None
    assert torch.equal(model.wte.weight, before)
    assert list(left(result).values()) == ["left: its weight is also read by embedding"]
    with torch.no_grad():
        assert_exact(compiled(model).call(TOKENS), model(TOKENS))


def test_explain_says_why_a_tied_head_is_left() -> None:
    model = small(Language())
    model.wte.weight.data.fill_(1.0)
    for options in ({}, {"sparsity": 0.5}):
        rows = {r["layer"]: r for r in fxprune.explain(model, TOKENS, autotune="off", **options).to_dict()["rows"]}
        (head,) = [row for name, row in rows.items() if name != "fc"]
        assert head["decision"] == "no zeros, and prune leaves it: its weight is also read by embedding"
        assert head["sparsity"] == "0.0%"


@pytest.mark.parametrize("columns", [False, True], ids=["half of each row", "columns that leave the graph"])
def test_zeros_in_a_tied_weight_run_fast_and_the_embedding_reads_the_weight(columns: bool) -> None:
    model = small(Language())
    for parameter in (model.wte.weight, model.fc.weight):
        parameter.data.copy_(2 * integers(*parameter.shape, seed=3, low=0, high=1) - 1)
    model.wte.weight.data[:32, ::2] = 0
    model.wte.weight.data[32:, int(not columns) :: 2] = 0
    run = check(model, TOKENS)
    assert run.ops["embedding"] == 1 and (run.ops["tile_gemm"], run.ops["linear"]) == ((0, 2) if columns else (1, 1))
    assert [(s.layers, s.before, s.after) for s in run.context.shrunk] == ([(("fc",), 32, 16)] if columns else [])
    (embedding,) = [n for n in run.graph.graph.nodes if "embedding" in str(n.target)]
    assert any(run.context.weights.value(n) is model.wte.weight for n in embedding.all_input_nodes)


class Attention(nn.Module):
    """Linear attention over three heads, exact on small integers; ``form`` is how queries, keys and values are made."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.heads, self.size = form, 3, 8
        width = self.heads * self.size
        if form == "concatenated":
            self.wq, self.wk, self.wv = (nn.Parameter(torch.empty(width, width)) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        if self.form == "concatenated":
            parts = F.linear(x, torch.cat([self.wq, self.wk, self.wv])).chunk(3, -1)
        elif self.form == "split":
            parts = self.qkv(x).split(width, -1)
        else:  # as in timm's ViT
            parts = self.qkv(x).reshape(batch, tokens, 3, width).unbind(2)
        q, k, v = (p.reshape(batch, tokens, self.heads, self.size).transpose(1, 2) for p in parts)
        y = (q @ k.transpose(-2, -1)) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


X = integers(2, 5, 24, seed=11, low=-1, high=1)


@pytest.mark.parametrize("form", ["reshaped", "split"])
def test_a_fused_projection_is_one_layer(form: str) -> None:
    model = small(Attention(form))
    result = fxprune.prune(model, X, sparsity=0.5, granularity=8, inplace=True)
    assert [(layer.name, layer.shape) for layer in result.plan] == [("qkv", (72, 24)), ("proj", (24, 24))]
    run = check(model, X)
    assert run.ops["tile_gemm"] == 2 and run.ops["linear"] == 0 and not left(result) and not run.context.refused
    with torch.no_grad():
        assert_exact(compiled(model).call(X[:1]), model(X[:1]))


def test_a_concatenated_projection_is_left_with_a_reason() -> None:
    model = small(Attention("concatenated"))
    result = fxprune.prune(model, X, sparsity=0.5, inplace=True)
    assert [layer.name for layer in result.plan] == ["proj"]
    assert left(result) == {"wq + wk + wv": "left: its weight is computed from several parameters"}
    assert check(model, X).ops["linear"] == 1


def test_zeros_of_a_concatenated_projection_run_sparse_and_may_change() -> None:
    model = small(Attention("concatenated"))
    parts = (model.wq, model.wk, model.wv)
    with torch.no_grad():
        for part in parts:
            part[:, ::2] = 0
        run = check(model, X)
        assert run.ops["tile_gemm"] == 1 and run.context.decisions[0].match.name == "wq + wk + wv"
        fast = compiled(model)
        assert_exact(fast.call(X), model(X))
        model.wk[:, 1::2] = integers(24, 12, seed=5, low=-1, high=1)  # other values
        assert_exact(fast.call(X), model(X))
        model.wv[:, 0] = 1  # other zeros
        assert_exact(fast.call(X), model(X))


def test_a_plan_of_one_part_does_not_stand_for_the_whole() -> None:
    model = small(Attention("concatenated"))
    with torch.no_grad():
        for part in (model.wq, model.wk, model.wv):
            part[:, :12] = 0
        mask = model.wq != 0
        register(model.wq, PrunedWeight("unstructured", elements(mask), mask))
        assert check(model, X).ops["tile_gemm"] == 1
        assert_exact(compiled(model).call(X), model(X))


def test_joined_weights_train_as_they_are() -> None:
    model = small(Attention("concatenated"))
    with torch.no_grad():
        for part in (model.wq, model.wk, model.wv):
            part[:, ::2] = 0
    fast = compiled(model)
    fast.call(X).sum().backward()
    grads = [p.grad.clone() for p in (model.wq, model.wk, model.wv) if p.grad is not None]
    model.zero_grad()
    model(X).sum().backward()
    assert len(grads) == 3
    for given, part in zip(grads, (model.wq, model.wk, model.wv), strict=True):
        assert part.grad is not None
        assert_exact(given, part.grad)


class Twice(nn.Module):
    """One convolution called on two maps, behind a BatchNorm of its own each time."""

    def __init__(self, conv: nn.Conv2d, pad: int = 0) -> None:
        super().__init__()
        self.conv, self.pad = conv, pad
        self.first, self.second = nn.BatchNorm2d(conv.out_channels), nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        small = F.conv2d(x[:, :, :1, :1], self.conv.weight, None, 1, self.pad) if self.pad else self.conv(x[:, :, :3, :3])
        return self.first(self.conv(x)), self.second(small)


CONVS = {
    "1x1": lambda: nn.Conv2d(16, 32, 1, bias=False),
    "1x1 strided": lambda: nn.Conv2d(16, 32, 1, stride=2),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_weight_two_calls_share_is_pruned_once_and_packed_for_each(name: str) -> None:
    model, x = integer_model(Twice(CONVS[name]())), integers(2, 16, 6, 5, seed=12)
    result = fxprune.prune(model, x, sparsity=0.5, granularity=8, inplace=True)
    assert [layer.name for layer in result.plan] == ["conv"]
    run = check(model, x)
    assert sum(run.ops[op] for op in ("tile_gemm", "depthwise_taps")) == 2
    assert not {"conv2d", "batch_norm"} & run.ops.keys()
    model.conv.weight.data.mul_(2)
    with torch.no_grad():
        assert_exact(compiled(model).call(x), model(x))


def test_a_weight_of_two_kinds_is_pruned_once() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.conv(x.mean((2, 3), keepdim=True))

    model, x = integer_model(Pooled()), integers(2, 16, 4, 4, seed=13)
    result = fxprune.prune(model, x, sparsity=0.5, inplace=True)
    assert [layer.kind for layer in result.plan] == ["pointwise"]
    run = check(model, x)
    assert run.kinds == {"pointwise": 1, "linear": 1} and run.ops["tile_gemm"] == 2


def test_a_weight_of_a_padded_and_an_unpadded_call_is_pruned_once() -> None:
    model, x = integer_model(Twice(nn.Conv2d(16, 32, 1, bias=False), pad=1)), integers(2, 16, 6, 5, seed=12)
    result = fxprune.prune(model, x, sparsity=0.5, granularity=8, inplace=True)
    assert [(layer.name, layer.pattern) for layer in result.plan] == [("conv", "tile")] and not left(result)
    run = check(model, x)
    assert run.kinds == {"pointwise": 1, "conv": 1} and run.ops["tile_gemm"] == run.ops["tile_conv"] == 1


def test_a_weight_that_a_transposed_convolution_reads_is_left() -> None:
    class Mirrored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 32, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(self.conv(x), self.conv.weight)

    model, x = integer_model(Mirrored()), integers(2, 16, 6, 5, seed=12)
    with pytest.raises(fxprune.errors.NothingToPrune, match="conv: its weight is also read by conv_transpose2d"):
        fxprune.prune(model, x, sparsity=0.5)


def test_what_was_not_asked_for_is_listed_as_left() -> None:
    model, x = small(Attention("split")), X
    result = fxprune.prune(model, x, sparsity=0.5, ignored_layers=("qkv",))
    assert left(result) == {"qkv": "left: not asked for"} and result.sparsity.keys() == {"all", "linear"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [(32, 64, 0), (0, 64, 8), (32, 0, 8)], ids=str)
def test_a_layer_without_elements_is_left(sizes: tuple[int, ...]) -> None:
    model = integer_model(nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(sizes)))).eval()
    x = integers(2, sizes[0], seed=1)
    with torch.no_grad():
        model[0].weight[::2] = 0  # dead filters, so that channels would be cut
        assert_exact(compiled(model, verify=True).call(x), model(x))
    if all(0 in layer.weight.shape for layer in model):
        with pytest.raises(fxprune.errors.NothingToPrune, match="its weight has no elements"):
            fxprune.prune(model, x, sparsity=0.5)
    else:
        result = fxprune.prune(model, x, sparsity=0.5)
        assert list(left(result).values()) == ["left: its weight has no elements"]
        with torch.no_grad():
            assert_exact(compiled(result.model).call(x), result.model(x))
