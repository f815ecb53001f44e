"""Which entries of an array are read or written where indices say so.

E places have a cell each, cell c with the chance P_c; two places have the same with r P_c + (1 - r) P_c^2 (see
`whole_numbers`). What is written into cells is a sum over places, what is read a mean over cells: with J_c(r) that
chance, M the lattice of places and r of one place (1, but for other rows of a batch) or of two,

  cell c:            E J_c(r_one) M[same] + E (E - 1) J_c(r_two) M[different]
  two cells:         E (1 - r_one) q M[same] + E (E - 1) (1 - r_two) q M[different], q the mean of P_c P_c'

and reading is the transpose of it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fixup_init.moments.lattice import PROFILE, Lattice, joined, parted
from fixup_init.moments.reshaping import reshaped
from fixup_init.moments.values import Value
from fixup_init.moments.whole_numbers import whole


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Places and the chances of cells; the lattices are over the axes of a window, batches among them."""

    count: int
    shares: np.ndarray
    one: Lattice  # how far one place of two windows has the same cell
    two: Lattice  # and two places
    exact: np.ndarray | None = None  # how many places each cell has, where that is certain

    def _joint(self, rho: Lattice, wide: bool) -> Lattice:
        """J_c, cells as the first axis of the profile."""
        rank = rho.ndim // 2
        r = np.expand_dims(rho, rank)
        shares = self.shares.reshape(-1, *(1,) * rank)
        found = np.maximum(r * shares + (1 - r) * shares**2, 0.0)
        return found if wide else found.mean(rank, keepdims=True)

    @property
    def _apart(self) -> float:
        """The mean of P_c P_c' over different cells."""
        n = len(self.shares)
        return float(self.shares.sum() ** 2 - np.square(self.shares).sum()) / (n * (n - 1)) if n > 1 else 0.0

    def collected(self, l: Lattice) -> Lattice:
        """Of sums over the places of each cell; cells take the place of places, as the first axis."""
        e = self.count
        wide = np.ptp(self.shares) > 1e-12 and len(self.shares) <= PROFILE
        rank = l.ndim // 2
        near, far = (x.mean(rank, keepdims=True)[0] for x in parted(l, 0))
        same = e * self._joint(self.one, wide) * near + e * (e - 1) * self._joint(self.two, wide) * far
        one, two = np.expand_dims(self.one, rank - 1), np.expand_dims(self.two, rank - 1)
        other = self._apart * (e * (1 - one) * near + e * (e - 1) * (1 - two) * far)
        return joined(same[None], other[None], 0)

    def looked_up(self, l: Lattice) -> Lattice:
        """Of what the places read of their cells."""
        rank = l.ndim // 2
        n = len(self.shares)
        near, far = (x[0] for x in parted(l, 0))
        far = far.mean(rank - 1, keepdims=True)
        made = []
        for rho in (self.one, self.two):
            joint = np.maximum(self._joint(rho, True), 0.0)
            same = (joint * near).sum(rank - 1, keepdims=True)
            made.append(same + n * (n - 1) * self._apart * (1 - np.expand_dims(rho, rank - 1)) * far)
        return joined(made[0][None], made[1][None], 0)

    @property
    def hits(self) -> tuple[np.ndarray, float]:
        """The chance that a cell has a place, and the mean chance that both of two cells have one."""
        n, e = len(self.shares), self.count
        pairs = max(n * (n - 1), 1)
        if self.exact is not None:
            hit = (self.exact > 0).astype(float)
            return hit, float(hit.sum() ** 2 - hit.sum()) / pairs
        if e > 1 and float(self.two.min()) < -1e-9:  # without replacement
            hit = np.minimum(e * self.shares, 1.0)
            return hit, float(e * (e - 1) / pairs) if hit.sum() > 0 else 0.0
        hit = 1 - (1 - self.shares) ** e
        few = self.shares if n <= 512 else self.shares[:: n // 512 + 1]
        both = 1 - (1 - few) ** e - ((1 - few) ** e)[:, None] + np.maximum(1 - few - few[:, None], 0.0) ** e
        m = len(few)
        return hit, float(both.sum() - both.trace()) / (m * (m - 1)) if m > 1 else 0.0


def places_of(indices: Value, sizes: tuple[int, ...], batch: dict[int, int], windows: int) -> Places | None:
    """Places that the vectors of an array of indices (its last axis) give.

    Args:
      indices: the array.
      sizes: of the axes that a vector says something of, in its order.
      batch: axes of the indices that are batches, with the axis of the window that goes with each.
      windows: how many axes a window has.
    """
    n = math.prod(sizes)
    free = [a for a in range(indices.rank - 1) if a not in batch]
    count = math.prod(indices.shape[a] for a in free)
    ones = np.ones((1,) * (2 * windows))
    if indices.array is not None and indices.array.dtype.kind in "iu" and math.prod(indices.shape) <= 1 << 22:
        full = np.broadcast_to(indices.array, indices.shape).reshape(-1, len(sizes)).astype(np.int64)
        inside = ((full >= 0) & (full < np.array(sizes))).all(1)
        cells = np.ravel_multi_index(tuple(full[inside].T), sizes) if len(sizes) else np.zeros(inside.sum(), int)
        exact = np.bincount(cells, minlength=n).astype(float)
        rows = len(full)
        shares = exact / rows
        alike = float((shares**2).sum())
        again = float((exact * (exact - 1)).sum()) / (rows * (rows - 1)) if rows > 1 else 1.0
        two = (again - alike) / (1 - alike) if alike < 1 else 1.0
        return Places(count, shares, ones, np.full_like(ones, two), exact if not batch else None)
    if len(sizes) != 1:
        return Places(count, np.full(n, 1 / n), ones, np.zeros_like(ones))
    found = whole(indices)
    if found is None:
        return None
    rho = np.take(found.rho, 0, indices.rank - 1).reshape((2,) * (indices.rank - 1))
    shape = indices.shape[:-1]
    order = [*free, *batch]
    lattice = rho.transpose(order).reshape((2,) * len(order) + (1,) * len(order))
    merged = reshaped(lattice, tuple(shape[a] for a in order), (count, *(shape[a] for a in batch)))
    near, far = (x[0] for x in parted(merged, 0))
    axes = list(batch.values())
    turn = [int(k) for k in np.argsort(axes)]

    def spread(x: Lattice) -> Lattice:
        x = x.reshape((2,) * len(axes)).transpose(turn)
        return x.reshape([2 if a in axes else 1 for a in range(windows)] + [1] * windows)

    return Places(count, found.up_to(n), spread(near), spread(far))
