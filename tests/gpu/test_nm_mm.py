"""Products pruned to 2:4 on a GPU's sparse tensor cores, bit for bit on integers."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.test_nm_gemm import HALVES, case, pruned
from tests.gpu.place import on_gpu

CALL = torch.ops.fxprune
SHAPES = ((1, 4, 8), (17, 64, 40), (130, 200, 136), (40, 96, 130), (9, 70, 13), (4096, 768, 3072), (1000, 4096, 512))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A wrong order of metadata, or of the operands of mma.sp, shows here and nowhere else."""
    x, weight, _ = case(*shape)
    exact = (pruned(x).double() @ weight.double()).float().to(dtype)
    given = [on_gpu(t, dtype) for t in (x, weight)]
    assert torch.equal(CALL.nm_mm(*given).cpu(), exact)
    sparse = on_gpu(pruned(x), dtype)
    assert torch.equal(CALL.nm_mm(sparse, given[1]).cpu(), exact)


@pytest.mark.parametrize("lone", range(4))
def test_one_kept_element_in_four(lone: int) -> None:
    x, weight, _ = case(40, 128, 72)
    one = torch.zeros_like(x)
    one[:, lone::4] = x[:, lone::4]
    got = CALL.nm_mm(on_gpu(one, torch.float16), on_gpu(weight, torch.float16))
    assert torch.equal(got.cpu(), (one @ weight).half())
