"""Every argument check of the C++ operators, and the module that loads them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.lowering import library
from torch import Tensor

if not library.load():
    pytest.skip("the C++ library is not built", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.fxprune
BEST = OPS.isa()

_X = torch.zeros(1, 6, 5, 5)
_GEMM: dict[str, Any] = {
    "x": _X, "values": torch.zeros(24), "index": torch.tensor([0, 2, 4, 1, 3, 5]).int(),
    "tile_ptr": torch.tensor([0, 3, 6]).int(), "columns": torch.arange(8).int(), "bias": torch.zeros(8),
    "residual": torch.zeros(1, 8, 5, 5), "gate": torch.zeros(1, 6), "out_features": 8, "granularity": 4,
    "feature_dim": 1, "activation": "none",
}  # fmt: skip
_DEPTHWISE: dict[str, Any] = {
    "x": _X, "weight": torch.zeros(6, 9), "taps": torch.zeros(6, 1, dtype=torch.int64), "bias": torch.zeros(6),
    "kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "activation": "none",
}  # fmt: skip
_CONV: dict[str, Any] = {
    "x": _X, "values": torch.zeros(24), "index": torch.tensor([0, 2, 53, 1, 3, 5]).int(),
    "tile_ptr": _GEMM["tile_ptr"], "columns": _GEMM["columns"], "bias": torch.zeros(8),
    "residual": torch.zeros(1, 8, 5, 5), "out_features": 8, "granularity": 4, "kernel_size": [3, 3], "stride": [1, 1],
    "padding": [1, 1], "dilation": [1, 1], "groups": 1, "activation": "none",
}  # fmt: skip
_PACK = {"weight": torch.zeros(8, 6), **{k: _GEMM[k] for k in ("index", "tile_ptr", "columns", "granularity")}, "nnz": 24}
_UNPACK = {k: _GEMM[k] for k in ("values", "index", "tile_ptr", "columns", "granularity", "out_features")} | {
    "in_features": 6
}


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *(("tile_gemm", _GEMM, change, message) for change, message in (
        ({"feature_dim": 2}, "feature_dim must be 1 or -1, got 2"),
        ({"activation": "swish"}, "unknown activation 'swish'; legal: none, relu"),
        ({"x": _X.double()}, "x must be float32"),
        ({"x": _X[0, 0]}, r"x must have shape \(B, K, \*spatial\).*got \(5, 5\)"),
        ({"x": torch.zeros(()), "feature_dim": -1, "gate": None}, r"x must have shape \(\*, K\)"),
        ({"granularity": 0}, "granularity must be at least 1, got 0"),
        ({"out_features": -1}, "out_features must not be negative"),
        ({"index": _GEMM["index"].long()}, "index must be int32"),
        ({"tile_ptr": _GEMM["tile_ptr"].long()}, "tile_ptr must be int32"),
        ({"columns": _GEMM["columns"].long()}, "columns must be int32"),
        ({"index": _GEMM["index"][None]}, "index must have one dimension"),
        ({"tile_ptr": _int(0, 6)}, "tile_ptr must have 3 entries for 8 columns in tiles of 4, got 2"),
        ({"tile_ptr": _int(1, 3, 6)}, "tile_ptr must begin with 0, got 1"),
        ({"tile_ptr": _int(0, 3, 5)}, "tile_ptr must end with the length of index, 6, got 5"),
        ({"tile_ptr": _int(0, 7, 6)}, "tile_ptr must not decrease, got 7 before 6"),
        ({"tile_ptr": _int(0, -1, 6)}, "tile_ptr must not decrease, got 0 before -1"),
        ({"index": _int(0, 2, 6, 1, 3, 5)}, r"index must lie in \[0, 6\)"),
        ({"index": _int(0, 2, -1, 1, 3, 5)}, r"index must lie in \[0, 6\)"),
        ({"columns": _int(0, 1, 2, 3, 4, 5, 6, 8)}, r"columns must lie in \[0, 8\)"),
        ({"columns": _int(-1, 1, 2, 3, 4, 5, 6, 7)}, r"columns must lie in \[0, 8\)"),
        ({"columns": _int(0, 1, 2, 3, 3, 5, 6, 7)}, "columns must increase strictly"),
        ({"values": torch.zeros(23)}, r"values must have shape \(24\), got \(23\)"),
        ({"values": torch.zeros(24).double()}, "values must be float32"),
        ({"bias": torch.zeros(7)}, r"bias must have shape \(8\), got \(7\)"),
        ({"bias": torch.zeros(8).half()}, "bias must be float32"),
        ({"residual": torch.zeros(1, 8, 5)}, r"residual must have shape \(1, 8, 5, 5\), got \(1, 8, 5\)"),
        ({"gate": torch.zeros(1, 5)}, r"gate must have shape \(1, 6\), got \(1, 5\)"),
        ({"x": torch.zeros(2, 6), "residual": None, "feature_dim": -1}, "gate needs feature_dim=1"),
        ({"x": _X.bfloat16()}, "values must be bfloat16"),
        ({"x": _X.bfloat16(), "values": torch.zeros(23).bfloat16()}, r"values must have shape \(24\), got \(23\)"),
        ({"x": _X.bfloat16(), "values": torch.zeros(15, 32).bfloat16()}, r"values must have shape \(16, 32\), got \(15"),
        ({"x": _X.bfloat16(), "values": torch.zeros(24).bfloat16()}, "residual must be bfloat16, as x is"),
        ({"values": torch.zeros(16, 32)}, r"values must have shape \(24\), got \(16, 32\)"),
    )),
    *(("tile_conv", _CONV, change, message) for change, message in (
        ({"x": _X[0]}, r"x must have shape \(B, C, H, W\), got \(6, 5, 5\)"),
        ({"x": _X.double()}, "x must be float32"),
        ({"index": _int(0, 2, 54, 1, 3, 5)}, r"index must lie in \[0, 54\)"),
        ({"columns": _int(0, 1, 2, 3, 4, 5, 6, 8)}, r"columns must lie in \[0, 8\)"),
        ({"values": torch.zeros(23)}, r"values must have shape \(24\), got \(23\)"),
        ({"bias": torch.zeros(7)}, r"bias must have shape \(8\), got \(7\)"),
        ({"residual": torch.zeros(1, 8, 4, 5)}, r"residual must have shape \(1, 8, 5, 5\), got \(1, 8, 4, 5\)"),
        ({"kernel_size": [3]}, "kernel_size must have 2 entries, got 1"),
        ({"stride": [0, 1]}, "stride must lie in .*got 0"),
        ({"padding": [-1, 0]}, "padding must lie in .*got -1"),
        ({"dilation": [1, 2**40]}, "dilation must lie in "),
        ({"kernel_size": [9, 1]}, r"x of height and width \(5, 5\) is smaller than the dilated window \(9, 1\)"),
        ({"groups": 0}, "groups must divide 6 input and 8 output channels, got 0"),
        ({"groups": 3}, "groups must divide 6 input and 8 output channels, got 3"),
        ({"groups": 2, "granularity": 8, "index": _int(0, 1, 2), "tile_ptr": _int(0, 3)},
         "a tile must lie inside one group, got output features 0 to 7 in tile 0"),
        ({"kernel_size": [4097, 4097], "padding": [4096, 4096], "residual": None},
         "a group of 6 channels under a window of"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
    )),
    *(("depthwise_taps", _DEPTHWISE, change, message) for change, message in (
        ({"x": _X[0]}, r"x must have shape \(B, C, H, W\), got \(6, 5, 5\)"),
        ({"x": _X.half()}, "x must be float32 or bfloat16"),
        ({"x": _X.bfloat16(), "weight": torch.zeros(6, 9).half()}, "weight must be float32 or bfloat16"),
        ({"weight": torch.zeros(6, 8)}, r"weight must have shape \(6, 9\), got \(6, 8\)"),
        ({"weight": torch.zeros(6, 9).double()}, "weight must be float32"),
        ({"taps": torch.zeros(6, 1).int()}, "taps must be int64"),
        ({"taps": torch.zeros(6, 2, dtype=torch.int64)}, r"taps must have shape \(6, 1\)"),
        ({"taps": torch.full((6, 1), 1 << 9)}, "taps of channel 0 set a bit past tap 8"),
        ({"taps": torch.full((6, 1), -1)}, "taps of channel 0 set a bit past tap 8"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(6\)"),
        ({"kernel_size": [3]}, "kernel_size must have 2 entries, got 1"),
        ({"kernel_size": [0, 3]}, "kernel_size must lie in"),
        ({"stride": [1, 0]}, "stride must lie in"),
        ({"padding": [-1, 0]}, "padding must lie in"),
        ({"dilation": [1, 1 << 40]}, "dilation must lie in"),
        ({"dilation": [4, 1]}, r"x of height and width \(5, 5\) is smaller than the dilated window \(9, 3\)"),
        ({"activation": ""}, "unknown activation ''"),
    )),
    *(("tile_pack", _PACK, change, message) for change, message in (
        ({"weight": torch.zeros(8, 6).double()}, "weight must be float32"),
        ({"weight": torch.zeros(8)}, r"weight must have shape \(N, K\)"),
        ({"weight": torch.zeros(8, 5)}, r"index must lie in \[0, 5\)"),
        ({"nnz": 23}, "nnz must be 24, the packed values, got 23"),
    )),
    *(("tile_unpack", _UNPACK, change, message) for change, message in (
        ({"values": torch.zeros(25)}, r"values must have shape \(24\)"),
        ({"values": torch.zeros(24).double()}, "values must be float32"),
        ({"out_features": 7}, r"columns must lie in \[0, 7\)"),
        ({"in_features": -1}, "in_features must not be negative"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("op", "good", "change", "message"), BAD, ids=[f"{b[0]}-{b[3]}" for b in BAD])
def test_bad_arguments(op: str, good: dict[str, Any], change: dict[str, Any], message: str) -> None:
    getattr(OPS, op)(**good)
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(**{**good, **change})


def test_set_isa_refuses_unknown_names() -> None:
    with pytest.raises(RuntimeError, match="ISA 'sse' is unknown"):
        OPS.set_isa("sse")
    assert OPS.isa() == BEST


# ---- the library ----


def test_schemas_agree_with_the_library() -> None:
    for schema in library.SCHEMAS:
        name = schema.split("(")[0]
        assert str(getattr(OPS, name).default._schema) == f"fxprune::{schema}"


def test_library_reports_itself() -> None:
    assert library.available() and library.load()
    assert library.isa() == BEST
    assert len(library.source_hash()) == 16


def test_without_the_library_schemas_remain() -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from fxprune.errors import FxPruneWarning
    from fxprune.lowering import library
    first, second = library.load(), library.available()
    named = [w for w in caught if issubclass(w.category, FxPruneWarning) and "missing.so" in str(w.message)]
assert (first, second, library.isa(), len(named)) == (False, False, "none", 1), (first, second, library.isa(), named)
for schema in library.SCHEMAS:
    assert str(getattr(torch.ops.fxprune, schema.split("(")[0]).default._schema) == "fxprune::" + schema
"""
    environment = {**os.environ, "FXPRUNE_LIBRARY": "/nowhere/missing.so"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_environment_caps_the_isa() -> None:
    code = f"import torch; torch.ops.load_library({str(library.path())!r}); print(torch.ops.fxprune.isa())"
    environment = {**os.environ, "FXPRUNE_ISA": "scalar"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["scalar"], done.stderr


def test_no_warning_when_the_library_is_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.load()
