"""Put a plan on another model: ``apply_plan``; put its masks into the tiles of another device: ``recalibrate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fxprune.config import Config
from fxprune.context import Unit
from fxprune.devices import DEVICES
from fxprune.errors import ConfigError, PlanMismatch, nearest
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.kernels.cuda import UNITS
from fxprune.plan import LayerPlan, Plan, PrunedWeight, register, tiles
from fxprune.sparsity import get, refit
from fxprune.sparsity.pattern import Ask, LayerMask
from fxprune.sparsity.recalibrate import aligned
from fxprune.sparsity.tile_plan import divisor


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Zero in ``model`` what ``plan`` pruned, attach its masks, and return the model, which is changed in place.

    The remaining weights are the model's own: load a ``state_dict`` before or after. Raises
    :class:`~fxprune.errors.PlanMismatch` and changes nothing when a parameter is missing or has another shape.
    """
    parameters = _fitting(model, plan)
    with torch.no_grad():
        for name, pruned in plan.weights.items():
            mask = pruned.mask.to(parameters[name].device)
            parameters[name].masked_fill_(~mask, 0)
            register(parameters[name], replace(pruned, mask=mask))
    if any(layer.kind == "rnn" for layer in plan):
        torch._dynamo.config.allow_rnn = True  # as in prune: else Dynamo leaves these layers out of its graphs
    return model


def recalibrate(plan: Plan, device: str, dense: nn.Module | None = None) -> Plan:
    """Return ``plan`` in the tiles that the kernels of ``device`` run without waste; layers that have them stay as they are.

    device: a row of :data:`fxprune.devices.DEVICES`, "sm_90a" (Hopper), "sm_80" (any other GPU), or "cuda" (the GPU at hand;
    without one sm_90a, whose plans have no waste on the others). Without ``dense`` no kept weight is lost: tiles of it
    cover what is kept, so sparsity may fall and the pruned model computes what it did. dense: the model before pruning;
    its weights are ranked anew (by magnitude, with the layer's own pattern) at the sparsity the plan has, also where only
    the numbers of kept rows are no multiples of the device's.

    Only the patterns "dcp" and "tile" have tiles of a device. Raises :class:`~fxprune.errors.ConfigError` for an unknown
    device and :class:`~fxprune.errors.PlanMismatch`.
    """
    unit = _unit(device)
    parameters = {} if dense is None else _fitting(dense, plan)
    weights, layers = dict(plan.weights), []
    for layer in plan.layers:
        pruned = weights.get(layer.parameter)
        if pruned is None:
            raise PlanMismatch(count=1, total=len(plan.layers), what=f"{layer.parameter!r} has no mask in this plan")
        row = unit(layer.kind)
        width = _width(layer.kind, pruned.layer.tiling.granularity, row.granularity)
        if layer.pattern not in ("dcp", "tile") or _fits(pruned.layer, width, row, dense is not None):
            layers.append(layer)
            continue
        if dense is None:
            mask = refit(pruned.layer.mask, width, layer.kind == "depthwise", layer.columns is not None)
        else:
            mask = _ranked(layer, pruned, parameters[layer.parameter].detach(), width, unit)
        shaped = (mask.mask.t() if pruned.transposed else mask.mask).reshape(pruned.mask.shape)
        weights[layer.parameter] = replace(pruned, layer=mask, mask=shaped)
        layers.append(_described(layer, mask))
    return Plan(layers, weights=weights)


def _unit(device: str) -> Callable[[str], Unit]:
    """Return what the kernels of a device like, by kind of layer."""
    known = (*DEVICES, "cuda", *UNITS)
    if device not in known:
        expected = f"one of {', '.join(known)}; did you mean {nearest(str(device), known)!r}?"
        raise ConfigError(name="device", given=device, expected=expected)
    return partial(KernelTables().unit, device="cpu" if device in DEVICES else device)


def _fits(layer: LayerMask, width: int, row: Unit, ranked: bool) -> bool:
    """True when a layer has a device's tiles and, where it could be ranked anew, its multiples of kept rows."""
    k = layer.tiling.shape[1]
    return layer.tiling.granularity == width and not (
        ranked and any(count and not aligned(count, k, row.row_step(k)) for count in layer.counts)
    )


def _width(kind: str, given: int, wanted: int) -> int:
    """Return the tile for a device; of a convolution one that divides the given one, which lies inside a group."""
    if kind != "conv":
        return wanted
    return divisor(given, wanted)


def _ranked(layer: LayerPlan, pruned: PrunedWeight, weight: Tensor, width: int, unit: Callable[[str], Unit]) -> LayerMask:
    matrix = weight.t() if pruned.transposed else weight.reshape(pruned.layer.tiling.shape)
    config = Config(granularity=width, group=width, columns=layer.columns is not None)
    name, scores = layer.parameter, matrix.float().abs().cpu().contiguous()
    ask = Ask({name: scores}, {name: layer.sparsity}, {name: layer.kind}, config, unit)
    return get(layer.pattern).choose(ask)[name]


def _described(layer: LayerPlan, mask: LayerMask) -> LayerPlan:
    return replace(
        layer,
        sparsity=1.0 - mask.share,
        **tiles(mask),
        note=f"recalibrated from tiles of {layer.granularity}",
    )


def _fitting(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by name when every one of a plan is among them, in its shape."""
    if not isinstance(model, nn.Module):
        raise ConfigError(name="model", given=type(model).__name__, expected="a torch.nn.Module")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = []
    for name, pruned in plan.weights.items():
        if name not in parameters:
            wrong.append(f"{name!r} is missing, did you mean {nearest(name, parameters)!r}?")
        elif parameters[name].shape != pruned.mask.shape:
            wrong.append(f"{name!r} is {tuple(parameters[name].shape)}, in the plan {tuple(pruned.mask.shape)}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PlanMismatch(count=len(wrong), total=len(plan.weights), what="; ".join(wrong[:3]) + more)
    return parameters
