"""Semantic operator to code: the shared library, the kernel tables, timing, and the compiler of the rest."""

from ..errors import FxPruneError as _FxPruneError  # a relative import, so that `import lowering` cannot succeed

__all__: list[str] = []
del _FxPruneError
