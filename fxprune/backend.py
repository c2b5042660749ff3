"""``torch.compile(model, backend="hwprune")``: detect, decide, rewrite, and hand the rest to Inductor.

Everything that changes the graph happens on a clone, before autograd and before Inductor's caches; packed weights are
appended as graph inputs. A graph with nothing to gain goes to Inductor untouched.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis
from torch.fx import GraphModule

from fxprune.capture import Captured, detect
from fxprune.compiled import Built, CompiledGraph
from fxprune.config import Config
from fxprune.context import BatchSide, Context, Sizes
from fxprune.decisions import keep_report
from fxprune.errors import ConfigError, FxPruneError, NoGradientPruned, VerificationError
from fxprune.gradients import gradient_clock, ratio_at, ratios
from fxprune.graph import copied
from fxprune.left import may_prune
from fxprune.lowering import calibrate, codegen, library, measure
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.measure import Measure
from fxprune.match import Match
from fxprune.passes import Sdgp
from fxprune.passes.plan import unsupported
from fxprune.passes.regions import regions
from fxprune.pipeline import chain, rewrite, trains
from fxprune.plan import generation, lookup
from fxprune.staircase import Staircase, grouped, staircases
from fxprune.symbols import Symbols
from fxprune.target import search
from fxprune.weights import are_hidden, is_state, remember_names, states

log = logging.getLogger(__name__)

# what `verify` allows a 16-bit output: a few roundings of the largest value
_HALF_TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}


def hwprune(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. ``options`` are the fields of :class:`fxprune.Config`."""
    config = Config.from_options(options, mode)
    try:
        return _compile(gm, example_inputs, config)
    except Exception as error:
        defect = not isinstance(error, (FxPruneError, RestartAnalysis)) or isinstance(error, VerificationError)
        if not defect or config.require_sparse or config.verify:
            raise
        log.warning("the sparse rewrite failed; the graph runs dense", exc_info=True)
        return codegen.stock(gm, example_inputs, config)


def register() -> None:
    """Make the backend known to ``torch.compile`` in a checkout that is not installed."""
    from torch._dynamo.backends import registry

    if "hwprune" not in registry.list_backends(exclude_tags=()):
        registry.register_backend(hwprune, name="hwprune")  # type: ignore[arg-type]


