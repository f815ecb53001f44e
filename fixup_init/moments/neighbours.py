"""Neighbours along an axis that are alike: a lattice only knows how alike any two entries are, on average.

Repeats, resizing and windows that overlap make neighbours alike, which goes with a value as a trait of it; a sum over
small windows, or over neighbours by a given matrix, is larger for it, and says that this is not known. Cotangents on
the way back meet the same windows in the other order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fixup_init.moments.values import Trait, Value
from fixup_init.moments.windows import Window

WINDOWS = "approximate: a sum over neighbours that are alike, which is known of entries on average only"
_LOCAL = 0.1  # of the mean square of rows of a matrix: by how much neighbouring ones are more alike than others


def _alike(length: int) -> str:
    """Of an axis, by its length."""
    return Trait(f"neighbours of {length} are alike")


def of_windows(value: Value, windows: Iterable[Window], is_sum: bool = True) -> set[str]:
    """Notes on what is made of the windows of a value: its sums, or products with random weights."""
    found = set[str]()
    for w in windows:
        before = _alike(w.size) in value.notes
        if w.out > 1 and (before or (is_sum and w.taps > 1 and _is_local(w.matrix))):
            found.add(_alike(w.out))
        if before and is_sum and w.taps > 1 and w.out > 1:
            found.add(WINDOWS)
    return found


def of_matrix(value: Value, matrix: np.ndarray) -> set[str]:
    """Notes on the product of a given matrix, row by row of the result, with a value."""
    if matrix.ndim != 2 or min(matrix.shape) < 2 or not _is_local(matrix):
        return set()
    rows, columns = matrix.shape
    return {_alike(rows)} | ({WINDOWS} if _alike(columns) in value.notes else set())


def of_indices(indices: np.ndarray) -> set[str]:
    """Notes on entries that are read one after the other."""
    flat = indices.ravel()
    again = np.mean(flat[1:] == flat[:-1]) if flat.size > 2 else 0.0
    _, counts = np.unique(flat, return_counts=True)
    return {_alike(flat.size)} if again > _LOCAL and len(counts) > 1 else set()


def of_merged(value: Value, shape: Sequence[int]) -> set[str]:
    """Notes on a reshape that merges an axis along which entries repeat with another one."""
    repeats = [a for a in range(value.rank) if value.shape[a] > 1 and _repeats(value, a)]
    found = set[str]()
    for group in _groups(value.shape, shape):
        inside = [a for a in group if value.shape[a] > 1]
        if 0 < len([a for a in inside if a in repeats]) < len(inside):
            found.add(_alike(math.prod(value.shape[a] for a in inside)))
    return found


def _repeats(value: Value, axis: int) -> bool:
    """Whether all entries along an axis are one."""
    for _, factors in value.terms:
        for s in factors:
            near, far = np.take(s.second, 0, axis), np.take(s.second, 1, axis)
            if s.second.shape[value.rank + axis] > 1 or not np.array_equal(near, far):
                return False
    return bool(value.terms) and any(f for _, f in value.terms)


def _groups(before: Sequence[int], after: Sequence[int]) -> list[list[int]]:
    """Axes that become one axis of a new shape."""
    found: list[list[int]] = []
    left = [(a, n) for a, n in enumerate(before) if n > 1]
    for size in (n for n in after if n > 1):
        group, product = list[int](), 1
        while left and product < size:
            a, n = left.pop(0)
            group.append(a)
            product *= n
        if product != size:
            return found
        found.append(group)
    return found


def _is_local(matrix: np.ndarray) -> bool:
    """Whether neighbouring rows are more alike than rows are."""
    products = matrix @ matrix.T
    n = len(products)
    own, near = np.diag(products).mean(), np.diag(products, 1).mean()
    others = (products.sum() - np.trace(products)) / (n * (n - 1))
    return bool(near - others > _LOCAL * own)
