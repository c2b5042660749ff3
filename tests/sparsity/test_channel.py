"""The filter rule's scores, and masks of submatrices."""

from __future__ import annotations

import pytest
import torch

from fxprune.errors import TileMismatch
from fxprune.sparsity import channel, get, refit, tile
from fxprune.sparsity.pattern import Tiling


def test_scores_by_hand() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 0.0], [3.0, -1.0]])
    assert channel.filter_scores(weight, weight.abs(), "l1").tolist() == [7, 0, 4]
    assert channel.filter_scores(weight, weight.abs(), "l2").tolist() == [25, 0, 10]
    distances = torch.tensor([5 + 3, 5 + 10**0.5, 3 + 10**0.5])
    found = channel.filter_scores(weight, weight.abs(), "fpgm")
    assert torch.allclose(found / found.sum(), distances / distances.sum())


def test_fpgm_prunes_the_filter_that_others_replace() -> None:
    weight = torch.tensor([[9.0, 9.0], [9.0, 8.0], [9.0, 10.0], [0.1, 0.1]])
    assert channel.filter_scores(weight, weight, "fpgm").argmin() == 0  # large, but in the middle of the others
    assert channel.filter_scores(weight, weight, "l2").argmin() == 3


def test_counts_are_multiples_of_the_step_and_never_zero() -> None:
    pattern = get("channel")
    counts = pattern.legal_counts(pattern.tiles((20, 5)), 0, 8)
    assert [n for n in range(21) if counts.legal(n)] == [8, 16, 20]


def test_a_filter_kept_in_part_is_no_channel_mask() -> None:
    pattern, mask = get("channel"), torch.ones(8, 5, dtype=torch.bool)
    mask[3, 1] = False
    with pytest.raises(TileMismatch, match="in part"):
        pattern.pack(torch.ones(8, 5), mask, pattern.tiles((8, 5)))


def test_a_mask_within_live_rows_and_columns() -> None:
    rows, columns = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([1, 1, 0, 1]).bool()
    inner = tile.infer(torch.tensor([[1.0, 0, 0], [2, 0, 1], [0, 3, 0]]), 2, drop_columns=True)
    whole = channel.within((5, 4), rows, columns, inner)
    assert torch.equal(whole.mask[rows][:, columns], inner.mask) and int(whole.mask.sum()) == int(inner.mask.sum())
    assert whole.tiling.columns.tolist() == [0, 2, 3] and whole.counts == inner.counts
    tile.Tile().pack(torch.ones(5, 4), whole.mask, whole.tiling)


def test_refit_finds_the_tiles_again_when_dead_features_are_cut_out() -> None:
    pattern = tile.Tile()
    tiling = Tiling((40, 12), torch.arange(0, 40, 2), 8)
    gen = torch.Generator().manual_seed(0)
    mask = pattern.mask(tiling, pattern.select([torch.rand(12, generator=gen) for _ in range(3)], [5, 3, 7]))
    again = refit(mask[::2], 8, depthwise=False)
    assert torch.equal(again.mask, mask[::2]) and again.counts == (5, 3, 7)
