"""Weights kept two in four as a form of their own: found where they are, chosen when faster, refused when they change."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.context import Timing
from fxprune.errors import TileMismatch
from fxprune.sparsity import tile
from fxprune.sparsity.elements import keep_groups
from fxprune.sparsity.found import halved
from fxprune.sparsity.pattern import LayerMask, Tiling
from fxprune.sparsity.tvw import Tvw
from tests.integers import generator

CUDA = torch.device("cuda")
plan = importlib.import_module("fxprune.passes.plan")  # the package exports the pass under this name


def tvw(n: int = 96, k: int = 80, g: int = 32) -> LayerMask:
    """TVW's mask as the pattern chooses it: half of the rows of each tile, two in four of those."""
    gen = generator(n, k, g)
    tiling, rows = Tiling((n, k), torch.arange(n), g), torch.rand(n // g, k, generator=gen) < 0.5
    base = LayerMask(Tiling((n, k), tiling.columns, g, rows), tile.Tile().mask(tiling, list(rows)), ())
    return Tvw()._thin(torch.rand(n, k, generator=gen), base)


def two_in_four(n: int = 64, k: int = 48) -> Tensor:
    return keep_groups(torch.rand(n, k, generator=generator(n, k)), 2, 4)


def image_of(weight: Tensor, layer: LayerMask) -> Tensor:
    operands = tile.operands(weight, layer.mask, layer.tiling)
    return tile.imaged(operands, layer.tiling, CUDA, halved=True)[0]


def test_a_plan_of_tvw_keeps_its_tiles() -> None:
    planned = tvw()
    found = halved(planned.mask, 128, planned)
    assert found is not None and found.halved and found.tiling is planned.tiling
    assert bool((found.mask | ~planned.mask).all())
    assert image_of((planned.mask * torch.randn(planned.mask.shape)).bfloat16(), found).dtype == torch.int8


def test_plain_two_in_four_keeps_all_rows() -> None:
    mask = two_in_four()
    found = halved(mask, 64)
    assert found is not None and bool(found.mask.all()) and found.tiling.granularity == 64


@pytest.mark.parametrize("break_at", ((0, 0), (63, 47)))
def test_one_element_too_many_is_no_form(break_at: tuple[int, int]) -> None:
    mask = two_in_four()
    row, group = break_at[0], break_at[1] // 4 * 4
    mask[row, group : group + 3] = True
    assert halved(mask, 64) is None


def test_a_weight_that_keeps_more_is_refused() -> None:
    mask = two_in_four()
    found = halved(mask, 64)
    assert found is not None
    weight = torch.ones(mask.shape).half()
    with pytest.raises(TileMismatch, match="more than two of four rows"):
        image_of(weight, found)


@pytest.mark.parametrize("faster", (True, False))
def test_the_measurement_decides(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    planned = tvw()
    seen: list[bool] = []

    def measure(match: Any, layer: LayerMask) -> Timing:
        seen.append(layer.halved)
        return Timing(1.0 if layer.halved == faster else 2.0, 3.0, 3.0, measured=True)

    match: Any = SimpleNamespace(
        kind="linear", recurrent=None, on_gpu=True, tile_width=lambda g: g, geometry=SimpleNamespace(groups=1),
        value=SimpleNamespace(dtype=torch.bfloat16),
    )  # fmt: skip
    ctx: Any = SimpleNamespace(inference=True, measure=measure)
    monkeypatch.setattr(plan, "_native", lambda *_: 128)
    monkeypatch.setattr(plan, "_refusal", lambda *_: None)
    form = plan._form(match, planned.mask, planned, True, ctx)
    assert form is not None and form.halved == faster and {True, False} <= set(seen)
    for gpu, dtype in ((True, torch.float32), (False, torch.bfloat16)):  # no such product there
        match.on_gpu, match.value.dtype = gpu, dtype
        seen.clear()
        plan._form(match, planned.mask, planned, True, ctx)
        assert True not in seen
