"""The suite has teeth: every planted fault is caught by the test named for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fxprune
from tests.faults.faults import FAULTS, Fault

_SOUND: set[Callable[[], None]] = set()


def fresh() -> None:
    fxprune.register()
    torch._dynamo.reset()


def test_there_are_enough_and_names_are_unique() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name.replace(" ", "-"))
def test_fault_is_caught(fault: Fault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if fault.killer not in _SOUND:  # without the fault it passes
        fresh()
        fault.killer()
        _SOUND.add(fault.killer)
    fresh()
    monkeypatch.setattr(fault.owner, fault.attribute, fault.change(getattr(fault.owner, fault.attribute)))
    caplog.clear()
    caught: BaseException | None = None
    try:
        fault.killer()
    except (Exception, pytest.fail.Exception) as error:
        caught = error
    finally:
        monkeypatch.undo()
        fresh()
    refused = "VerificationError" in caplog.text  # by a check of ours, and then the graph runs dense
    assert caught is not None or refused, (
        f"{fault.name!r} survives; reproduce: pytest 'tests/faults' -k '{fault.name.split()[0]}'"
    )
    assert not isinstance(caught, (ImportError, NameError, AttributeError)), caught
