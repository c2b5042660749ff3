"""Properties every sparsity pattern has: exact pack and unpack, checked format, deterministic selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.config import Config
from fxprune.context import Unit
from fxprune.errors import PackedFormatError, TileMismatch, UnknownPattern
from fxprune.sparsity import PATTERNS, get
from fxprune.sparsity.block import Block
from fxprune.sparsity.pattern import Ask, Counted, Packed, Pattern, Tiling, keep_largest
from fxprune.sparsity.tile import Tile
from fxprune.sparsity.unstructured import Unstructured

EVERY: list[Any] = [*PATTERNS, *map(get, ("1:2", "3:7", "block:4x3", "tvw:1:2", "tew:0.1"))]
COUNTED = [p for p in EVERY if hasattr(p, "select")]
each_pattern = pytest.mark.parametrize("pattern", COUNTED, ids=lambda p: p.name)
every_pattern = pytest.mark.parametrize("pattern", EVERY, ids=lambda p: p.name)
sizes = st.sampled_from([1, 2, 7, 8, 9, 16, 31, 33, 65, 70])
seeds = st.integers(0, 2**32 - 1)


def planned(pattern: Pattern, importance: Tensor, granularity: int, sparsity: float = 0.6) -> tuple[Tensor, Tiling]:
    """Return the mask and tiling that ``pattern`` chooses for one layer."""
    kind = pattern.kinds[-1]
    share = sparsity if pattern.fixed is None else pattern.fixed
    config = Config(granularity=granularity, group=granularity)
    layer = pattern.choose(Ask({"w": importance}, {"w": share}, {"w": kind}, config, lambda kind: Unit(granularity)))["w"]
    return layer.mask, layer.tiling


def case(pattern: Counted, n: int, k: int, granularity: int, seed: int) -> tuple[Tensor, Tensor, Tiling, list[int]]:
    """Draw a weight, a legal mask with random counts, its tiling and the counts."""
    gen = torch.Generator().manual_seed(seed)
    tiling = pattern.tiles((n, k), granularity)
    if pattern.name == "tile":
        columns = torch.nonzero(torch.rand(n, generator=gen) < 0.7).flatten()
        tiling = Tiling((n, k), columns, granularity)
    weight = torch.randn(n, k, generator=gen)
    weight[torch.rand(n, k, generator=gen) < 0.1] = 0.0  # kept zeros stay in the pack
    scores = pattern.score(weight.abs(), tiling)
    counts = [int(torch.randint(0, len(s) + 1, (), generator=gen)) for s in scores]
    if pattern.fixed is not None:
        counts = [pattern.legal_counts(tiling, t).maximum for t in range(tiling.tiles)]
    return weight, pattern.mask(tiling, pattern.select(scores, counts)), tiling, counts


@each_pattern
@given(n=sizes, k=sizes, granularity=sizes, seed=seeds)
def test_unpack_of_pack_is_the_masked_weight(pattern: Counted, n: int, k: int, granularity: int, seed: int) -> None:
    weight, mask, tiling, _ = case(pattern, n, k, granularity, seed)
    packed = pattern.pack(weight, mask, tiling)
    pattern.check(packed)
    dense = pattern.unpack(packed)
    assert torch.equal(dense, weight * mask)
    again = pattern.pack(dense, mask, tiling)
    assert again.header == packed.header
    assert all(torch.equal(again.tensors[key], packed.tensors[key]) for key in packed.tensors)


@every_pattern
@given(n=sizes, k=sizes, granularity=sizes, share=st.sampled_from([0.5, 0.75, 0.85]), seed=seeds)
def test_what_is_chosen_packs(pattern: Pattern, n: int, k: int, granularity: int, share: float, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    mask, tiling = planned(pattern, weight.abs(), granularity, share)
    packed = pattern.pack(weight, mask, tiling)
    pattern.check(packed)
    assert torch.equal(pattern.unpack(packed), weight * mask)


@each_pattern
@given(n=sizes, k=sizes, granularity=sizes, seed=seeds)
def test_mask_holds_the_counts(pattern: Counted, n: int, k: int, granularity: int, seed: int) -> None:
    if isinstance(pattern, Block):
        k *= pattern.columns  # a block that sticks out is smaller
    _, mask, tiling, counts = case(pattern, n, k, granularity, seed)
    assert len(counts) == tiling.tiles
    for tile, count in enumerate(counts):
        assert int(mask[tiling.members(tile)].sum()) == count * pattern.unit_size(tiling, tile)
    assert int(mask.sum()) == int(mask[tiling.columns].sum())


@each_pattern
@given(n=sizes, k=sizes, granularity=sizes, step=st.integers(1, 40))
def test_legal_counts_include_the_ends_and_never_zero(pattern: Counted, n: int, k: int, granularity: int, step: int) -> None:
    tiling = pattern.tiles((n, k), granularity)
    for tile, score in enumerate(pattern.score(torch.rand(n, k), tiling)):
        legal = pattern.legal_counts(tiling, tile, step)
        assert not legal.legal(0) and not legal.legal(len(score) + 1)
        assert legal.legal(legal.minimum) and legal.legal(legal.maximum)
        assert legal.maximum <= len(score) if pattern.fixed is not None else legal.maximum == len(score)


@each_pattern
def test_ties_go_to_the_lower_index(pattern: Counted) -> None:
    tiling = pattern.tiles((40, 25), 16)
    scores = pattern.score(torch.ones(40, 25), tiling)
    if pattern.fixed is not None:
        return  # ties inside a group: test_elements.py
    counts = [len(s) // 3 for s in scores]
    for chosen, count in zip(pattern.select(scores, counts), counts, strict=True):
        assert chosen[:count].all() and not chosen[count:].any()


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=seeds)
def test_keep_largest_keeps_the_largest(sizes: list[int], seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 5, (n,), generator=gen).float() for n in sizes]
    counts = [int(torch.randint(0, n + 1, (), generator=gen)) for n in sizes]
    for score, count, kept in zip(scores, counts, keep_largest(scores, counts), strict=True):
        expected = sorted(range(len(score)), key=lambda i, s=score: (-s[i].item(), i))[:count]
        assert sorted(expected) == kept.nonzero().flatten().tolist()


@pytest.mark.parametrize("counts", [[3], [-1], [1, 1]])
def test_keep_largest_refuses_impossible_counts(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="count"):
        keep_largest([torch.ones(2)], counts)


@each_pattern
def test_empty_and_one_element_weights(pattern: Counted) -> None:
    for n in (0, 1):
        tiling = pattern.tiles((n, 1))
        mask = pattern.mask(tiling, pattern.select(pattern.score(torch.ones(n, 1), tiling), [1] * n))
        assert torch.equal(pattern.unpack(pattern.pack(torch.ones(n, 1), mask, tiling)), torch.ones(n, 1))


@every_pattern
def test_pack_refuses_other_dtypes_and_shapes(pattern: Any) -> None:
    tiling = getattr(pattern, "tiles", Tile().tiles)((8, 9), 4)
    mask = torch.ones(8, 9, dtype=torch.bool)
    with pytest.raises(TileMismatch, match=r"float64.*float32"):
        pattern.pack(torch.ones(8, 9, dtype=torch.float64), mask, tiling)
    with pytest.raises(TileMismatch, match=r"\(7, 9\).*\(8, 9\)"):
        pattern.pack(torch.ones(7, 9), mask, tiling)
    with pytest.raises(TileMismatch, match="granularity 0"):
        getattr(pattern, "tiles", Tile().tiles)((8, 9), 0)


def _set(key: str, value: object) -> Callable[[Packed], Packed]:
    return lambda p: replace(p, header={**p.header, key: value})


def _edit(key: str, change: Callable[[Tensor], object]) -> Callable[[Packed], Packed]:
    return lambda p: replace(p, tensors={**p.tensors, key: change(p.tensors[key].clone())})


def _write(key: str, where: int | tuple[int, int], value: float) -> Callable[[Packed], Packed]:
    def change(tensor: Tensor) -> Tensor:
        tensor[where] = value
        return tensor

    return _edit(key, change)


TILE_HEADER = ("out_features", "in_features", "granularity")
TILE_TENSORS = ("values", "index", "tile_ptr", "columns")
HEADER = {
    "dcp": ("channels", "taps", "group"),
    "tile": TILE_HEADER,
    "channel": TILE_HEADER,
    "unstructured": TILE_HEADER,
    "2:4": ("out_features", "in_features", "n", "m"),
    "block": ("out_features", "in_features", "rows", "columns"),
    "tvw": (*TILE_HEADER, "n", "m"),
    "tew": TILE_HEADER,
}
TENSORS = {
    "dcp": ("weight", "taps"),
    "tile": TILE_TENSORS,
    "channel": TILE_TENSORS,
    "unstructured": TILE_TENSORS,
    "2:4": ("values", "index"),
    "block": ("values", "index", "row_ptr"),
    "tvw": (*TILE_TENSORS, "place"),
    "tew": (*(f"tile_{name}" for name in TILE_TENSORS), *(f"rest_{name}" for name in TILE_TENSORS)),
}


def generic_corruptions(name: str) -> dict[str, Callable[[Packed], Packed]]:
    bad: dict[str, Callable[[Packed], Packed]] = {
        "other pattern": lambda p: replace(p, pattern="other"),
        "extra header": _set("extra", 1),
        "extra tensor": lambda p: replace(p, tensors={**p.tensors, "extra": torch.zeros(1)}),
    }
    for key in HEADER[name]:
        bad[f"no {key}"] = lambda p, key=key: replace(p, header={k: v for k, v in p.header.items() if k != key})
        for value in (-1, 1.0, True, None, "8"):
            bad[f"{key} = {value!r}"] = _set(key, value)
    for key in TENSORS[name]:
        bad[f"no {key}"] = lambda p, key=key: replace(p, tensors={k: v for k, v in p.tensors.items() if k != key})
        bad[f"{key} dtype"] = _edit(key, lambda t: t.to(torch.float64))
        bad[f"{key} rank"] = _edit(key, lambda t: t[None])
        bad[f"{key} truncated"] = _edit(key, lambda t: t[:-1])
        bad[f"{key} extended"] = _edit(key, lambda t: torch.cat([t, t[-1:]]))
        bad[f"{key} is a list"] = _edit(key, lambda t: t.tolist())
        bad[f"{key} sparse"] = _edit(key, lambda t: t.to_sparse())
        bad[f"{key} on meta"] = _edit(key, lambda t: t.to("meta"))
    return bad


SPECIFIC: dict[str, dict[str, Callable[[Packed], Packed]]] = {
    "dcp": {
        "group 0": _set("group", 0),
        "channels + 1": _set("channels", 11),
        "taps - 1": _set("taps", 8),
        "stray tap bit": _write("taps", (3, 0), 1 << 9),
        "sign bit": _write("taps", (3, 0), -(2**63)),
        "kept bit lost": _write("taps", (3, 0), 0),
        "pruned weight": _write("weight", (0, 8), 1.0),
        "pruned NaN": _write("weight", (0, 8), float("nan")),
    },
    "tile": {
        "granularity 0": _set("granularity", 0),
        "granularity 3": _set("granularity", 3),
        "in_features too small": _set("in_features", 8),
        "out_features too small": _set("out_features", 9),
        "index negative": _write("index", 0, -1),
        "index too large": _write("index", -1, 9),
        "index repeated": _edit("index", lambda t: torch.cat([t[:1], t[:1], t[2:]])),
        "index unsorted": _edit("index", lambda t: torch.cat([t[1:2], t[:1], t[2:]])),
        "tile_ptr start": _write("tile_ptr", 0, 1),
        "tile_ptr negative": _write("tile_ptr", 1, -1),
        "tile_ptr end": _write("tile_ptr", -1, 15),
        "tile_ptr decreasing": _write("tile_ptr", 1, 15),
        "columns negative": _write("columns", 0, -1),
        "columns too large": _write("columns", -1, 10),
        "columns repeated": _write("columns", 1, 0),
        "columns unsorted": _edit("columns", lambda t: t.flip(0)),
        "values of another split": _write("tile_ptr", 2, 8),
    },
    "unstructured": {
        "granularity 4": _set("granularity", 4),
        "index too large": _write("index", -1, 9),
        "index repeated": _edit("index", lambda t: torch.cat([t[:1], t[:1], t[2:]])),
        "columns unsorted": _edit("columns", lambda t: t.flip(0)),
    },
    "2:4": {
        "n 1": _set("n", 1),
        "m 8": _set("m", 8),
        "out_features + 1": _set("out_features", 11),
        "in_features too small": _set("in_features", 8),
        "index outside its group": _write("index", (0, 0), 4),
        "index out of order": _edit("index", lambda t: torch.cat([t[:, 1:2], t[:, :1], t[:, 2:]], 1)),
        "index past K": _write("index", (0, 4), 1),
    },
    "block": {
        "rows 16": _set("rows", 16),
        "columns 0": _set("columns", 0),
        "out_features too large": _set("out_features", 33),
        "index negative": _write("index", 0, -1),
        "index too large": _write("index", 0, 1),
        "row_ptr start": _write("row_ptr", 0, 1),
        "row_ptr end": _write("row_ptr", 1, 0),
        "weight past the edge": _write("values", (0, 31, 31), 1.0),
    },
    "tvw": {
        "n 1": _set("n", 1),
        "granularity 0": _set("granularity", 0),
        "granularity 3": _set("granularity", 3),
        "place outside its group": _write("place", 0, 4),
        "places out of order": _edit("place", lambda t: torch.full_like(t, 3)),
        "index too large": _write("index", -1, 9),
        "tile_ptr start": _write("tile_ptr", 0, 1),
        "tile_ptr decreasing": _write("tile_ptr", 1, 99),
        "columns unsorted": _edit("columns", lambda t: t.flip(0)),
    },
    "tew": {
        "granularity 0": _set("granularity", 0),
        "tile_index too large": _write("tile_index", -1, 9),
        "rest_columns unsorted": _edit("rest_columns", lambda t: t.flip(0)),
        "an element twice": lambda p: replace(p, tensors={**p.tensors, **_twice(p)}),
    },
}


# of channel's nine kept filters the tenth is missing, and each tile has all nine rows
SPECIFIC["channel"] = {
    "granularity 0": _set("granularity", 0),
    "in_features too small": _set("in_features", 8),
    "out_features too small": _set("out_features", 8),
    "index unsorted": _edit("index", lambda t: torch.cat([t[1:2], t[:1], t[2:]])),
    "columns repeated": _write("columns", 1, 0),
    "columns too large": _write("columns", -1, 10),
}


def _twice(packed: Packed) -> dict[str, Tensor]:
    """The tile part once more, as elements."""
    tiles = Packed("tile", packed.header, {name: packed.tensors[f"tile_{name}"] for name in TILE_TENSORS})
    dense = Tile().unpack(tiles)
    pattern = Unstructured()
    again = pattern.pack(dense, dense != 0, pattern.tiles((10, 9)))
    return {f"rest_{name}": again.tensors[name] for name in TILE_TENSORS}


def sound(name: str) -> Packed:
    """(10, 9) in tiles of 4, 4 and 2; dcp keeps taps 0..7 of each channel, tile 6, 5 and 3 rows, channel filters 0..8,
    others what they choose.
    """
    pattern: Any = get(name)
    gen = torch.Generator().manual_seed(1)
    if name not in ("dcp", "tile", "channel"):
        weight = torch.randn(10, 9, generator=gen)
        return pattern.pack(weight, *planned(pattern, weight.abs(), 4))  # type: ignore[no-any-return]
    tiling = pattern.tiles((10, 9), 4)
    mask = torch.zeros(10, 9, dtype=torch.bool)
    mask[:, :8] = True
    if name == "channel":
        mask = torch.ones(10, 9, dtype=torch.bool)
        mask[9] = False
    if name == "tile":
        chosen = pattern.select([torch.arange(9.0)] * 3, [6, 5, 3])
        mask = pattern.mask(tiling, chosen)
    return pattern.pack(torch.randn(10, 9, generator=torch.Generator().manual_seed(0)), mask, tiling)


@pytest.mark.parametrize(
    ("name", "corruption"), [(p.name, c) for p in PATTERNS for c in {**generic_corruptions(p.name), **SPECIFIC[p.name]}]
)
def test_check_rejects(name: str, corruption: str) -> None:
    packed = sound(name)
    get(name).check(packed)
    corrupt = {**generic_corruptions(name), **SPECIFIC[name]}[corruption](packed)
    with pytest.raises(PackedFormatError, match="expected"):
        get(name).check(corrupt)
    with pytest.raises(PackedFormatError):
        get(name).unpack(corrupt)


def test_names_are_unique_and_unknown_ones_are_explained() -> None:
    assert [get(p.name) for p in PATTERNS] == list(PATTERNS)
    with pytest.raises(UnknownPattern, match=r"unknown pattern 'tiles'; did you mean 'tile'.*dcp, tile"):
        get("tiles")


@pytest.mark.parametrize("name", ["1:2", "7:32", "block:3x5", "tvw:1:4", "tew:0.01", "tew:.5"])
def test_names_hold_parameters(name: str) -> None:
    assert get(name).name == name


@pytest.mark.parametrize(
    "name", ["0:4", "5:4", "1:33", "2:4:8", "block:0x3", "block:3", "tvw:5:4", "tvw:2", "tew:0", "tew:1.5", ""]
)
def test_names_with_illegal_parameters_are_unknown(name: str) -> None:
    with pytest.raises(UnknownPattern, match="Legal patterns"):
        get(name)
