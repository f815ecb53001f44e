"""A structure as a tree, a plan as a table; what repeats is folded, so that 4 and 300 layers both fit on a screen."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

from fixup_init.plan import Entry, Plan
from fixup_init.report.layout import fold, merged, number, plural, render, shape, terminal_width
from fixup_init.report.outline import (
    Item,
    by_path,
    common_home,
    layer_runs,
    layer_words,
    names_within,
    norm_words,
    numbers,
    order_words,
    outline,
    size_words,
)  # fmt: skip
from fixup_init.structure import Branch, LayerInfo, Structure, Undecided

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
    root = Tree(_line((structure.name, "bold"), (f"  {size_words(structure)}", "")), guide_style="dim")
    for run in fold([item.key for item in items]):
        at = root
        if run.period > 1:
            at = root.add(_line((f"{run.count} times", "bold"), (f"  {numbers(items[run.start : run.stop])}", "")))
        for k in range(run.period):
            at.add(_group(structure, items[run.start + k : run.stop : run.period]))
    if not structure.heads and not any(u.what == "head" for u in structure.undecided):
        root.add(_plain("no head: no weight layer outside of branches feeds an output"))
    norms = norm_words(structure.norms)
    root.add(_line(("norms  ", "bold"), (norms, "")) if norms else _plain("no normalization"))
    unused = [p.path for p in structure.parameters if p.role == "unused"]
    if unused:
        root.add(_line(("unused parameters  ", "bold"), (_listed(unused), "")))
    for undecided in structure.undecided:
        _add_undecided(root, undecided)
    return root


def _group(structure: Structure, group: Sequence[Item]) -> Text:
    item = group[0]
    times = f" x {len(group)}" if len(group) > 1 else ""
    if item.branch is None:
        assert item.layer is not None
        path = merged(i.paths[0] for i in group)
        return _line((f"{item.place}  ", "bold"), (path, "cyan"), (times, "bold"), (f"  {layer_words(item.layer)}", ""))
    layers = by_path(structure)
    homes = [common_home(i.paths) for i in group]
    return _line(
        (numbers(group), "bold"),
        (f"  {merged(homes)}".rstrip(), "cyan"),
        (times, "bold"),
        (f"\n{_weights(item.branch, homes[0], layers)}", ""),
        (f"\n{_facts(item.branch, homes[0], layers)}", "dim"),
    )


def _weights(branch: Branch, home: str, layers: dict[str, LayerInfo]) -> str:
    """The weight layers of a branch: `conv1 conv 144→144; conv2 conv 144→144`."""
    names = names_within(branch.weights, home)
    parts = []
    for run in layer_runs(branch, layers):
        texts = []
        for k in range(run.start, run.start + run.period):
            name = merged(names[k : run.stop : run.period])
            role: str = branch.roles.get(branch.weights[k], "value")
            words = f"{name} {layer_words(layers[branch.weights[k]], scans=False)}".strip()
            texts.append(words if role == "value" else f"{words}, {role}")
        text = "; ".join(texts)
        parts.append((f"({text})" if run.period > 1 else text) + f" x {run.count}" if run.count > 1 else text)
    return "; ".join(parts) or "no weight layers"


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


def _add_undecided(root: Tree, undecided: Undecided) -> None:
    where = f"  {undecided.where}: {undecided.why}" if undecided.where else f"  {undecided.why}"
    at = root.add(_line((f"undecided {undecided.what}", "bold yellow"), (where, "")))
    for k, term in enumerate(undecided.terms, 1):
        at.add(_line((f"term {k}  ", "bold"), (_listed(term) or "no weight layers", "")))


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
