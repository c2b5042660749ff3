"""A compiled graph and the weights it was packed from: checks them on every call, repacks or rebuilds.

``_version`` rises with in-place operations, ``load_state_dict`` and most optimizers; a step hook catches the fused ones.
Writing through ``.data`` is invisible to both: :func:`refresh` is for that.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxprune.context import Context
from fxprune.plan import generation
from fxprune.weights import StructureChanged

log = logging.getLogger(__name__)

_LIVE: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
_STEPS = [0]  # optimizer steps taken in this process
_HOOKED: list[Any] = []

Built = tuple[Callable[..., Any], list[Tensor], Context]


class CompiledGraph:
    """Callable with the original graph's arguments.

    A change of a weight's values is repacked in place; a change of its support runs the retained dense graph for
    that call and rebuilds the sparse one.
    """

    def __init__(self, dense: GraphModule, build: Callable[[], Built | None], first: Built, freeze: bool) -> None:
        self._dense = dense
        self._build = build
        self._freeze = freeze
        self._adopt(first)
        _LIVE.add(self)
        if not _HOOKED:
            _HOOKED.append(register_optimizer_step_post_hook(_count_step))

    def _adopt(self, built: Built | None) -> None:
        if built is None:
            self._run, self._packs, self.context = self._dense, [], None
            self._watched: list[Tensor] = []
            self._masked = False
        else:
            self._run, self._packs, self.context = built
            self._watched = [] if self._freeze else self.context.weights.watched()
            self._masked = not self.context.inference
        self._plans = generation()
        self._stamp = self._now()

    def _now(self) -> list[Any]:
        stamp: list[Any] = [_STEPS[0]] if self._watched else []
        for tensor in self._watched:
            stamp.append(tensor.data_ptr())
            stamp.append(-1 if tensor.is_inference() else tensor._version)
        return stamp

    def __call__(self, *args: Any) -> Any:
        if self._masked and generation() != self._plans:
            self.rebuild()
        if self._watched and self._now() != self._stamp and not self.refresh():
            result = self._dense(*args)
            self.rebuild()
            return result
        return self._run(*args, *self._packs)

    def depends_on(self, tensors: set[int]) -> bool:
        return any(id(t) in tensors for t in self._watched)

    def refresh(self) -> bool:
        """Repack from the current weights; ``False`` when their support no longer fits the packed structure."""
        self._stamp = self._now()
        if self.context is None:
            return True
        try:
            self.context.weights.refresh()
        except StructureChanged:
            log.info("a weight changed its support after compile: rebuilding")
            return False
        return True

    def rebuild(self) -> None:
        self._adopt(self._build())


def refresh(model: torch.nn.Module) -> int:
    """Repack every live compiled graph that uses ``model``'s weights; returns how many there were.

    Call it after writing to a weight through ``.data``, which PyTorch does not record.
    """
    mine = {id(t) for t in (*model.parameters(), *model.buffers())}
    graphs = [g for g in _LIVE if g.depends_on(mine)]
    for graph in graphs:
        if not graph.refresh():
            graph.rebuild()
    return len(graphs)


def _count_step(*_: Any) -> None:
    _STEPS[0] += 1
