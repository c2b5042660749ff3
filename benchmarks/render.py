"""Write benchmarks/results/*/*.json as the table of README.md, as docs/benchmarks.md, and as pictures beside it.

python benchmarks/render.py

Pictures (speed against zeros, with the dense runtimes as lines) need matplotlib; without it the old ones stay.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cases import DTYPES, MODELS

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
NOTHING = "Nothing has been measured yet: run `make bench`."
SOURCE = "Written by `benchmarks/render.py` from `benchmarks/results/`; `make bench` measures anew."
SWEEP = "Stock Inductor's time over ours, and its lower 95 % bound; every kind of layer holds that share of zeros."
HEAD = ("model", "type", "batch", "zeros", "best Inductor", "best dense runtime", "fewer channels", "**fxprune**")
RATIOS = ("over Inductor", "**over dense**", "over channels", "unpruned")
DETAIL = ("engine", "median ms", "p10 .. p90", "error", "compile s", "again s", "peak MB")
Record = dict[str, Any]


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme, RESULTS))
    PAGE.write_text(page(RESULTS))
    if importlib.util.find_spec("matplotlib") is not None:
        for folder, records in machines(RESULTS, "levels"):
            draw(records, [r for _, rs in machines(folder.parent, "engines") for r in rs], PAGE.parent / picture(folder))
    return 0


def machines(results: Path, key: str) -> Iterator[tuple[Path, list[Record]]]:
    """Yield (folder, whole-model records that have a field) of each machine, the published cases first."""
    for folder in sorted(p for p in results.iterdir() if p.is_dir()) if results.is_dir() else []:
        records = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
        records = [r for r in records if key in r and "model" in r and "dtype" in r]
        if records:
            yield folder, sorted(records, key=_order)


def rendered(readme: Path, results: Path) -> str:
    """Return README's text with the current table."""
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(results)}\n{END}{after}"


def table(results: Path) -> str:
    """Return one table per machine, or a line that says nothing was measured."""
    parts = []
    for _, records in machines(results, "engines"):
        two = [r for r in records if r["threads"] == max(r["threads"] for r in records)]
        parts.append("\n".join([*rows((*HEAD, *RATIOS), map(_row, two)), "", setting(two)]))
    return "\n\n".join(parts) or NOTHING


def page(results: Path) -> str:
    """Return docs/benchmarks.md: every engine of every case."""
    lines = ["# Benchmarks", "", SOURCE, ""]
    for folder, records in machines(results, "engines"):
        lines += [f"## {folder.name}", "", setting(records), ""]
        for record in records:
            lines += [*_details(record), ""]
    for folder, records in machines(results, "levels"):
        lines += [f"## Never slower: {folder.name}", "", setting(records), ""]
        lines += [SWEEP, ""]
        levels = [f"{row['zeros']:.0%}" for row in records[0]["levels"]]
        body = [[r["model"], str(r["batch"]), *(f"{c['ratio']:.2f} ({c['low']:.2f})" for c in r["levels"])] for r in records]
        lines += [*rows(("model", "batch", *levels), body), "", f"![speed against zeros]({picture(folder)})", ""]
    return "\n".join(lines if len(lines) > 4 else [*lines, NOTHING, ""])


def picture(folder: Path) -> str:
    return f"speed-{folder.name}.svg"


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *(f"| {' | '.join(row)} |" for row in body)]


def setting(records: Sequence[Record]) -> str:
    first = records[0]
    machine, days = first["machine"], sorted({r["date"] for r in records})
    parts = (
        f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['isa'])}",
        f"{', '.join(str(t) for t in sorted({r['threads'] for r in records}))} threads, torch {first['versions']['torch']}",
        f"commit {', '.join(sorted({r['commit'] for r in records}))}, {' to '.join(dict.fromkeys((days[0], days[-1])))}",
    )
    return "; ".join(parts) + "."


