"""What one compile knows: the config, the tensors, what was matched and what was decided about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from fxprune.config import Config
from fxprune.gradients import GradientLayer, GradientTimes, Ratio
from fxprune.match import Block, Match
from fxprune.sparsity.pattern import LayerMask, share
from fxprune.weights import Weights


class Kernels(Protocol):
    """The kernel tables as the planner sees them."""

    def supports(self, op: str, match: Match) -> str | None:
        """Return ``None`` when some compiled implementation runs ``match``, else the reasons why not."""

    def unit(self, kind: str, dtype: torch.dtype = ..., device: torch.device | str = ...) -> Unit:
        """Return the granularity and steps of the kernel row that runs ``kind``, by default in float32 on the CPU."""

    def units(self, matches: Iterable[Match]) -> Callable[[str], Unit]:
        """Return :meth:`unit` for weights that are pruned together, in their dtype and where they are."""


@dataclass(frozen=True)
class Unit:
    """What a kernel row likes: output features per tile, and multiples of kept K rows and kept features.

    few_rows: K up to which ``few_rows_step`` takes the place of ``k_step``, because another kernel runs such layers.
    narrow: output features per tile of layers with fewer than two tiles of ``granularity``, which would leave them hardly
    a choice; 0 for the same.
    """

    granularity: int
    k_step: int = 1
    column_step: int = 1
    few_rows: int = 0
    few_rows_step: int = 1
    narrow: int = 0

    def width(self, n: int) -> int:
        """Return the output features per tile of a layer with ``n`` of them."""
        return self.narrow if self.narrow and n < 2 * self.granularity else self.granularity

    def row_step(self, k: int) -> int:
        """Return the multiple of kept rows that a layer of ``k`` input features runs without waste."""
        return self.few_rows_step if k <= self.few_rows else self.k_step


# (match, mask), and for a recurrent weight_hh the match and mask of its weight_ih
Measure = Callable[..., "Timing"]
# the symbolic sizes of one call, by sympy symbol: (position among the graph's arguments, value)
Sizes = Mapping[Any, tuple[int, int]]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one match: our kernel, the fastest dense layout, and dense in feature-major layout."""

    sparse: float
    dense: float
    dense_feature_major: float
    measured: bool


@dataclass(frozen=True)
class Decision:
    """One line of the report: what a match became and why."""

    match: Match
    mask: LayerMask | None
    chosen: bool
    reason: str
    timing: Timing | None = None
    pattern: str = ""
    kernel: str = "dense"
    zeros: float = 0.0  # in a weight without a mask, once it is released

    @property
    def sparsity(self) -> float:
        """Fraction of zeros the kernel skips (of the weight itself when there is no mask)."""
        if self.mask is not None:
            return 1.0 - self.mask.share
        value = self.match.value
        if isinstance(value, FakeTensor) or value.is_meta:  # DDP compiles its parts before they meet their weights
            return self.zeros
        return 1.0 - share(value)


@dataclass(frozen=True)
class Refusal:
    """A layer with a weight that no pass matched: its kind and shapes as text, and why it stays dense."""

    name: str
    kind: str
    shape: str
    reason: str


@dataclass(frozen=True)
class Shrunk:
    """Channels cut out of the graph: the layers that produce them, how many there were and how many are left."""

    layers: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True)
class BatchSide:
    """The batch sizes one build of a graph with a symbolic batch is for: ``threshold`` and more, or less.

    position: of the batch size among the graph's arguments. decided_at: the batch size its layers were decided at.
    """

    position: int
    threshold: int
    above: bool
    decided_at: int

    def holds(self, args: Sequence[Any]) -> bool:
        return (args[self.position] >= self.threshold) == self.above

    def __str__(self) -> str:
        return f"batches {'from' if self.above else 'below'} {self.threshold}, decided at {self.decided_at}"


Observer = Callable[[int, str, GraphModule, "Context"], None]  # (number of the pass, its name, graph, context)


@dataclass
class Context:
    """State of one compile; passes read it and add to it. What outlives it holds no weight of the user's."""

    config: Config
    weights: Weights
    inference: bool
    kernels: Kernels
    measure: Measure
    predict: Measure | None = None  # the cost model, which costs no time to ask
    sizes: Sizes = field(default_factory=dict)
    side: BatchSide | None = None
    matches: list[Match] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    shrunk: list[Shrunk] = field(default_factory=list)
    kept: dict[Node, tuple[tuple[int, Tensor], ...]] = field(default_factory=dict)  # cut weight: (axis, indices left)
    float_bias: dict[Node, Node] = field(default_factory=dict)  # bfloat16 bias: the same before it was rounded
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    observers: tuple[Observer, ...] = ()
    gradient_ratio: Ratio | None = None  # of the data gradients, in a graph that trains
    measure_gradient: Callable[..., GradientTimes | None] | None = None
    gradient_key: Node | None = None  # the graph input with the counters of their random numbers
    gradients: list[GradientLayer] = field(default_factory=list)

    def observe(self, number: int, name: str, gm: GraphModule) -> None:
        """Show the graph after a pass to whoever watches; number 0 is the graph as captured."""
        for observer in self.observers:
            observer(number, name, gm, self)

    def bias(self, match: Match) -> Node | None:
        """Return a match's bias as our kernels take it: in x's type on a GPU, elsewhere not rounded, where that is known."""
        bias = match.bias
        return bias if bias is None or match.on_gpu else self.float_bias.get(bias, bias)

    def decision(self, match: Match) -> Decision | None:
        return next((d for d in self.decisions if d.match is match), None)

    def uses(self) -> set[int]:
        """Return the ids of the user's tensors that the rewritten graph was built from."""
        chosen = [self.weights.value(self.weights.origin(d.match.weight)) for d in self.decisions if d.chosen]
        return {id(t) for t in (*chosen, *self.weights.watched()) if t is not None}

    def close(self) -> None:
        """Release the user's weights, and what only the compile needed; what was decided stays to be read."""
        decisions = [replace(d, zeros=d.sparsity) if d.mask is None else d for d in self.decisions]
        shells = {match: match.shell() for match in (*self.matches, *(d.match for d in decisions))}
        self.decisions[:] = [replace(d, match=shells[d.match]) for d in decisions]
        self.matches[:] = [shells[match] for match in self.matches]
        self.blocks[:] = [block.of(shells) for block in self.blocks]
        self.weights.release()
