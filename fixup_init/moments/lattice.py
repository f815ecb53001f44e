"""Lattices of second moments, and what sums, projections and products make of them.

A lattice holds E x_i x_j for two entries that differ in exactly the axes of a set, for each set of axes: the axes of
the sets come first (0: the same, 1: different), then the profile, whose axes have size 1 where the position does not
matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Lattice = np.ndarray  # (2,) * rank + profile: entry [s, h] with s the set of axes in which two entries differ


Profile = np.ndarray  # one number for each position along axes where it matters; size 1 along the others


PROFILE = 4096  # entries of a profile
WIDE = 1 << 16  # of one over two axes, such as queries and keys


def spread(profile: Profile) -> Lattice:
    """The lattice whose entry [s] is a profile averaged over the axes of s."""
    rank = profile.ndim
    found = profile
    for a in range(rank):  # a axes of sets are in front by now
        mean = found.mean(2 * a, keepdims=True)
        found = np.stack([found, np.broadcast_to(mean, found.shape)], a)
    return found


def crossed(left: Profile, right: Profile) -> Lattice:
    """The lattice of a product of two profiles, one at each entry of a pair."""
    one, other = spread(left), spread(right)
    return (np.broadcast_to(left, one.shape) * other + one * np.broadcast_to(right, other.shape)) / 2


def of_pairs(profile: Profile, axis: int, weights: np.ndarray | None = None) -> float:
    """The mean of x_i x_j over different positions along an axis, which have weights where some are given."""
    line = profile.mean(tuple(a for a in range(profile.ndim) if a != axis))
    w = np.ones(line.size) if weights is None else weights
    product = float((w @ line) ** 2 - np.square(w) @ np.square(line))
    pairs = float(w.sum() ** 2 - np.square(w).sum())
    return product / pairs if pairs > 1e-12 else 0.0


def same(lattice: Lattice, rank: int) -> Profile:
    """E x_i^2."""
    return lattice[(0,) * rank]


def settled(lattice: Lattice, sizes: Sequence[int]) -> Lattice:
    """A lattice in which entries along an axis of size 1 count as the same, and profiles that are flat have size 1."""
    rank = len(sizes)
    for a in range(rank):
        if sizes[a] == 1:
            lattice = np.repeat(np.take(lattice, [0], a), 2, a)
        if lattice.shape[rank + a] > 1:
            first = np.take(lattice, [0], rank + a)
            if np.allclose(lattice, first, rtol=1e-9, atol=0):
                lattice = first
    return lattice


def parted(lattice: Lattice, axis: int) -> tuple[Lattice, Lattice]:
    """The figures of entries that are the same along an axis, and of those that differ."""
    return np.take(lattice, [0], axis), np.take(lattice, [-1], axis)


def joined(one: Lattice, other: Lattice, axis: int) -> Lattice:
    """The lattice of two such parts."""
    shape = np.broadcast_shapes(one.shape, other.shape)
    return np.concatenate([np.broadcast_to(one, shape), np.broadcast_to(other, shape)], axis)


def repeated(lattice: Lattice, axis: int, rank: int) -> Lattice:
    """Of a lattice of a rank: with a new axis, along which all entries are one."""
    return np.repeat(np.expand_dims(np.expand_dims(lattice, rank + axis), axis), 2, axis)


def widened(lattice: Lattice, axes: Iterable[int]) -> Lattice:
    """With new axes at some places, along which all entries are one: the transpose of a sum."""
    for a in sorted(axes):
        lattice = repeated(lattice, a, lattice.ndim // 2)
    return lattice


def diluted(lattice: Lattice, axis: int, held: int, n: int) -> Lattice:
    """Of entries among n along an axis, of which `held`, nobody knows where, have this lattice and the others are 0."""
    rank = lattice.ndim // 2
    one, other = parted(lattice.mean(rank + axis, keepdims=True), axis)
    return joined(one * held / n, other * (held * (held - 1)) / (n * max(n - 1, 1)), axis)


def summed(lattice: Lattice, axis: int, n: int, rank: int) -> Lattice:
    """Of a sum over one axis; that axis is gone."""
    one = np.take(lattice, 0, axis).mean(rank - 1 + axis)
    other = np.take(lattice, -1, axis).mean(rank - 1 + axis)
    return n * one + n * (n - 1) * other


def total(lattice: Lattice, axes: Iterable[int], sizes: Sequence[int]) -> Lattice:
    """Of a sum over axes, which are gone."""
    rank = len(sizes)
    for a in sorted(axes, reverse=True):
        lattice = summed(lattice, a, sizes[a], rank)
        rank -= 1
    return lattice


def kept(lattice: Lattice, axes: Iterable[int], sizes: Sequence[int]) -> Lattice:
    """E x_i sum_j x_j, j over the axes: the same for equal and for different entries along them."""
    for a in axes:
        both = np.take(lattice, [0], a) + (sizes[a] - 1) * np.take(lattice, [-1], a)
        lattice = np.repeat(both, 2, a)
    return lattice


def projected(lattice: Lattice, axes: Sequence[int], sizes: Sequence[int]) -> Lattice:
    """Of x - mean(x), the mean over some axes: E x_i x_j - E x_i m - E m x_j + E m^2."""
    rank = len(sizes)
    near = kept(lattice, axes, sizes) / math.prod(sizes[a] for a in axes)  # E x_i m
    far = near  # E m x_j, averaged over the j
    for a in axes:
        mean = np.take(far, [1], a).mean(rank + a, keepdims=True)
        far = joined(np.take(far, [0], a), mean, a)
    found = lattice - near - far + near.mean(tuple(rank + a for a in axes), keepdims=True)
    found[(0,) * rank] = np.maximum(found[(0,) * rank], 0.0)
    return found


def contracted(
    left: Lattice, left_axes: Sequence[Any], right: Lattice, right_axes: Sequence[Any], out: Sequence[Any],
    sizes: Mapping[Any, int],
) -> Lattice:  # fmt: skip
    """Of a sum of products of independent values, as einsum: axes by name, those that `out` lacks are summed."""
    gone = [a for a in dict.fromkeys((*left_axes, *right_axes)) if a not in out]
    order = [*out, *gone]
    rank = len(order)
    both = [_aligned(left, left_axes, order), _aligned(right, right_axes, order)]
    while math.prod(profile := np.broadcast_shapes(*(x.shape[rank:] for x in both))) > WIDE:
        both = [x.mean(rank + profile.index(max(profile)), keepdims=True) for x in both]
    product = both[0] * both[1]
    for a in reversed(gone):
        product = summed(product, rank - 1, sizes[a], rank)
        rank -= 1
    for a in range(rank):
        if product.shape[a] == 1:
            product = np.repeat(product, 2, a)
    return product


def _aligned(lattice: Lattice, axes: Sequence[Any], order: Sequence[Any]) -> Lattice:
    """A lattice with its axes in an order, and axes of size 1 for those that it lacks."""
    rank = len(axes)
    at = [axes.index(a) for a in order if a in axes]
    lattice = lattice.transpose(*at, *(rank + k for k in at))
    shape = iter(lattice.shape[:rank])
    masks = [next(shape) if a in axes else 1 for a in order]
    profile = iter(lattice.shape[rank:])
    return lattice.reshape(*masks, *(next(profile) if a in axes else 1 for a in order))


def mean_contracted(
    left: Profile, left_axes: Sequence[Any], right: Profile, right_axes: Sequence[Any], out: Sequence[Any],
    sizes: Mapping[Any, int],
) -> Profile:  # fmt: skip
    """The mean of such a sum."""
    gone = [a for a in dict.fromkeys((*left_axes, *right_axes)) if a not in out]
    order = [*out, *gone]

    def aligned(x: Profile, axes: Sequence[Any]) -> Profile:
        x = x.transpose([axes.index(a) for a in order if a in axes])
        shape = iter(x.shape)
        return x.reshape([next(shape) if a in axes else 1 for a in order])

    product = aligned(left, left_axes) * aligned(right, right_axes)
    for a in reversed(gone):
        product = sizes[a] * product.mean(-1)
    return product


def profile_size(mean: Profile, second: Lattice, rank: int) -> int:
    """Positions that mean and lattice tell apart."""
    return max(mean.size, math.prod(second.shape[rank:]))
