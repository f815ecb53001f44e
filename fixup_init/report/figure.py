"""A propagation or a comparison as a matplotlib figure: second moment of the stream over depth, in both directions."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixup_init.extras import require
from fixup_init.files import replacing
from fixup_init.propagation import Direction, Propagation
from fixup_init.report.layout import Line, Pair, line, mean_share, pairs, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "figure", "save"]

# Okabe & Ito's set, which colour-blind readers can tell apart, without its yellow (too light for a line on white).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_SUFFIXES = (".png", ".svg", ".pdf")
_MARKED = 40  # points up to which each has a marker
_SPACED = 8  # markers of a longer line
_EDGE = 32  # marks that fit side by side at an edge
_SHARES = (
    ("example_share", "across examples", "#35608d"),
    ("channel_share", "across channels", "#22a884"),
    ("position_share", "across positions", "#b8d635"),
)


def figure(
    data: Propagation | Iterable[Propagation],
    *,
    predicted: Propagation | Iterable[Propagation] | None = None,
    channel_means: bool = False,
    shares: bool = False,
) -> Figure:
    """Draws the drift: one line for each propagation, left forward, right backward; predictions are dashed.

    Values that are zero or not finite have no place on a logarithmic axis: they are marked at its lower or upper edge.

    Args:
      data: what `fi.compare`, `fi.analyze` or `fi.predict` returned.
      predicted: predictions, in the colour of what was measured; those in `data` are too.
      channel_means: adds a third panel, the mean of the squared channel means as a share of the second moment: how much
        of the signal no longer depends on the input.
      shares: adds a panel for each measured propagation: which axes the variance of the signal lies across.

    Returns:
      A figure that belongs to no pyplot state; `save` writes it, and a notebook shows it.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> from fixup_init.propagation import Propagation, Row, Statistics
      >>> row = Row("sum", "sum 1", "Net", 1, (8, 16), "float32", None, Statistics(0.0, 2.0, 0.5))
      >>> drawn = figure(Propagation("fixup", "Net", 1, (row,)), channel_means=True)
      >>> [axis.get_title() for axis in drawn.axes]
      ['Forward: the signal', 'Backward: the gradient signal', 'Mean shift: squared channel means']
    """
    figures = require("matplotlib.figure", "report")
    several = pairs(data, predicted)
    drawn = sum(1 + (pair.predicted is not None) for pair in several)
    panels = 2 + channel_means
    parted = [pair.own for pair in several if _has_shares(pair.own)] if shares else []
    below = -(-len(parted) // panels)
    # The legends stand below the panels, a line of 0.2 inches for each propagation.
    heights = [3.6 + 0.2 * drawn] + [3.4] * below
    result = figures.Figure(figsize=(4.9 * panels, sum(heights)), layout="constrained")
    grid = result.subplots(1 + below, panels, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, direction in zip(grid[0], ("forward", "backward"), strict=False):
        _draw(axis, several, direction)
    if channel_means:
        _draw_channel_means(grid[0][2], several)
    cells = grid[1:].flatten()
    for axis, one in zip(cells, parted, strict=False):
        _draw_shares(axis, one)
    for axis in cells[len(parted) :]:
        axis.remove()
    return result


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG, SVG or PDF, by the suffix of the path; the file appears whole or not at all.

    Args:
      figure: what `figure` returned.
      path: where to; directories that are missing are made.

    Returns:
      The path.

    Raises:
      ValueError: the suffix is none of the three.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{str(path)!r} ends in {path.suffix or 'no suffix'!r}: expected one of {', '.join(_SUFFIXES)}; "
            "rename it, for example to drift.png."
        )
    dates = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # the same figure, the same file
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=144, metadata=dates[path.suffix])
    return path


def _draw(axis: Axes, several: Sequence[Pair], direction: Direction) -> None:
    drawn = list(_lines(several, direction))
    apart = max((one.x[-1] for one, _, _ in drawn if one.x), default=1) // _EDGE + 1
    _set_scale(axis, (y for one, _, _ in drawn for y in one.y))
    for one, k, dashed in drawn:
        label = f"{one.label}, predicted" if dashed else f"{one.label}: {one.words}"
        axis.plot(one.x, one.y, label=label, **_style(k, dashed, one.y))
        _mark_edges(axis, one, COLOURS[k % len(COLOURS)], apart)
    forward = direction == "forward"
    steps = unit(several[0].own, plural=True) if several else ""
    axis.set_title("Forward: the signal" if forward else "Backward: the gradient signal", fontsize="medium")
    axis.set_xlabel(f"{steps} from the input" if forward else f"{steps} from the input (gradients flow right to left)")
    axis.set_ylabel("second moment of the stream, E[x²]" if forward else "second moment of its cotangent, E[g²]")
    if not any(one.x for one, _, _ in drawn):
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center")
    _finish(axis, several)


def _lines(several: Sequence[Pair], direction: Direction) -> Iterator[tuple[Line, int, bool]]:
    """Lines with the number of their colour, and whether they are predictions."""
    for k, pair in enumerate(several):
        own = pair.own.kind == "predicted"
        found = line(pair.own, direction)
        yield (dataclasses.replace(found, label=found.label.removesuffix(", predicted")) if own else found), k, own
        if pair.predicted is not None:
            yield dataclasses.replace(line(pair.predicted, direction), label=pair.own.label), k, True


def _style(k: int, dashed: bool, y: Sequence[float]) -> dict[str, Any]:
    """Colour and marker tell propagations apart, dashes predictions."""
    known = [i for i in range(len(y)) if not math.isnan(y[i])]
    if len(known) <= _MARKED:
        marked = known
    else:  # shifted, so that markers of lines that coincide stand beside each other
        step = len(known) // _SPACED
        marked = sorted({*known[(k * step) // len(_MARKERS) :: step], *(i for i in known if _alone(y, i))})
    if dashed:
        marked = [i for i in known if _alone(y, i)]
    return {
        "color": COLOURS[k % len(COLOURS)], "linestyle": (0, (5, 2.5)) if dashed else "-",
        "linewidth": 1.4 if dashed else 1.8, "marker": _MARKERS[k % len(_MARKERS)] if marked else "", "markersize": 3.5,
        "markevery": marked, "zorder": 3 if dashed else 2,
    }  # fmt: skip


def _alone(values: Sequence[float], k: int) -> bool:
    """Whether a value has no neighbour that a line could lead to."""
    return not math.isnan(values[k]) and all(math.isnan(values[j]) for j in (k - 1, k + 1) if 0 <= j < len(values))


def _set_scale(axis: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis of two decades or more, with room at its edges for marks."""
    logs = [math.log10(y) for y in values if y > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    margin = max((high - low) * 0.1, 1 - (high - low) / 2)
    axis.set_yscale("log")
    axis.set_ylim(10 ** (low - margin), 10 ** (high + margin))


def _mark_edges(axis: Axes, one: Line, colour: str, apart: int) -> None:
    """Triangles at the lower edge for zeros and at the upper for values that are not finite; the first in words."""
    for found, y, marker, word, offset in (
        (one.zeros, 0.0, "v", "exactly 0", 10),
        (one.overflows, 1.0, "^", "not finite", -10),
    ):
        if not found:
            continue
        shown = [x for k, x in enumerate(found) if k == 0 or x // apart > found[k - 1] // apart]
        across = axis.get_xaxis_transform()  # depth along x, fractions of the axis along y
        axis.plot(
            shown, [y] * len(shown), transform=across, linestyle="", marker=marker, color=colour, markersize=7,
            markeredgecolor="white", markeredgewidth=0.5, clip_on=False, zorder=5,
        )  # fmt: skip
        axis.annotate(
            word, (shown[0], y), xycoords=across, xytext=(0, offset), textcoords="offset points", color=colour,
            fontsize="small", ha="left", va="center",
        )  # fmt: skip


def _draw_channel_means(axis: Axes, several: Sequence[Pair]) -> None:
    for k, pair in enumerate(several):
        for one in filter(None, (pair.own, pair.predicted)):
            shares = [mean_share(r.forward) if r.forward else math.nan for r in one.stream]
            if all(map(math.isnan, shares)):
                continue
            dashed = one.kind == "predicted"
            label = f"{pair.own.label}, predicted" if one is pair.predicted else one.label
            axis.plot(range(1, len(shares) + 1), shares, label=label, **_style(k, dashed, shares))
    axis.set_ylim(-0.03, 1.03)
    axis.set_title("Mean shift: squared channel means", fontsize="medium")
    axis.set_xlabel(f"{unit(several[0].own, plural=True)} from the input" if several else "")
    axis.set_ylabel("share of the second moment")
    _finish(axis, several)


def _has_shares(one: Propagation) -> bool:
    return any(r.forward is not None and not math.isnan(r.forward.example_share) for r in one.stream)


def _draw_shares(axis: Axes, one: Propagation) -> None:
    rows = [
        (k, r.forward) for k, r in enumerate(one.stream, 1) if r.forward and not math.isnan(r.forward.example_share)
    ]
    bands = [[getattr(s, name) for _, s in rows] for name, _, _ in _SHARES]
    known = [(band, style) for band, style in zip(bands, _SHARES, strict=True) if not all(map(math.isnan, band))]
    depths = [k for k, _ in rows]
    values = [[0.0 if math.isnan(x) else x for x in band] for band, _ in known]
    rest = [max(0.0, 1 - sum(column)) for column in zip(*values, strict=True)]
    if len(depths) == 1:  # an area needs two ends
        depths, values, rest = [depths[0] - 0.4, depths[0] + 0.4], [band * 2 for band in values], rest * 2
    axis.stackplot(
        depths, *values, rest, labels=[*(label for _, (_, label, _) in known), "in their combinations"],
        colors=[*(colour for _, (_, _, colour) in known), "#c3c8ce"], linewidth=0,
    )  # fmt: skip
    axis.set_xlim(depths[0], depths[-1])
    axis.set_ylim(0, 1)
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_title(f"Variance of the signal: {one.label}", fontsize="medium")
    axis.set_xlabel(f"{unit(one, plural=True)} from the input")
    axis.set_ylabel("share of the variance")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False, fontsize="small", ncols=2)


def _finish(axis: Axes, several: Sequence[Pair]) -> None:
    longest = max((len(pair.own.stream) for pair in several), default=1)
    axis.set_xlim(1 - 0.02 * longest, longest * 1.02 + (longest == 1))
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(integer=True))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_lines():
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize="small", handlelength=3)
