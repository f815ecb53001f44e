"""Sums and extremes over axes.

A sum becomes a source that remembers what it is the sum of. The largest of n equally correlated entries is that of n
independent ones, behind what they have in common. Of truth values, any is the largest and all the smallest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from fixup_init import quadrature
from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution, drawn_at, draws, of_signed_sum
from fixup_init.moments.environment import Environment, NoRule, Rule
from fixup_init.moments.lattice import Lattice, Profile, repeated, same, settled, total, widened
from fixup_init.moments.polynomials import kin_of, moments_of
from fixup_init.moments.values import Source, Value, padded, sole_source, sources_of
from fixup_init.program import Op
from fixup_init.quadrature import Quantile

PRODUCT = "approximate: a product of entries that are taken as independent"
POOLED = "approximate: the largest of some entries, taken as equally correlated"

_FAR = 10.0  # standard deviations that expectations reach


def reduce_sum(env: Environment, op: Op, args: list[Value]) -> Value:
    """n M[same] + n (n - 1) M[different]."""
    value = args[0]
    axes = tuple(sorted(op.params["axes"]))
    before, shape = value.shape, env.program.shape(op.outputs[0])
    mean, second = moments_of(value)
    n = math.prod(before[a] for a in axes)
    whole, line = settled(total(second, axes, before), shape), n * mean.mean(axes)
    if n >= 8:
        quantile = of_signed_sum(value.terms, line, same(whole, len(shape)))
    else:
        quantile = _exclusive(value, axes, second, n) or distribution(value.terms)
    source = Source(shape, line, whole, quantile, kin_of(value.terms), assumed=n >= 8 and quantile is not None)
    if (summed := sole_source(value.terms)) is not None:
        source.sum_of = summed, axes, tuple(a for a in range(len(before)) if a not in axes)

    def back(l: Lattice) -> Lattice:
        return settled(widened(l, axes), before)

    return env.made(source, [(value, back)])


def _exclusive(value: Value, axes: tuple[int, ...], second: Lattice, n: int) -> Quantile | None:
    """The distribution of a sum of which at most one entry is not zero, as of a value times a one-hot vector."""
    flat = second.mean(tuple(range(value.rank, 2 * value.rank)))
    apart = tuple(1 if a in axes else 0 for a in range(value.rank))
    if n == 1 or not flat[(0,) * value.rank] > 0 or abs(flat[apart]) > 1e-12 * flat[(0,) * value.rank]:
        return None
    sources = sources_of(value.terms)
    x = drawn_at(value.terms, draws(sources, anywhere=True)) if sources else np.zeros(1)
    here = x[x != 0]
    if not here.size or not np.isfinite(here).all():
        return None
    weights = np.append(np.full(here.size, n / x.size), max(1 - n * here.size / x.size, 0.0))
    return Quantile.of_samples(np.append(here, 0.0), weights)


def psum(env: Environment, op: Op, args: list[Value]) -> list[Value]:
    """A sum over an axis that `vmap` named; over devices there is no rule."""
    axes = op.params["axes"]
    if op.params.get("axis_index_groups") is not None or not all(isinstance(a, int) for a in axes):
        raise NoRule(f"no rule for `{op.name}` over devices or groups")
    return [reduce_sum(env, dataclasses.replace(op, outputs=(v,)), [a]) for v, a in zip(op.outputs, args, strict=True)]


def reduce_max(env: Environment, op: Op, args: list[Value]) -> Value:
    """The largest or smallest over axes; the cotangent reaches that entry alone."""
    value, axes = args[0], tuple(sorted(op.params["axes"]))
    before, shape = value.shape, env.program.shape(op.outputs[0])
    sign = 1.0 if op.primitive in (p.reduce_max_p, p.reduce_or_p) else -1.0
    n = math.prod(before[a] for a in axes)
    mean, second = moments_of(value)
    flat = tuple(value.rank - len(axes) + a for a in axes)
    one, other = (second[tuple(k if a in axes else slice(None) for a in range(value.rank))].mean(flat) for k in (0, 1))
    sizes, times = _seen(value, axes, n)
    parts = [largest(value, shape, mean.mean(axes), one, other, int(k), sign) for k in sizes]
    source = parts[-1]
    if len(parts) > 1:  # rows with different masks
        share = times / times.sum()
        first, second = (
            np.tensordot(share, np.stack(x), 1) for x in ([s.mean for s in parts], [s.second for s in parts])
        )
        source = Source(shape, first, second, source.quantile, source.kin)

    def back(l: Lattice) -> Lattice:
        rank = len(shape)
        for a in axes:
            l = repeated(l, a, rank)
            l[(slice(None),) * a + (1,)] = 0.0
            rank += 1
        return settled(l / n, before)

    return env.made(source, [(value, back)], {POOLED} if n > 1 else ())


def _seen(value: Value, axes: Sequence[int], n: int) -> tuple[np.ndarray, np.ndarray]:
    """How many entries a mask leaves, and of how many rows; at most 32 numbers."""
    if value.visible is None:
        return np.array([n]), np.ones(1)
    seen = value.visible.reshape(padded(value.visible.shape, value.rank))
    seen = np.broadcast_to(seen, [value.shape[a] if a in axes else seen.shape[a] for a in range(value.rank)])
    sizes, times = np.unique(np.maximum(seen.sum(tuple(axes)), 1), return_counts=True)
    few = np.unique(np.linspace(0, len(sizes) - 1, 32).round().astype(int))
    return sizes[few], times[few]


def reduce_prod(env: Environment, op: Op, args: list[Value]) -> Value:
    """Of independent entries: every second moment of one entry, in the same and in other rows, to the power n."""
    value, axes = args[0], tuple(sorted(op.params["axes"]))
    before, shape = value.shape, env.program.shape(op.outputs[0])
    rank, n = value.rank, math.prod(before[a] for a in axes)
    mean, second = moments_of(value)
    flat = tuple(rank - len(axes) + a for a in axes)
    near = second[tuple(0 if a in axes else slice(None) for a in range(rank))].mean(flat)
    centre = float(np.square(mean).mean())
    source = Source(shape, mean.mean(axes) ** n, settled(near**n, shape), None, kin_of(value.terms))

    def back(l: Lattice) -> Lattice:
        """The slope is the product of the others; of two entries they have n - 2 factors in common."""
        one, other = l * near ** (n - 1), l * near ** (n - 2) * centre
        one, other = widened(one, axes), widened(other, axes)
        inside = tuple(0 if a in axes else slice(None) for a in range(rank))
        other = np.broadcast_to(other, np.broadcast_shapes(one.shape, other.shape)).copy()
        other[inside] = one[inside]
        return settled(other, before)

    return env.made(source, [(value, back)], {PRODUCT} if n > 1 else ())


def largest(
    value: Value, shape: tuple[int, ...], mean: Profile, one: Lattice, other: Lattice, n: float,
    sign: float = 1.0, shared: Lattice | None = None,
) -> Source:  # fmt: skip
    """The largest of n entries: one for each entry of `shape`.

    Args:
      value: what they are entries of; gives the distribution.
      shape: of the result.
      mean: of the entries.
      one: the lattice of one entry of each group.
      other: that of two different entries of one group (masks: of different groups).
      n: how many.
      sign: -1 for the smallest.
      shared: which part of their entries two groups have in common.
    """
    rank = len(shape)
    quantile = distribution(value.terms)
    m = float(mean.mean())
    q = float(same(one, rank).mean())
    v = max(q - m * m, 0.0)
    if v == 0 or n <= 1:
        return Source(shape, mean, settled(one, shape), quantile, kin_of(value.terms))
    flat = tuple(range(rank, 2 * rank))
    inner = float(np.clip((float(same(other, rank).mean()) - m * m) / v, 0.0, 1.0))
    r = float(np.clip(quadrature.latent(quantile, np.array([inner]))[0], 0.0, 1.0))
    z = special.ndtri((np.arange(512) + 0.5) / 512)
    level = (np.arange(512) + 0.5) / 512
    top = special.ndtri(np.clip(level ** (1.0 / n), 1e-15, 1 - 1e-15))
    g = sign * (math.sqrt(r) * z[:, None] + math.sqrt(1 - r) * top)
    samples = (m + math.sqrt(v) * g if quantile is None else quantile.values(m, math.sqrt(v), g)).ravel()
    found = Quantile.of_samples(samples)
    new_mean, new_v = float(samples.mean()), float(samples.var())
    between = float(samples.reshape(512, 512).mean(1).var())  # what the shared part of a group explains
    rho = np.clip((one.mean(flat, keepdims=True) - m * m) / v, -1, 1)  # entries of different groups
    share = between / new_v if new_v > 0 else 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.where(inner > 0, np.minimum(rho / max(inner, 1e-12), 1.0) * share, rho)
    if shared is not None:
        scale = scale + shared * (1 - scale)
    second = new_mean**2 + new_v * scale
    second[(0,) * rank] = new_mean**2 + new_v
    return Source(shape, np.full((1,) * rank, new_mean), settled(second, shape), found, kin_of(value.terms))


RULES: dict[Any, Rule] = {
    p.reduce_sum_p: reduce_sum,
    p.reduce_max_p: reduce_max,
    p.reduce_min_p: reduce_max,
    p.reduce_or_p: reduce_max,
    p.reduce_and_p: reduce_max,
    p.reduce_prod_p: reduce_prod,
    p.psum_p: psum,
}
