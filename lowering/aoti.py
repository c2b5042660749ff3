"""Compile a program ahead of time into a package that runs from Python and from C++ without Python."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..config import Config
from .codegen import patches


def save(program: ExportedProgram, path: Path, texts: Mapping[str, str], config: Config) -> None:
    """Write the package of ``program``, with ``texts`` beside it in the archive. Needs a C++ compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's, about its own settings
        options = {**patches(program.graph, config), "aot_inductor.package": True}
        torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path), inductor_configs=options)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        for name, text in texts.items():
            archive.writestr(f"{root}/extra/{name}", text)


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Return the callable of a package. Its compiled code is mapped into this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Callable[..., Any] = torch._inductor.aoti_load_package(os.fspath(path))
    return loaded
