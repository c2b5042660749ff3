"""A training graph in which nothing is pruned runs the very programs of stock Inductor, forward and backward."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fxprune.lowering.measure_gradient import MeasureGradient
from torch import Tensor, nn
from torch._inductor.utils import run_fw_bw_and_get_code

import fxprune
from fxprune.gradients import GradientTimes


@pytest.fixture(autouse=True)
def no_caches() -> Iterator[None]:
    """A program that comes from a cache is not written again, and may be another's."""
    torch._dynamo.reset()
    inductor = torch._inductor.config.patch(fx_graph_cache=False)
    with inductor, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Attention-like: each weight is read by forward and backward, through views of its inputs and of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.gelu(self.first(self.norm(x))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def programs(call: Callable[..., Any], x: Tensor) -> tuple[str, ...]:
    """Return the source of forward and backward, without names that count compiles."""
    _, sources = run_fw_bw_and_get_code(lambda: call(x))
    assert len(sources) == 2
    return tuple(re.sub(r"AOT ID: .*|'\d+_(forward|backward)'", "", source) for source in sources)


def x_of_net() -> Tensor:
    return torch.randn(4, 8, 32)


@functools.cache
def stock(dynamic: bool | None = None) -> tuple[str, ...]:
    try:
        return programs(torch.compile(net(), dynamic=dynamic), x_of_net())
    finally:
        torch._dynamo.reset()


def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: GradientTimes(1.0, 2.0, 1.5))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", [{}, {"grad_sparsity": "auto:2:4"}], ids=["plain", "auto"])
def test_what_is_not_pruned_is_stock(options: dict[str, Any], dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    slower(monkeypatch)
    x = x_of_net()
    call = torch.compile(net(), backend=fxprune.hwprune, options=options, dynamic=dynamic)
    assert programs(call, x) == stock(dynamic)


def test_a_program_built_later_is_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another model of the class, which Dynamo does not compile again."""
    slower(monkeypatch)
    x = x_of_net()
    expected = stock()
    options = {"grad_sparsity": "auto:2:4"}
    programs(torch.compile(net(), backend=fxprune.hwprune, options=options), x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert programs(torch.compile(net(), backend=fxprune.hwprune, options=options), x) == expected


def saved(backward: str) -> list[str]:
    """Return what a backward reads."""
    found = re.search(r"def call\(self, args\):\s+(.*) = args", backward)
    assert found is not None
    return found[1].split(", ")


def test_a_pruned_graph_saves_what_stock_saves() -> None:
    """Parameters, not views of them; and the counters of its random numbers."""
    x = x_of_net()
    _, expected = stock()
    options = {"grad_sparsity": "2:4", "autotune": "off"}
    _, given = programs(torch.compile(net(), backend=fxprune.hwprune, options=options), x)
    assert given.count("fxprune.nm_prune") > expected.count("fxprune.nm_prune") == 0
    counters = f"primals_{len(list(net().parameters())) + 2}"
    assert [name for name in saved(given) if name != counters] == saved(expected)
