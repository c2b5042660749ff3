"""Every test of the backend starts with an empty Dynamo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fxprune

fxprune.register()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
