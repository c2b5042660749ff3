"""``fxprune.prune``: write zeros into ordinary dense weights, in patterns that the compiler runs fast."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fxprune.backend import groups_of, hwprune
from fxprune.calibration import Calibration, LossFn
from fxprune.capture import ISOLATED, NO_LIMITS, arguments, evaluating
from fxprune.channel_plan import Channels, choose_channels
from fxprune.compensate import refit_layers
from fxprune.config import Config
from fxprune.context import Context
from fxprune.errors import ConfigError, MissingCalibration, NothingToPrune
from fxprune.importance import calibrate
from fxprune.lowering.codegen import stock
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.measure import Measure
from fxprune.match import Match
from fxprune.plan import Plan, register
from fxprune.planner import choose_masks, keeps_all
from fxprune.prunable import contexts_of, prunable
from fxprune.prune_report import achieved, table
from fxprune.report import Table
from fxprune.search import Search, check_search, largest_scale, metric, scaled
from fxprune.sparsity import dcp, get
from fxprune.staircase import choose_levels
from fxprune.target import Speed, search
from fxprune.write import Decided, Wish, wishes, write

# the options that matter to a compile of a model that is pruned already
_COMPILE = ("min_speedup", "autotune", "cache_dir", "freeze", "fallback", "mode", "inductor", "tensorrt")


@dataclass(frozen=True)
class PruneResult:
    """model: a plain module with zeros. plan: pattern, tiles and counts. sparsity: achieved, by the keys asked for.

    search: with ``max_drop``, the share of the sparsity, the metric and the evaluations. speed: with a target, what was
    predicted and measured. Printed, it is its report.
    """

    model: nn.Module = field(repr=False)
    plan: Plan = field(repr=False)
    sparsity: dict[str, float]
    report: Table = field(repr=False)
    search: Search | None = None
    speed: Speed | None = None

    def __str__(self) -> str:
        return str(self.report)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Attach the masks to the model of a copy, or of a result that was saved and loaded."""
        self.__dict__.update(state)
        parameters = dict(self.model.named_parameters())
        for name, pruned in self.plan.weights.items():
            if name in parameters:
                register(parameters[name], pruned)


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    target_speedup: float | None = None,
    target_latency_ms: float | None = None,
    inplace: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    compensate: bool | str = False,
    eval_fn: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    **options: Any,
) -> PruneResult:
    """Prune ``model`` and return a copy (the model itself with ``inplace=True``). Give one of the first three:

    sparsity: fraction of zeros; a float, or a dict by kind ("depthwise", "pointwise", "conv", "linear", "rnn") or layer
        glob. With an n:m pattern it is 1 - n/m or left out (n of n leaves weights dense); with "channel", the
        fraction of filters that go.
    target_speedup: of the whole model over stock ``torch.compile`` with the same options, on this machine at these inputs.
    target_latency_ms: of the whole model. For either the masks that retain most importance are searched, compiled,
        measured and corrected; ``result.speed`` says what came out, and :class:`~fxprune.errors.TargetNotReached` warns.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; the model is run on
        them once, in evaluation mode, to find its layers.
    filter_fn: ``(module, fqn) -> bool``; layers it refuses stay as they are.
    calibration: batches, each what the model takes (tensor, tuple or dict), or with ``loss_fn`` (inputs, targets); for
        ``importance="taylor"`` and ``"wanda"`` and for ``compensate``. An iterator is read into memory.
    loss_fn: ``(output, targets) -> scalar``; without it "taylor" needs a model whose output has ``.loss``.
    compensate: refit the remaining weights by least squares to the dense outputs on ``calibration``; with
        "sequential" each layer after those that run before it (two passes over the data per layer).
    eval_fn, max_drop: find by bisection the largest share of ``sparsity`` at which ``eval_fn(model) -> float``, higher
        is better, is at most ``max_drop`` below that of the dense model; ``result.search`` says how.
    options: fields of :class:`fxprune.Config`.

    Where recurrent layers are pruned, ``torch._dynamo.config.allow_rnn`` is switched on for this process: Dynamo calls
    ``nn.LSTM`` and ``nn.GRU`` outside of its graphs by default, where no backend sees them.

    Raises an error of :mod:`fxprune.errors` and changes nothing when the request makes no sense.
    Sources: DEPrune (NeurIPS 2024) Sec. 4-5 for ``dcp`` and ``channel``, tile-wise sparsity (SC'20) for ``tile``.
    """
    goal = {"sparsity": sparsity, "target_speedup": target_speedup, "target_latency_ms": target_latency_ms}
    config = Config.from_options({**goal, **options})
    data = Calibration.of(calibration, loss_fn)
    _check(config, data, compensate, eval_fn, max_drop)
    contexts = contexts_of(model, example_inputs, config)
    matches = prunable(model, contexts, filter_fn)
    config = calibrate(config, model, matches, data)
    unit = KernelTables().units(matches)

    def refitted(decided: Decided) -> Decided:
        if not compensate or data is None:
            return decided
        return dataclasses.replace(decided, refits=refit_layers(model, decided.choices, data, compensate == "sequential"))

    def decide(scale: float = 1.0) -> Decided:
        return refitted(masks(contexts, matches, scaled(config, scale)))

    def evaluate(decided: Decided | None) -> float:
        trial = copy.deepcopy(model)
        if decided is not None:
            write(trial, decided, unit, model)
        assert eval_fn is not None
        return metric(eval_fn, trial)

    found, speed = None, None
    if config.has_target:
        speed = _meet(model, example_inputs, matches, config)
        decided = refitted(Decided(choose_levels(matches, config, unit, speed.levels)))
    elif max_drop is not None:
        decided, found = largest_scale(decide, evaluate, max_drop)
    else:
        decided = decide()
    target = model if inplace else copy.deepcopy(model)
    layers = write(target, decided, unit, model)
    if any(layer.kind == "rnn" for layer in layers):
        torch._dynamo.config.allow_rnn = True  # else Dynamo leaves the layers out of the graphs it hands to a backend
    report = table(layers, decided, contexts, found, speed)
    return PruneResult(target, Plan.of(target, layers), achieved(layers, sparsity), report, found, speed)


