"""Element-wise patterns: exact targets, exact groups, tiles with groups and with an overlay, and what a mask runs as."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.config import Config
from fxprune.context import Unit
from fxprune.errors import ConfigError, NonFiniteWeight
from fxprune.sparsity import get, tile
from fxprune.sparsity.elements import elements, keep_elements, keep_groups
from fxprune.sparsity.found import describe, forms
from fxprune.sparsity.pattern import Ask, LayerMask

sizes = st.sampled_from([1, 3, 4, 7, 16, 33, 64, 70])
seeds = st.integers(0, 2**32 - 1)


def drawn(n: int, k: int, seed: int, levels: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (n, k), generator=gen).float() if levels else torch.rand(n, k, generator=gen)


def choose(name: str, importances: dict[str, Tensor], sparsity: float, **options: object) -> dict[str, LayerMask]:
    config = Config(**options)  # type: ignore[arg-type]
    share, kinds = dict.fromkeys(importances, sparsity), dict.fromkeys(importances, "linear")
    return get(name).choose(Ask(importances, share, kinds, config, lambda kind: Unit(64)))


@given(n=sizes, k=sizes, share=st.floats(0.0, 0.99), levels=st.sampled_from([0, 3]), seed=seeds)
def test_unstructured_keeps_exactly_what_was_asked(n: int, k: int, share: float, levels: int, seed: int) -> None:
    scores = drawn(n, k, seed, levels)
    layer = choose("unstructured", {"w": scores}, share)["w"]
    count = n * k - round(share * n * k)
    assert int(layer.mask.sum()) == count == sum(layer.counts)
    order = scores.flatten().argsort(descending=True, stable=True)[:count]
    assert layer.mask.flatten()[order].all()


def test_unstructured_global_ranks_all_layers() -> None:
    scores = {"low": drawn(20, 30, 0) * 0.1, "high": drawn(30, 40, 1)}
    plan = choose("unstructured", scores, 0.6, scope="global")
    assert sum(int(layer.mask.sum()) for layer in plan.values()) == 1800 - 360 - 720
    assert plan["low"].mask.float().mean() < 0.1 < plan["high"].mask.float().mean()
    with pytest.raises(NonFiniteWeight, match="'w' holds 1"):
        choose("unstructured", {"w": torch.tensor([[1.0, torch.nan]])}, 0.5)


def test_keep_elements_of_nothing_and_of_everything() -> None:
    assert keep_elements([], 3) == []
    kept = keep_elements([torch.ones(2, 2), torch.zeros(3)], 9)
    assert all(bool(part.all()) for part in kept)
    assert not any(bool(part.any()) for part in keep_elements([torch.ones(2, 2)], -1))


@given(n=sizes, k=sizes, m=st.integers(1, 32), data=st.data(), seed=seeds)
def test_n_of_m_keeps_the_largest_of_each_group(n: int, k: int, m: int, data: st.DataObject, seed: int) -> None:
    kept = data.draw(st.integers(1, m))
    scores = drawn(n, k, seed, levels=4)
    mask = keep_groups(scores, kept, m)
    for first in range(0, k, m):
        group, chosen = scores[:, first : first + m], mask[:, first : first + m]
        width = group.shape[1]
        quota = kept if width == m else -(-kept * width // m)
        assert bool((chosen.sum(1) == quota).all())
        order = group.argsort(dim=1, descending=True, stable=True)[:, :quota]
        assert bool(chosen.gather(1, order).all())


def test_n_of_m_has_one_sparsity() -> None:
    model, x = nn.Linear(64, 32), torch.randn(2, 64)
    for sparsity in (None, 0.5, 0.505):
        assert fxprune.prune(model, x, sparsity=sparsity, pattern="2:4").sparsity["all"] == 0.5
    with pytest.raises(ConfigError, match=r"0\.5, all that pattern '2:4' can leave"):
        fxprune.prune(model, x, sparsity=0.6, pattern="2:4")
    with pytest.raises(ConfigError, match="'sparsity' got None; expected a fraction of zeros"):
        fxprune.prune(model, x)


@pytest.mark.parametrize("name, kept", [("block", 4), ("block:16x8", 32), ("block:64x64", 1)])
def test_block_keeps_the_nearest_number_of_blocks(name: str, kept: int) -> None:
    layer = choose(name, {"w": drawn(128, 128, 3)}, 0.75)["w"]
    blocks = get(name)._blocks(layer.mask.float()).mean((2, 3))  # type: ignore[attr-defined]
    assert int(blocks.sum()) == kept and bool(((blocks == 0) | (blocks == 1)).all())


@given(
    n=st.sampled_from([8, 24, 40, 70]),
    k=st.sampled_from([32, 48, 80, 100]),
    share=st.sampled_from([0.5, 0.6, 0.75, 0.9]),
    seed=seeds,
)
def test_tvw_keeps_n_of_m_of_the_compacted_rows(n: int, k: int, share: float, seed: int) -> None:
    scores = drawn(n, k, seed) + 0.01
    layer = choose("tvw", {"w": scores}, share, granularity=16)["w"]
    for t in range(layer.tiling.tiles):
        inside = layer.mask[layer.tiling.members(t)]
        assert layer.tiling.rows is not None
        rows = layer.tiling.rows[t]
        assert not bool(inside[:, ~rows].any()) and int(rows.sum()) == layer.counts[t]
        compact = inside[:, rows]
        assert torch.equal(keep_groups(scores[layer.tiling.members(t)][:, rows], 2, 4), compact)
    units = max(16 * 4, k)  # tiles and columns are rounded
    assert abs(int(layer.mask.sum()) - (1 - share) * n * k) <= max(2 * units, 0.03 * n * k)


def test_tvw_and_tew_say_what_they_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"at least 0\.5"):
        choose("tvw", {"w": drawn(64, 64, 0)}, 0.4)
    with pytest.raises(ConfigError, match=r"less than 0\.95"):
        choose("tew", {"w": drawn(64, 64, 0)}, 0.96)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_tew_restores_the_best_of_what_the_tiles_dropped(scope: str) -> None:
    scores = {"a": drawn(128, 96, 1), "b": drawn(96, 128, 2)}
    plan = choose("tew:0.1", scores, 0.7, scope=scope)
    kept = 0
    for name, layer in plan.items():
        assert layer.rest is not None
        base = layer.mask & ~layer.rest.mask
        assert tile.is_tile_wise(base, layer.tiling) and not bool((base & layer.rest.mask).any())
        kept += int(layer.mask.sum())
        if scope == "layer":
            dropped = scores[name].masked_fill(base, -1.0)
            assert dropped[layer.rest.mask].min() >= dropped[~layer.mask].max()
            assert int(layer.rest.mask.sum()) == pytest.approx(0.1 * layer.mask.numel(), abs=64)
    assert kept == 2 * (128 * 96 - round(0.7 * 128 * 96))


def test_apriori_settles_the_densest_and_the_emptiest_rows() -> None:
    scores = drawn(64, 200, 5) * 0.5
    scores[:, 0] = 0.02  # many small elements: no element survives, so the row goes first
    scores[:16, 1] = 30.0  # few huge ones: the RMS of the row is the largest, its density is not
    rows = [choose("tile", {"w": scores}, 0.5, columns=False, apriori=a)["w"].mask[0] for a in (0.0, 0.5)]
    prior = keep_elements([scores], 6400)[0].float().mean(0)
    dense = prior.argsort(descending=True, stable=True)
    assert bool(rows[0][1]) and not bool(rows[0][0])
    assert bool(rows[1][dense[:100]].all()) and not bool(rows[1][dense[100:]].any())
    with pytest.raises(ConfigError, match="apriori"):
        choose("tile", {"w": scores}, 0.9, apriori=0.3)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("granularity", [1, 8, 16, 128, 256])
def test_tile_granularities_meet_the_target(granularity: int, columns: bool) -> None:
    layer = choose("tile", {"w": drawn(300, 500, 6)}, 0.7, granularity=granularity, columns=columns)["w"]
    assert 1.0 - layer.mask.float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert tile.is_tile_wise(layer.mask, layer.tiling)
    assert choose("tile", {"w": drawn(300, 500, 6)}, 0.7, granularity=granularity, apriori=0.1)["w"].mask.any()


@given(n=sizes, k=sizes, share=st.sampled_from([0.2, 0.6, 0.95]), native=st.sampled_from([8, 64]), seed=seeds)
def test_every_form_covers_the_mask(n: int, k: int, share: float, native: int, seed: int) -> None:
    mask = drawn(n, k, seed) > share
    for form in forms(mask, (native, 2 * native, 4 * native, 128)):
        assert not bool((mask & ~form.mask).any())
        assert tile.is_tile_wise(form.mask, form.tiling)


def test_forms_of_plans() -> None:
    tiles = choose("tile", {"w": drawn(128, 128, 0)}, 0.75)["w"]
    assert forms(tiles.mask, (64, 128, 256), tiles) == [tiles]
    overlay = choose("tew:0.15", {"w": drawn(128, 128, 0)}, 0.8)["w"]
    granularities = {(form.tiling.granularity, form.rest is None) for form in forms(overlay.mask, (64, 128, 256), overlay)}
    assert {(64, False), (1, True)} <= granularities
    thin = choose("tvw", {"w": drawn(128, 128, 0)}, 0.75)["w"]
    *best, last = (form.tiling.granularity for form in forms(thin.mask, (64, 128, 256), thin))
    assert set(best) == {1, 64} and last == 256  # one wide tile keeps more


def test_zeros_are_described() -> None:
    scores = drawn(64, 64, 8)
    masks = {name: choose(name, {"w": scores}, share)["w"].mask for name, share in (("2:4", 0.5), ("1:4", 0.75))}
    masks["tile"] = choose("tile", {"w": scores}, 0.6)["w"].mask
    masks["unstructured"] = choose("unstructured", {"w": scores}, 0.6)["w"].mask
    assert {name: describe(mask, 64) for name, mask in masks.items()} == {name: name for name in masks}


def test_elements_leave_out_empty_features() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    layer = elements(mask)
    assert layer.tiling.columns.tolist() == [0, 2] and layer.counts == (2, 1)
