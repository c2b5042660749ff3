"""Oracles, strictest first: exact integers bit for bit, then the fp64 rule; a reference that proves nothing is MISTRUSTED.

Small integers stored as float32 have one sum in every order, so any kernel, layout and thread count gives the same bits.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import same
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from fxprune import backend, pipeline
from fxprune.capture import capture, detect, detect_exported
from fxprune.compiled import CompiledGraph
from fxprune.config import Config
from fxprune.context import Context

# no Inductor, no timing, and every supported match runs our kernels
FORCED: dict[str, Any] = {"fallback": "eager", "autotune": "off", "min_speedup": 0.0}


def nearness(op: str) -> float:
    """How far two right results of an operator may lie apart where every sum is exact."""
    return 2.0**-6 if op == "attention" else 1e-4  # it rounds the shares of keys to bfloat16


class Mistrusted(AssertionError):
    """A comparison that would pass for a wrong kernel as well."""


def integers(*shape: int, seed: int = 0, low: int = -4, high: int = 4) -> Tensor:
    """Return float32 integers in [low, high]."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=gen).float()


def integer_model(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill ``model`` with integers; every BatchNorm scales by a power of two. Returns it in evaluation mode."""
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(integers(*parameter.shape, seed=seed * 1009 + i, low=-2, high=2))
    for i, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            draw = integers(4, module.num_features, seed=seed * 1013 + i, low=0, high=2).long()
            module.eps = 0.0
            module.running_var.copy_(torch.tensor([1.0, 4.0, 0.25])[draw[0]])
            module.running_mean.copy_(draw[1].float() - 1)
            if module.affine:
                module.weight.data.copy_(torch.tensor([1.0, 2.0, -1.0])[draw[2]])
                module.bias.data.copy_(draw[3].float() - 1)
    return model.eval()


def zero_some(model: nn.Module, seed: int = 0, share: float = 0.6, step: int = 8) -> nn.Module:
    """Zero taps of depthwise weights, and K rows of runs of ``step`` output features of the others, in place.

    Runs of linear layers are eight times as long: their kernel's tiles are.
    """
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                continue
            matrix = parameter.reshape(parameter.shape[0], -1)
            if parameter.dim() == 4 and parameter.shape[1] == 1:
                kept = torch.rand(matrix.shape, generator=gen) >= share
            else:
                run = step if parameter.dim() == 4 else 8 * step
                rows = torch.rand(-(-matrix.shape[0] // run), matrix.shape[1], generator=gen) >= share
                kept = rows.repeat_interleave(run, 0)[: matrix.shape[0]]
            parameter.mul_(kept.reshape(parameter.shape))
    return model


def zeroed(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Give a layer integer weights without every second K row, and without more of them in runs of features."""
    layer = integer_model(layer, seed)
    matrix = layer.weight.data.reshape(layer.weight.shape[0], -1)
    matrix[:, 1::2] = 0
    zero_some(layer, seed, 0.3)
    matrix[:, 0] = 2
    return layer


def trust(reference: Tensor, most: float = 0.5) -> None:
    """Raise :class:`Mistrusted` when more than ``most`` of a reference is zeros, or it is constant."""
    if reference.numel() < 2 or not reference.is_floating_point():
        return
    zeros = (reference == 0).float().mean().item()
    if zeros > most:
        raise Mistrusted(f"{zeros:.0%} of the reference are zeros")
    if most < 1 and bool((reference == reference.flatten()[0]).all()):
        raise Mistrusted("the reference is constant")


def assert_exact(given: Any, expected: Any, repro: str = "", trusted: bool = True, most_zeros: float = 0.5) -> None:
    """Compare every tensor of two outputs bit for bit; prints ``repro`` and the first difference.

    most_zeros: more than this share of zeros in ``expected`` is MISTRUSTED; raise it only for what scatters.
    """
    left, right = tensors(given), tensors(expected)
    assert len(left) == len(right), f"{len(left)} tensors for {len(right)}; reproduce: {repro}"
    if trusted and right:
        trust(torch.cat([t.detach().float().flatten() for t in right]), most_zeros)
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        what = f"output {i}: {a.dtype} {tuple(a.shape)} for {b.dtype} {tuple(b.shape)}; reproduce: {repro}"
        assert a.dtype == b.dtype and a.shape == b.shape, what
        if not torch.equal(a, b):
            wrong = (a != b).nonzero()
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"output {i}: {len(wrong)} of {a.numel()} differ, first at {at}: {a[at]} for {b[at]}; reproduce: {repro}"
            )


def assert_close_fp64(
    given: Any, expected: Any, exact: Any, tolerance: float = 1e-4, repro: str = "", most_zeros: float = 0.5
) -> None:
    """PyTorch's own rule: as close to an fp64 run as ``expected`` is, within a factor."""
    for i, (a, b, c) in enumerate(zip(*map(tensors, (given, expected, exact)), strict=True)):
        trust(b, most_zeros)
        assert a.dtype == b.dtype, f"output {i}: {a.dtype} for {b.dtype}; reproduce: {repro}"
        errors = [(t.double() - c).square().mean().sqrt().item() for t in (a, b)]
        message = f"output {i}: RMSE {errors[0]:.3g}, reference {errors[1]:.3g}; reproduce: {repro}"
        assert same(b, a, c, tol=tolerance), message


