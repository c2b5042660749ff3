"""The device image of a packed weight, against a derivation of its own in Python."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops import cuda_tile_image
from tests.cuda.simulator import SEEDS, tile_image
from tests.cuda.test_tile_gemm import tiles
from tests.integers import generator

UNWRITTEN = 0xEEEE


def derived(values: Tensor, tile_ptr: Tensor, granularity: int, kept: int) -> tuple[list[int], list[int], Tensor]:
    """Return (order, first_block, elements int16 of all blocks) from the description in tile_image.cuh."""
    counts = (tile_ptr[1:] - tile_ptr[:-1]).tolist()
    order = sorted(range(len(counts)), key=lambda t: (-counts[t], t))
    blocks = [-(-count // 64) for count in counts]
    first = [sum(blocks[:t]) for t in range(len(counts) + 1)]
    panels = -(-granularity // 64)
    parts, at = [torch.zeros(0, dtype=torch.int16)], 0
    for t, count in enumerate(counts):
        width = min(granularity, kept - t * granularity)
        padded = torch.zeros(blocks[t] * 64, panels * 64, dtype=torch.int16)
        padded[:count, :width] = values[at : at + count * width].view(count, width)
        at += count * width
        # (block, row / 8, row % 8, panel, chunk, element) -> (block, panel, row / 8, row % 8, chunk', element)
        split = padded.view(blocks[t], 8, 8, panels, 8, 8).permute(0, 3, 1, 2, 4, 5).contiguous()
        swizzled = torch.empty_like(split)
        for row in range(8):
            for chunk in range(8):
                swizzled[:, :, :, row, chunk ^ row] = split[:, :, :, row, chunk]
        parts.append(swizzled.flatten())
    return order, first, torch.cat(parts)


@settings(max_examples=25)
@given(data=st.data())
def test_image(data: st.DataObject) -> None:
    draw = data.draw
    n, k, g = draw(st.integers(1, 150)), draw(st.integers(1, 150)), draw(st.sampled_from((1, 8, 24, 64, 100, 128, 200)))
    seed = draw(st.sampled_from(SEEDS))
    gen = generator(n, k, g)
    _, (floats, index, tile_ptr, columns) = tiles(gen, n, k, g, draw(st.sampled_from((0.0, 0.4, 1.0))), 0.8)
    g = min(g, max(len(columns), 1))  # as the operator does
    values = torch.randint(1, 2**15, (len(floats),), generator=gen).short()
    image = tile_image(values, tile_ptr, len(index), g, len(columns), seed=seed)
    order, first, elements = derived(values, tile_ptr, g, len(columns))
    count = len(tile_ptr) - 1
    table = image[: 4 * (2 * count + 1)].view(torch.int32).tolist()
    assert table == [*order, *first]
    start = -(-(2 * count + 1) * 4 // 1024) * 1024
    blocks = image[start:].view(torch.int16)
    assert torch.equal(blocks[: len(elements)], elements)
    packed = cuda_tile_image.build(values, tile_ptr, g, len(columns))
    assert torch.equal(packed[: 4 * (2 * count + 1)], image[: 4 * (2 * count + 1)])
    assert torch.equal(packed[start:].view(torch.int16)[: len(elements)], elements) and len(packed) == len(image)
    assert (blocks[len(elements) :] == UNWRITTEN - 2**16).all(), "the blocks nobody needs are left alone"
