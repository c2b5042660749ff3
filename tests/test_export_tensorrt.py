"""TensorRT on a machine without it: what is handed over, to functions with the signatures of Torch-TensorRT 2.13, and what
is said where it is missing. tests/gpu builds engines where it is not."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.lowering import tensorrt
from torch import Tensor, nn
from torch._dynamo.backends import registry
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

import fxprune
from fxprune import cli
from fxprune.config import Config
from fxprune.errors import ConfigError, MissingPackage
from fxprune.export import sparse_program
from tests.oracle import assert_exact
from tests.test_export import MODELS
from tests.toys import image, mlp, mobile, pruned, rows, run

REPORT = """
The graph consists of 7 Total Operators, of which 6 operators are supported, 85.71% coverage
    TRT Engine #1 - Submodule name: _run_on_acc_0
    TRT Engine #2 - Submodule name: _run_on_acc_2
"""
ENGINES = {"fallback": "tensorrt", "freeze": True, "autotune": "off", "min_speedup": 0.0}


@pytest.fixture(autouse=True)
def fresh_compiles() -> None:
    torch._dynamo.reset()


class Input:
    """torch_tensorrt.Input of a range of shapes."""

    def __init__(self, *, min_shape: Sequence[int], opt_shape: Sequence[int], max_shape: Sequence[int], dtype: Any) -> None:
        self.range = (tuple(min_shape), tuple(opt_shape), tuple(max_shape), dtype)


class Package(types.SimpleNamespace):
    """A module ``torch_tensorrt`` that records its calls; a compiled program is the program itself."""

    def __init__(self) -> None:
        super().__init__(Input=Input, dynamo=types.SimpleNamespace(compile=self.compile), dry=0)

    def compile(
        self,
        exported_program: ExportedProgram,
        inputs: Sequence[Any] | None = None,
        *,
        arg_inputs: Sequence[Any] | None = None,
        kwarg_inputs: Mapping[str, Any] | None = None,
        min_block_size: int = 5,
        dryrun: bool | str = False,
    ) -> ExportedProgram:
        assert inputs is None or arg_inputs is None
        if isinstance(dryrun, str):
            print(REPORT)
            Path(dryrun).write_text(REPORT)
            self.dry += 1
        self.program, self.args, self.kwargs, self.block = exported_program, arg_inputs, kwarg_inputs, min_block_size
        return exported_program

    def save(
        self,
        module: Any,
        file_path: str = "",
        *,
        output_format: str = "exported_program",
        arg_inputs: Sequence[Any] | None = None,
        kwarg_inputs: Mapping[str, Any] | None = None,
        dynamic_shapes: Any = None,
    ) -> None:
        Path(file_path).write_text(output_format)
        self.saved = (module, arg_inputs, kwarg_inputs, dynamic_shapes)

    def backend(self, gm: GraphModule, sample_inputs: Sequence[Any], *, options: Mapping[str, Any]) -> Callable[..., Any]:
        self.graph, self.inputs, self.options = gm, sample_inputs, options
        return gm.forward


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    """On any device: the CPU stands for the GPU."""
    module = Package()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)  # type: ignore[misc]
    register(monkeypatch, module.backend)
    monkeypatch.setattr(tensorrt, "check_device", lambda *_: None)
    return module


def register(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Make ``run`` the backend that importing torch_tensorrt would register."""

    def backend(gm: GraphModule, inputs: Sequence[Any], **more: Any) -> Callable[..., Any]:
        return run(gm, inputs, **more)  # type: ignore[no-any-return]

    backend._tags = ()  # type: ignore[attr-defined]
    monkeypatch.setitem(registry._BACKENDS, "torch_tensorrt", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "torch_tensorrt", backend)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    fxprune.register()
    return torch.compile(model, backend="hwprune", options={**ENGINES, **options})  # type: ignore[return-value]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingPackage, match=r'^MissingPackage: format="torch_tensorrt" needs .*fxprune\[tensorrt\]'):
        fxprune.export(mobile(), image(), tmp_path / "m.trt", format="torch_tensorrt")
    with pytest.raises(Exception, match=r'fallback="tensorrt" needs torch_tensorrt with TensorRT and a GPU \('):
        run(compiled(pruned(mlp(), rows())), rows())


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", Package())  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"'device' got 'cpu'; expected a model and inputs on \"cuda\""):
        fxprune.export(mobile(), image(), tmp_path / "m.trt", format="torch_tensorrt")
    with pytest.raises(Exception, match=r'on "cuda" for fallback="tensorrt"'):
        run(compiled(pruned(mlp(), rows())), rows())


def test_the_compiler_gets_standard_operators_and_the_inputs(tmp_path: Path, package: Package) -> None:
    model, options = pruned(mobile(), image(), granularity=8), {"min_block_size": 2}
    written = fxprune.export(model, image(), tmp_path / "m.trt", format="torch_tensorrt", tensorrt=options)
    assert (tmp_path / "m.trt").read_text() == "exported_program" and package.saved[0] is package.program
    names = {getattr(n.target, "namespace", "aten") for n in package.program.graph.nodes if n.op == "call_function"}
    assert names <= {"aten", "_operator"}
    (x,) = package.args or ()
    assert torch.equal(x, image()) and package.kwargs == {} and package.block == 2 and package.saved[3] is None
    assert_exact(run(package.program.module(), x), run(model, x))
    assert str(written).endswith("3 of 3 matches run sparse kernels; TensorRT takes 6 of 7 operators, in 2 engines")
    assert package.dry == 1 and written.partition is not None and written.partition.operators == (6, 7)