def _check(config: Config, data: Calibration | None, compensate: Any, eval_fn: Any, max_drop: Any) -> None:
    """Raise for arguments that do not go together."""
    patterns = [*config.pattern.values()] if isinstance(config.pattern, Mapping) else [config.pattern]
    fixed = any(name != "auto" and get(name).fixed is not None for name in patterns)
    if config.sparsity is None and not config.has_target and not fixed:
        expected = "a fraction of zeros, or target_speedup= or target_latency_ms= in its place"
        raise ConfigError(name="sparsity", given=None, expected=expected)
    if config.has_target and "channel" in patterns:
        expected = "a pattern that decides layer by layer beside a target; channels are coupled"
        raise ConfigError(name="pattern", given=config.pattern, expected=expected)
    if config.has_target and max_drop is not None:
        raise ConfigError(name="max_drop", given=max_drop, expected="sparsity= beside it, which it scales, and no target")
    if compensate not in (False, True, "sequential"):
        raise ConfigError(name="compensate", given=compensate, expected='True, False or "sequential"')
    if compensate and data is None:
        raise MissingCalibration(option=f"compensate={compensate!r}")
    check_search(eval_fn, max_drop)


def masks(contexts: Sequence[Context], matches: Sequence[Match], config: Config) -> Decided:
    """Choose what ``config.sparsity`` takes from every layer, in the order of ``matches``."""
    unit = KernelTables().units(matches)
    chosen = choose_masks(matches, config, unit, _gain(matches, config))
    channels = choose_channels(contexts, matches, config, unit)
    if not chosen and not channels.cuts and not keeps_all(config):
        raise _nothing(config, matches, channels)
    return Decided({m.parameter: chosen[m.parameter] for m in matches if m.parameter in chosen}, channels)


def wished(decided: Decided) -> list[Wish]:
    """Return what a decision takes from each parameter, in tiles of the kernels that run them."""
    return list(wishes(decided, KernelTables().unit))


def _nothing(config: Config, matches: Sequence[Match], channels: Channels) -> NothingToPrune:
    if channels.skipped:
        why = "; ".join(f"{names}: {reason}" for names, reason in list(channels.skipped.items())[:3])
        return NothingToPrune(
            reason=f"no channel of {len(channels.skipped)} group(s) may go ({why})",
            remedy='Use pattern="tile", which keeps the channels.',
        )
    return NothingToPrune(
        reason=f"sparsity={config.sparsity!r} asks nothing of the {len(matches)} prunable layer(s) found",
        remedy="Run fxprune.explain(model, example_inputs) for the layers and their kinds.",
    )


def _meet(model: nn.Module, example_inputs: Any, matches: list[Match], config: Config) -> Speed:
    """Find levels for a speed; every plan is compiled and measured on a copy of ``model``."""
    args, kwargs = arguments(example_inputs)
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in _COMPILE}
    unit = KernelTables().units(matches)

    def compiled(module: nn.Module, backend: Callable[..., Any]) -> Callable[[], Any]:
        run = partial(torch.compile(module, backend=backend, **ISOLATED), *args, **kwargs)
        with torch._dynamo.config.patch(NO_LIMITS):
            run()
        return run

    def build(levels: Mapping[str, float]) -> Callable[[], Any]:
        module = copy.deepcopy(model)
        write(module, Decided(choose_levels(matches, config, unit, levels)), unit, model)
        return compiled(module, partial(hwprune, options=plain))

    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        start = time.perf_counter()
        groups = groups_of(matches, config)
        seconds = time.perf_counter() - start
        return search(groups, config, compiled(model, partial(stock, config=config)), build, seconds=seconds)


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
