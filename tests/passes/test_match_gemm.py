"""GEMM detection, from Dynamo and from exported programs: linear layers, 1x1 convolutions, and their twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import detected, integers

X4, X3, X2, X1 = integers(2, 6, 7, 5), integers(2, 5, 6), integers(5, 6), integers(6)


class Uses(nn.Module):
    """A Parameter of ``shape``, used by ``body(x, w, b)``."""

    def __init__(self, body: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(9))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.weight, self.bias)


FOUND: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "linear 1-D": (lambda: nn.Linear(6, 9), X1, "linear"),
    "linear 2-D": (lambda: nn.Linear(6, 9), X2, "linear"),
    "linear 3-D": (lambda: nn.Linear(6, 9, bias=False), X3, "linear"),
    "linear 4-D": (lambda: nn.Linear(5, 9), X4, "linear"),
    "addmm": (lambda: Uses(lambda x, w, b: torch.addmm(b, x, w), 6, 9), X2, "linear"),
    "addmm of t": (lambda: Uses(lambda x, w, b: torch.addmm(b, x, w.t()), 9, 6), X2, "linear"),
    "mm": (lambda: Uses(lambda x, w, b: torch.mm(x, w), 6, 9), X2, "linear"),
    "matmul 3-D": (lambda: Uses(lambda x, w, b: x @ w + b, 6, 9), X3, "linear"),
    "matmul of T": (lambda: Uses(lambda x, w, b: x @ w.T, 9, 6), X3, "linear"),
    "matmul of mT": (lambda: Uses(lambda x, w, b: x @ w.mT, 9, 6), X3, "linear"),
    "1x1": (lambda: nn.Conv2d(6, 9, 1), X4, "pointwise"),
    "1x1 strided": (lambda: nn.Conv2d(6, 9, 1, stride=2, bias=False), X4, "pointwise"),
    "1x1 valid": (lambda: nn.Conv2d(6, 9, 1, padding="valid"), X4, "pointwise"),
    "1x1 same": (lambda: nn.Conv2d(6, 9, 1, padding="same"), X4, "pointwise"),
    "1x1 dilated": (lambda: nn.Conv2d(6, 9, 1, dilation=3), X4, "pointwise"),
    "1x1 of a sequence": (lambda: nn.Conv1d(6, 9, 1, stride=2), X4[:, :, 0], "pointwise"),
    "1x1 of one pixel": (lambda: nn.Conv2d(6, 9, 1), X4[:, :, :1, :1], "linear"),
}


@pytest.mark.parametrize("name", FOUND)
def test_is_found(name: str) -> None:
    make, x, kind = FOUND[name]
    assert detected(make().eval(), x)[0] == {kind: 1}


TWINS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "unbatched": (lambda: nn.Conv2d(6, 9, 1), X4[0]),
    "two activations": (lambda: Uses(lambda x, w, b: x @ x.transpose(1, 2) + b.sum() + w.sum(), 9, 6), X3),
    "weight on the left": (lambda: Uses(lambda x, w, b: w @ x.t(), 9, 6), X2),
    "two weights": (lambda: Uses(lambda x, w, b: x + (w @ w.t()).sum() + b.sum(), 9, 6), X2),
    "computed weight": (lambda: Uses(lambda x, w, b: F.linear(x, torch.tanh(w), b), 9, 6), X2),
    "three-dimensional weight": (lambda: Uses(lambda x, w, b: torch.matmul(x, w) + b, 2, 6, 9), X3),
    "embedding": (lambda: Uses(lambda x, w, b: F.embedding(x.abs().long(), w), 9, 6), X2),
}


@pytest.mark.parametrize("name", TWINS)
def test_twin_is_not_found(name: str) -> None:
    make, x = TWINS[name]
    assert detected(make().eval(), x)[0] == {}


def test_the_bias_is_the_operators_own() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3, bias=False)).eval()
    assert detected(model, X2)[0] == {"linear": 2}


def test_every_projection_of_an_attention_layer_is_found() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.out(F.scaled_dot_product_attention(q, k, v))

    assert detected(Attention().eval(), X3)[0] == {"linear": 4}
