"""A conditional: b x + (1 - b) y, with b whether the predicate holds.

The predicate is one for all entries, so that E b_i b_j = p for every pair of them: second moments of the arms are mixed
as they are, and what separates their means is variance. Of more than two arms, arm k is taken where none before was,
with the chance p_k / (p_k + p_k+1 + ...). The predicate is taken as independent of the arms where it is no function of
what they are made of.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fixup_init.moments.combining import combined, complement
from fixup_init.moments.environment import Environment, NoRule, Rule
from fixup_init.moments.lattice import settled
from fixup_init.moments.polynomials import times
from fixup_init.moments.rearranging import broadcasted
from fixup_init.moments.values import Term, Value, function_of, unit, unknown
from fixup_init.moments.whole_numbers import chosen, whole
from fixup_init.program import CHOOSE, Op


def choose(env: Environment, op: Op, args: list[Value]) -> Value:
    """The arm that is taken, or a mixture of all that may be."""
    *arms, index = args
    last = len(arms) - 1
    if (k := index.number) is not None:
        k = env.taken[op.params["switch"], env.at] = min(max(round(k), 0), last)
        return arms[k]
    shape, rank = arms[0].shape, arms[0].rank
    found = whole(index)
    if found is None:
        raise NoRule("no rule for a conditional (`cond`) at such an index")
    shares = np.zeros(len(arms))
    np.add.at(shares, np.clip(found.numbers.astype(int), 0, last), found.shares)
    bad = next((a for a, p in zip(arms, shares, strict=True) if a.unknown and p > 0), None)
    if bad is not None:
        return unknown(shape, bad.unknown)
    taken = [k for k in range(len(arms)) if shares[k] > 0]
    if len(taken) == 2 and set(found.numbers.astype(int)) == {0, 1}:
        yes = broadcasted(env, index, shape, ()).terms  # the predicate itself, which may depend on the arms
        return combined(shape, [(arms[taken[0]], complement(yes, rank)), (arms[taken[1]], yes)])
    parts: list[tuple[Value, list[Term]]] = []
    rest, left = unit(rank), 1.0
    for k in taken[:-1]:
        p = float(shares[k] / left)
        second = np.full((2,) * rank + (1,) * rank, p)
        here = function_of(chosen(shape, np.full((1,) * rank, p), settled(second, shape)))
        parts.append((arms[k], times(rest, here)))
        rest, left = times(rest, complement(here, rank)), left - shares[k]
    return combined(shape, [*parts, (arms[taken[-1]], rest)])


RULES: dict[Any, Rule] = {
    CHOOSE: choose,
}
