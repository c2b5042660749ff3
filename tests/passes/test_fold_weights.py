"""Weights that are computed from parameters and buffers: folded in inference, seen when they change, not in training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import parametrize, prune

import fxprune
from fxprune.errors import ComputedWeight, NothingToPrune
from tests.oracle import assert_exact, assert_model, assert_same, check, compiled, integer_model, integers, rewritten

X = integers(5, 64, seed=3)


def net() -> nn.Sequential:
    return integer_model(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)))  # type: ignore[return-value]


def keep(layer: nn.Linear, mask: Tensor) -> None:
    prune.custom_from_mask(layer, "weight", mask)
    layer.weight = layer.weight.detach()  # so that the layer can be copied


class Masked(nn.Module):
    """A parametrization like FakeSparsity of torch.ao."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


def unstructured(model: nn.Sequential) -> None:
    for i in (0, 2):
        keep(model[i], (torch.rand(model[i].weight.shape, generator=torch.Generator().manual_seed(i)) < 0.2).float())


def channels(model: nn.Sequential) -> None:
    for i in (0, 2):
        mask = torch.zeros_like(model[i].weight)
        mask[::3, 1::2] = 1
        keep(model[i], mask)


def two_of_four(model: nn.Sequential) -> None:
    """As ASP leaves them: zeros in the weight, 2 of 4 along K."""
    for i in (0, 2):
        scores = torch.rand(*model[i].weight.shape, generator=torch.Generator().manual_seed(i)).unflatten(1, (-1, 4))
        mask = (scores.argsort(2).argsort(2) < 2).flatten(1)
        model[i].weight.data.copy_(integers(*mask.shape, low=1, high=3, seed=i) * mask * -1)  # zeros are -0.0


def per_row(model: nn.Sequential) -> None:
    """As Wanda leaves them: the same number of zeros in each row."""
    for i in (0, 2):
        scores = torch.rand(*model[i].weight.shape, generator=torch.Generator().manual_seed(i))
        model[i].weight.data.mul_(scores.argsort(1).argsort(1) < 16)


def parametrized(model: nn.Sequential) -> None:
    for i in (0, 2):
        mask = torch.rand(model[i].weight.shape, generator=torch.Generator().manual_seed(i)) < 0.2
        parametrize.register_parametrization(model[i], "weight", Masked(mask.float()))


def ao_squashed(model: nn.Sequential) -> None:
    sparsifier = WeightNormSparsifier(sparsity_level=0.75, sparse_block_shape=(1, 4), zeros_per_block=4)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()


SOURCES: dict[str, Callable[[nn.Sequential], None]] = {
    f.__name__: f for f in (unstructured, channels, two_of_four, per_row, parametrized, ao_squashed)
}


@pytest.mark.parametrize("name", SOURCES)
def test_foreign_zeros_run_our_kernel_bit_for_bit(name: str) -> None:
    model = net()
    SOURCES[name](model)
    run = rewritten(model.eval(), X)  # masked weights are outputs of the graph, and mostly zeros
    assert_exact(run.output, run.expected, name, most_zeros=0.9)
    assert run.ops["tile_gemm"] == 2 and not run.ops["linear"]
    assert all(d.pattern.startswith("found ") and d.sparsity > 0.3 for d in run.context.decisions)
    if name == "two_of_four":
        assert {d.pattern for d in run.context.decisions} == {"found 2:4"}


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_is_folded(norm: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape) < 0.3)
    run = rewritten(norm(layer).eval(), torch.randn(5, 64))
    assert_same(run.output, run.expected, run.exact, trusted=False)
    assert run.ops["tile_gemm"] == 1 and not run.ops["linear"]


def test_convolutions_are_folded_too() -> None:
    model = integer_model(nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32)))
    for i in (0, 2):
        keep(model[i], (torch.rand(model[i].weight.shape, generator=torch.Generator().manual_seed(i)) < 0.3).float())
    run = check(model, integers(2, 16, 7, 7))
    assert run.ops["tile_gemm"] == run.ops["depthwise_taps"] == 1


def test_new_values_and_new_masks_are_seen() -> None:
    model = net()
    unstructured(model)
    fast = compiled(model.eval())
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: model[0].weight_orig.data.copy_(integers(96, 64, seed=9)),
        lambda: model[0].weight_orig.mul_(2),
        lambda: model[2].weight_mask.copy_(model[2].weight_mask.flip(0)),
        lambda: model[0].weight_mask.fill_(1),
    ]
    for number, change in enumerate(changes):
        with torch.no_grad():
            change()
            fxprune.refresh(model)
            assert_exact(fast.call(X), model(X), f"change {number}")
    assert fast.contexts


def test_training_leaves_masks_alone() -> None:
    model = net()
    unstructured(model)
    model.train()
    twin = copy.deepcopy(model)
    fast = compiled(model)
    for call in (fast.call, twin):
        call(X).sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_exact(a.grad, b.grad, trusted=False)
    assert not fast.contexts or not any(d.chosen for d in fast.contexts[0].decisions)


class Uses(nn.Module):
    """A layer whose weight is ``body(weight, mask, x)``."""

    def __init__(self, body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(integers(48, 64, seed=1))
        self.register_buffer("mask", (torch.rand(48, 64, generator=torch.Generator().manual_seed(0)) < 0.2).float())
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.body(self.weight, self.mask, x))


FOLDED = {
    "mul": lambda w, m, x: w * m,
    "cast": lambda w, m, x: w * m.to(torch.float64).to(torch.float32),
    "masked_fill": lambda w, m, x: w.masked_fill((1 - m).to(torch.bool), 0.0),
    "where": lambda w, m, x: torch.where(m.to(torch.bool), w, w - w),
}
KEPT = {
    "activation": lambda w, m, x: w * m * x.sum(),
    "random": lambda w, m, x: w * torch.bernoulli(torch.full_like(w, 1.0)) * m,
    "mutated": lambda w, m, x: w * m.mul_(1.0),
    "unknown": lambda w, m, x: w * torch.cumsum(m, 0),
}


@pytest.mark.parametrize("name", FOLDED)
def test_pure_expressions_fold(name: str) -> None:
    run = check(Uses(FOLDED[name]).eval(), X)
    assert run.context.counts["fold_weights"] == 1 and run.ops["tile_gemm"] == 1


@pytest.mark.parametrize("name", KEPT)
def test_other_expressions_stay(name: str) -> None:
    run = rewritten(Uses(KEPT[name]).eval(), X)
    assert run.context.counts["fold_weights"] == 0 and not run.ops["tile_gemm"]
    assert_exact(run.output, run.expected, name, trusted=False)


def test_prune_says_what_it_cannot_prune() -> None:
    model = net()
    keep(model[0], torch.ones_like(model[0].weight))
    with pytest.warns(ComputedWeight, match=r"1 layer.*: 0\..*prune\.remove"):
        result = fxprune.prune(model, X, sparsity=0.5)
    assert [layer.name for layer in result.plan] == ["2"]
    keep(model[2], torch.ones_like(model[2].weight))
    with pytest.raises(NothingToPrune, match="weight is computed"):
        fxprune.prune(model, X, sparsity=0.5)
    for i in (0, 2):
        prune.remove(model[i], "weight")
    assert len(fxprune.prune(model, X, sparsity=0.5).plan) == 2


def test_compiled_model_with_masks_left_in_place() -> None:
    model = net()
    unstructured(model)
    fast = compiled(model.eval())
    with torch.no_grad():
        assert_model(fast.call(X), model, (X,))
    assert [d.chosen for d in fast.contexts[0].decisions] == [True, True]
