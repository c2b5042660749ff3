"""Properties every sparsity pattern has: exact pack and unpack, checked format, deterministic selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.errors import PackedFormatError, TileMismatch, UnknownPattern
from fxprune.sparsity import PATTERNS, get
from fxprune.sparsity.pattern import Packed, Pattern, Tiling, keep_largest

each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
sizes = st.sampled_from([1, 2, 7, 8, 9, 16, 31, 33, 65, 70])
seeds = st.integers(0, 2**32 - 1)


def case(pattern: Pattern, n: int, k: int, granularity: int, seed: int) -> tuple[Tensor, Tensor, Tiling, list[int]]:
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
    return weight, pattern.mask(tiling, pattern.select(scores, counts)), tiling, counts


@each_pattern
@given(n=sizes, k=sizes, granularity=sizes, seed=seeds)
def test_unpack_of_pack_is_the_masked_weight(pattern: Pattern, n: int, k: int, granularity: int, seed: int) -> None:
    weight, mask, tiling, _ = case(pattern, n, k, granularity, seed)
    packed = pattern.pack(weight, mask, tiling)
    pattern.check(packed)
    dense = pattern.unpack(packed)
    assert torch.equal(dense, weight * mask)
    again = pattern.pack(dense, mask, tiling)
    assert again.header == packed.header
    assert all(torch.equal(again.tensors[key], packed.tensors[key]) for key in packed.tensors)


@each_pattern
@given(n=sizes, k=sizes, granularity=sizes, seed=seeds)
def test_mask_holds_the_counts(pattern: Pattern, n: int, k: int, granularity: int, seed: int) -> None:
    _, mask, tiling, counts = case(pattern, n, k, granularity, seed)
    assert len(counts) == tiling.tiles
    for tile, count in enumerate(counts):
        assert int(mask[tiling.members(tile)].sum()) == count * pattern.unit_size(tiling, tile)
    assert int(mask.sum()) == int(mask[tiling.columns].sum())


@each_pattern
@given(n=sizes, k=sizes, granularity=sizes, step=st.integers(1, 40))
def test_legal_counts_include_the_ends_and_never_zero(pattern: Pattern, n: int, k: int, granularity: int, step: int) -> None:
    tiling = pattern.tiles((n, k), granularity)
    for tile, score in enumerate(pattern.score(torch.rand(n, k), tiling)):
        legal = pattern.legal_counts(tiling, tile, step)
        assert not legal.legal(0) and not legal.legal(len(score) + 1)
        assert legal.legal(legal.minimum) and legal.legal(len(score)) and legal.maximum == len(score)


@each_pattern
def test_ties_go_to_the_lower_index(pattern: Pattern) -> None:
    tiling = pattern.tiles((40, 25), 16)
    scores = pattern.score(torch.ones(40, 25), tiling)
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
def test_empty_and_one_element_weights(pattern: Pattern) -> None:
    for n in (0, 1):
        tiling = pattern.tiles((n, 1))
        mask = pattern.mask(tiling, pattern.select(pattern.score(torch.ones(n, 1), tiling), [1] * n))
        assert torch.equal(pattern.unpack(pattern.pack(torch.ones(n, 1), mask, tiling)), torch.ones(n, 1))


@each_pattern
def test_pack_refuses_other_dtypes_and_shapes(pattern: Pattern) -> None:
    tiling = pattern.tiles((8, 9), 4)
    mask = torch.ones(8, 9, dtype=torch.bool)
    with pytest.raises(TileMismatch, match=r"float64.*float32"):
        pattern.pack(torch.ones(8, 9, dtype=torch.float64), mask, tiling)
    with pytest.raises(TileMismatch, match=r"\(7, 9\).*\(8, 9\)"):
        pattern.pack(torch.ones(7, 9), mask, tiling)
    with pytest.raises(TileMismatch, match="granularity 0"):
        pattern.tiles((8, 9), 0)


def _set(key: str, value: object) -> Callable[[Packed], Packed]:
    return lambda p: replace(p, header={**p.header, key: value})


def _edit(key: str, change: Callable[[Tensor], object]) -> Callable[[Packed], Packed]:
    return lambda p: replace(p, tensors={**p.tensors, key: change(p.tensors[key].clone())})


def _write(key: str, where: int | tuple[int, int], value: float) -> Callable[[Packed], Packed]:
    def change(tensor: Tensor) -> Tensor:
        tensor[where] = value
        return tensor

    return _edit(key, change)


HEADER = {"dcp": ("channels", "taps", "group"), "tile": ("out_features", "in_features", "granularity")}
TENSORS = {"dcp": ("weight", "taps"), "tile": ("values", "index", "tile_ptr", "columns")}
HEADER["channel"], TENSORS["channel"] = HEADER["tile"], TENSORS["tile"]  # the same packed form


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
        bad[f"{key} dtype"] = _edit(key, lambda t: t.to(torch.float16))
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


def sound(name: str) -> Packed:
    """(10, 9) in tiles of 4; dcp keeps taps 0..7 of each channel, tile 6, 5 and 3 rows, channel filters 0..8."""
    pattern = get(name)
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
