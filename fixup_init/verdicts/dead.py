"""Signals and nonlinearities that are zero, or at their limits."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fixup_init.propagation import Propagation, Row
from fixup_init.verdicts.rows import DIRECTIONS, in_order, moment_of, row_before, rows_of, zero_head
from fixup_init.verdicts.verdict import Verdict
from fixup_init.verdicts.words import call_of, family_for, listed, name_of, place_of

__all__ = ["DEAD", "SATURATED", "SATURATED_STRONG", "dead_units", "saturation", "zero_signal"]

# relu passes half of its inputs at initialization; layers of 16 units and up stray by less than a fifth.
DEAD = 0.95
# tanh within 1 % of its range from a limit has at most a twenty-fifth of the derivative in its middle.
SATURATED, SATURATED_STRONG = 0.25, 0.5


def zero_signal(propagation: Propagation) -> Iterator[Verdict]:
    """A stream that is exactly zero from some row on, unless a zero head makes it so."""
    head = set(zero_head(propagation))
    stream = {id(r) for r in propagation.stream}
    for direction in DIRECTIONS:
        order = [
            k for k in in_order(propagation, direction)
            if id(propagation.rows[k]) in stream and not math.isnan(moment_of(propagation.rows[k], direction))
        ]  # fmt: skip
        last = max((i for i, k in enumerate(order) if moment_of(propagation.rows[k], direction) != 0), default=-1)
        zero = order[last + 1 :]
        if not zero or (head and (direction == "backward" or set(zero) <= head)):
            continue
        what, where = "signal" if direction == "forward" else "gradient signal", name_of(propagation.rows[zero[0]])
        yield Verdict(
            "zero_signal", direction, "error",
            f"The {what} is exactly zero from {where}, block {propagation.rows[zero[0]].block}, on to the "
            f"{'output' if direction == 'forward' else 'input'}: {len(zero)} of {len(order)} values of the stream.",
            tuple(zero), 0.0,
            f"Look at {where} and the layers around it for zero kernels or dead units; "
            f"{call_of(family_for(propagation))} draws every kernel.",
        )  # fmt: skip


def dead_units(propagation: Propagation) -> Iterator[Verdict]:
    """Nonlinearities that are off for nearly all units and data, though something enters them."""
    off = {k: _off(propagation, k) for k in rows_of(propagation, "nonlinearity") if _learns(propagation.rows[k])}
    least = _least(propagation, off)
    dead = [k for k, share in off.items() if share >= DEAD and least[k] >= DEAD]
    if not dead:
        return
    shares = [off[k] for k in dead]
    whole = [k for k in dead if off[k] == 1]
    first = whole[0] if whole else dead[0]
    feeds = [f for k in dead if (f := row_before(propagation, k, "weight")) is not None]
    if whole:
        text = (
            f"{place_of(propagation, first)}, is dead: its output is zero for all units and all data. {len(whole)} of "
            f"{len(off)} nonlinearities are."
        )
    else:
        text = (
            f"{len(dead)} of {len(off)} nonlinearities are nearly dead: up to {max(shares):.1%} of their outputs are "
            f"zero, first at {place_of(propagation, first)}."
        )
    advice = (
        f"Biases that are far below zero or kernels of one sign do this; {call_of(family_for(propagation))} sets "
        f"biases to 0 and draws kernels of mean 0: {listed(propagation.rows[f].name for f in feeds)}."
    )
    yield Verdict("dead", "forward", "error" if whole else "warning", text, tuple(dead), max(shares), advice)


def _learns(row: Row) -> bool:
    """Whether a weight layer leads to a nonlinearity: what is off for data or constants alone is so by design."""
    return row.place is None or row.place.fed


def _least(propagation: Propagation, off: dict[int, float]) -> dict[int, float]:
    """The least share that is off over the passes of a scan with the same parameters, of which one that is on is enough
    to learn: the state of an online softmax starts at -inf, which makes exp(old - new) zero in the first pass."""
    least: dict[int, float] = {}
    unit: dict[int, int] = {}
    for k, share in off.items():
        place = propagation.rows[k].place
        unit[k] = -1 - k if place is None else place.unit
        least[unit[k]] = min(least.get(unit[k], 1.0), 1.0 if math.isnan(share) else share)
    return {k: least[unit[k]] for k in off}


def _off(propagation: Propagation, index: int) -> float:
    """Share of a nonlinearity's outputs that are zero, of those whose input is not (padded channels, zero branches)."""
    s, source = (
        propagation.rows[index].forward,
        row_before(propagation, index, "weight", "norm", "sum", "branch", "input"),
    )
    before = propagation.rows[source].forward if source is not None else None
    silent = before.zeros if before is not None and before.zeros == before.zeros else 0.0
    if s is None or silent == 1 or (before is not None and before.second_moment == 0):
        return math.nan
    return (s.zeros - silent) / (1 - silent)


def saturation(propagation: Propagation) -> Iterator[Verdict]:
    """Bounded nonlinearities at their limits; zeros (of relu6) count as off, not as saturated."""
    shares: dict[int, float] = {}
    for k in rows_of(propagation, "nonlinearity"):
        s = propagation.rows[k].forward
        if s is not None and s.saturated == s.saturated:
            shares[k] = s.saturated - (s.zeros if s.zeros == s.zeros else 0.0)
    rows = tuple(k for k, share in shares.items() if share >= SATURATED)
    if not rows:
        return
    worst = max(rows, key=lambda k: shares[k])
    feeds = [f for k in rows if (f := row_before(propagation, k, "weight")) is not None]
    text = (
        f"{len(rows)} of {len(shares)} bounded nonlinearities are saturated: {shares[worst]:.1%} of the outputs of "
        f"{place_of(propagation, worst)}, lie within 1 % of a limit, where the derivative is near zero. The first is "
        f"{place_of(propagation, rows[0])}."
    )
    advice = (
        f"{call_of('lecun_normal')} gives pre-activations a second moment near 1: "
        f"{listed(propagation.rows[f].name for f in feeds)}."
    )
    severity = "warning" if shares[worst] >= SATURATED_STRONG else "note"
    yield Verdict("saturation", "forward", severity, text, rows, shares[worst], advice)
