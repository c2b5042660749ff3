"""``nm_prune`` at the ends of buffers: tails of channels and of positions, both memory formats, every element type and ISA.

The laws of the operator are in tests/ops/test_nm_prune.py; here the sanitizers watch.
"""

from __future__ import annotations

import itertools

import torch

from fxprune.ops.nm_prune import FUNCTIONS, OPERATOR
from tests.csrc.kernels import OPS, every_isa
from tests.integers import generator, integers

SHAPES = ((1, 4, 1), (2, 5, 3), (2, 33, 17), (1, 40, 16))
RATIOS = ((2, 4), (1, 2), (3, 8), (4, 32))


def test_no_tail_reads_or_writes_past_its_end() -> None:
    key = torch.tensor([1, 2, 3])
    for isa in every_isa():
        for shape, (n, m), function in itertools.product(SHAPES, RATIOS, FUNCTIONS):
            whole = integers(generator(*shape, n, m), *shape)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                grad = whole.to(dtype)
                last = grad.movedim(1, -1).contiguous()
                for given, dim in ((grad, 1), (last.movedim(-1, 1), 1), (last, -1), (grad[0].t().contiguous(), -1)):
                    args = (given, key, n, m, dim, 1, function, 0)
                    what = f"{isa} {function} {n}:{m} {tuple(given.shape)} {dtype}"
                    assert torch.equal(OPS.nm_prune(*args), OPERATOR.reference(*args)), what
