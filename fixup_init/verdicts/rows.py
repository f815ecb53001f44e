"""What rules read off the rows."""

from __future__ import annotations

import itertools
import math

from fixup_init.propagation import Direction, Propagation, Row, Statistics

__all__ = [
    "DIRECTIONS",
    "HEADROOM",
    "LARGEST",
    "branch_ends",
    "forward_of",
    "in_order",
    "is_known",
    "mean_share_of",
    "moment_of",
    "overflows",
    "parts",
    "passed",
    "rms_of",
    "row_after",
    "row_before",
    "rows_of",
    "statistics_of",
    "zero_head",
]

# Largest finite value by dtype.
LARGEST = {
    "float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38, "float64": 1.7976e308, "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
}  # fmt: skip
# Half-precision values have a tail: of a million normal ones the largest is 5 standard deviations out.
HEADROOM = 8.0
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def statistics_of(row: Row, direction: Direction) -> Statistics | None:
    return row.forward if direction == "forward" else row.backward


def forward_of(row: Row) -> Statistics:
    assert row.forward is not None
    return row.forward


def moment_of(row: Row, direction: Direction) -> float:
    s = statistics_of(row, direction)
    return math.nan if s is None else s.second_moment


def rms_of(row: Row, direction: Direction) -> float:
    moment = moment_of(row, direction)
    return math.sqrt(moment) if moment >= 0 else math.nan


def mean_share_of(s: Statistics) -> float:
    return s.squared_channel_mean / s.second_moment if s.second_moment > 0 else math.nan


def overflows(row: Row, direction: Direction) -> bool:
    s = statistics_of(row, direction)
    return s is not None and (s.finite < 1 or rms_of(row, direction) > LARGEST.get(row.dtype, math.inf))


def is_known(row: Row, *figures: str) -> bool:
    return row.forward is not None and not any(math.isnan(getattr(row.forward, name)) for name in figures)


def in_order(propagation: Propagation, direction: Direction) -> list[int]:
    """All rows in the direction of the signal."""
    order = list(range(len(propagation)))
    return order if direction == "forward" else order[::-1]


def passed(propagation: Propagation, direction: Direction) -> tuple[int, ...]:
    """The rows of the stream that are not zero, in the direction of the signal, up to where it is no longer finite."""
    stream = {id(r) for r in propagation.stream}
    order = [k for k in in_order(propagation, direction) if id(propagation.rows[k]) in stream]
    finite = itertools.takewhile(lambda k: not overflows(propagation.rows[k], direction), order)
    return tuple(k for k in finite if 0 < moment_of(propagation.rows[k], direction) < math.inf)


def parts(propagation: Propagation, direction: Direction) -> list[tuple[int, ...]]:
    """What `passed` gives, by the parts of the stream whose rows follow each other."""
    part_of = {id(r): k for k, part in enumerate(propagation.streams) for r in part}
    found: dict[int, list[int]] = {}
    for k in passed(propagation, direction):
        found.setdefault(part_of[id(propagation.rows[k])], []).append(k)
    return [tuple(rows) for rows in found.values()]


def rows_of(propagation: Propagation, *kinds: str) -> list[int]:
    return [k for k, r in enumerate(propagation.rows) if r.kind in kinds]


def row_before(propagation: Propagation, index: int, *kinds: str) -> int | None:
    """The nearest row before one, of these kinds."""
    return next((k for k in range(index - 1, -1, -1) if propagation.rows[k].kind in kinds), None)


def row_after(propagation: Propagation, index: int, kind: str, stop: str) -> int | None:
    """The nearest row after one, of this kind, but not beyond one of kind `stop`."""
    for k in range(index + 1, len(propagation)):
        if propagation.rows[k].kind == kind:
            return k
        if propagation.rows[k].kind == stop:
            return None
    return None


def zero_head(propagation: Propagation) -> tuple[int, ...]:
    """Zero layers behind the last sum (or, without sums, those that no other follows), which hold an output at zero."""
    sums, weights = rows_of(propagation, "sum"), rows_of(propagation, "weight")
    heads = [k for k in weights if k > sums[-1]] if sums else _last_layers(propagation, weights)
    before = [k for k in sums or weights if k not in heads][-1:]
    fed = any(moment_of(propagation.rows[k], "forward") > 0 for k in before)
    return tuple(k for k in heads if _gives_zero(propagation.rows[k], fed))


def _last_layers(propagation: Propagation, weights: list[int]) -> list[int]:
    """Weight layers that no other follows; where that is not known, the last one."""
    places = {k: propagation.rows[k].place for k in weights}
    last = [k for k, place in places.items() if place is not None and place.last]
    return last or weights[-1:]


def _gives_zero(row: Row, fed: bool) -> bool:
    """Whether a layer is zero; where its norm is not known (behind the probe, or predicted), whether its output is."""
    if row.weight is not None:
        return row.weight.parameter_norm == 0
    return fed and moment_of(row, "forward") == 0


def branch_ends(propagation: Propagation) -> list[str]:
    """The last layer of each branch."""
    ends = (row_before(propagation, k, "weight") for k in rows_of(propagation, "branch"))
    return [propagation.rows[k].name for k in ends if k is not None]
