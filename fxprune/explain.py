"""``fxprune.explain``: what is prunable, what each match gains, and why something stays dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxprune.backend import groups_of
from fxprune.capture import capture
from fxprune.config import Config
from fxprune.context import Context, Decision, Shrunk
from fxprune.decisions import cut_channels
from fxprune.errors import ConfigError
from fxprune.pipeline import chain, rewrite
from fxprune.prunable import contexts_of, prunable
from fxprune.report import Table
from fxprune.stages import Stage, Stages

_HEAD = ("layer", "kind", "shape", "pattern", "sparsity", "kernel", "kernel us", "dense us", "decision")


def explain(model: nn.Module, example_inputs: Any, **options: Any) -> Table:
    """Return one row per match: layer, kind, shape, pattern, sparsity, kernel, times, and the decision with its reason.

    Works before anything is pruned: with ``sparsity=`` the masks are chosen and timed, and the model is not touched.
    Without zeros and without ``sparsity=`` every row says so. Behind the matches follow the layers with a weight that
    no kernel exists for, with the reason.
    options: fields of :class:`fxprune.Config`.
    """
    config, contexts = _reading(options), []
    for graph in capture(model, example_inputs):
        with torch.no_grad():
            _, ctx, _ = rewrite(graph.gm, graph.inputs, config)
        ctx.refused[:0] = graph.outside
        contexts.append(ctx)
    return table_of(contexts)


def stages(model: nn.Module, example_inputs: Any, **options: Any) -> list[list[Stage]]:
    """Return, for each graph of the model, the graph before and after every pass that changed it; the first is as captured.

    options: as :func:`explain` takes them.
    """
    config, found = _reading(options), []
    for graph in capture(model, example_inputs):
        watch = Stages()
        with torch.no_grad():
            clone, ctx, changed = rewrite(graph.gm, graph.inputs, config, observers=(watch,))
            if changed:
                chain(clone, ctx)
        found.append(watch.kept)
    return found


def _reading(options: dict[str, Any]) -> Config:
    """Return the options of a run that nothing is compiled for."""
    config = dataclasses.replace(Config.from_options(options), require_sparse=False, dump=None, verify=False)
    if config.has_target:
        expected = "sparsity= to explain: a target is met by fxprune.prune, which builds and measures models"
        raise ConfigError(name="target_speedup or target_latency_ms", given="a target", expected=expected)
    return config


def table_of(contexts: Sequence[Context]) -> Table:
    """Return the table of what was decided in the graphs of one model."""
    decisions = [d for ctx in contexts for d in ctx.decisions]
    refused = [r for ctx in contexts for r in ctx.refused]
    rows = [_row(d) for d in decisions]
    rows += [(r.name, r.kind, r.shape, "-", "-", "dense", "-", "-", r.reason) for r in refused]
    shrunk = [s for ctx in contexts for s in ctx.shrunk]
    return Table("matches", _HEAD, rows, _summary(decisions, shrunk, sum(len(ctx.blocks) for ctx in contexts)))


def levels(model: nn.Module, example_inputs: Any, **options: Any) -> Table:
    """Return what each layer could lose and what that saves: a row per layer and level, as a target speed would choose from.

    options: fields of :class:`fxprune.Config`; with ``autotune="off"`` times are predicted, not measured.
    """
    config = Config.from_options(options)
    contexts = contexts_of(model, example_inputs, config)
    rows = []
    for group in groups_of(prunable(model, contexts), config):
        for stair in group:
            match = stair.matches[0]
            for step in stair.steps:
                share = (f"{step.sparsity:.1%}", f"{step.retained:.1%}")
                rows.append((match.name, match.kind, *share, f"{step.micros:.1f}", f"{stair.dense:.1f}"))
    return Table("levels", ("layer", "kind", "sparsity", "importance kept", "kernel us", "dense us"), rows)


def _row(decision: Decision) -> tuple[str, ...]:
    match, timing = decision.match, decision.timing
    sparse = f"{timing.sparse:.1f}" if timing else "-"
    dense = f"{timing.dense:.1f}" if timing else "-"
    verdict = f"chosen: {decision.reason}" if decision.chosen else decision.reason
    if match.kind == "rnn" and decision.chosen and not torch._dynamo.config.allow_rnn:
        verdict = f"set torch._dynamo.config.allow_rnn = True before compile, or it is in no graph; then {verdict}"
    pattern = decision.pattern or "-"
    return (
        match.name,
        match.kind,
        str(match.geometry),
        pattern,
        f"{decision.sparsity:.1%}",
        decision.kernel,
        sparse,
        dense,
        verdict,
    )


def _summary(decisions: list[Decision], shrunk: list[Shrunk], blocks: int) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for decision in decisions:
        kinds[decision.match.kind] = kinds.get(decision.match.kind, 0) + 1
    timed = [d for d in decisions if d.timing is not None]
    dense = sum(d.timing.dense for d in timed if d.timing)
    ours = sum(min(d.timing.sparse, d.timing.dense) if d.chosen else d.timing.dense for d in timed if d.timing)
    summary: dict[str, Any] = {"matches": ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "none"}
    summary["depthwise-separable blocks"] = blocks
    summary["chosen"] = f"{sum(d.chosen for d in decisions)} of {len(decisions)}"
    if shrunk:
        summary["cut out"] = cut_channels(shrunk)
    if timed:
        summary["time in timed matches"] = f"{ours:.0f} us, dense {dense:.0f} us ({dense / max(ours, 1e-9):.2f}x)"
    return summary