def assert_same(given: Any, expected: Any, exact: Any, repro: str = "", trusted: bool = True) -> None:
    """Compare bit for bit where the float32 run ``expected`` equals the fp64 run ``exact``, else by the fp64 rule."""
    if rounds(expected, exact):
        assert_close_fp64(given, expected, exact, repro=repro, most_zeros=0.5 if trusted else 1.0)
    else:
        assert_exact(given, expected, repro, trusted)


def rounds(single: Any, double: Any) -> bool:
    """True when a float32 run differs from the fp64 run."""
    return not all(torch.equal(a.double(), b.double()) for a, b in zip(tensors(single), tensors(double), strict=True))


def widened(values: Any) -> Any:
    """Return ``values`` with every float tensor in fp64, parameters detached."""
    return tree_map(lambda v: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def copied(values: Sequence[Any]) -> list[Any]:
    return [v.detach().clone() if isinstance(v, Tensor) else v for v in values]


def assert_model(given: Any, model: nn.Module, inputs: Sequence[Any], repro: str = "", trusted: bool = True) -> None:
    """Compare the output of a compiled model with ``model``."""
    with torch.no_grad():
        expected = model(*inputs)
        exact = copy.deepcopy(model).double()(*widened(list(inputs)))
    assert_same(given, expected, exact, repro, trusted)


def tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def operators(gm: GraphModule) -> Counter[str]:
    """Count calls by short name: ``conv2d``, ``tile_gemm``, ``relu``, ..., methods and functions alike."""
    names: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            name = (
                schema.name.partition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))
            )
            names[name] += 1
        elif node.op == "call_method":
            names[str(node.target)] += 1
    return names


@dataclass(frozen=True)
class Run:
    """One rewritten graph: what it and the captured graph returned, what was decided, and the graph itself."""

    output: Any
    expected: Any
    exact: Any
    context: Context
    graph: GraphModule
    changed: bool

    @property
    def ops(self) -> Counter[str]:
        return operators(self.graph)

    @property
    def kinds(self) -> Counter[str]:
        return Counter(m.kind for m in self.context.matches)


def rewritten(model: nn.Module, *inputs: Any, exact: Any = None, **options: Any) -> Run:
    """Capture one inference graph of ``model``, run the whole pipeline on it, and call the result.

    exact: the fp64 result, for a graph that cannot be run in float64 as it is.
    """
    (graph,) = capture(model, inputs)
    with torch.no_grad():
        clone, context, changed = pipeline.rewrite(graph.gm, graph.inputs, Config(**{**FORCED, **options}))
        packs = context.weights.appended()
        clone.recompile()
        clone.graph.lint()
        expected = graph.gm(*copied(graph.inputs))
        exact = graph.gm(*widened(copied(graph.inputs))) if exact is None else exact
        output = clone(*graph.inputs, *packs)
    return Run(output, expected, exact, context, clone, changed)


def check(model: nn.Module, *inputs: Any, **options: Any) -> Run:
    """:func:`rewritten`, with the output compared with the captured graph's."""
    run = rewritten(model, *inputs, **options)
    assert_same(run.output, run.expected, run.exact, repro=str(model))
    return run


@dataclass(frozen=True)
class Compiled:
    """A model under ``torch.compile(backend="hwprune")`` and the graphs the backend returned so far."""

    call: Callable[..., Any]
    graphs: list[Any]

    @property
    def contexts(self) -> list[Context]:
        return [g.context for g in self.graphs if isinstance(g, CompiledGraph) and g.context is not None]


def compiled(model: nn.Module, dynamic: bool | None = None, **options: Any) -> Compiled:
    """Compile ``model`` with the real backend, kernels forced, the rest eager."""
    graphs: list[Any] = []

    def keep(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(backend.hwprune(gm, inputs, options={**FORCED, **options}))
        return graphs[-1]

    return Compiled(torch.compile(model, backend=keep, dynamic=dynamic), graphs)


def detected(model: nn.Module, *inputs: Any) -> tuple[Counter[str], Counter[str]]:
    """Count matches and blocks by kind, from Dynamo's graphs and from an exported program, which must agree."""
    model.eval()
    both = []
    with torch.no_grad():
        from_dynamo = [detect(graph, Config()) for graph in capture(model, inputs)]
        from_export = [detect_exported(torch.export.export(model, inputs))]
    for contexts in (from_dynamo, from_export):
        matches = Counter(m.kind for c in contexts for m in c.matches)
        both.append((matches, Counter(b.kind for c in contexts for b in c.blocks)))
    assert both[0] == both[1], f"Dynamo found {both[0]}, export {both[1]} in {model}"
    return both[0]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that a kernel that skips part of its output is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
