"""``hwprune doctor``: what is here, what is missing, and what that costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune.lowering import library, measure
from fxprune.lowering.kernels import KernelTables
from fxprune.ops import OPS
from fxprune.report import Table

_EXTRAS = {
    "timm": "timm:NAME models",
    "transformers": "hf:CONFIG models",
    "onnx": 'format="onnx"',
    "onnxscript": 'format="onnx"',
    "onnxruntime": "running ONNX files",
    "matplotlib": "plot(path)",
    "torch_tensorrt": 'format="torch_tensorrt"',
}


def doctor() -> Table:
    """Return a row per thing that matters to speed: what was found, and the remedy where something is missing."""
    rows: list[tuple[str, str, str]] = [
        ("fxprune", fxprune.__version__, ""),
        ("torch", torch.__version__, "" if _version() >= (2, 11) else "needs 2.11 or newer"),
        ("python", platform.python_version(), ""),
        ("processor", f"{_processor()}, {torch.get_num_threads()} threads", ""),
    ]
    built = library.available()
    remedy = "" if built else "build them: python setup.py build_ext --inplace (needs g++)"
    rows.append(("C++ kernels", str(library.path()) if built else "missing, everything stays dense", remedy))
    rows.append(("instruction set", library.isa(), ""))
    rows.append(("library", library.source_hash(), ""))
    calibrated = measure.calibrated(None)
    rows.append(("calibration", "yes" if calibrated else "no", "" if calibrated else "run fxprune.calibrate() once"))
    rows.append(("GPU", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none seen by torch", ""))
    found = [p for p in importlib.metadata.entry_points(group="torch_dynamo_backends") if p.name == "hwprune"]
    registered = "installed" if found else "not installed"
    rows.append(("backend", registered, "" if found else "call fxprune.register() before torch.compile, or pip install"))
    tables = KernelTables()
    for op in OPS:
        rows.append((f"fxprune::{op.name}", ", ".join(i.provider for i in tables.candidates(op.name)), ""))
    for name, use in _EXTRAS.items():
        here = importlib.util.find_spec(name) is not None
        rows.append((name, _installed(name) if here else "not installed", "" if here else f"only for {use}"))
    return Table("doctor", ("what", "found", "remedy"), rows)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _processor() -> str:
    info: Any = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
