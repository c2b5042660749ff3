"""What the sources of the CUDA operators may not hold, so that CUDA graphs can record them and results repeat.

Read as text: without a GPU nothing else can tell. Planted lines prove that each rule sees its mistake.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINDINGS = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
LAUNCHERS = sorted(p for p in (ROOT / "csrc/cuda").iterdir() if p.suffix in (".cu", ".cuh", ".h"))
KERNELS = sorted((ROOT / "csrc/include/fxprune/cuda").glob("*.cuh"))
# pattern -> why not
WAITS = {
    r"cuda\w*Synchronize": "waits for the GPU",
    r"cudaMemcpy\w*\(": "copies from or to the host",
    r"cuda(Malloc|Free)\w*\(": "allocates beside torch",
    r"\.item\b|\bitem<|to_cpu|\.cpu\(": "reads a value back",
    r"cudaStreamLegacy|cudaStreamPerThread|cudaStreamDefault": "a stream that is not torch's",
    r"<<<[^;]*>>>": "a launch without a stream",  # one with four arguments is taken out before
    r"\batomic[A-Z]\w*\(|\bred\.global|\batom\.": "adds in no fixed order",
    r"\bint(32_t)?\s+\w+\s*=\s*(block|blocks)\(": "a grid index in 32 bits",
}
# macros and types that came to torch's stable headers after 2.11
NEWER = r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b"
LAUNCH = re.compile(r"<<<[^,;]+,[^,;]+,[^,;]+(\([^)]*\))?[^,;]*,\s*stream\s*>>>")


def mistakes(text: str) -> list[str]:
    code = LAUNCH.sub("", re.sub(r"//[^\n]*", "", text))
    return [why for pattern, why in WAITS.items() if re.search(pattern, code)]


def unguarded(text: str) -> list[str]:
    """Return the functions that ask for a stream, or allocate on it, without having made the GPU of x the current one."""
    code = re.sub(r"//[^\n]*", "", text)
    bodies = re.split(r"\n}\n", code)
    found = []
    for body in bodies:
        stream = body.find("current_stream(")
        if stream >= 0 and not 0 <= body.find("OnDeviceOf ") < stream:
            found.append(body.strip().splitlines()[0][:80])
    return found


def test_sources_take_nothing_newer_than_the_oldest_torch() -> None:
    """Newer headers are at hand here; what they add to the stable ABI of 2.11 would not compile there."""
    paths = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert [p.name for p in paths if re.search(NEWER, p.read_text())] == [] and len(paths) > 50
    assert re.search(NEWER, "STABLE_TORCH_ERROR_CODE_CHECK(call());")


@pytest.mark.parametrize("path", (*BINDINGS, *LAUNCHERS, *KERNELS), ids=lambda p: p.name)
def test_nothing_waits_or_depends_on_order(path: Path) -> None:
    assert mistakes(path.read_text()) == []


@pytest.mark.parametrize("path", BINDINGS, ids=lambda p: p.name)
def test_work_goes_to_the_stream_of_the_tensors_gpu(path: Path) -> None:
    assert unguarded(path.read_text()) == []


def test_every_operator_asks_for_a_stream() -> None:
    for path in BINDINGS:
        text = path.read_text()
        assert ("_cuda(" in text) <= ("current_stream(" in text), path.name
        assert len(re.findall(r"OnDeviceOf guard", text)) >= 1, path.name


PLANTED = (
    "cudaStreamSynchronize(stream);", "cudaMemcpyAsync(a, b, n, cudaMemcpyDeviceToHost, stream);", "cudaMalloc(&p, 8);",
    "const int rows = tile_ptr.item<int>();", "entry<Kernel><<<blocks, threads, bytes, cudaStreamPerThread>>>(a);",
    "entry<Kernel><<<blocks, threads>>>(a);", "atomicAdd(out, v);", "const int i = block(0) * kThreads + thread();",
)  # fmt: skip


@pytest.mark.parametrize("line", PLANTED)
def test_planted_lines_are_seen(line: str) -> None:
    text = (ROOT / "csrc/cuda/launch.cuh").read_text()
    assert mistakes(text) == []
    assert mistakes(text.replace("check_cuda(cudaGetLastError()", f"{line}\n    check_cuda(cudaGetLastError()"))


def test_a_missing_guard_is_seen() -> None:
    path = ROOT / "csrc/cuda/nm_gemm_op.cpp"
    text = path.read_text()
    assert unguarded(text.replace("  const OnDeviceOf guard(x);\n", "")) != []
