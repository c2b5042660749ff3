"""What an exported file says about itself, so that a loader knows what it needs before it runs anything of it.

Two texts lie inside the archive: ``fxprune.json``, this record, and ``fxprune.plan.json``, the plan. Both are data; the
program beside them is code, and torch's own loaders unpickle it: load ``.pt2`` files only from people you trust.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxprune.errors import ExportFileError
from fxprune.plan import Plan
from fxprune.plan_file import decode

MANIFEST, PLAN = "fxprune.json", "fxprune.plan.json"
VERSION = 2
_LARGEST = 1 << 28  # bytes of a text in the archive


@dataclass(frozen=True)
class Manifest:
    """kind: the format. operators: ours that the program calls. layers: decisions, as in ``explain``. bytes: of weights."""

    kind: str
    fxprune: str
    torch: str
    operators: tuple[str, ...]
    layers: tuple[dict[str, Any], ...] = ()
    bytes: Mapping[str, int] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read(path: str | os.PathLike[str]) -> tuple[Manifest, Plan]:
    """Return the record and the plan of an exported file; nothing of its code is touched.

    Raises :class:`~fxprune.errors.ExportFileError` when it is no archive, was not written by fxprune or is of another
    version, and :class:`~fxprune.errors.PlanFileError` for a bad plan.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            texts = {name: _member(archive, name) for name in (MANIFEST, PLAN)}
    except (OSError, zipfile.BadZipFile) as error:
        raise ExportFileError(path=path, reason=f"it is no readable archive ({error})") from error
    text = texts[MANIFEST]
    if text is None:
        raise ExportFileError(path=path, reason="it was not written by fxprune.export; use torch.export.load")
    try:
        values: Any = json.loads(text)
        version = values.get("version")
        if version != VERSION:
            raise ExportFileError(path=path, reason=f"its version is {version!r}, this fxprune reads {VERSION}")
        names = ("operators", "layers")
        values |= {key: tuple(values[key]) for key in names if key in values}
        manifest = Manifest(**values)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ExportFileError(path=path, reason=f"its record cannot be read ({error})") from error
    plan = texts[PLAN]
    return manifest, Plan() if plan is None else decode(plan, f"{path}: {PLAN}")


def _member(archive: zipfile.ZipFile, name: str) -> bytes | None:
    found = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == name]
    if not found:
        return None
    if len(found) > 1 or found[0].file_size > _LARGEST:
        raise zipfile.BadZipFile(f"{name} is there {len(found)} times or too large")
    return archive.read(found[0])
