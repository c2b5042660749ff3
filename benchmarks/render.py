"""Write the table of benchmarks/results/*/*.json between the markers of README.md.

python benchmarks/render.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
HEAD = (
    "model",
    "batch",
    "zeros",
    "eager ms",
    "Inductor ms",
    "freezing ms",
    "max-autotune ms",
    "ONNX Runtime ms",
    "OpenVINO ms",
    "**fxprune ms**",
    "exported ms",
    "**over Inductor**",
    "**over the fastest**",
    "p10 .. p90",
    "unpruned",
)
COLUMNS = (
    "eager channels_last",
    "inductor",
    "inductor freezing",
    "inductor max-autotune",
    "onnxruntime",
    "openvino",
    "fxprune",
    "fxprune exported",
)
ORDER = ("mobilenetv2_100", "efficientnet_b0", "bert_base")


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme, ROOT / "benchmarks" / "results"))
    return 0


def rendered(readme: Path, results: Path) -> str:
    """Return README's text with the current table."""
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(results)}\n{END}{after}"


def table(results: Path) -> str:
    """Return one table per machine, or a line that says nothing was measured."""
    parts = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()) if results.is_dir() else []:
        records = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
        records = [r for r in records if "engines" in r and "speedup" in r and r["dtype"] == "float32"]
        if records:
            parts.append(one_machine(sorted(records, key=_order)))
    return "\n\n".join(parts) or "Nothing has been measured yet: run `make bench`."


def one_machine(records: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += ["| " + " | ".join(_row(r)) + " |" for r in records]
    first = records[0]
    machine, days = first["machine"], sorted({r["date"] for r in records})
    commits = sorted({r["commit"] for r in records})
    setting = (
        f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['isa'])}",
        f"{first['threads']} threads, {first['dtype']}, torch {first['versions']['torch']}",
        f"commit {', '.join(commits)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}",
    )
    lines += ["", "; ".join(setting) + "."]
    return "\n".join(lines)


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    ours = record["engines"]["fxprune"]
    zeros = ", ".join(f"{kind} {share:.0%}" for kind, share in record["sparsity"].items() if not set(kind) & set("*?["))
    times = [f"{record['engines'][c]['ms']:.2f}" if c in record["engines"] else "-" for c in COLUMNS]
    times[-2] = f"**{times[-2]}**"
    over = record.get("speedup_over_dense")
    fastest = "not comparable" if over is None else f"**{over:.2f}x**"
    spread = f"{ours['p10']:.2f} .. {ours['p90']:.2f}"
    unpruned = f"{record['unpruned']['ratio']:.2f}x"
    return (record["model"], str(record["batch"]), zeros, *times, f"**{record['speedup']:.2f}x**", fastest, spread, unpruned)


def _order(record: dict[str, Any]) -> tuple[int, str, int]:
    model = record["model"]
    return (ORDER.index(model) if model in ORDER else len(ORDER), model, record["batch"])


if __name__ == "__main__":
    sys.exit(main())
