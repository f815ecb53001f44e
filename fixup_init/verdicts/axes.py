"""Which axis varies, and the normalization that would serve."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from fixup_init.propagation import Propagation
from fixup_init.verdicts.rows import forward_of, is_known, rows_of
from fixup_init.verdicts.verdict import Verdict

__all__ = ["WIDE", "wide_axis"]

# An axis holds most of the variance.
WIDE = 0.5
# Statistics over an axis that holds most of the variance are nearly those over all axes, and cost no batch.
_AXES = {
    "example": "Only statistics over the batch see it: no normalization within an example stands in for batch norm.",
    "channel": "Statistics over the channels of one example see most of it: layer norm or group norm is the cheap "
    "alternative to batch norm for the scale; what differs between channels for all examples alike stays.",
    "position": "Statistics over the positions of one example see most of it: instance norm is the cheap alternative "
    "to batch norm.",
}  # fmt: skip


def wide_axis(propagation: Propagation) -> Iterator[Verdict]:
    """The axis that holds most of the variance of what normalizations see (or, without them, of the sums)."""
    entering = [k - 1 for k in rows_of(propagation, "norm") if k and propagation.rows[k - 1].kind in ("weight", "sum")]
    rows = [
        k
        for k in entering or rows_of(propagation, "sum")
        if is_known(propagation.rows[k], *(f"{axis}_share" for axis in _AXES))
    ]
    if not rows:
        return
    medians = {
        axis: statistics.median(getattr(forward_of(propagation.rows[k]), f"{axis}_share") for k in rows)
        for axis in _AXES
    }
    widest = max(medians, key=lambda axis: medians[axis])
    if medians[widest] < WIDE:
        return
    shares = ", ".join(f"{share:.0%} across {axis}s" for axis, share in medians.items())
    where = f"what enters the {len(rows)} normalizations" if entering else f"the {len(rows)} residual sums"
    text = f"Most variance of {where} lies across {widest}s (medians: {shares}). {_AXES[widest]}"
    yield Verdict("wide_axis", "forward", "note", text, tuple(rows), medians[widest])
