"""Products with one constant matrix in every spelling run our kernel; what is no such product says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.capture import capture, detect
from fxprune.config import Config
from fxprune.errors import NothingToPrune
from tests.oracle import Run, check, compiled, detected, integer_model, integers

X3, X2 = integers(2, 5, 16, seed=3), integers(5, 16, seed=4)
Body = Callable[..., Tensor]


class Product(nn.Module):
    """``body(x, w, b)`` with a weight of ``shape`` and a bias of 32."""

    def __init__(self, body: Body, *shape: int, buffer: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(32))
        if buffer:
            self.register_buffer("weight", torch.zeros(shape))
        else:
            self.weight = nn.Parameter(torch.zeros(shape))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.weight, self.bias)


NK, KN = (32, 16), (16, 32)
# body, shape of the weight, input
FOUND: dict[str, tuple[Body, tuple[int, ...], Tensor]] = {
    "einsum nk": (lambda x, w, b: torch.einsum("bi,oi->bo", x, w), NK, X2),
    "einsum kn": (lambda x, w, b: torch.einsum("bi,io->bo", x, w), KN, X2),
    "einsum of rank 3": (lambda x, w, b: torch.einsum("bsi,oi->bso", x, w) + b, NK, X3),
    "einsum with an ellipsis": (lambda x, w, b: torch.einsum("...i,oi->...o", x, w), NK, X3),
    "einsum, the weight first": (lambda x, w, b: torch.einsum("io, bsi -> bso", w, x), KN, X3),
    "einsum of a list": (lambda x, w, b: torch.einsum("bsi,oi->bso", [x, w]), NK, X3),
    "bmm of an expanded weight": (lambda x, w, b: torch.bmm(x, w.expand(2, -1, -1)), KN, X3),
    "bmm of a transposed weight": (lambda x, w, b: x.bmm(w.t().expand(2, 16, 32)), NK, X3),
    "bmm of a repeated weight": (lambda x, w, b: x.bmm(w.unsqueeze(0).repeat(2, 1, 1)), KN, X3),
    "matmul of an expanded weight": (lambda x, w, b: x @ w[None].expand(2, -1, -1), KN, X3),
    "matmul of one matrix in a batch": (lambda x, w, b: x @ w[None], KN, X3),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w.expand(2, -1, -1)), KN, X3),
    "baddbmm with factors": (lambda x, w, b: torch.baddbmm(b, x, w.expand(2, -1, -1), beta=3, alpha=2), KN, X3),
    "addmm with factors": (lambda x, w, b: torch.addmm(b, x, w, beta=2, alpha=3), KN, X2),
    "addmm with alpha": (lambda x, w, b: torch.addmm(b, x, w, alpha=-2), KN, X2),
    "addmm onto a matrix": (lambda x, w, b: torch.addmm(x[:, :1] + b, x, w), KN, X2),
    "addmm onto a column": (lambda x, w, b: torch.addmm(x[:, :1], x, w.t()), NK, X2),
    "addmm as a method": (lambda x, w, b: b.addmm(x, w), KN, X2),
}


def with_zeros(body: Body, *shape: int, buffer: bool = False) -> Product:
    model = integer_model(Product(body, *shape, buffer=buffer))
    model.weight.data.copy_(integers(*shape, seed=9, low=1, high=3))
    rows = model.weight.data.transpose(-1, -2) if shape[-1] != 16 else model.weight.data
    rows[..., ::2] = 0
    return model  # type: ignore[return-value]


@pytest.mark.parametrize("name", FOUND)
def test_every_spelling_runs_our_kernel(name: str) -> None:
    body, shape, x = FOUND[name]
    run = check(with_zeros(body, *shape), x)
    assert run.ops["tile_gemm"] == 1 and run.kinds == {"linear": 1} and not run.context.refused
    assert not {"einsum", "bmm", "baddbmm", "addmm"} & run.ops.keys()


@pytest.mark.parametrize("name", FOUND)
def test_export_agrees(name: str) -> None:
    body, shape, x = FOUND[name]
    assert detected(with_zeros(body, *shape), x)[0] == {"linear": 1}


@pytest.mark.parametrize("name", ["einsum nk", "baddbmm with factors", "addmm onto a matrix"])
def test_under_a_dynamic_batch(name: str) -> None:
    body, shape, x = FOUND[name]
    bodies = {"baddbmm with factors": lambda x, w, b: torch.baddbmm(b, x, w.expand(len(x), -1, -1), beta=3, alpha=2)}
    model = with_zeros(bodies.get(name, body), *shape)
    fast = compiled(model, dynamic=True)
    for batch in (2, 5, 3):
        given = integers(batch, *x.shape[1:], seed=batch)
        with torch.no_grad():
            assert torch.equal(fast.call(given), model(given))
    assert len(fast.graphs) == 1 and fast.contexts[0].counts["rewrite_gemm"] == 1


def test_addmm_that_ignores_its_first_operand() -> None:
    model = with_zeros(lambda x, w, b: torch.addmm(b / 0, x, w, beta=0), *KN)
    assert check(model, X2).ops["tile_gemm"] == 1


def test_a_buffer_runs_sparse_and_is_not_pruned() -> None:
    model = with_zeros(lambda x, w, b: x @ w + b, *KN, buffer=True)
    assert check(model, X3).ops["tile_gemm"] == 1
    with pytest.raises(NothingToPrune, match="weight: its weight is not a parameter"):
        fxprune.prune(model, X3, sparsity=0.5)


# body, shape of the weight, input, reason
REFUSED: dict[str, tuple[Body, tuple[int, ...], Tensor, str]] = {
    "einsum over two indices": (
        lambda x, w, b: torch.einsum("bhk,hko->bo", x.unflatten(1, (4, 4)), w),
        (4, 4, 32),
        X2,
        "einsum 'bhk,hko->bo' is no product with one matrix",
    ),
    "einsum that transposes": (
        lambda x, w, b: torch.einsum("bsi,oi->bos", x, w),
        NK,
        X3,
        "einsum 'bsi,oi->bos' is no product with one matrix",
    ),
    "einsum that broadcasts": (
        lambda x, w, b: torch.einsum("bi,oi->bo", x[:, :1], w),
        NK,
        X2,
        "einsum 'bi,oi->bo' is no product with one matrix",
    ),
    "a matrix per image": (
        lambda x, w, b: torch.bmm(x, w),
        (2, 16, 32),
        X3,
        "its weight has 3 dimensions; a matrix is expected",
    ),
    "the weight on the left": (lambda x, w, b: w @ x.t(), NK, X2, "the weight is the left factor"),
    "a computed weight": (
        lambda x, w, b: F.linear(x, torch.tanh(w), b),
        NK,
        X2,
        "its weight is computed in the graph by tanh",
    ),
    "a repeated weight": (
        lambda x, w, b: F.linear(x, w.repeat(2, 1)),
        NK,
        X2,
        "its weight is computed in the graph by repeat",
    ),
}


def refusals(model: nn.Module, *inputs: Any) -> list[Any]:
    return [r for graph in capture(model, inputs) for r in detect(graph, Config()).refused]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_matched_says_why(name: str) -> None:
    body, shape, x, reason = REFUSED[name]
    model = with_zeros(body, *shape)
    run: Run = check(model, x)
    assert not run.changed and not run.context.matches
    (refusal,) = run.context.refused
    assert refusal.name == "weight" and refusal.kind == "linear" and refusal.reason.startswith(reason)
    with pytest.raises(NothingToPrune, match=r"may be pruned \(weight: "):
        fxprune.prune(model, x, sparsity=0.5)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, w, b: x @ x.transpose(-1, -2) + w.sum() + b.sum(),
        lambda x, w, b: x + (w @ w.t()).sum() + b.sum(),
        lambda x, w, b: torch.einsum("bsi,bti->bst", x, x) + w.sum() + b.sum(),
    ],
    ids=["two activations", "two weights", "einsum of activations"],
)
def test_a_product_without_a_layer_is_not_mentioned(body: Body) -> None:
    model = with_zeros(body, *NK)
    assert not refusals(model, X3) and not check(model, X3).changed


def test_a_weight_repeated_before_memory_changes_is_left() -> None:
    def body(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        repeated, y = w.repeat(2, 1, 1), x.clone()
        y.mul_(2)
        return torch.bmm(y, repeated) + b

    assert not check(with_zeros(body, *KN), X3).context.matches
