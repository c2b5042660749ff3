"""One engine in a process of its own: seconds of a compile with warm caches, and the peak memory of a call.

    python benchmarks/footprint.py CASE ENGINE

Prints one JSON object. bench_models.py calls it after the case has filled the caches, with the allocator's defaults.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import engines
import torch
import zoo
from cases import Case

import fxprune


def main() -> int:
    case, engine = Case(**json.loads(sys.argv[1])), sys.argv[2]
    torch.set_num_threads(case.threads)
    model, inputs = zoo.prepared(case)
    pruned = fxprune.prune(model, inputs, sparsity=case.sparsity, ignored_layers=case.ignored).model
    engines.warm_up()
    del model
    run, seconds = engines.compile_engine(engine, pruned, inputs)
    if engine == engines.EXPORTED:
        del pruned  # what was exported stands for itself
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what compiling has freed is nobody's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with torch.no_grad():
        for _ in range(3):
            run(*inputs)
    print(json.dumps({"warm_compile_s": round(seconds, 2), "peak_mb": round(peak_mb(), 1)}))
    return 0


def peak_mb() -> float:
    """Return the peak of resident memory since it was last reset, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) / 1e3


if __name__ == "__main__":
    sys.exit(main())
