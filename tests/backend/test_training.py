"""Training: exact gradients of the masked model, zeros that are not masks, masks that are held."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.plan import lookup
from tests.oracle import assert_exact, compiled, integer_model, integers
from tests.toys import image, mlp, pruned, rows


class Masked(nn.Module):
    """The oracle: the dense model, each pruned weight times its mask in every forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(model)
        self.masks = {n: p.mask for n, w in model.named_parameters() if (p := lookup(w)) is not None}

    def forward(self, x: Tensor) -> Tensor:
        state = {n: w * self.masks[n] if n in self.masks else w for n, w in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, state, (x,))


def conv() -> nn.Module:
    """Depthwise, 1x1, strided depthwise, 1x1, without BatchNorm: its statistics would not be integers."""
    layers = (
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.LeakyReLU(0.5),
        nn.Conv2d(16, 24, 1),
        nn.LeakyReLU(0.5),
        nn.Conv2d(24, 24, 5, stride=2, padding=2, groups=24, bias=False),
        nn.Conv2d(24, 8, 1, bias=False),
    )
    return integer_model(nn.Sequential(*layers))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {"mlp": (mlp, rows), "conv": (conv, image)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_gradients_are_those_of_the_masked_model(name: str, sparsity: float) -> None:
    make, data = MODELS[name]
    model = pruned(make(), data(), sparsity=sparsity).train()
    with torch.no_grad():
        for parameter in model.parameters():  # as after an optimizer step that nobody held
            parameter.add_((parameter == 0).float())
    oracle = Masked(model)
    assert oracle.masks, "the model has plans"
    fast = compiled(model)
    x, y = data().requires_grad_(), data().requires_grad_()
    given, expected = fast.call(x), oracle(y)
    assert_exact(given.detach(), expected.detach(), f"forward, MODELS[{name!r}], {sparsity}")
    upstream = integers(*given.shape, seed=3)
    given.backward(upstream)
    expected.backward(upstream)
    assert_exact(x.grad, y.grad, f"input gradient, MODELS[{name!r}], {sparsity}")
    for (key, a), b in zip(model.named_parameters(), oracle.inner.parameters(), strict=True):
        assert_exact(a.grad, b.grad, f"{key}, MODELS[{name!r}], {sparsity}", trusted=False)
        if key in oracle.masks:
            assert not a.grad[~oracle.masks[key]].any() and a.grad.any()
    assert any(d.chosen for d in fast.contexts[0].decisions) and not fast.contexts[0].inference


def test_live_weights_are_used_without_a_recompile() -> None:
    model = pruned(mlp(), rows()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-10)
    oracle = Masked(model)
    twin = torch.optim.SGD(oracle.inner.parameters(), lr=2.0**-10)
    fast = compiled(model)
    for step in range(4):
        for call, opt in ((fast.call, optimizer), (oracle, twin)):
            opt.zero_grad()
            call(rows()).sum().backward()
            opt.step()
        for a, b in zip(model.parameters(), oracle.inner.parameters(), strict=True):
            torch.testing.assert_close(a, b, msg=f"step {step}")
    assert len(fast.graphs) == 1


def test_found_zeros_are_no_mask_in_training() -> None:
    model = mlp().train()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[2].weight.zero_()  # a zero-initialised layer
    twin = copy.deepcopy(model)
    fast = compiled(model)
    assert not fast.contexts
    for step in range(3):
        for call, network in ((fast.call, model), (twin, twin)):
            loss = (call(rows()) - 1).square().sum() * 2.0**-12
            loss.backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= parameter.grad
                    parameter.grad = None
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, msg=f"step {step}")
    assert model[2].weight.any() and model[0].weight[:, ::2].any(), "both trained"
    with torch.no_grad():
        torch.testing.assert_close(fast.call(rows()), model(rows()))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hold_keeps_zeros_zero(name: str) -> None:
    result = fxprune.prune(mlp(), rows(), sparsity=0.6)
    model = result.model.train()
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = result.plan.hold(optimizer)
    masks = {n: lookup(w).mask for n, w in model.named_parameters() if lookup(w)}
    before = {n: w.detach().clone() for n, w in model.named_parameters()}

    def steps(count: int) -> None:
        for seed in range(count):
            optimizer.zero_grad()
            model(rows(seed=seed)).square().sum().backward()  # dense gradients, as without the compiler
            optimizer.step()

    steps(3)
    for key, weight in model.named_parameters():
        assert not torch.equal(weight, before[key]), f"{key} trained"
        if key in masks:
            assert not weight.detach()[~masks[key]].any(), key
            for what, value in optimizer.state[weight].items():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    assert not value[~masks[key]].any(), f"{key}: {what}"
    handle.remove()
    steps(1)
    assert any(w.detach()[~masks[n]].any() for n, w in model.named_parameters() if n in masks), "without it they come back"


def test_hold_then_inference_runs_sparse_again() -> None:
    result = fxprune.prune(mlp(), rows(), sparsity=0.6)
    model, fast = result.model.train(), compiled(result.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    result.plan.hold(optimizer)
    for seed in range(3):
        optimizer.zero_grad()
        fast.call(rows(seed=seed)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(fast.call(rows()), model(rows()), msg=f"step {seed}")
    assert [all(d.chosen for d in c.decisions) for c in fast.contexts] == [True, True]


def test_pruning_again_after_compile_changes_the_training_mask() -> None:
    model = pruned(mlp(), rows(), sparsity=0.3).train()
    fast = compiled(model)
    fast.call(rows()).sum().backward()
    pruned(model, rows(), sparsity=0.7)
    model.zero_grad()
    fast.call(rows()).sum().backward()
    for key, weight in model.named_parameters():
        plan = lookup(weight)
        if plan is not None:
            assert not weight.grad[~plan.mask].any(), key


def test_second_order_gradients_are_refused_or_right() -> None:
    model = pruned(mlp(), rows()).train()
    x = rows().requires_grad_()
    (first,) = torch.autograd.grad(compiled(model).call(x).square().sum(), x, create_graph=True)
    y = rows().requires_grad_()
    (expected,) = torch.autograd.grad(Masked(model)(y).square().sum(), y, create_graph=True)
    assert_exact(first.detach(), expected.detach())
    try:
        (second,) = torch.autograd.grad(first.sum(), x)
    except (RuntimeError, NotImplementedError) as error:
        assert str(error)
        return
    (reference,) = torch.autograd.grad(expected.sum(), y)
    assert_exact(second, reference, trusted=False)
    assert reference.any()
