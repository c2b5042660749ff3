"""Views of sizes read elements, not memory; views that are more than that, and graphs that write, keep theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracle import Run, assert_exact, check, compiled, integer_model, integers, rewritten, zero_some
from tests.strategies import seeds

X = integers(2, 8, 6, 6, seed=1)


class Conv(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(8, 16, 1), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.conv(x))


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def ran(body: Callable[[Tensor], Tensor], x: Tensor = X) -> Run:
    return check(zero_some(integer_model(Conv(body))), last(x))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sizes": lambda y: y.permute(0, 2, 3, 1).view(2, 36, 16) + 1,
    "a list": lambda y: y.permute(0, 2, 3, 1).view([2, 36, 16]) + 1,
    "minus one": lambda y: y.permute(0, 2, 3, 1).view(2, -1) + 1,
    "size()": lambda y: y.permute(0, 2, 3, 1).view(y.size(0), y.shape[2] * 6, -1) + 1,
    "view_as": lambda y: y.permute(0, 2, 3, 1).view_as(torch.ones(2, 36, 16)) + 1,
    "aten": lambda y: torch.ops.aten.view.default(y.permute(0, 2, 3, 1), [2, 36, 16]) + 1,
    "two": lambda y: y.permute(0, 2, 3, 1).view(2, 36, 16).view(72, 16).t() + 1,
    "the output": lambda y: y.permute(0, 2, 3, 1).view(2, -1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_sizes_is_no_reason_to_stay_dense(name: str) -> None:
    run = ran(VIEWS[name])
    assert run.ops["tile_gemm"] == 1 and run.context.counts["relax_views"] >= 1
    assert run.ops["view"] == 0 and run.ops["view_as"] == 0


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "another dtype": lambda y: y.permute(0, 2, 3, 1).view(torch.int32) + 1,
    "a write through an alias": lambda y: write_through(y),
    "a write elsewhere": lambda y: y.permute(0, 2, 3, 1).view(2, -1) + torch.zeros(1).index_fill_(0, torch.tensor([0]), 2.0),
}


def write_through(y: Tensor) -> Tensor:
    flat = y.permute(0, 2, 3, 1).view(2, -1)
    flat[:, 3:] = 5.0
    return y + 1


@pytest.mark.parametrize("name", KEPT)
def test_a_view_that_may_be_an_alias_or_another_dtype_stays(name: str) -> None:
    run = rewritten(zero_some(integer_model(Conv(KEPT[name]))), last(X), exact=())
    assert_exact(run.output, run.expected)
    assert run.context.counts["relax_views"] == 0 and not run.changed
    assert "addresses memory" in run.context.decisions[0].reason


@given(st.permutations(range(4)), st.integers(1, 3), seeds)
def test_any_order_of_dimensions(order: list[int], batch: int, seed: int) -> None:
    """Eager takes a view only where its own layout allows; where it does, ours reads the same elements."""
    x = last(integers(batch, 8, 3, 5, seed=seed))
    model = zero_some(integer_model(Conv(lambda y: y.permute(order).view(-1) * 2)))
    try:
        model(x)
    except RuntimeError:
        return
    check(model, x)


def test_the_batch_may_be_symbolic() -> None:
    model = zero_some(integer_model(Conv(lambda y: y.permute(0, 2, 3, 1).view(y.shape[0], -1, 16) + 1)))
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 7):
            x = last(integers(batch, 8, 6, 6, seed=batch))
            assert_exact(fast.call(x), model(x), f"batch {batch}")
    assert len(fast.graphs) == 1
    assert any(d.chosen for ctx in fast.contexts for d in ctx.decisions)
