"""The pipeline: passes over a clone of a graph, then operators joined into larger ones.

Everything here happens before autograd and before Inductor's caches; packed weights become inputs of the graph.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxprune import dump
from fxprune.config import Config
from fxprune.context import Context, Observer, Sizes
from fxprune.errors import RequireSparse, VerificationError
from fxprune.gradients import gradient_clock, gradient_table, ratio_at
from fxprune.graph import copied
from fxprune.lowering.fuse_dsconv import fuse_dsconv
from fxprune.lowering.fuse_pool import fuse_pool
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.lower import lower
from fxprune.lowering.measure import Measure
from fxprune.lowering.measure_gradient import MeasureGradient
from fxprune.lowering.region import form_regions
from fxprune.lowering.row_attention import row_attention
from fxprune.lowering.sequence import feature_major_sequences
from fxprune.passes import FORWARD
from fxprune.weights import Weights

log = logging.getLogger(__name__)

JOINS = (feature_major_sequences, form_regions, row_attention, fuse_pool, fuse_dsconv)


def rewrite(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    levels: Mapping[str, float] | None = None,
    sizes: Sizes | None = None,
    observers: tuple[Observer, ...] = (),
) -> tuple[GraphModule, Context, bool]:
    """Run the forward pipeline on a clone of ``gm``; returns (clone, context, whether anything was gained).

    levels: sparsity by parameter that a target speed came to. sizes: the symbolic ones of the call it is for, as
    :class:`Context` holds them; without them everything is decided at the hints. observers: see the graph after each pass.
    """
    clone = copied(gm)
    tables = KernelTables()
    training = trains(example_inputs)
    timer = Measure(config, tables.unit)
    ctx = Context(config, Weights(clone, example_inputs), not training, tables, timer, timer.predict, sizes or {})
    dumping = (dump.Dump(config.dump, tuple(example_inputs)),) if config.dump else ()
    ctx.observers = (*observers, *dumping)
    if training:
        ctx.gradient_ratio = ratio_at(config.grad_sparsity, gradient_clock.step)
        ctx.measure_gradient = MeasureGradient(config)
    if levels is not None:
        ctx.extra["levels"] = levels
    if (reason := _autocast_reason(gm, training)) is not None:
        ctx.extra["dense_reason"] = reason
    ctx.observe(0, "captured", clone)
    for number, rewrite_pass in enumerate(FORWARD, 1):
        start = time.perf_counter()
        changed = rewrite_pass(clone, ctx)
        ctx.counts[rewrite_pass.__name__] = changed
        ctx.seconds[rewrite_pass.__name__] = time.perf_counter() - start
        if changed:
            _lint(clone, rewrite_pass.__name__)
        ctx.observe(number, rewrite_pass.__name__, clone)
    ctx.seconds["measure"] = timer.seconds
    ctx.counts.update(lower(clone, tables))
    _require(ctx)
    if ctx.gradients:
        log.info("%s", gradient_table(ctx.gradients, ctx.gradient_ratio))
    gained = bool(ctx.shrunk) or ctx.gradient_key is not None or any(d.chosen for d in ctx.decisions)
    if ctx.gradient_key is None:
        ctx.gradient_ratio = None
    return clone, ctx, gained


def chain(gm: GraphModule, ctx: Context) -> None:
    """Join operators into larger ones, in graphs that run: the steps behind the pipeline."""
    for position, join in enumerate(JOINS, len(FORWARD) + 1):
        ctx.counts[join.__name__] = join(gm, ctx)
        ctx.observe(position, join.__name__, gm)


def _lint(gm: GraphModule, stage: str) -> None:
    try:
        gm.graph.lint()
    except RuntimeError as error:
        given = str(error).partition("\n")[0]
        raise VerificationError(stage=stage, what="malformed graph", given=given, expected="a legal graph") from error


def trains(inputs: Sequence[Any]) -> bool:
    """True when a graph of these inputs has a backward."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def _autocast_reason(gm: GraphModule, training: bool) -> str | None:
    """Return why autocast keeps a graph dense, ``None`` when it does not."""
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on for cuda"
    if _enters_autocast(gm):
        return "the model switches autocast on itself: call it under torch.autocast instead"
    if not torch.is_autocast_enabled("cpu"):
        return None
    if training:
        return "autocast is on while gradients are needed"
    dtype = torch.get_autocast_dtype("cpu")
    return None if dtype == torch.bfloat16 else f"autocast is on for {dtype}, kernels are float32 or bfloat16"


def _enters_autocast(gm: GraphModule) -> bool:
    """True when the graph switches autocast on; models also switch it off around what needs float32."""
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and "_enter_autocast" in str(n.target)]
    return any(len(n.args) < 3 or n.args[2] is not False for n in calls)


def _require(ctx: Context) -> None:
    dense = [d for d in ctx.decisions if d.mask is not None and not d.chosen]
    if ctx.config.require_sparse and dense:
        names = "; ".join(f"{d.match.name} ({d.reason})" for d in dense[:5])
        raise RequireSparse(count=len(dense), layers=names)
