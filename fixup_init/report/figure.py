"""A propagation or a comparison as a matplotlib figure: second moment of the stream over depth, in both directions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixup_init.extras import require
from fixup_init.files import replacing
from fixup_init.propagation import Comparison, Direction, Propagation
from fixup_init.report.layout import Line, line, propagations, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "figure", "save"]

# Okabe & Ito's set, which colour-blind readers can tell apart, without its yellow (too light for a line on white).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))
_SUFFIXES = (".png", ".svg", ".pdf")
_MARKED = 40  # points up to which each has a marker
_EDGE = 32  # marks that fit side by side at an edge


def figure(data: Comparison | Propagation, *, channel_means: bool = False) -> Figure:
    """Draws the drift: one line for each propagation, left forward, right backward.

    Values that are zero or not finite have no place on a logarithmic axis: they are marked at its lower or upper edge.

    Args:
      data: what `fi.compare` or `fi.analyze` returned.
      channel_means: adds a third panel, the mean of the squared channel means as a share of the second moment: how much
        of the signal no longer depends on the input.

    Returns:
      A figure that belongs to no pyplot state; `save` writes it, and a notebook shows it.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "report")
    several = propagations(data)
    panels = 2 + channel_means
    # The legends stand below the panels, a line of 0.2 inches for each propagation.
    result = figures.Figure(figsize=(4.9 * panels, 3.6 + 0.2 * len(several)), layout="constrained")
    axes = result.subplots(1, panels, squeeze=False)[0]
    for axis, direction in zip(axes, ("forward", "backward"), strict=False):
        _draw(axis, several, direction)
    if channel_means:
        _draw_channel_means(axes[2], several)
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


def _draw(axis: Axes, several: Sequence[Propagation], direction: Direction) -> None:
    lines = [line(one, direction) for one in several]
    apart = max((one.x[-1] for one in lines if one.x), default=1) // _EDGE + 1
    _set_scale(axis, (y for one in lines for y in one.y))
    for k, one in enumerate(lines):
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "label": f"{one.label}: {one.words}"}
        marked = [i for i in range(len(one.x)) if len(one.x) <= _MARKED or _alone(one.y, i)]
        axis.plot(
            one.x, one.y, linestyle=_DASHES[k % len(_DASHES)], linewidth=1.8, marker="o", markersize=3,
            markevery=marked, **style,
        )  # fmt: skip
        _mark_edges(axis, one, style["color"], apart)
    forward = direction == "forward"
    steps = unit(several[0], plural=True) if several else ""
    axis.set_title("Forward: the signal" if forward else "Backward: the gradient signal", fontsize="medium")
    axis.set_xlabel(f"{steps} from the input" if forward else f"{steps} from the input (gradients flow right to left)")
    axis.set_ylabel("second moment of the stream, E[x²]" if forward else "second moment of its cotangent, E[g²]")
    if not any(one.x for one in lines):
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center")
    _finish(axis, several)


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


def _draw_channel_means(axis: Axes, several: Sequence[Propagation]) -> None:
    for k, one in enumerate(several):
        shares = [r.forward.squared_channel_mean / (r.forward.second_moment or math.nan) for r in one.stream]
        axis.plot(
            range(1, len(shares) + 1), shares, color=COLOURS[k % len(COLOURS)], linestyle=_DASHES[k % len(_DASHES)],
            linewidth=1.8, label=one.label,
        )  # fmt: skip
    axis.set_ylim(-0.03, 1.03)
    axis.set_title("Mean shift: squared channel means", fontsize="medium")
    axis.set_xlabel(f"{unit(several[0], plural=True)} from the input" if several else "")
    axis.set_ylabel("share of the second moment")
    _finish(axis, several)


def _finish(axis: Axes, several: Sequence[Propagation]) -> None:
    longest = max((len(one.stream) for one in several), default=1)
    axis.set_xlim(1 - 0.02 * longest, longest * 1.02 + (longest == 1))
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(integer=True))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if several:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize="small", handlelength=3)
