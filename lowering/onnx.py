"""Write a program of standard operators as ONNX. Needs the extra packages ``onnx`` and ``onnxscript``."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..errors import MissingPackage

_NEEDS = ("onnx", "onnxscript")


def save(program: ExportedProgram, path: Path, texts: Mapping[str, str]) -> None:
    """Write ``program`` with ``texts`` among the model's metadata; raises :class:`MissingPackage`."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackage(what='format="onnx"', packages=", ".join(missing), extra="onnx")
    with _quiet():
        written = torch.onnx.export(program, (), dynamo=True, verbose=False)
        assert written is not None
        written.optimize()
    written.model.metadata_props.update(texts)
    written.save(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's progress lines, which say nothing about errors, from the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
