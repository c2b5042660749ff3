"""The report page: self-contained, escaped, and in a real browser sortable, filterable, dark and narrow."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fxprune
from fxprune import charts, report_html
from fxprune.report import Table
from tests.toys import image, mobile

BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no browser is installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch._dynamo.reset()
    path = tmp_path_factory.mktemp("page") / "report.html"
    dense, x = mobile(), image()
    result = fxprune.prune(dense, x, sparsity=0.5, granularity=8, columns=False)
    explained = fxprune.explain(result.model, x, autotune="off", min_speedup=0.0)
    levels = fxprune.levels(dense, x, autotune="off")
    sensitive = fxprune.sensitivity(dense, x, sparsities=(0.5, 0.75))
    times = Table("milliseconds", ("engine", "median"), [("eager", "2.000"), ("hwprune", "1.000")])
    report_html.write(
        path, title="<b>mobile", explain=explained, levels=levels, sensitivity=sensitive, benchmark=times,
        plan=result.plan, dense=dense, stages=fxprune.stages(result.model, x, autotune="off", min_speedup=0.0),
    )  # fmt: skip
    return path


def test_nothing_comes_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "@import" not in text and "url(" not in text
    assert "http" not in text.replace("http-equiv", "") and "fetch(" not in text
    assert "<h1>&lt;b&gt;mobile</h1>" in text and "<b>mobile" not in text


def test_what_is_on_it(page: Path) -> None:
    text = page.read_text()
    assert text.count('class="chosen"') == 3 and text.count("<tr ") == 3 + 2 + 3
    assert text.count('<svg class="lines"') == 3 + 1 and text.count('class="bar"') == 2
    assert text.count("<img") == 3 + 1 + 1  # the depthwise mask before BWT, before HSR and after; two others
    for label in ("DCP: smallest taps", "BWT: equal per group", "HSR: recalibrated", "tiles of 8, 50.0% zeros"):
        assert label in text, label


def test_an_empty_page(tmp_path: Path) -> None:
    report_html.write(tmp_path / "e.html", explain=Table("matches", ("layer", "kernel", "dense us"), []))
    assert "nothing is pruned" in (tmp_path / "e.html").read_text()


def test_mask_picture() -> None:
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[2, 3] = True
    picture = Image.open(io.BytesIO(base64.b64decode(charts.mask_png(mask).partition(",")[2])))
    assert picture.size == (9, 6)
    assert sorted(picture.tobytes()) == [35] + [235] * 53 and picture.getpixel((3, 2)) == 35
    large = Image.open(io.BytesIO(base64.b64decode(charts.mask_png(torch.ones(999, 10) > 0).partition(",")[2])))
    assert large.size == (10, 192)


def run(*arguments: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def evaluated(page: Path, script: str, *arguments: str) -> Any:
    """Run ``script`` behind the page's own and return what it calls ``tell`` with."""
    code = f"<script>const tell=v=>document.body.dataset.told=JSON.stringify(v);{script}</script></body>"
    other = page.with_name("evaluated.html")
    other.write_text(page.read_text().replace("</body>", code))
    found = re.search(r'data-told="([^"]*)"', run("--dump-dom", *arguments, other.as_uri()))
    assert found is not None
    return json.loads(html.unescape(found.group(1)))


@browser
def test_sorting(page: Path) -> None:
    first, ascending, descending, named = evaluated(
        page,
        """
        const box = document.querySelectorAll("section.table")[1];
        const column = name => [...box.querySelectorAll("th button")].find(b => b.textContent === name);
        const read = i => [...box.querySelectorAll("tbody tr")].map(r => r.cells[i].textContent);
        const result = [read(0)];
        column("dense us").click(); result.push(read(7).map(Number));
        column("dense us").click(); result.push(read(7).map(Number));
        column("layer").click(); result.push(read(0));
        tell(result);
        """,
    )
    assert sorted(first) == named == ["dw", "fc", "pw"]
    assert ascending == sorted(ascending) and descending == ascending[::-1] and len(set(ascending)) == 3


