"""What dividing by a standard deviation does to second moments, where the variance is over few or unequal directions.

A lattice over the axes of a group of N entries has one eigenvalue for every set T of axes: that of the arrays which
vary (with mean zero) along the axes of T and are constant along the others, of which there are n_T = prod_T (n_a - 1).
So for Gaussian entries |x|^2 = N s^2 = sum_T lambda_T chi^2(n_T), and with phi(t) = E exp(-t |x|^2) =
prod_T (1 + 2 t lambda_T)^(-n_T/2) every moment of x / s is one integral, as 1/s^2k is that of t^(k-1) exp(-t s^2):

    E 1/|x|^2 = int phi,  E x_k^2 / |x|^4 = int t phi r_k,  E x_k^2 x_l^2 / |x|^6 = (1 + 2 [k=l]) int t^2/2 phi r_k r_l

with r_k = lambda_k / (1 + 2 t lambda_k). With all eigenvalues equal E s^2 E 1/s^2 = N / (N - 2). One direction that
holds much of the variance (the mean of a channel within its group, what positions at a border have in common) makes s^2
fluctuate as if N were small, and most of the gradient passes the projection that x / s has in its derivative.

Entries x_i = w . z_i of a unit with few weights (three colours, nine taps) lie in few dimensions too: E (z_i . z_j)^2
has 1 / fan of (E |z|^2)^2 besides the square of its mean, so that the sum of squared eigenvalues is larger by
(sum_T n_T lambda_T)^2 / fan. So lambda_T is held as lambda_T + sum_T n_T lambda_T / fan, in fewer directions that have
the same sum. What of this is the size of w alone is no matter to the layers before, since w / s
does not change with it: the gradient that w^T takes on has another mean of 1/s^2 than the gradient of x.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from fixup_init.moments.lattice import Lattice

_STEPS = 400  # of an integral over log t
_LEAST = 1e-5  # of the variance: what stands for an epsilon, so that a mean of 1/s^2 exists


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Of a lattice over groups of entries that share a standard deviation.

    Attributes:
      axes: of the group, in an array of the shape `sizes`.
      sizes: of the whole array.
      centred: whether the mean of a group is taken off, so that the constant direction does not count.
      values: eigenvalue of each set of `axes`.
      counts: how many directions a set has.
      held: which share of its directions `counts` are, where x lies in fewer.
      shared: by the set of the other axes, which share of the fluctuation of s^2 two groups have in common.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    centred: bool
    values: np.ndarray
    counts: np.ndarray
    held: np.ndarray
    shared: np.ndarray

    @staticmethod
    def of(lattice: Lattice, axes: Sequence[int], sizes: Sequence[int], centred: bool, fan: int = 0) -> Spectrum:
        """Of the second moments of an array of some sizes; `fan` weights make each group, if that is known."""
        axes, sizes = tuple(axes), tuple(sizes)
        modes = _modes(lattice.mean(tuple(range(len(sizes), 2 * len(sizes)))), axes, sizes)
        counts = np.ones((2,) * len(axes))
        for k, a in enumerate(axes):
            counts = counts * np.array([1.0, sizes[a] - 1.0]).reshape([2 if j == k else 1 for j in range(len(axes))])
        inner = tuple(range(modes.ndim - len(axes), modes.ndim))
        if centred:
            counts[(0,) * len(axes)] = 0.0
        values = np.maximum(modes[(0,) * (modes.ndim - len(axes))], 0.0)
        power = (counts * modes**2).sum(inner)
        shared = np.clip(power / max(float((counts * values**2).sum()), 1e-300), 0.0, 1.0)
        held = np.ones(counts.shape)
        if fan:
            more = values + float((counts * values).sum()) / fan
            held = values / np.where(more > 0, more, 1.0)
            counts, values = counts * held, more
        return Spectrum(axes, sizes, centred, values, counts, held, shared)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of s^2: 2 over its relative variance."""
        power = float((self.counts * self.values**2).sum())
        return float((self.counts * self.values).sum()) ** 2 / power if power > 0 else math.inf

    def normalized(self, lattice: Lattice) -> Lattice:
        """Second moments of x sqrt(E s^2) / s from those of x."""
        flat, rest = self._flat(lattice)
        whole, apart = self._scales
        share = self.shared[(..., *(None,) * len(self.axes))]
        modes = _modes(flat, self.axes, self.sizes) * (apart**2 + share * (whole - apart**2))
        return rest + _expanded(_entries(modes, self.axes, self.sizes), lattice)

    def pulled(self, lattice: Lattice) -> Lattice:
        """Second moments of the cotangent of x from those of the cotangent g of x sqrt(E s^2) / s.

        It is (g - x (x, g) / |x|^2) sqrt(E s^2) / s, for g independent of x.
        """
        flat, rest = self._flat(lattice)
        modes = _modes(flat, self.axes, self.sizes)
        one, gone, mixed, apart = self._derivative
        n = len(self.axes)
        inner = tuple(range(modes.ndim - n, modes.ndim))
        again = mixed.reshape(self.counts.size, -1).diagonal().reshape(self.counts.shape)
        along = np.tensordot(modes * self.counts, mixed, (inner, tuple(range(n))))
        whole = modes * one + self.held * (along + modes * 2 * (again - gone))
        share = self.shared[(..., *(None,) * n)]
        found = modes * apart**2 * (1 - share) + whole * share
        return rest + _expanded(_entries(found, self.axes, self.sizes), lattice)

    def _flat(self, lattice: Lattice) -> tuple[Lattice, Lattice]:
        rank = len(self.sizes)
        flat = lattice.mean(tuple(range(rank, 2 * rank)))
        return flat, lattice - _expanded(flat, lattice)

    @functools.cached_property
    def _grid(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(t, weight of t times phi(t), r of each set at t); t in units of 1 / (N E s^2)."""
        whole = float((self.counts * self.values).sum()) or 1.0
        u = np.linspace(-28.0, math.log(40 / _LEAST), _STEPS)
        t = np.exp(u)
        values = (self.values / whole)[..., None]
        decay = np.log1p(2 * t * values) * self.counts[..., None] / 2
        phi = np.exp(-decay.reshape(-1, t.size).sum(0) - t * _LEAST) * t * (u[1] - u[0])
        return t, phi, values / (1 + 2 * t * values)

    @functools.cached_property
    def _scales(self) -> tuple[np.ndarray, np.ndarray]:
        """E x_k^2 E s^2 / s^2 and E x_k^2 sqrt(E s^2) / s over E x_k^2."""
        t, phi, r = self._grid
        share = 1 - 2 * t * r
        return (phi * share).sum(-1), (phi * share / np.sqrt(math.pi * t)).sum(-1)

    @functools.cached_property
    def _derivative(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """E s^2 times the three integrals of the head of this file, and what one cotangent is multiplied by."""
        t, phi, r = self._grid
        ones = np.ones(self.counts.shape)
        one, gone = ones * phi.sum(), (phi * t * r).sum(-1)
        flat = r.reshape(-1, t.size)
        mixed = ((phi * t * t / 2 * flat) @ flat.T).reshape(self.counts.shape * 2)
        apart = ones * (phi / np.sqrt(math.pi * t)).sum() - (phi * 2 * np.sqrt(t / math.pi) * r).sum(-1)
        return one, gone, mixed, apart


def _modes(flat: Lattice, axes: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """Eigenvalues by the set of axes along which a direction varies; sets of the other axes come first."""
    for a in axes:
        one, other = np.take(flat, [0], a), np.take(flat, [1], a)
        flat = np.concatenate([one + (sizes[a] - 1) * other, one - other], a)
    rest = [a for a in range(len(sizes)) if a not in axes]
    return flat.transpose(*rest, *axes)


def _entries(modes: np.ndarray, axes: Sequence[int], sizes: Sequence[int]) -> Lattice:
    """The lattice of such eigenvalues."""
    rest = [a for a in range(len(sizes)) if a not in axes]
    flat = modes.transpose(np.argsort([*rest, *axes]))
    for a in axes:
        constant, varying = np.take(flat, [0], a), np.take(flat, [1], a)
        n = sizes[a]
        one = (constant + (n - 1) * varying) / n
        flat = np.concatenate([one, (constant - varying) / n if n > 1 else one], a)
    return flat


def _expanded(flat: Lattice, like: Lattice) -> Lattice:
    """A lattice without profiles, of the rank of another."""
    return flat.reshape(*flat.shape, *(1,) * (like.ndim - flat.ndim))
