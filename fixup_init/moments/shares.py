"""Shares of a sum, a_k = x_k / sum x, of positive values: gates that are normalized over those that were chosen.

A share is taken as independent of the sum, as it is for Gamma variables of one scale and no others (Lukacs 1955). Then
E x_k x_l = E a_k a_l E S S', so that shares have the lattice of x over that of their sums. The cotangent of x_k is
(g_k - sum_l a_l g_l) / S, in whose square a has the mean 1/n and E sum a^2, and S is log-normal.
"""

from __future__ import annotations

import math

import numpy as np

from fixup_init.moments.distributions import draws
from fixup_init.moments.environment import Environment
from fixup_init.moments.lattice import Lattice, joined, parted, same, settled
from fixup_init.moments.polynomials import cross_of, kin_of
from fixup_init.moments.values import Source, Value, sole_source
from fixup_init.quadrature import Quantile

SHARES = "approximate: shares of a sum are taken as independent of it"


def shares(env: Environment, shape: tuple[int, ...], above: Value, below: Value) -> Value | None:
    """A source over its own sum along one axis, maybe with a little added; None where it is something else."""
    source = sole_source(above.terms)
    constant = sum((float(c.mean()) for c, f in below.terms if not f), 0.0)
    moving = [(c, f) for c, f in below.terms if f]
    total = sole_source(moving)
    if source is None or total is None or total.sum_of is None or total.sum_of[0] is not source:
        return None
    axes = total.sum_of[1]
    if cross_of(source, total) is None or len(axes) != 1 or abs(constant) > 1e-3 * float(total.mean.mean()):
        return None
    if draws([source])[source].min() < 0:
        return None
    rank, (axis,) = len(shape), axes
    n = shape[axis]
    mean = source.mean / total.mean
    second = settled(source.second / np.maximum(total.second, 1e-300), shape)
    square = float(same(second, rank).mean())
    ratio = math.sqrt(max(square / float(mean.mean()) ** 2 - 1, 0.0))
    result = Source(shape, mean, second, Quantile.positive(ratio), kin_of(above.terms))
    flat = total.second.mean(tuple(range(rank, 2 * rank)), keepdims=True)
    relative = np.maximum(flat / float(np.square(total.mean).mean()), 1e-300)  # exp of the covariance of logarithms
    own = float(same(relative, rank).mean())
    inverse = own * relative * own / float(np.square(total.mean).mean())  # E 1 / S S'

    def back(l: Lattice) -> Lattice:
        near, far = parted(l.mean(rank + axis, keepdims=True), axis)
        once = (near + (n - 1) * far) / n
        twice = n * square * near + (1 - n * square) * far
        return settled(joined(near - 2 * once + twice, far - 2 * once + twice, axis) * inverse, shape)

    return env.made(result, [(above, back)], {SHARES})
