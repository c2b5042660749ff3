"""Compare what every CUDA kernel needs of the GPU with csrc/cuda/resources.json: registers, spills, instructions.

    python tools/cuda_resources.py [--write] [--if-changed]

Compiles the CUDA library for all its targets (only what changed) and reads the assembler's report: registers, stack and
spilled bytes by kernel and target. Where cuobjdump is found it also counts machine instructions (HGMMA, HMMA, LDGSTS,
bulk copies, local memory), and those that a depthwise kernel executes per output with every tap kept. More registers
than the table allows, any spill, an expected instruction that is gone, or more per output than the targets is a failure;
--write records what is there, with a digest of what it was made from; with --if-changed nothing is compiled where that
is what there is: the same compiler would make the same of it. Needs nvcc, no GPU; cuobjdump and nvdisasm also come as
PyPI packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "csrc/cuda/resources.json"
MADE_FROM = TABLE.with_suffix(".sha256")
# instructions that are counted, by the beginning of their name in the disassembly
COUNTED = ("HGMMA", "HMMA", "LDGSTS", "UBLKCP", "LDSM", "SYNCS", "FFMA", "LDL", "STL")
# what must be there, by a part of the kernel's name, on the targets that have it
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "TileGemmMma": {"sm_90a": ("HMMA", "LDGSTS", "LDSM"), "sm_80": ("HMMA", "LDGSTS", "LDSM")},
    "TileGemmResident": {"sm_90a": ("HMMA", "LDGSTS", "LDSM"), "sm_80": ("HMMA", "LDGSTS", "LDSM")},
    "TileGemmFfma": {"sm_90a": ("FFMA", "LDGSTS"), "sm_80": ("FFMA", "LDGSTS")},
    "TileGemmTf32": {"sm_90a": ("HMMA", "LDGSTS"), "sm_80": ("HMMA", "LDGSTS")},
    "Dsconv": {"sm_90a": ("HMMA", "LDGSTS", "LDSM", "FFMA"), "sm_80": ("HMMA", "LDGSTS", "LDSM", "FFMA")},
    "TileGemmHalved": {"sm_90a": ("HMMA", "LDGSTS", "LDSM"), "sm_80": ("HMMA", "LDGSTS", "LDSM")},
    "DepthwiseTiles": {"sm_90a": ("FFMA", "LDGSTS"), "sm_80": ("FFMA", "LDGSTS")},
}
for _element in ("Bfloat", "Half"):
    EXPECTED[f"NmGemm-{_element}"] = EXPECTED["TileGemmMma"]
    for _features in (128, 256):  # 1: under a window, whose pixels come through registers
        for _windowed, _copies in ((0, ("LDGSTS",)), (1, ())):
            _kernel = f"TileGemmWgmma-{_element}-{_features}-{_windowed}"
            EXPECTED[_kernel] = {"sm_90a": ("HGMMA", "UBLKCP", "SYNCS", *_copies)}
for _kernel in ("TileInputGradient", "TileWeightGradient"):
    for _element in ("Bfloat", "Half"):
        EXPECTED[f"{_kernel}-{_element}"] = EXPECTED["TileGemmMma"]
    EXPECTED[f"{_kernel}-float"] = EXPECTED["TileGemmFfma"]
FORBIDDEN = ("LDL", "STL")
# A block may take as many registers as its threads start with, and these kernels take all of them: with fewer they hang.
STARTING = {"TileGemmWgmma": {"sm_90a": 168}}
# DepthwiseTiles with stride 1 in 16 bits, by (window, rows of a thread): instructions per output, every tap kept
PER_OUTPUT = {("3", "4"): 16.0, ("5", "8"): 30.0, ("7", "8"): 55.0}
DEPTHWISE = re.compile(r"DepthwiseTiles-(Bfloat|Half)-(\d)-1-(\d)-0 sm_90a")
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table by what was found")
    parser.add_argument("--if-changed", action="store_true", help="compile only what the table was not made from")
    options = parser.parse_args()
    nvcc = os.environ.get("NVCC", "nvcc").split()[0]
    if shutil.which(nvcc) is None:
        print(f"cuda-resources: skipped, there is no {nvcc}")
        return 0
    if options.if_changed and MADE_FROM.read_text().strip() == made_from(version()):
        print("cuda-resources: the table was made from these kernels by this compiler")
        return 0
    objects = build()
    found = resources(objects)
    disassembler = find_cuobjdump()
    instructions = count_instructions(disassembler, objects) if disassembler else {}
    if disassembler is None:
        print("cuda-resources: instructions not counted, there is no cuobjdump")
    for key, counts in instructions.items():
        found.setdefault(key, {}).update(counts)
    if options.write:
        rows = (f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(found.items()))
        TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")  # a row per line
        MADE_FROM.write_text(made_from(version()) + "\n")
        print(f"cuda-resources: wrote {len(found)} rows")
        return 0
    problems = compare(found, json.loads(TABLE.read_text()), bool(instructions))
    print("\n".join(problems) or f"cuda-resources: {len(found)} kernels as in the table")
    return 1 if problems else 0


def build() -> list[Path]:
    """Compile the CUDA library; return its objects."""
    env = {**os.environ, "FXPRUNE_CUDA": "1"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "build/cuda"]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    logs = sorted((ROOT / "build").glob("obj-*/*.cu.log"), key=lambda p: p.stat().st_mtime)
    if not logs:
        raise SystemExit("cuda-resources: the build left no report of the assembler")
    folder = logs[-1].parent  # that of this build's flags: the last one written to
    return [folder / f"{source.name}.o" for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]


def version() -> str:
    nvcc = os.environ.get("NVCC", "nvcc").split()
    return subprocess.run([*nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def made_from(compiler: str) -> str:
    """Return a digest of all that the table depends on: the compiler and its options, the sources, and its own text."""
    command = [sys.executable, "-c", "import setup; print(setup.NVCC_FLAGS, setup.NVCC_TARGETS)"]
    options = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256((compiler + options).encode())
    for path in (TABLE, *sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sources() -> list[Path]:
    """Return the CUDA files that kernels are in, and all of ours that they include."""
    found: set[Path] = set()
    waiting = list((ROOT / "csrc/cuda").glob("*.cu"))
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'#include "(.+)"', path.read_text())
            waiting += [p for name in names for p in (ROOT / "csrc" / name, ROOT / "csrc/include" / name) if p.is_file()]
    return sorted(found)


def resources(objects: list[Path]) -> dict[str, Row]:
    """Return registers, stack and spilled bytes by "kernel target"."""
    rows: dict[str, Row] = {}
    for path in objects:
        rows.update(parse_report(path.with_suffix(".log").read_text()))
    return rows


def parse_report(text: str) -> dict[str, Row]:
    """Read what ``ptxas -v`` says. Warnings about lost performance are an error."""
    rows: dict[str, Row] = {}
    key = ""
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            key = f"{kernel_name(entry[1])} {entry[2]}"
            rows[key] = {}
        elif spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            rows[key].update(stack=int(spill[1]), spilled=int(spill[2]) + int(spill[3]))
        elif used := re.search(r"Used (\d+) registers", line):
            rows[key]["registers"] = int(used[1])
        elif "C75" in line or "Performance Loss" in line:
            raise SystemExit(f"cuda-resources: {line}")
    return rows


def kernel_name(mangled: str) -> str:
    """Return a readable name: the kernel's identifiers and numbers out of the mangled one."""
    body = mangled.partition("5entryI")[2].partition("EEvN")[0]
    parts = []
    while body:
        if digits := re.match(r"(\d+)", body):
            start = len(digits[1])
            length = int(digits[1])
            parts.append(body[start : start + length])
            body = body[start + length :]
        elif number := re.match(r"L[ijb](\d+)E", body):
            parts.append(number[1])
            body = body[number.end() :]
        elif letter := re.match(r"I([fjt])", body):
            parts.append({"f": "float", "j": "word", "t": "half-word"}[letter[1]])
            body = body[letter.end() :]
        else:
            body = body[1:]
    return "-".join(p for p in parts if p and p not in ("fxprune", "gpu"))


