"""Plan files: what is saved comes back bit for bit; what was changed is refused or equal, never different or a crash."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import plan_file
from fxprune.errors import FxPruneError, PlanFileError, PlanMismatch
from fxprune.plan import Plan, lookup
from fxprune.sparsity.pattern import LayerMask
from tests.oracle import FORCED, assert_exact, compiled, integer_model
from tests.toys import image, mlp, mobile, rows, run

PATTERNS: dict[str, dict[str, Any]] = {
    "default": {"sparsity": 0.5},
    "columns": {"sparsity": 0.7, "columns": True, "granularity": 8},
    "channel": {"sparsity": 0.5, "pattern": "channel"},
    "elements": {"sparsity": 0.6, "pattern": "unstructured"},
    "n:m": {"pattern": {"pointwise": "2:4", "linear": "2:4"}, "sparsity": {"pointwise": 0.5, "linear": 0.5}},
    "block": {"sparsity": 0.5, "pattern": "block:4x4"},
    "tew": {"sparsity": 0.5, "pattern": "tew:0.05", "granularity": 8},
    "tvw": {"sparsity": 0.6, "pattern": "tvw:2:4", "granularity": 8},
}


@pytest.fixture(autouse=True)
def fresh_compiles() -> None:
    """Graphs compiled by other tests count towards Dynamo's limit."""
    torch._dynamo.reset()


def same_layer(a: LayerMask | None, b: LayerMask | None) -> bool:
    if a is None or b is None:
        return a is b
    tensors = [(a.mask, b.mask), (a.tiling.columns, b.tiling.columns)]
    tensors += [] if a.tiling.rows is None or b.tiling.rows is None else [(a.tiling.rows, b.tiling.rows)]
    plain = [(v.tiling.shape, v.tiling.granularity, tuple(v.counts), v.note, v.tiling.rows is None) for v in (a, b)]
    return plain[0] == plain[1] and all(torch.equal(x, y) for x, y in tensors) and same_layer(a.rest, b.rest)


def same_plan(a: Plan, b: Plan) -> bool:
    if a.layers != b.layers or list(a.weights) != list(b.weights):
        return False
    pairs = [(a.weights[name], b.weights[name]) for name in a.weights]
    return all(x.pattern == y.pattern and torch.equal(x.mask, y.mask) and same_layer(x.layer, y.layer) for x, y in pairs)


def made(name: str = "default") -> fxprune.PruneResult:
    return fxprune.prune(mobile(), image(), **PATTERNS[name])


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_saved_comes_back(name: str, tmp_path: Path) -> None:
    result = made(name)
    result.plan.save(tmp_path / "plan.json")
    loaded = fxprune.load_plan(tmp_path / "plan.json")
    assert same_plan(loaded, result.plan) and loaded.weights
    fresh = fxprune.apply_plan(mobile(), loaded)
    expected = result.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in fresh.state_dict().items())
    assert all(lookup(p) is not None for key, p in fresh.named_parameters() if key in loaded.weights)
    both = [compiled(model, **FORCED) for model in (fresh, result.model)]
    assert_exact(*[run(c.call, image()) for c in both])
    decided = [[(d.match.name, d.kernel) for ctx in c.contexts for d in ctx.decisions] for c in both]
    assert decided[0] == decided[1] and any(kernel != "dense" for _, kernel in decided[0])


def test_transposed_weight() -> None:
    class Matmul(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32, 24))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    result = fxprune.prune(integer_model(Matmul()), rows(), sparsity=0.5, granularity=8)
    assert result.plan.weights["weight"].transposed
    assert same_plan(plan_file.decode(plan_file.encode(result.plan)), result.plan)


def test_a_second_call_saves_the_first_as_well() -> None:
    first = fxprune.prune(mobile(), image(), sparsity={"depthwise": 0.5})
    second = fxprune.prune(first.model, image(), sparsity={"linear": 0.5})
    assert [layer.name for layer in second.plan] == ["fc"] and set(second.plan.weights) == {"dw.weight", "fc.weight"}


