"""Reshapes of lattices and profiles.

Old and new axes are split into the pieces that both are made of, and these are merged again: splitting an axis copies
figures, since different entries are exchangeable; merging axes averages them over the ways in which two entries differ.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fixup_init.moments.lattice import Lattice, Profile, repeated, settled


@functools.lru_cache(4096)
def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int], list[int] | None]]:
    """Axes that are reshaped together: (old axes, new axes, sizes of the pieces that both are made of, if any)."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [], []
        a = b = 1
        while True:
            if a == b and (old or new) and (a > 1 or not (i < len(before) and j < len(after))):
                break
            if a <= b and i < len(before) and (a < b or not (j < len(after)) or before[i] <= after[j] or not old):
                a *= before[i]
                old.append(i)
                i += 1
            elif j < len(after):
                b *= after[j]
                new.append(j)
                j += 1
            else:
                a *= before[i]
                old.append(i)
                i += 1
            if a == b and old and new:
                break
            if i == len(before) and j == len(after):
                break
        cuts = sorted({*_strides([before[k] for k in old]), *_strides([after[k] for k in new])})
        pieces = None
        if all(high % low == 0 for low, high in itertools.pairwise(cuts)):
            pieces = [high // low for low, high in itertools.pairwise(cuts)][::-1]
        groups.append((old, new, pieces))
    return groups


def _strides(sizes: Sequence[int]) -> list[int]:
    """How many entries lie under one step along each axis."""
    return [math.prod(sizes[k:]) for k in range(len(sizes) + 1)]


def reshaped(lattice: Lattice, before: tuple[int, ...], after: tuple[int, ...]) -> Lattice:
    """Axes are split into equal ones and merged: pairs that differ in a merged axis are averaged over how they do."""
    rank = len(before)
    at = 0
    for old, new, pieces in _groups(tuple(before), tuple(after)):
        sizes = [before[k] for k in old]
        if pieces is None:
            lattice, rank = _merged_axes(lattice, at, sizes, rank)
            sizes = [math.prod(sizes)]
            lattice, rank = _split_axis(lattice, at, [after[k] for k in new], rank)
            at += len(new)
            continue
        rest, k = list(pieces), 0
        for n in sizes:
            mine = _taken(rest, n)
            lattice, rank = _split_axis(lattice, at + k, mine, rank)
            k += len(mine)
        rest = list(pieces)
        for k, j in enumerate(new):
            mine = _taken(rest, after[j])
            lattice, rank = _merged_axes(lattice, at + k, mine, rank)
        at += len(new)
    return settled(lattice, after)


def profile_reshaped(x: Profile, before: tuple[int, ...], after: tuple[int, ...]) -> Profile:
    """As the same entries of `reshaped`."""
    shape: list[int] = []
    parts = x
    for old, new, pieces in _groups(tuple(before), tuple(after)):
        wide = [k for k in old if x.shape[k] > 1]
        many_old = [k for k in old if before[k] > 1]
        many_new = [j for j in new if after[j] > 1]
        if wide and len(many_old) == 1 and len(many_new) == 1:
            shape += [after[j] if j == many_new[0] else 1 for j in new]
        elif wide and len(many_old) == 1 and pieces is not None:
            shape += [after[j] for j in new]
        else:
            for k in wide:
                parts = parts.mean(k, keepdims=True)
            shape += [1] * len(new)
    return parts.reshape(shape)


def _taken(pieces: list[int], size: int) -> list[int]:
    """Takes the pieces that an axis of a size is made of from the front of a list."""
    mine: list[int] = []
    while math.prod(mine) < size:
        mine.append(pieces.pop(0))
    return mine


def _split_axis(lattice: Lattice, axis: int, sizes: Sequence[int], rank: int) -> tuple[Lattice, int]:
    """Splits an axis into several; also gives the new rank."""
    if len(sizes) == 1:
        return lattice, rank
    one, other = np.take(lattice, 0, axis), np.take(lattice, -1, axis)
    n = len(sizes)
    shape = one.shape
    at = rank - 1 + axis
    split = list(sizes) if shape[at] > 1 else [1] * n

    def cut(x: Lattice) -> Lattice:
        return x.reshape((*shape[:at], *split, *shape[at + 1 :]))

    parts = np.empty((2,) * n, object)
    for mask in itertools.product((0, 1), repeat=n):
        parts[mask] = cut(one) if not any(mask) else cut(other)
    stacked = np.stack([parts[m] for m in itertools.product((0, 1), repeat=n)], axis)
    full = stacked.reshape((*stacked.shape[:axis], *((2,) * n), *stacked.shape[axis + 1 :]))
    return full, rank - 1 + n


def _merged_axes(lattice: Lattice, axis: int, sizes: Sequence[int], rank: int) -> tuple[Lattice, int]:
    """Merges len(sizes) axes from `axis` on into one; also gives the new rank."""
    n = len(sizes)
    if n == 0:
        return repeated(lattice, axis, rank), rank + 1
    if n == 1:
        return lattice, rank
    wide = [k for k in range(n) if lattice.shape[rank + axis + k] > 1]
    many = [k for k in range(n) if sizes[k] > 1]
    if wide and many != wide[:1]:  # a profile within a longer axis
        lattice = lattice.mean(tuple(rank + axis + k for k in wide), keepdims=True)
    one = np.zeros(())
    other: Any = 0.0
    count = 0
    for mask in itertools.product((0, 1), repeat=n):
        part = lattice[(slice(None),) * axis + mask]
        pairs = math.prod((s - 1) if m else 1 for s, m in zip(sizes, mask, strict=True))
        if not any(mask):
            one = part
        elif pairs:
            other = other + pairs * part
            count += pairs
    other = other / count if count else one
    made = np.stack([one, np.broadcast_to(other, one.shape)], axis)
    at = rank - n + 1 + axis
    shape = made.shape
    made = made.reshape(*shape[:at], math.prod(shape[at : at + n]), *shape[at + n :])
    return made, rank - n + 1
