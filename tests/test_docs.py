"""Pages that are written from the sources are current."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import types
from pathlib import Path

import pytest
import render
import render_export

from fxprune.config import Config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def docs() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("fxprune_docs", ROOT / "tools" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["options.md", "errors.md", "conformance.md"])
def test_generated_page_is_current(docs: types.ModuleType, page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == docs.PAGES[page](), "run `make docs`"


def test_every_option_is_described(docs: types.ModuleType) -> None:
    texts = docs.descriptions(inspect.getdoc(Config))
    for field in dataclasses.fields(Config):
        assert len(texts[field.name]) > 10, field.name


def test_benchmark_tables_are_current() -> None:
    assert render.rendered(ROOT / "README.md", render.RESULTS) == (ROOT / "README.md").read_text(), (
        "run benchmarks/render.py"
    )
    assert render.page(render.RESULTS) == render.PAGE.read_text(), "run benchmarks/render.py"


def test_tables_of_pruned_gradients_are_current() -> None:
    pytest.importorskip("sklearn")
    import render_sdgp

    assert render_sdgp.rendered() == render_sdgp.PAGE.read_text(), "run benchmarks/render_sdgp.py"


def test_exported_files_page_is_current() -> None:
    assert render_export.page(render.RESULTS) == render_export.PAGE.read_text(), "run benchmarks/render_export.py"


def test_readme_links_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
