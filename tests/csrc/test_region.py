"""Random programs of ``fxprune::region`` against its reference; corrupted ones raise or are still right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops import region
from tests.csrc.kernels import OPS, every_isa
from tests.csrc.programs import Program, as_text, corrupted, program
from tests.oracle import assert_same

CORRUPTED = 2000


def wide(case: Program) -> Program:
    return [t.double() for t in case[0]], *case[1:]


def compare(case: Program, repro: str) -> None:
    expected, exact = region.reference(*as_text(case)), region.reference(*as_text(wide(case)))
    before = torch.get_num_threads()
    try:
        for isa in every_isa():
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                assert_same(
                    OPS.region(*as_text(case)), expected, exact, f"{repro} on {isa}, {threads} threads", trusted=False
                )
    finally:
        torch.set_num_threads(before)


@pytest.mark.fuzz
@given(st.integers(0, 2**30))
def test_random_programs(seed: int) -> None:
    compare(program(seed), f"program({seed})")


def test_the_programs_are_worth_it() -> None:
    """Most results are not zero, and every kind of step and operand occurs."""
    codes: set[int] = set()
    operands = {"residual": 0, "gate": 0, "row-major": 0, "several outputs": 0}
    zeros = []
    for seed in range(200):
        case = program(seed)
        code, outputs = case[3:]
        for number, a in region.records(code):
            codes.add(number)
            if number == region.GEMM:
                operands["residual"] += a[6] >= 0
                operands["gate"] += a[7] >= 0
                operands["row-major"] += a[10] == -1
        operands["several outputs"] += len(outputs) > 1
        last = region.reference(*as_text(case))[-1]
        zeros.append((last == 0).float().mean().item())
    assert codes == {region.DEPTHWISE, region.GEMM, region.MEAN, region.CONV, region.POOL}
    assert min(operands.values()) >= 10, operands
    assert sum(zeros) / len(zeros) < 0.5


HUGE = """
import torch, fxprune
from fxprune.ops.bundle import bundle
from fxprune.ops.region import text
fxprune.register()
weight = [torch.ones(4), torch.arange(4).int(), torch.tensor([0, 4]).int(), torch.tensor([0]).int()]
first, second = [1, 12, 0, 0, 1, 2, 3, -1, -1, -1, 2**58, 1, 1, 0], [1, 12, 1, 0, 1, 2, 3, -1, -1, -1, 1, 1, 1, 0]
try:
    weights, layout = bundle(weight)
    torch.ops.fxprune.region([torch.ones(1, 4, 8, 8)], weights, text(layout), text([*first, *second]), [2])
except (RuntimeError, MemoryError):
    print("refused")
"""


def test_a_size_that_overflows_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused"], done.stderr


def test_an_output_named_twice_is_refused() -> None:
    *rest, outputs = next(region.samples())
    with pytest.raises(RuntimeError, match="twice"):
        OPS.region(*rest, [*outputs, *outputs])


@pytest.mark.parametrize("threads", (1, 2))
def test_what_changes_between_calls_is_seen(threads: int) -> None:
    """The program is read once; lists and values are read, and lists checked, on every call."""
    x, weights, layout, code, outputs = next(region.samples())
    floats, lists, taps = weights
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 4):
            case = ([x[0].expand(batch, -1, -1, -1)], weights, layout, code, outputs)
            OPS.region(*case)
            floats.mul_(2.0)
            torch.testing.assert_close(OPS.region(*case), region.reference(*case))
            for held, wrong in ((lists, 99), (taps, -1)):
                kept = held.clone()
                with pytest.raises(RuntimeError):
                    OPS.region(*case[:1], [w.fill_(wrong) if w is held else w for w in weights], *case[2:])
                held.copy_(kept)
            torch.testing.assert_close(OPS.region(*case), region.reference(*case))
    finally:
        torch.set_num_threads(before)


def test_corrupted_programs_raise_or_are_right() -> None:
    refused = 0
    for seed in range(CORRUPTED):
        case = corrupted(seed)
        try:
            given: list[Tensor] = OPS.region(*as_text(case))
        except (RuntimeError, MemoryError):
            refused += 1
            continue
        repro = f"corrupted({seed})"
        assert_same(given, region.reference(*as_text(case)), region.reference(*as_text(wide(case))), repro, trusted=False)
    assert refused > CORRUPTED // 2
