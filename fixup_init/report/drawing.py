"""A structure as a picture: the stream runs down, branches stand beside it, and what repeats is drawn once.

`lay_out` computes a `Picture`, which is data; `render` writes it as an SVG that stands alone. Colours are tints of few
hues over the ground and texts in the colour of the page, so that it reads on light and dark pages alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Literal

from fixup_init.plan import Entry, Plan
from fixup_init.report.layout import Run, fold, merged, number, plural
from fixup_init.report.outline import (
    Item,
    Stretch,
    Within,
    arms_words,
    by_path,
    columns,
    common_home,
    covered,
    layer_words,
    names_within,
    norm_words,
    numbers,
    order_words,
    outline,
    reading_words,
    region_words,
    settle_words,
    size_words,
    stretches,
    units,
    unruled_words,
    within,
    within_words,
)
from fixup_init.structure import Arm, Branch, LayerInfo, Structure, Undecided

__all__ = ["Box", "Node", "Path", "Picture", "Text", "lay_out", "render", "svg"]

Parts = tuple[tuple[str, str], ...]  # texts with their styles, keys of `_SIZES`


@dataclasses.dataclass(frozen=True)
class Text:
    """One line of text that takes at most `room`; `x` is its start, or its middle."""

    x: float
    y: float
    parts: Parts
    room: float
    anchor: Literal["start", "middle", "end"] = "start"


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


# ---- what is drawn: parts, each standing for all items that it was folded from


@dataclasses.dataclass(frozen=True)
class _Part:
    """Equal things that are drawn once; `beside` are the other branches of the same sums."""

    items: tuple[Item | Undecided, ...]
    beside: tuple[tuple[Item, ...], ...] = ()
    count: int = 1  # how many sums or layers there are

    @property
    def item(self) -> Item | Undecided:
        return self.items[0]

    @property
    def branches(self) -> tuple[tuple[Item, ...], ...]:
        """Of a sum: its branches, equal ones together."""
        first = tuple(i for i in self.items if isinstance(i, Item) and i.branch is not None)
        return (first, *self.beside) if first else ()

    @property
    def repeats(self) -> int:
        """Passes of a scan that each item stands for."""
        item = self.item
        if isinstance(item, Undecided):
            return 1
        return item.branch.repeats if item.branch else item.layer.repeats if item.layer else 1

    @property
    def arms(self) -> tuple[Arm, ...]:
        return () if isinstance(self.item, Undecided) else self.item.arms

    @property
    def all_arms(self) -> list[tuple[Arm, ...]]:
        return [i.arms for i in self.items if isinstance(i, Item)]


@dataclasses.dataclass(frozen=True)
class _Bracket:
    """Parts first..last occur `count` times; `level` 0 is nearest to them."""

    first: int
    last: int
    count: int
    scan: bool
    level: int


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Parts first..last are in an arm of a conditional; `level` 0 is the outermost."""

    first: int
    last: int
    level: int
    words: str


def _parts(structure: Structure, plan: Mapping[str, Entry], inner: Within) -> tuple[list[_Part], list[_Bracket]]:
    found = _sequence(structure)
    layers = by_path(structure)
    parts: list[_Part] = []
    folds: list[_Bracket] = []
    run_of: list[int] = []
    keys = [tuple(_key(x, layers, plan, inner) for x in unit) for unit in found]
    for n, run in enumerate(fold(keys)):
        first = len(parts)
        for k in range(run.start, run.start + run.period):
            same = found[k : run.stop : run.period]
            one = [unit[0] for unit in same]
            if len(same[0]) == 1:
                parts.append(_Part(tuple(one), (), len(same)))
            else:
                own = columns([[i for i in unit if isinstance(i, Item)] for unit in same], keys[k])
                parts.append(_Part(own[0], tuple(own[1:]), len(same)))
        run_of += [n if run.count > 1 else -1] * run.period
        if run.count > 1:
            folds.append(_Bracket(first, len(parts) - 1, run.count, False, 0))
    scans: list[_Bracket] = []
    for k, part in enumerate(parts):
        if part.repeats == 1:
            continue
        before = scans[-1] if scans and scans[-1].last == k - 1 else None
        together = before is not None and before.count == part.repeats and run_of[k] == run_of[k - 1]
        if before is not None and together and common_home(_paths(parts[before.first].item) + _paths(part.item)):
            scans[-1] = dataclasses.replace(before, last=k)
        else:
            scans.append(_Bracket(k, k, part.repeats, True, 0))
    outer = [
        dataclasses.replace(f, level=int(any(f.first <= s.first and s.last <= f.last for s in scans))) for f in folds
    ]
    return parts, outer + scans


