"""Along an axis, all that came before: cumulative sums, products, extremes and log-sum-exps.

A cumulative sum is linear. A product of k entries that are independent has the mean m^k and the second moment q^k, one
of the first k and of the first l > k entries q^k m^(l - k). The largest of the first k and of the first l is one entry
with the chance k / l, else that of the first k lies below that of the first l. A sum of exponentials is taken as
log-normal (Fenton 1960): log of it has the mean 2 log m - log(q) / 2 and the covariance log(M / m m').
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import special

from fixup_init.jaxprs import p
from fixup_init.moments.environment import Environment, NoRule, Rule
from fixup_init.moments.lattice import PROFILE, Lattice, joined, parted, settled
from fixup_init.moments.linear import Matrix, linear
from fixup_init.moments.ordering import Rows
from fixup_init.moments.polynomials import kin_of, moments_of
from fixup_init.moments.softmax import softmax_square
from fixup_init.moments.values import Source, Value, sole_source
from fixup_init.program import Op

INDEPENDENT = "approximate: entries whose products are taken as independent of each other"
RUNNING = "approximate: the largest of independent entries, in rows that are independent"
LOGNORMAL = "approximate: sums of exponentials, taken as log-normal"


def _before(n: int, reverse: bool) -> np.ndarray:
    found = np.tril(np.ones((n, n)))
    return found.T if reverse else found


def _axis(op: Op, value: Value) -> tuple[int, int, bool]:
    axis = op.params["axis"]
    n = value.shape[axis]
    if n > PROFILE:
        raise NoRule(f"no rule for `{op.name}` over more than {PROFILE} entries")
    return axis, n, op.params["reverse"]


def cumsum(env: Environment, op: Op, args: list[Value]) -> Value:
    axis, n, reverse = _axis(op, args[0])
    matrix = _before(n, reverse)
    result = linear(env, args[0], axis, Matrix(matrix))
    one, total = sole_source(args[0].terms), sole_source(result.terms)
    if one is not None and one.truth and total is not None:
        before = sole_source(linear(env, args[0], axis, Matrix(matrix - np.eye(n))).terms)
        total.counts = (one, before) if before is not None else None
    return result


def _running(
    env: Environment, value: Value, axis: int, reverse: bool, mean: np.ndarray, same: np.ndarray, pairs: np.ndarray,
    weights: np.ndarray, note: str,
) -> Value:  # fmt: skip
    """A value whose rows are independent.

    Args:
      env: the values of the program.
      value: what it is made of.
      axis: along which.
      reverse: whether it begins at the end.
      mean: of the first k entries, for each k.
      same: the second moment, likewise.
      pairs: the mean product of two different ones.
      weights: E of the squared slope of the k-th (rows) in the i-th entry.
      note: why it is approximate.
    """
    rank, shape, n = value.rank, value.shape, value.shape[axis]
    if reverse:
        mean, same, weights = mean[::-1], same[::-1], weights[::-1, ::-1]
    line = mean.reshape([-1 if a == axis else 1 for a in range(rank)])
    wide = (1,) * rank
    square = np.square(line).reshape(wide + line.shape)
    different = (mean.sum() ** 2 - np.square(mean).sum()) / (n * (n - 1)) if n > 1 else 0.0
    second = np.empty((2,) * rank + line.shape)
    near, far = (
        np.broadcast_to(x, np.take(second, [0], axis).shape).copy() for x in (square, np.full(wide, different))
    )
    near[(0,) * rank], far[(0,) * rank] = same.reshape(line.shape), pairs
    source = Source(shape, line, settled(joined(near, far, axis), shape), None, kin_of(value.terms))

    def back(l: Lattice) -> Lattice:
        near, _ = parted(l, axis)
        k = rank + axis
        if near.shape[k] == 1:
            near = near * weights.sum(0).reshape([-1 if a == k else 1 for a in range(2 * rank)])
        else:
            near = np.moveaxis(np.tensordot(weights.T, near, (1, k)), 0, k)
        rest = tuple(slice(None) if a == axis else 0 for a in range(rank))
        found = np.zeros((2,) * rank + near.shape[rank:])  # other rows: independent slopes of no common sign
        found[rest][0] = np.take(near, 0, axis)[(0,) * (rank - 1)]
        return settled(found, shape)

    return env.made(source, [(value, back)], {note})


def cumprod(env: Environment, op: Op, args: list[Value]) -> Value:
    """Slopes are products of the others: q^(k - 1)."""
    value = args[0]
    axis, n, reverse = _axis(op, value)
    mean, second = moments_of(value)
    m, q = float(mean.mean()), float(second[(0,) * value.rank].mean())
    k = np.arange(1, n + 1)
    low, high = np.minimum(k, k[:, None]), np.abs(k - k[:, None])
    both = q**low * m**high
    pairs = (both.sum() - both.trace()) / max(n * (n - 1), 1)
    weights = np.tril(np.ones((n, n))) * (q ** (k - 1.0))[:, None]
    return _running(env, value, axis, reverse, m**k, q**k, pairs, weights, INDEPENDENT)


def cummax(env: Environment, op: Op, args: list[Value]) -> Value:
    """The slope is 1 in the entry that is largest, any of k."""
    value = args[0]
    axis, n, reverse = _axis(op, value)
    rows = Rows.of(value, axis)
    sign = 1.0 if op.primitive is p.cummax_p else -1.0
    size = 2048
    edges = np.linspace(0, 1, size + 1)
    fine = 1 - (1 - edges) ** 3  # more of the highest levels
    middle = (fine[1:] + fine[:-1]) / 2
    z = sign * special.ndtri(middle)
    deviation = math.sqrt(rows.variance)
    x = rows.mean + deviation * z if rows.quantile is None else rows.quantile.values(rows.mean, deviation, z)
    few = np.unique(np.rint(np.geomspace(1, n, min(n, 48))))
    powers = fine ** few[:, None]
    shares = np.diff(powers, axis=1)  # of the largest of k, level by level
    below = np.cumsum(shares * x, 1) / np.maximum(powers[:, 1:], 1e-300)  # E of it, where it lies below
    mean, square = shares @ x, shares @ np.square(x)
    joint = (shares * x) @ below.T  # [l, k]
    ratio = np.minimum(few / few[:, None], 1.0)  # k / l
    both = ratio * square[:, None] + (1 - ratio) * joint
    each = np.arange(1, n + 1)
    at = np.minimum(np.searchsorted(few, each, "right") - 1, len(few) - 1)
    counts = np.bincount(at, minlength=len(few)).astype(float)
    lower = np.tril(both, -1)
    half = np.tril(np.outer(counts, counts), -1)
    inside = counts * (counts - 1) / 2
    pairs = ((lower * half).sum() + (inside * square).sum()) / max(half.sum() + inside.sum(), 1)
    weights = np.tril(np.ones((n, n))) / each[:, None]
    return _running(
        env, value, axis, reverse, np.interp(each, few, mean), np.interp(each, few, square), pairs, weights, RUNNING
    )


def cumlogsumexp(env: Environment, op: Op, args: list[Value]) -> Value:
    """The slope is a softmax over the first k entries."""
    value = args[0]
    axis, n, reverse = _axis(op, value)
    mean, second = moments_of(value)
    m = float(mean.mean())
    v = max(float(second[(0,) * value.rank].mean()) - m * m, 0.0)
    k = np.arange(1, n + 1)
    mask = tuple(1 if a == axis else 0 for a in range(value.rank))
    common = float(np.clip(float(second[mask].mean()) - m * m, 0.0, v)) if n > 1 else 0.0
    own = min(v - common, 300.0)
    ratio = 1 + math.expm1(own) / k  # q / m^2 of sums of k
    middle = m + np.log(k) + own / 2 - np.log(ratio) / 2
    spread = common + np.log(ratio)
    low = np.minimum(k, k[:, None])
    cross = common + np.log1p(math.expm1(own) * low / (k * k[:, None])) + np.outer(middle, middle)
    pairs = (cross.sum() - cross.trace()) / max(n * (n - 1), 1)
    few = np.unique(np.rint(np.geomspace(1, n, min(n, 24))).astype(int))
    squares = np.interp(k, few, [softmax_square(round(own, 9), int(c)) / c for c in few])
    weights = np.tril(np.ones((n, n))) * squares[:, None]
    return _running(env, value, axis, reverse, middle, spread + middle**2, pairs, weights, LOGNORMAL)


RULES: dict[Any, Rule] = {
    p.cumsum_p: cumsum,
    p.cumprod_p: cumprod,
    p.cummax_p: cummax,
    p.cummin_p: cummax,
    p.cumlogsumexp_p: cumlogsumexp,
}
