"""nm_prune on a GPU gives the bits of the CPU, and draws anew inside a CUDA graph when its counters change."""

from __future__ import annotations

import pytest
import torch

from fxprune.ops.nm_prune import FUNCTIONS, OPERATOR
from tests.cuda.test_nm_prune import KEY, RATIOS, values
from tests.gpu.place import DTYPES, on_gpu

CALL = torch.ops.fxprune


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_equals_the_reference_bit_for_bit(function: str, dtype: torch.dtype) -> None:
    for shape in ((2, 64, 37), (1, 31, 5), (3, 384, 196)):
        grad = values(function, *shape).to(dtype)
        for n, m in RATIOS:
            if shape[1] == 384 and m not in (4, 16):
                continue
            expected = OPERATOR.reference(grad, KEY, n, m, 1, 1, function, 3)
            row_major = grad.transpose(1, 2).contiguous()
            for key in (KEY, on_gpu(KEY)):  # counters on either device
                first = CALL.nm_prune(on_gpu(grad), key, n, m, 1, 1, function, 3)
                last = CALL.nm_prune(on_gpu(row_major), key, n, m, -1, 1, function, 3)
                assert torch.equal(first.cpu(), expected), (shape, n, m)
                assert torch.equal(last.cpu().transpose(1, 2), expected), (shape, n, m)


def test_a_graph_draws_anew_when_its_counters_change() -> None:
    grad, key = on_gpu(values("random", 2, 64, 37)), on_gpu(KEY.clone())
    CALL.nm_prune(grad, key, 2, 4, 1, 1, "random", 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = CALL.nm_prune(grad, key, 2, 4, 1, 1, "random", 0)
    for step in range(3):
        key[1] = step
        graph.replay()
        counters = torch.tensor([KEY[0], step, KEY[2]])
        expected = OPERATOR.reference(grad.cpu(), counters, 2, 4, 1, 1, "random", 0)
        assert torch.equal(result.cpu(), expected), step
