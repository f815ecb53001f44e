"""Update sizes as a table and as a matplotlib figure: size of one update over depth."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from fixup_init.extras import require
from fixup_init.report.figure import COLOURS
from fixup_init.report.layout import number, render, terminal_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fixup_init.checks.update_size import UpdateSize

__all__ = ["figure", "table"]


def table(sizes: UpdateSize, width: int | None = None) -> str:
    """A row for each depth, a column for each scheme: median over seeds, with the smallest and the largest.

    Args:
      sizes: what `fi.checks.update_size` returned.
      width: columns; by default those of the terminal.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    seeds = len({r.seed for r in sizes.rows})
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    grid.add_column("depth", justify="right", no_wrap=True)
    for scheme in sizes.schemes:
        grid.add_column(Text(scheme), justify="right")
    for depth in sizes.depths:
        cells = []
        for scheme in sizes.schemes:
            low, high = sizes.spread(scheme, depth)
            around = f" ({_size(low)} to {_size(high)})" if seeds > 1 and low != high else ""
            cells.append(_size(sizes.median(scheme, depth)) + around)
        grid.add_row(str(depth), *map(Text, cells))
    about = (
        f"{sizes.model}: change of the function after one step of SGD, over its rate {sizes.rate:g}; median of "
        f"{seeds} seed{'s' * (seeds != 1)}" + (", smallest to largest" if seeds > 1 else "")
    )
    return render(about, grid, "", *sizes.summary().splitlines(), width=width or terminal_width())


def figure(sizes: UpdateSize) -> Figure:
    """Draws size over depth: the median over seeds as a line, the seeds as points around it.

    Sizes that overflow have no place on a logarithmic axis: they are triangles at its upper edge.

    Args:
      sizes: what `fi.checks.update_size` returned.

    Returns:
      A figure that belongs to no pyplot state; `fixup_init.report.figure.save` writes it.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "report")
    result = figures.Figure(figsize=(5.6, 3.8), layout="constrained")
    axis = result.subplots()
    axis.set_xscale("log")
    axis.set_yscale("log")
    lines = []
    for k, scheme in enumerate(sizes.schemes):
        colour = COLOURS[k % len(COLOURS)]
        medians = [sizes.median(scheme, depth) for depth in sizes.depths]
        shown = [m if 0 < m < math.inf else math.nan for m in medians]
        label = _label(sizes, scheme)
        lines += axis.plot(sizes.depths, shown, "o-", color=colour, linewidth=1.8, markersize=4, label=label)
        points = [(r.depth, r.size) for r in sizes.rows if r.scheme == scheme and 0 < r.size < math.inf]
        axis.plot([x for x, _ in points], [y for _, y in points], "o", color=colour, alpha=0.35, markersize=3)
        over = [depth for depth, m in zip(sizes.depths, medians, strict=True) if not math.isfinite(m)]
        axis.plot(
            over, [1.0] * len(over), transform=axis.get_xaxis_transform(), linestyle="", marker="^", color=colour,
            markersize=8, markeredgecolor="white", markeredgewidth=0.5, clip_on=False, zorder=5,
        )  # fmt: skip
        if over:
            axis.annotate(
                "overflows", (over[0], 1.0), xycoords=axis.get_xaxis_transform(), xytext=(0, -11),
                textcoords="offset points", color=colour, fontsize="small", ha="center", va="center",
            )  # fmt: skip
    finite = [r.size for r in sizes.rows if 0 < r.size < math.inf]
    if finite:  # a decade on either side, so that what is flat looks flat
        axis.set_ylim(min(finite) / 10, max(finite) * 10)
        top = axis.get_ylim()[1]
        for line, scheme in zip(lines, sizes.schemes, strict=True):  # dotted to where it leaves the figure
            medians = [sizes.median(scheme, depth) for depth in sizes.depths]
            for (a, low), (b, high) in itertools.pairwise(zip(sizes.depths, medians, strict=True)):
                if math.isfinite(low) and math.isinf(high):
                    axis.plot([a, b], [low, top], ":", color=line.get_color(), linewidth=1.2)
    first, last = min(sizes.depths), max(sizes.depths)
    axis.set_xlim(first / 1.3, last * 1.3)
    axis.set_xlabel("depth")
    axis.set_ylabel("change of f after a step of SGD, over its rate")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small")
    return result


def _size(size: float) -> str:
    return "overflow" if math.isinf(size) else number(size)


def _label(sizes: UpdateSize, scheme: str) -> str:
    ratio = sizes.ratio(scheme)
    return f"{scheme}: {'not finite' if math.isinf(ratio) else f'within a factor of {number(ratio)}'}"
