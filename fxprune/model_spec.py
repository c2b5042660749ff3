"""What the command line calls a model: ``timm:NAME``, ``hf:CONFIG``, ``file.py:factory`` or a ``.pt2`` program."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import FxPruneError, MissingPackage, ModelSpecError

Shape = tuple[int, ...]
_TOKENS = 128
_FORMS = "timm:NAME, hf:CONFIG (a folder, a config.json or a model type), FILE.py:FACTORY, or PROGRAM.pt2"


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode and inputs of the batch size asked for."""

    model: nn.Module
    inputs: Any


def build(spec: str, shapes: Sequence[Shape] = (), batch: int = 1, pretrained: bool = False, seed: int = 0) -> Subject:
    """Return the model that ``spec`` names, with random weights from ``seed`` unless it brings its own.

    shapes: of the inputs, random floats, in place of those the model suggests; batch: dimension 0 of the suggested ones.
    Raises :class:`~fxprune.errors.ModelSpecError` and :class:`~fxprune.errors.MissingPackage`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            subject = _build(spec, batch, pretrained)
        except FxPruneError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelSpecError(spec=spec, reason=f"{type(error).__name__}: {first}", forms=_FORMS) from error
        inputs = tuple(torch.randn(shape) for shape in shapes) if shapes else subject.inputs
    if inputs is None:
        reason = "nothing says what its inputs are; pass --shape, or let the factory return (model, inputs)"
        raise ModelSpecError(spec=spec, reason=reason, forms=_FORMS)
    return Subject(subject.model.eval() if not spec.endswith(".pt2") else subject.model, inputs)


def _build(spec: str, batch: int, pretrained: bool) -> Subject:
    kind, _, name = spec.partition(":")
    if kind == "timm" and name:
        return _timm(name, batch, pretrained)
    if kind == "hf" and name:
        return _transformer(name, batch)
    path, _, factory = spec.rpartition(":")
    if path.endswith(".py") and factory:
        return _factory(Path(path), factory)
    if spec.endswith(".pt2"):
        return _program(spec)
    raise ModelSpecError(spec=spec, reason="it is none of the known forms", forms=_FORMS)


def _timm(name: str, batch: int, pretrained: bool) -> Subject:
    try:
        import timm
    except ImportError as error:
        raise MissingPackage(what=f"timm:{name}", packages=str(error.name or "timm"), extra="timm") from error
    model = timm.create_model(name, pretrained=pretrained)
    about: Any = model.pretrained_cfg
    size = about.get("input_size", (3, 224, 224))
    return Subject(model, (torch.randn(batch, *size),))


def _transformer(name: str, batch: int) -> Subject:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage(what=f"hf:{name}", packages="transformers", extra="hf") from error
    local = Path(name).exists()
    config = transformers.AutoConfig.from_pretrained(name) if local else transformers.AutoConfig.for_model(name)
    model = transformers.AutoModel.from_config(config)
    main = model.main_input_name
    inputs: dict[str, Tensor] = {}
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        inputs[main] = torch.randn(batch, getattr(config, "num_channels", 3), height, width)
    else:
        tokens = min(_TOKENS, getattr(config, "max_position_embeddings", _TOKENS))
        inputs[main] = torch.randint(config.vocab_size, (batch, tokens))
    return Subject(model, inputs)


def _factory(path: Path, name: str) -> Subject:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, name)
    made = made() if inspect.isfunction(made) or inspect.isclass(made) else made
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} is a {type(model).__name__}, expected a torch.nn.Module or (module, inputs)")
    return Subject(model, inputs)


def _program(path: str) -> Subject:
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file: {path}")
    program = torch.export.load(path)
    return Subject(program.module(), None)
