"""Expectations of functions of one source, for all pairs of its entries at once.

Every pair is a pair of normals with a mean, a deviation and a correlation (behind the distribution of the source), so
that Hermite expansions at the different means and deviations give the whole lattice. Results are kept with the source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fixup_init import quadrature
from fixup_init.moments.lattice import Lattice, Profile, same, settled, spread
from fixup_init.moments.values import Source
from fixup_init.quadrature import Formula, Quantile, X


def _rows(mean: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different pairs (mean, deviation), and which of them each entry has."""
    both = np.stack([mean.ravel(), deviation.ravel()], 1)
    scale = np.maximum(np.abs(both).max(0), 1e-300)
    _, first, inverse = np.unique(np.round(both / scale, 11), axis=0, return_index=True, return_inverse=True)
    return both[first], inverse.reshape(-1)


_FEW = 16  # pairs (mean, deviation) that are integrated one by one


def _expanded(source: Source, functions: Sequence[Formula]) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """(expansion, rows of the two entries of each pair, its correlation), for functions of one source."""
    key = tuple(f.key for f in functions)
    if key not in source.expectations:
        rank = len(source.shape)
        variance = np.maximum(same(source.second, rank) - source.mean**2, 0.0)
        shape = np.broadcast_shapes(source.second.shape, spread(source.mean).shape)
        here = [np.broadcast_to(x, shape) for x in (source.mean, variance)]
        there = [np.broadcast_to(spread(x), shape) for x in (source.mean, variance)]
        deviations = np.sqrt(here[1] * there[1])
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = np.where(deviations > 0, (source.second - here[0] * there[0]) / deviations, 1.0)
        rho = np.clip(np.where(np.isfinite(rho), rho, 1.0), -1.0, 1.0)
        rows, inverse = _rows(np.stack([here[0], there[0]]), np.sqrt(np.stack([here[1], there[1]])))
        if len(rows) > _FEW and np.ptp(rows[:, 0]) == 0 and rows[:, 1].min() > 0:
            expansion = _interpolated(functions, rows[0, 0], rows[:, 1], source.quantile)
        else:
            expansion = quadrature.expand(functions, rows[:, 0], rows[:, 1], source.quantile)
        first, second = inverse.reshape(2, -1)
        source.expectations[key] = expansion, first, second, quadrature.latent(source.quantile, rho).ravel()
    return source.expectations[key]


def _interpolated(
    functions: Sequence[Formula], mean: float, deviation: np.ndarray, quantile: Quantile | None
) -> quadrature.Expansion:
    """At many deviations, from those at the Chebyshev points of their range."""
    logs = np.log(deviation)
    low, high = logs.min(), logs.max()
    n = 12
    angle = (np.arange(n) + 0.5) * math.pi / n
    points = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    few = quadrature.expand(functions, np.full(n, mean), np.exp(points), quantile)
    weights = (-1.0) ** np.arange(n) * np.sin(angle)
    with np.errstate(divide="ignore", invalid="ignore"):
        basis = weights / (logs[:, None] - points)
        basis = np.where(np.isfinite(basis), basis, np.isinf(basis) * 1e300)
    basis = basis / basis.sum(1, keepdims=True)
    return quadrature.Expansion(
        np.einsum("rn,fnk->frk", basis, few.coefficients), np.einsum("rn,fgn->fgr", basis, few.products)
    )


def pair(source: Source, f: Formula, g: Formula) -> Lattice:
    """E f(x_i) g(x_j) over pairs."""
    if f is X and g is X:
        return source.second
    key = ("pair", *sorted((f.key, g.key)))
    if key not in source.expectations:
        functions = sorted((f, g), key=lambda h: h.key) if f.key != g.key else [f]
        expansion, row, other, rho = _expanded(source, functions)
        last = len(functions) - 1
        shape = np.broadcast_shapes(source.second.shape, spread(source.mean).shape)
        found = quadrature.paired(expansion, 0, last, row, other, rho).reshape(shape)
        rank = len(source.shape)
        products = expansion.products[0, last][row].reshape(shape)
        found[(0,) * rank] = products[(0,) * rank]
        source.expectations[key] = settled(found, source.shape)
    return source.expectations[key]


def expected(source: Source, f: Formula) -> Profile:
    """E f(x)."""
    if f is X:
        return source.mean
    key = ("mean", f.key)
    if key not in source.expectations:
        expansion, row, _, _ = _expanded(source, [f])
        shape = np.broadcast_shapes(source.second.shape, spread(source.mean).shape)
        rank = len(source.shape)
        source.expectations[key] = expansion.coefficients[0, :, 0][row].reshape(shape)[(0,) * rank]
    return source.expectations[key]
