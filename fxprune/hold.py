"""Masks that are held while a model trains: weights and optimizer moments stay zero, whatever optimizer steps.

Weights may be sharded (DTensor of FSDP2 or tensor parallelism): a mask is of the whole weight and each rank zeroes its
part of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxprune.hold_steps import HeldSteps, clear

_WIDTHS = (64, 32, 8)  # of tiles
_WIDE = 32  # output features that share bits from which on those are int32: an AND of one width is faster


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that every rank holds in full."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(full: Tensor, like: Any) -> Tensor:
    """Return this rank's part of a tensor that every rank holds in full, cut as ``like`` is."""
    if not hasattr(like, "device_mesh"):
        return full.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements).to_local()


class Places:
    """The parameters of a model by name, read where the modules hold them now: sharding and moving may replace them."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._owners: dict[str, tuple[dict[str, nn.Parameter | None], str]] = {}  # of the names asked for

    def __getitem__(self, name: str) -> nn.Parameter:
        if name not in self._owners:
            owner, _, leaf = name.rpartition(".")
            self._owners[name] = (self._modules[owner]._parameters, leaf)
        parameters, leaf = self._owners[name]
        found = parameters[leaf]
        assert found is not None
        return found


class Holder:
    """Zeroes pruned elements after every optimizer step, until :meth:`release`."""

    def __init__(self, places: Places, masks_gradients: bool) -> None:
        self._places = places
        self._steps = HeldSteps(masks_gradients)
        self._masks: dict[str, Tensor] = {}
        self._kept: dict[str, tuple[nn.Parameter, Tensor]] = {}  # name: the parameter, this rank's bits
        self._found: list[nn.Parameter] = []  # the parameters that kept() saw last, and what it returned
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self.touched = False  # an optimizer that has one of our parameters stepped since this was cleared
        self.foreign = False  # another one did
        self._watched: list[str] = []
        self._mine: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}  # of the optimizers whose step runs now
        self._own: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple[nn.Parameter, Tensor]]]
        self._own = weakref.WeakKeyDictionary()  # those of the pairs that an optimizer has
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # that have one of our parameters
        self._hooks = [
            register_optimizer_step_pre_hook(self._about_to_step),
            register_optimizer_step_post_hook(self._stepped),
        ]

    def watch(self, names: Iterator[str]) -> None:
        """Notice steps of the optimizers of these parameters, also before anything is pruned."""
        self._watched = list(names)

    def waits(self) -> bool:
        """True when an optimizer that has some of our parameters stepped before, and lives: it may do so again."""
        return any(map(self._has_some, self._optimizers))

    def before_step(self, call: Any) -> None:
        """Call ``call(optimizer)`` ahead of every optimizer step."""
        self._hooks.append(register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: call(optimizer)))

    @torch.no_grad()
    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Hold these masks, bool of the whole weights' shapes, from now on."""
        self._masks = dict(masks)
        self._kept, self._found = {}, []
        self._steps.forget()
        self.project()
        for optimizer in self._optimizers:
            self._steps.settle(optimizer, self._kept_of(optimizer))

    @torch.no_grad()
    def project(self) -> None:
        """Zero the pruned elements of the weights."""
        clear(self.kept())

    def undo(self) -> None:
        """Zero the pruned elements of weights that somebody wrote to since an optimizer's step."""
        if self._steps.unsettled(self._pairs):
            with torch.no_grad():
                clear(self._steps.unsettled(self.kept()))

    def kept(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return every pruned parameter with the :func:`bits` of what this rank keeps of it."""
        found = [self._places[name] for name in self._masks]
        same = len(found) == len(self._found) and all(map(is_, found, self._found))
        if same and all(parameter.device == held.device for parameter, held in self._pairs):
            return self._pairs
        pairs = []
        for (name, mask), parameter in zip(self._masks.items(), found, strict=True):
            known = self._kept.get(name)
            if known is None or known[0] is not parameter or known[1].device != parameter.device:
                known = self._kept[name] = (parameter, bits(shard(mask, parameter)))
            pairs.append(known)
        self._found, self._pairs = found, pairs
        self._steps.forget()
        self._own.clear()
        return pairs

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.compiler.disable  # a compiled step would find no version of a tensor
    def _about_to_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        kept = self._mine[id(optimizer)] = self._kept_of(optimizer)
        self._steps.before(optimizer, kept, _given(optimizer, args, kwargs))

    @torch.compiler.disable
    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        kept = self._mine.pop(id(optimizer), [])
        if not kept:
            if not self._has_some(optimizer):
                self.foreign = True
                return
            kept = self._kept_of(optimizer)
        self.touched = True
        self._optimizers.add(optimizer)
        self._steps.after(optimizer, kept)

    def _has_some(self, optimizer: torch.optim.Optimizer) -> bool:
        mine = _parameters(optimizer)
        return any(id(self._places[name]) in mine for name in self._watched)

    def _kept_of(self, optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, Tensor]]:
        """Return those of :meth:`kept` that an optimizer has; the same list while they are the same."""
        kept = self.kept()
        known = self._own.get(optimizer, [])
        if len(known) < len(kept):  # none can join those of an optimizer that has all
            mine = _parameters(optimizer)
            found = [pair for pair in kept if id(pair[0]) in mine]
            if len(found) != len(known) or not all(map(is_, found, known)):
                known = self._own[optimizer] = found
        return known


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _given(optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a step has arguments, such as a closure."""
    return any(value is not None and value is not optimizer for value in (*args, *kwargs.values()))


def bits(mask: Tensor) -> Tensor:
    """Return integers that have all bits where a bool mask (N, ...) is True and none elsewhere.

    (N / g, ...), where each g output features share them: as many as the tiles of a kernel, or one.
    """
    mask = mask.contiguous()
    shared = torch.ops.fxprune.shared_rows(mask, _WIDTHS)
    return mask[::shared].to(torch.int32 if shared >= _WIDE else torch.int8).neg_()
