"""``fxprune.export`` and ``fxprune.load``: a pruned model as a program that runs without its Python source.

    torch.export -> the passes of the compiler -> packed weights as buffers -> torch.export -> a file

The dense weights of rewritten layers are not in the file. Layers are chosen as in ``torch.compile(backend="hwprune")``
with the same options on the same inputs, so both compute the same bits where Inductor fuses nothing (``fallback="eager"``).
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_flatten, tree_map, tree_structure, tree_unflatten

import fxprune
from fxprune import manifest
from fxprune.capture import arguments, evaluating
from fxprune.config import Config
from fxprune.context import Context
from fxprune.decompositions import decompositions
from fxprune.errors import CaptureError, ConfigError, ExportFileError, nearest
from fxprune.explain import table_of
from fxprune.lowering import aoti, onnx, tensorrt
from fxprune.lowering.attach import attach
from fxprune.lowering.decompose import decompose
from fxprune.lowering.tensorrt import Partition
from fxprune.manifest import Manifest
from fxprune.pipeline import chain, rewrite
from fxprune.plan import Plan
from fxprune.plan_file import encode
from fxprune.report import Table

FORMATS = ("exported_program", "aoti", "onnx", "torch_tensorrt")
_STANDARD = ("onnx", "torch_tensorrt")  # runtimes without our operators
LOADABLE = ("exported_program", "aoti")
_MOST = 256  # sizes of inputs a loaded program remembers as checked


@dataclass(frozen=True)
class Exported:
    """What was written. bytes: of the file; dense_bytes: of the model's parameters and buffers. report: as ``explain``.

    partition: for Torch-TensorRT, which operators it takes and which stay PyTorch's.
    """

    path: Path
    format: str
    bytes: int
    dense_bytes: int
    plan: Plan
    report: Table
    partition: Partition | None = None

    def __str__(self) -> str:
        chosen = self.report.summary.get("chosen", "0 of 0")
        share = f"{self.bytes / max(self.dense_bytes, 1):.0%} of {self.dense_bytes / 1e6:.2f} MB of dense weights"
        cut = "" if self.partition is None else f"; {self.partition}"
        return f"{self.path}: {self.format}, {self.bytes / 1e6:.2f} MB ({share}), {chosen} matches run sparse kernels{cut}"


class Loaded:
    """A loaded program: call it with the model's inputs. ``plan`` and ``manifest`` are what the file says about it."""

    def __init__(self, run: Callable[..., Any], about: Manifest, plan: Plan, program: ExportedProgram | None = None) -> None:
        self.manifest, self.plan, self.program = about, plan, program
        self._run = run
        self._body = _body(run)
        self._passed: set[Any] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = () if kwargs else _sizes(args)
        # nothing is recorded, so the operators' autograd layer would be pure overhead
        if key and key in self._passed:
            with torch._C._AutoDispatchBelowAutograd():
                return self._body(*args)
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            result = self._run(*args, **kwargs)
        if key and len(self._passed) < _MOST:
            self._passed.add(key)
        return result


def _body(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a program on tensors that it checked before; without trees of arguments where they are flat."""
    if not isinstance(run, GraphModule):
        return run
    given, result = run._in_spec, run._out_spec
    if result is None or given != tree_structure(((0,) * given.num_leaves, {})):
        return run.forward
    graph = Graph()
    graph.output(graph.graph_copy(run.graph, {}))
    forward = _direct(GraphModule(run, graph)).forward
    if result == tree_structure(0):
        return lambda *args: forward(*args)[0]
    return lambda *args: tree_unflatten(forward(*args), result)


def _sizes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return all that a program checks of its inputs, which takes as long as a layer does; () unless all are tensors."""
    if not all(type(a) is Tensor for a in args):
        return ()
    return tuple([(a.shape, a.dtype, a.device) for a in args])


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    format: str = "exported_program",
    dynamic_shapes: Any = None,
    **options: Any,
) -> Exported:
    """Write ``model`` as a program for inference in which pruned layers run sparse kernels.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    format: "exported_program": a ``.pt2`` for ``fxprune.load`` or, after ``import fxprune``, ``torch.export.load``.
        "aoti": a package compiled by AOTInductor, for ``fxprune.load`` and for C++ (``examples/cpp``). "onnx":
        standard operators that keep the saving (channels that are gone, rows gathered per tile where that pays), whatever
        was measured here; needs the extra ``fxprune[onnx]``. "torch_tensorrt": the same operators as an engine of
        Torch-TensorRT.
    dynamic_shapes: "batch" keeps dimension 0 of every input tensor free, else what ``torch.export.export`` takes.
    options: fields of :class:`fxprune.Config`; layers are chosen as ``torch.compile`` chooses them on this machine.

    The model is not changed. Raises :class:`~fxprune.errors.ConfigError` for an unknown format and
    :class:`~fxprune.errors.CaptureError` when torch.export cannot capture the model.
    """
    if format not in FORMATS:
        expected = f"one of {', '.join(map(repr, FORMATS))}; did you mean {nearest(str(format), FORMATS)!r}?"
        raise ConfigError(name="format", given=format, expected=expected)
    config = dataclasses.replace(Config.from_options(options))
    if config.has_target:
        expected = "a pruned model: a target is met by fxprune.prune, which builds and measures models"
        raise ConfigError(name="target_speedup or target_latency_ms", given="a target", expected=expected)
    target = Path(path)
    standard = format in _STANDARD
    if format == "torch_tensorrt":
        tensorrt.package()  # before any work
        tensorrt.check_device((list(model.parameters()), example_inputs))
    if standard:  # what was measured here says nothing about another runtime
        config = dataclasses.replace(config, autotune="off", min_speedup=0.0)
    program, ctx = sparse_program(model, example_inputs, config, dynamic_shapes, standard)
    plan, report, partition = Plan.of(model), table_of([ctx]), None
    about = _describe(program, format, report, model)
    texts = {manifest.MANIFEST: about.to_json(), manifest.PLAN: encode(plan)}
    if format == "onnx":
        onnx.save(program, target, texts)
    elif format == "torch_tensorrt":
        args, kwargs, shapes = _inputs(example_inputs, dynamic_shapes)
        partition = tensorrt.save(program, target, args, kwargs, shapes, config.tensorrt)
    elif format == "aoti":
        aoti.save(program, target, texts, config)
    else:
        program.example_inputs = None  # the user's data are nobody else's
        torch.export.save(program, os.fspath(target), extra_files=texts)
    return Exported(target, format, target.stat().st_size, about.bytes["dense"], plan, report, partition)


