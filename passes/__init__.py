"""Graph in, graph out. ``FORWARD`` is the pipeline, read top to bottom."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from ..context import Context
from .fold_batchnorm import fold_batchnorm
from .fuse_epilogue import fuse_epilogue
from .fuse_gate import fuse_gate
from .fuse_transpose import fuse_transpose
from .match_block import match_blocks
from .match_depthwise import match_depthwise
from .match_gemm import match_gemm
from .normalize import normalize
from .plan import plan
from .rewrite_depthwise import rewrite_depthwise
from .rewrite_gemm import rewrite_gemm
from .shrink import shrink

Pass = Callable[[GraphModule, Context], int]

DETECT: tuple[Pass, ...] = (
    normalize,  # one vocabulary: pre-autograd ATen, no in-place activations
    match_depthwise,  # conv2d with groups == channels
    match_gemm,  # linear, addmm, mm, 1x1 conv2d
    match_blocks,  # [PW ->] DW -> [gate] -> PW chains over the two above
)

FORWARD: tuple[Pass, ...] = (
    normalize,  # first: everything below speaks ATen
    fold_batchnorm,  # before matching, so that a match sees the weight the kernel will run
    shrink,  # after folding, so that a filter and its BatchNorm are one; before matching, so that masks are of what is left
    match_depthwise,
    match_gemm,
    match_blocks,
    plan,  # masks and the choice sparse or dense; the only pass that reads weight values
    rewrite_depthwise,  # conv2d -> depthwise_taps
    rewrite_gemm,  # conv2d 1x1, linear -> tile_gemm
    fuse_transpose,  # after the rewrites: a region is feature-major only if all its GEMMs are ours
    fuse_gate,  # before the epilogue, which wants the last user of each GEMM
    fuse_epilogue,  # residual and activation into the kernels
)
