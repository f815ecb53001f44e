"""Products of rows with the matrix of their group, as mixtures of experts have them (`jax.lax.ragged_dot`).

Row r reads the matrix of its group g(r). Two different rows are of one group with the chance
a = E sum_g s_g (s_g - 1) / (m (m - 1)), s_g the sizes and m the number of rows: their matrices have the lattice
a W[same] + (1 - a) W[different], and what follows is a product for each row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fixup_init.moments.contraction import einsum
from fixup_init.moments.environment import Environment, NoRule
from fixup_init.moments.lattice import joined, parted, settled
from fixup_init.moments.places import Places
from fixup_init.moments.polynomials import kin_of, moments_of
from fixup_init.moments.values import Source, Value
from fixup_init.program import Op


def ragged_dot(env: Environment, op: Op, args: list[Value]) -> Value:
    """Rows of groups times one matrix for each group."""
    rows, matrices, sizes = args
    numbers: Any = op.params["ragged_dot_dimension_numbers"]
    plain = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ())) and tuple(numbers.lhs_ragged_dimensions) == (0,)
    if not plain or tuple(numbers.rhs_group_dimensions) != (0,):
        raise NoRule(f"no rule for this form of `{op.name}`")
    (m, k), (groups, _, n) = rows.shape, matrices.shape
    _, second = moments_of(sizes)
    square = float(second[(0,)].mean())
    alike = float(np.clip((groups * square - m) / (m * (m - 1)), 0.0, 1.0)) if m > 1 else 1.0
    mean, second = moments_of(matrices)
    mean, second = mean.mean(0, keepdims=True), second.mean(3, keepdims=True)
    same, other = parted(second, 0)
    own = joined(same, alike * same + (1 - alike) * other, 0)
    shares = np.full(groups, 1 / groups)
    rho = np.full((1,) * 4, (alike - 1 / groups) / (1 - 1 / groups) if groups > 1 else 1.0)
    places = Places(m, shares, np.ones((1,) * 4), rho)
    source = Source((m, k, n), mean, settled(own, (m, k, n)), None, kin_of(matrices.terms))
    read = env.made(source, [(matrices, lambda l: settled(places.collected(l), matrices.shape))])
    names = (["m", "k"], ["m", "k", "n"])
    return einsum(env, (m, n), (rows, read), names, ["m", "n"], {"m": m, "k": k, "n": n}, env.weights(op)[:2])
