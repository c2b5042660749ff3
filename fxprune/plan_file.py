"""Plan files: JSON with the masks as raw bits, never pickle, so a file from anywhere is safe to load.

    {"format": "fxprune.plan", "version": 1, "sha256": <of all the rest>, "plan": {"layers": [...], "weights": [...]}}

A layer is what a report shows, a weight is a parameter and its mask. A mask is stored by tile rows where it is tile-wise in
its tiling, else by elements. Buffers are little-endian, base64: "bits" (eight to a byte, the first lowest) or "int32".
Reading checks every size, type and index before anything is built from it; the digest finds damage, the checks find lies.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fxprune.config import KINDS
from fxprune.errors import PlanFileError, UnknownPattern
from fxprune.plan import LayerPlan, Plan, PrunedWeight
from fxprune.sparsity import get
from fxprune.sparsity.pattern import LayerMask, Tiling
from fxprune.sparsity.tile import is_tile_wise
from fxprune.sparsity.tile_plan import expand_rows, tile_counts

FORMAT, VERSION = "fxprune.plan", 1
_LARGEST = 1 << 30  # bytes of a file
_WIDEST = 4096  # a row of a wider tile is stored by elements
_EXPANSION = 1 << 16  # mask elements per byte of a file: no small file asks for much memory
_INT32 = 2**31 - 1
_LAYER = ("shape", "granularity", "columns", "counts", "note", "rows", "mask", "rest")
_WEIGHT = ("parameter", "shape", "pattern", "transposed", "layer")


def save(plan: Plan, path: str | Path) -> None:
    """Write a plan file."""
    Path(path).write_text(encode(plan))


def load_plan(path: str | Path) -> Plan:
    """Read a plan file; raises :class:`~fxprune.errors.PlanFileError` with what is wrong, and never runs code of it."""
    try:
        if Path(path).stat().st_size > _LARGEST:
            _fail("the file", f"{Path(path).stat().st_size} bytes", f"at most {_LARGEST}", str(path))
        text = Path(path).read_bytes()
    except OSError as error:
        raise PlanFileError(path=path, what="the file", given=error.strerror, expected="a readable plan file") from error
    return decode(text, str(path))


def encode(plan: Plan) -> str:
    """Return a plan as the text of a plan file."""
    weights = [_weight(name, pruned) for name, pruned in plan.weights.items()]
    layers = [dataclasses.asdict(layer) for layer in plan.layers]
    document = {"format": FORMAT, "version": VERSION, "plan": {"layers": layers, "weights": weights}}
    return json.dumps({**document, "sha256": _digest(document)}, indent=1) + "\n"


def decode(text: bytes | str, path: str = "plan") -> Plan:
    """Return the plan of the text of a plan file; raises :class:`~fxprune.errors.PlanFileError`."""
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except PlanFileError as error:
        what, given, expected = (error.fields[key] for key in ("what", "given", "expected"))
        raise PlanFileError(path=path, what=what, given=given, expected=expected) from None
    except (ValueError, RecursionError) as error:
        raise PlanFileError(path=path, what="the text", given=str(error) or type(error).__name__, expected="JSON") from None
    return _Reader(path, len(text)).plan(document)


def _weight(name: str, pruned: PrunedWeight) -> dict[str, Any]:
    return {
        "parameter": name,
        "shape": list(pruned.mask.shape),
        "pattern": pruned.pattern,
        "transposed": pruned.transposed,
        "layer": _layer(pruned.layer),
    }


def _layer(layer: LayerMask) -> dict[str, Any]:
    tiling = Tiling(layer.tiling.shape, layer.tiling.columns.cpu(), layer.tiling.granularity)
    mask, every = layer.mask.cpu(), len(tiling.columns) == tiling.shape[0]
    if tiling.granularity <= _WIDEST and is_tile_wise(mask, tiling):
        form, bits = "rows", tile_counts(mask, tiling) > 0
    else:
        form, bits = "elements", mask
    return {
        "shape": list(tiling.shape),
        "granularity": tiling.granularity,
        "columns": None if every else _buffer(tiling.columns),
        "counts": list(layer.counts),
        "note": layer.note,
        "rows": None if layer.tiling.rows is None else _buffer(layer.tiling.rows.cpu()),
        "mask": {"form": form, "bits": _buffer(bits)},
        "rest": None if layer.rest is None else _layer(layer.rest),
    }


def _buffer(tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype == torch.bool:
        kind, raw = "bits", np.packbits(tensor.reshape(-1).numpy(), bitorder="little").tobytes()
    else:
        kind, raw = "int32", tensor.numpy().astype("<i4").tobytes()
    return {"type": kind, "shape": list(tensor.shape), "data": base64.b64encode(raw).decode()}


def _digest(document: Mapping[str, Any]) -> str:
    """Hash a document without its own "sha256", whatever its spaces are."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fail(what: str, given: object, expected: object, path: str = "plan") -> NoReturn:
    text = repr(given) if isinstance(given, str) else str(given)
    raise PlanFileError(path=path, what=what, given=text if len(text) <= 120 else text[:120] + "...", expected=expected)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        _fail("an object", [key for key, _ in pairs], "every key once")
    return found


