"""Gradients of weights: zero ones, and those of another scale."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from fixup_init.propagation import Propagation, Row
from fixup_init.verdicts.dead import dead_units
from fixup_init.verdicts.rows import moment_of, rms_of, row_after, rows_of, zero_head
from fixup_init.verdicts.verdict import Verdict
from fixup_init.verdicts.words import call_of, family_for, layer_count, layers_have, listed

__all__ = ["FAINT", "GRADIENT_SCALE", "gradient_scales", "zero_gradients"]

# Of a layer's gradient norm over its parameter norm against the median layer: no one rate serves both.
GRADIENT_SCALE = 1000.0
# Of the stream's second moment; a branch below it is scaled down on purpose.
FAINT = 1e-3
_WHOLE = ("output", "loss")  # probes whose gradient passes the head


def zero_gradients(propagation: Propagation) -> Iterator[Verdict]:
    """Layers whose gradient is exactly zero: behind a zero branch or head as they should be, or for no such reason.

    A zero head leaves a gradient to nothing but itself in the first update; the second one reaches the stem, shortcuts
    and the last layers of branches; the layers before these move from the third on (Zhang et al. 2019, Sec. 3).
    """
    rows = propagation.rows
    head = zero_head(propagation)
    weights = [k for k in rows_of(propagation, "weight") if k not in head and rows[k].forward is not None]
    zero = [k for k in weights if _gradient(rows[k]) == 0]
    yield from _stuck(propagation, head)
    heads = "head" if len(head) == 1 else "heads"
    named = f"The {heads} ({listed(rows[k].name for k in head)}) {'is' if len(head) == 1 else 'are'}"
    moves = f"the {heads} {'moves' if len(head) == 1 else 'move'} at step 0"
    if head and propagation.probe in _WHOLE:
        if not zero:  # other layers feed the output beside the head
            return
        ends = [k for k in zero if (w := rows[k].weight) is not None and w.parameter_norm == 0]
        first = f", {listed(rows[k].name for k in ends)} among them" if ends else ""
        yield Verdict(
            "zero_gradient", "backward", "note",
            f"{named} zero, so that {layer_count(len(zero))} of "
            f"{len(weights) + len(head)} {'has' if len(zero) == 1 else 'have'} a gradient of exactly zero at step 0. "
            f"This is expected: {moves}, what is outside of branches or at their ends from step 1 on"
            f"{first}, and zero gradient is expected until step 2 for layers behind a zero one.",
            tuple(zero), None, 'To see the gradients behind the head, measure with probe="head".',
        )  # fmt: skip
        return
    dead = {k for v in dead_units(propagation) if v.severity == "error" for k in v.rows}
    branches, inside = bool(propagation.select("branch")), []
    for k in zero:
        end = row_after(propagation, k, "branch", stop="sum") if branches else None
        if end is not None and moment_of(rows[end], "forward") == 0 and not any(k < d < end for d in dead):
            inside.append(k)
    wrong = [k for k in zero if k not in inside]
    if head:
        others = [k for k in weights if _gradient(rows[k]) > 0]
        later = (
            f"; from step 1 on at the latest {layer_count(len(others))} outside of branches or at their ends "
            f"({listed(rows[k].name for k in others)})"
        )
        yield Verdict(
            "zero_gradient", "backward", "note",
            f"{named} zero, so at step 0 the gradient of a loss is zero "
            f"for every layer that reaches the output only through it ({propagation.kind} from the "
            f"{propagation.probe}, it is not). This is expected: {moves}"
            f"{later if others else ''}.",
            tuple(others),
        )  # fmt: skip
    if inside:
        step = 1 if head else 0
        yield Verdict(
            "zero_gradient", "backward", "note",
            f"{layers_have(inside)} a gradient of exactly zero, in zero branches: "
            f"{listed(rows[k].name for k in inside)}. This is expected: what holds a branch at zero moves at step "
            f"{step}, and zero gradient is expected until step {step + 1}, from which on they move.",
            tuple(inside),
        )  # fmt: skip
    if wrong:
        yield Verdict(
            "zero_gradient", "backward", "warning",
            f"{layers_have(wrong)} a gradient of exactly zero and no zero branch or head behind: "
            f"{listed(rows[k].name for k in wrong)}. Such a layer does not learn.",
            tuple(wrong), 0.0,
            "Look behind the first of them for dead units, a saturated softmax, a stop_gradient or a zero kernel.",
        )  # fmt: skip


def _stuck(propagation: Propagation, head: tuple[int, ...]) -> Iterator[Verdict]:
    """Zero layers at the end of a branch, or heads, that no gradient reaches: relu passes none at zero."""
    rows = propagation.rows
    stuck = []
    for k in rows_of(propagation, "weight"):
        weight, cotangent = rows[k].weight, rows[k].backward
        if weight is None or weight.parameter_norm or weight.gradient_norm or cotangent is None:
            continue
        if cotangent.second_moment != 0:
            continue
        end = row_after(propagation, k, "branch", stop="sum")
        between = range(k + 1, end) if end is not None else ()
        others = any((w := rows[j].weight) is not None and not w.parameter_norm for j in between)
        arrives = end is not None and moment_of(rows[end], "backward") > 0 and not others
        if arrives or (k in head and propagation.probe in _WHOLE):
            stuck.append(k)
    if stuck:
        yield Verdict(
            "zero_gradient", "backward", "warning",
            f"{layer_count(len(stuck))} of zeros {'gets' if len(stuck) == 1 else 'get'} no gradient, since what is "
            f"behind passes none at zero, as relu does: {listed(rows[k].name for k in stuck)}. Such a layer never "
            "leaves zero.",
            tuple(stuck), 0.0, f"{call_of('fixup')} starts such layers, and such layers alone, away from zero.",
        )  # fmt: skip


def _gradient(row: Row) -> float:
    """Norm of a layer's gradient; where it is not known, 0 if no cotangent arrives."""
    if row.weight is not None:
        return row.weight.gradient_norm
    return rms_of(row, "backward")


