"""Everything here needs a GPU and the CUDA library."""

from __future__ import annotations

import os

import pytest
import torch
from fxprune.lowering import library

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants when results must repeat


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = library.cuda_missing()
    if reason is None and not torch.cuda.is_available():
        reason = "there is no GPU"
    for item in items:
        if "tests/gpu" in item.nodeid:
            # hints at slow or unrepeatable kernels of others are no failures of ours
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
