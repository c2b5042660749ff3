"""Batch sizes that change: few recompiles, and the same numbers at each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.oracle import assert_exact, compiled
from tests.toys import image, mlp, mobile, pruned, rows, run


@pytest.mark.parametrize("dynamic", [None, True])
def test_twenty_batch_sizes_compile_at_most_three_times(dynamic: bool | None) -> None:
    model = pruned(mobile(), image())
    fast = compiled(model, dynamic=dynamic)
    for batch in (4, 7, *range(2, 20)):
        assert_exact(run(fast.call, image(batch)), run(model, image(batch)), f"batch {batch}")
    assert len(fast.contexts) <= (3 if dynamic is None else 2)
    assert all(d.chosen for context in fast.contexts for d in context.decisions)


def test_batch_one_and_many_take_turns() -> None:
    model = pruned(mobile(), image())
    fast = compiled(model)
    for batch in (1, 5, 1, 3, 1, 8):
        assert_exact(run(fast.call, image(batch)), run(model, image(batch)), f"batch {batch}")
    assert len(fast.contexts) <= 3


def test_marked_dynamic_from_the_first_call() -> None:
    model = pruned(mlp(), rows())
    fast = compiled(model)
    for batch in (4, 9, 13, 64):
        x = rows(batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert_exact(run(fast.call, x), run(model, x), f"batch {batch}")
    assert len(fast.contexts) == 1


def test_image_sizes_that_change() -> None:
    model = pruned(nn.Sequential(*list(mobile().children())[:5]).eval(), image())
    fast = compiled(model, dynamic=True)
    for side in (8, 5, 11, 16):
        x = image(2)[:, :, :1, :1].repeat(1, 1, side, side + 1) * torch.arange(side + 1)
        assert_exact(run(fast.call, x), run(model, x), f"side {side}")
    assert len(fast.contexts) <= 2


def test_packed_sizes_are_not_mistaken_for_the_batch() -> None:
    """A tile_ptr of two entries beside a batch of two, under Inductor."""
    model = pruned(mlp(), rows())
    options = {"autotune": "off", "min_speedup": 0.0}
    fast = torch.compile(model, backend="hwprune", dynamic=True, options=options)
    for batch in (2, 3, 5):
        assert_exact(run(fast, rows(batch)), run(model, rows(batch)), f"batch {batch}")
    with torch.no_grad():
        model[0].weight[:, 0] = 1.0  # rebuilds after Dynamo has finished
    for batch in (2, 3, 5):
        assert_exact(run(fast, rows(batch)), run(model, rows(batch)), f"rebuilt, batch {batch}")


def test_decisions_use_the_hint_and_add_no_guard() -> None:
    model = pruned(mlp(), rows())
    fast = compiled(model, dynamic=True, autotune="fast")
    for batch in (4, 8, 16, 128):
        assert_exact(run(fast.call, rows(batch)), run(model, rows(batch)), f"batch {batch}")
    assert len(fast.contexts) == 1


class Chosen(nn.Module):
    """A model over the rows that do not begin with a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[x[:, 0].nonzero().flatten()])


@pytest.mark.parametrize("measured", ("off", "fast"))
def test_sizes_that_the_data_decide(measured: str, tmp_path: Path) -> None:
    """Nobody knows how many rows there will be: speed is judged at a guess, for any number the result is right."""
    x = rows(6)
    model = pruned(Chosen().eval(), x)
    fast = compiled(model, autotune=measured)
    options = {"autotune": measured, "min_speedup": 0.0}
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for left in (6, 4, 1):
            x[left:, 0] = 0
            assert_exact(run(fast.call, x), run(model, x), f"{left} left")
        (context,) = fast.contexts
        assert all(d.chosen for d in context.decisions)
        assert fxprune.explain(model, x, **options).summary["chosen"] == "2 of 2"
    fxprune.export(model, x, tmp_path / "model.pt2", **options)
    assert_exact(fxprune.load(tmp_path / "model.pt2")(x), run(model, x))
