"""A picture as data: marks with their places, and texts with the room that they take."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable
from typing import Literal

__all__ = ["Box", "Node", "Parts", "Path", "Picture", "Text", "RADIUS", "line_of", "width_of", "wrapped"]

Parts = tuple[tuple[str, str], ...]  # texts with their styles, keys of `_SIZES`
Anchor = Literal["start", "middle", "end"]
RADIUS = 9.0  # of a sum


@dataclasses.dataclass(frozen=True)
class Text:
    """One line of text that takes at most `room`; `x` is its start, or its middle."""

    x: float
    y: float
    parts: Parts
    room: float
    anchor: Anchor = "start"


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle, the texts in it, and what it says when pointed at; `kind` is its style."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str = ""
    texts: tuple[Text, ...] = ()


@dataclasses.dataclass(frozen=True)
class Path:
    """A line through points, with round corners, and maybe an arrowhead at its end."""

    points: tuple[tuple[float, float], ...]
    kind: str
    arrow: bool = False


@dataclasses.dataclass(frozen=True)
class Node:
    """A circle on a line: "sum" (+), "product" (×), "undecided" (?) or "dot"."""

    x: float
    y: float
    kind: Literal["sum", "product", "undecided", "dot"]
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """Marks in the order of their drawing."""

    width: float
    height: float
    label: str
    marks: tuple[Box | Path | Node | Text, ...]


# ---- sizes of texts

_SIZES = {"": 12.5, "b": 12.5, "q": 11.5, "m": 12.0, "t": 17.0, "s": 9.0, "n": 15.0}  # plain, bold, quiet, code, ...
_BOLD = "btn"
_EMS = {
    c: em
    for em, chars in (
        (0.34, "ijl'|IJ ,.·/:;\\"), (0.43, "f-()[]tr!"), (0.59, "sczLFkvxy?*_`\""), (0.66, "abdeghnopqu0123456789{}$"),
        (0.79, "ABCEHKNPRSTUVXYZ&"), (0.84, "wDGOQ#+<=>^~→×−⊕⊗"),
    )
    for c in chars
}  # fmt: skip


def width_of(parts: Iterable[tuple[str, str]]) -> float:
    """No less than what the parts take in DejaVu Sans and DejaVu Sans Mono, among the widest of usual fonts."""
    return sum(_SIZES[style] * sum(_em(c, style) for c in text) for text, style in parts)


def _em(c: str, style: str) -> float:
    if unicodedata.east_asian_width(c) in "WF":
        return 1.1
    if style == "m":
        return 0.61 if c.isascii() or c in _EMS or c == "…" else 0.9
    return _EMS.get(c, 1.0) * (1.2 if style in _BOLD else 1.0)


def _fit(parts: Iterable[tuple[str, str]], room: float) -> Parts:
    """The parts, the longest of them shortened in its middle until all fit."""
    fitted = [(text, style) for text, style in parts if text]
    while (over := width_of(fitted) - room) > 0:
        k = max(range(len(fitted)), key=lambda k: len(fitted[k][0]))
        text, style = fitted[k]
        if len(text) < 3:
            break
        keep = max(1, min(len(text) - 2, int(len(text) - 1 - over / _SIZES[style])))
        fitted[k] = (f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}", style)
    return tuple(fitted)


def line_of(x: float, y: float, room: float, *parts: tuple[str, str], anchor: Anchor = "start") -> Text:
    """One line of text, shortened to its room."""
    return Text(x, y, _fit(parts, room), room, anchor)


def wrapped(words: str, style: str, room: float, at_most: int = 6) -> list[str]:
    """Lines of whole words; what is left over goes into the last one, which is shortened when it is set."""
    lines: list[str] = []
    for word in words.split():
        if lines and (len(lines) == at_most or width_of([(f"{lines[-1]} {word}", style)]) <= room):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
