"""A compiled graph and the weights it was packed from: checks them on every call, repacks or rebuilds.

Dynamo guards neither the values nor the identity of a weight: two modules of one class share a graph, and a loaded
state may bring new Parameters. So a graph keeps one :class:`Variant` per set of weights it is called with,
or two where other layers run sparse at small batch sizes than at large ones; Dynamo compiles neither of them again.
Dynamo keeps a graph as long as the code of the model's class, so a variant goes when a weight it was built for does.
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
    """One build and the weights among its arguments that it depends on; it keeps none of them alive."""

    def __init__(self, built: Built, args: Sequence[Any], freeze: bool) -> None:
        self.run, self.packs, self.context, self.side = built.run, built.packs, built.context, built.side
        self._holds = built.holds
        if self.context is None:
            uses = {id(v) for v in args if isinstance(v, torch.nn.Parameter)}
            self._masked = False
        else:
            uses = self.context.uses()
            self._masked = not self.context.inference
        # nothing is recorded in inference, so the operators' autograd layer would be pure overhead
        self.inference = self.context is not None and self.context.inference
        self._bound = _picked([i for i, value in enumerate(args) if id(value) in uses])
        self._ids = tuple(map(id, self._bound(args)))
        self._plans = generation()
        self._stale = False
        watched = [] if freeze or self.context is None else self.context.weights.watched()
        places = {id(value): i for i, value in enumerate(args)}
        self._constants = [t for t in watched if id(t) not in places]  # of the graph itself
        self._watched = _picked([places[id(t)] for t in watched if id(t) in places])
        now = self._of(args)
        self._sources = [weakref.ref(tensor) for tensor in now]
        versioned = [i for i, t in enumerate(now) if not t.is_inference()]
        self._versioned = None if len(versioned) == len(now) else _picked(versioned)
        self._statistics = _probes(now)
        self._stamp = self._now(now)
        self._deaths: list[Any] = []

    def until(self, dropped: Callable[[Variant], None], args: Sequence[Any]) -> None:
        """Call ``dropped`` as soon as one of the weights is gone: an id may then be another tensor's."""
        mine = weakref.ref(self)

        def gone(_: object) -> None:
            if (variant := mine()) is not None:
                dropped(variant)

        self._deaths = [weakref.ref(tensor, gone) for tensor in self._bound(args)]

    def close(self) -> None:
        """Free what was packed; nobody calls it again."""
        self.packs, self.run = (), _closed
        if self.context is not None:
            self.context.weights.clear()

    def fits(self, args: Sequence[Any]) -> bool:
        """True when ``args`` hold the very weights, and a batch size, this was built for."""
        if self._holds is not None and not self._holds():
            return False
        return (self.side is None or self.side.holds(args)) and self.holds_weights(args)

    def holds_weights(self, args: Sequence[Any]) -> bool:
        return tuple(map(id, self._bound(args))) == self._ids

    def crosses(self, other: Variant) -> bool:
        """True when two variants split the batch sizes at different thresholds."""
        if self.side is None or other.side is None:
            return False
        return self.side.threshold != other.side.threshold

    def current(self, args: Sequence[Any]) -> bool:
        """True when the packed weights are what the weights in ``args`` are now, after repacking if that is enough."""
        if generation() != self._plans:
            if self._masked or (self.context is None and self._planned(args)):
                return False
            self._plans = generation()
        if self._stale:
            return False
        return not self._sources or self._now(self._of(args)) == self._stamp or self.refresh()

    def _planned(self, args: Sequence[Any]) -> bool:
        """True when a weight of a graph that stayed dense was pruned since."""
        return any(lookup(tensor) is not None for tensor in self._bound(args))

    def refresh(self) -> bool:
        """Repack from the current weights; ``False`` when their support no longer fits the packed structure."""
        if self.context is None:
            return True
        watched = self._alive()
        self._statistics = _probes(watched)
        self._stamp = self._now(watched)
        try:
            self.context.weights.refresh()
        except StructureChanged:
            log.info("a weight changed its support after compile: rebuilding")
            self._stale = True
        return not self._stale

    def depends_on(self, tensors: set[int]) -> bool:
        return any(id(t) in tensors for t in self._alive())

    def _alive(self) -> list[Tensor]:
        return [tensor for source in self._sources if (tensor := source()) is not None]

    def _of(self, args: Sequence[Any]) -> Sequence[Tensor]:
        return (*self._watched(args), *self._constants) if self._constants else self._watched(args)

    def _now(self, watched: Sequence[Tensor]) -> tuple[Any, ...]:
        """What changes when a watched tensor does; read on every call, so in C loops."""
        if not watched:
            return ()
        values = [array.item(i) for array, i in self._statistics]
        versioned = watched if self._versioned is None else self._versioned(watched)
        return (_STEPS[0], *map(Tensor.data_ptr, watched), *map(_version, versioned), *values)


def _picked(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return a function that takes the elements at ``positions`` out of a sequence."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda args: tuple(args[i] for i in positions)


def _closed(*_: Any) -> Any:
    raise RuntimeError("this graph was built for weights that are gone")


def _probes(watched: Sequence[Tensor]) -> list[tuple[Any, int]]:
    """Return, per running statistic, its memory and where its largest value is.

    A forward in training mode moves BatchNorm's statistics without a change of version, and tensors made under
    ``inference_mode`` have none: of those one value stands for all.
    """
    vectors = [t for t in watched if t.numel() and (t.is_inference() or _is_statistic(t))]
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    probed = [t.detach() for t in vectors if t.device.type == "cpu" and t.dtype in dtypes]
    return [(_bits(t).numpy(), int(t.abs().argmax())) for t in probed]


def _is_statistic(t: Tensor) -> bool:
    return t.dim() == 1 and not isinstance(t, torch.nn.Parameter)


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
        self._variants: list[Variant] = []
        self._keep(first, args)
        _LIVE.add(self)
        if not _HOOKED:
            _HOOKED.append(register_optimizer_step_post_hook(_count_step))

    @property
    def context(self) -> Context | None:
        """What the latest build decided; ``None`` when it left the graph dense, or when its weights are gone."""
        return self._variants[-1].context if self._variants else None

    def __call__(self, *args: Any) -> Any:
        variant = next((v for v in self._variants if v.fits(args)), None)
        if variant is None:
            if len(self._variants) == _MOST:
                return self._dense(*args)
            variant = self._add(args)
        elif not variant.current(args):
            variant = self._add(args, variant)
        if variant.inference:
            with torch._C._AutoDispatchBelowAutograd():
                return variant.run(*args, *variant.packs)
        return variant.run(*args, *variant.packs)

    def _add(self, args: Sequence[Any], stale: Variant | None = None) -> Variant:
        """Build for ``args``; what was decided by another threshold for the same weights goes with ``stale``."""
        added = self._keep(self._build(args), args)
        others = [v for v in self._variants if v is not stale and v is not added]
        self._variants = [*(v for v in others if not (added.crosses(v) and v.holds_weights(args))), added]
        return added

    def _keep(self, built: Built, args: Sequence[Any]) -> Variant:
        added = Variant(built, args, self._freeze)
        self._variants = [*self._variants, added]
        mine = weakref.ref(self)

        def drop(variant: Variant) -> None:
            if (graph := mine()) is not None:
                graph._variants = [v for v in graph._variants if v is not variant]
            variant.close()

        added.until(drop, args)
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