def test_applied_plan_is_held_in_training() -> None:
    plan = plan_file.decode(plan_file.encode(made().plan))
    model = fxprune.apply_plan(mobile(), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan.hold(optimizer)
    model(image()).sum().backward()
    optimizer.step()
    assert not model.dw.weight.detach()[~plan.weights["dw.weight"].mask].any()


def test_a_model_it_does_not_fit_is_not_changed() -> None:
    plan = made().plan
    wrong = mobile()
    wrong.fc = nn.Linear(32, 25)
    before = {key: value.clone() for key, value in wrong.state_dict().items()}
    with pytest.raises(PlanMismatch, match=r"1 of 3 parameter\(s\): 'fc.weight' is \(25, 32\), in the plan \(24, 32\)"):
        fxprune.apply_plan(wrong, plan)
    assert all(torch.equal(value, before[key]) for key, value in wrong.state_dict().items())
    assert lookup(wrong.dw.weight) is None
    with pytest.raises(PlanMismatch, match=r"'dw\.weight' is missing, did you mean '2\.weight'"):
        fxprune.apply_plan(mlp(), plan)


def test_file_does_not_depend_on_the_weights() -> None:
    """Masks only: a plan shows nothing of the values, and the same masks give the same text."""
    text = plan_file.encode(made().plan)
    assert text == plan_file.encode(made().plan) and len(text) < 6000


# ---- recalibrate ----


def test_recalibrate_keeps_the_function() -> None:
    result = fxprune.prune(mobile(), image(), sparsity=0.6, granularity=4, group=16)
    plan = fxprune.recalibrate(result.plan, device="avx512")
    assert {layer.name: layer.granularity for layer in plan} == {"dw": 32, "pw": 8, "fc": 64}
    for layer in plan:
        old, new = (p.weights[layer.parameter].mask for p in (result.plan, plan))
        assert not (old & ~new).any() and layer.sparsity == pytest.approx(1 - new.float().mean().item())
    model = fxprune.apply_plan(copy.deepcopy(result.model), plan)
    assert_exact(run(model, image()), run(result.model, image()))
    assert same_plan(plan_file.decode(plan_file.encode(plan)), plan)
    assert same_plan(fxprune.recalibrate(plan, device="avx2"), plan)


def test_recalibrate_from_the_dense_weights_keeps_the_sparsity() -> None:
    dense = mobile()
    result = fxprune.prune(dense, image(), sparsity=0.5, granularity=4)
    plan = fxprune.recalibrate(result.plan, device="avx512", dense=dense)
    for old, new in zip(result.plan, plan, strict=True):
        assert abs(new.sparsity - old.sparsity) < 0.1, new.name
    assert {layer.name: layer.granularity for layer in plan} == {"dw": 32, "pw": 8, "fc": 64}


def test_recalibrate_for_a_gpu_and_back() -> None:
    """Tiles of the tensor cores' kernels hold 128 output features; what is kept only grows."""
    result = fxprune.prune(mobile(), image(), sparsity=0.6, granularity=4, group=16)
    plan = fxprune.recalibrate(result.plan, device="cuda")
    assert {layer.name: layer.granularity for layer in plan} == {"dw": 32, "pw": 128, "fc": 128}
    for layer in plan:
        old, new = (p.weights[layer.parameter].mask for p in (result.plan, plan))
        assert not (old & ~new).any()
    model = fxprune.apply_plan(copy.deepcopy(result.model), plan)
    assert_exact(run(model, image()), run(result.model, image()))
    back = fxprune.recalibrate(plan, device="avx512", dense=mobile())
    assert {layer.name: layer.granularity for layer in back} == {"dw": 32, "pw": 8, "fc": 64}


def test_recalibrate_refuses_an_unknown_device() -> None:
    with pytest.raises(FxPruneError, match=r"option 'device' got 'avx51'.*did you mean 'avx512'"):
        fxprune.recalibrate(made().plan, device="avx51")


# ---- bad files ----


def changed(change: Callable[[dict[str, Any]], None]) -> str:
    """A plan file with a right digest and something wrong inside."""
    document = json.loads(plan_file.encode(made("tew").plan))
    change(document)
    return json.dumps({**document, "sha256": plan_file._digest(document)})


def weight(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["plan"]["weights"][1]
    return found


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda d: d.update(format="x"), "format: got 'x', expected 'fxprune.plan'"),
    "version": (lambda d: d.update(version=2), "version: got 2, expected 1, which this fxprune reads"),
    "extra key": (lambda d: d["plan"].update(code="x"), r"plan: got \['code', 'layers', 'weights'\]"),
    "weights": (lambda d: d["plan"].update(weights={}), "weights: got 'dict', expected a list"),
    "twice": (lambda d: d["plan"]["weights"].append(weight(d)), "expected every parameter once"),
    "kind": (lambda d: d["plan"]["layers"][0].update(kind="gemm"), "kind: got 'gemm', expected one of depthwise"),
    "sparsity": (lambda d: d["plan"]["layers"][0].update(sparsity=2), "sparsity: got 2, expected a fraction from 0 to 1"),
    "pattern": (lambda d: weight(d).update(pattern="til"), "pattern: got 'til', expected a pattern; did you mean 'tile'"),
    "shape": (lambda d: weight(d).update(shape=[16, 33]), r"shape: got \(16, 33\), expected one of"),
    "negative": (lambda d: weight(d).update(shape=[-16, 2]), r"shape\[0\]: got -16, expected an integer from 0"),
    "float size": (lambda d: weight(d).update(shape=[16.0, 2]), r"shape\[0\]: got 16.0"),
    "granularity": (lambda d: weight(d)["layer"].update(granularity=0), "granularity: got 0, expected an integer from 1"),
    "counts": (lambda d: weight(d)["layer"].update(counts=[1]), "counts: got '1 entries', expected 3, one for each tile"),
    "count": (lambda d: weight(d)["layer"].update(counts=[9999] * 3), "counts: got 9999, expected at most"),
    "base64": (lambda d: weight(d)["layer"]["mask"]["bits"].update(data="?"), "data: got .*, expected base64"),
    "short": (lambda d: weight(d)["layer"]["mask"]["bits"].update(data="AAAA"), "data: got '3 bytes', expected 96"),
    "type": (lambda d: weight(d)["layer"]["mask"]["bits"].update(type="pickle"), "type: got 'pickle', expected 'bits'"),
    "form": (lambda d: weight(d)["layer"]["mask"].update(form="x"), "form: got 'x', expected 'rows' or 'elements'"),
    "columns": (
        lambda d: weight(d)["layer"].update(columns={"type": "int32", "shape": [2], "data": "AQAAAAAAAAA="}),
        "columns: got 'output features out of range or order'",
    ),
    "bomb": (
        lambda d: weight(d)["layer"].update(shape=[2**31 - 1, 2**31 - 1]),
        "expected a mask in proportion to the file",
    ),
    "nested rest": (
        lambda d: weight(d)["layer"]["rest"].update(rest=weight(d)["layer"]["rest"].copy()),
        "rest: got 'one inside another'",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_under_a_right_digest(name: str) -> None:
    change, message = LIES[name]
    with pytest.raises(PlanFileError, match=message):
        plan_file.decode(changed(change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the text: got Expecting value"),
        (b"\x80\x04K\x01.", "the text: got .*utf"),
        (b"[]", "the text: got 'list', expected an object"),
        (b"[" * 100000, "the text: got .*, expected JSON"),
        (b'{"format": "fxprune.plan", "format": "fxprune.plan"}', "expected every key once"),
        (b'{"format": NaN}', "a number: got 'NaN', expected a finite one"),
        (b'{"format": ' + b"9" * 5000 + b"}", "expected JSON"),
    ],
)
def test_what_is_no_plan(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(text)
    with pytest.raises(PlanFileError, match=message) as caught:
        fxprune.load_plan(path)
    assert str(path) in str(caught.value) and "plan.save(path)" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="No such file"):
        fxprune.load_plan(tmp_path / "none.json")


# ---- corruption ----


def corrupted(text: bytes, gen: random.Random) -> bytes:
    """Flip, overwrite, insert, delete, repeat or cut a run of bytes."""
    data, how, at = bytearray(text), gen.randrange(6), gen.randrange(len(text))
    length = min(gen.choice((1, 1, 1, 2, 8, 64, 1000)), len(text) - at)
    if how == 0:
        data[at] ^= 1 << gen.randrange(8)
    elif how == 1:
        data[at : at + length] = gen.randbytes(length)
    elif how == 2:
        data[at:at] = bytes(gen.choice(b'0123456789AZaz+/=[]{}",: \n') for _ in range(length))
    elif how == 3:
        del data[at : at + length]
    elif how == 4:
        data[at:at] = data[at : at + length]
    else:
        del data[at:]
    return bytes(data)


def relied(text: bytes, gen: random.Random) -> bytes:
    """Change one value of the document and make the digest right again, so that only the checks are left."""
    document = json.loads(text)
    nodes: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            nodes.append((value, key))
            walk(value[key])

    walk(document["plan"])
    parent, key = gen.choice(nodes)
    value = parent[key]
    if isinstance(value, bool) or value is None:
        parent[key] = gen.choice([True, False, None, 0])
    elif isinstance(value, (int, float)):
        parent[key] = gen.choice([value + 1, value - 1, -1, 0, 2**31, 2**63, value * 2, 0.5])
    elif isinstance(value, str):
        parent[key] = gen.choice(["", value[:-1], value + "A", value[::-1], "A" * len(value), value.swapcase()])
    elif isinstance(value, list):
        parent[key] = gen.choice([[], value[:-1], value + value[:1], value[::-1]])
    else:
        parent[key] = gen.choice([None, {}, {k: v for k, v in value.items() if gen.random() < 0.8}])
    return json.dumps({**document, "sha256": plan_file._digest(document)}).encode()


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Return how many corrupted files were refused, equal to the original, and accepted although they lie."""
    gen, seen = random.Random(seed), {"refused": 0, "equal": 0, "other": 0}
    originals = [(made(name).plan, plan_file.encode(made(name).plan).encode()) for name in PATTERNS]
    for i in range(count):
        original, text = originals[i % len(originals)]
        lies = i // len(originals) % 4 == 3
        try:
            loaded = plan_file.decode((relied if lies else corrupted)(text, gen))
        except PlanFileError:
            seen["refused"] += 1
            continue
        if same_plan(loaded, original):
            seen["equal"] += 1
            continue
        assert lies, f"file {i} of seed {seed} was damaged and loads as another plan"
        seen["other"] += 1
        try:  # a lie that is a legal plan must work or be refused as any plan is
            model = fxprune.apply_plan(mobile(), loaded)
        except PlanMismatch:
            continue
        if seen["other"] % 8 == 0:
            call = compiled(model, **FORCED).call
            assert_exact(run(call, image()), run(model, image()), repro=f"file {i} of seed {seed}", most_zeros=1.0)
            torch._dynamo.reset()
    return seen


@pytest.mark.fuzz
def test_corrupted_files() -> None:
    count = 2 * int(os.environ.get("FXPRUNE_FUZZ", "300"))
    seen = fuzz(count, seed=count)
    assert sum(seen.values()) == count and seen["refused"] > count // 2 and seen["other"] > 0


def test_the_fuzz_sees_a_reader_that_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "_digest", lambda document: document.get("sha256", ""))
    with pytest.raises(AssertionError, match="was damaged and loads as another plan"):
        fuzz(400, seed=1)


def test_every_layer_field_is_checked() -> None:
    """A new field of LayerPlan needs a check in the reader: it is in the file at once."""
    assert {f.name for f in dataclasses.fields(fxprune.plan.LayerPlan)} == {
        "name", "parameter", "kind", "pattern", "shape", "target", "sparsity", "granularity", "counts", "columns", "note",
    }  # fmt: skip
