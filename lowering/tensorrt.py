"""Hand graphs and programs to Torch-TensorRT, an optional package that needs TensorRT and a GPU.

A program for export holds standard operators only, all of which have converters. In a compile our operators stay where they
were chosen; Torch-TensorRT runs what has no converter by PyTorch, between its engines, and so our CUDA kernels. (Its
generated plugins take neither optional tensors nor lists, which our operators have: ``plugins/_generate_plugin.py``.)
"""

from __future__ import annotations

import importlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConfigError, MissingPackage

_COUNTS = re.compile(r"(\d+) Total Operators, of which (\d+) operators are supported")


@dataclass(frozen=True)
class Partition:
    """What Torch-TensorRT's dry run says of a program: ``text`` is its report as it comes."""

    text: str

    @property
    def operators(self) -> tuple[int, int] | None:
        """(operators TensorRT takes, all operators); ``None`` when the report has another form."""
        found = _COUNTS.search(self.text)
        return None if found is None else (int(found[2]), int(found[1]))

    @property
    def engines(self) -> int:
        return self.text.count("TRT Engine #")

    def __str__(self) -> str:
        if self.operators is None:
            return self.text.strip()
        plural = "" if self.engines == 1 else "s"
        return f"TensorRT takes {self.operators[0]} of {self.operators[1]} operators, in {self.engines} engine{plural}"


def package(what: str = 'format="torch_tensorrt"') -> Any:
    """Return the module ``torch_tensorrt``; raises :class:`MissingPackage` with what its import said."""
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # without TensorRT's libraries or a driver the import fails in many ways
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        packages = f"torch_tensorrt with TensorRT and a GPU ({said})"
        raise MissingPackage(what=what, packages=packages, extra="tensorrt") from error


def check_device(values: Any, what: str = 'format="torch_tensorrt"') -> None:
    """Raise :class:`ConfigError` for tensors that are not on a GPU, where TensorRT builds and runs its engines."""
    wrong = next((t for t in tree_leaves(values) if isinstance(t, Tensor) and t.device.type != "cuda"), None)
    if wrong is not None:
        expected = f'a model and inputs on "cuda" for {what}: model.to("cuda")'
        raise ConfigError(name="device", given=str(wrong.device), expected=expected)


def save(
    program: ExportedProgram,
    path: Path,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    shapes: Any,
    options: Mapping[str, Any],
) -> Partition:
    """Write the compiled program; nodes TensorRT does not take stay PyTorch's. Returns how it was cut.

    args, kwargs: example inputs. shapes: as ``torch.export.export`` took them; free sizes need an upper bound.
    options: of ``torch_tensorrt.dynamo.compile``.
    """
    trt = package()
    inputs = {"arg_inputs": list(args), "kwarg_inputs": dict(kwargs)}
    if shapes is not None:
        inputs = _bounded(trt, program, inputs)
    partition = _dry_run(trt, program, inputs, options)
    compiled = trt.dynamo.compile(program, **inputs, **options)
    free = {} if shapes is None else {"dynamic_shapes": shapes}
    examples = {"arg_inputs": list(args), "kwarg_inputs": dict(kwargs)}
    trt.save(compiled, os.fspath(path), output_format="exported_program", **examples, **free)
    return partition


def compile_rest(gm: GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a graph whose weights are attributes by the backend ``torch_tensorrt`` of ``torch.compile``."""
    what = 'fallback="tensorrt"'
    package(what)  # which registers the backend
    check_device(inputs, what)
    backend: Any = torch._dynamo.lookup_backend("torch_tensorrt")
    # by default a failed build is a line in the log, and the graph runs by PyTorch
    run: Callable[..., Any] = backend(gm, list(inputs), options={"pass_through_build_failures": True, **options})
    return run


def _dry_run(trt: Any, program: ExportedProgram, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Partition:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        report = Path(folder) / "partition.txt"
        trt.dynamo.compile(program, **inputs, **options, dryrun=os.fspath(report))
        return Partition(report.read_text())


def _bounded(trt: Any, program: ExportedProgram, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs as Torch-TensorRT's specifications, with the range of every free size."""
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    nodes = iter([placeholders[name] for name in program.graph_signature.user_inputs if name in placeholders])

    def specification(value: Any) -> Any:
        sizes = next(nodes).meta["val"].shape
        ranges = [_range(program, size) for size in sizes]
        low, high = tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)
        if low == high:
            return value
        return trt.Input(min_shape=low, opt_shape=tuple(value.shape), max_shape=high, dtype=value.dtype)

    return {name: tree_map(specification, values) for name, values in inputs.items()}


def _range(program: ExportedProgram, size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    bounds = program.range_constraints[size.node.expr]
    if not bounds.upper.is_Integer:
        expected = (
            'an upper bound for every free size, as in {0: Dim("batch", min=1, max=32)}: an engine is built for a range'
        )
        raise ConfigError(name="dynamic_shapes", given=f"{size} from {bounds.lower} up", expected=expected)
    return int(bounds.lower), int(bounds.upper)
