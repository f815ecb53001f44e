"""A structure as a tree, a plan as a table; what repeats is folded, so that 4 and 300 layers both fit on a screen."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

from fixup_init.plan import Entry, Plan
from fixup_init.report.layout import fold, merged, number, plural, render, shape, terminal_width
from fixup_init.report.outline import (
    Item,
    Within,
    arms_words,
    by_path,
    columns,
    common_home,
    inner_arms,
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
)  # fmt: skip
from fixup_init.structure import Branch, LayerInfo, Region, Structure, Undecided

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

__all__ = ["plan_table", "rich_tree", "tree"]

_PATHS_SHOWN = 4  # of a list of parameters
_WHY = 40  # columns that a reason needs beside the others; with less it goes below
_NUMBERS = re.compile(r"\d+")


def tree(structure: Structure, width: int | None = None) -> str:
    """A structure as text: stem, branches (equal neighbours folded), head, normalizations, and what is undecided.

    Args:
      structure: what `fi.structure` returned.
      width: columns; by default those of the terminal.

    Returns:
      Lines without trailing blanks and without colours.
    """
    return render(rich_tree(structure), width=width)


def rich_tree(structure: Structure) -> Tree:
    """The same as a `rich.tree.Tree`, for a console with colours."""
    from rich.tree import Tree

    items = list(outline(structure))
    drawn = _Drawn(by_path(structure), within(items))
    root = Tree(_line((structure.name, "bold"), (f"  {size_words(structure)}", "")), guide_style="dim")
    found = units(items)
    for run in fold([tuple(item.key for item in unit) for unit in found]):
        at = root
        if run.period > 1:
            own = [item for unit in found[run.start : run.stop] for item in unit]
            at = root.add(_line((f"{run.count} times", "bold"), (f"  {numbers(own)}", "")))
        for k in range(run.period):
            drawn.add(at, found[run.start + k : run.stop : run.period])
    if not structure.heads and not any(u.what == "head" for u in structure.undecided):
        root.add(_plain("no head: no weight layer outside of branches feeds an output"))
    norms = norm_words(structure.norms)
    root.add(_line(("norms  ", "bold"), (norms, "")) if norms else _plain("no normalization"))
    unused = [p.path for p in structure.parameters if p.role == "unused"]
    if unused:
        root.add(_line(("unused parameters  ", "bold"), (_listed(unused), "")))
    _add_regions(root, structure.regions)
    if unruled := unruled_words(structure):
        root.add(_plain(unruled))
    _add_undecided(root, structure.undecided)
    return root


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What the lines of a tree are written from."""

    layers: dict[str, LayerInfo]
    inner: Within

    def add(self, at: Tree, same: Sequence[Sequence[Item]]) -> None:
        """A line for equal layers or equal sums; branches of one sum are below it."""
        if len(same[0]) == 1:
            at.add(self.group([unit[0] for unit in same]))
            return
        parallel = f"{len(same[0])} parallel branches of one sum" + (" each" if len(same) > 1 else "")
        kinds = columns(same, [item.key for item in same[0]])
        if len(kinds) == 1:
            at.add(self.group(kinds[0], parallel))
            return
        count = f" x {len(same)}" if len(same) > 1 else ""
        own = [item for unit in same for item in unit]
        at = at.add(_line((f"{numbers(own)}{count}", "bold"), (f"  {parallel}", "")))
        for kind in kinds:
            at.add(self.group(kind))

    def group(self, group: Sequence[Item], more: str = "") -> Text:
        item = group[0]
        times = f" x {len(group)}" if len(group) > 1 else ""
        arms = arms_words([i.arms for i in group])
        arms = "".join(f"  {words}" for words in (arms, more) if words)
        if item.branch is None:
            assert item.layer is not None
            path = merged(i.paths[0] for i in group)
            words = f"  {layer_words(item.layer)}"
            return _line((f"{item.place}  ", "bold"), (path, "cyan"), (times, "bold"), (words, ""), (arms, ""))
        homes = [common_home(i.paths) for i in group]
        where = merged(homes) if item.paths else item.branch.scope
        return _line(
            (numbers(group), "bold"),
            (f"  {where}".rstrip(), "cyan"),
            (times, "bold"),
            (arms, ""),
            (f"\n{self.weights(group, homes[0])}", ""),
            (f"\n{_facts(item.branch, homes[0], self.layers)}", "dim"),
        )

    def weights(self, group: Sequence[Item], home: str) -> str:
        """The weight layers of a branch: `conv1 conv 144→144; conv2 conv 144→144`; each arm is a line of its own."""
        branch = group[0].branch
        assert branch is not None
        names = names_within(branch.weights, home)
        of_arms = inner_arms(branch, self.layers)
        switches = list(dict.fromkeys(a.switch for arms in of_arms.values() for a in arms))
        lines: list[tuple[str, list[str]]] = []
        for stretch in stretches(group[0], self.layers, self.inner):
            label = arms_words([stretch.arms], switches)
            if not lines or lines[-1][0] != label:
                lines.append((label, []))
            parts = lines[-1][1]
            for run in stretch.runs:
                roles: list[str] = [branch.roles.get(q, "value") for q in branch.weights[run.start : run.stop]]
                if stretch.inside:
                    tag = f", {roles[0]}" if len(set(roles)) == 1 and roles[0] != "value" else ""
                    parts.append(f"within it {within_words(group[:1], self.inner, run)}{tag}")
                    continue
                texts = []
                for k in range(run.start, run.start + run.period):
                    name = merged(names[k : run.stop : run.period])
                    role = roles[k - run.start]
                    words = f"{name} {layer_words(self.layers[branch.weights[k]], scans=False)}".strip()
                    texts.append(words if role == "value" else f"{words}, {role}")
                text = "; ".join(texts)
                parts.append((f"({text})" if run.period > 1 else text) + f" x {run.count}" if run.count > 1 else text)
        return "\n".join(f"{label}: " * bool(label) + "; ".join(parts) for label, parts in lines) or "no weight layers"


