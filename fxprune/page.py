"""The frame of the report page: styles for light, dark and narrow screens, and the script that sorts and filters."""

STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--dim:#656d76;--line:#d5dae0;--soft:#f3f5f7;--c0:#2f6fd0;--c1:#c96f12;--c2:#2b8a57;--c3:#8250c4;
--c4:#b83b5e;--c5:#0f8a8a;--gone:#a6202c;--gonebg:#fdecec;--new:#116329;--newbg:#e8f6ec}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e3e7ec;--dim:#98a2ad;--line:#343b44;--soft:#1d2228;--c0:#6ea3f5;
--c1:#eda04b;--c2:#5cc08c;--c3:#b48cf0;--c4:#f07a9a;--c5:#4cc3c3;
--gone:#ff9b9b;--gonebg:#3a1d20;--new:#7fd99a;--newbg:#17301f}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.35rem;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:1.8rem 0 .5rem}
p,figcaption,.dim{color:var(--dim)}
.bar{display:flex;height:1.6rem;margin:.15rem 0 .6rem;background:var(--soft);border-radius:3px;overflow:hidden}
.bar i{display:block;height:100%;border-right:1px solid var(--bg)}
.k-depthwise{background:var(--c0)}.k-pointwise{background:var(--c1)}.k-linear{background:var(--c2)}.k-conv{background:var(--c3)}
.k-rnn{background:var(--c4)}
.legend span{display:inline-flex;align-items:center;gap:.35rem;margin-right:1rem}
.legend i{width:.8rem;height:.8rem;border-radius:2px}
.controls{display:flex;flex-wrap:wrap;gap:.6rem;align-items:center;margin:.5rem 0}
input,select{font:inherit;color:inherit;background:var(--soft);border:1px solid var(--line);border-radius:4px;
padding:.3rem .5rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:5px}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th{position:sticky;top:0;background:var(--soft);text-align:left;padding:0}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:.4rem .55rem;cursor:pointer;width:100%;
text-align:inherit;white-space:nowrap}
th[aria-sort=ascending] button:after{content:" \\2191"}th[aria-sort=descending] button:after{content:" \\2193"}
td{padding:.32rem .55rem;border-top:1px solid var(--line);vertical-align:top;white-space:nowrap}
th.n{text-align:right}td.n{text-align:right;font-variant-numeric:tabular-nums}td.long{white-space:normal;min-width:14rem}
tr.chosen td:first-child{box-shadow:inset 3px 0 var(--c2)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1rem}
figure{margin:0;padding:.6rem;border:1px solid var(--line);border-radius:5px;overflow:hidden}
figcaption{font-size:.85rem;overflow-wrap:anywhere}figcaption b{color:var(--fg)}
figure img{max-width:100%;min-width:3rem;min-height:2rem;max-height:12rem;image-rendering:pixelated;
border:1px solid var(--line);margin:.4rem .4rem 0 0}
.mask{display:inline-flex;flex-direction:column;vertical-align:top;max-width:7rem;font-size:.75rem;color:var(--dim)}
.mask img{align-self:flex-start}.curves{max-width:38rem}
svg.lines{width:100%;height:auto}svg text{fill:var(--dim);font-size:10px}
polyline{fill:none;stroke-width:1.8}.level{stroke:var(--dim);stroke-dasharray:4 3}circle{fill:var(--c4)}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;margin:.5rem 0}dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}
details{border:1px solid var(--line);border-radius:5px;margin:.4rem 0;overflow:hidden}
summary{padding:.45rem .6rem;cursor:pointer;background:var(--soft);overflow-wrap:anywhere}
summary .gone{color:var(--gone)}summary .new{color:var(--new)}
.graph pre{margin:0;padding:.3rem 0;overflow-x:auto;font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
.graph code{display:block;width:max-content;min-width:100%;padding:0 .6rem 0 1.7rem;position:relative;white-space:pre}
.graph code:before{position:absolute;left:.6rem;color:var(--dim)}
.graph code[data-c="-"]{background:var(--gonebg)}.graph code[data-c="-"]:before{content:"-";color:var(--gone)}
.graph code[data-c="+"]{background:var(--newbg)}.graph code[data-c="+"]:before{content:"+";color:var(--new)}
.graph code[data-c=s]{color:var(--dim)}.graph .hit{outline:1px solid var(--c1);outline-offset:-1px}
@media(max-width:40rem){.graph pre{font-size:11px}
.graph code{width:auto;white-space:pre-wrap;overflow-wrap:anywhere}
body{padding:.6rem;font-size:14px}dl{grid-template-columns:1fr}dt{margin-top:.4rem}}
"""

SCRIPT = """
for (const box of document.querySelectorAll("section.table")) {
  const table = box.querySelector("table"), body = table.tBodies[0], rows = [...body.rows];
  const text = box.querySelector("input[type=search]"), kind = box.querySelector("select");
  const chosen = box.querySelector("input[type=checkbox]"), count = box.querySelector("output");
  const show = () => {
    const words = text.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let seen = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !words.every(w => content.includes(w)) || (kind && kind.value && row.dataset.kind !== kind.value)
        || (chosen && chosen.checked && !row.classList.contains("chosen"));
      seen += !row.hidden;
    }
    count.value = seen + " of " + rows.length;
  };
  for (const input of [text, kind, chosen]) input && input.addEventListener("input", show);
  [...table.tHead.rows[0].cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.v, number = v => v !== "" && !isNaN(v);
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (number(x) !== number(y)) return number(x) ? -1 : 1;
      const order = number(x) ? x - y : x.localeCompare(y, undefined, {numeric: true});
      return up ? order : -order;
    });
    body.append(...rows);
  }));
  show();
}
for (const box of document.querySelectorAll("section.graph")) {
  const text = box.querySelector("input[type=search]"), all = box.querySelector("input[type=checkbox]");
  const count = box.querySelector("output"), passes = [...box.querySelectorAll("details")];
  const near = 2;
  const show = () => {
    const words = text.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let hits = 0;
    for (const pass of passes) {
      const lines = [...pass.querySelectorAll("code:not([data-c=s])")];
      const hit = lines.map(line => words.length > 0 && words.every(w => line.textContent.toLowerCase().includes(w)));
      const whole = all.checked || !lines.some(line => line.dataset.c);
      const seen = lines.map((_, i) => words.length ? hit[i] : whole);
      if (!words.length && !whole) lines.forEach((line, i) => {
        if (line.dataset.c) for (let k = i - near; k <= i + near; k++) if (k >= 0 && k < lines.length) seen[k] = true;
      });
      pass.querySelectorAll("code[data-c=s]").forEach(skip => skip.remove());
      let hidden = 0;
      lines.forEach((line, i) => {
        line.hidden = !seen[i];
        line.style.display = seen[i] ? "" : "none";
        line.classList.toggle("hit", hit[i]);
        hits += hit[i];
        hidden = seen[i] ? 0 : hidden + 1;
        if (hidden && (i + 1 === lines.length || seen[i + 1])) {
          const skip = document.createElement("code");
          skip.dataset.c = "s";
          skip.textContent = "... " + hidden + (hidden > 1 ? " lines" : " line");
          line.after(skip);
        }
      });
      if (words.length) pass.open = hit.some(Boolean);
    }
    count.value = words.length ? hits + (hits === 1 ? " line" : " lines") : passes.length + " stages";
  };
  for (const input of [text, all]) input.addEventListener("input", show);
  show();
}
"""
