"""Sorting and choosing the largest: sort, top_k, argmax, and the indices that these give.

With entries along an axis that are equally correlated, x_i = t(sqrt(r) z + sqrt(1 - r) g_i), the k-th of n is
t(sqrt(r) z + sqrt(1 - r) g_(k)), and the level of g_(k) is a Beta(k, n - k + 1) variable. Behind the threshold that
follows them the k largest are independent draws from the tail, which gives the mean product of two of them; of all n it
is that before sorting. Two rows have in common their offset o = M[s, different column] - m^2, and where their own parts
have the correlation w, that share of the rest; so what sums of rows have in common is kept exactly.

A cotangent goes back to where an entry came from. Two rows that are independent come from different columns with the
chance 1 - 1/n; with u that of one order for both rows, less by accident,
n^2 G[same] = u n k c[same] + (1 - u) (k c[same] + k (k - 1) c[different]), and sums are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from scipy import special

from fixup_init import quadrature
from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution, of_signed_sum
from fixup_init.moments.environment import Environment, Rule
from fixup_init.moments.lattice import PROFILE, Lattice, joined, parted, same, settled
from fixup_init.moments.polynomials import DEPENDENT, kin_of, moments_of
from fixup_init.moments.values import Source, Value, of_source, sole_source
from fixup_init.program import Op
from fixup_init.quadrature import Quantile

ORDERED = "approximate: entries that are put in order, taken as equally correlated and in rows of one distribution"
_LEVELS = 64  # points for the level of an order statistic
_SHARED = 33  # points for what the entries of a row have in common
_RANKS = 256  # order statistics that are integrated; those between are interpolated


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Entries along an axis: their mean, variance, and correlations with those of the same and of other rows."""

    mean: float
    variance: float
    inner: float  # correlation along the axis
    offset: Lattice  # by set of axes, the axis itself left out (size 1): covariance of different columns
    own: Lattice  # correlation of what is not in common, likewise
    quantile: Quantile | None

    @staticmethod
    def of(value: Value, axis: int) -> Rows:
        rank = value.rank
        mean, second = moments_of(value)
        m = float(mean.mean())
        flat = second.mean(tuple(range(rank, 2 * rank)), keepdims=True)
        v = max(float(flat[(0,) * rank].ravel()[0]) - m * m, 0.0)
        near, far = (x - m * m for x in parted(flat, axis))
        common = float(far[(0,) * rank].ravel()[0])
        rest = v - common
        own = np.clip((near - far) / rest, -1.0, 1.0) if rest > 1e-12 * max(v, 1e-300) else np.ones_like(near)
        return Rows(m, v, float(np.clip(common / v, -1.0, 1.0)) if v > 0 else 0.0, far, own, distribution(value.terms))


@dataclasses.dataclass(frozen=True, eq=False)
class Ordered:
    """The k largest of n, largest first: mean and variance of each, and the mean covariance of two of them."""

    mean: np.ndarray
    variance: np.ndarray
    covariance: float


def ordered(rows: Rows, n: int, k: int) -> Ordered:
    """Order statistics by integrals over their levels, behind what the entries of a row have in common."""
    if rows.variance <= 0 or n <= 1:
        return Ordered(np.full(k, rows.mean), np.zeros(k), 0.0)
    deviation = math.sqrt(rows.variance)
    r = float(np.clip(quadrature.latent(rows.quantile, np.array([max(rows.inner, 0.0)]))[0], 0.0, 1.0))
    z = special.ndtri((np.arange(_SHARED) + 0.5) / _SHARED) if r > 1e-9 else np.zeros(1)
    z = z / max(math.sqrt(float(np.square(z).mean())), 1e-300) if r > 1e-9 else z

    def values(level: np.ndarray) -> np.ndarray:
        """Entries at levels of their own part, for every shared part (the first axis)."""
        g = special.ndtri(np.clip(level, 1e-15, 1 - 1e-15))
        x = math.sqrt(r) * z.reshape(-1, *(1,) * g.ndim) + math.sqrt(1 - r) * g
        return rows.mean + deviation * x if rows.quantile is None else rows.quantile.values(rows.mean, deviation, x)

    ranks = np.unique(np.rint(np.linspace(1, k, min(k, _RANKS))))
    points = (np.arange(_LEVELS) + 0.5) / _LEVELS
    x = values(special.betaincinv((n - ranks + 1)[:, None], ranks[:, None], points))  # shared part, rank, level
    each = np.arange(1, k + 1)
    mean = np.interp(each, ranks, x.mean((0, 2)))
    square = np.interp(each, ranks, np.square(x).mean((0, 2)))
    if k == n:
        total = n * rows.variance * (1 + (n - 1) * rows.inner) + (n * rows.mean) ** 2  # of the sum, squared
        mean += rows.mean - mean.mean()
        square *= (rows.variance + rows.mean**2) / square.mean()
        pairs = (total - square.sum()) / (n * (n - 1))
    else:
        threshold = special.betaincinv(n - k, k + 1, points)
        tail = values(threshold[:, None] + (1 - threshold[:, None]) * points).mean(2)  # E of one of the largest
        pairs = float(np.square(tail).mean())
    different = (mean.sum() ** 2 - np.square(mean).sum()) / (k * (k - 1)) if k > 1 else 0.0
    return Ordered(mean, np.maximum(square - mean**2, 0.0), pairs - different if k > 1 else 0.0)


