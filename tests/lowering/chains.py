"""Models whose kernels follow each other, for the tests of regions; integers give the same bits in every order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fxprune.lowering.region import form_regions
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune import pipeline
from fxprune.capture import capture
from fxprune.config import Config
from fxprune.ops import region as ops
from tests.oracle import FORCED, assert_same, copied, integer_model, widened, zero_some


class Inverted(nn.Module):
    """An inverted residual with squeeze-and-excite: 1x1, depthwise, mean, two layers to a gate, 1x1, residual.

    seen: the depthwise result is read once more, after everything else.
    """

    def __init__(
        self, channels: int = 16, gated: bool = True, residual: bool = True, seen: bool = False, widen: int = 2
    ) -> None:
        super().__init__()
        wide = widen * channels
        self.expand, self.bn1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise, self.bn2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.squeeze, self.excite = nn.Conv2d(wide, 64, 1), nn.Conv2d(64, wide, 1)
        self.project, self.bn3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.gated, self.residual, self.seen = gated, residual, seen

    def forward(self, x: Tensor) -> Any:
        y = F.relu6(self.bn1(self.expand(x)))
        middle = y = F.relu6(self.bn2(self.depthwise(y)))
        if self.gated:
            gate = F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))
            y = y * F.relu6(self.excite(gate))
        y = self.bn3(self.project(y))
        y = y + x if self.residual else y
        return (y, torch.cumsum(middle, 1)) if self.seen else y


def sparse(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill with integers and zero what the kernels skip."""
    return zero_some(integer_model(model, seed), seed, share=0.4)


@dataclass(frozen=True)
class Formed:
    """A rewritten graph with its regions, and what it returned beside the captured graph."""

    graph: GraphModule
    count: int
    packs: Sequence[Tensor]

    @property
    def regions(self) -> list[Node]:
        return [n for n in self.graph.graph.nodes if n.target is torch.ops.fxprune.region.default]

    def codes(self, number: int = 0) -> list[int]:
        """The step codes of one region."""
        return [code for code, _ in ops.records(ops.numbers(str(self.regions[number].args[3])))]

    def singles(self) -> int:
        """Kernels that are calls of their own."""
        single = (torch.ops.fxprune.tile_gemm.default, torch.ops.fxprune.depthwise_taps.default)
        return sum(n.target in single for n in self.graph.graph.nodes)


def formed(model: nn.Module, *inputs: Any, grad: bool = False) -> Formed:
    """Rewrite ``model``, form its regions, and compare the result with the captured graph bit for bit."""
    (graph,) = capture(model, inputs)
    with torch.set_grad_enabled(grad):
        clone, context, _ = pipeline.rewrite(graph.gm, graph.inputs, Config(**FORCED))
        count = form_regions(clone, context)
        packs = context.weights.appended()
    clone.recompile()
    clone.graph.lint()
    result = Formed(clone, count, packs)
    assert count == len(result.regions)
    with torch.no_grad():
        expected, exact = graph.gm(*copied(graph.inputs)), graph.gm(*widened(copied(graph.inputs)))
        given = clone(*copied(graph.inputs), *packs)
    assert_same(given, expected, exact, repro=str(model))
    return result
