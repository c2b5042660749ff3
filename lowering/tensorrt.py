"""Build a TensorRT engine of a program of standard operators, by Torch-TensorRT, an optional package."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from ..errors import MissingPackage


def package() -> Any:
    """Return the module ``torch_tensorrt``; raises :class:`MissingPackage` with what its import said."""
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # without TensorRT's libraries or a driver the import fails in many ways
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingPackage(
            what='format="torch_tensorrt"', packages=f"torch_tensorrt with TensorRT and a GPU ({said})", extra="tensorrt"
        ) from error


def save(program: ExportedProgram, path: Path, inputs: Sequence[Any]) -> None:
    """Write the compiled program; nodes TensorRT does not take stay PyTorch's."""
    trt = package()
    compiled = trt.dynamo.compile(program, inputs=list(inputs))
    trt.save(compiled, os.fspath(path), output_format="exported_program", inputs=list(inputs))