def count_instructions(tool: str, objects: list[Path]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for path in objects:
        beside = os.pathsep.join((os.environ.get("PATH", ""), str(Path(tool).parent)))  # it calls nvdisasm
        done = subprocess.run([tool, "-sass", path], capture_output=True, text=True, env={**os.environ, "PATH": beside})
        if done.returncode != 0:
            raise SystemExit(f"cuda-resources: {tool} -sass {path.name}: {(done.stderr or done.stdout).strip()[-300:]}")
        text = done.stdout
        rows.update(parse_sass(text))
    return rows


def parse_sass(text: str) -> dict[str, Row]:
    """Count the instructions of COUNTED by "kernel target"."""
    counts: dict[str, Counter[str]] = {}
    code: dict[str, list[str]] = {}
    target, key = "", ""
    for line in text.splitlines():
        if arch := re.match(r"arch = (\S+)", line):
            target = arch[1]
        elif function := re.search(r"Function : (\S+)", line):
            key = f"{kernel_name(function[1])} {target}"
            counts[key], code[key] = Counter(), []
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", line):
            code[key].append(line.partition("*/")[2].partition(";")[0].strip())
            name = next((n for n in COUNTED if instruction[1].startswith(n)), None)
            if name and key:
                counts[key][name] += 1
    rows: dict[str, Row] = {key: {name: c[name] for name in COUNTED} for key, c in counts.items()}
    for key, lines in code.items():
        if found := DEPTHWISE.fullmatch(key):
            outputs = int(found[3]) * 8
            rows[key]["per_output"] = round(executed(lines, int(found[2]) ** 2 * outputs) / outputs, 1)
    return rows


def executed(code: list[str], products: int) -> int:
    """Return the instructions from the last barrier to the last of so many multiply-adds, no branch over a tap taken.

    Instructions are 16 bytes each. What follows, activation and stores, is not counted.
    """
    at = max(i for i, line in enumerate(code) if line.startswith("BAR.SYNC")) + 1
    count = 0
    while products and at < len(code):
        line = code[at]
        count, at = count + 1, at + 1
        products -= line.startswith("FFMA")
        if jump := re.match(r"BRA (?:`\()?0x([0-9a-f]+)", line):
            at = int(jump[1], 16) // 16
    if products:
        raise SystemExit("cuda-resources: the product of a depthwise kernel does not look as expected")
    return count


def compare(found: dict[str, Row], table: dict[str, Row], counted: bool) -> list[str]:
    """Return a line for each way in which ``found`` is worse than ``table``, or differs in what there is."""
    problems = [f"{key}: not in the table (run with --write)" for key in sorted(found.keys() - table.keys())]
    problems += [f"{key}: gone, but in the table (run with --write)" for key in sorted(table.keys() - found.keys())]
    for key in sorted(found.keys() & table.keys()):
        row, allowed = found[key], table[key]
        if row["spilled"]:
            problems.append(f"{key}: {row['spilled']} bytes spilled, none are allowed")
        least = next((by.get(key.rpartition(" ")[2], 0) for name, by in STARTING.items() if name in key), 0)
        if row["registers"] < least:
            problems.append(f"{key}: starts with {row['registers']} registers, and its setmaxnreg needs {least}")
        for what in ("registers", "stack"):
            if row[what] > allowed[what]:
                problems.append(f"{key}: {row[what]} {what}, the table has {allowed[what]}")
        if counted:
            problems += [f"{key}: {row[name]} {name}, none are allowed" for name in FORBIDDEN if row.get(name)]
            problems += [f"{key}: no {name}" for name in expected(key) if not row.get(name)]
        if (shape := DEPTHWISE.fullmatch(key)) and "per_output" in row:
            most = PER_OUTPUT.get((shape[2], shape[3]), row["per_output"])
            if row["per_output"] > most:
                problems.append(f"{key}: {row['per_output']} instructions per output, the target is {most}")
    return problems


def expected(key: str) -> tuple[str, ...]:
    kernel, _, target = key.rpartition(" ")
    return next((by_target.get(target, ()) for name, by_target in EXPECTED.items() if name in kernel), ())


def find_cuobjdump() -> str | None:
    """Return cuobjdump: FXPRUNE_CUOBJDUMP, on the path, beside nvcc, or from the PyPI package nvidia-cuda-cuobjdump."""
    beside = [Path("/usr/local/cuda/bin/cuobjdump"), *(Path(p) / "nvidia/cu13/bin/cuobjdump" for p in sys.path)]
    named = os.environ.get("FXPRUNE_CUOBJDUMP") or shutil.which("cuobjdump")
    return named or next((str(p) for p in beside if p.is_file()), None)


if __name__ == "__main__":
    sys.exit(main())
