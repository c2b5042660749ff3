"""Fitting the rates of the cost model: exact where the model is, robust where the clock is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.lowering import calibrate, library, measure
from fxprune.lowering.kernels import KernelTables
from hypothesis import given
from hypothesis import strategies as st

import fxprune
from fxprune import cost
from fxprune.config import Config

RATES = {"call": 5.0, "products": 0.25, "near": 10.0, "far": 0.0}


def samples(seed: int, count: int = 40) -> list[tuple[dict[str, Any], float]]:
    gen = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        a, b, c = (10 ** (4 * torch.rand(3, generator=gen) - 1)).tolist()
        terms = {"call": 1, "products": 10 * a, "near": b / 10, "far": c}
        found.append((terms, sum(RATES[name] * amount for name, amount in terms.items())))
    return found


@given(st.integers(0, 1000))
def test_the_rates_behind_exact_times_are_found(seed: int) -> None:
    rates, error = calibrate.fit(samples(seed))
    assert error < 0.01
    assert rates["call"] == pytest.approx(5.0, rel=0.05) and rates["products"] == pytest.approx(0.25, rel=0.05)
    assert rates["far"] < 1e-3 and all(rate >= 0 for rate in rates.values())


def test_a_few_long_times_move_little() -> None:
    """A busy neighbour makes every tenth time three times as long."""
    disturbed = [(terms, 3 * t if i % 10 == 0 else t) for i, (terms, t) in enumerate(samples(3))]
    rates, error = calibrate.fit(disturbed)
    assert 0.03 < error < 0.2
    for terms, time in samples(4):
        assert sum(rates[name] * amount for name, amount in terms.items()) == pytest.approx(time, rel=0.25)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.available():
        pytest.skip("the library is not built")
    monkeypatch.setattr(calibrate, "DEPTHWISE", ((1, 16, 8, 3, 1), (2, 16, 9, 3, 2)))
    monkeypatch.setattr(calibrate, "POINTWISE", ((1, 16, 24, 7), (2, 24, 16, 8)))
    monkeypatch.setattr(calibrate, "LINEAR", ((4, 64, 96), (9, 96, 64)))
    monkeypatch.setattr(calibrate, "PIXEL", ((1, 16, 32), (2, 32, 16)))


def test_calibrated_rates_are_kept_and_used(few: None, tmp_path: Path) -> None:
    assert measure.calibrated(str(tmp_path)) == {}
    errors = fxprune.calibrate(str(tmp_path))
    rates = measure.calibrated(str(tmp_path))
    assert set(errors) == set(rates) == set(cost.device("avx512").rates), "every operator of the model, none else"
    assert all(0 <= error < 5 for error in errors.values())
    config = Config(autotune="off", cache_dir=str(tmp_path))
    timer = measure.Measure(config, KernelTables().unit)
    match = next(m for m in calibrate._matches(torch.Generator().manual_seed(0)) if m.kind == "linear")
    assert timer(match, None) == cost.predict(match, None, library.isa(), rates)


@pytest.mark.parametrize("text", ["", "[1]", '{"linear": 3}', '{"linear": {"call": -1}}', '{"linear": {"call": "x"}}'])
def test_broken_rates_are_no_rates(text: str, tmp_path: Path) -> None:
    path = measure.cache_file(str(tmp_path), "rates")
    path.write_text(text)
    assert measure.calibrated(str(tmp_path)) == {}


def test_the_shapes_are_fixed_and_every_kind_is_timed() -> None:
    first, second = ([m.geometry for m in calibrate._matches(torch.Generator().manual_seed(0))] for _ in range(2))
    assert first == second
    assert {m.kind for m in calibrate._matches(torch.Generator())} == {"depthwise", "pointwise", "conv", "linear"}
    halves = list(calibrate._matches(torch.Generator(), torch.bfloat16))
    assert {m.kind for m in halves} == {"depthwise", "pointwise", "conv", "linear"}
    assert {m.value.dtype for m in halves} == {torch.bfloat16}
