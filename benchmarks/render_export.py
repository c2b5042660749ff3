"""Write benchmarks/results/*/export-*.json as docs/export-measured.md: ``python benchmarks/render_export.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from render import RESULTS, ROOT, rows

PAGE = ROOT / "docs" / "export-measured.md"
HEAD = ("model", "format", "runtime", "dense MB", "pruned MB", "dense ms", "pruned ms", "speed-up", "error dense / pruned")
RUNTIME = {"exported_program": "PyTorch", "aoti": "AOTInductor", "onnx": "ONNX Runtime"}
INTRO = """# Exported files, measured

Written by `benchmarks/render_export.py` from what `benchmarks/bench_export.py` measured. Both sides hold the same
weights with zeros: *dense* was exported by PyTorch alone, which stores and multiplies the zeros, *pruned* by
`fxprune.export`. Times are medians per call, all files of a model in interleaved rounds in one process; errors are the
largest difference from an fp64 run, relative to its largest value.
"""


def main() -> int:
    PAGE.write_text(page(RESULTS))
    return 0


def page(results: Path) -> str:
    """Return the page; without results a line that says so."""
    parts = [INTRO]
    for folder in sorted(p for p in results.iterdir() if p.is_dir()) if results.is_dir() else []:
        records = [json.loads(p.read_text()) for p in sorted(folder.glob("export-*.json"))]
        if records:
            body = [row for record in records for row in _rows(record)]
            parts += [f"## {folder.name}\n", *rows(HEAD, body), "", _setting(records), ""]
    return "\n".join(parts if len(parts) > 1 else [*parts, "Nothing has been measured yet.", ""])


def _rows(record: dict[str, Any]) -> list[list[str]]:
    found = []
    for name, sides in record["formats"].items():
        dense, pruned = sides["dense"], sides["pruned"]
        times = [f"{s['ms']:.2f} ({s['p10']:.2f} .. {s['p90']:.2f})" for s in (dense, pruned)]
        sizes = [f"{s['mb']:.1f}" for s in (dense, pruned)]
        gain, errors = f"**{dense['ms'] / pruned['ms']:.2f}x**", f"{dense['error']:.0e} / {pruned['error']:.0e}"
        found.append([record["exported"], f"`{name}`", RUNTIME[name], *sizes, *times, gain, errors])
    return found


def _setting(records: list[dict[str, Any]]) -> str:
    first = records[0]
    zeros = "; ".join(f"{r['exported']} {', '.join(f'{k} {v:.0%}' for k, v in r['sparsity'].items())}" for r in records)
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    disturbed = sum(r["disturbed"] for r in records)
    return (
        f"{first['machine']['cpu']}, {first['threads']} threads, batch 1, {first['rounds']} rounds "
        f"({disturbed} repeated because something else ran). Zeros: {zeros}. {versions}."
    )


if __name__ == "__main__":
    sys.exit(main())