def _facts(b: Branch, home: str, layers: dict[str, LayerInfo]) -> str:
    skip = f"{b.skip} skip"
    if b.skip_weights:
        names = names_within(b.skip_weights, home)
        texts = [f"{n} {layer_words(layers[q])}".strip() for n, q in zip(names, b.skip_weights, strict=True)]
        skip += f" ({'; '.join(texts)})"
    facts = [f"depth {b.depth}", order_words(b), skip]
    if b.norms:
        facts.append(plural(b.norms, "norm"))
    if b.repeats > 1:
        facts.append(f"body of a scan of {b.repeats}")
    return ", ".join(facts)


def _add_regions(root: Tree, regions: Sequence[Region]) -> None:
    """What is named and not entered; equal neighbours are one line."""
    for _, group in itertools.groupby(regions, key=lambda r: (r.primitive, r.scope, len(r.parameters))):
        same = list(group)
        taken = [merged(column) for column in zip(*(r.parameters for r in same), strict=True)]
        words = region_words(same[0]) + (f" x {len(same)}" if len(same) > 1 else "")
        where = f" in scope {same[0].scope}" if same[0].scope else ""
        takes = f", takes {_listed(taken)}" if taken else ", takes no parameters"
        root.add(_line(("not entered  ", "bold"), (f"{words}{where}{takes}", "")))


def _add_undecided(root: Tree, undecided: Sequence[Undecided]) -> None:
    named = [u for u in undecided if u.what == "sum"]
    keys = [(u.what, u.where, u.why, tuple(map(len, u.terms)), tuple(map(len, u.readings))) for u in undecided]
    for run in fold(keys, longest=1):
        same = undecided[run.start : run.stop]
        u = same[0]
        what = f"undecided {merged(v.name or v.what for v in same)}" + (f" x {len(same)}" if len(same) > 1 else "")
        where = f"  {u.where}: {u.why}" if u.where else f"  {u.why}"
        at = root.add(_line((what, "bold yellow"), (where, "")))
        for k in range(len(u.terms)):
            paths = [merged(column) for column in zip(*(v.terms[k] for v in same), strict=True)]
            reading = f"; {reading_words(u, k)}" if u.readings else ""
            at.add(_line((f"term {k}  ", "bold"), (f"{_listed(paths) or 'no weight layers'}{reading}", "")))
    if named:
        root.add(_line(("to settle  ", "bold yellow"), (settle_words([u.name for u in named]), "")))