def test_a_report_of_another_form() -> None:
    assert str(tensorrt.Partition("\n100 % coverage\n")) == "100 % coverage"


def test_keyword_arguments(tmp_path: Path, package: Package) -> None:
    build, inputs_of, _ = MODELS["convolutions"]
    model, inputs = build(), inputs_of(2)
    fxprune.prune(model, inputs, sparsity=0.5, inplace=True)
    fxprune.export(model, inputs, tmp_path / "m.trt", format="torch_tensorrt")
    assert package.args == [] and {k: v.shape for k, v in (package.kwargs or {}).items()} == {
        k: v.shape for k, v in inputs.items()
    }


def test_free_sizes_are_ranges(tmp_path: Path, package: Package) -> None:
    model, shapes = pruned(mobile(), image(), granularity=8), ({0: Dim("batch", min=1, max=8)},)
    fxprune.export(model, image(), tmp_path / "m.trt", format="torch_tensorrt", dynamic_shapes=shapes)
    (specification,) = package.args or ()
    assert specification.range == ((1, 16, 8, 8), (2, 16, 8, 8), (8, 16, 8, 8), torch.float32)
    assert package.saved[3] is shapes and torch.equal(package.saved[1][0], image())
    with pytest.raises(ConfigError, match=r"'dynamic_shapes' got 's\d+ from 1 up'; expected an upper bound"):
        fxprune.export(model, image(), tmp_path / "m.trt", format="torch_tensorrt", dynamic_shapes="batch")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "recurrent"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch about its own copies
def test_every_operator_has_a_converter(name: str) -> None:
    """Recurrent steps have not: the places of their weights are computed, by operators that PyTorch runs."""
    listed = (Path(__file__).parent / "tensorrt_converters.txt").read_text().splitlines()
    known = {line for line in listed if not line.startswith("#")}
    build, inputs_of, _ = MODELS[name]
    model, inputs = build(), inputs_of(2)
    fxprune.prune(model, inputs, sparsity=0.5, inplace=True)
    program, ctx = sparse_program(model, inputs, Config(autotune="off", min_speedup=0.0), None, True)
    assert all(d.chosen for d in ctx.decisions if d.mask is not None) and ctx.counts["decompose"] > 0
    used = {str(n.target) for n in program.run_decompositions().graph.nodes if n.op == "call_function"}
    assert used <= known, used - known


def test_the_rest_of_a_graph_goes_to_engines_with_constant_weights(package: Package) -> None:
    model = pruned(mobile(), image(), granularity=8)
    assert_exact(run(compiled(model, tensorrt={"min_block_size": 1}), image()), run(model, image()))
    assert [n.op for n in package.graph.graph.nodes if n.op == "placeholder"] == ["placeholder"]
    assert len(package.inputs) == 1 and torch.equal(package.inputs[0], image())
    assert package.options == {"pass_through_build_failures": True, "min_block_size": 1}
    ours = [n for n in package.graph.graph.nodes if getattr(n.target, "namespace", "") == "fxprune"]
    assert len(ours) == 1 and isinstance(getattr(package.graph, str(ours[0].args[1][0].target), None), Tensor)  # type: ignore[index,union-attr]


def test_a_dense_graph_goes_there_whole(package: Package) -> None:
    model = mlp()
    fast = compiled(model)
    assert_exact(run(fast, rows()), run(model, rows()))
    assert len(package.inputs) == 1 and not [n for n in package.graph.graph.nodes if "fxprune" in str(n.target)]
    other = mlp(seed=3)  # of the same class: Dynamo may share the graph, which holds the weights of the first
    assert_exact(run(compiled(other), rows()), run(other, rows()))
    assert_exact(run(fast, rows()), run(model, rows()))


def test_what_engines_cannot_do(package: Package) -> None:
    with pytest.raises(ConfigError, match=r"'freeze' got False; expected True beside fallback=\"tensorrt\""):
        Config(fallback="tensorrt")
    with pytest.raises(ConfigError, match=r"'tensorrt' got 3; expected a dict"):
        Config(tensorrt=3)  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"'fallback' got 'tensorrt'; expected inference"):
        compiled(mlp())(rows())


def test_a_failing_build_is_an_error(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("no engine")

    register(monkeypatch, fails)
    with pytest.raises(Exception, match="no engine"):
        run(compiled(mlp()), rows())


def test_the_command_prints_the_partition(tmp_path: Path, package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model.py"
    source.write_text("import torch\ndef build():\n    return torch.nn.Linear(8, 8), torch.ones(2, 8)\n")
    given = ["export", f"{source}:build", "-o", str(tmp_path / "m.trt"), "--format", "torch_tensorrt"]
    assert cli.main(given) == 0 and "TensorRT takes 6 of 7" in capsys.readouterr().out
    assert cli.main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["partition"].startswith("TensorRT takes 6 of 7")
