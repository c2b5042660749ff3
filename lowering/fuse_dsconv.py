"""Fuse a depthwise convolution into the 1x1 convolution that reads it, on a GPU, where that is measured faster.

    depthwise_taps -> tile_gemm(feature_dim=1)  =>  dsconv

Fires in inference, when nothing else reads the depthwise result, there is no gate (squeeze-and-excite needs the whole plane
first), and the fused kernel runs the pair: 16-bit elements, a square window of 3, 5 or 7 with stride 1 or 2 and padding
k // 2, and room for every channel of 8x8 pixels in shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import call, fake, is_call, mutation_between, replace, sole_user
from .kernels.cuda import dsconv_bytes
from .measure_fusion import Compare, Fill, comparer, wanted

_DEPTHWISE = torch.ops.fxprune.depthwise_taps.default
_GEMM = torch.ops.fxprune.tile_gemm.default
_DSCONV = torch.ops.fxprune.dsconv.default
_GATE, _FEATURE_DIM = 7, 10


def fuse_dsconv(gm: GraphModule, ctx: Context, compare: Compare | None = None) -> int:
    """Return the number of pairs fused. ``compare`` times both forms; by default on the GPU."""
    if not wanted(ctx):
        return 0
    compare = compare or comparer(ctx)
    fused = 0
    for node in list(gm.graph.nodes):
        if not is_call(node, _GEMM) or (args := _fused(node)) is None:
            continue
        if _faster(node, args, ctx, compare):
            _replace(node, args)
            fused += 1
    return fused


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a block of a GPU may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _fused(node: Node) -> tuple[Any, ...] | None:
    """Return the arguments of the fused operator, ``None`` when the pair does not fit it."""
    first = node.args[0]
    if node.args[_FEATURE_DIM] != 1 or node.args[_GATE] is not None or not is_call(first, _DEPTHWISE):
        return None
    if sole_user(first) is not node or mutation_between(first, node):
        return None
    packed = fake(node.args[1])
    if packed is not None and packed.dtype == torch.int8:  # kept two in four, for a kernel of its own
        return None
    x, weight, taps, bias, *window = first.args[:8]
    value = fake(x)
    if value is None or value.device.type != "cuda" or value.dtype not in (torch.float16, torch.bfloat16):
        return None
    (kernel, width), (stride, across), padding, dilation = (list(pair) for pair in window)  # type: ignore[arg-type]
    square = kernel == width and stride == across and padding == [kernel // 2] * 2 and dilation == [1, 1]
    if not square or kernel not in (3, 5, 7) or stride not in (1, 2):
        return None
    if dsconv_bytes(value.shape[1], kernel, stride) > shared_memory(value.device):
        return None
    activations = [n.args[at] if len(n.args) > at else "none" for n, at in ((first, 8), (node, 11))]
    operands, outer, shape = node.args[1:5], node.args[5:7], node.args[8:10]
    return (x, weight, taps, bias, *operands, *outer, *window, *shape, *activations)


def _faster(node: Node, args: tuple[Any, ...], ctx: Context, compare: Compare) -> bool:
    first: Any = node.args[0]

    def fused(fill: Fill) -> Any:
        return _DSCONV(*fill(args))

    def apart(fill: Fill) -> Any:
        return _GEMM(_DEPTHWISE(*fill(first.args)), *fill(node.args[1:]))

    nodes = {*node.all_input_nodes, *first.all_input_nodes} - {first}
    ours, theirs = compare(fused, apart, nodes)
    return ours * ctx.config.min_speedup <= theirs


def _replace(node: Node, args: tuple[Any, ...]) -> None:
    first: Any = node.args[0]
    new = call(node, _DSCONV, *args)
    new.meta["fxprune_impl"] = "cuda"
    replace(node, new)
    first.graph.erase_node(first)