def _no_constant(name: str) -> NoReturn:
    _fail("a number", name, "a finite one")


class _Reader:
    """Check and build, naming where in the document something is wrong."""

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.room = _EXPANSION * (size + 4096)

    def plan(self, document: Any) -> Plan:
        self.require(isinstance(document, dict), "the text", type(document).__name__, "an object")
        self.require(document.get("format") == FORMAT, "format", document.get("format"), repr(FORMAT))
        known = document.get("version") == VERSION and type(document["version"]) is int
        self.require(known, "version", document.get("version"), f"{VERSION}, which this fxprune reads")
        self.keys(document, "the text", ("format", "version", "sha256", "plan"))
        self.require(document["sha256"] == _digest(document), "sha256", document["sha256"], "that of the text: it changed")
        body = document["plan"]
        self.keys(body, "plan", ("layers", "weights"))
        layers = [self.layer_plan(v, f"layers[{i}]") for i, v in enumerate(self.a(list, body["layers"], "layers"))]
        weights: dict[str, PrunedWeight] = {}
        for i, entry in enumerate(self.a(list, body["weights"], "weights")):
            name, pruned = self.weight(entry, f"weights[{i}]")
            self.require(name not in weights, f"weights[{i}].parameter", name, "every parameter once")
            weights[name] = pruned
        return Plan(layers, weights=weights)

    def layer_plan(self, entry: Any, at: str) -> LayerPlan:
        self.keys(entry, at, tuple(f.name for f in dataclasses.fields(LayerPlan)))
        for key in ("name", "parameter", "note"):
            self.a(str, entry[key], f"{at}.{key}")
        self.require(entry["kind"] in KINDS, f"{at}.kind", entry["kind"], f"one of {', '.join(KINDS)}")
        self.pattern(entry["pattern"], f"{at}.pattern")
        for key in ("target", "sparsity"):
            value = entry[key]
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
            self.require(number, f"{at}.{key}", value, "a fraction from 0 to 1")
        self.integer(entry["granularity"], f"{at}.granularity", 1)
        columns = entry["columns"]
        fields = dict(entry, shape=self.integers(entry["shape"], f"{at}.shape"))
        fields["counts"] = self.integers(entry["counts"], f"{at}.counts")
        fields["columns"] = None if columns is None else self.integers(columns, f"{at}.columns")
        return LayerPlan(**fields)

    def weight(self, entry: Any, at: str) -> tuple[str, PrunedWeight]:
        self.keys(entry, at, _WEIGHT)
        name, shape = self.a(str, entry["parameter"], f"{at}.parameter"), self.integers(entry["shape"], f"{at}.shape")
        at = f"weights[{name!r}]"
        self.pattern(entry["pattern"], f"{at}.pattern")
        transposed = self.a(bool, entry["transposed"], f"{at}.transposed")
        layer = self.layer(entry["layer"], f"{at}.layer")
        n, k = layer.tiling.shape
        wanted = (k, n) if transposed else (n, k)
        matrix = (shape[0], math.prod(shape[1:])) if shape else ()
        self.require(matrix == wanted, f"{at}.shape", shape, f"one of {wanted} as a matrix")
        return name, PrunedWeight(entry["pattern"], layer, (layer.mask.t() if transposed else layer.mask).reshape(shape))

    def layer(self, entry: Any, at: str, inner: bool = False) -> LayerMask:
        self.keys(entry, at, _LAYER)
        shape = self.integers(entry["shape"], f"{at}.shape")
        self.require(len(shape) == 2, f"{at}.shape", shape, "two sizes")
        n, k = shape
        self.room -= n * k
        self.require(self.room >= 0, f"{at}.shape", shape, "a mask in proportion to the file")
        granularity = self.integer(entry["granularity"], f"{at}.granularity", 1)
        columns = torch.arange(n) if entry["columns"] is None else self.columns(entry["columns"], f"{at}.columns", n)
        tiles = -(-len(columns) // granularity)
        rows = None if entry["rows"] is None else self.buffer(entry["rows"], f"{at}.rows", "bits", (tiles, k))
        tiling = Tiling((n, k), columns, granularity, rows)
        counts = self.integers(entry["counts"], f"{at}.counts")
        self.require(len(counts) == tiles, f"{at}.counts", f"{len(counts)} entries", f"{tiles}, one for each tile")
        most = min(granularity, max(n, 1)) * k
        self.require(max(counts, default=0) <= most, f"{at}.counts", max(counts, default=0), f"at most {most}")
        stored, known = entry["mask"], ("rows", "elements")
        self.keys(stored, f"{at}.mask", ("form", "bits"))
        self.require(stored["form"] in known, f"{at}.mask.form", stored["form"], " or ".join(map(repr, known)))
        if stored["form"] == "rows":
            self.require(granularity <= _WIDEST, f"{at}.granularity", granularity, f"at most {_WIDEST} beside rows")
            bits = self.buffer(stored["bits"], f"{at}.mask.bits", "bits", (tiles, k))
            mask = expand_rows(tiling, list(bits)) if tiles else torch.zeros((n, k), dtype=torch.bool)
        else:
            mask = self.buffer(stored["bits"], f"{at}.mask.bits", "bits", (n, k))
        self.require(not (inner and entry["rest"] is not None), f"{at}.rest", "one inside another", "none")
        rest = None if entry["rest"] is None else self.layer(entry["rest"], f"{at}.rest", inner=True)
        if rest is not None:
            inside = rest.tiling.shape == (n, k) and not bool((rest.mask & ~mask).any())
            self.require(inside, f"{at}.rest", f"{rest.tiling.shape}", "a part of the mask")
        note = self.a(str, entry["note"], f"{at}.note")
        return LayerMask(tiling, mask, counts, note, rest)

    def columns(self, entry: Any, at: str, n: int) -> Tensor:
        self.keys(entry, at, ("type", "shape", "data"))
        length = self.integers(entry["shape"], f"{at}.shape")
        self.require(len(length) == 1 and length[0] <= n, f"{at}.shape", length, f"at most ({n},)")
        values = self.buffer(entry, at, "int32", length)
        legal = not len(values) or (int(values[0]) >= 0 and int(values[-1]) < n and bool((values.diff() > 0).all()))
        self.require(legal, at, "output features out of range or order", f"increasing ones below {n}")
        return values

    def buffer(self, entry: Any, at: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Return bool or int64 of exactly ``shape``."""
        self.keys(entry, at, ("type", "shape", "data"))
        self.require(entry["type"] == kind, f"{at}.type", entry["type"], repr(kind))
        given = self.integers(entry["shape"], f"{at}.shape")
        self.require(given == shape, f"{at}.shape", given, shape)
        count = math.prod(shape)
        size = -(-count // 8) if kind == "bits" else 4 * count
        try:
            raw = base64.b64decode(self.a(str, entry["data"], f"{at}.data"), validate=True)
        except (binascii.Error, ValueError) as error:
            _fail(f"{at}.data", f"{error}", "base64", self.path)
        self.require(len(raw) == size, f"{at}.data", f"{len(raw)} bytes", size)
        if kind == "int32":
            return torch.from_numpy(np.frombuffer(raw, "<i4").astype(np.int64).reshape(shape))
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
        self.require(not bits[count:].any(), f"{at}.data", "bits past the last element", f"{count} bits")
        return torch.from_numpy(bits[:count].astype(bool).reshape(shape))

    def pattern(self, value: Any, at: str) -> None:
        """A pattern's name, or several joined by "+"."""
        try:
            for name in self.a(str, value, at).split("+"):
                get(name)
        except UnknownPattern as error:
            _fail(at, value, f"a pattern; did you mean {error.fields['nearest']!r}?", self.path)

    def keys(self, entry: Any, at: str, names: tuple[str, ...]) -> None:
        self.require(isinstance(entry, dict), at, type(entry).__name__, "an object")
        self.require(set(entry) == set(names), at, sorted(entry), sorted(names))

    def integers(self, value: Any, at: str) -> tuple[int, ...]:
        return tuple(self.integer(v, f"{at}[{i}]") for i, v in enumerate(self.a(list, value, at)))

    def integer(self, value: Any, at: str, least: int = 0) -> int:
        self.require(type(value) is int and least <= value <= _INT32, at, value, f"an integer from {least} to {_INT32}")
        return int(value)

    def a(self, kind: type, value: Any, at: str) -> Any:
        self.require(type(value) is kind, at, type(value).__name__, f"a {kind.__name__}")
        return value

    def require(self, ok: bool, what: str, given: object, expected: object) -> None:
        if not ok:
            _fail(what, given, expected, self.path)
