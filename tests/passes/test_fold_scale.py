"""A constant scale per output feature folds into the layer in front of it, in inference, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import assert_exact, assert_model, check, compiled, integer_model, integers, zero_some

X = integers(2, 8, 5, 6, seed=6)


class Scaled(nn.Module):
    """A linear layer, a convolution, and a scale of whole numbers; ``body(self, x)`` combines them."""

    def __init__(self, body: Callable[..., Tensor], bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=bias)
        self.conv = nn.Conv2d(8, 8, 1, bias=bias)
        self.gamma = nn.Parameter(torch.ones(8))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def scaled(body: Callable[..., Tensor], bias: bool = True) -> nn.Module:
    model = zero_some(integer_model(Scaled(body, bias)))
    model.gamma.data = torch.tensor([1.0, -2.0, 3.0, -1.0, 2.0, 1.0, -1.0, 4.0])
    return model


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


POSITIVE: dict[str, Callable[..., Tensor]] = {
    "linear": lambda m, x: m.linear(last(x)) * m.gamma,
    "scale on the left": lambda m, x: m.gamma * m.linear(last(x)),
    "with leading ones": lambda m, x: m.linear(last(x)) * m.gamma.reshape(1, 1, 1, -1),
    "behind a permute": lambda m, x: first(m.linear(last(x))) * m.gamma.view(1, -1, 1, 1) + x,
    "convolution": lambda m, x: m.conv(x) * m.gamma.reshape(-1, 1, 1),
    "convolution and unsqueeze": lambda m, x: m.conv(x).mul(m.gamma.unsqueeze(-1).unsqueeze(-1)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", POSITIVE)
def test_scale_folds(name: str, bias: bool) -> None:
    run = check(scaled(POSITIVE[name], bias), X)
    assert run.context.counts["fold_scale"] == 1 and run.ops["mul"] == 0


@pytest.mark.parametrize("name", POSITIVE)
def test_under_autocast_the_product_stays_float32(name: str) -> None:
    """A bfloat16 result times a float32 scale: the layer takes the scale, its result is cast."""
    model = scaled(POSITIVE[name])
    fast = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, given = model(X), fast.call(X)
    assert given.dtype == expected.dtype == torch.float32
    assert_exact(given, expected, name, most_zeros=0.8)
    assert fast.contexts[0].counts["fold_scale"] == 1


TWINS: dict[str, Callable[..., Tensor]] = {
    "extra user": lambda m, x: (y := m.linear(last(x))) * m.gamma + y,
    "activation between": lambda m, x: F.hardtanh(m.linear(last(x)), -9.0, 9.0) * m.gamma,
    "along another dimension": lambda m, x: m.linear(x.flatten(2)[:, :, :8]) * m.gamma.reshape(-1, 1),
    "a number": lambda m, x: m.linear(last(x)) * 2.0,
    "one number": lambda m, x: m.linear(last(x)) * m.gamma[:1],
    "no constant": lambda m, x: m.linear(last(x)) * x.flatten(0)[:8],
    "mutation between": lambda m, x: m.linear(last(x)) * (m.gamma * x.add_(1).sum()),
    "permuted away": lambda m, x: m.linear(last(x)[:, :, :1].expand(2, 5, 8, 8)).permute(0, 1, 3, 2) * m.gamma,
}


@pytest.mark.parametrize("name", TWINS)
def test_twin_keeps_its_scale(name: str) -> None:
    run = check(scaled(TWINS[name]), X)
    assert run.context.counts["fold_scale"] == 0 and run.ops["mul"] >= 1


@pytest.mark.parametrize("name", POSITIVE)
def test_bfloat16_scale_folds_with_the_error_of_the_dense_model(name: str) -> None:
    """Over several draws: either way rounds a few hundred numbers, which by chance is kinder to one of them."""
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(6):
        gen = torch.Generator().manual_seed(seed)
        model = Scaled(POSITIVE[name])
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=gen)
        model = zero_some(model)
        x = torch.randn(2, 8, 5, 6, generator=gen).bfloat16()
        exact = model.bfloat16().double()(x.double())
        fast = compiled(model.bfloat16())
        with torch.no_grad():
            squares += torch.stack([(y.double() - exact).square().mean() for y in (fast.call(x), model(x))])
        assert fast.contexts[0].counts["fold_scale"] == 1
    assert squares[0] <= 1.25**2 * squares[1], squares


def test_types_that_differ_keep_the_scale() -> None:
    model = scaled(POSITIVE["linear"]).bfloat16()
    model.gamma.data = model.gamma.data.float()
    fast = compiled(model)
    with torch.no_grad():
        fast.call(X.bfloat16())
    assert fast.contexts[0].counts["fold_scale"] == 0


def test_a_new_scale_is_noticed() -> None:
    model = scaled(POSITIVE["behind a permute"])
    run = compiled(model).call
    with torch.no_grad():
        assert_model(run(X), model, [X])
        model.gamma.copy_(torch.arange(8.0) - 3.5)
        assert_model(run(X), model, [X])


def test_training_keeps_the_scale() -> None:
    model = scaled(POSITIVE["linear"])
    compiled(model).call(X).sum().backward()
    given = model.gamma.grad.clone()
    model.zero_grad()
    model(X).sum().backward()
    assert torch.equal(given, model.gamma.grad)
