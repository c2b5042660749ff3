"""A gate of one number per image and channel goes into the 1x1 convolution that reads the product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import assert_model, check, compiled, integer_model, integers, zero_some

X = integers(2, 8, 6, 6, seed=5)


class Gated(nn.Module):
    def __init__(self, body: Callable[..., object]) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.pw, self.strided = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1, stride=2)
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)

    def gate(self, x: Tensor) -> Tensor:
        return F.relu6(self.squeeze(x.amax((2, 3), keepdim=True)))


def gated(body: Callable[..., object]) -> nn.Module:
    return zero_some(integer_model(Gated(body)))


@pytest.mark.parametrize("swap", [False, True])
def test_gate_fuses(swap: bool) -> None:
    run = check(gated(lambda m, x: m.pw(m.gate(x) * x if swap else x * m.gate(x))), X)
    assert run.context.counts["fuse_gate"] == 1 and run.ops["mul"] == 0
    (node,) = [n for n in run.graph.graph.nodes if "tile_gemm" in str(n.target) and n.args[7] is not None]
    assert node.args[7].meta["example_value"].shape == (2, 8)


TWINS: dict[str, Callable[..., object]] = {
    "extra user": lambda m, x: (y := x * m.gate(x), m.pw(y)),
    "per pixel": lambda m, x: m.pw(x * x.amax(1, keepdim=True)),
    "whole product": lambda m, x: m.pw(x * (x + 1)),
    "one gate for all channels": lambda m, x: m.pw(x * m.gate(x)[:, :1]),
    "one gate for all images": lambda m, x: m.pw(x * m.gate(x)[:1]),
    "number": lambda m, x: m.pw(x * 2),
    "activation after the product": lambda m, x: m.pw(F.relu6(x * m.gate(x))),
    "stride": lambda m, x: m.strided(x * m.gate(x)),
    "widening": lambda m, x: m.pw((x * m.gate(x).double()).float()),
    "mutation": lambda m, x: m.pw((x * (g := m.gate(x))) + 0 * g.add_(1)),
    "integer activation": lambda m, x: m.pw(x.long() * m.gate(x)),
}


@pytest.mark.parametrize("name", TWINS)
def test_twin_does_not_fuse(name: str) -> None:
    if name == "widening":  # compared in float32 only: the cast back is not a cast in an fp64 run
        model = gated(TWINS[name])
        with torch.no_grad():
            assert torch.equal(compiled(model).call(X), model(X))
        return
    run = check(gated(TWINS[name]), X)
    assert run.context.counts["fuse_gate"] == 0 and run.ops["mul"] >= 1
    assert any(d.chosen and d.match.kind == "pointwise" for d in run.context.decisions)


def test_gate_under_a_dynamic_batch() -> None:
    model = gated(lambda m, x: m.pw(x * m.gate(x)))
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 2):
            x = integers(batch, 8, 6, 6, seed=batch)
            assert_model(fast.call(x), model, (x,), f"batch {batch}")
    assert len(fast.graphs) == 1 and all(c.counts["fuse_gate"] == 1 for c in fast.contexts)
