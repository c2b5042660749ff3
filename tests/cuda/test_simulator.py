"""The rules of the simulated machine: small kernels that break one each, and planted mistakes in the real kernels."""

from __future__ import annotations

import re

import pytest
import torch

from tests.cuda.simulator import SEEDS, Fault, Plant, begin, depthwise_taps, finish, library, pointer, tile_gemm
from tests.cuda.test_tile_gemm import tiles
from tests.integers import bitmap, generator, integers

# what each broken kernel is told
RULES = {
    "missing barrier": "race|uninitialised",
    "overwritten before it is read": "race",
    "missing warp synchronisation": "race|uninitialised",
    "uninitialised shared memory": "uninitialised",
    "shared memory out of bounds": "of 1024 bytes of shared memory",
    "global memory out of bounds": "outside of every global buffer; byte 256 of a buffer of 256",
    "misaligned access": "not aligned to 16",
    "written twice": "second time",
    "written though read-only": "only to be read",
    "barrier that some never reach": "deadlock; 32 threads from 0 on wait at barrier 0",
    "lanes at different instructions": "while others of its group are at",
    "cp.async read before the wait": "still writing",
    "cp.async of another thread": "still writing|race",
    "cp.async never waited for": "never waited for",
    "bulk copy read before its mbarrier": "still writing",
    "mbarrier that expects too little": "deadlock; 32 threads from 0 on wait at phase 0",
    "more registers than a block has": "deadlock; 32 threads from [0-9]+ on wait at registers",
    "mbarrier used before it is initialised": "nobody initialised|initialised it has met",
}


def cases() -> list[str]:
    names = []
    while (name := library().fxprune_sim_case(len(names))) is not None:
        names.append(name.decode())
    return names


def run_case(index: int, broken: bool, seed: int) -> None:
    given = torch.arange(64, dtype=torch.int32)
    room = torch.zeros(80, dtype=torch.int32)
    source = room[(-room.data_ptr() % 64) // 4 :][:64].copy_(given)
    out = torch.zeros(64, dtype=torch.int32)
    begin(seed, Plant.NONE, (source,), (out,))
    finish(library().fxprune_sim_run_case(index, broken, pointer(source), pointer(out)))


def test_every_rule_is_listed() -> None:
    assert cases() == sorted(RULES)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", sorted(RULES))
def test_rule(name: str, seed: int) -> None:
    index = sorted(RULES).index(name)
    run_case(index, False, seed)
    with pytest.raises(Fault) as caught:
        run_case(index, True, seed)
    assert re.search(RULES[name], str(caught.value)), str(caught.value)


@pytest.mark.parametrize("plant", (Plant.SHORT_WAIT, Plant.NO_BARRIER), ids=lambda p: p.name)
def test_depthwise_mistakes_are_caught(plant: Plant) -> None:
    gen = generator(1)
    mask = torch.rand(2, 9, generator=gen) < 0.5
    x, weight = integers(gen, 1, 2, 8, 16).bfloat16(), integers(gen, 2, 9).bfloat16()
    arguments = (x, weight, bitmap(mask), None, [3, 3], [1, 1], [1, 1], [1, 1])
    depthwise_taps(*arguments)
    for seed in SEEDS:
        with pytest.raises(Fault):
            depthwise_taps(*arguments, plant=plant, seed=seed)


MMA = (Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.LANE_MAP, Plant.SWIZZLE, Plant.ACCUMULATOR_ROW)
WGMMA = (
    Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.SWIZZLE, Plant.NO_PROXY_FENCE, Plant.NO_PHASE_WAIT, Plant.EARLY_ARRIVE,
    Plant.NO_MATRIX_FENCE, Plant.ACCUMULATOR_ROW,
)  # fmt: skip


def gemm(hopper: bool, seed: int, plant: Plant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (result, expected) of a GEMM longer than the ring of stages."""
    gen = generator(7)
    weight, (values, *structure) = tiles(gen, 128, 400, 128, 0.9, 1.0)
    x = integers(gen, 1, 400, 136)
    expected = (weight @ x).bfloat16()
    arguments = (x.bfloat16(), values.bfloat16(), *structure, None, None, None, 128, 128)
    return tile_gemm(*arguments, hopper=hopper, seed=seed, plant=plant), expected


@pytest.mark.parametrize(
    ("hopper", "plant"),
    [*((False, plant) for plant in MMA), *((True, plant) for plant in WGMMA)],
    ids=lambda value: value.name if isinstance(value, Plant) else ("mma", "wgmma")[value],
)
def test_gemm_mistakes_are_caught(hopper: bool, plant: Plant) -> None:
    """Every order of threads finds the mistake, as a fault or as a wrong result."""
    for seed in SEEDS:
        result, expected = gemm(hopper, seed, Plant.NONE)
        assert torch.equal(result, expected)
        try:
            result, _ = gemm(hopper, seed, plant)
        except Fault:
            continue
        assert not torch.equal(result, expected), f"{plant.name} passed with seed {seed}"
