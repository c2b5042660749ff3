"""Everything here needs a GPU and the CUDA library; outputs start as NaN, so that what is left unwritten is seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fxprune.lowering import library

from tests.oracle import poisoned


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = library.cuda_missing()
    if reason is None and not torch.cuda.is_available():
        reason = "there is no GPU"
    if reason is not None:
        for item in items:
            if "tests/gpu" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = False  # gradients are compared in full fp32
    with poisoned():
        yield