def sorted_source(value: Value, axis: int, k: int, descending: bool) -> Source:
    """The k largest along an axis, or the smallest and rising."""
    rank, n = value.rank, value.shape[axis]
    rows = Rows.of(value, axis)
    if not descending:
        rows = dataclasses.replace(rows, mean=-rows.mean, quantile=_mirrored(rows.quantile))
    found = ordered(rows, n, k)
    common = rows.inner * rows.variance

    def along(x: np.ndarray) -> np.ndarray:
        return x.reshape([-1 if a == rank + axis else 1 for a in range(2 * rank)])

    product = found.mean.sum() ** 2 - np.square(found.mean).sum()
    different = product / (k * (k - 1)) if k > 1 else 0.0
    near = along(found.mean**2) + rows.offset + rows.own * (along(found.variance) - common)
    far = different + rows.offset + rows.own * (found.covariance - common)
    mean = found.mean if descending else -found.mean
    if k > PROFILE:
        near, mean = near.mean(rank + axis, keepdims=True), mean.mean(keepdims=True)
    second = joined(near, far if k > 1 else near, axis)
    shape = tuple(k if a == axis else s for a, s in enumerate(value.shape))
    mean = mean.reshape([-1 if a == axis else 1 for a in range(rank)])
    square = same(second, rank)
    quantile = distribution(value.terms) if k > PROFILE else of_signed_sum(value.terms, mean, square)
    return Source(shape, mean, settled(second, shape), quantile, kin_of(value.terms))


def _mirrored(quantile: Quantile | None) -> Quantile | None:
    if quantile is None:
        return None
    q = quantile
    return Quantile(lambda z: -q.forward(-z), lambda t: tuple(-x for x in q.inverse(-t))[::-1], q.reach)  # pyright: ignore


@functools.lru_cache(4096)
def agreement(n: int, correlation: float) -> float:
    """How much more often than by accident the largest of n is in the same place, in two rows of a correlation.

    n E Phi2(x, y; c)^(n-1) over pairs x, y of the correlation c, with Phi2 the chance that both are larger than another
    pair: an integral over what that pair has in common.
    """
    c = abs(correlation)
    if n <= 1 or c >= 1 - 1e-9:
        return 1.0 if correlation > 0 or n <= 1 else -1 / (n - 1)
    if c < 1e-9:
        return 0.0
    m = 24 if n <= 64 else 40
    z, w = np.polynomial.hermite_e.hermegauss(m)
    w = w / w.sum()
    x = z[:, None, None]
    y = correlation * x + math.sqrt(1 - c * c) * z[None, :, None]
    t, sign = z[None, None, :], math.copysign(1.0, correlation)
    scale = math.sqrt(1 - c)
    one = special.ndtr((x - math.sqrt(c) * t) / scale)
    other = special.ndtr((y - sign * math.sqrt(c) * t) / scale)
    below = np.clip((one * other) @ w, 0.0, 1.0)
    found = n * float(w @ below ** (n - 1) @ w)
    return float(np.clip((found - 1 / n) / (1 - 1 / n), -1 / (n - 1), 1.0))


def agreements(own: Lattice, n: int) -> Lattice:
    """The same for every set of axes."""
    return np.vectorize(lambda c: agreement(n, round(float(c), 6)), otypes=[float])(own)


def returned(l: Lattice, axis: int, k: int, n: int, shape: tuple[int, ...], alike: Lattice) -> Lattice:
    """The cotangent of n entries of which k were taken in an order, given theirs."""
    rank = len(shape)
    near, far = parted(l.mean(rank + axis, keepdims=True), axis)
    whole = k * near + k * (k - 1) * far
    one = alike * k * near / n + (1 - alike) * whole / n**2
    other = (whole - n * one) / (n * (n - 1)) if n > 1 else one
    return settled(joined(one, other, axis), shape)


