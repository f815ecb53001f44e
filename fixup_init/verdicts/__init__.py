"""Propagation -> Verdicts: what the rows say in words, and what would help. One small function for each rule.

A rule reads numbers only. It stays silent where a figure is not known (NaN), and where what looks wrong is meant to be
so: zero branches and a zero head at initialization, and the linear growth of a sum of normalized branches.
"""

from __future__ import annotations

from fixup_init.propagation import Propagation
from fixup_init.verdicts.axes import wide_axis
from fixup_init.verdicts.collapse import mean_shift, rank_collapse
from fixup_init.verdicts.dead import dead_units, saturation, zero_signal
from fixup_init.verdicts.gradients import gradient_scales, zero_gradients
from fixup_init.verdicts.growth import drifts
from fixup_init.verdicts.overflow import near_overflow, overflow
from fixup_init.verdicts.rows import parts
from fixup_init.verdicts.theory import against_prediction
from fixup_init.verdicts.verdict import Kind, Severity, Verdict
from fixup_init.verdicts.words import layers_of, name_of

__all__ = ["Kind", "Severity", "Verdict", "layers_of", "name_of", "parts", "verdicts"]

_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


def verdicts(propagation: Propagation, predicted: Propagation | None = None) -> tuple[Verdict, ...]:
    """What a propagation says: what is wrong, where, by which factor, and what would help.

    Args:
      propagation: what `fi.analyze` or `fi.predict` returned.
      predicted: what `fi.predict` returned for the same model, inputs and scheme; where both are given they are
        compared.

    Returns:
      Verdicts, worst first; none for a network in order.

    Raises:
      ValueError: the rows of `predicted` are not those of `propagation`.

    Example:
      >>> from fixup_init.propagation import Propagation, Row, Statistics
      >>> rows = [Row("sum", f"sum {k + 1}", "", k + 1, (8, 16), "float32", None, Statistics(0.0, 2.0**k, 0.0))
      ...         for k in range(20)]
      >>> [(v.kind, v.severity, v.factor) for v in verdicts(Propagation("he", "net", 20, tuple(rows)))]
      [('growth', 'warning', 2.0)]
    """
    rules = [
        overflow, zero_signal, dead_units, drifts, near_overflow, rank_collapse, mean_shift, saturation,
        zero_gradients, gradient_scales, wide_axis,
    ]  # fmt: skip
    found = [v for rule in rules for v in rule(propagation)]
    if predicted is not None:
        found += against_prediction(propagation, predicted)
    return tuple(sorted(found, key=lambda v: _ORDER[v.severity]))
