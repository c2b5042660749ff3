"""``fxprune::tile_pack`` and ``tile_unpack``: gather a dense (N, K) weight into tiles, and scatter it back.

They are linear and each other's transpose, so each is the other's gradient. In training the live weight is
packed in the graph, and the gradient of a pruned element is zero by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops.operator import Args, Operator


def positions(index: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int, in_features: int, count: int) -> Tensor:
    """Return int64 (count,): the row-major position in (N, K) of every packed value, in packed order.

    Index arithmetic without a size that depends on values, so that it can be traced: it is the operators' decomposition.
    """
    tile = _owner(tile_ptr.long()[1:-1], len(index))
    width = (len(columns) - tile * granularity).clamp(max=granularity)
    first = width.cumsum(0) - width
    row = _owner(first[1:], count)
    feature = columns.long()[tile[row] * granularity + torch.arange(count, device=index.device) - first[row]]
    return feature * in_features + index.long()[row]


def _owner(starts: Tensor, count: int) -> Tensor:
    """Return int64 (count,): how many of ``starts`` are at most each position; a start at ``count`` counts nowhere."""
    marks = torch.zeros(count + 1, dtype=torch.int64, device=starts.device)
    return marks.scatter_add(0, starts, torch.ones_like(starts)).cumsum(0)[:count]


def pack_reference(weight: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int, nnz: int) -> Tensor:
    """weight: (N, K) -> values: (nnz,)."""
    where = positions(index, tile_ptr, columns, granularity, weight.shape[1], nnz)
    return weight.reshape(-1)[where]


def unpack_reference(
    values: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int, out_features: int, in_features: int
) -> Tensor:
    """values: (nnz,) -> (N, K), zero where nothing is kept."""
    where = positions(index, tile_ptr, columns, granularity, in_features, len(values))
    flat = values.new_zeros(out_features * in_features)
    return flat.index_put((where,), values).reshape(out_features, in_features)


def pack_fake(weight: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int, nnz: int) -> Tensor:
    return weight.new_empty((nnz,))


def unpack_fake(
    values: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int, out_features: int, in_features: int
) -> Tensor:
    return values.new_empty((out_features, in_features))


def pack_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    weight, index, tile_ptr, columns, ctx.granularity, _ = inputs
    ctx.shape = tuple(weight.shape)
    ctx.save_for_backward(index, tile_ptr, columns)


def pack_backward(ctx: Any, grad: Tensor) -> Args:
    dense = torch.ops.fxprune.tile_unpack(grad.contiguous(), *ctx.saved_tensors, ctx.granularity, *ctx.shape)
    return dense, None, None, None, None, None


def unpack_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    values, index, tile_ptr, columns, ctx.granularity, _, _ = inputs
    ctx.nnz = values.shape[0]
    ctx.save_for_backward(index, tile_ptr, columns)


def unpack_backward(ctx: Any, grad: Tensor) -> Args:
    values = torch.ops.fxprune.tile_pack(grad, *ctx.saved_tensors, ctx.granularity, ctx.nnz)
    return values, None, None, None, None, None, None


def random_structure(
    n: int, k: int, granularity: int, gen: torch.Generator, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (values, index, tile_ptr, columns) of a random tile-wise mask, with groups of all columns; for samples."""
    columns = torch.nonzero(torch.rand(n, generator=gen) < 0.8).reshape(-1) if groups == 1 else torch.arange(n)
    if not len(columns):
        columns = torch.arange(n)
    lists = [torch.nonzero(torch.rand(k, generator=gen) < 0.6).reshape(-1) for _ in range(-(-len(columns) // granularity))]
    ptr = torch.tensor([0, *[len(rows) for rows in lists]]).cumsum(0)
    widths = [min(granularity, len(columns) - t * granularity) for t in range(len(lists))]
    nnz = sum(len(rows) * width for rows, width in zip(lists, widths, strict=True))
    index = torch.cat(lists) if lists else torch.zeros(0)
    return torch.randn(nnz, generator=gen), index.int(), ptr.int(), columns.int()


def whole_structure(n: int, k: int, granularity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (index, tile_ptr, columns) with everything kept; for samples and tests."""
    tiles = -(-n // granularity)
    return torch.arange(k).repeat(tiles).int(), (torch.arange(tiles + 1) * k).int(), torch.arange(n).int()


def pack_samples() -> Iterator[Args]:
    for n, k, g in ((8, 6, 4), (10, 9, 4), (5, 12, 64)):
        gen = torch.Generator().manual_seed(n)
        values, index, tile_ptr, columns = random_structure(n, k, g, gen)
        yield torch.randn(n, k, generator=gen), index, tile_ptr, columns, g, len(values)
    yield torch.randn(n, k, generator=gen).bfloat16(), index, tile_ptr, columns, g, len(values)


def unpack_samples() -> Iterator[Args]:
    for n, k, g in ((8, 6, 4), (10, 9, 4), (5, 12, 64)):
        gen = torch.Generator().manual_seed(n)
        yield *random_structure(n, k, g, gen), g, n, k


def pack_bad_samples() -> Iterator[tuple[Args, str]]:
    weight, index, tile_ptr, columns, g, nnz = next(pack_samples())
    yield (weight.double(), index, tile_ptr, columns, g, nnz), r"float32"
    yield (weight, index + 100, tile_ptr, columns, g, nnz), r"index"
    yield (weight, index, tile_ptr, columns, g, nnz + 1), r"nnz|values"


def unpack_bad_samples() -> Iterator[tuple[Args, str]]:
    values, index, tile_ptr, columns, g, n, k = next(unpack_samples())
    yield (values[:-1], index, tile_ptr, columns, g, n, k), r"values"
    yield (values, index, tile_ptr + 1, columns, g, n, k), r"tile_ptr"
    yield (values, index, tile_ptr, columns + 100, g, n, k), r"columns"


PACK = Operator("tile_pack", pack_reference, pack_fake, pack_context, pack_backward, pack_samples, pack_bad_samples)
UNPACK = Operator(
    "tile_unpack", unpack_reference, unpack_fake, unpack_context, unpack_backward, unpack_samples, unpack_bad_samples
)