def _indices(env: Environment, value: Value, shape: tuple[int, ...], axis: int | None, n: int, alike: Lattice) -> Value:
    """Whole numbers below n: different along the axis, if it is still there, and in other rows as these agree."""
    rank = len(shape)
    mean, variance = (n - 1) / 2, (n * n - 1) / 12
    rho = alike
    if axis is None:
        gone = value.rank - rank
        axes = [a for a in range(value.rank) if rho.shape[a] == 1]
        rho = rho.reshape([s for a, s in enumerate(rho.shape[: value.rank]) if a not in axes[:gone]] + [1] * rank)
    elif shape[axis] > 1:
        rho = joined(rho, -rho / max(n - 1, 1), axis)
    else:
        rho = joined(rho, rho, axis)
    second = settled(mean**2 + variance * rho, shape)
    source = Source(shape, np.full((1,) * rank, mean), second, Quantile.uniform(), kin_of(value.terms))
    result = of_source(source)
    result.rows, result.notes = n, value.notes
    return result


def argmax(env: Environment, op: Op, args: list[Value]) -> Value:
    """Any place with the same chance; in two rows the same one as often as their order agrees."""
    value = args[0]
    (axis,) = op.params["axes"]
    n = value.shape[axis]
    source = env.collapse(value)
    rows = Rows.of(value, axis)
    result = _indices(env, value, env.program.shape(op.outputs[0]), None, n, agreements(rows.own, n))
    index = sole_source(result.terms)
    if source is not None and index is not None and n > 1:
        one = sorted_source(value, axis, 1, op.primitive is p.argmax_p)
        top = Source(value.shape, one.mean, np.repeat(np.take(one.second, [0], axis), 2, axis), one.quantile, one.kin)
        index.picks = source, top, axis
    return result


def top_k(env: Environment, op: Op, args: list[Value]) -> list[Value]:
    """The largest, falling, and where they are: independent of each other where entries are exchangeable."""
    value = args[0]
    shape = env.program.shape(op.outputs[0])
    axis = int(op.params.get("axis", op.params.get("reduction_dimension", -1))) % value.rank
    n, k = value.shape[axis], shape[axis]
    alike = agreements(Rows.of(value, axis).own, n)
    source = sorted_source(value, axis, k, op.params.get("is_max_k", True))

    def back(l: Lattice) -> Lattice:
        return returned(l, axis, k, n, value.shape, alike)

    chosen = _indices(env, value, shape, axis, n, alike)
    return [env.made(source, [(value, back)], {ORDERED}), chosen]


def sort(env: Environment, op: Op, args: list[Value]) -> list[Value]:
    """The first operand rises; the others are moved with it, as if they were independent of it."""
    axis = op.params["dimension"]
    keys, *others = args
    n = keys.shape[axis]
    if n == 1:
        return args
    made: list[Value] = []
    alike = np.ones((2,) * keys.rank + (1,) * keys.rank)
    if keys.is_constant:
        made.append(_shuffled(env, keys, axis, np.take(alike, [0], axis), keys))
        alike = np.take(alike, [0], axis)
    else:
        alike = agreements(Rows.of(keys, axis).own, n)
        source = sorted_source(keys, axis, n, False)
        first = env.made(source, [(keys, lambda l: returned(l, axis, n, n, keys.shape, alike))], {ORDERED})
        first.rows = 0
        made.append(first)
    return [*made, *(_shuffled(env, other, axis, alike, keys) for other in others)]


def _shuffled(env: Environment, value: Value, axis: int, alike: Lattice, keys: Value) -> Value:
    """A value whose entries change places along an axis, in two rows as their order agrees."""
    n = value.shape[axis]
    mean, second = moments_of(value)
    back = functools.partial(returned, axis=axis, k=n, n=n, shape=value.shape, alike=alike)
    source = Source(
        value.shape, mean.mean(axis, keepdims=True), back(second), distribution(value.terms), kin_of(value.terms)
    )
    result = env.made(source, [(value, back)], {DEPENDENT} if kin_of(value.terms) & kin_of(keys.terms) else ())
    if value.array is not None and np.array_equal(value.array.ravel(), np.arange(n)):
        source.quantile, result.rows = Quantile.uniform(), n
    return result


RULES: dict[Any, Rule] = {
    p.argmax_p: argmax,
    p.argmin_p: argmax,
    p.sort_p: sort,
    p.top_k_p: top_k,
    p.approx_top_k_p: top_k,
}
