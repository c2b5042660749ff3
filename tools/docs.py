"""Write docs/options.md from Config, docs/errors.md from errors.py and docs/conformance.md from the family table.

``--check`` only says whether they are current.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from fxprune import errors
from fxprune.config import Config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FAMILIES = ROOT / "tests" / "conformance" / "families.csv"
# a word such as `mode / inductor` or `pattern`, then its text, up to the next one
_ENTRY = re.compile(r"(?:^|(?<=\. ))([a-z_]+(?: / [a-z_]+)*): ", re.MULTILINE)


def options() -> str:
    """Return the options reference: one row per field of Config, described by the class docstring."""
    texts = descriptions(inspect.getdoc(Config) or "")
    fields = dataclasses.fields(Config)
    missing = [f.name for f in fields if f.name not in texts]
    if missing:
        raise SystemExit(f"Config's docstring does not describe: {', '.join(missing)}")
    lines = [
        "# Options",
        "",
        "Keyword arguments of `fxprune.prune`, `explain`, `verify` and `benchmark`, and keys of",
        '`torch.compile(model, backend="hwprune", options={...})`. An unknown name or value is an error that names the',
        "nearest legal one. Written by `make docs` from `fxprune/config.py`.",
        "",
        "| option | default | meaning |",
        "| --- | --- | --- |",
    ]
    for field in fields:
        lines.append(f"| `{field.name}` | `{_default(field)}` | {_cell(texts[field.name])} |")
    return "\n".join(lines) + "\n"


def descriptions(doc: str) -> dict[str, str]:
    """Split a docstring of ``name: text.`` entries, of which one line may hold several, into text by name."""
    body = re.sub(r"\n {4,}", " ", doc.partition("\n\n")[2])
    names = {f.name for f in dataclasses.fields(Config)}
    starts = [m for m in _ENTRY.finditer(body) if set(m.group(1).split(" / ")) <= names]
    found = {}
    for start, after in zip(starts, [*starts[1:], None], strict=True):
        text = body[start.end() : after.start() if after else len(body)]
        for name in start.group(1).split(" / "):
            found[name] = " ".join(text.split())
    return found


def error_list() -> str:
    """Return the errors reference: class, bases, meaning, message template."""
    lines = [
        "# Errors",
        "",
        "Every error of fxprune is a class of `fxprune.errors` below `FxPruneError`; every warning is a",
        "`FxPruneWarning`. The message says what was given, what was expected and what to do.",
        "Written by `make docs` from `fxprune/errors.py`.",
        "",
    ]
    for name, cls in vars(errors).items():
        if not (inspect.isclass(cls) and issubclass(cls, errors.FxPruneError) and cls is not errors.FxPruneError):
            continue
        also = ", ".join(f"`{base.__name__}`" for base in cls.__bases__ if base is not errors.FxPruneError)
        lines += [f"## {name}", "", " ".join((inspect.getdoc(cls) or "").split()), ""]
        if also:
            lines += [f"Also a {also}.", ""]
        lines += ["```text", cls.template, "```", ""]
    return "\n".join(lines)


def conformance() -> str:
    """Return the conformance page: how to run it, what the columns mean, and the totals of the family table."""
    with FAMILIES.open() as table:
        rows = list(csv.DictReader(table))
    done = [r for r in rows if r["eager"]]
    totals = [("families in the table", len(rows)), ("computed", len(done))]
    totals.append(("eager runs", sum(r["eager"] == "runs" for r in done)))
    totals += [(f"{name} equal", sum(r[name] == "equal" for r in done)) for name in ("aot_eager", "exact", "pruned")]
    totals.append(("with at least one match", sum(bool(r["matches"]) for r in done)))
    for name in ("layers pruned", "layers rewritten", "breaks"):
        totals.append((name, sum(int(r[name] or 0) for r in done)))
    lines = [
        "# Conformance",
        "",
        "`make test` compares 18 models in detail (`tests/conformance/matches.json`) and recomputes a few rows of",
        "[families.csv](../tests/conformance/families.csv): one model per timm family, the smallest below 30 M parameters,",
        "at batch 2 and the smallest image of at least 64 pixels it takes, with random weights. `make conformance`",
        'recomputes every row and fails on any difference; `ARGS="--only resnet"` takes one family, `ARGS=--resume`',
        'goes on after an interruption, `ARGS=--write` writes the table, `ARGS="--choose --write"` looks for',
        "the smallest models anew.",
        "Written by `make docs`.",
        "",
        "| column | meaning |",
        "| --- | --- |",
        "| eager | the model runs |",
        "| aot_eager | PyTorch's own reference compiler agrees with eager; where it does not, we are not to blame |",
        "| exact | `hwprune` without zeros places no kernel and agrees with eager |",
        "| pruned | half of the weights zero, every kernel forced: agrees with the masked dense model by the fp64 rule |",
        "| matches | layers found, by kind |",
        "| layers pruned, rewritten | weights with zeros; those whose kernel runs; `reason` says why others do not |",
        "| graphs, breaks | graphs Dynamo compiled, and graph breaks |",
        "",
        "| total | |",
        "| --- | --- |",
        *[f"| {name} | {count} |" for name, count in totals],
        "",
    ]
    reasons = [r for r in done if r["reason"]]
    if reasons:
        lines += ["| family | model | reason |", "| --- | --- | --- |"]
        lines += [f"| {r['family']} | {r['model']} | {_cell(r['reason'])} |" for r in reasons]
        lines.append("")
    return "\n".join(lines)


def _default(field: dataclasses.Field[Any]) -> str:
    missing = field.default is dataclasses.MISSING
    value = field.default_factory() if missing else field.default  # type: ignore[misc]
    return repr(value)


def _cell(text: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", re.sub(r":[a-z]+:`[~.]?(.+?)`", r"`\1`", text)).replace("|", "\\|")


PAGES = {"options.md": options, "errors.md": error_list, "conformance.md": conformance}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is out of date")
    check = parser.parse_args(argv).check
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text)
    print(f"docs: {', '.join(stale) or 'nothing'} {'is out of date' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
