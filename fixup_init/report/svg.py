"""A structure as SVG that stands alone.

Colours are tints of few hues over the ground and texts in the colour of the page, so that it reads on light and dark
pages alike.
"""

from __future__ import annotations

import re
from html import escape

from fixup_init.plan import Plan
from fixup_init.report.drawing import lay_out
from fixup_init.report.picture import RADIUS, Box, Node, Path, Picture, Text
from fixup_init.structure import Structure

__all__ = ["render", "svg"]


def svg(structure: Structure, plan: Plan | None = None) -> str:
    """A structure as a picture.

    Args:
      structure: what `fi.structure` returned.
      plan: what `fi.plan` returned for the same model; with it each layer shows its standard deviation.

    Returns:
      The text of an `<svg>` element that needs nothing else, for a file of its own or inside a page.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> net = fi.Function(lambda w, x: x + jnp.tanh(x @ w), jax.ShapeDtypeStruct((8, 8), jnp.float32))
      >>> svg(fi.structure(net, jax.ShapeDtypeStruct((4, 8), jnp.float32)))[:4]
      '<svg'
    """
    return render(lay_out(structure, plan))


_CSS = """
.fi{font:12.5px system-ui,"DejaVu Sans","Segoe UI",sans-serif;color:inherit}
.fi:root{color:#1b1f24;background:#fff}
@media(prefers-color-scheme:dark){.fi:root{color:#e7eaee;background:#14171a}}
.fi text,.fi .glyph{fill:currentColor}
.fi .b,.fi .t,.fi .n{font-weight:600}
.fi .t{font-size:17px}.fi .n{font-size:15px}.fi .s{font-size:9px;opacity:.8}
.fi .q{font-size:11.5px;opacity:.75}
.fi .m{font:12px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
.fi path,.fi circle,.fi rect{fill:none;stroke:currentColor;stroke-width:1.4}
.fi .stream{stroke-width:2.6}.fi .line{stroke-opacity:.7}.fi .side{stroke-opacity:.6;stroke-dasharray:3 3}
.fi .bracket{stroke-opacity:.55}
.fi .head{fill:currentColor;stroke:none}
.fi .dot{fill:currentColor;stroke:none}
.fi .bar{fill:currentColor;fill-opacity:.07;stroke-opacity:.5}
.fi .branch{fill:currentColor;fill-opacity:.025;stroke-opacity:.3}
.fi .pill{stroke-opacity:.6;stroke-dasharray:4 3}
.fi .value{stroke:#3b8ec9;fill:#3b8ec9;fill-opacity:.17}
.fi .control{stroke:#b8609a;fill:#b8609a;fill-opacity:.17}
.fi .gate{stroke:#b08a00;fill:#b08a00;fill-opacity:.2}
.fi .shortcut{stroke:#2aa583;fill:#2aa583;fill-opacity:.17}
.fi .arm,.fi .region{stroke-opacity:.65;stroke-dasharray:6 4}
.fi .region{fill:currentColor;fill-opacity:.04}
.fi .other{stroke-opacity:.6;fill:currentColor;fill-opacity:.06;stroke-dasharray:4 3}
.fi .warning,.fi .undecided{stroke:#e0602a;fill:#e0602a;fill-opacity:.14;stroke-width:1.8}
.fi g:hover>rect{stroke-width:2.4}
"""
_CONTROL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(picture: Picture) -> str:
    """A picture as SVG."""
    size = f'viewBox="0 0 {picture.width:g} {picture.height:g}" width="{picture.width:g}" height="{picture.height:g}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fi" {size} style="max-width:100%;height:auto" role="img" '
        f'aria-label="{_safe(picture.label)}">'
    )
    body = "\n".join(_mark(mark) for mark in picture.marks)
    return f"{head}\n<style>{_CSS}</style>\n{body}\n</svg>"


def _mark(mark: Box | Path | Node | Text) -> str:
    if isinstance(mark, Text):
        return _set(mark)
    if isinstance(mark, Path):
        return _stroke(mark)
    if isinstance(mark, Node):
        return _circle(mark)
    radius = (
        11 if mark.kind == "pill" else 8 if mark.kind in ("branch", "arm") else 3 if mark.kind.startswith("k") else 5
    )
    at = f'x="{mark.x:g}" y="{mark.y:g}" width="{mark.width:g}" height="{mark.height:g}" rx="{radius}"'
    inside = "".join(map(_set, mark.texts))
    return f'<g>{_title(mark.title)}<rect class="{mark.kind}" {at}/>{inside}</g>'


def _set(text: Text) -> str:
    anchor = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    spans, raised = [], False
    for words, style in text.parts:
        shift = ' dy="-4"' if style == "s" else ' dy="4"' if raised else ""
        raised = style == "s"
        of_style = f' class="{style}"' if style else ""
        spans.append(f"<tspan{of_style}{shift}>{_safe(words)}</tspan>")
    return f'<text x="{text.x:g}" y="{text.y:g}"{anchor} xml:space="preserve">{"".join(spans)}</text>'


def _stroke(path: Path) -> str:
    """A line with round corners; an arrowhead takes the last of it."""
    points = list(path.points)
    head = ""
    if path.arrow:
        (x0, y0), (x1, y1) = points[-2:]
        length = max(abs(x1 - x0), abs(y1 - y0))
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        long, wide = (9, 5) if path.kind == "stream" else (7, 3.6)
        bx, by = x1 - dx * long, y1 - dy * long
        corners = ((x1, y1), (bx - dy * wide, by + dx * wide), (bx + dy * wide, by - dx * wide))
        head = f'<path class="head" d="M{_at(corners[0])}L{_at(corners[1])}L{_at(corners[2])}Z"/>'
        points[-1] = (x1 - dx * (long - 1), y1 - dy * (long - 1))
    d = f"M{_at(points[0])}"
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        d += f"L{_at(_towards(corner, before))}Q{_at(corner)} {_at(_towards(corner, after))}"
    return f'<path class="{path.kind}" d="{d}L{_at(points[-1])}"/>{head}'


def _towards(a: tuple[float, float], b: tuple[float, float], step: float = 6.0) -> tuple[float, float]:
    length = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1e-9)
    part = min(step / length, 0.5)
    return a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])


def _circle(node: Node) -> str:
    x, y = node.x, node.y
    title = _title(node.title)
    if node.kind == "dot":
        return f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="3.5"/>'
    r = 7 if node.kind == "product" else RADIUS
    circle = f'<circle class="{node.kind}" cx="{x:g}" cy="{y:g}" r="{r:g}" pointer-events="all"/>'
    if node.kind == "undecided":
        return f'<g>{title}{circle}<text class="b" x="{x:g}" y="{y + 4.5:g}" text-anchor="middle">?</text></g>'
    a = r * (0.71 if node.kind == "product" else 1)
    ends = ((-a, -a, a, a), (-a, a, a, -a)) if node.kind == "product" else ((-a, 0, a, 0), (0, -a, 0, a))
    d = "".join(f"M{_at((x + p, y + q))}L{_at((x + u, y + v))}" for p, q, u, v in ends)
    return f'<g>{title}{circle}<path d="{d}"/></g>'


def _at(point: tuple[float, float]) -> str:
    return f"{round(point[0], 1):g} {round(point[1], 1):g}"


def _title(words: str) -> str:
    return f"<title>{_safe(words)}</title>" if words else ""


def _safe(words: str) -> str:
    return escape(_CONTROL.sub("\ufffd", words))