def _compile(gm: GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    remember_names(gm)
    symbols = Symbols(example_inputs)
    training = trains(example_inputs)
    if training and config.fallback == "tensorrt":
        raise ConfigError(name="fallback", given="tensorrt", expected="inference: call the model under torch.no_grad()")
    if training and config.grad_sparsity is not None:
        gradient_clock.start()

    def dense(inputs: Sequence[Any], side: BatchSide | None = None) -> Built:
        run = codegen.stock(copied(gm), inputs, config)
        return Built(run, side=side, holds=_holds(config, training))

    def build(inputs: Sequence[Any], levels: Mapping[str, float] | None = None, sizes: Sizes | None = None) -> Built:
        if not _worth_a_look(gm, inputs, config):
            log.info("no zeros and no plan in this graph: stock %s", config.fallback)
            return dense(inputs)
        start = time.perf_counter()
        clone, ctx, changed = rewrite(gm, inputs, config, levels, sizes or symbols.sizes(inputs))
        keep_report(ctx, time.perf_counter() - start)
        if not changed:
            ctx.close()
            return dense(inputs, ctx.side)
        chain(clone, ctx)
        packs = ctx.weights.appended()
        if config.verify:
            clone.recompile()
            _verify_numerically("rewrite", gm, clone, inputs, packs, config, ctx)
        before = time.perf_counter()
        joint = None
        if ctx.gradient_ratio is not None:
            skips = frozenset(layer.number for layer in ctx.gradients if layer.skips)
            library = frozenset(layer.number for layer in ctx.gradients if layer.by_library)
            joint = Sdgp(ctx.gradient_ratio, config.grad_pruning, config.grad_target, skips, library)
        constant = [ctx.weights.value(n) is not None for n in clone.graph.nodes if n.op == "placeholder"]
        symbols.fix(packs)
        compiled = codegen.compile_rest(clone, [*inputs, *packs], constant, config, joint)
        ctx.seconds["codegen"] = time.perf_counter() - before
        run = _with_key(compiled, ctx, [*inputs, *packs])
        ctx.close()
        return Built(run, packs, ctx, ctx.side, _holds(config, training))

    def build_later(args: Sequence[Any]) -> Built:
        if are_hidden(args):
            return Built(gm.forward, holds=lambda: False)
        state = states(gm, args)
        inputs = [new if fixed or old is None else old for new, old, fixed in zip(args, activations, state, strict=True)]
        try:
            with symbols.restored(), warnings.catch_warnings():
                if hidden:
                    warnings.simplefilter("ignore", NoGradientPruned)  # other parts may hold the layers
                symbols.fix([value for value, fixed in zip(inputs, state, strict=True) if fixed])
                return build(inputs, levels, symbols.sizes(args))
        except Exception:
            log.warning("rebuilding for changed weights or another batch size failed; the graph runs dense", exc_info=True)
            return Built(gm.forward)

    fixed = states(gm, example_inputs)
    activations = [None if is_weight else value for value, is_weight in zip(example_inputs, fixed, strict=True)]
    levels = _levels(gm, example_inputs, config, dense, build) if config.has_target else None
    # a part of a model that DDP splits, whose parameters the first call brings: they may have a plan
    hidden = are_hidden(example_inputs) and generation() > 0
    first = Built(gm.forward, holds=lambda: False) if hidden else build(example_inputs, levels)
    return CompiledGraph(gm, build_later, first, example_inputs, freeze=config.freeze)


def groups_of(matches: Sequence[Match], config: Config) -> list[list[Staircase]]:
    """Return the levels of the layers a compiled kernel runs, those together that are decided together.

    Calibrates the cost model when nobody did, unless ``autotune="off"``.
    """
    if config.autotune != "off" and library.available() and not measure.calibrated(config.cache_dir):
        log.info("calibrating the cost model")
        calibrate.calibrate(config.cache_dir)
    tables = KernelTables()
    timer = Measure(config, tables.unit)
    mine = [m for m in matches if m.recurrent is None and unsupported(m, tables) is None]
    stairs = staircases(mine, config, tables.units(mine), timer, timer.predict)
    return grouped(stairs, regions([match for match in mine if match.kind != "linear"]))


def _levels(
    gm: GraphModule,
    inputs: Sequence[Any],
    config: Config,
    dense: Callable[[Sequence[Any]], Built],
    build: Callable[[Sequence[Any], Mapping[str, float]], Built],
) -> Mapping[str, float]:
    """Find the sparsity of each layer of one graph for a target speed."""
    if trains(inputs):
        name = "target_latency_ms" if config.target_speedup is None else "target_speedup"
        expected = "inference: call the model under torch.no_grad(), or prune it first with fxprune.prune"
        raise ConfigError(name=name, given=getattr(config, name), expected=expected)
    args = [v if isinstance(v, Tensor) or not hasattr(v, "node") else v.node.hint for v in inputs]

    def run(built: Built) -> Callable[[], Any]:
        return partial(built.run, *args, *built.packs)

    start = time.perf_counter()
    groups = groups_of(may_prune(detect(Captured(gm, tuple(inputs)), config)), config)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        speed = search(groups, config, run(dense(inputs)), lambda found: run(build(inputs, found)), seconds=seconds)
    log.info("%s", speed)
    return speed.levels


def _holds(config: Config, training: bool) -> Callable[[], bool] | None:
    """Return whether the ratio of the data gradients is still the one of now; ``None`` when it never changes."""
    if not training or len(ratios(config.grad_sparsity)) < 2:
        return None
    now = ratio_at(config.grad_sparsity, gradient_clock.step)
    return lambda: ratio_at(config.grad_sparsity, gradient_clock.step) == now


def _with_key(run: Callable[..., Any], ctx: Context, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Give every call a new tensor of counters, so that the backward of an earlier call keeps its own."""
    if ctx.gradient_key is None:
        return run
    key = ctx.weights.value(ctx.gradient_key)
    at = next(i for i, value in enumerate(inputs) if value is key)
    return lambda *args: run(*args[:at], gradient_clock.key(ctx.config.seed), *args[at + 1 :])


def _worth_a_look(gm: GraphModule, example_inputs: Sequence[Any], config: Config) -> bool:
    """True when pruning is asked for, or a weight (or a mask beside it) has a plan or a fair share of zeros."""
    if config.prunes or config.dump or (trains(example_inputs) and ratio_at(config.grad_sparsity, gradient_clock.step)):
        return True
    if are_hidden(example_inputs):
        return False
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, value in zip(nodes, example_inputs, strict=True):
        state = isinstance(value, torch.nn.Parameter) or (isinstance(value, Tensor) and is_state(node))
        if state and value.dim() > 1:
            if lookup(value) is not None:
                return True
            if value.numel() and torch.count_nonzero(value.detach()).item() < 0.95 * value.numel():
                return True
    return False


def _verify_numerically(
    stage: str,
    gm: GraphModule,
    clone: GraphModule,
    inputs: Sequence[Any],
    packs: Sequence[Tensor],
    config: Config,
    ctx: Context,
) -> None:
    """Compare the rewritten graph with the original on the example inputs, run eagerly on copies."""
    if config.prunes:  # the function was meant to change
        return
    copies = [[t.detach().clone() if isinstance(t, Tensor) else t for t in inputs] for _ in range(2)]
    expected, given = _seeded(gm, copies[0]), _seeded(clone, [*copies[1], *packs])
    flat_expected = [t for t in torch.utils._pytree.tree_leaves(expected) if isinstance(t, Tensor)]
    flat_given = [t for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, Tensor)]
    for a, b in zip(flat_expected, flat_given, strict=True):
        scale = a.abs().max().clamp_min(1e-12) if a.numel() else 1.0
        error = ((a - b).abs().max() / scale).item() if a.numel() else 0.0
        most = max(config.tolerance, _HALF_TOLERANCE.get(a.dtype, 0.0))
        if not error <= most and a.is_floating_point():
            expected_text = f"at most {most:g} relative to the largest value"
            raise VerificationError(stage=stage, what="output differs", given=f"{error:.3g}", expected=expected_text)


@torch.no_grad()
def _seeded(run: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Call with one state of the random generator, so that both sides draw the same dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(*args)
