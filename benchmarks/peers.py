"""Dense runtimes that are not PyTorch: ONNX Runtime and OpenVINO, on the weights they are given.

A runtime that is not installed, or that cannot take a model, raises: the cell is then "not comparable", never a win.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[..., Any]


def onnxruntime(model: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """Return a session on the model's ONNX export, with as many threads as torch has."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), quiet():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, tuple(inputs), path, dynamo=True, verbose=False)
        return session(path)


def session(path: Path) -> Run:
    """Return ONNX Runtime's session of a file, with as many threads as torch has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in found.get_inputs()]
    return lambda *args: tensors(found.run(None, {n: a.numpy() for n, a in zip(names, args, strict=True)}))


def openvino(model: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """Return a compiled model for latency in the model's type, with as many threads as torch has.

    bfloat16 inputs are given as they are: converting them here would wake torch's threads, which then spin beside the
    runtime's own.
    """
    import openvino as ov
    from openvino.preprocess import PrePostProcessor

    half = next(model.parameters()).dtype == torch.bfloat16
    if half:  # the runtime rounds weights and activations itself
        model, inputs = copy.deepcopy(model).float(), [t.float() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad(), quiet():
        example = tuple(inputs) if len(inputs) > 1 else inputs[0]
        converted = ov.convert_model(model, example_input=example, input=[tuple(t.shape) for t in inputs])
        if half:
            stage = PrePostProcessor(converted)
            for number, t in enumerate(inputs):
                if t.is_floating_point():
                    stage.input(number).tensor().set_element_type(ov.Type.bf16)
            converted = stage.build()
        settings = {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32", "PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        request = ov.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def given(t: Tensor) -> Any:
        return ov.Tensor(t.view(torch.int16).numpy(), t.shape, ov.Type.bf16) if t.dtype == torch.bfloat16 else t.numpy()

    def run(*args: Tensor) -> Any:
        results = request.infer([given(a) for a in args], share_inputs=True, share_outputs=True)
        return tensors(list(results.values()))

    return run


PEERS: dict[str, Callable[[nn.Module, Sequence[Tensor]], Run]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def tensors(arrays: Sequence[Any]) -> tuple[Tensor, ...]:
    """View a runtime's outputs as tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arrays of a runtime may be read-only; nobody writes to them
        return tuple(torch.from_numpy(a) for a in arrays)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what exporters print."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
