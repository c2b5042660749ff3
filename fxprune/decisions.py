"""What the latest compiles decided: kept without weights, logged, and told a line per layer."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace

from torch._logging import trace_structured
from torch.fx import Graph, GraphModule

from fxprune.context import Context, Decision, Shrunk
from fxprune.gradients import gradient_clock, gradient_table
from fxprune.report import Table
from fxprune.weights import Weights

log = logging.getLogger(__name__)

LAST_REPORTS: list[Context] = []  # of the latest compiles, the last one last


def keep_report(ctx: Context, seconds: float) -> None:
    """Log what a compile decided in so many seconds, and keep it."""
    chosen = [d for d in ctx.decisions if d.chosen]
    masked = [d for d in ctx.decisions if d.mask is not None]
    log.info(
        "%d of %d matches run sparse kernels (%d hold zeros), %.2f s planning, packing and measuring",
        len(chosen),
        len(ctx.decisions),
        len(masked),
        seconds,
    )
    if ctx.side is not None:
        log.info("two variants by batch size; this one: %s", ctx.side)
    if ctx.shrunk:
        log.info("%d groups of channels shrunk: %s", len(ctx.shrunk), cut_channels(ctx.shrunk))
    if log.isEnabledFor(logging.DEBUG):
        for decision in ctx.decisions:
            log.debug("%s", describe(decision))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "fxprune_decisions", "encoding": "json"},
        payload_fn=lambda: json.dumps({"seconds": ctx.seconds, "layers": [describe(d) for d in ctx.decisions]}),
    )
    LAST_REPORTS.append(replace(ctx, weights=Weights(GraphModule({}, Graph()))))  # without what is packed
    del LAST_REPORTS[:-16]


def gradient_report(graphs: int = 1) -> Table:
    """Return what ``grad_sparsity`` did to each layer of the graphs compiled last for training, and the times measured.

    After a few optimizer steps also what that is for a whole step: its time, and what the layers' times add to it with
    dense gradients.
    graphs: how many, 16 at most; a model with graph breaks, or under DDP, has several.
    """
    found = [ctx for ctx in LAST_REPORTS if ctx.gradients][-graphs:]
    layers = [layer for ctx in found for layer in ctx.gradients]
    pruned, steps = sum(ctx.gradient_key is not None for ctx in found), gradient_clock.last_steps()
    step = None if steps is None else (steps[0], steps[1] / max(pruned, 1))
    return gradient_table(layers, found[-1].config.grad_sparsity if found else "off", step)


def cut_channels(shrunk: Sequence[Shrunk]) -> str:
    """Return one line about the channels that were cut out of a graph."""
    parts = [f"{s.layers[0]}{' ...' if len(s.layers) > 1 else ''} {s.before} -> {s.after}" for s in shrunk]
    return f"{sum(s.before for s in shrunk)} -> {sum(s.after for s in shrunk)} channels ({', '.join(parts)})"


def describe(decision: Decision) -> str:
    """Return one line about one match."""
    match = decision.match
    return (
        f"{match.name} [{match.kind} {match.geometry}] {decision.sparsity:.1%} zeros -> {decision.kernel}: {decision.reason}"
    )
