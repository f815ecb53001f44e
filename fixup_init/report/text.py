"""A propagation or a comparison as text: tables that fit a terminal, and a summary in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fixup_init.propagation import Comparison, Direction, Propagation, Row, Statistics
from fixup_init.report.layout import (
    MARKS,
    Pair,
    axes_words,
    line,
    mean_share,
    noted,
    number,
    pairs,
    percent,
    plural,
    render,
    selection,
    shape,
    spaced,
    statistics,
    terminal_width,
    title,
    unit,
    verdicts_of,
    words,
)  # fmt: skip

if TYPE_CHECKING:
    from rich.table import Table

    from fixup_init.verdicts import Verdict

__all__ = ["comparison_table", "propagation_table"]

_ROWS = 24  # of a folded table
_BLOCKS, _GRAVEST = 12, 2  # of a comparison: blocks, and verdicts on each propagation
_NOTES = 6  # that stand below a table
_LEAST, _NAME = 12, 28  # columns that names get: at least, and before other columns are left out
_BETWEEN = 3  # columns between two of a table


def propagation_table(
    propagation: Propagation,
    all_rows: bool = False,
    width: int | None = None,
    predicted: Propagation | None = None,
) -> str:
    """The rows of a propagation as text; of a long model those that show its drift.

    Args:
      propagation: what `fi.analyze` or `fi.predict` returned.
      all_rows: every row; otherwise inputs, outputs, evenly spaced rows of the stream and the first that goes wrong.
      width: columns; by default those of the terminal. The more there are, the more statistics are shown.
      predicted: what `fi.predict` returned for it, shown beside what was measured.

    Returns:
      A title, verdicts, the table, what it leaves out, notes, and the summary.

    Example:
      >>> from fixup_init.propagation import Propagation, Row, Statistics
      >>> row = Row("sum", "sum 1", "Net", 1, (8, 16), "float32", None, Statistics(0.0, 2.0, 0.5))
      >>> propagation_table(Propagation("fixup", "Net", 1, (row,)), width=80).splitlines()[0]
      'fixup (Net): L = 1, 1 row'
    """
    width = width or terminal_width()
    pair = next(iter(pairs(propagation, predicted)))
    rows = propagation.rows if all_rows else selection(propagation, _ROWS)
    about = f"L = {propagation.num_branches}, {plural(len(propagation), 'row')}"
    if propagation.kind == "predicted":
        about += "; predicted"
    elif any(r.backward is not None for r in propagation):
        about += f"; gradients from a random probe at the {propagation.probe}"
    name = propagation.label if propagation.label == propagation.model else f"{propagation.label} ({propagation.model})"
    parts: list[object] = [f"{name}: {about}"]
    if found := verdicts_of(pair):
        parts += ["", _findings(found), ""]
    chosen = {id(r) for r in rows}
    parts.append(_rows_table([(r, p) for r, p in pair.rows if id(r) in chosen], width))
    if len(rows) < len(propagation):
        shown = f"{len(rows)} of {len(propagation)} rows are shown"
        parts.append(f"{shown}; all_rows=True (on the command line --all) shows every one.")
    parts += _notes(pair)
    parts += ["", propagation.summary()]
    return render(*parts, width=width)


def _findings(verdicts: Sequence[Verdict], advice: bool = True) -> Table:
    """A line for each verdict, with its advice below."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for one in verdicts:
        table.add_row(Text(f"{MARKS[one.severity]} {one.severity}"), Text(one.text))
        if advice and one.advice:
            table.add_row("", Text(one.advice, style="dim"))
    return table


def _notes(pair: Pair) -> list[str]:
    found = noted(pair)
    lines = []
    for note, rows in found[:_NOTES]:
        first, last = (title(pair.own.rows[k]) for k in (rows[0], rows[-1]))
        where = first if len(rows) == 1 else f"{plural(len(rows), 'row')}, {first} to {last}"
        lines.append(f"{note} ({where})")
    if len(found) > _NOTES:
        lines.append(f"{plural(len(found) - _NOTES, 'more note')} in the rows.")
    return pair.notes + lines


_Cell = Callable[[Row, Row | None], str]


@dataclasses.dataclass(frozen=True)
class _Column:
    """Of a table of rows; where there is no room, those of the highest `rank` are left out first."""

    head: str
    rank: int
    cell: _Cell
    left: bool = False


def _of(direction: Direction, form: Callable[[Statistics], str], predicted: bool = False) -> _Cell:
    """A cell from the statistics of one direction; empty where there are none or they are not finite."""

    def cell(row: Row, other: Row | None) -> str:
        shown = other if predicted else row
        s = None if shown is None else statistics(shown, direction)
        return "" if s is None or s.finite < 1 else form(s)

    return cell


def _moment(direction: Direction) -> _Cell:
    """The second moment, or how much of the value is finite."""

    def cell(row: Row, _: Row | None) -> str:
        s = statistics(row, direction)
        return "" if s is None else _overflow(s) if s.finite < 1 else number(s.second_moment)

    return cell


def _across(s: Statistics) -> str:
    return axes_words(s).partition(",")[0]


def _ratio(row: Row, _: Row | None) -> str:
    return "" if row.weight is None else number(row.weight.ratio)


