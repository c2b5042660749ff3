"""Attach what PyTorch needs to the operators: fake, autograd, and the references where no library is."""

from __future__ import annotations

import threading

import torch

from ..ops import OPS, beside_graphs, marks
from . import library
from .kernels import libraries
from .kernels.cpu import REFERENCE_ONLY

_LOCK = threading.Lock()
_DONE: list[torch.library.Library] = []


def register() -> None:
    """Make every ``torch.ops.fxprune`` operator usable; safe to call again, from any thread."""
    with _LOCK:
        if _DONE:
            return
        compiled = library.load()
        lib = torch.library.Library("fxprune", "FRAGMENT")
        for op in OPS:
            torch.library.register_fake(op.qualname, op.fake, lib=lib)
            torch.library.register_autograd(op.qualname, op.backward, setup_context=op.setup_context, lib=lib)
            if not compiled or op.name in REFERENCE_ONLY:
                lib.impl(op.name, op.reference, "CompositeExplicitAutograd")
        _DONE.extend((lib, marks.define(), beside_graphs.define(compiled), libraries.define()))
