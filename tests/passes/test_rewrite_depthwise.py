"""Chosen depthwise convolutions become taps: every window, layout and mask; in training the live weight is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune
from tests.oracle import assert_exact, check, compiled, integer_model, integers, rewritten
from tests.strategies import lay_out, layouts, seeds, sizes


def conv(channels: int, seed: int = 0, share: float = 0.6, **window: object) -> nn.Module:
    model = integer_model(nn.Conv2d(channels, channels, groups=channels, **window), seed)  # type: ignore[arg-type]
    gen = torch.Generator().manual_seed(seed)
    model.weight.data.mul_(torch.rand(model.weight.shape, generator=gen) >= share)
    return model


@settings(deadline=None, derandomize=True, database=None, max_examples=25)
@given(
    st.sampled_from((2, 3, 7, 8, 9, 17)),
    sizes(8),
    sizes(8),
    st.sampled_from((1, 3, 5, (3, 5), 9)),
    st.sampled_from((1, 2, (2, 1))),
    st.sampled_from((1, 2)),
    st.booleans(),
    layouts,
    seeds,
)
def test_every_window_and_layout(channels, h, w, kernel, stride, dilation, bias, layout, seed) -> None:  # type: ignore[no-untyped-def]
    pair = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(dilation * (k // 2) for k in pair)
    model = conv(channels, seed, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)
    model.weight.data[0, 0, pair[0] // 2, pair[1] // 2] = 3
    x = lay_out(integers(2, channels, h, w, seed=seed), layout)
    run = rewritten(model, x)
    repro = f"conv({channels}, {seed}, kernel {kernel}, stride {stride}, dilation {dilation}) on {layout} {h}x{w}"
    assert_exact(run.output, run.expected, repro, trusted=False)
    assert not run.changed or run.ops == {"depthwise_taps": 1}, repro
    assert run.changed or (model.weight == 0).float().mean() < 0.05, repro


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(padding: str) -> None:
    run = check(conv(6, kernel_size=3, padding=padding, dilation=2), integers(2, 6, 9, 9))
    assert run.ops == {"depthwise_taps": 1}


def test_a_channel_without_taps_returns_its_bias() -> None:
    model = conv(6, kernel_size=3, padding=1)
    model.weight.data[2] = 0
    run = check(model, integers(1, 6, 9, 9))
    assert run.ops == {"depthwise_taps": 1}
    assert torch.equal(run.output[0][:, 2], model.bias[2].expand(1, 9, 9))


def test_a_dense_weight_stays() -> None:
    model = conv(6, share=0.0, kernel_size=3)
    model.weight.data.copy_(integers(*model.weight.shape, low=1, high=3))
    run = check(model, integers(2, 6, 9, 9))
    assert not run.changed and run.ops["depthwise_taps"] == 0 and run.ops["conv2d"] == 1
    assert [d.reason for d in run.context.decisions] == ["no zeros"]


def test_gradients_equal_the_masked_model() -> None:
    x = integers(2, 8, 6, 6, seed=3)
    pruned = fxprune.prune(integer_model(nn.Conv2d(8, 8, 3, padding=1, groups=8)), x, sparsity=0.6).model
    fast = compiled(pruned)
    results = []
    for call in (fast.call, pruned):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        gradients = torch.autograd.grad(y, [leaf, pruned.weight, pruned.bias], integers(*y.shape, seed=4))
        results.append([y.detach(), *gradients])
    mask = (pruned.weight != 0).float()
    results[1][2] = results[1][2] * mask
    for ours, dense in zip(*results, strict=True):
        assert_exact(ours, dense, trusted=False)
    (context,) = fast.contexts
    assert context.counts["rewrite_depthwise"] == 1 and results[0][2].count_nonzero() > 10


def test_found_zeros_are_no_mask_in_training() -> None:
    model, x = conv(8, kernel_size=3, padding=1), integers(2, 8, 6, 6)
    fast = compiled(model)
    y = fast.call(x)
    (gradient,) = torch.autograd.grad(y, [model.weight], integers(*y.shape, seed=5))
    assert not fast.contexts and (gradient[model.weight == 0] != 0).any()
