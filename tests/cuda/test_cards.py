"""Plans for one kind of GPU: how the card is known, what its kernels like, and that every card runs every plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fxprune.lowering.kernels import KernelTables, cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fxprune
from fxprune.config import Config
from fxprune.sparsity import tile
from fxprune.sparsity.pattern import Ask, LayerMask
from tests.cuda.simulator import tile_gemm
from tests.integers import generator, integers

CARDS = tuple(cuda.UNITS)
N, K = 256, 320


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Let torch find these GPUs, none without arguments."""

    def capability(device: Any = None) -> tuple[int, int]:
        return capabilities[torch.device(device).index or 0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)


def chosen(card: str, n: int = N, k: int = K) -> tuple[Tensor, LayerMask]:
    """An integer weight (N, K) and the mask of a plan of half of it for a card."""
    weight = integers(generator(n, k), n, k)
    unit = KernelTables().unit
    ask = Ask({"w": weight.abs()}, {"w": 0.5}, {"w": "linear"}, Config(columns=False), lambda kind: unit(kind, device=card))
    return weight, tile.Tile().choose(ask)["w"]


@pytest.mark.parametrize(
    ("capability", "card"),
    (((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_80"), ((12, 0), "sm_80")),
)
def test_card_of_a_gpu(capability: tuple[int, int], card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (7, 5), capability)
    assert cuda.card(torch.device("cuda", 1)) == cuda.card("cuda:1") == card
    unit, expected = KernelTables().unit, cuda.UNITS[card]["linear"]
    assert unit("linear", torch.bfloat16, torch.device("cuda", 1)) == unit("linear", device=card) == expected
    assert expected.k_step == {"sm_80": 32, "sm_90a": 64}[card]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch)
    assert cuda.card("cuda") == "sm_90a" and [cuda.card(name) for name in CARDS] == list(CARDS)
    assert KernelTables().unit("linear", device="cpu") == KernelTables().unit("linear")
    finest, coarsest = (cuda.UNITS[name]["linear"] for name in ("sm_80", "sm_90a"))
    assert all(coarsest.row_step(k) % finest.row_step(k) == 0 for k in (16, 128, 129, 4096))


def test_weights_pruned_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of one kind agree; of two kinds, none speaks for all."""
    with FakeTensorMode():
        both: list[Any] = [SimpleNamespace(value=torch.empty(8, 8, device=f"cuda:{i}")) for i in (0, 1)]
    gpus(monkeypatch, (9, 0), (9, 0))
    assert KernelTables().units(both)("linear") == cuda.UNITS["sm_90a"]["linear"]
    gpus(monkeypatch, (8, 0), (8, 6))
    assert KernelTables().units(both)("linear") == cuda.UNITS["sm_80"]["linear"]
    gpus(monkeypatch, (9, 0), (8, 0))
    assert KernelTables().units(both)("linear") == KernelTables().unit("linear")


@pytest.mark.parametrize("card", CARDS)
def test_kept_rows_are_whole_stages(card: str) -> None:
    for k in (96, 128, 192, 320, 512):
        _, layer = chosen(card, k=k)
        step = cuda.UNITS[card]["linear"].row_step(k)
        assert step == (64 if card == "sm_90a" and k > 128 else 32)
        assert all(count % step == 0 or count == k for count in layer.counts), (k, layer.counts)
        assert 0 < sum(layer.counts) < k * len(layer.counts)


def test_cards_differ() -> None:
    assert any(count % 64 for count in chosen("sm_80")[1].counts)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("runs_on", CARDS)
@pytest.mark.parametrize("planned_for", CARDS)
def test_every_card_runs_every_plan(planned_for: str, runs_on: str, dtype: torch.dtype) -> None:
    weight, layer = chosen(planned_for)
    x = integers(generator(7), 1, K, 136)
    given = tile.operands(weight, layer.mask, layer.tiling)
    values, structure = given[0].to(dtype), given[1:]
    got = tile_gemm(
        x.to(dtype), values, *structure, None, None, None, N, layer.tiling.granularity, hopper=runs_on == "sm_90a"
    )
    assert torch.equal(got, ((weight * layer.mask).double() @ x.double()).to(dtype))


def test_recalibrate_for_a_card() -> None:
    """From one card to the other: the same masks, or, ranked anew, whole stages of the other one at the same sparsity."""
    model = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.Linear(N, 96))
    plan = fxprune.prune(model, torch.zeros(1, K), sparsity=0.5, columns=False).plan
    ampere = fxprune.recalibrate(plan, "sm_80", dense=model)
    assert any(count % 64 for layer in ampere for count in layer.counts)
    assert fxprune.recalibrate(ampere, "sm_90a").layers == ampere.layers
    hopper = fxprune.recalibrate(ampere, "sm_90a", dense=model)
    for before, layer in zip(ampere, hopper, strict=True):
        assert all(count % 64 == 0 for count in layer.counts) and abs(layer.sparsity - before.sparsity) < 0.1
    assert fxprune.recalibrate(hopper, "sm_80", dense=model).layers == hopper.layers


@pytest.mark.parametrize("device", ("cuda", *CARDS))
def test_depthwise_plans_are_those_of_any_gpu(device: str) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1, groups=64))
    plan = fxprune.recalibrate(fxprune.prune(model, torch.zeros(1, 64, 8, 8), sparsity=0.5, group=16).plan, device)
    assert [(layer.kind, layer.granularity) for layer in plan] == [("depthwise", 32)]