@browser
def test_filters(page: Path) -> None:
    told = evaluated(
        page,
        """
        const box = document.querySelectorAll("section.table")[1], table = box.querySelector("table");
        const set = (input, key, value) => { input[key] = value; input.dispatchEvent(new Event("input")); };
        const seen = () => [[...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[0].textContent).sort().join(),
                            box.querySelector("output").value];
        const result = [seen()], search = box.querySelector("input[type=search]"), kind = box.querySelector("select");
        set(search, "value", "TILE_gemm"); result.push(seen());
        set(kind, "value", "linear"); result.push(seen());
        set(search, "value", "nothing like it"); result.push(seen());
        set(search, "value", ""); set(kind, "value", "");
        table.tBodies[0].rows[0].classList.remove("chosen");
        set(box.querySelector("input[type=checkbox]"), "checked", true); result.push(seen()[1]);
        tell(result);
        """,
    )
    assert told == [["dw,fc,pw", "3 of 3"], ["fc,pw", "2 of 3"], ["fc", "1 of 3"], ["", "0 of 3"], "2 of 3"]


def test_graphs_of_the_passes(page: Path) -> None:
    text = page.read_text()
    names = re.findall(r"<summary>\d+ <b>(\w+)</b>", text)
    rewrites = ["fold_batchnorm", "rewrite_depthwise", "rewrite_gemm", "fuse_epilogue", "form_regions"]
    assert names == ["captured", "normalize", *rewrites]
    assert '<code data-c="-">conv2d_default (2, 16, 8, 8) float32 = aten.conv2d(' in text
    assert '<code data-c="+">region_default = fxprune.region([l_x_], [' in text


@browser
def test_finding_a_node(page: Path) -> None:
    told = evaluated(
        page,
        """
        const box = document.querySelector("section.graph"), passes = [...box.querySelectorAll("details")];
        const set = (input, key, value) => { input[key] = value; input.dispatchEvent(new Event("input")); };
        const open = () => passes.filter(p => p.open).map(p => p.querySelector("b").textContent);
        const shown = p => [...p.querySelectorAll("code:not([data-c=s])")].filter(c => !c.hidden).length;
        const skipped = p => [...p.querySelectorAll("code[data-c=s]")].map(c => c.textContent).join();
        const result = [[open().join(), shown(passes[0]), shown(passes[3]), skipped(passes[3])]];
        const search = box.querySelector("input[type=search]"), said = box.querySelector("output");
        set(search, "value", "FXPRUNE.region"); 
        result.push([open().join(), said.value, box.querySelectorAll(".hit").length]);
        set(search, "value", "");
        set(box.querySelector("input[type=checkbox]"), "checked", true); result.push([shown(passes[3]), skipped(passes[3])]);
        tell(result);
        """,
    )
    assert told[0] == ["", 8, 6, "... 2 lines"]
    assert told[1] == ["form_regions", "1 line", 1]
    assert told[2] == [8, ""]


@browser
@pytest.mark.parametrize("width", [360, 1200])
def test_no_sideways_scrolling(page: Path, width: int) -> None:
    script = "tell([document.documentElement.scrollWidth, innerWidth, document.querySelectorAll('img').length])"
    needed, given, pictures = evaluated(page, script, f"--window-size={width},800")
    assert needed <= given and pictures == 5


@browser
def test_dark_and_light(page: Path, tmp_path: Path) -> None:
    brightness = []
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        run(
            f"--screenshot={shot}", "--window-size=390,900", f"--blink-settings=preferredColorScheme={scheme}", page.as_uri()
        )
        with Image.open(shot) as picture:
            brightness.append(picture.convert("L").getpixel((2, 2)))
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50  # something is drawn
    assert brightness[0] < 60 and brightness[1] > 200
