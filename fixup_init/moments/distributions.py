"""Distributions of polynomials in sources: their values at points that fill the cube of all sources evenly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from fixup_init import quadrature
from fixup_init.moments.lattice import same
from fixup_init.moments.polynomials import is_gaussian
from fixup_init.moments.values import Source, Term, Value, sources_of
from fixup_init.quadrature import Quantile, X

SAMPLES = 1 << 13  # points at which polynomials are evaluated


def draws(sources: Sequence[Source], anywhere: bool = False) -> dict[Source, np.ndarray]:
    """Values of one entry of each source, at points that fill the cube evenly (Roberts 2018's R-sequence).

    Args:
      sources: of which there is one entry each.
      anywhere: whether how means differ from position to position is part of the spread.
    """
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (len(sources) + 1))
    drawn = {}
    for k, s in enumerate(sources):
        u = (np.arange(SAMPLES) + 0.5) / SAMPLES
        if len(sources) > 1:
            u = (0.5 + np.arange(SAMPLES) * root ** -(k + 1)) % 1.0
        z = special.ndtri(np.clip(u, 0.25 / SAMPLES, 1 - 0.25 / SAMPLES))
        m = float(s.mean.mean())
        centre = m**2 if anywhere else s.mean**2
        v = max(float((same(s.second, len(s.shape)) - centre).mean()), 0.0)
        drawn[s] = m + math.sqrt(v) * z if s.quantile is None else s.quantile.values(m, math.sqrt(v), z)
    return drawn


def drawn_at(terms: Sequence[Term], drawn: Mapping[Source, np.ndarray]) -> np.ndarray:
    """A polynomial at such points."""
    x = np.zeros(SAMPLES)
    for c, factors in terms:
        part = np.full(SAMPLES, float(c.mean()))
        for s, f in factors.items():
            part = part * (drawn[s] if f is X else quadrature.evaluate(f, drawn[s]))
        x = x + part
    return x


def distribution(terms: Sequence[Term]) -> Quantile | None:
    """The distribution of a polynomial, from points that fill the cube of its sources evenly."""
    if is_gaussian(terms):
        return None
    sources = sources_of(terms)
    if len(terms) == 1 and len(sources) == 1 and terms[0][1][sources[0]] is X:
        sign = float(terms[0][0].mean())
        q = sources[0].quantile
        if q is None or sign > 0:
            return q
    x = drawn_at(terms, draws(sources))
    return Quantile.of_samples(x) if np.isfinite(x).all() else None


def of_signed_sum(terms: Sequence[Term], mean: np.ndarray, square: np.ndarray) -> Quantile | None:
    """The distribution of a sum of many values with these moments: log-normal where all have one sign."""
    if is_gaussian(terms):
        return None
    sources = sources_of(terms)
    x = drawn_at(terms, draws(sources))
    if not np.isfinite(x).all() or x.min() * x.max() < 0:
        return None
    size = np.abs(mean)
    if not (size > 0).any():
        return None
    ratio = np.sqrt(np.maximum(square - mean**2, 0.0)) / np.maximum(size, 1e-300)
    found = Quantile.positive(float(ratio[np.broadcast_to(size > 0, ratio.shape)].max()))
    return found.mirrored if found is not None and x.min() < 0 else found


def mixture(parts: Sequence[tuple[Value, float, float]], sizes: Sequence[int]) -> Quantile | None:
    """The distribution of an entry that comes from one of several values."""
    z = special.ndtri((np.arange(1024) + 0.5) / 1024)
    samples, weights = [], []
    for (value, centre, variance), n in zip(parts, sizes, strict=True):
        q = distribution(value.terms)
        deviation = math.sqrt(max(variance, 0.0))
        samples.append(centre + deviation * z if q is None else q.values(centre, deviation, z))
        weights.append(np.full(z.size, n / z.size))
    return Quantile.of_samples(np.concatenate(samples), np.concatenate(weights))
