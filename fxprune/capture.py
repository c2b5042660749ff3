"""Run a model once under Dynamo and detect its prunable layers, without changing the model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxprune.config import Config
from fxprune.context import Context, Refusal
from fxprune.errors import CaptureError
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.measure import Measure
from fxprune.match import Block, Match
from fxprune.passes import DETECT
from fxprune.weights import STATE_NAME, Weights

# Every capture is a compile of its own: it must not run into the limit of recompiles, nor use up the user's.
# Recurrent layers are in its graphs: by default Dynamo leaves them out.
NO_LIMITS = {"recompile_limit": 2**30, "accumulated_recompile_limit": 2**30}
_CAPTURE = {**NO_LIMITS, "allow_rnn": True}
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


@dataclass(frozen=True)
class Captured:
    """One graph Dynamo saw, with the real tensors it was called with.

    outside: layers of the model that are in none of its graphs, with the reason; the first graph has them.
    """

    gm: GraphModule
    inputs: tuple[Any, ...]
    outside: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Detected:
    """The matches and blocks of all graphs of a model, names as in ``model.named_parameters()``."""

    matches: tuple[Match, ...]
    blocks: tuple[Block, ...]


def capture(model: nn.Module, example_inputs: Any) -> list[Captured]:
    """Return the graphs of one inference call of ``model`` in evaluation mode.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    Raises :class:`~fxprune.errors.CaptureError` with the model's own error as the cause.
    """
    graphs: list[Captured] = []
    state = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {id(tensor): name for name, tensor in reversed(state)}

    def keep(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        for node, value in zip(placeholders, inputs, strict=True):
            if id(value) in names:  # Dynamo forgets its own sources when the compile ends
                node.meta[STATE_NAME] = names[id(value)]
        graphs.append(Captured(gm, tuple(inputs)))
        return gm.forward

    args, kwargs = arguments(example_inputs)
    try:
        with evaluating(model), torch.no_grad(), torch._dynamo.config.patch(_CAPTURE):
            torch.compile(model, backend=keep, dynamic=False, **ISOLATED)(*args, **kwargs)
    except Exception as error:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (*args, *kwargs.values())]
        remedy = "Check that model(*example_inputs) runs; a tuple is positional arguments, a dict keyword arguments."
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise CaptureError(inputs=shapes, cause=cause, remedy=remedy) from error
    found = list(graphs)
    graphs.clear()  # Dynamo keeps `keep` with the code of the class, and the weights must not live as long
    outside = _outside(model, found)
    if outside and not found:  # one to tell it
        nothing = Graph()
        nothing.output(())
        found.append(Captured(GraphModule(nn.Module(), nothing), ()))
    return [replace(graph, outside=() if i else outside) for i, graph in enumerate(found)]


def _outside(model: nn.Module, graphs: Sequence[Captured]) -> tuple[Refusal, ...]:
    return (*_recurrent(model, graphs), *_masked(model))


def _masked(model: nn.Module) -> list[Refusal]:
    """Return the layers with a mask of torch.ao.pruning: Dynamo traces none of its functions."""
    reason = (
        "a mask of torch.ao.pruning keeps it out of every graph: sparsifier.squash_mask() writes the zeros and removes it"
    )
    masks: Any = sys.modules.get("torch.ao.pruning.sparsifier.utils")  # loaded by whoever made the masks
    found = []
    for name, layer in model.named_modules() if masks else ():
        for of, chain in getattr(layer, "parametrizations", {}).items():
            if any(isinstance(part, masks.FakeSparsity) for part in chain):
                shape = "x".join(map(str, chain.original.shape))
                found.append(Refusal(".".join(filter(None, (name, of))), "linear", shape, reason))
    return found


def _recurrent(model: nn.Module, graphs: Sequence[Captured]) -> tuple[Refusal, ...]:
    inputs = {id(value) for graph in graphs for value in graph.inputs}
    reason = "in no graph: Dynamo breaks around its call, as it does for packed sequences"
    return tuple(
        Refusal(name or type(layer).__name__, "rnn", f"{layer.input_size}->{layer.hidden_size}", reason)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.RNNBase) and not any(id(p) in inputs for p in layer.parameters())
    )


def detect(graph: Captured, config: Config, inference: bool = True) -> Context:
    """Run the detection passes on a clone of one graph."""
    copied = Graph()
    copied.output(copied.graph_copy(graph.gm.graph, val_map={}))
    clone = GraphModule(graph.gm, copied)
    tables = KernelTables()
    ctx = Context(config, Weights(clone, graph.inputs), inference, tables, Measure(config, tables.unit))
    ctx.refused += graph.outside
    for detection in DETECT:
        detection(clone, ctx)
    return ctx


def detect_exported(program: torch.export.ExportedProgram, config: Config | None = None) -> Context:
    """Detect on an exported program: the same passes over the same vocabulary."""
    return detect(Captured(program.module(), ()), config or Config())


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode and restore each one's own flag afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    with suppress(NotImplementedError):  # the module of an exported program has one mode
        model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
