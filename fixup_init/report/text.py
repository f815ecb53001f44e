"""A propagation or a comparison as text: tables that fit a terminal, and a summary in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fixup_init.propagation import Comparison, Direction, Propagation, Row, Statistics
from fixup_init.report.layout import (
    line,
    number,
    plural,
    render,
    selection,
    shape,
    spaced,
    terminal_width,
    title,
    unit,
    words,
)  # fmt: skip

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_table", "propagation_table"]

_ROWS = 24  # of a folded table
_BLOCKS = 12  # of a comparison
_WIDE = 110  # columns from which on there is room for kind, shape and the gradient's mean


def propagation_table(propagation: Propagation, all_rows: bool = False, width: int | None = None) -> str:
    """The rows of a propagation as text; of a long model those that show its drift.

    Args:
      propagation: what `fi.analyze` returned.
      all_rows: every row; otherwise inputs, outputs, evenly spaced rows of the stream and the first that goes wrong.
      width: columns; by default those of the terminal.

    Returns:
      A title, the table, what it leaves out, and the summary.
    """
    width = width or terminal_width()
    rows = propagation.rows if all_rows else selection(propagation, _ROWS)
    about = f"L = {propagation.num_branches}, {plural(len(propagation), 'row')}"
    if any(r.backward is not None for r in propagation):
        about += f"; gradients from a random probe at the {propagation.probe}"
    name = propagation.label if propagation.label == propagation.model else f"{propagation.label} ({propagation.model})"
    parts: list[object] = [f"{name}: {about}", _rows_table(propagation, rows, width >= _WIDE)]
    if len(rows) < len(propagation):
        parts.append(f"{len(rows)} of {len(propagation)} rows are shown; all_rows=True shows every one.")
    if hidden := propagation.unmeasured:
        names = ", ".join(hidden[:4]) + (f" and {len(hidden) - 4} more" if len(hidden) > 4 else "")
        parts.append(f"Not measured, inside of a conditional or shard_map, which runs as a whole: {names}.")
    parts += ["", propagation.summary()]
    return render(*parts, width=width)


def _rows_table(propagation: Propagation, rows: Sequence[Row], wide: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    backward = any(r.backward is not None for r in propagation)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("block", justify="right")
    if wide:
        table.add_column("kind", no_wrap=True)
    table.add_column("name", overflow="fold", min_width=12)
    if wide:
        table.add_column("shape", no_wrap=True)
    heads = ["mean", "variance", "chan. mean²", "E[x²]"]
    heads += (["E[g]", "E[g²]"] if wide else ["E[g²]"]) if backward else []
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row.block), row.kind, title(row), shape(row.shape)] if wide else [str(row.block), title(row)]
        cells += _forward(row.forward)
        if backward:
            cells += _backward(row.backward, wide)
        table.add_row(*map(Text, cells))
    return table


def _forward(s: Statistics) -> list[str]:
    if s.finite < 1:
        return ["", "", "", _overflow(s)]
    return [number(s.mean), number(s.variance), number(s.squared_channel_mean), number(s.second_moment)]


def _backward(s: Statistics | None, wide: bool) -> list[str]:
    if s is None:
        return [""] * (1 + wide)
    cells = ["", _overflow(s)] if s.finite < 1 else [number(s.mean), number(s.second_moment)]
    return cells if wide else cells[1:]


def _overflow(s: Statistics) -> str:
    """How much of the value is finite."""
    share = "<1" if 0 < s.finite < 0.01 else f"{math.floor(100 * s.finite)}"
    return f"{share}% finite"


def comparison_table(comparison: Comparison, width: int | None = None) -> str:
    """Several propagations side by side as text.

    Args:
      comparison: what `fi.compare` returned.
      width: columns; by default those of the terminal.

    Returns:
      A line for each propagation and direction with its verdict, the second moment of the stream at some blocks, and
      the summary.
    """
    width = width or terminal_width()
    parts: list[object] = [_verdicts(comparison)]
    for direction in ("forward", "backward"):
        tables = _streams(comparison, direction, width)
        if tables:
            what = "Second moment of the stream" if direction == "forward" else "The same of its gradient, head to stem"
            parts += ["", f"{what}, by {unit(comparison.propagations[0])}:", *tables]
    parts += ["", *comparison.summary().splitlines()]
    return render(*parts, width=width)


def _verdicts(comparison: Comparison) -> Table:
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
    for one in comparison:
        for direction in ("forward", "backward"):
            drift = one.drift(direction)
            factor = f"×{number(drift.factor)}" if drift.factor is not None else ""
            verdict = drift.verdict if drift.factor is not None else words(one, drift)
            label = one.label if direction == "forward" else ""
            cells = [label, direction, number(drift.first), number(drift.last), factor, verdict]
            table.add_row(*map(Text, cells))
    return table


def _streams(comparison: Comparison, direction: Direction, width: int) -> list[Table]:
    """A column for each propagation; several tables where they do not fit beside each other."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = {one.label: _stream(one, direction) for one in comparison}
    blocks = sorted({k for cells in columns.values() for k in cells})
    shown = [blocks[k] for k in spaced(len(blocks), _BLOCKS)]
    if direction == "backward":
        shown = shown[::-1]
    tables, labels, most = [], list(columns) if blocks else [], max(1, (width - 8) // 14)
    for start in range(0, len(labels), most):
        some = labels[start : start + most]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
        table.add_column("block", justify="right", no_wrap=True)
        for label in some:
            table.add_column(Text(label), justify="right", min_width=8)
        for k in shown:
            table.add_row(str(k), *(columns[label].get(k, "") for label in some))
        tables.append(table)
    return tables


def _stream(one: Propagation, direction: Direction) -> dict[int, str]:
    found = line(one, direction)
    cells = {x: number(y) for x, y in zip(found.x, found.y, strict=True)}
    return cells | dict.fromkeys(found.zeros, "0") | dict.fromkeys(found.overflows, "overflow")
