"""``fxprune.prune``: write zeros into ordinary dense weights, in patterns that the compiler runs fast."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxprune.calibration import Calibration, LossFn
from fxprune.capture import capture, detect
from fxprune.compensate import Refit, refit_layers, write_refit
from fxprune.config import KINDS, Config
from fxprune.errors import ComputedWeight, ConfigError, MissingCalibration, NothingToPrune
from fxprune.importance import calibrate
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.measure import Measure
from fxprune.match import Match
from fxprune.plan import LayerPlan, Plan, PrunedWeight, register
from fxprune.planner import Choice, choose_masks, hits
from fxprune.report import Table
from fxprune.search import Search, check_search, largest_scale, metric, scaled
from fxprune.sparsity import dcp


@dataclass(frozen=True)
class PruneResult:
    """model: a plain module with zeros. plan: pattern, tiles and counts. sparsity: achieved, by the keys asked for.

    search: with ``max_drop``, the share of the sparsity, the metric and the evaluations.
    """

    model: nn.Module
    plan: Plan
    sparsity: dict[str, float]
    report: Table
    search: Search | None = None


Decided = tuple[dict[str, Choice], dict[str, Refit]]  # by parameter: the mask, and refitted values if asked for


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    inplace: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    compensate: bool | str = False,
    eval_fn: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    **options: Any,
) -> PruneResult:
    """Prune ``model`` and return a copy (the model itself with ``inplace=True``).

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; the model is run on
        them once, in evaluation mode, to find its layers.
    sparsity: fraction of zeros; a float, or a dict by kind ("depthwise", "pointwise", "conv", "linear", "rnn") or layer
        glob. With an n:m pattern it is 1 - n/m or left out.
    filter_fn: ``(module, fqn) -> bool``; layers it refuses stay as they are.
    calibration: batches, each what the model takes (tensor, tuple or dict), or with ``loss_fn`` (inputs, targets); for
        ``importance="taylor"`` and ``"wanda"`` and for ``compensate``. An iterator is read into memory.
    loss_fn: ``(output, targets) -> scalar``; without it "taylor" needs a model whose output has ``.loss``.
    compensate: refit the remaining weights by least squares to the dense outputs on ``calibration``; with
        "sequential" each layer after those that run before it (one pass over the data per layer).
    eval_fn, max_drop: find by bisection the largest share of ``sparsity`` at which ``eval_fn(model) -> float``, higher
        is better, is at most ``max_drop`` below that of the dense model; ``result.search`` says how.
    options: fields of :class:`fxprune.Config`.

    Where recurrent layers are pruned, ``torch._dynamo.config.allow_rnn`` is switched on for this process: Dynamo calls
    ``nn.LSTM`` and ``nn.GRU`` outside of its graphs by default, where no backend sees them.

    Raises an error of :mod:`fxprune.errors` and changes nothing when the request makes no sense.
    Sources: DEPrune (NeurIPS 2024) Sec. 4-5 for ``dcp``, tile-wise sparsity (SC'20) for ``tile``.
    """
    config = Config.from_options({"sparsity": sparsity, **options})
    data = Calibration.of(calibration, loss_fn)
    if compensate not in (False, True, "sequential"):
        raise ConfigError(name="compensate", given=compensate, expected='True, False or "sequential"')
    if compensate and data is None:
        raise MissingCalibration(option=f"compensate={compensate!r}")
    check_search(eval_fn, max_drop)
    matches = prunable(model, example_inputs, config, filter_fn)
    config = calibrate(config, model, matches, data)

    def decide(scale: float = 1.0) -> Decided:
        chosen = masks(matches, scaled(config, scale))
        if not compensate or data is None:
            return chosen, {}
        return chosen, refit_layers(model, chosen, data, compensate == "sequential")

    search: Search | None = None
    if eval_fn is None or max_drop is None:
        decided = decide()
    else:
        decided, search = largest_scale(decide, lambda d: _evaluate(eval_fn, model, d), max_drop)
    target = model if inplace else copy.deepcopy(model)
    layers = _write(target, decided)
    if any(layer.kind == "rnn" for layer in layers):
        torch._dynamo.config.allow_rnn = True  # else Dynamo leaves the layers out of the graphs it hands to a backend
    return PruneResult(target, Plan(layers), _achieved(layers, sparsity), _table(layers, decided[1], search), search)


def masks(matches: Sequence[Match], config: Config) -> dict[str, Choice]:
    """Choose the masks of ``config.sparsity``, by parameter in the order of ``matches``."""
    chosen = choose_masks(matches, config, KernelTables().unit, _gain(matches, config))
    if not chosen:
        raise NothingToPrune(
            reason=f"sparsity={config.sparsity!r} asks nothing of the {len(matches)} prunable layer(s) found",
            remedy="Run fxprune.explain(model, example_inputs) for the layers and their kinds.",
        )
    return {m.parameter: chosen[m.parameter] for m in matches if m.parameter in chosen}


def prunable(
    model: nn.Module, example_inputs: Any, config: Config, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[Match]:
    """Return the matches whose weight may be zeroed: a float parameter that nothing unmatched shares."""
    if not isinstance(model, nn.Module):
        raise ConfigError(name="model", given=type(model).__name__, expected="a torch.nn.Module")
    graphs = capture(model, example_inputs)
    modules = dict(model.named_modules())
    found: list[Match] = []
    computed: list[str] = []
    for graph in graphs:
        ctx = detect(graph, config)
        matched = {m.node for m in ctx.matches}
        for match in ctx.matches:
            owner = match.parameter.rpartition(".")[0]  # "" when the model itself is the layer
            if not isinstance(match.value, nn.Parameter):
                if ctx.weights.origin(match.weight) is not match.weight:
                    computed.append(match.name)
                continue
            if owner not in modules or _shared(match, matched):
                continue
            if filter_fn is None or filter_fn(modules[owner], match.name):
                found.append(match)
    if computed:
        message = (
            f"{len(computed)} layer(s) are left as they are, because their weight is computed (a mask, a parametrization or "
            f"a weight norm) and not a Parameter: {', '.join(computed)}. Make it one first, with "
            "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations."
        )
        if not found:
            raise NothingToPrune(reason=message, remedy="Then prune again.")
        warnings.warn(message, ComputedWeight, stacklevel=3)
    if not found:
        raise NothingToPrune(
            reason=f"no convolution, linear or recurrent layer among the {len(graphs)} captured graph(s)",
            remedy="Supported kinds: " + ", ".join(KINDS) + ".",
        )
    return found


def _shared(match: Match, matched: set[Any]) -> bool:
    """True when something other than matched layers reads the weight (an embedding it is tied to)."""
    stack, seen = list(match.weight.users), set()
    while stack:
        node = stack.pop()
        if node in matched or node in seen:
            continue
        seen.add(node)
        if "transpose" in str(node.target) or "permute" in str(node.target) or str(node.target) in ("aten.t.default", "t"):
            stack.extend(node.users)
        else:
            return True
    return False


def _evaluate(eval_fn: Callable[[nn.Module], float], model: nn.Module, decided: Decided | None) -> float:
    """Return the metric of a copy of the model, dense or pruned."""
    trial = copy.deepcopy(model)
    if decided is not None:
        _write(trial, decided)
    return metric(eval_fn, trial)


def _write(target: nn.Module, decided: Decided) -> list[LayerPlan]:
    chosen, refits = decided
    parameters = dict(target.named_parameters(remove_duplicate=False))
    for name, values in refits.items():
        write_refit(chosen[name].match, values, parameters)
    return [_apply(choice, parameters) for choice in chosen.values()]


@torch.no_grad()
def _apply(choice: Choice, parameters: dict[str, nn.Parameter]) -> LayerPlan:
    match, layer = choice.match, choice.layer
    parameter = parameters[match.parameter]
    mask = match.restore(layer.mask).reshape(parameter.shape)
    parameter.masked_fill_(~mask, 0)
    register(parameter, PrunedWeight(choice.pattern, layer, mask))
    every = len(layer.tiling.columns) == layer.tiling.shape[0]
    return LayerPlan(
        name=match.name,
        parameter=match.parameter,
        kind=match.kind,
        pattern=choice.pattern,
        shape=tuple(parameter.shape),
        target=choice.target,
        sparsity=1.0 - mask.float().mean().item(),
        granularity=layer.tiling.granularity,
        counts=tuple(layer.counts),
        columns=None if every else tuple(layer.tiling.columns.tolist()),
        note=layer.note,
    )


def _gain(matches: Sequence[Match], config: Config) -> Callable[[str, int, int], float] | None:
    """HSR's alpha: microseconds between two kept counts per DR group of one depthwise layer (Sec. 5.2)."""
    if config.recalibration != "deprune":
        return None
    by_name = {m.parameter: m for m in matches}
    measure = Measure(config, KernelTables().unit)

    def gain(parameter: str, kept: int, rounded: int) -> float:
        match = by_name[parameter]
        share = {}
        for count in (kept, rounded):
            total = min(config.group, match.matrix_shape[0]) * match.matrix_shape[1]
            plan = dcp.plan_layers(
                {parameter: match.matrix(match.value.detach()).abs()},
                {parameter: 1.0 - count / total},
                group=config.group,
                recalibration="off",
            )
            share[count] = measure(match, plan[parameter]).sparse
        return abs(share[kept] - share[rounded])

    return gain


def _achieved(layers: list[LayerPlan], asked: float | Mapping[str, float] | None) -> dict[str, float]:
    """Element-weighted sparsity by the keys asked for, and by kind."""
    groups: dict[str, list[LayerPlan]] = {"all": layers}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    for key in asked if isinstance(asked, Mapping) else ():
        named = [layer for layer in layers if hits(key, layer.name, layer.parameter)]
        if named:
            groups[key] = named
    return {key: _weighted(members) for key, members in groups.items()}


def _weighted(layers: list[LayerPlan]) -> float:
    sizes = [math.prod(layer.shape) for layer in layers]
    return sum(s * layer.sparsity for s, layer in zip(sizes, layers, strict=True)) / max(sum(sizes), 1)


def _table(layers: list[LayerPlan], refits: dict[str, Refit], search: Search | None) -> Table:
    head: tuple[str, ...] = ("layer", "kind", "pattern", "shape", "target", "sparsity", "kept per tile", "note")
    if refits:
        head += ("output error", "refitted")
    rows = []
    for layer in layers:
        kept = f"{min(layer.counts)}..{max(layer.counts)}" if layer.counts else "-"
        shape = "x".join(map(str, layer.shape))
        numbers = (f"{layer.target:.1%}", f"{layer.sparsity:.1%}")
        row: tuple[str, ...] = (layer.name, layer.kind, layer.pattern, shape, *numbers, kept, layer.note)
        if refits:
            values = refits.get(layer.parameter)
            row += (f"{values.before:.2%}", f"{values.after:.2%}") if values else ("-", "not recorded")
        rows.append(row)
    return Table("pruned layers", head, rows, search.summary() if search else {})
