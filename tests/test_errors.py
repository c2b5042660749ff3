"""Every error class is reached through the public API, and its message says what was given, expected and to do."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.lower import lower
from torch import nn
from torch.nn.utils.prune import l1_unstructured

import fxprune
from fxprune import errors, model_spec
from fxprune.backend import hwprune
from fxprune.capture import capture
from fxprune.errors import FxPruneError, FxPruneWarning, nearest
from fxprune.sparsity import get
from tests.oracle import FORCED
from tests.toys import mlp, pruned, rows


def corrupted() -> object:
    pattern = get("tile")
    weight = torch.ones(8, 4)
    tiling = pattern.tiles((8, 4), 4)
    packed = pattern.pack(weight, torch.ones(8, 4, dtype=torch.bool), tiling)
    packed.tensors["index"][0] = 99
    return pattern.unpack(packed)


def dense_though_required() -> object:
    model = pruned(mlp(), rows(), granularity=4)  # tiles of one layer differ, so every channel is read and stays
    (graph,) = capture(model, rows())
    with torch.no_grad():
        return hwprune(graph.gm, graph.inputs, options={**FORCED, "require_sparse": True, "min_speedup": 100})


def without_kernels() -> object:
    graph = torch.fx.Graph()
    graph.call_function(torch.ops.fxprune.tile_pack.default, ())
    return lower(torch.fx.GraphModule(nn.Module(), graph), KernelTables(tables=()))


def with_nan() -> object:
    model = mlp()
    model[0].weight.data[3, 3] = float("nan")
    return fxprune.prune(model, rows(), sparsity=0.5)


def masked() -> nn.Module:
    """The first of two layers has a mask of torch.nn.utils.prune."""
    model = mlp()
    l1_unstructured(model[0], "weight", 0.5)
    return model


def without_onnx() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        return fxprune.export(mlp(), rows(), "m.onnx", format="onnx")


def ever_worse() -> object:
    values = itertools.count()
    return fxprune.prune(mlp(), rows(), sparsity=0.5, eval_fn=lambda _: -next(values), max_drop=0.5)


def stale_optimizer() -> object:
    pruner = fxprune.Pruner(mlp(), rows(), sparsity=0.5)
    torch.optim.SGD(mlp().parameters(), lr=0.1).step()
    return pruner.step()


def train_half() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    schedule = fxprune.OneShotSchedule(1)
    pruner = fxprune.Pruner(model, rows(), sparsity=0.5, schedule=schedule, importance="taylor")
    model(rows()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    pruner.step()


def train_one_layer() -> object:
    model = nn.Sequential(nn.Linear(4, 8))
    return torch.compile(model, backend=hwprune, options={**FORCED, "grad_sparsity": "2:4"})(torch.ones(2, 4))


CASES: dict[str, tuple[Callable[[], object], str, type[Exception]]] = {
    "ConfigError": (
        lambda: fxprune.Config(fallback="aot_eager"),
        r"option 'fallback' got 'aot_eager'; expected one of 'inductor', 'eager', 'tensorrt'\.",
        ValueError,
    ),
    "UnknownOption": (
        lambda: fxprune.explain(mlp(), rows(), minspeedup=1),
        r"unknown option 'minspeedup'; did you mean 'min_speedup'\? Legal options: sparsity, .*, inductor, .*\.",
        TypeError,
    ),
    "UnknownPattern": (
        lambda: fxprune.prune(mlp(), rows(), sparsity=0.5, pattern="tile-wise"),
        r"unknown pattern 'tile-wise'; did you mean 'tile'\? Legal patterns: .*tile",
        ValueError,
    ),
    "UnknownLayer": (
        lambda: fxprune.prune(mlp(), rows(), sparsity=0.5, ignored_layers=("linaer*",)),
        r"'linaer\*' in ignored_layers matches no kind and no prunable layer; did you mean 'linear'\? Kinds: depthwise",
        ValueError,
    ),
    "TileMismatch": (
        lambda: get("dcp").tiles((8, 3, 3, 3)),
        r"weight \(8, 3, 3, 3\) cannot be tiled by granularity 32: it has 3 inputs per channel.* Use pattern 'tile'\.",
        ValueError,
    ),
    "PackedFormatError": (
        corrupted,
        r"index: got .*99.*, expected 0\.\.3 \(the packed weight is corrupt or not ours\)",
        ValueError,
    ),
    "PlanFileError": (
        lambda: fxprune.load_plan(__file__),
        r"test_errors\.py: the text: got Extra data.*, expected JSON\. Save the plan again with plan\.save\(path\)",
        ValueError,
    ),
    "PlanMismatch": (
        lambda: fxprune.apply_plan(nn.Linear(3, 2), fxprune.prune(mlp(), rows(), sparsity=0.5).plan),
        r"the plan does not fit the model: 2 of 2 parameter\(s\): '0\.weight' is missing, did you mean 'weight'\?; ",
        ValueError,
    ),
    "ExportFileError": (
        lambda: fxprune.load(__file__),
        r"test_errors\.py cannot be loaded: it is no readable archive .*Export the model again with fxprune\.export\.",
        ValueError,
    ),
    "ModelSpecError": (
        lambda: model_spec.build("resnet50"),
        r"model 'resnet50': it is none of the known forms\. Known forms: timm:NAME, hf:CONFIG .*, or PROGRAM\.pt2\.",
        ValueError,
    ),
    "MissingPackage": (
        without_onnx,
        r"format=\"onnx\" needs onnx, onnxscript, which is not installed\. Run: pip install 'fxprune\[onnx\]'\.",
        ImportError,
    ),
    "NothingToPrune": (
        lambda: fxprune.prune(nn.ReLU(), rows(), sparsity=0.5),
        r"no convolution, linear or recurrent layer among .* kinds: depthwise, pointwise, conv, linear, rnn\.",
        ValueError,
    ),
    "CaptureError": (
        lambda: fxprune.prune(mlp(), torch.ones(2, 31), sparsity=0.5),
        r"could not be captured on example_inputs \[\(2, 31\)\]: .*a tuple is positional arguments",
        RuntimeError,
    ),
    "NonFiniteWeight": (with_nan, r"weight '0' holds 1 non-finite values.*ignored_layers=\('0',\)", ValueError),
    "MissingCalibration": (
        lambda: fxprune.prune(mlp(), rows(), sparsity=0.5, importance="wanda"),
        r"importance='wanda' needs calibration data\. Pass calibration=\[batch, \.\.\.\] to fxprune\.prune",
        ValueError,
    ),
    "CalibrationError": (
        lambda: fxprune.prune(mlp(), rows(), sparsity=0.5, importance="wanda", calibration=[rows().double()]),
        r"the calibration data cannot be used: the model failed on batch 0 of \[\(4, 32\)\].*\. A batch is what the model",
        ValueError,
    ),
    "DropTooLarge": (
        ever_worse,
        r"no sparsity keeps eval_fn within max_drop=0\.5: dense 0, and -\d+ at 0\.8% of the sparsity asked for.* Raise",
        ValueError,
    ),
    "WrongOptimizer": (
        stale_optimizer,
        r"the optimizer that stepped holds none of the 2 parameters to prune \(such as '0\.weight'\).* after the model was",
        RuntimeError,
    ),
    "StateMismatch": (
        lambda: fxprune.Pruner(mlp(), rows(), sparsity=0.5).load_state_dict({"version": 7}),
        r"the saved state of a Pruner cannot be loaded: version: got 7, expected 1\.",
        ValueError,
    ),
    "NotLowered": (
        without_kernels,
        r"fxprune::tile_pack: no implementation supports it: none is registered\.",
        RuntimeError,
    ),
    "RequireSparse": (
        dense_though_required,
        r"require_sparse=True, but 2 pruned layer\(s\) stay dense: 0 \(kept dense",
        RuntimeError,
    ),
    "VerificationError": (
        lambda: fxprune.verify(mlp(), rows(), compiled=lambda x: x),
        r"verify: output 0: got torch.float32 \(4, 32\), expected torch.float32 \(4, 16\)\.",
        AssertionError,
    ),
}


WARNINGS: dict[str, tuple[Callable[[], object], str]] = {
    "ComputedWeight": (
        lambda: fxprune.prune(masked(), rows(), sparsity=0.5),
        r"1 layer\(s\) are left as they are, because their weight is computed .*: 0\. .*torch\.nn\.utils\.prune\.remove",
    ),
    "NoGradientPruned": (
        train_one_layer,
        r"NoGradientPruned: grad_sparsity='2:4' prunes nothing in this graph: 0: dense, its input needs no gradient\. Leave",
    ),
    "NotScored": (
        train_half,
        r"NotScored: importance='taylor' saw no gradient of '0\.weight' in the 10 steps before .* round\. .* ignored_layers",
    ),
    "TargetNotReached": (
        lambda: fxprune.prune(mlp(), rows(), target_speedup=1000.0, fallback="eager", autotune="off"),
        r"TargetNotReached: .* target .* ms: not reached .* Allow more with max_sparsity=",
    ),
}


def classes() -> dict[str, type[FxPruneError]]:
    found = inspect.getmembers(errors, lambda v: inspect.isclass(v) and issubclass(v, FxPruneError))
    return {name: value for name, value in found if value is not FxPruneError}


def test_the_table_covers_every_class() -> None:
    assert sorted(CASES) == sorted(classes())


def test_the_table_covers_every_warning() -> None:
    found = inspect.getmembers(errors, lambda v: inspect.isclass(v) and issubclass(v, FxPruneWarning))
    assert sorted(WARNINGS) == [name for name, value in found if value is not FxPruneWarning]


@pytest.mark.parametrize("name", WARNINGS)
def test_warning_and_message(name: str) -> None:
    call, message = WARNINGS[name]
    with pytest.warns(getattr(errors, name), match=message) as caught:
        call()
    assert [warning.category.__name__ for warning in caught] == [name]


@pytest.mark.parametrize("name", CASES)
def test_class_and_message(name: str) -> None:
    call, message, builtin = CASES[name]
    with pytest.raises(classes()[name], match=message) as caught:
        call()
    assert type(caught.value) is classes()[name] and str(caught.value).startswith(f"{name}: ")
    assert isinstance(caught.value, builtin) and caught.value.fields


def test_capture_error_keeps_the_cause() -> None:
    with pytest.raises(errors.CaptureError) as caught:
        fxprune.explain(mlp(), torch.ones(2, 31))
    assert caught.value.__cause__ is not None and "31" in str(caught.value.__cause__)


def test_where_is_appended_in_brackets() -> None:
    error = errors.ConfigError(name="a", given=1, expected="2", where="layer, file.py:3")
    assert str(error).endswith("expected 2. [layer, file.py:3]")


@pytest.mark.parametrize(
    ("word", "words", "expected"), [("tiel", ["dcp", "tile"], "tile"), ("x", ["b", "a"], "b"), ("x", [], "?")]
)
def test_nearest(word: str, words: list[str], expected: str) -> None:
    assert nearest(word, words) == expected


def test_the_warning_of_a_missing_library_is_ours(root: Path) -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import fxprune
from fxprune.errors import FxPruneWarning
ours = [w for w in seen if issubclass(w.category, FxPruneWarning)]
assert len(ours) == 1 and "does not exist" in str(ours[0].message), seen
"""
    env = {**os.environ, "PYTHONPATH": str(root), "FXPRUNE_LIBRARY": str(root / "nowhere.so")}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
