"""A fast part of the family table is recomputed and must be what the table says; the whole is `make conformance`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conformance import families
from tests.conformance.family import COLUMNS, row

ROWS = {cells["family"]: cells for cells in families.read()}
FAST = ("cspnext", "deit", "dla")


@pytest.mark.parametrize("family", FAST)
def test_row_is_what_the_table_says(family: str) -> None:
    wanted = ROWS[family]
    assert row(family, wanted["model"], int(wanted["side"])) == wanted, "make conformance ARGS=--write"


def test_the_table_is_whole_and_sorted() -> None:
    assert list(ROWS) == sorted(ROWS) and len(ROWS) == len(families.read()) >= 80
    assert families.TABLE.read_text() == families.text(list(ROWS.values()))
    for cells in ROWS.values():
        assert tuple(cells) == COLUMNS and int(cells["side"]) in families.SIDES
        assert cells["eager"] in ("runs", "fails", "unknown", "")


def test_a_failing_family_is_a_row() -> None:
    cells = row("none", "no_such_model", 64)
    assert cells["eager"] == "fails" and cells["reason"].startswith("eager: RuntimeError: Unknown model")


ANSWERS = {
    "a crash": ("import os; input(); os.kill(os.getpid(), 9)", "the process ended with SIGKILL"),
    "a hang": ("import time; input(); time.sleep(60)", "no result in 1 s"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_family_that_takes_its_process_along_is_a_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, reason = ANSWERS[name]
    asked = [dict.fromkeys(COLUMNS, "") | {"family": family, "side": "64"} for family in ("a", "b")]

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)

    monkeypatch.setattr(families, "start", start)
    rows = list(families.sweep(asked, limit=1 if "hang" in name else 60))
    assert [r["family"] for r in rows] == ["a", "b"]
    assert all(r["eager"] == "unknown" and r["reason"] == reason for r in rows)


def test_only_compares_with_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "build").mkdir()
    monkeypatch.setattr(families, "FINISHED", tmp_path / "build" / "families.jsonl")
    monkeypatch.setattr(families, "sweep", lambda rows, limit: iter([dict(r) for r in rows]))
    assert families.main(["--only", "dla"]) == 0 and "1 families as in" in capsys.readouterr().out
    monkeypatch.setattr(families, "sweep", lambda rows, limit: iter([{**r, "pruned": "differs"} for r in rows]))
    assert families.main(["--only", "dla"]) == 1 and "+dla," in capsys.readouterr().out


def test_an_interrupted_run_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: Any) -> None:
    log = tmp_path / "families.jsonl"
    monkeypatch.setattr(families, "FINISHED", log)
    log.write_text(json.dumps({**ROWS["deit"], "pruned": "differs"}) + "\n")
    asked: list[str] = []

    def sweep(rows: Any, limit: int) -> Any:
        for cells in rows:
            asked.append(cells["family"])
            yield dict(cells)

    monkeypatch.setattr(families, "sweep", sweep)
    assert families.main(["--resume", "--only", "deit", "--only", "dla"]) == 1
    assert asked == ["dla"] and "+deit," in capsys.readouterr().out and not log.exists()
