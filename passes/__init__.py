"""Graph in, graph out. ``FORWARD`` is the pipeline, read top to bottom.

``Sdgp`` runs on the joint graph of forward and backward instead, and is made per compile from the options.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from ..context import Context
from .fold_batchnorm import fold_batchnorm
from .fold_scale import fold_scale
from .fold_weights import fold_weights
from .fuse_epilogue import fuse_epilogue
from .fuse_gate import fuse_gate
from .fuse_transpose import fuse_transpose
from .lower_precision import lower_precision
from .mark_gradients import mark_gradients
from .match_block import match_blocks
from .match_conv import match_conv
from .match_depthwise import match_depthwise
from .match_gemm import match_gemm
from .match_rnn import match_rnn
from .normalize import normalize
from .normalize_gemm import normalize_gemm
from .open_attention import open_attention
from .open_checkpoint import open_checkpoint
from .plan import plan
from .refuse_gemm import refuse_gemm
from .relax_views import relax_views
from .rewrite_conv import rewrite_conv
from .rewrite_depthwise import rewrite_depthwise
from .rewrite_gemm import rewrite_gemm
from .rewrite_rnn import rewrite_rnn
from .sdgp import Sdgp
from .shrink import shrink

Pass = Callable[[GraphModule, Context], int]

DETECT: tuple[Pass, ...] = (
    open_checkpoint,  # what is checkpointed is part of the graph
    open_attention,  # the linear layers of nn.MultiheadAttention are calls of their own
    normalize,  # one vocabulary: pre-autograd ATen, no in-place activations
    fold_weights,  # so that a masked weight is one
    normalize_gemm,  # einsum, bmm, baddbmm and addmm with a constant matrix are matmul or linear
    match_depthwise,  # convolutions with groups == channels
    match_gemm,  # linear, addmm, mm, 1x1 convolutions
    match_conv,  # the other convolutions; what is matched by none of the three is refused with a reason
    match_rnn,  # lstm, gru
    refuse_gemm,  # products with a weight that are no match, for the report
    match_blocks,  # [PW ->] DW -> [gate] -> PW chains over the two above
)

FORWARD: tuple[Pass, ...] = (
    open_checkpoint,  # first: what is checkpointed is part of the graph
    open_attention,  # before what matches: the linear layers of nn.MultiheadAttention are calls of their own
    normalize,  # everything below speaks ATen
    fold_weights,  # before everything that asks whether a weight is constant
    normalize_gemm,  # right after: what else multiplies by a constant matrix
    relax_views,  # after in-place activations became functional; before plan, which asks what addresses memory
    fold_batchnorm,  # before matching, so that a match sees the weight the kernel will run
    fold_scale,  # likewise
    lower_precision,  # after folding, which is exact in float32; before matching, so that matches have the types of autocast
    shrink,  # after folding, so that a filter and its BatchNorm are one; before matching, so that masks are of what is left
    match_depthwise,
    match_gemm,
    match_conv,
    match_rnn,
    refuse_gemm,
    match_blocks,
    plan,  # masks and the choice sparse or dense; the only pass that reads weight values
    mark_gradients,  # before the rewrites, which keep the marks: a layer is still one node of a known kind
    rewrite_depthwise,  # conv2d -> depthwise_taps
    rewrite_gemm,  # conv2d 1x1, linear -> tile_gemm
    rewrite_conv,  # the other convolutions -> tile_conv
    rewrite_rnn,  # lstm, gru -> tile_gemm and rnn_steps
    fuse_transpose,  # after the rewrites: a region is feature-major only if all its GEMMs are ours
    fuse_gate,  # before the epilogue, which wants the last user of each GEMM
    fuse_epilogue,  # residual and activation into the kernels
)

__all__ = ["DETECT", "FORWARD", "Pass", "Sdgp"]
