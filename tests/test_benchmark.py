"""``fxprune.benchmark``: interleaved, fixed rounds, ratios to the first engine."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

import fxprune
from fxprune.benchmark import interleave, quantile
from tests.oracle import FORCED
from tests.toys import mlp, pruned, rows


def sleeper(seconds: float, calls: list[str], name: str) -> Callable[..., None]:
    def call(*_: object) -> None:
        calls.append(name)
        time.sleep(seconds)

    return call


def test_ratios_are_to_the_first_engine() -> None:
    calls: list[str] = []
    engines = {"slow": sleeper(0.02, calls, "slow"), "fast": sleeper(0.005, calls, "fast")}
    table = fxprune.benchmark(mlp(), rows(), engines=engines, rounds=4, burst_ms=1)
    slow, fast = ({**dict(zip(table.head, row, strict=True))} for row in table.rows)
    assert slow["engine"] == "slow" and slow["speed-up"] == "1.00x"
    assert 1.8 < float(fast["speed-up"][:-1]) < 5
    assert float(slow["median"]) >= 20 and float(slow["p10"]) <= float(slow["median"]) <= float(slow["p90"])
    assert table.summary == {"threads": torch.get_num_threads(), "rounds": 4}
    assert calls[-8:] == ["slow", "fast"] * 4, "rounds are interleaved"


def test_rounds_are_fixed_and_bursts_repeat() -> None:
    calls: list[str] = []
    samples = interleave({"a": sleeper(0.002, calls, "a")}, rounds=3, burst_ms=10)
    assert len(samples["a"]) == 3 and len(calls) > 4 + 3 * 2


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.1, 2.0), (0.5, 6.0), (0.9, 10.0), (1.0, 11.0)])
def test_quantile_is_nearest_rank(share: float, expected: float) -> None:
    assert quantile([float(v) for v in range(11, 0, -1)], share) == expected


def test_the_default_engines_are_three() -> None:
    fxprune.register()
    torch._dynamo.reset()
    model = pruned(mlp(), rows()).train()
    table = fxprune.benchmark(model, rows(), rounds=2, burst_ms=1, **FORCED)
    assert [row[0] for row in table.rows] == ["eager", "inductor", "hwprune"] and model.training
