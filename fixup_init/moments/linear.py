"""Linear maps along one axis, y_k = sum_i A_ki x_i, whose matrix is known: cumulative sums and Fourier transforms.

E y_k^2 = sum_i A_ki^2 M[same]_i + (a_k^2 - sum_i A_ki^2) M[different], with a_k = sum_i A_ki; that of two different k
is an average, from the square of sum_k y_k. A cotangent goes through the transpose of A in the same way.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from fixup_init.moments.distributions import of_signed_sum
from fixup_init.moments.environment import Environment
from fixup_init.moments.lattice import Lattice, Profile, joined, of_pairs, parted, same, settled
from fixup_init.moments.polynomials import kin_of, likes_of, moments_of
from fixup_init.moments.values import Source, Value


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """The sums that lattices need of a matrix A: of rows and of columns, plain and of squares."""

    dense: np.ndarray

    @functools.cached_property
    def squares(self) -> np.ndarray:
        return np.square(self.dense)

    @functools.cached_property
    def transposed(self) -> Matrix:
        return Matrix(self.dense.T)

    def mean(self, x: Profile, axis: int) -> Profile:
        return _along(self.dense, x, axis)

    def lattice(self, l: Lattice, axis: int, mean: Profile | None = None) -> Lattice:
        """Of A x; where the mean of x has a profile, different entries have the product of their own means."""
        rank, m = l.ndim // 2, len(self.dense)
        near, far = parted(l, axis)
        k = rank + axis
        far = far.mean(k, keepdims=True)
        rows, columns = self.dense.sum(1), self.dense.sum(0)
        line = None
        if mean is not None and mean.shape[axis] > 1:  # of x less its mean, and the mean for itself
            line = mean.mean(tuple(a for a in range(mean.ndim) if a != axis))
            near = near - np.square(line).reshape(_shape(k, near.ndim))
            far = far - of_pairs(mean, axis)
        square = _along(self.squares, near, k)
        cross = (np.square(rows) - self.squares.sum(1)).reshape(_shape(k, near.ndim))
        same = square + cross * far
        weights = np.square(columns)
        if near.shape[k] > 1:
            whole = (near * weights.reshape(_shape(k, near.ndim))).sum(k, keepdims=True)
        else:
            whole = near * weights.sum()
        whole = whole + (columns.sum() ** 2 - weights.sum()) * far
        if line is not None:
            made = self.dense @ line
            same = same + np.square(made).reshape(_shape(k, near.ndim))
            whole = whole + made.sum() ** 2
        other = (whole - same.sum(k, keepdims=True)) / (m * (m - 1)) if m > 1 else same
        return joined(same, other, axis)


def _shape(axis: int, ndim: int) -> list[int]:
    return [-1 if a == axis else 1 for a in range(ndim)]


def _along(matrix: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """A matrix times a profile along an axis; one of size 1 is the same everywhere."""
    if x.shape[axis] == 1:
        return x * matrix.sum(1).reshape(_shape(axis, x.ndim))
    return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)


def linear(env: Environment, value: Value, axis: int, matrix: Matrix) -> Value:
    """A x along an axis, as a source of its own."""
    mean, second = moments_of(value)
    shape = tuple(len(matrix.dense) if a == axis else n for a, n in enumerate(value.shape))
    new = settled(matrix.lattice(second, axis, mean), shape)
    centre = matrix.mean(mean, axis)
    one_sign = matrix.dense.min() >= 0
    quantile = of_signed_sum(value.terms, centre, same(new, len(shape))) if one_sign else None
    source = Source(shape, centre, new, quantile, kin_of(value.terms), assumed=quantile is not None)

    def back(l: Lattice) -> Lattice:
        return settled(matrix.transposed.lattice(l, axis), value.shape)

    aligned = shape == value.shape
    source.linear_in = likes_of(value.terms) if aligned else source.linear_in
    return env.made(source, [(value, back)], aligned=aligned)
