"""Chosen convolutions become ``tile_conv``: every window, group, layout and mask; sequences; gradients under a plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.plan import lookup
from tests.oracle import assert_exact, assert_model, check, compiled, integer_model, integers, rewritten, zero_some, zeroed
from tests.strategies import lay_out, layouts, seeds, sizes

BOUNDED = settings(deadline=None, derandomize=True, database=None, max_examples=20)
X, ROW = integers(2, 8, 9, 9, seed=3), integers(2, 8, 21, seed=4)


@BOUNDED
@given(
    sizes(8), st.sampled_from((1, 2, 3)), st.sampled_from((1, 2)), st.sampled_from((3, (1, 5), (2, 3))),
    st.sampled_from((1, 2, (1, 3))), st.sampled_from((0, 1, (2, 1))), st.booleans(), layouts, seeds,
)  # fmt: skip
def test_every_window(
    n: int, groups: int, channels: int, kernel: object, stride: object, padding: object, bias: bool, layout: str, seed: int
) -> None:
    layer = nn.Conv2d(groups * 2 * channels, groups * n, kernel, stride, padding, groups=groups, bias=bias)  # type: ignore[arg-type]
    x = lay_out(integers(2, groups * 2 * channels, 8, 7, seed=seed), layout)
    run = rewritten(zeroed(layer, seed), x)
    repro = f"{layer} seed {seed} {layout}"
    assert_exact(run.output, run.expected, repro, trusted=False)
    assert run.ops == {"tile_conv": 1}, repro


class Sequence(nn.Module):
    def __init__(self, conv: nn.Conv1d, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.body = conv, body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.conv, x)


SEQUENCES: dict[str, tuple[Callable[[], nn.Conv1d], Callable[..., Tensor], str]] = {
    "Mamba's causal depthwise": (
        lambda: nn.Conv1d(8, 8, 4, padding=3, groups=8),
        lambda conv, x: F.silu(conv(x)[..., : x.shape[-1]]), "depthwise_taps"),
    "padded in front, k = 3": (
        lambda: nn.Conv1d(8, 8, 3, groups=8), lambda conv, x: conv(F.pad(x, (2, 0))), "depthwise_taps"),
    "causal, all channels": (
        lambda: nn.Conv1d(8, 12, 4, padding=3), lambda conv, x: conv(x)[..., : x.shape[-1]], "tile_conv"),
    "strided": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), lambda conv, x: F.relu(conv(x)), "tile_conv"),
    "same, dilated": (lambda: nn.Conv1d(8, 12, 3, padding="same", dilation=2), lambda conv, x: conv(x) + 1, "tile_conv"),
    "1x1": (lambda: nn.Conv1d(8, 12, 1, stride=2), lambda conv, x: F.relu(conv(x)), "tile_gemm"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str) -> None:
    make, body, operator = SEQUENCES[name]
    model = Sequence(zeroed(make()), body)  # type: ignore[arg-type]
    model.conv.bias.data.fill_(6)  # behind a ReLU most results must not be zeros
    run = check(model, ROW)
    assert run.ops[operator] == 1 and run.ops["conv1d"] == 0
    assert run.ops["relu"] == 0  # fused, through the view


def test_batchnorm_of_a_sequence_folds() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    model = zero_some(integer_model(model))
    model[1].bias.data.fill_(4)
    run = check(model, ROW)
    assert run.context.counts["fold_batchnorm"] == 1 and run.ops == {"unsqueeze": 1, "tile_conv": 1, "squeeze": 1}


class Basic(nn.Module):
    """ResNet's block, with what ``between`` does to the sum's operand."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms, self.between = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]), between

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.between(self.norms[1](self.second(y))) + x)


def test_a_residual_block_is_two_calls() -> None:
    run = check(zero_some(integer_model(Basic())), X)
    assert run.ops == {"tile_conv": 2}


def test_twin_with_an_activation_in_front_of_the_sum() -> None:
    run = check(zero_some(integer_model(Basic(F.relu))), X)
    assert run.ops == {"tile_conv": 2, "add": 1, "relu": 1}


def test_dense_and_scattered_weights_stay() -> None:
    layer = integer_model(nn.Conv2d(8, 64, 3))
    layer.weight.data.copy_(integers(64, 8, 3, 3, low=1, high=3))
    assert check(layer, X).ops == {"conv2d": 1}
    gen = torch.Generator().manual_seed(0)
    layer.weight.data.mul_(torch.rand(64, 8, 3, 3, generator=gen) < 0.7)
    assert not check(layer, X).changed


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet": (lambda: nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Basic(),
        nn.Conv2d(8, 17, 3, 2, 1)), (2, 3, 33, 29)),
    "VGG": (lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()), (1, 3, 18, 15)),
    "RegNet": (lambda: nn.Sequential(
        nn.Conv2d(8, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 2, 1, groups=3), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 16, 1)), (3, 8, 14, 14)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_small_nets(name: str, sparsity: float | None) -> None:
    make, shape = NETS[name]
    x, net = integers(*shape, seed=5, low=-2, high=2), integer_model(make())
    model = zero_some(net) if sparsity is None else fxprune.prune(net, x, sparsity=sparsity).model
    run = check(model, x)
    assert run.ops["conv2d"] == 0 and run.ops["tile_conv"] == run.kinds["conv"]


def test_planned_tiles_lie_inside_groups() -> None:
    layer = nn.Conv2d(24, 36, 3, groups=3)
    result = fxprune.prune(layer, integers(1, 24, 7, 7), sparsity=0.75, columns=True)
    (plan,) = result.plan
    assert plan.granularity == 6 and plan.columns is None and plan.kind == "conv"
    assert abs(result.sparsity["conv"] - 0.75) < 0.02


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(8, 12, 3, padding=1), lambda: nn.Conv2d(8, 16, 3, groups=2),
                                  lambda: nn.Conv1d(8, 12, 3, padding=2)])  # fmt: skip
def test_gradients_equal_the_masked_model(make: Callable[[], nn.Module]) -> None:
    layer = integer_model(nn.Sequential(make()))
    x = X if layer[0].weight.dim() == 4 else ROW
    model = fxprune.prune(layer, x, sparsity=0.5).model
    weight, bias = model[0].weight, model[0].bias
    fast, results = compiled(model), []
    for call in (fast.call, model):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, weight, bias], integers(*y.shape, seed=4))])
    results[1][2] = results[1][2] * lookup(weight).mask
    for ours, dense in zip(*results, strict=True):
        assert_exact(ours, dense, trusted=False)
    assert fast.contexts[0].counts["rewrite_conv"] == 1


def test_a_changing_batch_is_one_graph() -> None:
    model = zeroed(nn.Conv2d(8, 12, 3, padding=1))
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5, 3):
            x = integers(batch, 8, 9, 9, seed=batch)
            assert_model(fast.call(x), model, (x,), f"batch {batch}")
    assert len(fast.graphs) == 1 and fast.contexts[0].counts["rewrite_conv"] == 1
