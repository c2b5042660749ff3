"""What the backward of tile_gemm and tile_conv calls on a GPU gives what PyTorch's masked dense gradients give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxprune.ops import tile_conv, tile_gemm, tile_gradients
from fxprune.ops.operator import Operator
from tests.integers import generator, integers

SAMPLES = [
    pytest.param(op, args, id=f"{op.name}-{i}")
    for op in (tile_gemm.OPERATOR, tile_conv.OPERATOR)
    for i, args in enumerate(op.samples())
]


def gradients(op: Operator, args: tuple[Any, ...]) -> list[Tensor]:
    """Gradients on small integers, so that dense and sparse sums are equal to the bit; activations stay out of it."""
    gen = generator(len(args))
    given = [integers(gen, *a.shape).to(a.dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    leaves = [a.requires_grad_() for a in given if isinstance(a, Tensor) and a.is_floating_point()]
    y = getattr(torch.ops.fxprune, op.name)(*given[:-1], "none")
    return list(torch.autograd.grad(y, leaves, integers(gen, *y.shape).to(y.dtype)))


def always(*_: Any) -> bool:
    return True


@pytest.mark.parametrize(("op", "args"), SAMPLES)
def test_sparse_and_dense_gradients_agree(op: Operator, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    dense = gradients(op, args)
    called = []

    def watch(name: str) -> Callable[..., Tensor]:
        run = getattr(torch.ops.fxprune, name)
        return lambda *a: called.append(name) or run(*a)

    prefix = "tile_conv_grad" if op.name == "tile_conv" else "tile_grad"
    for name in (f"{prefix}_input", f"{prefix}_weight"):
        monkeypatch.setattr(torch.ops.fxprune, name, watch(name))
    monkeypatch.setattr(tile_gradients, "pays", always)
    sparse = gradients(op, args)
    assert called == [f"{prefix}_input", f"{prefix}_weight"]
    for ours, theirs in zip(sparse, dense, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", (tile_gemm.OPERATOR, tile_conv.OPERATOR), ids=lambda op: op.name)
def test_activations_are_differentiated(op: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under an activation as well, in the precision of the operands."""
    args = next(a for a in op.samples() if a[-1] == "silu")
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    results = []
    for choose in (tile_gradients.pays, always):
        monkeypatch.setattr(tile_gradients, "pays", choose)
        y = getattr(torch.ops.fxprune, op.name)(*leaves)
        results.append(torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view_as(y)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_gpu_runs_few_kept_weights_in_wide_tiles_sparse() -> None:
    with FakeTensorMode():
        columns, few = (torch.empty(n, device="cuda", dtype=torch.int32) for n in (64, 8))
        values = torch.empty(500, device="cuda")
    assert tile_gradients.pays(values, columns, 64, 1000)
    assert not tile_gradients.pays(values, columns, 64, 999)
    assert not tile_gradients.pays(values, columns, 8, 1000)
    assert not tile_gradients.pays(values, few, 64, 1000)
    assert not tile_gradients.pays(torch.empty(500), torch.empty(64, dtype=torch.int32), 64, 1000)
