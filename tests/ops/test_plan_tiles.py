"""What plans of tiles are made with: exact on integers, equal to the references, and bad arguments are refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxprune.lowering import library
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops import plan_tiles

pytestmark = pytest.mark.skipif(not library.available(), reason="the compiled library is missing")
OPS = torch.ops.fxprune
seeds = st.integers(0, 2**32 - 1)


def some_columns(n: int, share: float, gen: torch.Generator) -> Tensor:
    return (torch.rand(n, generator=gen) < share).nonzero().flatten()


@pytest.mark.parametrize("shape", [(64, 256), (130, 257), (3, 5), (1, 1), (96, 64), (7, 0), (40, 1000)])
@pytest.mark.parametrize("granularity", [1, 8, 64, 1000])
@pytest.mark.parametrize("share", [1.1, 0.6, -1.0])
def test_scores_are_the_mean_squares_rounded_once(shape: tuple[int, int], granularity: int, share: float, isa: str) -> None:
    gen = torch.Generator().manual_seed(shape[0])
    columns = some_columns(shape[0], share, gen)
    for values in (torch.randint(-30, 31, shape, generator=gen).float(), torch.randn(shape, generator=gen)):
        found = OPS.tile_scores(values, columns, granularity)
        assert torch.equal(found, plan_tiles.tile_scores(values, columns, granularity))
        for tile, members in enumerate(columns.split(granularity) if len(columns) else ()):
            squares = [math.fsum(v * v for v in column) for column in values[members].t().double().tolist()]
            right = torch.tensor([math.sqrt(s / len(members)) for s in squares], dtype=torch.float64)
            torch.testing.assert_close(found[tile].double(), right, rtol=2**-23, atol=0)


def test_scores_of_very_large_and_small_values_are_in_range() -> None:
    for scale in (2.0**-130, 2.0**127):
        scores = OPS.tile_scores(torch.full((4, 3), scale), torch.arange(4), 2)
        assert torch.equal(scores, torch.full((2, 3), scale))
    bad = torch.ones(4, 40)
    bad[1, 3], bad[2, 39] = torch.nan, -torch.inf
    scores = OPS.tile_scores(bad, torch.arange(4), 2)
    assert scores[0, 3].isnan() and scores[1, 39] == torch.inf and int((scores == 1).sum()) == 78


@given(
    tiles=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    units=st.integers(1, 60),
    share=st.floats(-0.1, 1.1),
    ties=st.booleans(),
    even=st.booleans(),
    guarded=st.booleans(),
    seed=seeds,
)
def test_the_best_are_kept(
    tiles: list[int], units: int, share: float, ties: bool, even: bool, guarded: bool, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    scores = [torch.rand(t, units, generator=gen) for t in tiles]
    if ties:
        scores = [(4 * s).round() - 1 for s in scores]
        for s in scores:
            s[s == 3] = torch.inf
            s[s == -1] = -torch.inf
    weights = [torch.full((t,), 8) if even else torch.randint(1, 65, (t,), generator=gen) for t in tiles]
    budget = share * sum(int(w.sum()) * units for w in weights)
    found = OPS.keep_best(scores, weights, budget, guarded)
    expected = plan_tiles.keep_best(scores, weights, budget, guarded)
    assert len(found) == len(tiles)
    for kept, right, score in zip(found, expected, scores, strict=True):
        assert kept.dtype == torch.bool and torch.equal(kept, right)
        assert kept[score == torch.inf].all() and (guarded or not kept[score == -torch.inf].any())
        assert not (guarded and len(score)) or kept.gather(1, score.argmax(1, keepdim=True)).all()


def test_many_units_are_ranked_as_few_are() -> None:
    gen = torch.Generator().manual_seed(0)
    scores = [torch.randn(5, 3000, generator=gen), (9 * torch.rand(2, 2000, generator=gen)).round()]
    weights = [torch.tensor([64, 64, 64, 64, 7]), torch.tensor([8, 3])]
    for share in (0.0, 0.01, 0.5, 0.77, 1.0):
        budget = share * sum(float(w.sum()) * s.shape[1] for s, w in zip(scores, weights, strict=True))
        found, right = OPS.keep_best(scores, weights, budget, True), plan_tiles.keep_best(scores, weights, budget, True)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5), (17, 31), (64, 16, 3, 3), (130, 257)])
def test_held_scores_rank_above_what_is_pruned(shape: tuple[int, ...], isa: str) -> None:
    gen = torch.Generator().manual_seed(0)
    drawn = torch.rand(shape, generator=gen), torch.zeros(shape), torch.randint(-2, 9, shape, generator=gen).float()
    for scores in drawn:
        kept = torch.rand(shape, generator=gen) < 0.6
        for share, magnitudes in itertools.product((2.0**-20, 0.5), (False, True)):
            held = OPS.held_scores(scores, kept, share, magnitudes)
            assert torch.equal(held, plan_tiles.held_scores(scores, kept, share, magnitudes))
            assert not held[~kept].any() and (held[kept] > 0).all()
            own = scores.abs() if magnitudes else scores
            above = kept & (own >= share * max(float(own.max()) if own.numel() else 0.0, share))
            assert torch.equal(held[above], own[above])


def test_held_scores_that_are_not_finite_stay_so() -> None:
    for bad in (torch.nan, torch.inf):
        scores = torch.ones(40)
        scores[3] = scores[39] = bad
        held = OPS.held_scores(scores, torch.ones(40, dtype=torch.bool), 1e-9, False)
        assert not held[3].isfinite() and not held[39].isfinite()


@given(groups=st.integers(1, 6), width=st.integers(1, 40), shared=st.sampled_from([1, 8, 24, 32, 64]), seed=seeds)
def test_rows_that_are_the_same_are_found(groups: int, width: int, shared: int, seed: int) -> None:
    few = torch.rand(groups, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = few.repeat_interleave(shared, 0)
    found = OPS.shared_rows(mask, [64, 32, 8])
    assert found == plan_tiles.shared_rows(mask, [64, 32, 8]) and found >= (shared if shared != 24 else 8)
    assert torch.equal(mask[::found].repeat_interleave(found, 0), mask)
    mask[-1, -1] ^= True
    assert OPS.shared_rows(mask, [64, 32, 8]) == plan_tiles.shared_rows(mask, [64, 32, 8])
    assert OPS.shared_rows(mask[:, :0], [64]) == plan_tiles.shared_rows(mask[:, :0], [64]) == 1


@pytest.mark.parametrize("shape", [(64, 256), (130, 257), (3, 5), (1, 1), (7, 0), (600, 33)])
@pytest.mark.parametrize("granularity", [1, 8, 300, 1000])
@pytest.mark.parametrize("share", [1.1, 0.6, -1.0])
def test_features_that_keep_a_row_are_counted(shape: tuple[int, int], granularity: int, share: float, isa: str) -> None:
    gen = torch.Generator().manual_seed(shape[0])
    columns = some_columns(shape[0], share, gen)
    for kept in (0.0, 0.3, 1.1):
        mask = torch.rand(shape, generator=gen) < kept
        counts = OPS.tile_counts(mask, columns, granularity)
        assert counts.dtype == torch.int32
        assert torch.equal(counts, plan_tiles.tile_counts(mask, columns, granularity))
        assert int(counts.sum()) == int(mask[columns].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (3, 5), (17, 31), (600, 900)])
def test_one_value_outside_the_mask_is_found(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    gen = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=gen) < 0.5
    values = torch.where(mask, torch.randn(shape, generator=gen), -0.0).to(dtype)
    assert OPS.zero_outside(values, mask) and plan_tiles.zero_outside(values, mask)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # a denormal
    outside = (~mask).flatten().nonzero().flatten()
    for bad in (smallest, -smallest, torch.nan, torch.inf, 1.0):
        for place in {*outside[:2].tolist(), *outside[-2:].tolist()}:
            wrong = values.clone()
            wrong.view(-1)[place] = bad
            assert not OPS.zero_outside(wrong, mask) and not plan_tiles.zero_outside(wrong, mask)


SCORES, COLUMNS, WEIGHTS = torch.rand(4, 6), torch.arange(4), torch.ones(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.tile_scores(SCORES.double(), COLUMNS, 2), "importance must be float32"),
        (lambda: OPS.tile_scores(SCORES.t(), COLUMNS, 2), "importance must be contiguous"),
        (lambda: OPS.tile_scores(SCORES[0], COLUMNS, 2), r"importance must have 2 dimensions, got shape \(6\)"),
        (lambda: OPS.tile_scores(SCORES, COLUMNS.int(), 2), "columns must be int64"),
        (lambda: OPS.tile_scores(SCORES, COLUMNS + 1, 2), r"columns must lie in \[0, 4\), got 4"),
        (lambda: OPS.tile_scores(SCORES, COLUMNS - 1, 2), r"columns must lie in \[0, 4\), got -1"),
        (lambda: OPS.tile_scores(SCORES, COLUMNS, 0), "granularity must be at least 1, got 0"),
        (lambda: OPS.keep_best([SCORES], [], 1.0, True), "as many, got 1 and 0"),
        (lambda: OPS.keep_best([SCORES], [WEIGHTS[1:]], 1.0, True), r"weights must have shape \(4\), got \(3\)"),
        (lambda: OPS.keep_best([SCORES], [WEIGHTS - 1], 1.0, True), r"weights must lie in \[1, 2\^40\], got 0"),
        (lambda: OPS.keep_best([SCORES.half()], [WEIGHTS], 1.0, True), "scores must be float32"),
        (lambda: OPS.held_scores(SCORES.double(), SCORES > 0, 0.1, True), "scores must be float32"),
        (lambda: OPS.held_scores(SCORES, SCORES, 0.1, True), "kept must be bool"),
        (lambda: OPS.held_scores(SCORES.t(), SCORES.t() > 0, 0.1, True), "must be contiguous"),
        (lambda: OPS.held_scores(SCORES, SCORES[1:] > 0, 0.1, True), r"shape of scores, \(4, 6\), got \(3, 6\)"),
        (lambda: OPS.shared_rows(SCORES, [8]), "mask must be bool"),
        (lambda: OPS.shared_rows(SCORES.t() > 0, [8]), "mask must be contiguous"),
        (lambda: OPS.shared_rows(SCORES > 0, [8, 0]), "groups must be positive, got 0"),
        (lambda: OPS.tile_counts(SCORES, COLUMNS, 2), "mask must be bool"),
        (lambda: OPS.tile_counts(SCORES.t() > 0, COLUMNS, 2), "mask must be contiguous"),
        (lambda: OPS.tile_counts(SCORES > 0, COLUMNS.int(), 2), "columns must be int64"),
        (lambda: OPS.tile_counts(SCORES > 0, COLUMNS + 1, 2), r"columns must lie in \[0, 4\), got 4"),
        (lambda: OPS.tile_counts(SCORES > 0, COLUMNS, 0), "granularity must be at least 1, got 0"),
        (lambda: OPS.zero_outside(COLUMNS, COLUMNS > 0), "values must be float16, bfloat16, float32 or float64"),
        (lambda: OPS.zero_outside(SCORES, SCORES), "mask must be bool"),
        (lambda: OPS.zero_outside(SCORES.t(), SCORES.t() > 0), "must be contiguous"),
        (lambda: OPS.zero_outside(SCORES, SCORES[1:] > 0), r"shape of values, \(4, 6\), got \(3, 6\)"),
    ],
)
def test_they_refuse(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