def load(path: str | os.PathLike[str]) -> Loaded:
    """Load what :func:`export` wrote. A ``.pt2`` is code: load only what you trust.

    Raises :class:`~fxprune.errors.ExportFileError` when the file is not ours or this installation lacks what it needs.
    """
    if Path(path).suffix == ".onnx":
        raise ExportFileError(path=path, reason="it is an ONNX file; run it with onnxruntime.InferenceSession(path)")
    about, plan = manifest.read(path)
    _check_operators(path, about)
    if about.kind not in LOADABLE:
        raise ExportFileError(path=path, reason=f"its format is {about.kind!r}, this fxprune loads {', '.join(LOADABLE)}")
    try:
        if about.kind == "aoti":
            return Loaded(aoti.load(path), about, plan)
        program = torch.export.load(os.fspath(path))
    except Exception as error:
        reason = f"torch {torch.__version__} cannot read a program of torch {about.torch} ({type(error).__name__}: {error})"
        raise ExportFileError(path=path, reason=reason) from error
    return Loaded(_direct(program.module()), about, plan, program)


def _direct(gm: GraphModule) -> GraphModule:
    """Let every weight be found as a plain attribute: a module's own look-up of hundreds takes as long as a layer."""
    for module in gm.modules():
        for held in (module._parameters, module._buffers, module._modules):
            vars(module).update({name: value for name, value in held.items() if value is not None})
    return gm


def sparse_program(
    model: nn.Module, example_inputs: Any, config: Config, dynamic_shapes: Any = None, standard: bool = False
) -> tuple[ExportedProgram, Context]:
    """Return the program of ``model`` with our operators in it, and what was decided.

    standard: standard operators in their place, for other runtimes; else chains of ours, the form to run.
    """
    args, kwargs, shapes = _inputs(example_inputs, dynamic_shapes)
    program = _exported(model, args, kwargs, shapes)
    gm = program.module(check_guards=False)
    codegen = gm.graph._codegen
    gm.graph.set_codegen(CodeGen())  # flat arguments, while passes run
    clone, ctx, changed = rewrite(gm, (), config)
    if not changed:
        return program, ctx
    if not standard:
        chain(clone, ctx)
    sparse = attach(clone, ctx.weights)
    if standard:
        ctx.counts["decompose"] = decompose(sparse)
    sparse.graph.set_codegen(codegen)
    sparse.recompile()
    program = _exported(sparse, args, kwargs, shapes)
    return (_without_ours(program) if standard else program), ctx


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        with evaluating(model), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # nn.LSTM renews its list of weights
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        given = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (*args, *kwargs.values())]
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        remedy = "torch.export needs one graph: torch.export.draft_export(model, args) says where the model breaks it."
        raise CaptureError(inputs=given, cause=cause, remedy=remedy) from error


def _without_ours(program: ExportedProgram) -> ExportedProgram:
    """Say what has no form with constant lists (recurrent steps) by its reference, unrolled."""
    if not any(getattr(n.target, "namespace", "") == "fxprune" for n in program.graph.nodes):
        return program
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's copy of its own tree specifications
        return program.run_decompositions(decompositions())


def _inputs(example_inputs: Any, shapes: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    args, kwargs = arguments(example_inputs)
    if shapes != "batch":
        return args, kwargs, shapes
    sizes = {t.shape[0] for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1:
        expected = "inputs that share dimension 0, or the shapes as torch.export.export takes them"
        raise ConfigError(name="dynamic_shapes", given=f"'batch' with first dimensions {sorted(sizes)}", expected=expected)
    if sizes == {1}:  # a symbol of size 1 would become a constant
        args, kwargs = tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t, (args, kwargs))
    batch = Dim("batch", min=1)
    free = tree_map(lambda t: {0: batch} if isinstance(t, Tensor) and t.dim() else None, (args, kwargs))
    return args, kwargs, free[0] if not kwargs else free[1]


def _describe(program: ExportedProgram, kind: str, report: Table, model: nn.Module) -> Manifest:
    ours = {str(n.target) for n in program.graph.nodes if getattr(n.target, "namespace", "") == "fxprune"}
    sizes = {"dense": _bytes(model.state_dict(keep_vars=True)), "packed": _bytes(program.state_dict | program.constants)}
    rows = tuple(report.to_dict()["rows"])
    return Manifest(kind, fxprune.__version__, torch.__version__, tuple(sorted(ours)), rows, sizes)


def _bytes(tensors: dict[str, Any]) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values() if isinstance(t, Tensor)
    }
    return sum(storages.values())


def _check_operators(path: Any, about: Manifest) -> None:
    missing = [name for name in about.operators if not hasattr(torch.ops.fxprune, name.split(".")[1])]
    if missing:
        reason = (
            f"it calls {', '.join(missing)}, which fxprune {fxprune.__version__} does not have; it needs {about.fxprune}"
        )
        raise ExportFileError(path=path, reason=reason)
