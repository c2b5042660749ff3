"""What a Pruner saves and loads: a dictionary of plain tensors and values, checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxprune.errors import StateMismatch
from fxprune.hold import Places
from fxprune.plan import LayerPlan

VERSION = 1
_OF_MASKS = ("patterns", "structures", "granularity")  # of these each mask has one
_LIKE_PARAMETERS = ("masks", "structures", "scores", "before")  # tensors of the parameter's shape
_PARTS = ("step", "layers", *_OF_MASKS, *_LIKE_PARAMETERS)


def check(state: Mapping[str, Any], places: Places, growth: bool) -> None:
    """Raise :class:`~fxprune.errors.StateMismatch` unless a state is whole and of these parameters.

    growth: it must hold the values that pruned weights had.
    """
    if state.get("version") != VERSION:
        raise StateMismatch(what="version", given=state.get("version"), expected=VERSION)
    for part in _PARTS:
        if part not in state:
            raise StateMismatch(what="parts", given=f"no {part!r}", expected="all that state_dict() returned")
    for part in _LIKE_PARAMETERS:
        for name, tensor in state[part].items():
            try:
                shape = tuple(places[name].shape)
            except KeyError:
                raise StateMismatch(what="parameter", given=name, expected="a parameter of the model") from None
            if tuple(tensor.shape) != shape:
                raise StateMismatch(what=f"{part} of {name!r}", given=tuple(tensor.shape), expected=shape)
    for part in (*_OF_MASKS, *(("before",) if growth else ())):
        for name in state["masks"]:
            if name not in state[part]:
                expected = f"{part!r} beside its mask" + (", of a Pruner with growth=True" if part == "before" else "")
                raise StateMismatch(what=name, given="none", expected=expected)


def saved_layer(fields: Mapping[str, Any]) -> LayerPlan:
    """Return a layer's plan from its fields as they were saved."""
    columns = fields["columns"]
    listed = {"shape": tuple(fields["shape"]), "counts": tuple(fields["counts"])}
    return LayerPlan(**{**fields, **listed, "columns": None if columns is None else tuple(columns)})
