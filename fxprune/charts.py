"""Pictures as text: SVG charts and PNG masks for a page without a network. Colours are CSS variables of the page."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_SIDE = 192  # pixels of a mask picture at most
Points = Sequence[tuple[float, float]]


def stacked(parts: Sequence[tuple[str, str, float]], total: float) -> str:
    """Return one bar of (layer, kind, microseconds), as long as its sum is of ``total``."""
    cells = "".join(
        f'<i class="k-{html.escape(kind)}" style="width:{100 * micros / total:.3f}%" '
        f'title="{html.escape(layer)}: {micros:.1f} us"></i>'
        for layer, kind, micros in parts
        if total
    )
    return f'<div class="bar">{cells}</div>'


def lines(
    series: Mapping[str, Points], label: str, steps: bool = False, marks: Points = (), level: float | None = None
) -> str:
    """Return an SVG of curves over x in [0, 1]; ``marks`` are dots, ``level`` a dashed horizontal line."""
    width, height, left, bottom = 320, 160, 44, 22
    every = [y for points in series.values() for _, y in points] + [y for _, y in marks] + ([level] if level else [])
    top = max([*every, 1e-12]) * 1.05

    def at(x: float, y: float) -> str:
        return f"{left + x * (width - left - 8):.1f},{height - bottom - max(y, 0) / top * (height - bottom - 8):.1f}"

    body = []
    for i, (name, points) in enumerate(series.items()):
        path = list(points)
        if steps:
            path = [p for a, b in zip(points, [*points[1:], points[-1]], strict=True) for p in (a, (b[0], a[1]))]
        drawn = " ".join(at(x, y) for x, y in path)
        body.append(f'<polyline class="c{i % 6}" points="{drawn}"><title>{html.escape(name)}</title></polyline>')
    if level:
        (x0, y0), (x1, _) = (at(x, level).split(",") for x in (0.0, 1.0))
        body.append(f'<line class="level" x1="{x0}" x2="{x1}" y1="{y0}" y2="{y0}"><title>dense</title></line>')
    for x, y in marks:
        cx, cy = at(x, y).split(",")
        body.append(f'<circle cx="{cx}" cy="{cy}" r="4"><title>chosen: {x:.0%} zeros, {y:.1f}</title></circle>')
    for share in (0.0, 0.5, 1.0):
        anchor, value = "end" if share == 1.0 else "middle", share * top / 1.05
        px, py = at(share, 0.0).split(",")
        body.append(f'<text x="{px}" y="{float(py) + 14:.0f}" text-anchor="{anchor}">{share:.0%}</text>')
        px, py = at(0.0, value).split(",")
        body.append(f'<text x="{float(px) - 4:.0f}" y="{float(py) + 4:.0f}" text-anchor="end">{_number(value)}</text>')
    title = f"<title>{html.escape(label)}</title>"
    return f'<svg class="lines" role="img" viewBox="0 0 {width} {height}">{title}{"".join(body)}</svg>'


def mask_png(mask: Tensor) -> str:
    """Return a data address of a picture of a mask (N, K): dark where weights are kept, grey where a pixel holds several."""
    share = mask.float()[None, None]
    size = (min(mask.shape[0], _SIDE), min(mask.shape[1], _SIDE))
    grey = torch.nn.functional.adaptive_avg_pool2d(share, size)[0, 0]
    pixels = (235 - 200 * grey).round().to(torch.uint8)
    rows = b"".join(b"\x00" + bytes(row.tolist()) for row in pixels)
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 0)
    chunks = _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