def _row(record: Record) -> list[str]:
    engines = record["engines"]
    ours = min((n for n in ("fxprune", "fxprune exported") if n in engines), key=lambda n: engines[n]["ms"])
    channels = record.get("fastest_channels")
    cells = [
        record["model"],
        record["dtype"],
        str(record["batch"]),
        _zeros(record),
        _time(record, record["fastest_stock"]),
        _time(record, record["fastest_dense"]),
        _time(record, channels).replace("channels: ", "") if channels else "-",
        f"**{engines[ours]['ms']:.2f}**{' exported' if ours != 'fxprune' else ''}",
        f"{record['speedup']:.2f}x",
    ]
    for title, mark in (("dense", "**"), ("channels", "")):
        over = record.get(f"speedup_over_{title}")
        missing = "not comparable" if f"fastest_{title}" in record else "-"
        cells.append(missing if over is None else f"{mark}{over:.2f}x{mark}")
    return [*cells, f"{record['unpruned']['ratio']:.2f}x"]


def _zeros(record: Record) -> str:
    return ", ".join(f"{kind} {share:.0%}" for kind, share in record["sparsity"].items() if not set(kind) & set("*?["))


def _time(record: Record, name: str) -> str:
    return f"{record['engines'][name]['ms']:.2f} {name.removeprefix('inductor ')}"


def _details(record: Record) -> Iterator[str]:
    yield f"### {record['model']}, batch {record['batch']}, {record['dtype']}, {record['threads']} threads"
    yield ""
    left = record["channels"].get("multiplications left")
    gate = record["gate"]
    facts = [f"Zeros: {_zeros(record)}"]
    if left:
        ours = record["channels"]["multiplications"]
        facts += [f"fewer channels: {left / 1e6:.0f} M multiplications, {ours / 1e6:.0f} M by weights that are not zero"]
    facts += [f"file: {', '.join(f'{name} {size:.1f} MB' for name, size in record['artifact_mb'].items())}"]
    facts += [f"{record['rounds']} rounds, {gate['repeated rounds']} repeated, {gate['gflops']:.0f} GFLOP/s beside them"]
    facts += [f"{name} not comparable: {reason}" for name, reason in record["not_comparable"].items()]
    yield "; ".join(facts) + "."
    yield ""
    yield from rows(DETAIL, (_detail(name, row) for name, row in record["engines"].items()))


def _detail(name: str, row: Record) -> list[str]:
    error = "-" if row["error"] is None else f"{row['error']:.0e}"
    again, peak = (f"{row[k]:.0f}" if k in row else "-" for k in ("warm_compile_s", "peak_mb"))
    return [name, f"{row['ms']:.2f}", f"{row['p10']:.2f} .. {row['p90']:.2f}", error, f"{row['compile_s']:.0f}", again, peak]


def draw(sweeps: Sequence[Record], cases: Sequence[Record], file: Path) -> None:
    """Draw speed over stock Inductor against zeros, a panel per model, with dense runtimes of the same case as lines."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = file.name  # the same numbers give the same file
    figure = Figure(figsize=(3.2 * min(len(sweeps), 4), 2.8 * -(-len(sweeps) // 4)), layout="constrained")
    panels = figure.subplots(-(-len(sweeps) // 4), min(len(sweeps), 4), squeeze=False).flatten()
    for axes, sweep in zip(panels, sweeps, strict=False):
        levels = sweep["levels"]
        axes.plot([r["zeros"] for r in levels], [r["ratio"] for r in levels], "o-", color="#2f6fd0", label="fxprune")
        axes.axhline(1.0, color="#9aa4af", label="Inductor")
        same = ("model", "batch", "threads", "dtype")
        for case in (c for c in cases if all(c[k] == sweep[k] for k in same)):
            for name, colour in (("inductor freezing", "#7a5195"), ("onnxruntime", "#ef5675"), ("openvino", "#ffa600")):
                if name in case["engines"]:
                    ratio = case["engines"]["inductor"]["ms"] / case["engines"][name]["ms"]
                    axes.axhline(ratio, color=colour, linestyle="--", label=name)
        axes.set_title(f"{sweep['model']}, batch {sweep['batch']}", fontsize=8)
        axes.set_ylim(bottom=0)
    for axes in panels[len(sweeps) :]:
        axes.remove()
    panels[0].legend(fontsize=6)
    figure.supxlabel("share of zeros", fontsize=8)
    figure.supylabel("speed over stock Inductor", fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def _order(record: Record) -> tuple[int, int, int, int]:
    model = MODELS.index(record["model"]) if record["model"] in MODELS else len(MODELS)
    return -record["threads"], model, DTYPES.index(record["dtype"]), record["batch"]


if __name__ == "__main__":
    sys.exit(main())
