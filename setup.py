"""Builds fxprune/_C_cpu.so, and _C_cuda.so where it is wanted: plain shared libraries on torch's stable ABI.

Only torch's headers are needed, and torch is located without importing it, so that ``pip install .`` never downloads
one. Without a compiler or without the headers the package is built Python-only and runs on its references.
The CUDA library is built when this machine has a GPU and nvcc, or when FXPRUNE_CUDA=1; it loads beside a torch without
CUDA as well. Environment: CXX, NVCC, FXPRUNE_CUDA (0 or 1), FXPRUNE_CUDA_TARGETS (nvcc's -gencode options in place of
those for Ampere, Hopper and later GPUs), FXPRUNE_TORCH_DIR (a torch package directory),
FXPRUNE_SANITIZE=1 (address and undefined-behaviour sanitizers, plus an operator that trips them).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
# The lowest torch whose stable ABI the library may use: 2.11.
TARGET_VERSION = "0x020b000000000000"
SANITIZE = os.environ.get("FXPRUNE_SANITIZE") == "1"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
# GCC's AVX-512 headers form "undefined" operands by self-initialisation.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS += [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
if SANITIZE:
    FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-DFXPRUNE_SANITIZE"]
else:
    FLAGS += ["-O3", "-g0"]

INCLUDES = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc'}"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
# Code for Ampere and Hopper, and PTX of the former for every later GPU.
NVCC_TARGETS = [
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
]
NVCC_TARGETS = shlex.split(os.environ.get("FXPRUNE_CUDA_TARGETS", "")) or NVCC_TARGETS


def nvcc() -> list[str]:
    return shlex.split(os.environ.get("NVCC", "nvcc"))


def wants_cuda() -> bool:
    """True when FXPRUNE_CUDA asks for it, or by itself where there are a GPU and nvcc."""
    asked = os.environ.get("FXPRUNE_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"FXPRUNE_CUDA must be 0 or 1, got {asked!r}")
    if asked:
        return asked == "1"
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return has_gpu and shutil.which(nvcc()[0]) is not None and not SANITIZE


def torch_directory() -> Path | None:
    """Return the torch package whose headers to build against, or None."""
    candidates = []
    if named := os.environ.get("FXPRUNE_TORCH_DIR"):
        candidates.append(Path(named))
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        candidates.append(Path(spec.origin).parent)
    # Inside pip's isolated build the outer environment is invisible to imports, but the interpreter is its own.
    candidates.append(Path(sysconfig.get_paths()["purelib"]) / "torch")
    return next((c for c in candidates if (c / "include/torch/csrc/stable/library.h").is_file()), None)


class BuildExt(build_ext):
    """Compiles csrc/ with the system compiler, two files at a time, and only what changed."""

    def get_ext_filename(self, ext_name: str) -> str:
        return f"{ext_name.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        torch_dir = torch_directory()
        if shutil.which(compiler[0]) is None:
            return self.python_only(f"no C++ compiler ({compiler[0]!r}); set CXX to one")
        if torch_dir is None:
            return self.python_only("no torch headers; install torch >= 2.11 or set FXPRUNE_TORCH_DIR")
        flags = [*FLAGS, f"-isystem{torch_dir / 'include'}", *INCLUDES]
        commands = {".cpp": [*compiler, *flags], ".cu": [*nvcc(), *NVCC_FLAGS, *NVCC_TARGETS, *INCLUDES]}
        cuda = any(source.endswith(".cu") for source in ext.sources)
        if cuda and shutil.which(nvcc()[0]) is None:
            raise SystemExit(f"FXPRUNE_CUDA=1 needs nvcc, and there is no {nvcc()[0]!r}; set NVCC to it")
        key = hashlib.sha256(repr(commands if cuda else commands[".cpp"]).encode()).hexdigest()[:12]
        objects = ROOT / "build" / f"obj-{key}"
        objects.mkdir(parents=True, exist_ok=True)

        def compiled(source: str) -> Path:
            return self.compile(commands[Path(source).suffix], Path(source), objects)

        with ThreadPoolExecutor(max_workers=min(8, max(2, os.cpu_count() or 2))) as pool:
            built = list(pool.map(compiled, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(".tmp")
        link = ["-shared", f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-o", str(scratch)]
        if cuda:
            self.run_compiler([*nvcc(), *map(str, built), *link, "-cudart", "static", "-Xlinker", "-s"])
        else:
            link += ["-fsanitize=address,undefined"] if SANITIZE else ["-Wl,-s"]
            self.run_compiler([*compiler, *map(str, built), *link])
        scratch.replace(target)  # a process that has the old library mapped keeps it intact
        return None

    def compile(self, command: list[str], source: Path, objects: Path) -> Path:
        target = objects / f"{source.name}.o"
        if not is_current(target):
            started = time.time()
            listing = ["-MMD", "-MF", str(target.with_suffix(".d"))]
            log = target.with_suffix(".log") if source.suffix == ".cu" else None  # what every kernel needs of the GPU
            self.run_compiler([*command, *listing, "-c", str(ROOT / source), "-o", str(target)], log)
            os.utime(target, (started, started))  # an input edited while the compiler ran is newer than this
        return target

    def run_compiler(self, command: list[str], log: Path | None = None) -> None:
        """Run a compiler; ``log`` takes what it says on success."""
        if self.verbose:
            print(shlex.join(command), flush=True)
        if log is None:
            subprocess.run(command, check=True)
            return
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        log.write_text(done.stderr)

    def python_only(self, reason: str) -> None:
        print(f"warning: fxprune is built without its C++ kernels: {reason}.", file=sys.stderr)
        self.extensions: list[Extension] = []

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).is_file()]


def is_current(target: Path) -> bool:
    """True when an object file is newer than every file it was compiled from."""
    listing = target.with_suffix(".d")
    if not target.is_file() or not listing.is_file():
        return False
    inputs = listing.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    built = target.stat().st_mtime
    return all(Path(path).is_file() and Path(path).stat().st_mtime <= built for path in inputs)


class Kernels(Distribution):
    """Without pyproject.toml where setuptools is too old to read it: `setup.py build_ext --inplace` needs nothing of it."""

    def parse_config_files(self, *given: object, **named: object) -> None:
        if int(setuptools.__version__.partition(".")[0]) >= 77:
            super().parse_config_files(*given, **named)


class PlatformWheel(bdist_wheel):
    """One wheel serves every Python: the library has no Python symbols."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


SOURCES = [
    "csrc/add_squares.cpp",
    "csrc/attention.cpp",
    "csrc/attention_rows.cpp",
    "csrc/channel_norm.cpp",
    "csrc/clear_pruned.cpp",
    "csrc/nm_prune.cpp",
    "csrc/ops.cpp",
    "csrc/plan_tiles.cpp",
    "csrc/region.cpp",
    "csrc/rnn.cpp",
    "csrc/skip_zeros.cpp",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp")),
]
# The slowest files first, so that two jobs end together.
SOURCES.sort(key=lambda path: "avx" not in path)

CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.c*") if p.suffix in (".cpp", ".cu"))

if __name__ == "__main__":
    extensions = [Extension("fxprune._C_cpu", sources=SOURCES)]
    if wants_cuda():
        extensions.append(Extension("fxprune._C_cuda", sources=CUDA_SOURCES))
    setup(
        name="fxprune",
        distclass=Kernels,
        ext_modules=extensions,
        cmdclass={"build_ext": BuildExt, "bdist_wheel": PlatformWheel},
    )
