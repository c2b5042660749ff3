"""BatchNorm folds into the convolution before it, in inference, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import assert_model, check, compiled, integer_model, integers, operators, rewritten, zero_some

X = integers(2, 8, 6, 6, seed=2)


class Net(nn.Module):
    """conv and bn, combined by ``body(conv, bn, x)``."""

    def __init__(self, body: Callable[..., Tensor], groups: int = 8, **options: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=options.pop("bias", True))
        self.bn = nn.BatchNorm2d(8, **options)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.conv, self.bn, x)


def net(body: Callable[..., Tensor] = lambda conv, bn, x: bn(conv(x)), **options: bool | int) -> nn.Module:
    return zero_some(integer_model(Net(body, **options)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 8])
def test_folds_with_every_set_of_operands(bias: bool, affine: bool, groups: int) -> None:
    run = check(net(bias=bias, affine=affine, groups=groups), X)
    assert run.context.counts["fold_batchnorm"] == 1
    assert run.ops["batch_norm"] == 0 and run.ops["depthwise_taps"] == (groups == 8)


def test_eps_is_part_of_the_scale() -> None:
    model = net()
    model.bn.eps, model.bn.running_var = 3.0, torch.full((8,), 1.0)  # rsqrt(1 + 3) is exact
    run = check(model, X)
    assert run.ops == {"depthwise_taps": 1} and run.context.counts["fold_batchnorm"] == 1


TWINS = {
    "extra user": lambda conv, bn, x: bn(y := conv(x)) + y,
    "graph output": lambda conv, bn, x: (y := conv(x), bn(y)),
    "activation between": lambda conv, bn, x: bn(torch.relu(conv(x))),
    "mutation between": lambda conv, bn, x: bn(conv(x) * x.add_(1).sum()),
    "no convolution": lambda conv, bn, x: bn(x) + 1,
    "batch statistics": lambda conv, bn, x: nn.functional.batch_norm(conv(x), None, None, bn.weight, bn.bias, True),
}


@pytest.mark.parametrize("name", TWINS)
def test_twin_does_not_fold(name: str) -> None:
    run = check(net(TWINS[name]), X.clone())
    assert run.context.counts["fold_batchnorm"] == 0
    assert run.ops["batch_norm"] == 1


def test_a_weight_used_twice_folds_twice() -> None:
    run = check(net(lambda conv, bn, x: bn(conv(x)) + bn(conv(x + 1)) * 2), X)
    assert run.context.counts["fold_batchnorm"] == 2 and run.ops["depthwise_taps"] == 2
    assert len({m.parameter for m in run.context.matches}) == 1


def test_mutated_input_between_is_read_before() -> None:
    def body(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
        z = x + 0
        y = conv(z)
        z.mul_(2)
        return bn(y) + z

    run = check(net(body), X)
    assert run.context.counts["fold_batchnorm"] == 0 and run.ops["depthwise_taps"] == 1


def test_folded_weight_keeps_its_parameters_name() -> None:
    run = rewritten(net(), X)
    (match,) = run.context.matches
    assert (match.name, match.parameter) == ("conv", "conv.weight")


def test_batchnorm_in_training_is_left_alone() -> None:
    model, copy = net().train(), net().train()
    model.bn.eps = copy.bn.eps = 1e-5  # batch statistics need a positive one
    fast = compiled(model)
    y = fast.call(X)
    assert all(operators(c.weights._gm)["batch_norm"] == 1 for c in fast.contexts)
    torch.testing.assert_close(y, copy(X), rtol=0, atol=0)
    assert torch.equal(model.bn.running_mean, copy.bn.running_mean)


def test_evaluation_with_gradients_does_not_fold() -> None:
    model = net()
    fast = compiled(model)
    y = fast.call(X.clone().requires_grad_())
    assert y.requires_grad
    assert_model(y.detach(), model, (X,))
    assert all(c.counts["fold_batchnorm"] == 0 for c in fast.contexts)
