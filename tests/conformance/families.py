"""The family table: the smallest model of every timm family below 30 M parameters, run in four ways.

    python -m tests.conformance.families              recompute every row and compare with families.csv
    python -m tests.conformance.families --only NAME  one family or model (may be given several times)
    python -m tests.conformance.families --resume     keep the rows that an interrupted run has finished
    python -m tests.conformance.families --write      put what was computed into families.csv
    python -m tests.conformance.families --choose     look for the smallest models in timm's registry first (minutes)

Rows are computed one after the other in a process of their own, which is replaced when it crashes or when a family takes
longer than its limit: that is a result, too. Rows hold no timings, so the same code gives the same file.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.conformance.family import COLUMNS, build, images, row, run

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = Path(__file__).parent / "families.csv"
FINISHED = ROOT / "build" / "families.jsonl"  # of an interrupted run
MOST_PARAMETERS = 30_000_000
SIDES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 320)
LIMIT = 600  # seconds per family

Cells = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="SECONDS")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return work()
    before = read()
    wanted = choose() if options.choose else before
    wanted = [r for r in wanted if not options.only or {r["family"], r["model"]} & set(options.only)]
    if not wanted:
        parser.error(f"{options.only} names no family of {TABLE.name}")
    done = finished() if options.resume else {}
    FINISHED.parent.mkdir(exist_ok=True)
    with FINISHED.open("a" if options.resume else "w") as log:
        for cells in sweep([r for r in wanted if r["family"] not in done], options.limit):
            done[cells["family"]] = cells
            print(", ".join(f"{name} {cells[name]}" for name in ("family", "exact", "pruned", "reason")), flush=True)
            print(json.dumps(cells), file=log, flush=True)
    kept = [] if options.choose else [r for r in before if r["family"] not in done]
    after = sorted([*kept, *done.values()], key=lambda r: r["family"])
    FINISHED.unlink()
    if options.write:
        TABLE.write_text(text(after))
        print(f"{TABLE.name}: {len(after)} families; `make docs` brings docs/conformance.md up to date")
        return 0
    changes = list(difflib.unified_diff(text(before).splitlines(), text(after).splitlines(), "table", "now", "", "", 0))
    print("\n".join(changes) or f"{len(done)} families as in {TABLE.name}")
    return 1 if changes else 0


def read() -> list[Cells]:
    return list(csv.DictReader(io.StringIO(TABLE.read_text()))) if TABLE.exists() else []


def text(rows: Sequence[Cells]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def finished() -> dict[str, Cells]:
    lines = FINISHED.read_text().splitlines() if FINISHED.exists() else []
    return {cells["family"]: cells for cells in map(json.loads, lines)}


def sweep(rows: Sequence[Cells], limit: int) -> Iterator[Cells]:
    """Yield the recomputed rows; a family that crashes or hangs its process gets a row that says so."""
    waiting = list(rows)
    while waiting:
        worker = start()
        try:
            while waiting:
                cells = ask(worker, waiting[0], limit)
                yield cells
                waiting.pop(0)
                if worker.poll() is not None:
                    break
        finally:
            worker.kill()
            with worker:  # closes the pipes and waits
                pass


def start() -> subprocess.Popen[str]:
    # a thread that waits sleeps: one busy neighbour does not make every parallel region slow
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore", **os.environ}
    command = [sys.executable, "-m", "tests.conformance.families", "--worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )


def ask(worker: subprocess.Popen[str], cells: Cells, limit: int) -> Cells:
    """Send one family to the worker and wait for its row."""
    assert worker.stdin is not None and worker.stdout is not None
    fixed = {name: cells[name] for name in ("family", "model", "side")}
    worker.stdin.write(json.dumps(fixed) + "\n")
    worker.stdin.flush()
    ready, _, _ = select.select([worker.stdout], [], [], limit)
    line = worker.stdout.readline() if ready else ""
    if line:
        return dict(json.loads(line))
    worker.kill()
    code = worker.wait()
    reason = f"no result in {limit} s" if not ready else f"the process ended with {signal_name(code)}"
    return {**dict.fromkeys(COLUMNS, ""), **fixed, "eager": "unknown", "reason": reason}


def signal_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def work() -> int:
    """Answer each request on stdin with a row on stdout; whatever else prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(row(asked["family"], asked["model"], int(asked["side"]))), file=answers, flush=True)
    return 0


def choose() -> list[Cells]:
    """Return the smallest model of every timm family below the limit, with the smallest side of :data:`SIDES` it runs at."""
    import torch

    from benchmarks import zoo

    with zoo.torchvision_absent():
        import timm

        rows = []
        for family in timm.list_modules():
            sizes = []
            for name in timm.list_models(module=family):
                if not name.startswith("test_"):
                    with torch.device("meta"):
                        model = timm.create_model(name)
                    sizes.append((sum(p.numel() for p in model.parameters()), name))
            if sizes and min(sizes)[0] < MOST_PARAMETERS:
                name = min(sizes)[1]
                rows.append({"family": family, "model": name, "side": str(smallest(name))})
    return rows


def smallest(name: str) -> int:
    """Return the first side the model runs at, the last one when it runs at none."""
    for side in SIDES:
        try:
            run(build(name, side), images(side))
        except Exception:
            continue
        return side
    return SIDES[-1]


if __name__ == "__main__":
    sys.exit(main())
