"""Loads the C++ and CUDA kernels; the only module that does.

With the library, its own schemas and kernels are registered under ``fxprune::``. Without it the same schemas are
defined from Python, so that references can be attached to them, and one warning says so. The CUDA kernels are a library
of their own, loaded beside the first one where torch has CUDA. Environment, for debugging: ``FXPRUNE_LIBRARY`` and
``FXPRUNE_CUDA_LIBRARY`` name the shared objects to load, ``FXPRUNE_ISA`` caps the instruction set of the CPU's,
``FXPRUNE_CUDA_ISA=sm_80`` that of the GPU's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from ..errors import FxPruneWarning

_TILES = "Tensor index, Tensor tile_ptr, Tensor columns"

# The schemas the library defines; a test compares the two.
SCHEMAS = (
    "depthwise_taps(Tensor x, Tensor weight, Tensor taps, Tensor? bias, int[] kernel_size, int[] stride, "
    'int[] padding, int[] dilation, str activation="none") -> Tensor',
    f"tile_gemm(Tensor x, Tensor values, {_TILES}, Tensor? bias, Tensor? residual, Tensor? gate, "
    'int out_features, int granularity, int feature_dim, str activation="none") -> Tensor',
    f"tile_conv(Tensor x, Tensor values, {_TILES}, Tensor? bias, Tensor? residual, int out_features, int granularity, "
    'int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, str activation="none") -> Tensor',
    "depthwise_pool(Tensor x, Tensor weight, Tensor taps, Tensor? bias, int[] kernel_size, int[] stride, "
    'int[] padding, int[] dilation, str activation="none") -> Tensor[]',
    "channel_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, float scale) -> Tensor",
    "attention_rows(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    "depthwise_grad_input(Tensor grad, Tensor weight, Tensor taps, int[] size, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation) -> Tensor",
    "depthwise_grad_weight(Tensor grad, Tensor x, Tensor taps, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation) -> Tensor",
    f"tile_grad_input(Tensor grad, Tensor values, {_TILES}, int granularity, int in_features, int feature_dim) -> Tensor",
    f"tile_grad_weight(Tensor grad, Tensor x, {_TILES}, int granularity, int nnz, int feature_dim) -> Tensor",
    f"tile_conv_grad_input(Tensor grad, Tensor values, {_TILES}, int granularity, int in_channels, int[] size, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    f"tile_conv_grad_weight(Tensor grad, Tensor x, {_TILES}, int granularity, int nnz, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    f"dsconv(Tensor x, Tensor weight, Tensor taps, Tensor? depthwise_bias, Tensor values, {_TILES}, Tensor? bias, "
    "Tensor? residual, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int out_features, "
    'int granularity, str depthwise_activation="none", str activation="none") -> Tensor',
    f"tile_pack(Tensor weight, {_TILES}, int granularity, int nnz) -> Tensor",
    f"tile_unpack(Tensor values, {_TILES}, int granularity, int out_features, int in_features) -> Tensor",
    "region(Tensor[] x, Tensor[] weights, str layout, str program, int[] outputs) -> Tensor[]",
    f"rnn_steps(Tensor gates, Tensor h, Tensor? c, Tensor values, {_TILES}, Tensor? bias, int granularity, "
    "bool reverse) -> Tensor[]",
    "nm_prune(Tensor grad, Tensor? key, int n, int m, int dim, int groups, str function, int layer) -> Tensor",
    "nm_mm(Tensor x, Tensor weight) -> Tensor",
    "skip_zeros_mm(Tensor x, Tensor weight, int dim) -> Tensor",
    "skip_zeros_conv(Tensor x, Tensor weight, int[] padding) -> Tensor",
    "clear_pruned(Tensor(a!)[] values, Tensor[] kept) -> ()",
    "add_squares(Tensor(a!)[] sums, Tensor[] a, Tensor[] b) -> ()",
    "tile_scores(Tensor importance, Tensor columns, int granularity) -> Tensor",
    "keep_best(Tensor[] scores, Tensor[] weights, float budget, bool guarded) -> Tensor[]",
    "held_scores(Tensor scores, Tensor kept, float share, bool magnitudes) -> Tensor",
    "shared_rows(Tensor mask, int[] groups) -> int",
    "tile_counts(Tensor mask, Tensor columns, int granularity) -> Tensor",
    "zero_outside(Tensor values, Tensor mask) -> bool",
    "isa() -> str",
    "set_isa(str name) -> ()",
)

_lock = threading.Lock()
_loaded: bool | None = None  # None until the first load()
_cuda_missing: str | None = "the library has not been loaded"  # why there are no CUDA kernels; None when there are
_definitions: torch.library.Library | None = None  # schemas live as long as this object


def path() -> Path | None:
    """Return the shared object load() would use, or None when there is none."""
    return _find("FXPRUNE_LIBRARY", "_C_cpu.so")


def cuda_path() -> Path | None:
    """Return the shared object of the CUDA kernels, or None when there is none."""
    return _find("FXPRUNE_CUDA_LIBRARY", "_C_cuda.so")


def _find(variable: str, name: str) -> Path | None:
    if named := os.environ.get(variable):
        return Path(named)
    # An editable install may keep the library beside another copy of the package than the one imported.
    spec = importlib.util.find_spec("fxprune")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return next((p for p in (Path(place) / name for place in places) if p.is_file()), None)


def load() -> bool:
    """Register the operators, from the library when there is one, else from SCHEMAS. Return whether it is there."""
    global _loaded, _definitions, _cuda_missing
    with _lock:
        if _loaded is None:
            reason = _load_library(path(), "fxprune/_C_cpu.so", "FXPRUNE_LIBRARY")
            _loaded = reason is None
            if torch.version.cuda is None:
                _cuda_missing = "this torch has no CUDA"
            else:
                # without the first library its schemas are missing, and nothing can attach to them
                _cuda_missing = reason or _load_library(cuda_path(), "fxprune/_C_cuda.so", "FXPRUNE_CUDA_LIBRARY")
            if reason is not None:
                _definitions = torch.library.Library("fxprune", "DEF")
                for schema in SCHEMAS:
                    _definitions.define(schema)
                warnings.warn(
                    FxPruneWarning(
                        f"fxprune runs without its C++ kernels, compiled layers stay dense: {reason}. Build them with "
                        "`python setup.py build_ext --inplace` or reinstall where a C++ compiler is found."
                    ),
                    stacklevel=2,
                )
        return _loaded


def available() -> bool:
    """Return whether the C++ kernels are registered, loading them at the first call."""
    return load()


def cuda_missing() -> str | None:
    """Return why there are no CUDA kernels, None when they are registered."""
    load()
    return _cuda_missing


def isa() -> str:
    """Return the instruction set the kernels use: "amx", "avx512_bf16", "avx512", "avx2" or "scalar"; "none" without the
    library. The first two differ from the third in bfloat16 alone."""
    return str(torch.ops.fxprune.isa()) if load() else "none"


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Return a hash of the libraries' bytes, the kernels' version in every cache key; "none" without the library."""
    found = path()
    if not load() or found is None:
        return "none"
    digest = hashlib.sha256(found.read_bytes())
    cuda = cuda_path()
    if cuda is not None and cuda_missing() is None:
        digest.update(cuda.read_bytes())
    return digest.hexdigest()[:16]


def _load_library(found: Path | None, name: str, variable: str) -> str | None:
    """Load a shared object; return None, or the reason why it could not be loaded."""
    if found is None:
        return f"{name} has not been built"
    if not found.is_file():
        return f"{variable}={found} does not exist"
    try:
        torch.ops.load_library(found)
    except (OSError, RuntimeError) as error:
        return f"{found} cannot be loaded: {error}"
    return None
