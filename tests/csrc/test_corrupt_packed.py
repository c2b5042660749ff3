"""Packed weights with something wrong reach the operators: they are refused, or computed as the reference computes them.

Under `make asan` nothing here may touch memory that is not its own.
"""

from __future__ import annotations

import os
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from fxprune.lowering import library
from fxprune.lowering.kernels.cpu import REFERENCE_ONLY
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxprune.ops import OPS
from fxprune.ops.bundle import unbundle
from fxprune.ops.operator import Operator
from fxprune.ops.region import numbers, text
from tests.oracle import nearness, tensors

if not library.load():
    pytest.skip("the C++ library is not built", allow_module_level=True)
COMPILED = [op for op in OPS if op.name not in REFERENCE_ONLY]


def whole(value: Any) -> Any:
    """Integers in place of random floats, so that every order of summation gives the same bits."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [whole(v) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return (value * 2).round().clamp(-3, 3)
    return value


def broken(value: Any, gen: random.Random) -> Any:
    """Return something close to ``value``: an entry changed, entries lost or doubled, another shape or type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str) and " " in value:  # a region's program or layout
        return text(broken(list(numbers(value)), gen)) if gen.random() < 0.8 else value[: gen.randrange(len(value))]
    if isinstance(value, str):
        return gen.choice(["none", "relu", "", "nonsense"])
    if isinstance(value, int):
        return gen.choice([value + 1, value - 1, 0, -1, -value, (1 << 40) + value, (1 << 62) + value, -(1 << 62)])
    if isinstance(value, float):
        return gen.choice([-value, 0.0, float("nan"), float("inf"), 1e300])
    if isinstance(value, list):
        copy = list(value)
        how = gen.randrange(4)
        if not copy or how == 0:
            return copy + copy[:1]
        at = gen.randrange(len(copy))
        if how == 1:
            del copy[at]
        else:
            copy[at] = broken(copy[at], gen)
        return copy
    how, flat = gen.randrange(7), value.clone().flatten()
    if how < 4 and len(flat) and not value.is_floating_point():
        at = gen.randrange(len(flat))
        limits = torch.iinfo(value.dtype)
        near = min(max(int(flat[at]) + gen.choice((-1, 1)), limits.min), limits.max)
        flat[at] = gen.choice([int(flat[at]) ^ 1, 0, -1, limits.max, limits.min, len(flat), near])
        return flat.reshape(value.shape)
    if how == 4:
        return flat[: gen.randrange(len(flat) + 1)]
    if how == 5:
        return torch.cat([flat, flat[:1]])
    return gen.choice([flat, value.unsqueeze(0), value.to(torch.float64), value[..., :0]]) if value.dim() else value.long()


def expected(op: Operator, args: list[Any]) -> Any:
    """The reference, or ``None`` where it cannot run what the operator refuses."""
    try:
        return op.reference(*args)
    except (RuntimeError, IndexError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return None


def repeats(op: Operator, args: list[Any]) -> bool:
    """True when a tile names a K row twice or out of order: the operators check ranges, ``Tile.check`` refuses the order."""
    flat = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    if op.name == "region":
        flat = unbundle(args[1], numbers(args[2]))
    for index, pointer in pairwise(flat):
        if index.dtype == pointer.dtype == torch.int32 and len(pointer) and int(pointer[-1]) == len(index):
            wrong = (index.diff() <= 0).nonzero().flatten() + 1
            if not set(wrong.tolist()) <= set(pointer.tolist()):
                return True
    return False


def same(op: Operator, given: Any, wanted: Any) -> bool:
    pairs = list(zip(tensors(given), tensors(wanted), strict=True))
    near = nearness(op.name)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=near, rtol=near, equal_nan=True) for a, b in pairs)


@pytest.mark.fuzz
@pytest.mark.parametrize("op", COMPILED, ids=lambda op: op.name)
def test_corrupt_arguments_are_refused_or_computed(op: Operator) -> None:
    count = int(os.environ.get("FXPRUNE_FUZZ", "150"))
    gen, call = random.Random(count), getattr(torch.ops.fxprune, op.name)
    samples = [[whole(a) for a in args] for args in op.samples()]
    refused = computed = 0
    for i in range(count):
        args = list(samples[i % len(samples)])
        packed = [p for p, a in enumerate(args) if p and not (isinstance(a, Tensor) and a.dim() == 4)]
        for _ in range(gen.choice((1, 1, 2))):
            at = gen.choice(packed)
            args[at] = broken(args[at], gen)
        try:
            given = call(*args)
        except (RuntimeError, TypeError):  # torch itself refuses a None for a tensor
            refused += 1
            continue
        computed += 1
        wanted = expected(op, args)
        if not repeats(op, args):
            assert wanted is not None and same(op, given, wanted), f"{op.name}, corruption {i} of {count}"
    assert refused > count // 4 and computed, (refused, computed)
