"""Sums and extremes over axes.

A sum becomes a source that remembers what it is the sum of. The largest of n equally correlated entries is that of n
independent ones, behind what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from fixup_init import quadrature
from fixup_init.jaxprs import Op, p
from fixup_init.moments.distributions import distribution, drawn_at, draws
from fixup_init.moments.environment import Environment, Rule
from fixup_init.moments.lattice import Lattice, Profile, repeated, same, settled, total
from fixup_init.moments.polynomials import is_linear, kin_of, moments_of
from fixup_init.moments.values import Source, Value, padded, sole_source
from fixup_init.quadrature import Quantile

POOLED = "approximate: the largest of some entries, taken as equally correlated"

_FAR = 10.0  # standard deviations that expectations reach


def reduce_sum(env: Environment, op: Op, args: list[Value]) -> Value:
    """n M[same] + n (n - 1) M[different]."""
    value = args[0]
    axes = tuple(sorted(op.params["axes"]))
    before, shape = value.shape, env.program.shape(op.outputs[0])
    mean, second = moments_of(value)
    n = math.prod(before[a] for a in axes)
    summed, squares = n * mean.mean(axes), settled(total(second, axes, before), shape)
    quantile = positive(value, summed, squares) if n >= 8 else distribution(value.terms)
    source = Source(shape, summed, squares, quantile, kin_of(value.terms))
    if (whole := sole_source(value.terms)) is not None:
        source.sum_of = whole, axes, tuple(a for a in range(len(before)) if a not in axes)

    def back(l: Lattice) -> Lattice:
        rank = len(shape)
        for a in axes:
            l = repeated(l, a, rank)
            rank += 1
        return settled(l, before)

    return env.made(source, [(value, back)])


def positive(value: Value, mean: Profile, second: Lattice) -> Quantile | None:
    """The distribution of a sum of entries that are never negative, where a Gaussian would reach below zero."""
    if is_linear(value.terms) or value.is_constant or not mean.min() > 0:
        return None
    m = float(mean.mean())
    variance = float(same(second, mean.ndim).mean()) - m * m
    if not variance > m * m / _FAR**2:
        return None
    drawn = drawn_at(value.terms, draws(sorted({s for _, f in value.terms for s in f}, key=lambda s: s.number)))
    return Quantile.gamma(m * m / variance) if drawn.min() >= 0 else None


def reduce_max(env: Environment, op: Op, args: list[Value]) -> Value:
    """The largest or smallest over axes; the cotangent reaches that entry alone."""
    value, axes = args[0], tuple(sorted(op.params["axes"]))
    before, shape = value.shape, env.program.shape(op.outputs[0])
    sign = 1.0 if op.primitive is p.reduce_max_p else -1.0
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
}
