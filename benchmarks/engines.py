"""The engines that are compared: ours, stock Inductor's configurations and other runtimes, compiled by one first call."""

from __future__ import annotations

import copy
import inspect
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import PEERS
from torch import Tensor, nn

import fxprune

Run = Callable[..., Any]

# Each engine compiles for itself, though all share the code of one class; torch 2.11 tells them apart by their options.
ALONE = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
STOCK: dict[str, dict[str, Any]] = {
    "inductor": {},
    "inductor freezing": {"freezing": True},
    "inductor max-autotune": {"freezing": True, "max_autotune": True},
}
OURS = "fxprune"
EXPORTED = "fxprune exported"  # fxprune.export and load: no guards on the way in


def compile_engine(
    name: str, model: nn.Module, inputs: Sequence[Tensor], sizes: dict[str, float] | None = None
) -> tuple[Run, float]:
    """Compile ``model`` for inference on ``inputs``; returns the callable and the seconds of the first call.

    name: a key of STOCK or of PEERS, ``"fxprune"``, ``"fxprune exported"`` or ``"eager channels_last"``. sizes: receives
    the megabytes of the file of an engine that has one, and of a dense export beside ours. Raises what a runtime raises
    that is missing or cannot take the model.
    """
    start = time.perf_counter()
    if name in PEERS:
        run = PEERS[name](model, inputs)
        run(*inputs)
        return run, time.perf_counter() - start
    if name == EXPORTED:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            file = Path(folder) / "model.pt2"
            fxprune.export(model, tuple(inputs), file)
            run = fxprune.load(file)
            run(*inputs)
            seconds = time.perf_counter() - start
            if sizes is not None:
                sizes[EXPORTED] = megabytes(file)
                torch.export.save(torch.export.export(model, tuple(inputs)), file)
                sizes["torch.export"] = megabytes(file)
        return run, seconds
    if name == "eager channels_last":
        run, freezing = eager_channels_last(model), False
    elif name == OURS:
        fxprune.register()
        run, freezing = torch.compile(model, backend="hwprune", **ALONE), False
    else:
        options = STOCK[name]
        run, freezing = torch.compile(model, options=options or None, **ALONE), bool(options)
    # Dynamo reads `freezing` while it traces, so the flag must be global around the first call.
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        run(*inputs)
    return run, time.perf_counter() - start


def eager_channels_last(model: nn.Module) -> Run:
    """Run eagerly; images and convolution weights are channels_last."""
    last = model
    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return lambda *args: last(*(a.contiguous(memory_format=torch.channels_last) if a.dim() == 4 else a for a in args))


def warm_up() -> None:
    """Compile something small first, so that no engine pays for the compiler's own first start."""
    with torch.no_grad():
        torch.compile(lambda x: torch.relu(x) + 1)(torch.zeros(64))


def megabytes(file: Path) -> float:
    return round(file.stat().st_size / 1e6, 2)


def exact(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Return what the model computes in fp64."""
    return copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))


def peers(model: nn.Module) -> list[str]:
    """Return the runtimes that have kernels of the model's type."""
    return list(PEERS) if next(model.parameters()).dtype == torch.float32 else ["openvino"]


def relative_error(output: Any, exact: Any) -> float:
    """Return the largest difference from an fp64 output, relative to its largest value, over all tensors."""
    pairs = zip(torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(exact), strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)
