"""Arithmetic and expectations of polynomials in sources.

Different sources count as independent, but for one that is the sum of another over some axes: their joint moments are
those of the sum. Where sources have relatives in common, what is made of them says that it is approximate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fixup_init import quadrature
from fixup_init.moments.expectations import expected, pair
from fixup_init.moments.lattice import Lattice, Profile, crossed, kept, same, settled
from fixup_init.moments.values import Factors, Source, Term, Use, Value
from fixup_init.quadrature import X

ALIKE = "approximate: a value and another one that was made of it without weights are taken as independent"
DEPENDENT = "approximate: values that depend on each other are taken as independent"


def _key(factors: Factors) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((s.number, f.key) for s, f in factors.items()))


def merged(terms: Iterable[Term]) -> list[Term]:
    """Terms of the same factors as one."""
    found: dict[Any, Term] = {}
    for c, factors in terms:
        k = _key(factors)
        found[k] = (found[k][0] + c, factors) if k in found else (c, factors)
    return [(c, f) for c, f in found.values() if c.any()]


def times(left: Sequence[Term], right: Sequence[Term]) -> list[Term]:
    """The product of two polynomials."""
    made = []
    for (c, f), (d, g) in itertools.product(left, right):
        both, scale = dict(f), c * d
        for s, h in g.items():
            if s not in both:
                both[s] = h
            elif not (s.truth and both[s] is X and h is X):
                both[s] = quadrature.product(both[s], h)
        made.append((scale, both))
    return merged(made)


def scaled(terms: Iterable[Term], c: float | Profile) -> list[Term]:
    """A polynomial times a number at each position."""
    return merged((d * c, f) for d, f in terms)


def cross_of(a: Source, b: Source) -> Lattice | None:
    """E a_i b_j where b is the sum of a over some axes, in the shape of a, or a normalized."""
    found = _sum_of(a, b)
    return found if found is not None else _normalized(a, b)


def _normalized(a: Source, b: Source) -> Lattice | None:
    for whole, part in ((a, b), (b, a)):
        if part.alike is not None and part.alike[0] is whole:
            return part.alike[1]
    return None


def _sum_of(a: Source, b: Source) -> Lattice | None:
    for whole, part in ((a, b), (b, a)):
        link = part.sum_of
        if link is not None and link[0] is whole and whole.shape == part.shape:
            axes, where = link[1], link[2]
            if all(w == k or (w < 0 and k in axes) for k, w in enumerate(where)):
                return kept(whole.second, axes, whole.shape)
    return None


def mean_of(terms: Sequence[Term], rank: int) -> Profile:
    """E of a polynomial."""
    found = np.zeros((1,) * rank)
    for c, factors in terms:
        linked = None
        if len(factors) == 2 and all(f is X for f in factors.values()):
            linked = cross_of(*factors)
        if linked is not None:
            found = found + c * same(linked, rank)
            continue
        for s, f in factors.items():
            c = c * expected(s, f)
        found = found + c
    return found


def second_of(terms: Sequence[Term], rank: int, sizes: Sequence[int]) -> Lattice:
    """E of the product of a polynomial at i and at j."""
    found: Lattice = np.zeros((2,) * rank + (1,) * rank)
    for k, (c, f) in enumerate(terms):
        for d, g in terms[: k + 1]:
            linked = None
            if f is not g and len(f) == len(g) == 1 and all(h is X for h in (*f.values(), *g.values())):
                linked = cross_of(*f, *g)
            left, right = c, d
            both = []
            for s in {**f, **g} if linked is None else ():
                if s in f and s in g:
                    both.append(pair(s, f[s], g[s]))
                elif s in f:
                    left = left * expected(s, f[s])
                else:
                    right = right * expected(s, g[s])
            part = crossed(left, right)
            for factor in (*both, *(() if linked is None else (linked,))):
                part = part * factor
            found = found + (part if f is g else 2 * part)
    return settled(found, sizes)


def moments_of(value: Value) -> tuple[Profile, Lattice]:
    """The mean and the lattice of a value."""
    return mean_of(value.terms, value.rank), second_of(value.terms, value.rank, value.shape)


def is_gaussian(terms: Sequence[Term]) -> bool:
    """Whether a polynomial is a sum of Gaussian sources, each times a number."""
    return all(not f or (len(f) == 1 and all(h is X and s.quantile is None for s, h in f.items())) for _, f in terms)


def is_linear(terms: Sequence[Term]) -> bool:
    """Whether a polynomial is a sum of sources, each times a number."""
    return bool(terms) and all(len(f) == 1 and all(h is X for h in f.values()) for _, f in terms)


def kin_of(terms: Iterable[Term]) -> frozenset[int]:
    """The numbers of all sources that a polynomial is made of."""
    return frozenset().union(*(s.relatives for _, f in terms for s in f))


def are_dependent(terms: Sequence[Term]) -> bool:
    """Whether sources that share what they are made of meet in a polynomial."""
    sources = list({s for _, f in terms for s in f})
    straight = all(len(f) <= 1 and all(h is X for h in f.values()) for _, f in terms)
    for k, a in enumerate(sources):
        for b in sources[:k]:
            if a.relatives & b.relatives and (cross_of(a, b) if straight else _sum_of(a, b)) is None:
                return True
    return False


def resemble(left: Sequence[Term], right: Sequence[Term]) -> bool:
    """Whether a sum of two polynomials has terms that are copies or sums of one source, in ways not accounted for."""
    for (_, f), (_, g) in itertools.product(left, right):
        for a, b in itertools.product(f, g):
            if a is b or not a.likes & b.likes:
                continue
            straight = len(f) == len(g) == 1 and f[a] is X and g[b] is X
            if not straight or cross_of(a, b) is None:
                return True
    return False


def likes_of(terms: Iterable[Term]) -> frozenset[int]:
    """What a polynomial is a sum of."""
    return frozenset[int]().union(*(s.likes for _, f in terms if len(f) == 1 for s, h in f.items() if h is X))


def uses_of(terms: Iterable[Term]) -> frozenset[Use]:
    """Uses of random weights that a polynomial is made of."""
    return frozenset[Use]().union(*(s.uses for _, f in terms for s in f))


def used_twice(left: Sequence[Term], right: Sequence[Term]) -> frozenset[int]:
    """Random weights that two polynomials were made by in different operations."""
    one, other = uses_of(left), uses_of(right)
    return frozenset(w for w, k in one for v, l in other if w == v and k != l)
