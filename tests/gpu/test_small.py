"""One small case of every kernel, for compute-sanitizer (tools/gpu.py), which slows kernels a hundredfold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxprune.lowering.kernels.cuda import OPERATORS

from fxprune.ops import OPS
from fxprune.ops.nm_prune import FUNCTIONS
from fxprune.ops.operator import Operator
from tests.gpu import test_convolutions, test_nm_mm, test_nm_prune, test_operators, test_tile_gradients, test_two_in_four
from tests.gpu.place import DTYPES, on_gpu

# the operators that no test below calls
TESTED = (
    "tile_gemm", "tile_conv", "dsconv", "nm_prune", "nm_mm", "tile_grad_input", "tile_grad_weight", "tile_conv_grad_input",
    "tile_conv_grad_weight",
)  # fmt: skip
PLAIN = [op for op in OPS if op.name in OPERATORS and op.name not in TESTED]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemms_and_convolutions(dtype: torch.dtype) -> None:
    for shape in (*test_operators.GEMMS[:3], *test_operators.GEMMS[-2:]):
        test_operators.test_tile_gemm(shape, dtype)
        if dtype == torch.float32:
            test_operators.test_tile_gemm_in_tf32(shape)
    for shape in (test_convolutions.CONVOLUTIONS[0], test_convolutions.CONVOLUTIONS[-1]):
        test_convolutions.test_tile_conv(shape, dtype)
    for kernel in (3, 7):
        test_convolutions.test_dsconv(test_convolutions.PAIRS[0], kernel, dtype)
    for shape in test_tile_gradients.GEMMS[:3]:
        test_tile_gradients.test_gemm(shape, dtype)
    for shape in test_tile_gradients.CONVOLUTIONS[:3]:
        test_tile_gradients.test_convolution(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", PLAIN, ids=lambda op: op.name)
def test_samples(op: Operator, dtype: torch.dtype) -> None:
    def outputs(args: tuple[Any, ...]) -> list[torch.Tensor]:
        given = getattr(torch.ops.fxprune, op.name)(*(on_gpu(a, dtype) for a in args))
        return given if isinstance(given, list) else [given]

    for args in op.samples():
        expected = op.reference(*args)
        for ours, exact in zip(outputs(args), expected if isinstance(expected, list) else [expected], strict=True):
            tolerance = 2e-2 if dtype == torch.bfloat16 or exact.dtype == torch.bfloat16 else 4e-3
            torch.testing.assert_close(ours.float().cpu(), exact.float(), atol=tolerance * 4, rtol=tolerance)


def test_sparse_products() -> None:
    for shape in test_two_in_four.SHAPES[:3]:
        test_two_in_four.test_tile_gemm(*shape, torch.float16)
    for shape in test_nm_mm.SHAPES[1:5]:
        test_nm_mm.test_products(shape, torch.bfloat16)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pruned_gradients(function: str) -> None:
    for dtype in DTYPES:
        grad = test_nm_prune.values(function, 1, 31, 5).to(dtype)
        for n, m in ((2, 4), (3, 8), (5, 16), (4, 32)):
            args = (n, m, 1, 1, function, 3)
            expected = test_nm_prune.OPERATOR.reference(grad, test_nm_prune.KEY, *args)
            got = torch.ops.fxprune.nm_prune(on_gpu(grad), on_gpu(test_nm_prune.KEY), *args)
            assert torch.equal(got.cpu(), expected), (dtype, n, m)
