"""A structure as what is drawn: parts, each standing for all items that it was folded from."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Hashable, Mapping, Sequence

from fixup_init.plan import Entry
from fixup_init.report.layout import fold
from fixup_init.report.outline import (
    Item,
    Within,
    arms_words,
    by_path,
    columns,
    common_home,
    covered,
    layer_words,
    outline,
    units,
)
from fixup_init.structure import Arm, LayerInfo, Structure, Undecided

__all__ = ["Bracket", "Frame", "Part", "entry_key", "frames_of", "parts_of", "paths_of"]


@dataclasses.dataclass(frozen=True)
class Part:
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
class Bracket:
    """Parts first..last occur `count` times; `level` 0 is nearest to them."""

    first: int
    last: int
    count: int
    scan: bool
    level: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """Parts first..last are in an arm of a conditional; `level` 0 is the outermost."""

    first: int
    last: int
    level: int
    words: str


def parts_of(structure: Structure, plan: Mapping[str, Entry], inner: Within) -> tuple[list[Part], list[Bracket]]:
    found = _sequence(structure)
    layers = by_path(structure)
    parts: list[Part] = []
    folds: list[Bracket] = []
    run_of: list[int] = []
    keys = [tuple(_key(x, layers, plan, inner) for x in unit) for unit in found]
    for n, run in enumerate(fold(keys)):
        first = len(parts)
        for k in range(run.start, run.start + run.period):
            same = found[k : run.stop : run.period]
            one = [unit[0] for unit in same]
            if len(same[0]) == 1:
                parts.append(Part(tuple(one), (), len(same)))
            else:
                own = columns([[i for i in unit if isinstance(i, Item)] for unit in same], keys[k])
                parts.append(Part(own[0], tuple(own[1:]), len(same)))
        run_of += [n if run.count > 1 else -1] * run.period
        if run.count > 1:
            folds.append(Bracket(first, len(parts) - 1, run.count, False, 0))
    scans: list[Bracket] = []
    for k, part in enumerate(parts):
        if part.repeats == 1:
            continue
        before = scans[-1] if scans and scans[-1].last == k - 1 else None
        together = before is not None and before.count == part.repeats and run_of[k] == run_of[k - 1]
        if before is not None and together and common_home(paths_of(parts[before.first].item) + paths_of(part.item)):
            scans[-1] = dataclasses.replace(before, last=k)
        else:
            scans.append(Bracket(k, k, part.repeats, True, 0))
    outer = [
        dataclasses.replace(f, level=int(any(f.first <= s.first and s.last <= f.last for s in scans))) for f in folds
    ]
    return parts, outer + scans


def frames_of(parts: Sequence[Part]) -> list[Frame]:
    """The arms that parts are in: neighbours in one arm share a frame."""
    frames = []
    for level in range(max((len(part.arms) for part in parts), default=0)):
        runs = itertools.groupby(range(len(parts)), key=lambda k: parts[k].arms[: level + 1])
        for arms, group in runs:
            own = list(group)
            if len(arms) > level:
                frames.append(Frame(own[0], own[-1], level, arms_words([arms[-1:]])))
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
        terms = tuple(tuple((layer_words(layers[q]), entry_key(plan.get(q))) for q in term) for term in item.terms)
        return item.what, re.sub(r"\d+", "0", item.why), terms
    paths = item.paths + ((*item.branch.skip_weights, *item.branch.closing) if item.branch else ())
    hidden = covered(item, inner) if item.branch else ()
    return item.key, tuple(q in hidden for q in item.paths), tuple(entry_key(plan.get(q)) for q in paths)


def entry_key(entry: Entry | None) -> Hashable:
    return entry and (entry.distribution, entry.std, entry.value)


def paths_of(item: Item | Undecided) -> tuple[str, ...]:
    return tuple(q for term in item.terms for q in term) if isinstance(item, Undecided) else item.paths
