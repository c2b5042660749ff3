"""Planted faults: each is one wrong line in a pass, a packer, a kernel call or the bookkeeping around them.

A fault patches one name; ``killer`` is an existing test that must then fail. Faults of kernels are emulated at the
call: what the rewritten graph passes to the operator is changed, which is what a wrong kernel would compute.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fxprune.lowering import measure
from fxprune.lowering.kernels import KernelTables
from torch import Tensor, nn

from fxprune import backend, capture, compiled, plan, planner
from fxprune.context import Context
from fxprune.match import Match
from fxprune.sparsity import dcp, tile
from tests.faults import killers as kill


def module(name: str) -> Any:
    """Return a module where the package has a function of the same name."""
    return importlib.import_module(f"fxprune.{name}")


prune, left, allocate, verify, planning = (module(n) for n in ("prune", "left", "allocate", "verify", "passes.plan"))
fold_batchnorm, normalize, match_conv, shrink = (
    module(f"passes.{n}") for n in ("fold_batchnorm", "normalize", "match_conv", "shrink")
)
fuse_epilogue, fuse_gate = (module(f"passes.fuse_{n}") for n in ("epilogue", "gate"))
layouts = module("passes.regions")
forming = module("lowering.region")
rewrite_conv, rewrite_depthwise, rewrite_gemm = (module(f"passes.rewrite_{n}") for n in ("conv", "depthwise", "gemm"))


@dataclass(frozen=True)
class Fault:
    """owner.name becomes ``change(original)`` while ``killer`` runs."""

    name: str
    owner: Any
    attribute: str
    change: Callable[[Any], Any]
    killer: Callable[[], None]


def packed(edit: Callable[[dict[str, Tensor]], None]) -> Callable[[Any], Any]:
    """Change the packed tensors."""

    def change(real: Any) -> Any:
        def pack(self: Any, *args: Any) -> Any:
            result = real(self, *args)
            edit(result.tensors)
            return result

        return pack

    return change


def operand(target: str, position: int, value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Change one operand of the calls that a rewrite emits."""

    def change(real: Any) -> Any:
        def call(anchor: Any, op: Any, *args: Any) -> Any:
            if target in str(op):
                args = (*args[:position], value(args[position]), *args[position + 1 :])
            return real(anchor, op, *args)

        return call

    return change


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda real: lambda *args, **kwargs: value


def shift(name: str, by: int = 1) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensors[name].roll(by))


