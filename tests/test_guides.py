"""The code of the migration pages, recipes and other guides runs, block after block, as a reader would paste it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = [*sorted(DOCS.glob("migrating-*.md")), *sorted(DOCS.glob("recipes*.md")), DOCS / "debugging.md"]
NEEDS = {"recipes": "timm", "recipes-lightning": "lightning"}  # what a page shows, which fxprune itself does not need


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_there_are_pages() -> None:
    assert len(PAGES) >= 4 and all(blocks(page) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Inductor compiles seconds per block; an eager rest and predicted times show the same."""
    with zoo.torchvision_absent():
        if page.stem in NEEDS:
            pytest.importorskip(NEEDS[page.stem])
    real = torch.compile

    def compile(model: Any, backend: Any = "inductor", options: Any = None, **more: Any) -> Any:
        if backend != "hwprune":  # fxprune's own capture
            return real(model, backend=backend, **more)
        return real(model, backend=backend, options={"fallback": "eager", "autotune": "off", **(options or {})}, **more)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.stem}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", module="lightning")  # its advice on workers and loggers
        for number, code in enumerate(blocks(page)):
            exec(builtins_compile(code, f"{page.name}, block {number}"), names)


def builtins_compile(code: str, name: str) -> Any:
    return compile(code, name, "exec")
