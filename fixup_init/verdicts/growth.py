"""Growth and vanishing of the stream, block by block."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from fixup_init.propagation import Direction, Propagation, Row
from fixup_init.verdicts.rows import DIRECTIONS, HEADROOM, LARGEST, moment_of, parts, row_before, rows_of
from fixup_init.verdicts.verdict import Verdict
from fixup_init.verdicts.words import call_of, family_for, listed, name_of

__all__ = ["STEADY", "STRONG", "against_drift", "drifts"]

# By so much a second moment may change, at the ends and as the median over blocks has it. A sum of n branches of equal
# size, as with batch norm (De & Smith 2020, Sec. 2), grows n-fold by nature: half of its blocks grow by less than
# 1 + 2/n, which makes e^2 = 7.4 in all. Growth by a factor a block leaves any bound.
STEADY = 16.0
# From a hundredfold second moment, tenfold magnitude, training at an ordinary rate suffers: a note becomes a warning.
STRONG = 100.0


def drifts(propagation: Propagation) -> Iterator[Verdict]:
    """Growth and vanishing of the stream a block, forward and backward."""
    for direction in DIRECTIONS:
        for rows in parts(propagation, direction):
            yield from _drift(propagation, direction, rows)


def _drift(propagation: Propagation, direction: Direction, rows: tuple[int, ...]) -> Iterator[Verdict]:
    drift = dataclasses.replace(propagation, rows=tuple(propagation.rows[k] for k in sorted(rows))).drift(direction)
    if drift.blocks < 1 or not drift.factor:
        return
    total = drift.last / drift.first
    # Both the ends and most blocks must say so: one wide layer is no trend, nor are resets at stages.
    steady = drift.blocks * math.log(drift.factor)
    size = min(abs(math.log(total)), abs(steady)) if math.log(total) * steady > 0 else 0.0
    if size <= math.log(STEADY):
        return
    grows, strong = total > 1, size >= math.log(STRONG)
    unit = "block" if propagation.select("sum") else "layer"
    what = "signal" if direction == "forward" else "gradient signal"
    a_block = drift.factor if grows else 1 / drift.factor
    does = ("explodes" if grows else "vanishes") if strong else "drifts"
    text = (
        f"The {what} {does}: its second moment {'grows' if grows else 'shrinks'} by "
        f"a factor of {a_block:.2f} a {unit}, from {drift.first:.3g} at {name_of(propagation.rows[rows[0]])} to "
        f"{drift.last:.3g} at {name_of(propagation.rows[rows[-1]])}, over {drift.blocks} {unit}"
        f"{'s' * (drift.blocks != 1)}{_by_stage(propagation, rows, direction)}."
    ) + (_ahead(propagation.rows[rows[-1]], drift.last, drift.factor, drift.blocks, unit) if grows else "")
    yield Verdict(
        "growth" if grows else "vanishing", direction, "warning" if strong else "note", text,
        rows, drift.factor, against_drift(propagation, direction, grows),
    )  # fmt: skip


def _by_stage(propagation: Propagation, rows: Sequence[int], direction: Direction) -> str:
    """Where: the growth within each stage of equal shape, and where the signal has changed tenfold."""
    words = ""
    first = moment_of(propagation.rows[rows[0]], direction)
    tenfold = [k for k in rows if not 0.1 < moment_of(propagation.rows[k], direction) / first < 10]
    if tenfold:
        words += f", tenfold by {name_of(propagation.rows[tenfold[0]])}"
    stages = [tuple(g) for _, g in itertools.groupby(rows, key=lambda k: propagation.rows[k].shape)]
    stages = [s for s in stages if len(s) > 1]
    if propagation.select("sum") and 1 < len(stages) <= 6:
        parts = []
        for stage in stages:
            moments = [moment_of(propagation.rows[k], direction) for k in stage]
            factor = statistics.median(b / a for a, b in itertools.pairwise(moments))
            parts.append(
                f"{factor:.2f} from {name_of(propagation.rows[stage[0]])} to {name_of(propagation.rows[stage[-1]])}"
            )
        words += "; within stages by " + ", ".join(parts)
    return words


def _ahead(row: Row, last: float, factor: float, blocks: int, unit: str) -> str:
    """When the same growth leaves the range of the dtype, if that is within sight."""
    limit = LARGEST.get(row.dtype)
    if limit is None or factor <= 1:
        return ""
    more = math.ceil((2 * math.log(limit / HEADROOM) - math.log(last)) / math.log(factor))
    if not 0 < more <= 100 * blocks:
        return ""
    return f" At this rate it leaves the range of {row.dtype} {more} {unit}{'s' * (more != 1)} further on."


def against_drift(propagation: Propagation, direction: Direction, grows: bool) -> str:
    if not propagation.select("sum"):
        mode = "" if direction == "forward" else "_fan_out"
        layers = listed(r.name for r in propagation.select("weight"))
        return f"{call_of(family_for(propagation) + mode)} keeps the second moment from layer to layer ({layers})."
    branches = [r for r in propagation.select("branch") if r.forward is not None]
    if grows and branches and all(r.forward.second_moment == 0 for r in branches if r.forward):
        layers = listed(r.name for r in propagation.select("weight") if r.weight and r.weight.parameter_norm > 0)
        return f"The branches are zero, so it comes from what lies on the skips: among {layers}."
    if grows:
        ends = [k for b in rows_of(propagation, "branch") if (k := row_before(propagation, b, "weight")) is not None]
        layers = listed(propagation.rows[k].name for k in ends)
        return (
            f"{call_of('fixup')} starts each branch at zero, by its last layer or the scale behind it ({layers}), and "
            "scales the layers before by L^(-1/(2m-2))."
        )
    return (
        "The skips shrink the stream: a constant that multiplies them in the model has to become 1; where they are "
        f"projections, {call_of('he_normal')} keeps their second moment."
    )