def gradient_scales(propagation: Propagation) -> Iterator[Verdict]:
    """Layers whose gradient over parameter norm is orders away from the others': one rate cannot serve both."""
    branches = bool(propagation.select("branch"))
    ratios = {
        k: r.weight.ratio
        for k, r in enumerate(propagation.rows)
        if r.weight is not None and 0 < r.weight.ratio < math.inf and not (branches and _is_faint(propagation, k))
    }
    if len(ratios) < 3:
        return
    middle = statistics.median(ratios.values())
    far = {k: ratio for k, ratio in ratios.items() if not 1 / GRADIENT_SCALE < ratio / middle < GRADIENT_SCALE}
    if far:
        worst = max(far, key=lambda k: abs(math.log(far[k] / middle)))
        text = (
            f"Gradient norm over parameter norm differs by orders between layers: {middle:.3g} for the median layer, "
            f"{ratios[worst]:.3g} for {propagation.rows[worst].name}. {len(far)} of {len(ratios)} layers are more than "
            f"{GRADIENT_SCALE:g} times away from the median: {listed(propagation.rows[k].name for k in far)}."
        )
        advice = (
            f"{call_of('fixup' if propagation.select('sum') else family_for(propagation))} balances layers at the "
            "start; an optimizer that scales each update (Adam) or rates by layer serve what remains."
        )
        yield Verdict("gradient_scale", "backward", "warning", text, tuple(far), ratios[worst] / middle, advice)


def _is_faint(propagation: Propagation, index: int) -> bool:
    """Whether a layer is in a branch that is meant to start near zero, as with LayerScale (Touvron et al. 2021)."""
    end = row_after(propagation, index, "branch", stop="sum")
    total = row_after(propagation, index, "sum", stop="output")
    if end is None or total is None:
        return False
    rows = propagation.rows
    return moment_of(rows[end], "forward") < FAINT * moment_of(rows[total], "forward")
