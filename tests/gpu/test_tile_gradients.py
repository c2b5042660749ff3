"""Gradients over kept weights on a GPU, bit for bit on integers: tile_gemm and tile_conv."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda.test_tile_gradients import Case, conv_case, gemm_case
from tests.gpu.place import DTYPES, on_gpu

CALL = torch.ops.fxprune
# (x, n, g): small ones, one whose sums are cut in parts, and linear layers of BERT
GEMMS: tuple[tuple[Any, ...], ...] = (
    ((1, 40, 8), 8, 8), ((2, 33, 49), 70, 64), ((1, 100, 136), 200, 128), ((8, 96, 196), 576, 64),
    ((1, 768, 4096), 768, 128), ((1, 768, 4096), 3072, 256),
)  # fmt: skip
# (x, n, g, kernel, stride, padding, dilation, groups)
CONVOLUTIONS: tuple[tuple[Any, ...], ...] = (
    ((2, 5, 9, 11), 40, 8, (3, 3), 1, 1), ((1, 70, 5, 9), 70, 64, (3, 3), 2, 1), ((2, 8, 6, 10), 16, 4, (3, 3), 1, 1, 1, 2),
    ((1, 4, 12, 12), 20, 64, (3, 3), 1, 2, 2), ((4, 64, 28, 28), 128, 128, (3, 3), 1, 1),
    ((2, 3, 112, 112), 64, 64, (7, 7), 2, 3),
)  # fmt: skip


def check(case: Case, dtype: torch.dtype) -> None:
    grad, x, values, index, ptr, columns = (on_gpu(t, dtype) for t in (case.grad, case.x, *case.packed))
    structure = (index, ptr, columns, case.g)
    if case.window:
        size = (x.shape[1], list(x.shape[2:]))
        dx = CALL.tile_conv_grad_input(grad, values, *structure, *size, *case.window)
        dw = CALL.tile_conv_grad_weight(grad, x, *structure, len(values), *case.window)
    else:
        dx = CALL.tile_grad_input(grad, values, *structure, x.shape[1], 1)
        dw = CALL.tile_grad_weight(grad, x, *structure, len(values), 1)
        rows = [t.transpose(1, 2).contiguous() for t in (grad, x)]
        assert torch.equal(CALL.tile_grad_input(rows[0], values, *structure, x.shape[1], -1).transpose(1, 2), dx)
        assert torch.equal(CALL.tile_grad_weight(*rows, *structure, len(values), -1), dw)
    assert torch.equal(dx.cpu(), case.dx.float().to(dtype)), tuple(x.shape)
    assert torch.equal(dw.cpu(), case.dw.float().to(dtype)), tuple(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GEMMS, ids=str)
def test_gemm(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    check(gemm_case(*shape, keep=min(0.4, 300 / shape[0][1]), columns=0.9), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolution(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    check(conv_case(*shape), dtype)


def test_a_training_step_runs_them() -> None:
    """The backward of tile_gemm calls them where few weights are kept."""
    case = gemm_case((2, 128, 40), 256, 128, keep=0.3)
    x, values, index, ptr, columns = (on_gpu(t, torch.float16) for t in (case.x, *case.packed))
    leaves = [t.requires_grad_() for t in (x, values)]
    grad = on_gpu(case.grad, torch.float16)

    y = CALL.tile_gemm(x, values, index, ptr, columns, None, None, None, 256, 128, 1, "none")
    gradients = torch.autograd.grad(y, leaves, grad)
    for ours, exact in zip(gradients, (case.dx, case.dw), strict=True):
        assert torch.equal(ours.cpu(), exact.float().half())
