"""Depthwise-separable blocks: plain, inverted, gated, residual; one thing off and there is no block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.capture import capture, detect
from fxprune.config import Config
from fxprune.match import Block
from tests.oracle import detected, integers

X = integers(2, 8, 6, 6)


class Parts(nn.Module):
    """The layers of an inverted residual block, wired by ``body(self, x)``."""

    def __init__(self, body: Callable[..., object]) -> None:
        super().__init__()
        self.expand, self.n0 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.dw, self.n1 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.project, self.n2 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)

    def gate(self, y: Tensor) -> Tensor:
        return torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))


def widen(x: Tensor) -> Tensor:
    return torch.cat([x, x], 1)


def only(body: Callable[..., object]) -> Block:
    model = Parts(body).eval()
    with torch.no_grad():
        (graph,) = capture(model, X)
        (block,) = detect(graph, Config()).blocks
    return block


def test_plain() -> None:
    block = only(lambda m, x: m.project(F.relu6(m.n1(m.dw(widen(x))))))
    assert block.kind == "depthwise_separable" and not block.squeeze_excite and not block.residual
    assert (block.depthwise.name, block.project.name) == ("dw", "project")


def test_inverted_with_residual() -> None:
    block = only(lambda m, x: x + m.n2(m.project(F.silu(m.n1(m.dw(F.silu(m.n0(m.expand(x)))))))))
    assert block.kind == "inverted_residual" and block.residual and not block.squeeze_excite
    assert block.expand is not None and block.expand.name == "expand"


def test_squeeze_and_excite() -> None:
    def body(m: Parts, x: Tensor) -> Tensor:
        y = F.silu(m.n1(m.dw(F.silu(m.expand(x)))))
        return m.project(y * m.gate(y))

    block = only(body)
    assert block.kind == "inverted_residual" and block.squeeze_excite and not block.residual


POSITIVE: dict[str, Callable[..., object]] = {
    "no norm, no activation": lambda m, x: m.project(m.dw(widen(x))),
    "hardswish": lambda m, x: m.project(F.hardswish(m.dw(widen(x)), inplace=True)),
    "gelu": lambda m, x: m.project(F.gelu(m.n1(m.dw(widen(x))))),
    "gate first": lambda m, x: m.project(m.gate(y := F.relu(m.dw(widen(x)))) * y),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_found_from_dynamo_and_export(name: str) -> None:
    assert detected(Parts(POSITIVE[name]), X)[1] == {"depthwise_separable": 1}


TWINS: dict[str, Callable[..., object]] = {
    "extra user": lambda m, x: m.project(F.relu(y := m.dw(widen(x)))) + y[:, :8],
    "graph output": lambda m, x: (y := m.dw(widen(x)), m.project(F.relu(y))),
    "pooling between": lambda m, x: m.project(F.max_pool2d(m.dw(widen(x)), 2)),
    "add between": lambda m, x: m.project(m.dw(widen(x)) + 1),
    "view between": lambda m, x: m.project(m.dw(widen(x)).flatten(2).unflatten(2, (6, 6))),
    "grouped 1x1": lambda m, x: m.grouped(F.relu(m.dw(widen(x)))),
    "dense 3x3 before": lambda m, x: m.project(F.relu(F.conv2d(widen(x), m.dw.weight.expand(16, 16, 3, 3), padding=1))),
    "1x1 first": lambda m, x: F.relu(m.dw(m.expand(x))),
    "mutation between": lambda m, x: m.project(m.dw(widen(x)).add_(x.sum())),
    "used as weight": lambda m, x: F.conv2d(widen(x), m.dw(widen(x))[0, :, :1, :1].reshape(1, 16, 1, 1)),
}


@pytest.mark.parametrize("name", TWINS)
def test_twin_is_no_block(name: str) -> None:
    assert detected(Parts(TWINS[name]), X)[1] == {}


def test_expansion_with_another_user_is_not_part_of_the_block() -> None:
    def body(m: Parts, x: Tensor) -> Tensor:
        y = F.relu(m.expand(x))
        return m.project(F.relu(m.dw(y))) + y[:, :8]

    assert only(body).kind == "depthwise_separable"


@pytest.mark.parametrize("stride", [1, 2])
def test_stride_does_not_matter(stride: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride, 1, groups=16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 8, 1),
    )
    assert detected(model, X)[1] == {"inverted_residual": 1}
