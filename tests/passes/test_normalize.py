"""One vocabulary: every spelling of a call becomes the same ATen call, and a visible mutation stays a mutation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import assert_exact, check, detected, integer_model, integers, rewritten, zero_some

X = integers(2, 8, 6, 6, seed=1)


class Between(nn.Module):
    """A depthwise convolution, ``body``, and a 1x1 convolution."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.body = body
        self.pw = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.body(self.dw(x)))


def between(body: Callable[[Tensor], Tensor]) -> nn.Module:
    return zero_some(integer_model(Between(body)))


EXACT = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "method": lambda v: v.relu(),
    "F.relu inplace": lambda v: F.relu(v, inplace=True),
    "F.relu keyword": lambda v: F.relu(input=v, inplace=True),
    "F.relu True": lambda v: F.relu(v, True),
    "torch.relu_": torch.relu_,
    "relu_": lambda v: v.relu_(),
    "ReLU": nn.ReLU(),
    "ReLU inplace": nn.ReLU(inplace=True),
    "F.relu6": F.relu6,
    "ReLU6 inplace": nn.ReLU6(inplace=True),
    "F.hardtanh": lambda v: F.hardtanh(v, 0.0, 6.0),
    "Hardtanh inplace": nn.Hardtanh(0.0, 6.0, inplace=True),
}
ROUNDING = {
    "silu": F.silu,
    "SiLU inplace": nn.SiLU(inplace=True),
    "hardswish": F.hardswish,
    "Hardswish inplace": nn.Hardswish(inplace=True),
    "hardsigmoid": F.hardsigmoid,
    "Hardsigmoid inplace": nn.Hardsigmoid(inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "GELU tanh": nn.GELU(approximate="tanh"),
}


@pytest.mark.parametrize("name", [*EXACT, *ROUNDING])
def test_every_spelling_of_an_activation_fuses(name: str) -> None:
    run = check(between({**EXACT, **ROUNDING}[name]), X)
    assert run.ops == {"depthwise_taps": 1, "tile_gemm": 1}, run.graph.code


@pytest.mark.parametrize("name", [*EXACT, *ROUNDING])
def test_an_activation_behind_no_kernel_keeps_its_meaning(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pw = nn.Conv2d(8, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pw({**EXACT, **ROUNDING}[name](x + x))

    run = check(zero_some(integer_model(Net())), X)
    assert run.ops["tile_gemm"] == 1 and sum(run.ops.values()) == 3


@pytest.mark.parametrize("name", [*EXACT, *ROUNDING])
def test_blocks_agree_between_dynamo_and_export(name: str) -> None:
    matches, blocks = detected(between({**EXACT, **ROUNDING}[name]), X)
    assert matches == {"depthwise": 1, "pointwise": 1} and blocks == {"depthwise_separable": 1}


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 5.0)])
def test_another_hardtanh_stays(low: float, high: float) -> None:
    run = check(between(nn.Hardtanh(low, high)), 4 * X)
    assert run.ops == {"depthwise_taps": 1, "hardtanh": 1, "tile_gemm": 1}


def mutated_and_read(v: Tensor) -> Tensor:
    y = F.relu(v, inplace=True)
    return y + v


def view_then_mutated(v: Tensor) -> Tensor:
    first = v[:, :1]
    v.relu_()
    return v + first


def iadd_with_reader(v: Tensor) -> Tensor:
    y = v
    y += 3 * torch.ones_like(v)
    return y * v


@pytest.mark.parametrize("body", [mutated_and_read, view_then_mutated, iadd_with_reader])
def test_a_visible_mutation_keeps_its_meaning(body: Callable[[Tensor], Tensor]) -> None:
    run = check(between(body), X)
    assert run.ops["depthwise_taps"] == 1 and run.ops["tile_gemm"] == 1


def test_a_mutated_input_is_still_mutated() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pw = nn.Conv2d(8, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pw(F.relu(x, inplace=True))

    run = check(zero_some(integer_model(Net())), X.clone())
    assert run.ops["tile_gemm"] == 1 and run.ops["relu"] == 1
    assert not any("aten.relu.default" in str(n.target) for n in run.graph.graph.nodes), "the input's mutation was lost"


@pytest.mark.parametrize("op", [operator.iadd, operator.imul])
def test_in_place_keeps_its_dtype(op: Callable[..., Tensor]) -> None:
    """``a += b`` keeps a's float32 where ``a + b`` would give float64."""
    run = check(between(lambda v: op(v, torch.full((1,), 3.0, dtype=torch.float64, device=v.device))), X)
    assert run.output[0].dtype == torch.float32 and run.ops["tile_gemm"] == 1


def linear_forms() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    return {
        "F.linear": lambda x, w, b: F.linear(x, w, b),
        "F.linear keywords": lambda x, w, b: F.linear(x, weight=w, bias=b),
        "no bias": lambda x, w, b: F.linear(x, w),
        "matmul t": lambda x, w, b: torch.matmul(x, w.t()) + b,
        "@ transpose": lambda x, w, b: x @ w.transpose(0, 1) + b,
        "@ .T": lambda x, w, b: x @ w.T + b,
        "@ permute": lambda x, w, b: x @ w.permute(1, 0) + b,
    }


class Product(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, int] = (64, 24)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(64))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x + 1, self.weight, self.bias)


@pytest.mark.parametrize("rows", [(5,), (2, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("name", linear_forms())
def test_every_spelling_of_a_linear_is_one_tile_gemm(name: str, rows: tuple[int, ...]) -> None:
    run = check(zero_some(integer_model(Product(linear_forms()[name]))), integers(*rows, 24))
    assert run.ops["tile_gemm"] == 1 and not run.ops["linear"] + run.ops["matmul"] + run.ops["mm"], run.graph.code


FORMS = {
    "mm": lambda x, w, b: torch.mm(x, w) + b,
    "mm keyword": lambda x, w, b: torch.mm(x, mat2=w) + b,
    "matmul": lambda x, w, b: torch.matmul(x, w) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_weight_stored_k_by_n_is_one_tile_gemm(name: str) -> None:
    model = integer_model(Product(FORMS[name], (24, 64)))
    model.weight.data[::2] = 0
    run = check(model, integers(5, 24))
    assert run.ops["tile_gemm"] == 1 and run.ops["mm"] + run.ops["addmm"] + run.ops["matmul"] == 0


def test_dropout_goes_in_evaluation() -> None:
    run = check(between(nn.Dropout(0.9)), X)
    assert run.ops == {"depthwise_taps": 1, "tile_gemm": 1}


def test_dropout_asked_for_stays() -> None:
    torch.manual_seed(0)
    run = rewritten(between(lambda v: F.dropout(v, 0.5, training=True)), X)
    assert run.ops == {"depthwise_taps": 1, "dropout": 1, "tile_gemm": 1}


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda m, x: torch.vmap(m)(x),
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_functorch_transforms_is_left_alone(name: str) -> None:
    """A layer in front of the transform runs sparse; those inside are reported."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(24, 16)
            self.inner = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Any:
            return TRANSFORMS[name](self.inner, self.first(x))

    model, x = zero_some(integer_model(Net())), integers(3, 24)
    run = rewritten(model, x, exact=())
    assert_exact(run.output, run.expected, most_zeros=0.95)
    assert [d.match.name for d in run.context.decisions if d.chosen] == ["first"]
    assert {r.name for r in run.context.refused if "functorch" in r.reason} == {"inner.0.weight", "inner.2.weight"}
