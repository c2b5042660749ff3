"""Which activations the CUDA kernels compute as torch does, bit for bit, and which within rounding."""

from __future__ import annotations

from tests import integers

EXACT = integers.CLAMPS
SMOOTH = integers.DIVIDED | integers.SMOOTH