def _frames(parts: Sequence[_Part]) -> list[_Frame]:
    """The arms that parts are in: neighbours in one arm share a frame."""
    frames = []
    for level in range(max((len(part.arms) for part in parts), default=0)):
        runs = itertools.groupby(range(len(parts)), key=lambda k: parts[k].arms[: level + 1])
        for arms, group in runs:
            own = list(group)
            if len(arms) > level:
                frames.append(_Frame(own[0], own[-1], level, arms_words([arms[-1:]])))
    return frames


def _sequence(structure: Structure) -> list[tuple[Item, ...] | tuple[Undecided]]:
    """Items in trace order, the branches of one sum together; sums that are undecided behind the last weight of their
    terms and the branches before them, tied heads at the end."""
    place = {path: k for k, path in enumerate(by_path(structure))}
    found: list[tuple[int, tuple[Item, ...] | tuple[Undecided]]] = []
    # Layers of an undecided sum are shown with it.
    shown = {q for u in structure.undecided for term in u.terms for q in term}
    apart = {"layer"} if structure.branches else {"layer", "stem"}
    at = -1
    ends = [-1]  # behind so many branches
    for unit in units(outline(structure)):
        item = unit[0]
        at = max([at, *(place[q] for i in unit for q in i.paths)])
        ends += [at] * sum(i.branch is not None for i in unit)
        if item.place in apart and item.paths[0] in shown:
            continue
        if item.place == "head" and item.paths[0] in structure.stems:
            found.append((at, (dataclasses.replace(item, place="stem", key=("stem", item.key)),)))
            found.append((len(place), unit))
        else:
            found.append((at, unit))
    for u in structure.undecided:
        behind = max((place.get(q, 0) for term in u.terms for q in term), default=0)
        behind = max(behind, ends[min(u.position, len(ends) - 1)])
        found.append((behind if u.what == "sum" else len(place) + 1, (u,)))
    return [unit for _, unit in sorted(found, key=lambda f: f[0])]


def _key(item: Item | Undecided, layers: Mapping[str, LayerInfo], plan: Mapping[str, Entry], inner: Within) -> Hashable:
    """What folding compares: the item, what lies within it, and what the plan gives to its parameters."""
    if isinstance(item, Undecided):
        terms = tuple(tuple((layer_words(layers[q]), _entry_key(plan.get(q))) for q in term) for term in item.terms)
        return item.what, re.sub(r"\d+", "0", item.why), terms
    paths = item.paths + ((*item.branch.skip_weights, *item.branch.closing) if item.branch else ())
    hidden = covered(item, inner) if item.branch else ()
    return item.key, tuple(q in hidden for q in item.paths), tuple(_entry_key(plan.get(q)) for q in paths)


def _entry_key(entry: Entry | None) -> Hashable:
    return entry and (entry.distribution, entry.std, entry.value)


def _paths(item: Item | Undecided) -> tuple[str, ...]:
    return tuple(q for term in item.terms for q in term) if isinstance(item, Undecided) else item.paths


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


def _width(parts: Iterable[tuple[str, str]]) -> float:
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
    while (over := _width(fitted) - room) > 0:
        k = max(range(len(fitted)), key=lambda k: len(fitted[k][0]))
        text, style = fitted[k]
        if len(text) < 3:
            break
        keep = max(1, min(len(text) - 2, int(len(text) - 1 - over / _SIZES[style])))
        fitted[k] = (f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}", style)
    return tuple(fitted)


Anchor = Literal["start", "middle", "end"]


def _text(x: float, y: float, room: float, *parts: tuple[str, str], anchor: Anchor = "start") -> Text:
    return Text(x, y, _fit(parts, room), room, anchor)


def _wrapped(words: str, style: str, room: float, at_most: int = 6) -> list[str]:
    """Lines of whole words; what is left over goes into the last one, which is shortened when it is set."""
    lines: list[str] = []
    for word in words.split():
        if lines and (len(lines) == at_most or _width([(f"{lines[-1]} {word}", style)]) <= room):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


# ---- what a plan says, in a few characters

_BASE = re.compile(r"\b(He|Glorot|LeCun) fan")
_FACTOR = re.compile(r"\bL\^\(-([\d./]+)\)")


def _drawn(entry: Entry | None) -> Parts:
    """`std 0.0884 = He × L^−1/4`, `zero`, `1` or `model's own`."""
    if entry is None:
        return ()
    if entry.distribution == "model":
        return (("model's own", "q"),)
    if entry.distribution == "constant":
        return (("zero", "b"),) if entry.value == 0 else ((number(entry.value), "b"),)
    parts: Parts = (("std ", "q"), (number(entry.std), "b"))
    if base := _BASE.search(entry.reason):
        parts += ((f" = {base[1]}", "q"),)
        if factor := _FACTOR.search(entry.reason):
            parts += ((" × L", "q"), (f"−{factor[1]}", "s"))
    return parts