def _listed(paths: Sequence[str]) -> str:
    more = len(paths) - _PATHS_SHOWN
    return ", ".join(paths[:_PATHS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def plan_table(plan: Plan, width: int | None = None) -> str:
    """A plan as text: what each parameter gets and why; equal neighbouring modules are folded.

    Args:
      plan: what `fi.plan` returned.
      width: columns; by default those of the terminal.

    Returns:
      A title, the table, and the plan's notes.
    """
    width = width or terminal_width()
    title = f"Plan {plan.scheme}: L = {plan.num_branches}, {plural(len(plan), 'parameter')}"
    notes = [f"Note: {note}" for note in plan.notes]
    runs = [[_cells(same) for same in run] for run in _plan_runs(plan.entries, 0)]
    widths = [max(len(cells[k]) for cells in itertools.chain([_HEAD], *runs)) + 2 for k in range(4)]
    body = _wide_plan(runs) if sum(widths) + _WHY <= width else _narrow_plan(runs, widths)
    return render(_plain(title), *body, *map(_plain, notes), width=width)


def _plan_runs(entries: Sequence[Entry], depth: int) -> Iterator[list[list[Entry]]]:
    """Rows of the table, in runs; a row is the entries that share it.

    Entries whose paths begin with the same `depth + 1` names are one group (a module). Neighbouring groups that hold
    the same are folded; a group that repeats nothing is looked into.
    """
    modules = itertools.groupby(entries, key=lambda e: "/".join(e.path.split("/")[: depth + 1]))
    groups = _counted({name: list(own) for name, own in modules})
    for run in fold([tuple(map(_entry_key, g)) for g in groups]):
        if run.count > 1:
            same = [groups[run.start + k : run.stop : run.period] for k in range(run.period)]
            yield [list(column) for gs in same for column in zip(*gs, strict=True)]
        elif len(groups[run.start]) > 1:
            yield from _plan_runs(groups[run.start], depth + 1)
        else:
            yield [groups[run.start]]


def _counted(groups: dict[str, list[Entry]]) -> list[list[Entry]]:
    """Groups whose names differ in numbers only, in the order of the numbers: `block_2` before `block_10`."""
    alike: dict[str, list[str]] = {}
    for name in groups:
        alike.setdefault(_NUMBERS.sub("0", name), []).append(name)
    ordered = {k: iter(sorted(own, key=lambda n: [int(x) for x in _NUMBERS.findall(n)])) for k, own in alike.items()}
    return [groups[next(ordered[_NUMBERS.sub("0", name)])] for name in groups]


def _entry_key(e: Entry) -> Hashable:
    """Two entries with one key are drawn alike and for the same reason, but for the numbers in its words."""
    return e.shape, e.dtype, e.role, e.distribution, e.std, e.value, e.rate, _NUMBERS.sub("0", e.reason)


_Cells = tuple[str, str, str, str, str]  # path, count, shape, distribution, reason


def _cells(same: Sequence[Entry]) -> _Cells:
    e = same[0]
    count = str(len(same)) if len(same) > 1 else ""
    why = merged(x.reason for x in same)
    if e.rate != 1:
        why += f"{'; ' if why else ''}learning rate x {number(e.rate)}"
    return merged(x.path for x in same), count, shape(e.shape), _drawn(e), why


def _drawn(e: Entry) -> str:
    if e.distribution == "constant":
        return f"constant {number(e.value)}"
    if e.distribution == "model":
        return "model's own"
    return f"{e.distribution.replace('_', ' ')}, std {number(e.std)}"


_HEAD = ("parameter", "x", "shape", "drawn from", "why")


def _wide_plan(runs: Sequence[Sequence[_Cells]]) -> list[RenderableType]:
    """A column for the reason."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, expand=True)
    for k, name in enumerate(_HEAD[:-1]):
        table.add_column(name, no_wrap=True, justify="right" if k == 1 else "left")
    table.add_column(_HEAD[-1], ratio=1)
    for before, run in itertools.pairwise([[], *runs]):
        if _apart(before, run):
            table.add_section()
        for cells in run:
            table.add_row(*map(_plain, cells))
    return [table]


def _narrow_plan(runs: Sequence[Sequence[_Cells]], widths: Sequence[int]) -> list[RenderableType]:
    """The reason below, over the whole width."""
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.table import Table

    def row(cells: Sequence[str]) -> Table:
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(ratio=1, overflow="fold")
        for k, name in enumerate(_HEAD[1:4], 1):
            grid.add_column(width=widths[k] - 2, justify="right" if name == "x" else "left")
        grid.add_row(*map(_plain, cells[:4]))
        return grid

    lines: list[RenderableType] = [row(("parameter, and why", *_HEAD[1:])), Rule(style="dim")]
    for before, run in itertools.pairwise([[], *runs]):
        if _apart(before, run):
            lines.append("")
        for cells in run:
            lines += [row(cells), Padding(_plain(cells[4]), (0, 0, 0, 2))] if cells[4] else [row(cells)]
    return lines


def _apart(before: Sequence[_Cells], run: Sequence[_Cells]) -> bool:
    """Whether a blank line separates two runs: where one of them is a folded group."""
    return bool(before) and max(len(before), len(run)) > 1


def _line(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(text)
