"""Whole numbers: how likely each of them is, how often two entries are equal, and comparisons with constants.

Of two entries of correlation r we say that they are one draw with the chance r, else two: P(x_i = c, x_j = c') is
r P_c [c = c'] + (1 - r) P_c P_c'. It has the right margins and covariance, is exact for draws that are equal or
independent, and for those without replacement, whose r is -1 / (n - 1).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.distributions import SAMPLES, drawn_at, draws
from fixup_init.moments.environment import Environment, NoRule
from fixup_init.moments.lattice import PROFILE, Lattice, settled
from fixup_init.moments.polynomials import DEPENDENT, kin_of, merged, moments_of, scaled
from fixup_init.moments.random_bits import equally_likely
from fixup_init.moments.values import Source, Term, Value, known, of_source, sole_source, sources_of, unit
from fixup_init.program import Op
from fixup_init.quadrature import Quantile, X

_MOST = 1 << 17  # entries of constant indices that are counted


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """Whole numbers with the chance of each, and for every set of axes how far two entries are one draw."""

    numbers: np.ndarray
    shares: np.ndarray
    rho: Lattice  # without profiles

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """The chance of each of some numbers."""
        place = np.clip(np.searchsorted(self.numbers, numbers), 0, len(self.numbers) - 1)
        return np.where(self.numbers[place] == numbers, self.shares[place], 0.0)

    def up_to(self, n: int) -> np.ndarray:
        """The chances of 0 to n - 1."""
        return self.at(np.arange(n))

    def both(self, shares: np.ndarray) -> Lattice:
        """P(x_i = x_j = c) for every set of axes in which i and j differ, and every chance P_c (the last axis)."""
        r = self.rho.reshape(*self.rho.shape[: self.rho.ndim // 2], 1)
        return np.maximum(r * shares + (1 - r) * shares**2, 0.0)


def whole(value: Value) -> Whole | None:
    """What is known of whole numbers: from constants, equally likely ones, or the distribution of the value."""
    rank = value.rank
    if value.unknown:
        return None
    if value.array is not None and value.array.dtype.kind in "iub":
        return _counted(value.array)
    if value.is_constant:
        c = value.number
        return None if c is None else Whole(np.array([round(c)]), np.ones(1), np.ones((2,) * rank + (1,) * rank))
    mean, second = moments_of(value)
    flat = tuple(range(rank, 2 * rank))
    m, found = float(mean.mean()), second.mean(flat, keepdims=True)
    v = float(found[(0,) * rank].ravel()[0]) - m * m
    source = sole_source(value.terms)
    if source is not None and value.rows and source.quantile is Quantile.uniform():
        numbers, shares = np.arange(value.rows), np.full(value.rows, 1 / value.rows)
    else:
        sources = sources_of(value.terms)
        x = drawn_at(value.terms, draws(sources, anywhere=True))
        if not np.isfinite(x).all():
            return None
        numbers, counts = np.unique(np.rint(x), return_counts=True)
        shares = counts / SAMPLES
    lowest = -1 / (len(numbers) - 1) if len(numbers) > 1 else 0.0
    rho = np.array(np.clip((found - m * m) / v, lowest, 1.0) if v > 0 else np.ones_like(found))
    rho[(0,) * rank] = 1.0
    return Whole(numbers, shares, rho)


def _counted(array: np.ndarray) -> Whole:
    rank = array.ndim
    flat = array.ravel()[:_MOST].astype(np.int64)
    numbers, counts = np.unique(flat, return_counts=True)
    n = flat.size
    shares = counts / n
    alike = float((shares**2).sum())
    again = float((counts * (counts - 1)).sum()) / (n * (n - 1)) if n > 1 else 1.0
    rho = np.full((2,) * rank + (1,) * rank, (again - alike) / (1 - alike) if alike < 1 else 1.0)
    same = tuple(0 if m > 1 else slice(None) for m in array.shape)
    rho[same] = 1.0
    return Whole(numbers, shares, rho)


def is_whole(env: Environment, number: int, value: Value) -> bool:
    """Whether a value holds random whole numbers."""
    integer = jnp.issubdtype(env.program.dtype(number), jnp.integer)
    return bool(integer) and not value.is_constant and value.array is None and not value.bits


def chosen(shape: tuple[int, ...], mean: np.ndarray, second: Lattice, kin: frozenset[int] = frozenset()) -> Source:
    """Truth values: true with a chance, and both true with another."""
    return Source(shape, mean, settled(second, shape), Quantile.of_chance(float(mean.mean())), kin, truth=True)


def unchanged(op: Op, args: list[Value]) -> Value | None:
    """Equally likely whole numbers that a bound does not reach, as clipped indices are."""
    if op.primitive is p.rem_p and args[0].rows and args[1].number == args[0].rows:
        return equally_likely(args[0].shape, args[0].rows)  # a sum of such numbers, as `jax.random.randint` makes it
    if op.primitive is p.clamp_p:
        low, value, high = args
        bounds = low.number, high.number
    elif op.primitive is p.max_p:
        value, bounds = next((a, (args[1 - k].number, math.inf)) for k, a in enumerate(args) if a.rows or k)
    elif op.primitive is p.min_p:
        value, bounds = next((a, (-math.inf, args[1 - k].number)) for k, a in enumerate(args) if a.rows or k)
    else:
        return None
    low, high = bounds
    if not value.rows or low is None or high is None or low > 0 or high < value.rows - 1:
        return None
    return dataclasses.replace(value, array=None)


def compared(env: Environment, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value | None:
    """Random whole numbers beside constants or beside each other; None where the general rule shall do it."""
    whole_ones = [is_whole(env, v, a) for v, a in zip(op.inputs, args, strict=True)]
    if not any(whole_ones):
        return None
    if op.primitive in (p.lt_p, p.le_p, p.gt_p, p.ge_p):
        return _ordered(op, args, shape, whole_ones)
    if op.primitive not in (p.eq_p, p.ne_p):
        return None
    equal = _both(args, shape) if all(whole_ones) else _matched(args[whole_ones.index(True)], args, whole_ones, shape)
    if op.primitive is p.ne_p:
        return Value(shape, merged([*unit(len(shape)), *scaled(equal.terms, -1.0)]), notes=equal.notes)
    return equal


def _ordered(op: Op, args: list[Value], shape: tuple[int, ...], whole_ones: list[bool]) -> Value | None:
    """An order that is certain: indices are not below 0."""
    k = whole_ones.index(True)
    c = args[1 - k].number
    if c is None or all(whole_ones) or (found := whole(args[k])) is None:
        return None
    primitive: Any = op.primitive
    compare = {p.lt_p: np.less, p.le_p: np.less_equal, p.gt_p: np.greater, p.ge_p: np.greater_equal}[primitive]
    true = compare(found.numbers, c) if k == 0 else compare(c, found.numbers)
    if true.all() or not true.any():
        return known(shape, np.full((1,) * len(shape), bool(true.all())))
    return None


def _matched(value: Value, args: list[Value], whole_ones: list[bool], shape: tuple[int, ...]) -> Value:
    """[x = c] for a number c or one for each position of an axis, as a one-hot vector has it."""
    other = args[1 - whole_ones.index(True)]
    rank = len(shape)
    found = whole(value)
    array, c = other.array, other.number
    if array is None and c is not None:
        array = np.full((1,) * rank, c)
    if found is None or array is None:
        raise NoRule("no rule for a comparison with such whole numbers")
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    wide = [a for a in range(rank) if array.shape[a] > 1]
    if len(wide) > 1 or len(np.unique(array)) < array.size:
        raise NoRule("no rule for a comparison of whole numbers with an array that repeats")
    shares = found.at(array.ravel().astype(np.int64))
    rho = found.rho
    k = len(shares)
    near = np.maximum(rho * shares.mean() + (1 - rho) * (shares**2).mean(), 0.0)
    mean = np.full((1,) * rank, shares.mean())
    if wide:
        (a,) = wide
        if k <= PROFILE and np.ptp(shares) > 0:
            line = shares.reshape([-1 if b == a else 1 for b in range(rank)])
            mean = line
            near = np.maximum(rho * line + (1 - rho) * line**2, 0.0)
        apart = (shares.sum() ** 2 - (shares**2).sum()) / (k * (k - 1))
        far = np.broadcast_to((1 - rho) * apart, near.shape).copy()
        second = near.copy()
        second[(slice(None),) * a + (1,)] = far[(slice(None),) * a + (1,)]
    else:
        second = near
    source = chosen(shape, mean, second, kin_of(value.terms))
    index = sole_source(value.terms)
    if index is not None and index.picks is not None and wide == [index.picks[2]] and index.picks[0].shape == shape:
        source.picks = index.picks
    result = of_source(source)
    result.notes = value.notes
    return result


def with_picked(terms: list[Term]) -> list[Term]:
    """Products of which the factors say more together than apart.

    A value times the one-hot vector of its largest entry is that vector times the largest, which is independent; a
    truth value times the number of those up to it is that value times one more than the number of those before.
    """
    found = []
    for c, factors in terms:
        parts = [(c, factors)]
        for s in factors:
            if s.picks is not None and s.picks[0].shape == s.shape and factors.get(s.picks[0]) is X:
                parts = [(c, {k: f for k, f in factors.items() if k is not s.picks[0]} | {s.picks[1]: X})]
                break
            if s.counts is not None and factors[s] is X and factors.get(s.counts[0]) is X:
                rest = {k: f for k, f in factors.items() if k is not s}
                parts = [(c, rest), (c, rest | {s.counts[1]: X})]
                break
        found += parts
    return found


def _both(args: list[Value], shape: tuple[int, ...]) -> Value:
    """[x = y]: with P, Q and the two correlations r, t, both at i and at j are equal with the chance
    r t sum P Q + r (1 - t) sum P Q^2 + (1 - r) t sum P^2 Q + (1 - r) (1 - t) (sum P Q)^2."""
    left, right = (whole(a) for a in args)
    if left is None or right is None:
        raise NoRule("no rule for a comparison of such whole numbers")
    a = left.shares
    b = right.at(left.numbers)
    r, t = left.rho, right.rho
    once = float((a * b).sum())
    second = (
        r * t * once + r * (1 - t) * (a * b * b).sum() + (1 - r) * t * (a * a * b).sum() + (1 - r) * (1 - t) * once**2
    )
    kin = kin_of(args[0].terms) | kin_of(args[1].terms)
    result = of_source(chosen(shape, np.full((1,) * len(shape), once), np.maximum(second, 0.0), kin))
    shared = kin_of(args[0].terms) & kin_of(args[1].terms)
    result.notes = args[0].notes | args[1].notes | ({DEPENDENT} if shared else set())
    return result
