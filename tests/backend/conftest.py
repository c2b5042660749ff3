"""Every test of the backend starts with an empty Dynamo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fxprune
from fxprune import pipeline

fxprune.register()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave every channel in the graph: where a test is about the choice of kernels, layers keep their shapes."""
    monkeypatch.setattr(pipeline, "FORWARD", tuple(p for p in pipeline.FORWARD if p.__name__ != "shrink"))
