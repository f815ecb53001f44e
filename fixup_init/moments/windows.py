"""Windows that slide along an axis: which entries each of them meets, and what that makes of a lattice."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from fixup_init.moments.lattice import Lattice, joined, parted


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """A window that slides along one axis: `hits[h, k]` is the entry that tap k of window h meets, -1 where none."""

    size: int
    out: int
    taps: int
    hits: np.ndarray

    @staticmethod
    @functools.lru_cache(1024)
    def of(size: int, out: int, taps: int, stride: int, low: int, inner: int, outer: int) -> Window:
        """With `low` entries of padding in front; `inner` dilates what is met, `outer` the window."""
        at = np.arange(out)[:, None] * stride + np.arange(taps) * outer - low
        hits = np.where((at >= 0) & (at % inner == 0) & (at // inner < size), at // inner, -1)
        return Window(size, out, taps, hits)

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """1 where a tap meets something, else 0."""
        return (self.hits >= 0).astype(np.float64)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How many taps meet something, for each window."""
        return self.valid.sum(1)

    @functools.cached_property
    def matrix(self) -> np.ndarray:
        """1 for each window and entry that meet."""
        found = np.zeros((self.out, self.size))
        h, k = np.nonzero(self.hits >= 0)
        found[h, self.hits[h, k]] = 1.0
        return found

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """In which share of the other windows a tap meets something too, for each window and tap that does."""
        return self.valid * (self.valid.sum(0) - 1) / max(self.out - 1, 1)

    @functools.cached_property
    def pairs(self) -> float:
        """How many pairs of taps of two windows meet something."""
        n = self.out
        total = self.counts.sum()
        return float((total**2 - (self.counts**2).sum()) / (n * (n - 1))) if n > 1 else float((self.counts**2).mean())

    @functools.cached_property
    def common(self) -> float:
        """How many entries two windows have in common, on average."""
        n = self.out
        uses = self.uses
        return float((uses**2 - uses).sum() / (n * (n - 1))) if n > 1 else float(self.counts.mean())

    @functools.cached_property
    def uses(self) -> np.ndarray:
        """How many windows meet each entry."""
        return np.bincount(self.hits[self.hits >= 0].ravel(), minlength=self.size).astype(np.float64)

    @functools.cached_property
    def back_shares(self) -> np.ndarray:
        """For each window and tap that meets an entry, by which share of other entries the tap is met."""
        return self.valid * (self.valid.sum(0) - 1) / max(self.size - 1, 1)

    def _weighed(self, weights: np.ndarray, x: np.ndarray, axis: int, back: bool = False) -> np.ndarray:
        """Sums over each window (or over those that meet an entry) of a profile, weighted."""
        rows, columns = (self.size, self.out) if back else (self.out, self.size)
        h, k = np.nonzero(self.hits >= 0)
        pairs = (self.hits[h, k], h) if back else (h, self.hits[h, k])
        matrix = np.zeros((rows, columns))
        np.add.at(matrix, pairs, weights[h, k])
        if x.shape[axis] == 1:
            return x * _along(matrix.sum(1), axis, x.ndim)
        return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)

    def counted(self, x: np.ndarray, axis: int) -> np.ndarray:
        """Sums of a profile along an axis over each window."""
        return self._weighed(self.valid, x, axis)

    def aligned(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """The same tap in both windows, as independent weights have it."""
        one, other = parted(lattice, axis)
        at = rank + axis
        return joined(self.counted(one, at), self._weighed(self.shares, other, at), axis)

    def any_taps(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """Numbers of pairs of taps."""
        one, other = parted(lattice, axis)
        return joined(one * _along(self.counts**2, rank + axis, one.ndim), other * self.pairs, axis)

    def summed(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """Of sums over windows."""
        one, other = parted(lattice, axis)
        at = rank + axis
        near = self.counted(one, at) + self._weighed(self.valid * (self.counts - 1)[:, None], other, at)
        other = other.mean(at, keepdims=True)
        average = one.mean(at, keepdims=True)
        far = self.common * average + (self.pairs - self.common) * other
        return joined(near, far, axis)

    def spread_back(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """The cotangent of what windows summed."""
        one, other = parted(lattice, axis)
        at = rank + axis
        near = self._weighed(self.valid, one, at, back=True)
        other = other.mean(at, keepdims=True)
        crossed = other * _along(self.uses**2 - self.uses, at, one.ndim)
        n = self.size
        per_window = (self.counts**2 - self.counts).sum() / (n * (n - 1)) if n > 1 else 0.0
        total_pairs = (self.uses.sum() ** 2 - (self.uses**2).sum()) / (n * (n - 1)) if n > 1 else 0.0
        far = per_window * one.mean(at, keepdims=True) + max(total_pairs - per_window, 0.0) * other
        return joined(near + crossed, far, axis)

    def transposed(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """The cotangent of what independent weights made."""
        one, other = parted(lattice, axis)
        at = rank + axis
        near, far = (self._weighed(w, x, at, back=True) for w, x in ((self.valid, one), (self.back_shares, other)))
        return joined(near, far, axis)


def _along(counts: np.ndarray, axis: int, ndim: int) -> Any:
    """Numbers for each position of an axis; one number where they are all the same."""
    if np.ptp(counts) <= 1e-12 * np.abs(counts).max(initial=0):
        return counts[0]
    return counts.reshape([-1 if a == axis else 1 for a in range(ndim)])
