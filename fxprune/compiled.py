"""A compiled graph and the weights it was packed from: checks them on every call, repacks or rebuilds.

Dynamo guards neither the values nor the identity of a weight: two modules of one class share a graph, and a loaded
state may bring new Parameters. So a graph keeps one :class:`Variant` per set of weights it is called with,
or two where other layers run sparse at small batch sizes than at large ones; Dynamo compiles neither of them again.
``_version`` rises with in-place operations, ``load_state_dict`` and most optimizers; a step hook catches the fused ones.
Writing through ``.data`` is invisible to both: :func:`refresh` is for that.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxprune.context import BatchSide, Context
from fxprune.plan import generation, lookup
from fxprune.weights import StructureChanged

log = logging.getLogger(__name__)

_LIVE: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
_STEPS = [0]  # optimizer steps taken in this process
_HOOKED: list[Any] = []
_version = operator.attrgetter("_version")
_MOST = 64  # variants of one graph: layers of one class that are compiled one by one share it


@dataclass(frozen=True, eq=False)
class Built:
    """run: called with the graph's arguments and ``packs``. context: ``None`` when the graph stayed dense.

    side: the batch sizes it is for, ``None`` for all. holds: asked on every call, whether it may run now, beside what its
    arguments say; ``None`` for always.
    """

    run: Callable[..., Any]
    packs: Sequence[Tensor] = ()
    context: Context | None = None
    side: BatchSide | None = None
    holds: Callable[[], bool] | None = None


Build = Callable[[Sequence[Any]], Built]


class Variant:
    """One build and the weights among its arguments that it depends on."""

    def __init__(self, built: Built, args: Sequence[Any], freeze: bool) -> None:
        self.run, self.packs, self.context, self.side = built.run, built.packs, built.context, built.side
        self._holds = built.holds
        if self.context is None:
            uses = {id(v) for v in args if isinstance(v, torch.nn.Parameter)}
            self._watched: list[Tensor] = []
            self._masked = False
        else:
            uses = self.context.uses()
            self._watched = [] if freeze else self.context.weights.watched()
            self._masked = not self.context.inference
        self._versioned = [t for t in self._watched if not t.is_inference()]
        self._statistics = _probes(self._watched)
        # nothing is recorded in inference, so the operators' autograd layer would be pure overhead
        self.inference = self.context is not None and self.context.inference
        self._bound = [(i, value) for i, value in enumerate(args) if id(value) in uses]
        self._plans = generation()
        self._stale = False
        self._stamp = self._now()

    def fits(self, args: Sequence[Any]) -> bool:
        """True when ``args`` hold the very weights, and a batch size, this was built for."""
        if self._holds is not None and not self._holds():
            return False
        return (self.side is None or self.side.holds(args)) and self.holds_weights(args)

    def holds_weights(self, args: Sequence[Any]) -> bool:
        for i, tensor in self._bound:  # noqa: SIM110  (on every call: a loop is twice as fast as all())
            if args[i] is not tensor:
                return False
        return True

    def crosses(self, other: Variant) -> bool:
        """True when two variants split the batch sizes at different thresholds."""
        if self.side is None or other.side is None:
            return False
        return self.side.threshold != other.side.threshold

    def current(self) -> bool:
        """True when the packed weights are what the weights are now, after repacking if that is enough."""
        if generation() != self._plans:
            if self._masked or (self.context is None and self._planned()):
                return False
            self._plans = generation()
        if self._stale:
            return False
        return not self._watched or self._now() == self._stamp or self.refresh()

    def _planned(self) -> bool:
        """True when a weight of a graph that stayed dense was pruned since."""
        return any(lookup(tensor) is not None for _, tensor in self._bound)

    def refresh(self) -> bool:
        """Repack from the current weights; ``False`` when their support no longer fits the packed structure."""
        self._statistics = _probes(self._watched)
        self._stamp = self._now()
        if self.context is None:
            return True
        try:
            self.context.weights.refresh()
        except StructureChanged:
            log.info("a weight changed its support after compile: rebuilding")
            self._stale = True
        return not self._stale

    def depends_on(self, tensors: set[int]) -> bool:
        return any(id(t) in tensors for t in self._watched)

    def _now(self) -> tuple[Any, ...]:
        """What changes when a watched tensor does; read on every call, so in C loops."""
        if not self._watched:
            return ()
        values = [array.item(i) for array, i in self._statistics]
        return (_STEPS[0], *map(Tensor.data_ptr, self._watched), *map(_version, self._versioned), *values)


def _probes(watched: Sequence[Tensor]) -> list[tuple[Any, int]]:
    """Return, per running statistic, its memory and where its largest value is.

    A forward in training mode moves BatchNorm's statistics without a change of version.
    """
    vectors = [t for t in watched if t.dim() == 1 and t.numel() and not isinstance(t, torch.nn.Parameter)]
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    probed = [t.detach() for t in vectors if t.device.type == "cpu" and t.dtype in dtypes]
    return [(_bits(t).numpy(), int(t.abs().argmax())) for t in probed]


def _bits(t: Tensor) -> Tensor:
    """View bfloat16, which numpy does not know, as integers."""
    return t.view(torch.int16) if t.dtype == torch.bfloat16 else t


class CompiledGraph:
    """Callable with the original graph's arguments.

    A change of a weight's values is repacked in place; a change of its support, other weights or a new plan in training
    compile another variant before the call runs.
    """

    def __init__(self, dense: GraphModule, build: Build, first: Built, args: Sequence[Any], freeze: bool) -> None:
        self._dense = dense
        self._build = build
        self._freeze = freeze
        self._variants = [Variant(first, args, freeze)]
        _LIVE.add(self)
        if not _HOOKED:
            _HOOKED.append(register_optimizer_step_post_hook(_count_step))

    @property
    def context(self) -> Context | None:
        """What the latest build decided; ``None`` when it left the graph dense."""
        return self._variants[-1].context

    def __call__(self, *args: Any) -> Any:
        variant = next((v for v in self._variants if v.fits(args)), None)
        if variant is None:
            if len(self._variants) == _MOST:
                return self._dense(*args)
            variant = self._add(args)
        elif not variant.current():
            variant = self._add(args, variant)
        if variant.inference:
            with torch._C._AutoDispatchBelowAutograd():
                return variant.run(*args, *variant.packs)
        return variant.run(*args, *variant.packs)

    def _add(self, args: Sequence[Any], stale: Variant | None = None) -> Variant:
        """Build for ``args``; what was decided by another threshold for the same weights goes with ``stale``."""
        built = self._build(args)
        added = Variant(built, args, self._freeze)
        kept = [v for v in self._variants if v is not stale and not (added.crosses(v) and v.holds_weights(args))]
        self._variants = [*kept, added]
        return added

    def refresh(self, tensors: set[int]) -> bool:
        """Repack what was built from ``tensors``, by id; returns whether anything was."""
        mine = [v for v in self._variants if v.depends_on(tensors)]
        for variant in mine:
            variant.refresh()
        return bool(mine)


def refresh(model: torch.nn.Module) -> int:
    """Repack every live compiled graph that uses ``model``'s weights; returns how many there were.

    Call it after writing to a weight through ``.data``, which PyTorch does not record.
    """
    mine = {id(t) for t in (*model.parameters(), *model.buffers())}
    return sum(graph.refresh(mine) for graph in list(_LIVE))


def _count_step(*_: Any) -> None:
    _STEPS[0] += 1
