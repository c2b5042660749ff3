"""``fxprune.sensitivity``: what pruning one layer, and nothing else, does to the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.calibration import Calibration, LossFn, progress
from fxprune.config import Config
from fxprune.errors import CalibrationError, ConfigError
from fxprune.importance import calibrate, element_scores
from fxprune.match import Match
from fxprune.planner import hits, targets
from fxprune.prunable import contexts_of, prunable
from fxprune.prune import masks
from fxprune.report import Table
from fxprune.search import metric
from fxprune.write import Decided


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    eval_fn: Callable[[nn.Module], float] | None = None,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75, 0.875),
    groups: Mapping[str, Sequence[str]] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    **options: Any,
) -> Table:
    """Prune one layer or group at a time, everything else dense, and return a row for each, the most sensitive first.

    A cell is, at each of ``sparsities``: ``eval_fn(model)``, higher is better; without it the relative error of the
    model's outputs on ``calibration``, ``||y' - y|| / ||y||``; without both the share of importance that is lost.
    The column "sensitivity" is the mean of the drop, error or loss. The model is not changed.

    groups: layers pruned together, by name: names or globs of layers; the other layers are each on their own. Layers
        that share a weight are one layer.
    calibration, loss_fn, filter_fn, options: as for :func:`fxprune.prune`; ``sparsity`` is not among them.
    Raises what :func:`fxprune.prune` raises.
    """
    if "sparsity" in options:
        raise ConfigError(name="sparsity", given=options["sparsity"], expected="sparsities=(...), each tried alone")
    if isinstance(sparsities, (int, float, str)) or not sparsities or not all(0 < s < 1 for s in sparsities):
        raise ConfigError(name="sparsities", given=sparsities, expected="fractions of zeros, each between 0 and 1")
    if eval_fn is not None and not callable(eval_fn):
        raise ConfigError(name="eval_fn", given=eval_fn, expected="a callable (model) -> float, higher is better")
    config = Config.from_options({"sparsity": float(sparsities[0]), **options})
    data = Calibration.of(calibration, loss_fn)
    contexts = contexts_of(model, example_inputs, config)
    matches = prunable(model, contexts, filter_fn)
    asked = targets(matches, config)
    matches = [m for m in matches if m.parameter in asked]
    config = calibrate(config, model, matches, data)
    network = copy.deepcopy(model)
    what, dense, measure = _measure(network, eval_fn, data, config)
    rows = []
    for name, members in progress(_units(matches, groups or {}).items(), "sensitivity"):
        values = []
        for sparsity in sparsities:
            chosen = masks(contexts, members, replace(config, sparsity=float(sparsity), ignored_layers=()))
            with pruned(network, chosen):
                values.append(measure(chosen))
        drop = sum(dense - value if eval_fn is not None else value for value in values) / len(values)
        kinds = "+".join(sorted({m.kind for m in members}))
        rows.append((name, kinds, sum(m.value.numel() for m in members), *map(_short, values), drop))
    rows = [(*row[:-1], _short(row[-1])) for row in sorted(rows, key=lambda row: -row[-1])]
    head = ("layer", "kind", "weights", *[f"{s:g}" for s in sparsities], "sensitivity")
    summary: dict[str, Any] = {"measured": what}
    if eval_fn is not None:
        summary["dense"] = _short(dense)
    return Table("sensitivity of layers pruned alone, by sparsity", head, rows, summary)


@contextmanager
def pruned(network: nn.Module, chosen: Decided) -> Iterator[None]:
    """Zero weights inside the block only."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    kept = [(name, c.match.restore(c.layer.mask)) for name, c in chosen.choices.items()]
    kept += [(name, cut.mask) for name, cut in chosen.channels.cuts.items()]
    before = {name: parameters[name].detach().clone() for name, _ in kept}
    try:
        with torch.no_grad():
            for name, mask in kept:
                parameters[name].masked_fill_(~mask.reshape(parameters[name].shape), 0)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def _units(matches: Sequence[Match], groups: Mapping[str, Sequence[str]]) -> dict[str, list[Match]]:
    """Return what is pruned together, by the name of its row."""
    layers: dict[str, Match] = {}
    for match in matches:
        layers.setdefault(match.parameter, match)
    units: dict[str, list[Match]] = {}
    taken: dict[str, str] = {}
    for group, keys in groups.items():
        for key in [keys] if isinstance(keys, str) else keys:
            found = [m for m in layers.values() if hits(key, m.name, m.parameter)]
            if not found:
                names = ", ".join(m.name for m in layers.values())
                raise ConfigError(name=f"groups[{group!r}]", given=key, expected=f"layers among {names}")
            for match in found:
                if taken.setdefault(match.parameter, group) != group:
                    raise ConfigError(name="groups", given=match.name, expected="layers that are in one group only")
                if match not in units.setdefault(group, []):
                    units[group].append(match)
    every = [m.name for m in layers.values()]
    for match in layers.values():
        if match.parameter not in taken:
            units[match.name if every.count(match.name) == 1 else match.parameter] = [match]
    return units


def _measure(
    network: nn.Module, eval_fn: Callable[[nn.Module], float] | None, data: Calibration | None, config: Config
) -> tuple[str, float, Callable[[Decided], float]]:
    """Return what a cell is, its value for the dense model, and how to measure it for what is pruned just now."""
    if eval_fn is not None:
        return "eval_fn", metric(eval_fn, network), lambda chosen: metric(eval_fn, network)
    if data is None:
        return "share of importance lost", 0.0, lambda chosen: _lost(chosen, config)
    dense: list[Tensor] = []
    data.run(network, lambda output, targets: dense.extend(_tensors(output)))
    if not dense:
        reason = "the model's outputs hold no floating-point tensor"
        raise CalibrationError(reason=reason, remedy="Pass eval_fn=(model) -> float.")
    scale = sum(t.square().sum().item() for t in dense) or 1.0

    def error(chosen: Decided) -> float:
        found: list[Tensor] = []
        data.run(network, lambda output, targets: found.extend(_tensors(output)))
        return (sum((a - b).square().sum().item() for a, b in zip(found, dense, strict=True)) / scale) ** 0.5

    return "relative error of the model's outputs", 0.0, error


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _lost(chosen: Decided, config: Config) -> float:
    kept, total = 0.0, 0.0
    parts = [(choice.match, choice.layer.mask) for choice in chosen.choices.values()]
    parts += [(cut.match, cut.match.matrix(cut.mask)) for cut in chosen.channels.cuts.values() if cut.match is not None]
    for match, mask in parts:
        scores = match.matrix(element_scores(match, config)).double()
        kept, total = kept + scores[mask].sum().item(), total + scores.sum().item()
    return 1.0 - kept / total if total else 0.0


def _tensors(output: Any) -> list[Tensor]:
    return [t.detach().double() for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
