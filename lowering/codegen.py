"""Hand a graph to Inductor, or run it as it is."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..config import Config
from ..graph import fake, name_of
from ..weights import states
from . import library, tensorrt


def stock(gm: GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """Compile a graph that holds none of our operators exactly as ``backend="inductor"`` would."""
    if config.fallback == "tensorrt":
        gm = GraphModule(gm, copy.deepcopy(gm.graph))  # weights become attributes
        return _frozen(
            gm, example_inputs, states(gm, example_inputs), lambda live: tensorrt.compile_rest(gm, live, config.tensorrt)
        )
    if config.fallback == "eager" or _unrolls(gm):
        return gm.forward
    return _compile(gm, example_inputs, _patches(config))


class JointPass(Protocol):
    """A pass over the joint graph of forward and backward, and what it is for caches."""

    @property
    def identity(self) -> str: ...

    def __call__(self, graph: Graph) -> int: ...


def compile_rest(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    constant: Sequence[bool],
    config: Config,
    joint: JointPass | None = None,
) -> Callable[..., Any]:
    """Compile a rewritten graph. Beside our kernels on images, convolutions left in it stay NCHW, the layout of those.

    constant: per input, whether it is a weight; with ``freeze`` those are folded into the compiled code. joint: runs on the
    joint graph of autograd, before Inductor's own passes.
    """
    if config.fallback == "tensorrt":
        return _frozen(gm, example_inputs, constant, lambda live: tensorrt.compile_rest(gm, live, config.tensorrt))
    if config.fallback == "eager" or _unrolls(gm):
        gm.recompile()
        return gm.forward if joint is None else _differentiate(gm, example_inputs, joint)
    settings = patches(gm.graph, config)
    if joint is not None or any(map(_is_ours, gm.graph.nodes)):
        settings["joint_custom_pre_pass"] = Salt(joint)
    if not config.freeze or torch.is_grad_enabled():
        return _read(gm, example_inputs, lambda read: _compile(gm, read, settings))
    with torch._inductor.config.patch(freezing=True):
        return _frozen(gm, example_inputs, constant, lambda live: _compile(gm, live, {**settings, "freezing": True}))


def patches(graph: Graph, config: Config) -> dict[str, Any]:
    """Return the settings of Inductor for a rewritten graph."""
    # Inductor would check the sizes of every packed weight on every call; a region checks what it reads itself
    ours = [node for node in graph.nodes if _is_ours(node)]
    sizes = {"size_asserts": False} if ours else {}
    layout = {"layout_optimization": False} if any(map(_runs_on_images, ours)) else {}
    return {**sizes, **layout, **_patches(config)}


def _is_ours(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "fxprune"


def _runs_on_images(node: Node) -> bool:
    """True for a kernel of ours on feature-major images; beside others, stock's convolutions keep stock's layout."""
    values = [*(fake(n) for n in node.all_input_nodes), *pytree.tree_leaves(node.meta.get("example_value"))]
    return any(isinstance(v, Tensor) and v.dim() == 4 and v.is_floating_point() for v in values)


def _unrolls(gm: GraphModule) -> bool:
    """True for a graph whose recurrent layers Inductor would unroll over time: minutes of compilation, for each length.

    Only an LSTM in inference stays one call there. Without ``allow_rnn`` these layers run eagerly as well.
    """
    names = {name_of(n) for n in gm.graph.nodes if n.op == "call_function"}
    return bool(names & {"gru", "rnn_tanh", "rnn_relu"}) or ("lstm" in names and torch.is_grad_enabled())


def _compile(gm: GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    run = compile_fx(gm, list(inputs), config_patches=patches)
    return cast("Callable[..., Any]", run)  # a file name or weights only ahead of time


def _differentiate(gm: GraphModule, inputs: Sequence[Any], joint: JointPass) -> Callable[..., Any]:
    """Run forward and backward graph node by node, after ``joint``."""

    def partition(joined: GraphModule, values: Sequence[Any], **options: Any) -> Any:
        joint(joined.graph)
        joined.graph.lint()
        joined.recompile()
        return default_partition(joined, values, **options)

    def run(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    return cast("Callable[..., Any]", aot_autograd(fw_compiler=run, partition_fn=partition)(gm, list(inputs)))


def _read(
    gm: GraphModule, example_inputs: Sequence[Any], compile: Callable[[list[Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """Compile ``gm`` without the tensors that nothing reads any more: each that is passed on costs every call."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    unread = [not n.users and isinstance(v, Tensor) for n, v in zip(placeholders, example_inputs, strict=True)]
    for node, drop in zip(placeholders, unread, strict=True):
        if drop:
            gm.graph.erase_node(node)
    gm.recompile()
    return _of_some(example_inputs, unread, compile)


def _of_some(
    example_inputs: Sequence[Any], dropped: Sequence[bool], compile: Callable[[list[Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """Return a function of all inputs that calls what ``compile`` makes of those not ``dropped``."""
    stay = [i for i, drop in enumerate(dropped) if not drop]
    run = compile([example_inputs[i] for i in stay])
    return lambda *args: run(*[args[i] for i in stay])


def _frozen(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    constant: Sequence[bool],
    compile: Callable[[list[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """Compile ``gm`` with its weights as attributes: ``compile`` gets the other inputs."""
    _lift_constants(gm, example_inputs, constant)
    return _of_some(example_inputs, constant, compile)


def _lift_constants(gm: GraphModule, example_inputs: Sequence[Any], constant: Sequence[bool]) -> None:
    """Turn weight inputs into attributes, the form in which Inductor's freezing folds and prepacks them."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    body = next(n for n in gm.graph.nodes if n.op != "placeholder")
    for node, value, fixed in zip(placeholders, example_inputs, constant, strict=True):
        if not fixed:
            continue
        name = f"frozen_{node.name}"
        gm.register_buffer(name, value.detach())
        with gm.graph.inserting_before(body):
            attribute = gm.graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        gm.graph.erase_node(node)
    gm.meta.pop("dynamo_compile_id", None)  # Dynamo knows nothing of these attributes
    gm.recompile()


def _patches(config: Config) -> dict[str, Any]:
    patches = dict(torch._inductor.list_mode_options(config.mode)) if config.mode else {}
    patches.update({name.replace("-", "_"): value for name, value in config.inductor.items()})
    return patches


class Salt(CustomGraphPass):
    """Puts our code into the cache key, on which Inductor has no custom operator's; runs ``joint`` where there is one."""

    def __init__(self, joint: JointPass | None = None) -> None:
        self._joint = joint

    def __call__(self, graph: Graph) -> None:
        if self._joint is not None:
            self._joint(graph)
            graph.lint()

    def uuid(self) -> str:
        return "fxprune-" + _salt() + ("" if self._joint is None else "-" + self._joint.identity)


@functools.cache
def _salt() -> str:
    digest = hashlib.sha256(library.source_hash().encode())
    root = Path(__file__).resolve().parent.parent
    for path in sorted(p for folder in ("ops", "fxprune/ops", "lowering") for p in (root / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