_COLUMNS = (
    _Column("block", 0, lambda row, _: str(row.block)),
    _Column("kind", 13, lambda row, _: row.kind, left=True),
    _Column("name", 0, lambda row, _: title(row), left=True),
    _Column("shape", 14, lambda row, _: shape(row.shape), left=True),
    _Column("mean", 10, _of("forward", lambda s: number(s.mean))),
    _Column("variance", 9, _of("forward", lambda s: number(s.variance))),
    _Column("chan. mean²", 12, _of("forward", lambda s: number(s.squared_channel_mean))),
    _Column("E[x²]", 0, _moment("forward")),
    _Column("predicted", 1, _of("forward", lambda s: number(s.second_moment), predicted=True)),
    _Column("mean² share", 3, _of("forward", lambda s: percent(mean_share(s)))),
    _Column("cosine", 4, _of("forward", lambda s: f"{s.example_cosine:.2f}")),
    _Column("rank", 5, _of("forward", lambda s: number(s.effective_rank))),
    _Column("varies across", 6, _of("forward", _across), left=True),
    _Column("zeros", 7, _of("forward", lambda s: percent(s.zeros))),
    _Column("saturated", 11, _of("forward", lambda s: percent(s.saturated))),
    _Column("E[g]", 15, _of("backward", lambda s: number(s.mean))),
    _Column("E[g²]", 0, _moment("backward")),
    _Column("predicted", 2, _of("backward", lambda s: number(s.second_moment), predicted=True)),
    _Column("grad/param", 8, _ratio),
)


def _rows_table(rows: Sequence[tuple[Row, Row | None]], width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    known = []
    for column in _COLUMNS:
        cells = ["" if text in ("–", "nan") else text for text in (column.cell(*pair) for pair in rows)]
        if any(cells) or column.head in ("block", "name", "E[x²]"):
            known.append((column, cells, max(len(column.head), *map(len, cells)) + _BETWEEN))
    room, shown = width, set()
    for column, _, size in sorted(known, key=lambda x: x[0].rank):
        room -= min(max(size, _LEAST + _BETWEEN), _NAME + _BETWEEN) if column.head == "name" else size
        if column.rank and room < 0:
            break
        shown.add(column)
    found = [(column, cells) for column, cells, _ in known if column in shown]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for column, _ in found:
        if column.head == "name":
            table.add_column("name", overflow="fold", min_width=_LEAST)
        else:
            table.add_column(column.head, justify="left" if column.left else "right", no_wrap=True)
    for k in range(len(rows)):
        table.add_row(*(Text(cells[k]) for _, cells in found))
    return table


def _overflow(s: Statistics) -> str:
    """How much of the value is finite."""
    share = "<1" if 0 < s.finite < 0.01 else f"{math.floor(100 * s.finite)}"
    return f"{share}% finite"


def comparison_table(
    comparison: Comparison,
    width: int | None = None,
    predicted: Propagation | Iterable[Propagation] | None = None,
) -> str:
    """Several propagations side by side as text.

    Args:
      comparison: what `fi.compare` returned.
      width: columns; by default those of the terminal.
      predicted: predictions for some of them, beside those in the comparison.

    Returns:
      Errors and warnings, a line for each propagation and direction with its drift, the second moment of the stream at
      some blocks, and the summary.
    """
    width = width or terminal_width()
    several = pairs(comparison, predicted)
    parts: list[object] = []
    for pair in several:
        found = verdicts_of(pair)
        if grave := [v for v in found if v.severity != "note"][:_GRAVEST]:
            parts += [f"{pair.own.label}:", _findings(grave, advice=False)]
            if more := len(found) - len(grave):
                parts.append(f"and {more} more; this propagation alone tells them.")
            parts.append("")
    parts.append(_drifts(several))
    for direction in ("forward", "backward"):
        tables = _streams(several, direction, width)
        if tables:
            what = "Second moment of the stream" if direction == "forward" else "The same of its gradient, head to stem"
            parts += ["", f"{what}, by {unit(several[0].own)}:", *tables]
    parts += ["", *comparison.summary().splitlines()]
    return render(*parts, width=width)


def _drifts(several: Sequence[Pair]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("", overflow="fold", min_width=10)
    table.add_column("", no_wrap=True)
    table.add_column("first", justify="right", no_wrap=True)
    table.add_column("last", justify="right", no_wrap=True)
    table.add_column("a block", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for pair in several:
        one = pair.own
        for direction in ("forward", "backward"):
            drift = one.drift(direction)
            factor = f"×{number(drift.factor)}" if drift.factor is not None else ""
            verdict = drift.verdict if drift.factor is not None else words(one, drift)
            label = one.label if direction == "forward" else ""
            cells = [label, direction, number(drift.first), number(drift.last), factor, verdict]
            table.add_row(*map(Text, cells))
    return table


def _streams(several: Sequence[Pair], direction: Direction, width: int) -> list[Table]:
    """A column for each propagation and each prediction; several tables where they do not fit beside each other."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns: list[tuple[str, dict[int, str]]] = []
    for pair in several:
        columns.append((pair.own.label, _stream(pair.own, direction)))
        if pair.predicted is not None:
            columns.append(("predicted", _stream(pair.predicted, direction)))
    blocks = sorted({k for _, cells in columns for k in cells})
    if not blocks:
        return []
    shown = [blocks[k] for k in spaced(len(blocks), _BLOCKS)]
    if direction == "backward":
        shown = shown[::-1]
    tables, most = [], max(1, (width - 8) // 14)
    if any(pair.predicted is not None for pair in several):
        most = max(2, most - most % 2)  # a prediction stays beside its measurement
    for start in range(0, len(columns), most):
        some = columns[start : start + most]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
        table.add_column("block", justify="right", no_wrap=True)
        for label, _ in some:
            table.add_column(Text(label), justify="right", min_width=8)
        for k in shown:
            table.add_row(str(k), *(cells.get(k, "") for _, cells in some))
        tables.append(table)
    return tables


def _stream(one: Propagation, direction: Direction) -> dict[int, str]:
    found = line(one, direction)
    cells = {x: number(y) for x, y in zip(found.x, found.y, strict=True)}
    return cells | dict.fromkeys(found.zeros, "0") | dict.fromkeys(found.overflows, "overflow")