def drop_tail(tensors: dict[str, Tensor]) -> None:
    tensors["values"][-len(tensors["values"]) // 4 :] = 0


def first_user(node: Any) -> Any:
    return next(iter(node.users), None)


def wider_eps(real: Any) -> Any:
    return lambda node, name: real(node, name) + 1.0 if name == "eps" else real(node, name)


def keep_smallest(real: Any) -> Any:
    return lambda scores, counts: real([-s for s in scores], counts)


def last_ties(real: Any) -> Any:
    return lambda scores, counts: [s.flip(0) for s in real([s.flip(0) for s in scores], counts)]


def weaker(real: Any) -> Any:
    return lambda matches, config: {k: v * 0.95 for k, v in real(matches, config).items()}


def inferred(real: Any) -> Any:
    def mask(match: Match, ctx: Context, wanted: Any) -> Any:
        training, ctx.inference = ctx.inference, True
        try:
            return real(match, ctx, wanted)
        finally:
            ctx.inference = training

    return mask


def only_weights(real: Any) -> Any:
    def project(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (pruned := plan.lookup(parameter)) is not None:
                    parameter.data.masked_fill_(~pruned.mask, 0)

    return project


def unmasked(real: Any) -> Any:
    return lambda parameter: None if torch.is_grad_enabled() else real(parameter)


def no_steps(real: Any) -> Any:
    return lambda self: real(self)[1:]


def evaluating(real: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def left(model: nn.Module) -> Any:
        yield model.eval()

    return left


def any_permute(real: Any) -> Any:
    return lambda node, order: "permute" in str(node.target)


def always_chosen(real: Any) -> Any:
    return lambda match, mask, chosen, timing, name, why="": real(match, mask, True, timing, name, why)


def alone(real: Any) -> Any:
    return lambda convs: [[match] for match in convs]


def doubled(real: Any) -> Any:
    def pack(self: Any, weight: Tensor, *rest: Any) -> Any:
        return real(self, weight * 2, *rest)

    return pack


def room_reused(real: Any) -> Any:
    """Whatever reads an input of a region finds the latest result of its shape."""

    def add(self: Any, node: Any) -> None:
        real(self, node)
        for value in self.inputs:
            if value.meta["example_value"].shape == node.meta["example_value"].shape:
                self._values[value] = self._values[node]

    return add


def next_residual(real: Any) -> Any:
    def add(self: Any, node: Any) -> None:
        real(self, node)
        if "tile_gemm" in str(node.target) and node.args[6] is not None:
            self.code[-6] += 1

    return add


def element_lost(real: Any) -> Any:
    """The last kept weight of a matrix in single elements is not packed."""

    def pack(self: Any, weight: Tensor, mask: Tensor, tiling: Any) -> Any:
        result = real(self, weight, mask, tiling)
        if tiling.granularity == 1:
            result.tensors["values"].view(-1)[-1] = 0
        return result

    return pack


FAULTS: tuple[Fault, ...] = (
    Fault("wrong tile order", tile.Tile, "pack", packed(shift("values")), kill.linear),
    Fault("tail dropped", tile.Tile, "pack", packed(drop_tail), kill.linear),
    Fault("row index off by one", tile.Tile, "pack", packed(shift("index")), kill.linear),
    Fault("kept features shifted", tile.Tile, "pack", packed(shift("columns")), kill.linear),
    Fault("scale applied twice", tile.Tile, "pack", doubled, kill.linear),
    Fault("mask inverted", dcp, "tap_words", lambda real: lambda kept: real(~kept), kill.mobile),
    Fault("tap bits off by one", dcp, "tap_words", lambda real: lambda kept: real(kept.roll(1, 1)), kill.mobile),
    Fault("bias never, GEMM", rewrite_gemm, "call", operand("tile_gemm", 5, lambda bias: None), kill.linear),
    Fault("bias never, depthwise", rewrite_depthwise, "call", operand("depthwise_taps", 3, lambda bias: None), kill.mobile),
    Fault("stride ignored", rewrite_depthwise, "call", operand("depthwise_taps", 5, lambda s: [1, 1]), kill.windows),
    Fault("dilation ignored", rewrite_depthwise, "call", operand("depthwise_taps", 7, lambda d: [1, 1]), kill.windows),
    Fault("padding ignored", rewrite_depthwise, "call", operand("depthwise_taps", 6, lambda p: [0, 0]), kill.mobile),
    Fault(
        "padding of a convolution off by one",
        rewrite_conv,
        "call",
        operand("tile_conv", 11, lambda p: [p[0], p[1] + 1]),
        kill.conv_windows,
    ),
    Fault("an element lost", tile.Tile, "pack", element_lost, kill.scattered),
    Fault("a live channel cut", shrink, "_rounded", lambda real: lambda alive: real(alive.roll(1)), kill.channels),
    Fault("budget ignored", allocate, "_after", lambda real: lambda best, level: best + level.value, kill.knapsack),
    Fault("stride of a 1x1 ignored", rewrite_gemm, "_strided", lambda real: lambda match: match.x, kill.pointwise),
    Fault("wrong feature dimension", rewrite_gemm, "call", operand("tile_gemm", 10, lambda dim: -dim), kill.linear),
    Fault("batchnorm folded with another eps", fold_batchnorm, "argument", wider_eps, kill.mobile),
    Fault(
        "wrong activation fused", fuse_epilogue, "activation_name", lambda real: lambda n: real(n) and "relu", kill.mobile
    ),
    Fault("extra user ignored by the epilogue", fuse_epilogue, "sole_user", lambda real: first_user, kill.epilogue_twins),
    Fault("mutation ignored by the epilogue", fuse_epilogue, "mutation_between", constant(False), kill.epilogue_twins),
    Fault("broadcast residual taken", fuse_epilogue, "same_shape", constant(True), kill.epilogue_twins),
    Fault("extra user ignored by BatchNorm folding", fold_batchnorm, "sole_user", lambda real: first_user, kill.fold_twins),
    Fault("any factor is a gate", fuse_gate, "_per_channel", constant(True), kill.gate_twins),
    Fault("permute cancelled when not inverse", layouts, "_is_permute", any_permute, kill.transpose_twins),
    Fault("visible mutation made functional", normalize, "_private", constant(True), kill.normalize_twins),
    Fault(
        "groups misread",
        match_conv,
        "argument",
        lambda real: lambda n, k: 1 if k == "groups" else real(n, k),
        kill.depthwise,
    ),
    Fault("stale pack after an update", compiled.Variant, "_now", constant([]), kill.updated),
    Fault("other weights served from the pack", compiled.Variant, "fits", constant(True), kill.two_models),
    Fault("variants outlive their weights", compiled.Variant, "until", constant(None), kill.outlived),
    Fault("a new support is packed away", rewrite_gemm, "keeps", constant(None), kill.grown),
    Fault("optimizer steps not counted", compiled.Variant, "_now", no_steps, kill.fused),
    Fault("names forgotten by a rebuild", backend, "remember_names", constant(None), kill.renamed),
    Fault("cast to other dtypes ignored", KernelTables, "supports", constant(None), kill.other_dtypes),
    Fault("mask missing in training", planning, "lookup", unmasked, kill.gradients),
    Fault("found zeros become a mask in training", planning, "_mask", inferred, kill.found_zeros),
    Fault("moments of pruned weights kept", plan, "project_zeros", only_weights, kill.held),
    Fault("weights not held", plan, "project_zeros", constant(None), kill.held),
    Fault("smallest kept", dcp, "keep_largest", keep_smallest, kill.importance),
    Fault("ties to the higher index", dcp, "keep_largest", last_ties, kill.ties),
    Fault("target rounded down", planner, "targets", weaker, kill.achieved),
    Fault("ignored layers pruned", planner, "_hits", constant(False), kill.ignored),
    Fault("tied weight pruned", left, "_other_reader", constant(None), kill.tied),
    Fault("the user's model pruned", prune.copy, "deepcopy", lambda real: lambda model: model, kill.copied),
    Fault("training flags lost", capture, "evaluating", evaluating, kill.flags),
    Fault("index unchecked", tile.Tile, "check", constant(None), kill.corrupted),
    Fault("a loser runs sparse", planning, "_decision", always_chosen, kill.losers),
    Fault("regions split", planning, "regions", alone, kill.regions),
    Fault("time keyed without the shape", measure.Measure, "_key", constant("k"), kill.shapes_timed),
    Fault("broken cache trusted", measure, "_is_timing", constant(True), kill.broken_cache),
    Fault("room of a live value reused", forming._Program, "add", room_reused, kill.lived),
    Fault("residual number off by one", forming._Program, "add", next_residual, kill.lived),
    Fault("mutation ignored by a region", forming, "mutates", constant(False), kill.written),
    Fault("verify blind", verify, "_error", constant(0.0), kill.verified),
)
