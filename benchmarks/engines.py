"""The engines that are compared: ours, stock Inductor's configurations and other runtimes, compiled by one first call."""

from __future__ import annotations

import copy
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

# Options also tell torch's cache of compiled code the engines apart.
STOCK: dict[str, dict[str, Any]] = {
    "inductor": {},
    "inductor freezing": {"freezing": True},
    "inductor max-autotune": {"freezing": True, "max_autotune": True},
}
OURS = "fxprune"
EXPORTED = "fxprune exported"  # fxprune.export and load: no guards on the way in


def compile_engine(name: str, model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Run, float]:
    """Compile ``model`` for inference on ``inputs``; returns the callable and the seconds of the first call.

    name: a key of STOCK or of PEERS, ``"fxprune"``, ``"fxprune exported"`` or ``"eager channels_last"``. Raises what a
    runtime raises that is missing or cannot take the model.
    """
    start = time.perf_counter()
    if name in PEERS:
        run = PEERS[name](model, inputs)
        run(*inputs)
        return run, time.perf_counter() - start
    if name == EXPORTED:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            fxprune.export(model, tuple(inputs), Path(folder) / "model.pt2")
            run = fxprune.load(Path(folder) / "model.pt2")
            run(*inputs)
        return run, time.perf_counter() - start
    if name == "eager channels_last":
        run, freezing = eager_channels_last(model), False
    elif name == OURS:
        fxprune.register()
        run, freezing = torch.compile(model, backend="hwprune"), False
    else:
        options = STOCK[name]
        run, freezing = torch.compile(model, options=options) if options else torch.compile(model), bool(options)
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


def relative_error(output: Any, exact: Any) -> float:
    """Return the largest difference from an fp64 output, relative to its largest value, over all tensors."""
    pairs = zip(torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(exact), strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)
