"""Values beyond the range of their dtype, or close to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from fixup_init.propagation import Propagation
from fixup_init.verdicts.growth import against_drift
from fixup_init.verdicts.rows import DIRECTIONS, HEADROOM, LARGEST, in_order, overflows, rms_of, statistics_of
from fixup_init.verdicts.verdict import Verdict
from fixup_init.verdicts.words import name_of, place_of

__all__ = ["near_overflow", "overflow"]


def overflow(propagation: Propagation) -> Iterator[Verdict]:
    """The first tap in each direction that is not finite, or beyond its dtype in a prediction."""
    for direction in DIRECTIONS:
        order = in_order(propagation, direction)
        bad = [k for k in order if overflows(propagation.rows[k], direction)]
        if not bad:
            continue
        row = propagation.rows[bad[0]]
        s = statistics_of(row, direction)
        assert s is not None
        before = [r for k in order[: order.index(bad[0])] if (r := propagation.rows[k]) and rms_of(r, direction) > 0]
        largest = max(before, key=functools.partial(rms_of, direction=direction), default=None)
        what = "signal" if direction == "forward" else "gradient signal"
        lost = "less than 1%" if s.finite > 0.99 else f"{1 - s.finite:.0%}"
        held = f"{lost} of its values are not finite" if s.finite < 1 else f"rms {rms_of(row, direction):.3g}"
        text = f"The {what} overflows {row.dtype} first at {place_of(propagation, bad[0])}: {held}"
        limit = LARGEST.get(row.dtype, math.inf)
        if largest is not None:
            rms = rms_of(largest, direction)
            text += f"; before it {name_of(largest)} has rms {rms:.3g}"
            if s.finite < 1 and rms**2 < limit**0.5:
                text += ", far from the limit: rather an undefined operation (0/0, log or root) than growth"
        text += f". {len(bad)} of {len(order)} taps are concerned."
        help_ = against_drift(propagation, direction, True)
        if row.dtype in ("float16", "float8_e4m3fn", "float8_e5m2"):
            help_ += f" bfloat16 has the range of float32; {row.dtype} ends at {limit:g}."
        yield Verdict("overflow", direction, "error", text, tuple(bad), None, help_)


def near_overflow(propagation: Propagation) -> Iterator[Verdict]:
    """Values whose tail reaches the limit of the dtype."""
    near = [
        k for k, r in enumerate(propagation.rows)
        if not overflows(r, "forward") and rms_of(r, "forward") * HEADROOM > LARGEST.get(r.dtype, math.inf)
    ]  # fmt: skip
    if near:
        row = propagation.rows[near[0]]
        limit = LARGEST[row.dtype]
        rms = rms_of(row, "forward")
        text = (
            f"The signal comes close to the limit of {row.dtype}, {limit:g}, first at {place_of(propagation, near[0])}"
            f": rms {rms:.3g}, so that values {limit / rms:.2g} standard deviations out overflow. {len(near)} of "
            f"{len(propagation)} taps are concerned."
        )
        advice = f"Compute {name_of(row)} in bfloat16 or float32. {against_drift(propagation, 'forward', True)}"
        yield Verdict("near_overflow", "forward", "warning", text, tuple(near), limit / rms, advice)
