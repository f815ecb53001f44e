"""Measured beside predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fixup_init.propagation import Direction, Propagation, Row
from fixup_init.verdicts.rows import DIRECTIONS, in_order, moment_of, passed, statistics_of
from fixup_init.verdicts.verdict import Verdict
from fixup_init.verdicts.words import as_factor, place_of

__all__ = ["PREDICTED", "PREDICTED_SHARE", "PREDICTED_STRONG", "STRAYS", "against_prediction"]

# A gap that is worth telling; and by how many standard deviations it has to exceed what one network of finite width may
# stray. log q of a narrow network has the mean -s^2 / 2 (Hanin & Nica 2018), which counts besides.
PREDICTED, PREDICTED_STRONG = 1.5, 4.0
STRAYS = 3.0
# Of the logarithm of the whole growth: fifty blocks that triple the signal, each 3 % off, end 4 times apart, though
# theory has the growth right.
PREDICTED_SHARE = 0.1


def against_prediction(propagation: Propagation, predicted: Propagation) -> Iterator[Verdict]:
    """Measured second moments far from the predicted ones, and the row in which the two part."""
    theirs = [(r.kind, r.name) for r in predicted.rows]
    if [(r.kind, r.name) for r in propagation.rows] != theirs:
        raise ValueError(
            f"predicted={predicted.label!r} has {len(predicted)} rows and propagation={propagation.label!r} "
            f"{len(propagation)}, or others: expected one for one. Give fi.predict the model, inputs and "
            "normalization= of fi.analyze."
        )
    for direction in DIRECTIONS:
        ratios, allowed = dict[int, float](), dict[int, float]()
        for k in in_order(propagation, direction):
            mine, other = moment_of(propagation.rows[k], direction), moment_of(predicted.rows[k], direction)
            if math.isfinite(mine) and math.isfinite(other) and (mine or other):
                ratios[k] = mine / other if other else math.inf
                allowed[k] = _strays(predicted.rows[k], direction)
        far = [k for k, ratio in ratios.items() if not 1 / allowed[k] <= ratio <= allowed[k]]
        if not far:
            continue
        beyond = {k: abs(math.log(ratios[k])) if 0 < ratios[k] < math.inf else math.inf for k in far}
        worst = max(far, key=lambda k: beyond[k] - math.log(allowed[k]))
        first, what = far[0], "second moment" if direction == "forward" else "second moment of the gradient"
        size = beyond[worst]
        text = (
            f"The measured {what} parts from the predicted one at {place_of(propagation, first)}: "
            f"{moment_of(propagation.rows[first], direction):.3g} measured, "
            f"{moment_of(predicted.rows[first], direction):.3g} predicted. {len(far)} of {len(ratios)} rows are "
            f"further apart than the widths of the layers on the way explain, which is {allowed[first]:.3g} times "
            f"there; most {place_of(propagation, worst)}, by {as_factor(ratios[worst])}, where "
            f"they explain {allowed[worst]:.3g}."
        )
        advice = (
            "Look whether parameters are those of the scheme that was predicted, and measure with other keys. Where it "
            "stays, what the prediction takes as independent at that row is not, and the measurement is right."
        )
        stream = [moment_of(propagation.rows[k], direction) for k in passed(propagation, direction)]
        grown = abs(math.log(max(stream) / min(stream))) if stream else 0.0
        strong = size > max(math.log(PREDICTED_STRONG * allowed[worst] / PREDICTED), PREDICTED_SHARE * grown)
        severity = "warning" if strong else "note"
        yield Verdict("prediction", direction, severity, text, tuple(far), ratios[worst], advice)


def _strays(row: Row, direction: Direction) -> float:
    """How many times one network of finite width may lie above or below a predicted second moment."""
    s = statistics_of(row, direction)
    spread = s.spread if s is not None and s.spread == s.spread else 0.0
    return max(PREDICTED, math.exp(min(STRAYS * spread + spread**2 / 2, 700.0)))