def _why(entries: Sequence[Entry | None]) -> str:
    known = [e for e in entries if e is not None]
    return f"\n{merged(e.reason for e in known)}" if known and known[0].reason else ""


# ---- the layout

_WIDTH, _NARROW_WIDTH = 900.0, 730.0  # with a plan, without
_MARGIN = 16.0
_FRAME, _RAIL = 9.0, 16.0  # what an arm takes at each side, and lines beside parallel branches
_ROW, _GAP = 24.0, 11.0
_RADIUS = 9.0  # of a sum
_ONLY = "(the parameter)"  # of a model whose parameters are one array
_ROLES = {
    "value": "a factor of the branch",
    "control": "steers the branch from beside",
    "gate": "multiplies the branch from beside",
    "shortcut": "a weight on the skip",
}


class _Pen:
    """Draws downwards; `y` is where the next mark goes, `at` how far the stream is drawn."""

    def __init__(self, structure: Structure, plan: Plan | None) -> None:
        self.structure = structure
        self.plan = {e.path: e for e in plan.entries} if plan is not None else {}
        self.scheme = plan.scheme if plan is not None else None
        self.layers = by_path(structure)
        self.roles = {q.path: q.role for q in structure.parameters}
        self.inner = within(outline(structure))
        self.parts, self.brackets = _parts(structure, self.plan, self.inner)
        self.frames = _frames(self.parts)
        self.marks: list[Box | Path | Node | Text] = []
        branches = structure.branches
        skips = any(b.skip_weights for b in branches)
        self.width = _WIDTH if self.plan else _NARROW_WIDTH
        levels = max((b.level + 1 for b in self.brackets), default=0)
        # Of one level of brackets.
        self.gutter = 22 + max((_width([(f"× {b.count}", "n")]) for b in self.brackets), default=0.0)
        self.nested = _FRAME * (1 + max((f.level for f in self.frames), default=-1))
        self.left = _MARGIN + self.gutter * levels + self.nested
        self.half = 88.0 if skips else 54.0 if branches else 44.0
        self.stream = self.left + self.half
        self.right = self.width - _MARGIN - self.nested - (_RAIL if any(p.beside for p in self.parts) else 0)
        self.box = self.stream + self.half + 30  # left edge of branches
        folded = (r.count > 1 for p in self.parts for own in p.branches for s in self._stretches(own) for r in s.runs)
        inner = 48.0 if any(folded) else 0.0
        self.inside = self.right - 14 - inner  # right edge of the layers in a branch
        self.drawn = self.inside - 190 if self.plan else self.inside - 12
        self.kind = self.drawn - 140
        self.y = self.at = 0.0

    # -- the whole

    def draw(self) -> Picture:
        s = self.structure
        places = self._places()
        self._heading()
        self._ends("input")
        tops, bottoms = [], []
        open_: dict[_Frame, float] = {}
        for k, (part, place) in enumerate(zip(self.parts, places, strict=True)):
            top = self.y
            for frame in (f for f in self.frames if f.first == k):
                open_[frame] = self.y
                self.y += 26
            tops.append((top, self.y))
            match place:
                case "undecided sum" | "undecided head":
                    self._undecided(part)
                case "branch":
                    self._branch(part)
                case "beside":
                    self.marks.append(self._bar(part, self.box, "beside"))
                    self.y += 30
                case "exit":
                    self._exit(part, goes_on=k + 1 < len(places))
                case _:
                    self._layer(part)
            low = self.y
            for frame in reversed([f for f in self.frames if f.last == k]):
                self.y += 10
                self._frame(frame, open_[frame], self.y)
            bottoms.append((self.y, low))
            self.y += 16
        for bracket in self.brackets:
            # Around the frames of its parts, unless they are all in one.
            inside = self._is_inside(bracket)
            self._bracket(bracket, tops[bracket.first][inside], bottoms[bracket.last][inside])
        if places[-1:] not in (["exit"], ["undecided head"]):
            self._ends("output")
        self._regions()
        self._notes()
        return Picture(self.width, round(self.y + 12), f"Structure of {s.name}: {size_words(s)}", tuple(self.marks))

    def _places(self) -> list[str]:
        """How each part is drawn: "branch", "undecided", or a layer in the stream ("layer"), beside it ("beside"), or
        at an end of its own ("exit": all heads but a lone one at the end)."""
        items = [part.item for part in self.parts]
        branches = [k for k, i in enumerate(items) if isinstance(i, Item) and i.branch is not None]
        places = []
        for k, (item, part) in enumerate(zip(items, self.parts, strict=True)):
            if isinstance(item, Undecided):
                places.append(f"undecided {item.what}")
            elif item.branch is not None:
                places.append("branch")
            elif item.place == "head" and (k + 1 < len(items) or len(self.structure.heads) > 1 or len(part.items) > 1):
                places.append("exit")
            else:
                # Before the first branch only stems lead into the stream; others, such as one of a time, enter later.
                places.append("beside" if item.place == "layer" and branches and k < branches[0] else "layer")
        return places

    def _heading(self) -> None:
        s = self.structure
        room = self.width - 2 * _MARGIN
        self.marks.append(_text(_MARGIN, 28, room, (s.name, "t")))
        size = size_words(s) + (f"; standard deviations of plan {self.scheme}" if self.scheme else "")
        self.marks.append(_text(_MARGIN, 48, room, (size, "q")))
        used: dict[str, None] = {}
        for item in {b.weights: i for p in self.parts for own in p.branches for i in own if (b := i.branch)}.values():
            b = item.branch
            assert b is not None
            hidden = covered(item, self.inner)
            used |= dict.fromkeys(_role(b, q) for q in b.weights if q not in hidden)
            used |= dict.fromkeys(["shortcut"] * bool(b.skip_weights))
        self.y = 62
        if set(used) - {"value"}:
            x = _MARGIN
            for role in sorted(used, key=[*_ROLES, *used].index):
                if x > self.width - 310 and role in _ROLES:
                    x, self.y = _MARGIN, self.y + 20
                words = _ROLES.get(role, "")
                text = _text(x + 20, self.y + 10, 290, (role, ""), (f"  {words}".rstrip(), "q"))
                self.marks += [Box(x, self.y, 13, 13, f"k {_style(role)}"), text]
                x += 36 + _width(text.parts)
            self.y += 22
        self.y += 6

    def _ends(self, word: str) -> None:
        """The word at an end of the stream."""
        if word == "input":
            self.marks.append(_text(self.stream, self.y + 10, 2 * self.half, (word, "q"), anchor="middle"))
            self.at, self.y = self.y + 16, self.y + 34
        else:
            self._stream_to(self.y + 12, arrow=True)
            self.marks.append(_text(self.stream, self.y + 26, 2 * self.half, (word, "q"), anchor="middle"))
            self.y += 34

    def _stream_to(self, y: float, arrow: bool = False) -> None:
        if y > self.at:
            self.marks.append(Path(((self.stream, self.at), (self.stream, y)), "stream", arrow))
        self.at = y

    def _notes(self) -> None:
        s = self.structure
        notes = []
        if not s.heads and not any(u.what == "head" for u in s.undecided):
            notes.append("No head: no weight layer outside of branches feeds an output.")
        notes.append(f"Norms: {norm_words(s.norms)}." if s.norms else "No normalization.")
        unused = [p.path for p in s.parameters if p.role == "unused"]
        if unused:
            notes.append(f"Unused parameters: {', '.join(unused)}.")
        if unruled := unruled_words(s):
            notes.append(f"{unruled[0].upper()}{unruled[1:]}.")
        if names := [u.name for u in s.undecided if u.what == "sum"]:
            notes.append(f"To settle an undecided sum: {settle_words(names)}.")
        room = self.width - 2 * _MARGIN
        self.y += 12
        if s.branches:
            words = "Order D: multiply the kernels of a branch by c, and near c = 0 it behaves as c"
            self.y += 17
            self.marks.append(_text(_MARGIN, self.y, room, (words, "q"), ("D", "s")))
        for line in (line for note in notes for line in _wrapped(note, "q", room, 3)):
            self.y += 17
            self.marks.append(_text(_MARGIN, self.y, room, (line, "q")))

    def _regions(self) -> None:
        """What is named and not entered."""
        rows = []
        for _, group in itertools.groupby(self.structure.regions, lambda r: (r.primitive, r.scope, len(r.parameters))):
            same = list(group)
            taken = [merged(column) for column in zip(*(r.parameters for r in same), strict=True)]
            rows.append((region_words(same[0]) + (f" × {len(same)}" if len(same) > 1 else ""), same[0].scope, taken))
        if not rows:
            return
        x, width = self.left, self.right - self.left
        at_most = 8
        y = self.y + 30
        texts = [_text(x + 12, y, width - 24, ("not entered", "b"), ("  what is inside is not seen", "q"))]
        for what, scope, taken in rows[:at_most]:
            y += 20
            takes = ("  takes ", "q"), (", ".join(taken) or "no parameters", "m" if taken else "q")
            where = ((" in ", "q"), (scope, "m")) if scope else ()
            texts.append(_text(x + 12, y, width - 24, (what, ""), *where, *takes))
        if len(rows) > at_most:
            y += 20
            texts.append(_text(x + 12, y, width - 24, (f"and {len(rows) - at_most} more", "q")))
        about = "\n".join(f"{what} {scope}\n{_named(taken)}" for what, scope, taken in rows)
        self.marks.append(Box(x, self.y + 10, width, y + 12 - self.y - 10, "region", about, tuple(texts)))
        self.y = y + 12

    def _is_inside(self, b: _Bracket) -> bool:
        """Whether what repeats is within one arm of one conditional, so that its bracket is within the frame."""
        every = [own for k in range(b.first, b.last + 1) for own in self.parts[k].all_arms]
        return not b.scan and bool(every and every[0]) and all(own == every[0] for own in every)

    def _frame(self, f: _Frame, top: float, bottom: float) -> None:
        """A frame around the parts in an arm; its words stand beside the stream."""
        shift = self.nested - _FRAME * f.level
        x, right = self.left - shift, self.right + shift + (_RAIL if any(p.beside for p in self.parts) else 0)
        text = _text(self.box, top + 18, right - self.box - 12, (f.words, "b"), ("  one of its arms runs", "q"))
        self.marks.append(Box(x, top, right - x, bottom - top, "arm", "", (text,)))

    def _bracket(self, b: _Bracket, top: float, bottom: float) -> None:
        x = self.left - self.nested - 10 - self.gutter * b.level
        middle = (top + bottom) / 2
        self.marks.append(Path(((x + 6, top), (x, top), (x, bottom), (x + 6, bottom)), "bracket"))
        room = self.gutter - 12
        self.marks.append(_text(x - 6, middle + (0 if b.scan else 5), room, (f"× {b.count}", "n"), anchor="end"))
        if b.scan:
            self.marks.append(_text(x - 6, middle + 15, room, ("scan", "q"), anchor="end"))

    # -- layers in the stream

    def _layer(self, part: _Part) -> None:
        item = part.item
        assert isinstance(item, Item)
        self._stream_to(self.y, arrow=True)
        self.marks.append(self._bar(part, self.left, item.place))
        self.y += 30
        self.at = self.y

    def _exit(self, part: _Part, goes_on: bool) -> None:
        """A head beside the stream."""
        middle = self.y + 15
        corner = (self.stream, middle)
        if goes_on:
            self._stream_to(middle)
            self.marks += [Path((corner, (self.box, middle)), "stream", True), Node(*corner, "dot")]
        else:
            self.marks.append(Path(((self.stream, self.at), corner, (self.box, middle)), "stream", True))
        self.marks.append(self._bar(part, self.box, "head"))
        self.y += 30

    def _bar(self, part: _Part, x: float, place: str) -> Box:
        paths = [q for item in part.items for q in _paths(item)]
        layer = self.layers[paths[0]]
        name = self.box + 28 if x < self.box else x + 74
        y = self.y + 19.5
        texts = (
            _text(x + 12, y, name - x - 18, (place, "b")),
            _text(name, y, self.kind - name - 8, (merged(paths) or _ONLY, "m")),
            *self._columns(paths, y, layer),
        )
        return Box(x, self.y, self.right - x, 30, "bar", self._about(paths, ""), texts)

    def _columns(self, paths: Sequence[str], y: float, layer: LayerInfo) -> Iterator[Text]:
        yield _text(self.kind, y, 132, (layer_words(layer, scans=False), "q"))
        if drawn := _drawn(self.plan.get(paths[0])):
            yield _text(self.drawn, y, 184, *drawn)

    def _about(self, paths: Sequence[str], role: str) -> str:
        """What a layer says when it is pointed at."""
        layer = self.layers[paths[0]]
        count = f" ({plural(len(paths), 'layer')})" if len(paths) > 1 else ""
        fans = f"{layer.kind}, fan_in {layer.fan_in}, fan_out {layer.fan_out}"
        scan = f", in a scan of {layer.repeats}" if layer.repeats > 1 else ""
        words = f"\n{role}: {_ROLES[role]}" if role in _ROLES else f"\n{role}" * bool(role)
        return f"{_named(paths)}{count}\n{fans}{scan}{words}{_why([self.plan.get(q) for q in paths])}"

    # -- branches

    def _branch(self, part: _Part) -> None:
        """A sum: its branches below each other, beside the skip."""
        every = part.branches
        items = every[0]
        b = items[0].branch
        assert b is not None
        split, line = self.y, self.box + 28
        self._stream_to(split)
        self.marks.append(Node(self.stream, split, "dot"))
        down, rail = self.box - 14, self.right + _RAIL - 4  # into the later branches, out of the earlier ones
        bottom, ends = split, []
        for k, own in enumerate(every):
            # The line of the branch: out of the stream, through what lies on it, and into the sum.
            start: tuple[tuple[float, float], ...] = ((self.stream, split), (line, split))
            top = bottom + 14
            if k:
                top = bottom + 32
                start = ((down, split), (down, top - 10), (line, top - 10))
            bottom, rows = self._box(own, top, len(own) // part.count, len(every))
            stops = [r for r in rows if isinstance(r, Box | Node) and r.kind != "arm" and _on(r, line)]
            for r in stops:
                edges = (r.y, r.y + r.height) if isinstance(r, Box) else (r.y - 7, r.y + 7)
                self.marks.append(Path((*start, (line, edges[0])), "line", isinstance(r, Box)))
                start = ((line, edges[1]),)
            ends.append((*start, (line, bottom + 10)))
            self.marks += rows
        total = bottom + 14
        for end in ends[:-1]:
            self.marks.append(Path((*end, (rail, end[-1][1]), (rail, total), (line, total)), "line"))
        last = (*ends[-1][:-1], (line, total), (self.stream + _RADIUS, total))
        self.marks.append(Path(last, "line", True))
        self._skip(items, split, total)
        summed = numbers([i for own in every for i in own])
        self.marks.append(Node(self.stream, total, "sum", f"sum of {summed}; {b.skip} skip"))
        self.at = total + _RADIUS
        self.y = total + _RADIUS

    def _box(
        self, items: Sequence[Item], top: float, times: int, parallel: int
    ) -> tuple[float, list[Box | Path | Node | Text]]:
        """The box of a branch, of `times` equal ones and `parallel` kinds in a sum: its bottom, and what is in it."""
        b = items[0].branch
        assert b is not None
        line = self.box + 28
        rows, low = self._rows(items, line, top + 33)
        bottom = low + 29
        homes = [common_home(i.paths) for i in items]
        where = merged(homes) if items[0].paths else b.scope
        room = self.right - line - 24
        heading = [(numbers(items), "b"), (f"  {where}".rstrip(), "m")]
        if times > 1:
            heading.append((f"  {times} in parallel", "q"))
        elif parallel > 1:
            heading.append(("  in parallel", "q"))
        facts = [(f"depth {b.depth}, ", "q"), (order_words(b), ""), (self._more_facts(b), "q")]
        texts = (_text(line + 12, top + 19, room, *heading), _text(line + 12, low + 18, room, *facts))
        about = f"{numbers(items)}{' in ' if where else ''}{where}\n{''.join(t for t, _ in facts)}"
        self.marks.append(Box(self.box, top, self.right - self.box, bottom - top, "branch", about, texts))
        return bottom, rows

    def _stretches(self, items: Sequence[Item]) -> list[Stretch]:
        """The weights of a branch, folded; those of branches within it are one run."""
        return stretches(items[0], self.layers, self.inner, lambda path: _entry_key(self.plan.get(path)))

    def _reference(self, items: Sequence[Item], x: float, y: float, run: Run) -> Box:
        """In the place of branches within a branch, which are drawn on their own."""
        words = within_words(items, self.inner, run)
        several = words.startswith("branches")
        b = items[0].branch
        assert b is not None
        roles = {_role(b, q) for q in b.weights[run.start : run.stop]}
        tag = f", {roles.pop()}" if len(roles) == 1 and roles != {"value"} else ""
        text = _text(
            x + 12,
            y + 16.5,
            self.inside - x - 24,
            (words, "b"),
            (f"  drawn by {'themselves' if several else 'itself'}{tag}", "q"),
        )
        about = f"Within this branch, with sums of their own: {words}."
        return Box(x, y, self.inside - x, _ROW, "layer other", about, (text,))

    def _more_facts(self, b: Branch) -> str:
        facts = [f"{b.skip} skip"] + [plural(b.norms, "norm")] * bool(b.norms)
        return "".join(f", {fact}" for fact in facts)

    def _rows(self, items: Sequence[Item], line: float, y: float) -> tuple[list[Box | Path | Node | Text], float]:
        """What stands in a branch from `y` on, and where it ends; layers of the value path lie on the line."""
        b = items[0].branch
        assert b is not None
        marks: list[Box | Path | Node | Text] = []
        names = [names_within(i.paths, common_home(i.paths)) for i in items]
        found = self._stretches(items)
        switches = list(dict.fromkeys(a.switch for stretch in found for a in stretch.arms))
        for around, group in itertools.groupby(found, key=lambda stretch: stretch.arms):
            own = list(group)
            top = y
            series = self._in_series(items[0], around)
            if around:
                y += 24
            framed: list[Box | Path | Node | Text] = []
            for stretch in own:
                for run in stretch.runs:
                    y = self._run(framed, items, names, run, stretch.inside, line, y, series)
            if around:
                words = f"{arms_words([around], switches)}; one of its arms runs"
                text = _text(line + 14, top + 17, self.inside - line - 20, (words, "q"))
                frame = Box(line - 20, top, self.right - line + 14, y - top - 3, "arm", "", (text,))
                marks.append(frame)
                y += 5
            marks += framed
        if not b.weights:
            marks.append(_text(line + 12, y + 12, self.inside - line - 24, ("no weight layers", "q")))
            y += 16 + _GAP
        for k in self._multipliers(b):
            paths = [i.branch.closing[k] for i in items if i.branch is not None]
            homes = [common_home(i.paths) for i in items]
            words = "norm's scale" if self.roles.get(paths[0]) == "norm_scale" else "multiplier"
            short = merged(q.removeprefix(f"{h}/") for q, h in zip(paths, homes, strict=True))
            about = f"{_named(paths)}\n{words}{_why([self.plan.get(q) for q in paths])}"
            marks.append(Node(line, y + 9, "product", about))
            marks.append(_text(line + 26, y + 13, self.kind - line - 34, (short, "m"), (f"  {words}", "q")))
            if drawn := _drawn(self.plan.get(paths[0])):
                marks.append(_text(self.drawn, y + 13, 184, *drawn))
            y += 18 + _GAP
        return marks, y - _GAP

    def _in_series(self, item: Item, around: tuple[Arm, ...]) -> bool:
        """Whether the value layers of a branch, or of an arm in it, can all be in series: no more than it is deep."""
        hidden = covered(item, self.inner)
        b = item.branch
        assert b is not None
        own = [
            b.weights[k]
            for stretch in self._stretches([item])
            if stretch.arms == around and not stretch.inside
            for run in stretch.runs
            for k in range(run.start, run.stop)
        ]
        return sum(_role(b, q) == "value" for q in dict.fromkeys(own) if q not in hidden) <= b.depth

    def _run(
        self,
        marks: list[Box | Path | Node | Text],
        items: Sequence[Item],
        names: Sequence[Sequence[str]],
        run: Run,
        inside: bool,
        line: float,
        y: float,
        series: bool,
    ) -> float:
        """Adds the layers of a run from `y` on to `marks`; returns where the next one begins."""
        b = items[0].branch
        assert b is not None
        if inside:
            x = line - 12 if series else line + 14
            marks += [] if series else [Path(((line, y + _ROW / 2), (x, y + _ROW / 2)), "line")]
            marks.append(self._reference(items, x, y, run))
            return y + _ROW + _GAP
        top = y
        for k in range(run.start, run.start + run.period):
            paths = [q for i in items for q in i.paths[k : run.stop : run.period]]
            name = merged(n for own in names for n in own[k : run.stop : run.period]) or merged(paths) or _ONLY
            role = _role(b, b.weights[k])
            x = line - 12 if role == "value" and series else line + 14
            if x > line:
                ends = ((line, y + _ROW / 2), (x, y + _ROW / 2))
                marks.append(Path(ends if role == "value" else ends[::-1], "line" if role == "value" else "side"))
            tag = "" if role == "value" else f"  {role}"
            room = self.kind - x - 20
            texts = (
                _text(x + 12, y + 16.5, room, (name, "m"), (tag, "q")),
                *self._columns(paths, y + 16.5, self.layers[paths[0]]),
            )
            box = Box(x, y, self.inside - x, _ROW, f"layer {_style(role)}", self._about(paths, role), texts)
            marks.append(box)
            y += _ROW + _GAP
        if run.count > 1:
            marks += self._inner_bracket(top, y - _GAP, run.count)
        return y

    def _multipliers(self, b: Branch) -> list[int]:
        """Which of `closing` lie behind the last layer: multipliers, and norms that hide the scale of that layer."""
        hidden = any(b.shares.get(q, 1) < 1 for q in b.last)
        roles = [self.roles.get(q) for q in b.closing]
        return [k for k, r in enumerate(roles) if r == "multiplier" or (r == "norm_scale" and hidden)]

    def _inner_bracket(self, top: float, bottom: float, count: int) -> list[Path | Text]:
        x = self.inside + 8
        points = ((x - 4, top), (x, top), (x, bottom), (x - 4, bottom))
        return [Path(points, "bracket"), _text(x + 5, (top + bottom) / 2 + 4, 38, (f"× {count}", "b"))]

    def _skip(self, items: Sequence[Item], split: float, total: float) -> None:
        """The stream from a split to its sum: plain, marked as a reshape, or through the weights of a projection."""
        b = items[0].branch
        assert b is not None
        self.at = split
        if b.skip_weights:
            x, width = self.stream - self.half, 2 * self.half
            every = [i.branch.skip_weights for i in items if i.branch is not None]
            homes = [common_home([*i.paths, *own]) for i, own in zip(items, every, strict=True)]
            heights = [66.0 if self.plan else 48.0] * len(b.skip_weights)
            y = max(split + 16, (split + total - sum(heights) - 20 * (len(heights) - 1)) / 2)
            for k, height in enumerate(heights):
                paths = [own[k] for own in every]
                name = merged(
                    names_within([*i.paths, q], h)[-1] or q for i, q, h in zip(items, paths, homes, strict=True)
                )
                lines: list[Parts] = [((name, "m"),), ((layer_words(self.layers[paths[0]], scans=False), "q"),)]
                lines += [drawn] if (drawn := _drawn(self.plan.get(paths[0]))) else []
                texts = tuple(
                    _text(self.stream, y + 20 + 18 * n, width - 12, *own, anchor="middle")
                    for n, own in enumerate(lines)
                )
                self._stream_to(y, arrow=True)
                about = self._about(paths, "shortcut")
                self.marks.append(Box(x, y, width, height, f"layer {_style('shortcut')}", about, texts))
                self.at = y + height
                y += height + 20
        elif b.skip != "identity":
            y = (split + total) / 2 - 11
            self._stream_to(y)
            text = _text(self.stream, y + 15, 2 * self.half - 8, (b.skip, "q"), anchor="middle")
            width = _width(text.parts) + 16
            about = "The skip changes the shape and has no weights."
            self.marks.append(Box(self.stream - width / 2, y, width, 22, "pill", about, (text,)))
            self.at = y + 22
        self._stream_to(total - _RADIUS)

    # -- what is undecided

    def _undecided(self, part: _Part) -> None:
        """A sum or a head that the graph leaves open: why, and the weights of its terms."""
        same = [u for u in part.items if isinstance(u, Undecided)]
        u = same[0]
        x, room = self.box, self.right - self.box - 28
        where = merged(v.where for v in same)
        y = self.y + 20
        what = f"undecided {merged(v.name or v.what for v in same)}"
        texts = [_text(x + 14, y, room, (what, "b"), (f"  {where}", "q"))]
        for words in _wrapped(u.why, "", room):
            y += 19
            texts.append(_text(x + 14, y, room, (words, "")))
        for t in range(len(u.terms)):
            rows = self._term_rows([v.terms[t] for v in same])
            y += 4
            for n, (name, paths) in enumerate(rows or [("no weight layers", ())]):
                y += 19
                if n == 0:
                    texts.append(_text(x + 14, y, 54, (f"term {t}", "b")))
                texts.append(_text(x + 74, y, self.kind - x - 82, (name, "m" if paths else "q")))
                if paths:
                    texts += self._columns(paths, y, self.layers[paths[0]])
            if reading := reading_words(u, t):
                y += 17
                texts.append(_text(x + 74, y, room - 60, (reading, "q")))
        height = y + 13 - self.y
        middle = self.y + height / 2
        every = [[q for v in same for q in v.terms[t]] for t in range(len(u.terms))]
        about = "\n".join(f"term {t}: {_named(own) if own else 'no weight layers'}" for t, own in enumerate(every))
        self._stream_to(middle - _RADIUS)
        self.marks.append(Path(((x, middle), (self.stream + _RADIUS, middle)), "side"))
        self.marks.append(Node(self.stream, middle, "undecided", f"{what}: {u.why}"))
        self.marks.append(Box(x, self.y, self.right - x, height, "warning", about, tuple(texts)))
        self.at = middle + _RADIUS
        self.y += height

    def _term_rows(self, terms: Sequence[tuple[str, ...]], at_most: int = 6) -> list[tuple[str, tuple[str, ...]]]:
        """Names and paths of the weights of a term, which stands for equal ones of other sums; many are folded."""
        rows: list[tuple[str, tuple[str, ...]]] = []
        first = terms[0]
        for run in fold([(layer_words(self.layers[q]), _entry_key(self.plan.get(q))) for q in first], longest=4):
            count = f" × {run.count}" if run.count > 1 else ""
            for k in range(run.start, run.start + run.period):
                paths = tuple(q for term in terms for q in term[k : run.stop : run.period])
                rows.append((merged(paths) + count, paths))
        more = len(rows) - at_most
        return rows if more <= 0 else [*rows[:at_most], (f"and {more} more", ())]


def _named(paths: Iterable[str]) -> str:
    """All paths; those that differ in numbers only are one."""
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(re.sub(r"\d+", "0", path), []).append(path)
    return ", ".join(map(merged, alike.values())) or _ONLY


def _on(mark: Box | Node, line: float) -> bool:
    return mark.x == line if isinstance(mark, Node) else mark.x < line


def _role(b: Branch, path: str) -> str:
    return b.roles.get(path, "value")


def _style(role: str) -> str:
    return role if role in _ROLES else "other"


def lay_out(structure: Structure, plan: Plan | None = None) -> Picture:
    """Where everything of a picture goes, and what it says."""
    return _Pen(structure, plan).draw()


# ---- rendering

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
    r = 7 if node.kind == "product" else _RADIUS
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
