"""Chosen GEMMs become ``tile_gemm``: every rank, stride, layout and mask; a tied weight is rewritten where it is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.errors import NothingToPrune
from fxprune.plan import lookup
from tests.oracle import assert_exact, assert_model, check, compiled, integer_model, integers, rewritten, zeroed
from tests.strategies import lay_out, layouts, seeds, sizes

BOUNDED = settings(deadline=None, derandomize=True, database=None, max_examples=20)


@BOUNDED
@given(sizes(64), sizes(8), st.sampled_from(((), (1,), (5,), (2, 3), (1, 1))), st.booleans(), layouts, seeds)
def test_every_linear(n: int, k: int, rows: tuple[int, ...], bias: bool, layout: str, seed: int) -> None:
    model = zeroed(nn.Linear(k, n, bias=bias), seed)
    x = lay_out(integers(*rows, k, seed=seed), layout if rows else "contiguous")
    run = rewritten(model, x)
    repro = f"Linear({k}, {n}, {bias}) seed {seed} on {rows} {layout}"
    assert_exact(run.output, run.expected, repro, trusted=False)
    assert run.ops == ({"tile_gemm": 1} if k > 1 else {"linear": 1}), repro


@BOUNDED
@given(sizes(8), sizes(8), sizes(8), st.sampled_from((1, 2, (1, 2), 3)), st.booleans(), layouts, seeds)
def test_every_pointwise(n: int, k: int, size: int, stride: object, bias: bool, layout: str, seed: int) -> None:
    model = zeroed(nn.Conv2d(k, n, 1, stride, bias=bias), seed)  # type: ignore[arg-type]
    x = lay_out(integers(2, k, size, size + 1, seed=seed), layout)
    run = rewritten(model, x)
    repro = f"Conv2d({k}, {n}, 1, {stride}, {bias}) seed {seed} on {size}x{size + 1} {layout}"
    assert_exact(run.output, run.expected, repro, trusted=False)
    assert run.ops["tile_gemm"] == (k > 1) and run.ops["conv2d"] == (k == 1), repro


@pytest.mark.parametrize("batch", [1, 3])
def test_one_pixel_runs_as_a_linear(batch: int) -> None:
    run = check(zeroed(nn.Conv2d(12, 10, 1)), integers(batch, 12, 1, 1))
    assert run.ops["tile_gemm"] == 1 and run.kinds == {"linear": 1} and run.output[0].shape == (batch, 10, 1, 1)


def test_one_pixel_under_a_dynamic_batch() -> None:
    model = zeroed(nn.Conv2d(12, 10, 1))
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5, 3):
            x = integers(batch, 12, 1, 1, seed=batch)
            assert_model(fast.call(x), model, (x,), f"batch {batch}")
    assert len(fast.graphs) == 1 and fast.contexts[0].counts["rewrite_gemm"] == 1


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 12), nn.Linear(12, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.embed(tokens) + 1))


def test_tied_head_runs_sparse_and_the_embedding_is_untouched() -> None:
    model = integer_model(Tied())
    model.head.weight.data[:, ::2] = 0
    run = check(model, torch.arange(8).reshape(2, 4))
    assert run.ops["tile_gemm"] == 1 and run.ops["embedding"] == 1


def test_a_tied_weight_is_not_pruned_behind_the_embedding() -> None:
    with pytest.raises(NothingToPrune):
        fxprune.prune(integer_model(Tied()), torch.arange(8).reshape(2, 4), sparsity=0.5)


def test_dense_weight_stays() -> None:
    model = integer_model(nn.Linear(12, 64))
    model.weight.data.copy_(integers(64, 12, low=1, high=3))
    run = check(model, integers(5, 12))
    assert not run.changed and run.ops == {"linear": 1}


def test_scattered_zeros_run_as_elements() -> None:
    model = integer_model(nn.Linear(64, 256))
    gen = torch.Generator().manual_seed(0)
    model.weight.data.copy_(integers(256, 64, low=1, high=3) * (torch.rand(256, 64, generator=gen) < 0.4))
    (decision,) = check(model, integers(5, 64)).context.decisions
    assert decision.chosen and decision.pattern == "found unstructured"
    assert decision.mask is not None and decision.mask.tiling.granularity == 1


def test_a_few_scattered_zeros_stay() -> None:
    model = integer_model(nn.Linear(64, 256))
    gen = torch.Generator().manual_seed(0)
    model.weight.data.copy_(integers(256, 64, low=1, high=3) * (torch.rand(256, 64, generator=gen) < 0.7))
    run = check(model, integers(5, 64))
    assert not run.changed and run.ops == {"linear": 1}
    assert [d.reason for d in run.context.decisions] == ["its zeros leave no row of a tile"]


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_equal_the_masked_model(transposed: bool) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(12, 40)), nn.Parameter(torch.empty(40))

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, self.weight) + self.bias

    x = integers(5, 12, seed=3)
    layer = nn.Sequential(Head() if transposed else nn.Linear(12, 40))
    model = fxprune.prune(integer_model(layer), x, sparsity=0.5, granularity=8).model
    weight, bias = model[0].weight, model[0].bias
    fast, results = compiled(model), []
    for call in (fast.call, model):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, weight, bias], integers(*y.shape, seed=4))])
    results[1][2] = results[1][2] * lookup(weight).mask
    for ours, dense in zip(*results, strict=True):
        assert_exact(ours, dense, trusted=False)
    assert fast.contexts[0].counts["rewrite_gemm"] == 1
