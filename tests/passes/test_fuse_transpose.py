"""A channels-last chain between two permutes runs feature-major, and only when every way out is the inverse permute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import assert_model, check, compiled, integer_model, integers, zero_some

X = integers(2, 8, 5, 6, seed=6)


class Chain(nn.Module):
    """A depthwise convolution, then ``body(self, x)`` around two linear layers, as in ConvNeXt."""

    def __init__(self, body: Callable[..., object]) -> None:
        super().__init__()
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


def chain(body: Callable[..., object]) -> nn.Module:
    return zero_some(integer_model(Chain(body)))


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


POSITIVE: dict[str, tuple[Callable[..., object], int]] = {
    # body, permutes removed
    "two layers": (lambda m, x: first(m.down(F.relu(m.up(last(m.dw(x)))))) + x, 2),
    "negative dims": (lambda m, x: m.down(F.relu(m.up(m.dw(x).permute(0, -2, -1, 1)))).permute(0, -1, 1, 2) + x, 2),
    "scale inside": (lambda m, x: first(m.down(F.relu(m.up(last(m.dw(x))))) * m.scale) + x, 2),
    "one layer, two exits": (lambda m, x: (lambda y: first(y) * 2 + first(F.relu(y)))(m.up(last(x))), 3),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_chain_loses_its_permutes(name: str) -> None:
    body, permutes = POSITIVE[name]
    run = check(chain(body), X)
    assert run.context.counts["fuse_transpose"] == permutes and run.ops["permute"] == 0
    assert all(n.args[10] == 1 for n in run.graph.graph.nodes if "tile_gemm" in str(n.target))


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_becomes_a_channel_norm(affine: bool) -> None:
    model = chain(lambda m, x: first(m.down(F.gelu(m.up(m.norm(last(m.dw(x))))))) + x)
    if not affine:
        model.norm = nn.LayerNorm(8, eps=0.5, elementwise_affine=False)
    run = check(model, X)
    assert run.context.counts["fuse_transpose"] == 2 and run.ops["layer_norm"] + run.ops["permute"] == 0
    assert run.ops["tile_gemm"] == 2 and run.ops["channel_norm"] == 1


TWINS: dict[str, Callable[..., object]] = {
    "extra user inside": lambda m, x: (y := m.up(last(m.dw(x))), first(m.down(F.relu(y)))),
    "permute with another user": lambda m, x: (y := last(m.dw(x)), first(m.down(m.up(y)))),
    "no way out": lambda m, x: m.down(F.relu(m.up(last(m.dw(x))))),
    "another permute": lambda m, x: m.down(F.relu(m.up(last(m.dw(x))))).permute(0, 3, 2, 1),
    "not from channels first": lambda m, x: first(m.down(F.relu(m.up(m.dw(x).permute(0, 3, 2, 1))))),
    "shift inside": lambda m, x: first(m.down(F.relu(m.up(last(m.dw(x))))) + m.scale) + x,
    "norm over more": lambda m, x: first(m.down(m.up(F.layer_norm(last(m.dw(x)), (6, 8))))) + x,
    "softmax inside": lambda m, x: first(m.down(m.up(last(m.dw(x))).amax(3, keepdim=True).expand(2, 5, 6, 16))) + x,
    "residual inside": lambda m, x: first(m.down(F.relu(m.up(last(m.dw(x))))) + last(x)),
}


@pytest.mark.parametrize("name", TWINS)
def test_twin_keeps_its_permutes(name: str) -> None:
    run = check(chain(TWINS[name]), X)
    assert run.context.counts["fuse_transpose"] == 0 and run.ops["permute"] >= 1
    assert all(n.args[10] == -1 for n in run.graph.graph.nodes if "tile_gemm" in str(n.target))


def test_a_linear_layer_without_zeros_joins_its_chain() -> None:
    model = chain(POSITIVE["two layers"][0])
    model.down.weight.data.fill_(1)
    run = check(model, X)
    assert run.context.counts["fuse_transpose"] == 2 and run.ops["linear"] + run.ops["permute"] == 0


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 8, 1, 6), (3, 8, 5, 1)])
def test_sizes_of_one(shape: tuple[int, ...]) -> None:
    assert check(chain(POSITIVE["two layers"][0]), integers(*shape, seed=8)).context.counts["fuse_transpose"] == 2


def test_under_a_dynamic_batch() -> None:
    model = chain(POSITIVE["two layers"][0])
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch in (2, 4, 3):
            x = integers(batch, 8, 5, 6, seed=batch)
            assert_model(fast.call(x), model, (x,), f"batch {batch}")
    assert len(fast.graphs) == 1 and fast.contexts[0].counts["fuse_transpose"] == 2
