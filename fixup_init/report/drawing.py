"""A structure as a picture: the stream runs down, branches stand beside it, and what repeats is drawn once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from fixup_init.plan import Entry, Plan
from fixup_init.report.layout import Run, fold, merged, number, plural
from fixup_init.report.outline import (
    Item,
    Stretch,
    arms_words,
    by_path,
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
    unruled_words,
    within,
    within_words,
)
from fixup_init.report.parts import Bracket, Frame, Part, entry_key, frames_of, parts_of, paths_of
from fixup_init.report.picture import RADIUS, Box, Node, Parts, Path, Picture, Text, line_of, width_of, wrapped
from fixup_init.structure import Arm, Branch, LayerInfo, Structure, Undecided

__all__ = ["lay_out"]


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
        self.parts, self.brackets = parts_of(structure, self.plan, self.inner)
        self.frames = frames_of(self.parts)
        self.marks: list[Box | Path | Node | Text] = []
        branches = structure.branches
        skips = any(b.skip_weights for b in branches)
        self.width = _WIDTH if self.plan else _NARROW_WIDTH
        levels = max((b.level + 1 for b in self.brackets), default=0)
        # Of one level of brackets.
        self.gutter = 22 + max((width_of([(f"× {b.count}", "n")]) for b in self.brackets), default=0.0)
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
        open_: dict[Frame, float] = {}
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
        self.marks.append(line_of(_MARGIN, 28, room, (s.name, "t")))
        size = size_words(s) + (f"; standard deviations of plan {self.scheme}" if self.scheme else "")
        self.marks.append(line_of(_MARGIN, 48, room, (size, "q")))
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
                text = line_of(x + 20, self.y + 10, 290, (role, ""), (f"  {words}".rstrip(), "q"))
                self.marks += [Box(x, self.y, 13, 13, f"k {_style(role)}"), text]
                x += 36 + width_of(text.parts)
            self.y += 22
        self.y += 6

    def _ends(self, word: str) -> None:
        """The word at an end of the stream."""
        if word == "input":
            self.marks.append(line_of(self.stream, self.y + 10, 2 * self.half, (word, "q"), anchor="middle"))
            self.at, self.y = self.y + 16, self.y + 34
        else:
            self._stream_to(self.y + 12, arrow=True)
            self.marks.append(line_of(self.stream, self.y + 26, 2 * self.half, (word, "q"), anchor="middle"))
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
            self.marks.append(line_of(_MARGIN, self.y, room, (words, "q"), ("D", "s")))
        for line in (line for note in notes for line in wrapped(note, "q", room, 3)):
            self.y += 17
            self.marks.append(line_of(_MARGIN, self.y, room, (line, "q")))

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
        texts = [line_of(x + 12, y, width - 24, ("not entered", "b"), ("  what is inside is not seen", "q"))]
        for what, scope, taken in rows[:at_most]:
            y += 20
            takes = ("  takes ", "q"), (", ".join(taken) or "no parameters", "m" if taken else "q")
            where = ((" in ", "q"), (scope, "m")) if scope else ()
            texts.append(line_of(x + 12, y, width - 24, (what, ""), *where, *takes))
        if len(rows) > at_most:
            y += 20
            texts.append(line_of(x + 12, y, width - 24, (f"and {len(rows) - at_most} more", "q")))
        about = "\n".join(f"{what} {scope}\n{_named(taken)}" for what, scope, taken in rows)
        self.marks.append(Box(x, self.y + 10, width, y + 12 - self.y - 10, "region", about, tuple(texts)))
        self.y = y + 12

    def _is_inside(self, b: Bracket) -> bool:
        """Whether what repeats is within one arm of one conditional, so that its bracket is within the frame."""
        every = [own for k in range(b.first, b.last + 1) for own in self.parts[k].all_arms]
        return not b.scan and bool(every and every[0]) and all(own == every[0] for own in every)

    def _frame(self, f: Frame, top: float, bottom: float) -> None:
        """A frame around the parts in an arm; its words stand beside the stream."""
        shift = self.nested - _FRAME * f.level
        x, right = self.left - shift, self.right + shift + (_RAIL if any(p.beside for p in self.parts) else 0)
        text = line_of(self.box, top + 18, right - self.box - 12, (f.words, "b"), ("  one of its arms runs", "q"))
        self.marks.append(Box(x, top, right - x, bottom - top, "arm", "", (text,)))

    def _bracket(self, b: Bracket, top: float, bottom: float) -> None:
        x = self.left - self.nested - 10 - self.gutter * b.level
        middle = (top + bottom) / 2
        self.marks.append(Path(((x + 6, top), (x, top), (x, bottom), (x + 6, bottom)), "bracket"))
        room = self.gutter - 12
        self.marks.append(line_of(x - 6, middle + (0 if b.scan else 5), room, (f"× {b.count}", "n"), anchor="end"))
        if b.scan:
            self.marks.append(line_of(x - 6, middle + 15, room, ("scan", "q"), anchor="end"))

    # -- layers in the stream

    def _layer(self, part: Part) -> None:
        item = part.item
        assert isinstance(item, Item)
        self._stream_to(self.y, arrow=True)
        self.marks.append(self._bar(part, self.left, item.place))
        self.y += 30
        self.at = self.y

    def _exit(self, part: Part, goes_on: bool) -> None:
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

    def _bar(self, part: Part, x: float, place: str) -> Box:
        paths = [q for item in part.items for q in paths_of(item)]
        layer = self.layers[paths[0]]
        name = self.box + 28 if x < self.box else x + 74
        y = self.y + 19.5
        texts = (
            line_of(x + 12, y, name - x - 18, (place, "b")),
            line_of(name, y, self.kind - name - 8, (merged(paths) or _ONLY, "m")),
            *self._columns(paths, y, layer),
        )
        return Box(x, self.y, self.right - x, 30, "bar", self._about(paths, ""), texts)

    def _columns(self, paths: Sequence[str], y: float, layer: LayerInfo) -> Iterator[Text]:
        yield line_of(self.kind, y, 132, (layer_words(layer, scans=False), "q"))
        if drawn := _drawn(self.plan.get(paths[0])):
            yield line_of(self.drawn, y, 184, *drawn)

    def _about(self, paths: Sequence[str], role: str) -> str:
        """What a layer says when it is pointed at."""
        layer = self.layers[paths[0]]
        count = f" ({plural(len(paths), 'layer')})" if len(paths) > 1 else ""
        fans = f"{layer.kind}, fan_in {layer.fan_in}, fan_out {layer.fan_out}"
        scan = f", in a scan of {layer.repeats}" if layer.repeats > 1 else ""
        words = f"\n{role}: {_ROLES[role]}" if role in _ROLES else f"\n{role}" * bool(role)
        return f"{_named(paths)}{count}\n{fans}{scan}{words}{_why([self.plan.get(q) for q in paths])}"

    # -- branches

    def _branch(self, part: Part) -> None:
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
        last = (*ends[-1][:-1], (line, total), (self.stream + RADIUS, total))
        self.marks.append(Path(last, "line", True))
        self._skip(items, split, total)
        summed = numbers([i for own in every for i in own])
        self.marks.append(Node(self.stream, total, "sum", f"sum of {summed}; {b.skip} skip"))
        self.at = total + RADIUS
        self.y = total + RADIUS

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
        texts = (line_of(line + 12, top + 19, room, *heading), line_of(line + 12, low + 18, room, *facts))
        about = f"{numbers(items)}{' in ' if where else ''}{where}\n{''.join(t for t, _ in facts)}"
        self.marks.append(Box(self.box, top, self.right - self.box, bottom - top, "branch", about, texts))
        return bottom, rows

    def _stretches(self, items: Sequence[Item]) -> list[Stretch]:
        """The weights of a branch, folded; those of branches within it are one run."""
        return stretches(items[0], self.layers, self.inner, lambda path: entry_key(self.plan.get(path)))

    def _reference(self, items: Sequence[Item], x: float, y: float, run: Run) -> Box:
        """In the place of branches within a branch, which are drawn on their own."""
        words = within_words(items, self.inner, run)
        several = words.startswith("branches")
        b = items[0].branch
        assert b is not None
        roles = {_role(b, q) for q in b.weights[run.start : run.stop]}
        tag = f", {roles.pop()}" if len(roles) == 1 and roles != {"value"} else ""
        text = line_of(
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
                text = line_of(line + 14, top + 17, self.inside - line - 20, (words, "q"))
                frame = Box(line - 20, top, self.right - line + 14, y - top - 3, "arm", "", (text,))
                marks.append(frame)
                y += 5
            marks += framed
        if not b.weights:
            marks.append(line_of(line + 12, y + 12, self.inside - line - 24, ("no weight layers", "q")))
            y += 16 + _GAP
        for k in self._multipliers(b):
            paths = [i.branch.closing[k] for i in items if i.branch is not None]
            homes = [common_home(i.paths) for i in items]
            words = "norm's scale" if self.roles.get(paths[0]) == "norm_scale" else "multiplier"
            short = merged(q.removeprefix(f"{h}/") for q, h in zip(paths, homes, strict=True))
            about = f"{_named(paths)}\n{words}{_why([self.plan.get(q) for q in paths])}"
            marks.append(Node(line, y + 9, "product", about))
            marks.append(line_of(line + 26, y + 13, self.kind - line - 34, (short, "m"), (f"  {words}", "q")))
            if drawn := _drawn(self.plan.get(paths[0])):
                marks.append(line_of(self.drawn, y + 13, 184, *drawn))
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
                line_of(x + 12, y + 16.5, room, (name, "m"), (tag, "q")),
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
        return [Path(points, "bracket"), line_of(x + 5, (top + bottom) / 2 + 4, 38, (f"× {count}", "b"))]

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
                    line_of(self.stream, y + 20 + 18 * n, width - 12, *own, anchor="middle")
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
            text = line_of(self.stream, y + 15, 2 * self.half - 8, (b.skip, "q"), anchor="middle")
            width = width_of(text.parts) + 16
            about = "The skip changes the shape and has no weights."
            self.marks.append(Box(self.stream - width / 2, y, width, 22, "pill", about, (text,)))
            self.at = y + 22
        self._stream_to(total - RADIUS)

    # -- what is undecided

    def _undecided(self, part: Part) -> None:
        """A sum or a head that the graph leaves open: why, and the weights of its terms."""
        same = [u for u in part.items if isinstance(u, Undecided)]
        u = same[0]
        x, room = self.box, self.right - self.box - 28
        where = merged(v.where for v in same)
        y = self.y + 20
        what = f"undecided {merged(v.name or v.what for v in same)}"
        texts = [line_of(x + 14, y, room, (what, "b"), (f"  {where}", "q"))]
        for words in wrapped(u.why, "", room):
            y += 19
            texts.append(line_of(x + 14, y, room, (words, "")))
        for t in range(len(u.terms)):
            rows = self._term_rows([v.terms[t] for v in same])
            y += 4
            for n, (name, paths) in enumerate(rows or [("no weight layers", ())]):
                y += 19
                if n == 0:
                    texts.append(line_of(x + 14, y, 54, (f"term {t}", "b")))
                texts.append(line_of(x + 74, y, self.kind - x - 82, (name, "m" if paths else "q")))
                if paths:
                    texts += self._columns(paths, y, self.layers[paths[0]])
            if reading := reading_words(u, t):
                y += 17
                texts.append(line_of(x + 74, y, room - 60, (reading, "q")))
        height = y + 13 - self.y
        middle = self.y + height / 2
        every = [[q for v in same for q in v.terms[t]] for t in range(len(u.terms))]
        about = "\n".join(f"term {t}: {_named(own) if own else 'no weight layers'}" for t, own in enumerate(every))
        self._stream_to(middle - RADIUS)
        self.marks.append(Path(((x, middle), (self.stream + RADIUS, middle)), "side"))
        self.marks.append(Node(self.stream, middle, "undecided", f"{what}: {u.why}"))
        self.marks.append(Box(x, self.y, self.right - x, height, "warning", about, tuple(texts)))
        self.at = middle + RADIUS
        self.y += height

    def _term_rows(self, terms: Sequence[tuple[str, ...]], at_most: int = 6) -> list[tuple[str, tuple[str, ...]]]:
        """Names and paths of the weights of a term, which stands for equal ones of other sums; many are folded."""
        rows: list[tuple[str, tuple[str, ...]]] = []
        first = terms[0]
        for run in fold([(layer_words(self.layers[q]), entry_key(self.plan.get(q))) for q in first], longest=4):
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
