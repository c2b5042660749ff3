"""DEPrune on depthwise weights: exact counts (DCP), equal groups (BWT), aligned counts (HSR)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxprune.errors import ConfigError, NonFiniteWeight, TileMismatch
from fxprune.sparsity import dcp

WIDTHS = {
    "mobilenet_v2": [(c, 3) for c in (32, 96, 144, 144, *[192] * 3, *[384] * 4, *[576] * 3, *[960] * 3)],
    "mobilenet_v3_small": [
        *((c, 3) for c in (16, 72, 88)),
        *((c, 5) for c in (96, 240, 240, 120, 144, 288, 576, 576)),
    ],
    "efficientnet_b0": [
        (c, k)
        for c, k in zip(
            (32, 96, 144, 144, 240, 240, 480, 480, 480, 672, 672, 672, 1152, 1152, 1152, 1152),
            (3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3),
            strict=True,
        )
    ],
}
channels = st.sampled_from([1, 16, 31, 32, 33, 40, 72, 88, 120, 144, 200, 240])
windows = st.sampled_from([1, 9, 15, 25, 49, 81])
ratios = st.floats(0.0, 0.98)
seeds = st.integers(0, 2**32 - 1)


def importances(net: str, seed: int = 0) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {f"dw{i}": torch.randn(c, k * k, generator=gen).abs() for i, (c, k) in enumerate(WIDTHS[net])}


def achieved(plan: dict[str, dcp.LayerMask]) -> float:
    return 1.0 - sum(int(m.mask.sum()) for m in plan.values()) / sum(m.mask.numel() for m in plan.values())


def one(importance: torch.Tensor, ratio: float, **options: object) -> dcp.LayerMask:
    return dcp.plan_layers({"dw": importance}, {"dw": ratio}, **options)["dw"]  # type: ignore[arg-type]


def test_the_paper_s_networks_have_their_layers() -> None:
    assert [len(layers) for layers in WIDTHS.values()] == [17, 11, 16]
    assert sum(c * k * k for c, k in WIDTHS["mobilenet_v2"]) == 64_224


@given(c=channels, t=windows, ratio=ratios, seed=seeds)
def test_dcp_keeps_the_exact_number_of_largest_taps(c: int, t: int, ratio: float, seed: int) -> None:
    e = torch.randn(c, t, generator=torch.Generator().manual_seed(seed)).abs()
    layer = one(e, ratio, balance=False, recalibration="off")
    groups = layer.tiling.tiles
    expected = max(c * t - round(ratio * c * t), groups)
    assert sum(layer.counts) == int(layer.mask.sum()) == expected
    assert min(layer.counts) >= 1
    safe = {int(s.argmax()) + g * 32 * t for g, s in enumerate(e.flatten().split(32 * t))}
    pruned = [v for i, v in enumerate(e.flatten().tolist()) if not layer.mask.flatten()[i]]
    kept = [v for i, v in enumerate(e.flatten().tolist()) if layer.mask.flatten()[i] and i not in safe]
    assert not kept or not pruned or min(kept) >= max(pruned)


@given(c=channels, t=windows, ratio=ratios, group=st.sampled_from([1, 8, 32, 36]), seed=seeds)
def test_bwt_gives_every_group_the_same_ratio(c: int, t: int, ratio: float, group: int, seed: int) -> None:
    e = torch.randn(c, t, generator=torch.Generator().manual_seed(seed)).abs()
    layer = one(e, ratio, group=group, recalibration="off")
    full, tail = divmod(c, group)
    size = group * t
    assert layer.counts[:full] == (max(size - round(ratio * size), 1),) * full
    if tail:
        assert layer.counts[full:] == (max(tail * t - round(ratio * tail * t), 1),)
    per_group = [int(part.sum()) for part in layer.mask.split(group)]
    assert per_group == list(layer.counts)


def test_ties_prune_the_higher_index() -> None:
    for balance in (True, False):
        layer = one(torch.ones(32, 9), 0.5, balance=balance, recalibration="off")
        assert layer.mask.flatten()[:144].all() and not layer.mask.flatten()[144:].any()


def test_a_channel_may_vanish_but_a_group_may_not() -> None:
    e = torch.ones(64, 9)
    e[:32] = 1e-6
    layer = one(e, 0.9, balance=False, recalibration="off")
    assert layer.counts[0] == 1 and sum(layer.counts) == 64 * 9 - round(0.9 * 64 * 9)


@pytest.mark.parametrize("net", WIDTHS)
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.778, 0.819, 0.848, 0.88])
@pytest.mark.parametrize("balance", [True, False])
def test_deterministic_alignment_keeps_the_total(net: str, ratio: float, balance: bool) -> None:
    e = importances(net)
    plan = dcp.plan_layers(e, dict.fromkeys(e, ratio), balance=balance)
    assert abs(achieved(plan) - ratio) <= 0.003
    for layer in plan.values():
        sizes = [len(layer.tiling.members(t)) * layer.tiling.shape[1] for t in range(layer.tiling.tiles)]
        assert all(count % 32 == 0 or count == size for count, size in zip(layer.counts, sizes, strict=True))
        assert all(count > 0 for count in layer.counts)
        if balance:
            full = layer.counts[: layer.tiling.shape[0] // 32]
            assert len(set(full)) <= 1
        if layer.note:
            assert layer.note.endswith((": over", ": under"))


def test_a_group_keeps_one_tile_whatever_is_asked() -> None:
    e = importances("mobilenet_v2")
    plan = dcp.plan_layers(e, dict.fromkeys(e, 0.97))
    assert all(set(layer.counts) == {32} for layer in plan.values())
    assert one(torch.rand(3, 9), 0.9).counts == (27,)


@pytest.mark.parametrize("net", WIDTHS)
def test_plans_do_not_depend_on_scale_or_repetition(net: str) -> None:
    e = importances(net)
    first = dcp.plan_layers(e, dict.fromkeys(e, 0.8))
    again = dcp.plan_layers({n: v * 2.0**-40 for n, v in e.items()}, dict.fromkeys(e, 0.8))
    assert all(torch.equal(first[n].mask, again[n].mask) for n in e)


def test_auto_uses_the_gain_and_falls_back_to_the_budget() -> None:
    e = importances("efficientnet_b0")
    sparsity = dict.fromkeys(e, 0.848)
    asked: list[tuple[str, int, int]] = []

    def gain(name: str, kept: int, floor: int) -> float:
        asked.append((name, kept, floor))
        return float(e[name].shape[0])

    plan = dcp.plan_layers(e, sparsity, recalibration="deprune", gain=gain)
    assert {name for name, *_ in asked} == set(e)
    assert all(kept - 32 < floor < kept and floor % 32 == 0 for _, kept, floor in asked)
    assert all(layer.note.startswith("8u8o: ") for layer in plan.values())

    def lopsided(name: str, kept: int, floor: int) -> float:
        return 1e6 if e[name].shape[0] == 1152 else 1.0

    plan = dcp.plan_layers(e, sparsity, recalibration="deprune", gain=lopsided)
    assert abs(achieved(plan) - 0.848) <= 0.003
    deterministic = dcp.plan_layers(e, sparsity)
    without = dcp.plan_layers(e, sparsity, recalibration="deprune")
    assert {n: m.counts for n, m in without.items()} == {n: m.counts for n, m in deterministic.items()}


def test_step_holds_in_every_mode() -> None:
    e = importances("mobilenet_v3_small")
    for mode, unit in (("off", 12), ("deterministic", 96), ("deprune", 96)):
        plan = dcp.plan_layers(e, dict.fromkeys(e, 0.6), recalibration=mode, step=12)
        for layer in plan.values():
            size = layer.tiling.shape[1] * 32
            assert all(count % unit == 0 or count == size for count in layer.counts[: layer.tiling.shape[0] // 32])


@pytest.mark.parametrize("m", [16, 40, 72, 120, 144, 200])
@pytest.mark.parametrize(("k", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (7, 1, 2)])
def test_compressed_groups_equal_the_masked_convolution(m: int, k: int, stride: int, dilation: int) -> None:
    """The DR-form of Sec. 4.1: per group one GEMM whose K indices are the kept (channel, dy, dx)."""
    gen = torch.Generator().manual_seed(m * k)
    weight = torch.randint(-4, 5, (m, 1, k, k), generator=gen).float()
    x = torch.randint(-4, 5, (2, m, 13, 11), generator=gen).float()
    layer = one(weight.abs().reshape(m, k * k) + torch.rand(m, k * k, generator=gen), 0.6)
    kept = layer.mask.reshape(m, 1, k, k)
    padding = dilation * (k // 2)
    expected = F.conv2d(x, weight * kept, stride=stride, padding=padding, dilation=dilation, groups=m)
    patches = F.unfold(x, k, dilation, padding, stride).reshape(2, m, k * k, -1)
    for g in range(layer.tiling.tiles):
        members = layer.tiling.members(g)
        channel, tap = layer.mask[members].nonzero(as_tuple=True)
        dr = torch.zeros(len(members), len(channel))
        dr[channel, torch.arange(len(channel))] = weight.reshape(m, -1)[members][channel, tap]
        y = dr @ patches[:, members][:, channel, tap]
        assert torch.equal(y.reshape(2, len(members), *expected.shape[2:]), expected[:, members])
        assert len(channel) == layer.counts[g]


def test_infer_finds_the_taps() -> None:
    weight = torch.randn(40, 25, generator=torch.Generator().manual_seed(1))
    layer = one(weight.abs(), 0.7)
    pruned = weight * layer.mask
    pruned[~layer.mask] = -0.0
    found = dcp.infer(pruned)
    assert torch.equal(found.mask, layer.mask) and found.counts == layer.counts
    assert dcp.infer(torch.full((2, 9), math.nan)).mask.all()


def test_packs_more_taps_than_one_word() -> None:
    pattern = dcp.Dcp()
    tiling = pattern.tiles((3, 1, 9, 9))
    mask = torch.zeros(3, 81, dtype=torch.bool)
    mask[0, [0, 63, 64, 80]] = True
    packed = pattern.pack(torch.ones(3, 1, 9, 9), mask, tiling)
    assert packed.tensors["taps"].tolist() == [[-(2**63) + 1, 1 + (1 << 16)], [0, 0], [0, 0]]
    assert torch.equal(pattern.unpack(packed), mask.float())


def test_mistakes_are_explained() -> None:
    e = torch.ones(8, 9)
    with pytest.raises(TileMismatch, match="not depthwise"):
        dcp.Dcp().tiles((8, 4, 3, 3))
    with pytest.raises(ConfigError, match=r"sparsity\['dw'\].*None"):
        dcp.plan_layers({"dw": e}, {})
    with pytest.raises(ConfigError, match="sparsity"):
        one(e, 1.0)
    with pytest.raises(ConfigError, match="'always'"):
        one(e, 0.5, recalibration="always")
    e[0, 0] = math.inf
    with pytest.raises(NonFiniteWeight, match="1 non-finite"):
        one(e, 0.5)
    assert dcp.plan_layers({}, {}) == {}
