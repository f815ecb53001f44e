"""Sums of values, each times a polynomial of its own: what rules are made of that mix, choose or overwrite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fixup_init.moments.polynomials import DEPENDENT, are_dependent, merged, scaled, times
from fixup_init.moments.values import Node, Term, Value, unit


def combined(shape: tuple[int, ...], parts: Iterable[tuple[Value, Sequence[Term]]]) -> Value:
    """sum_k value_k factor_k, with the slopes of values; factors have none."""
    terms: list[Term] = []
    slopes: dict[Node, list[Term]] = {}
    notes: frozenset[str] = frozenset()
    for value, factor in parts:
        made = times(value.terms, factor)
        terms = merged([*terms, *made])
        notes |= value.notes
        for node, slope in value.slopes.items():
            if part := times(slope, factor):
                slopes[node] = merged([*slopes.get(node, []), *part])
    if are_dependent(terms):
        notes |= {DEPENDENT}
    return Value(shape, terms, slopes, notes=notes)


def complement(terms: Sequence[Term], rank: int) -> list[Term]:
    """1 less a polynomial."""
    return merged([*unit(rank), *scaled(terms, -1.0)])
