"""Whole rows read by one index each, as from a table of embeddings or from the nodes of a graph.

With P_c the chance of row c and J_c(s) that two places which differ in the axes s both read it (`whole_numbers`), their
figures are sum_c J_c(s) M[same]_c + (1 - sum_c J_c(s)) M[different]. The cotangent of a row is the sum of those of its
readers (`places`).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fixup_init.moments.distributions import distribution
from fixup_init.moments.environment import Environment
from fixup_init.moments.lattice import Lattice, of_pairs, parted, settled
from fixup_init.moments.neighbours import of_indices
from fixup_init.moments.places import places_of
from fixup_init.moments.polynomials import DEPENDENT, kin_of, moments_of
from fixup_init.moments.reshaping import reshaped
from fixup_init.moments.values import Source, Value
from fixup_init.moments.whole_numbers import Whole, whole
from fixup_init.program import Op


def look_up(env: Environment, op: Op, table: Value, indices: Value) -> Value | None:
    """Rows along one axis of a table; None where it is something else that is gathered."""
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    shape = env.program.shape(op.outputs[0])
    gone, offset = tuple(numbers.collapsed_slice_dims), numbers.offset_dims
    if len(gone) != 1 or gone != tuple(numbers.start_index_map) or getattr(numbers, "operand_batching_dims", ()):
        return None
    (axis,) = gone
    windows = [a for a in range(table.rank) if a != axis]
    at = [a for a in range(len(shape)) if a not in offset]
    if any(sizes[a] != table.shape[a] for a in windows) or len(at) != indices.rank - 1:
        return None
    n, count = table.shape[axis], math.prod(shape[a] for a in at)
    found, readers = whole(indices), places_of(indices, (n,), {}, len(windows))
    if found is None or readers is None or n == 1:
        return None
    shares = _certain(found, n)
    places, rank = len(at), len(shape)
    mean, second = moments_of(table)
    order = [axis, *windows]
    near, far = (x[0] for x in parted(second.transpose(*order, *(table.rank + a for a in order)), 0))
    far = far.mean(len(windows))
    if mean.shape[axis] > 1:  # the rows that are read have the product of their own means
        far = far + of_pairs(mean, axis, shares) - of_pairs(mean, axis)
    both = dataclasses.replace(found, rho=np.take(found.rho, [0], places)).both(shares)
    both = both.reshape(*(2,) * places, n)
    if near.shape[len(windows)] == 1:
        same = np.multiply.outer(both.sum(-1), near.squeeze(len(windows)))
    else:
        same = np.tensordot(both, near, (places, len(windows)))
    new = same + np.multiply.outer(np.maximum(1 - both.sum(-1), 0.0), far)
    order = [at.index(a) if a in at else places + offset.index(a) for a in range(rank)]
    profile = (*(1,) * places, *new.shape[rank:])
    new = new.reshape(*new.shape[:rank], *profile).transpose(*order, *(rank + k for k in order))
    line = mean.transpose(axis, *windows)
    line = np.tensordot(shares, line, (0, 0)) if line.shape[0] > 1 else line[0]
    line = line.reshape(*(1,) * places, *line.shape).transpose(order)
    source = Source(shape, line, settled(new, shape), distribution(table.terms), kin_of(table.terms))
    readers = dataclasses.replace(readers, shares=shares)

    def back(l: Lattice) -> Lattice:
        turn = [*at, *offset]
        l = l.transpose(*turn, *(rank + a for a in turn))
        l = readers.collected(reshaped(l, tuple(shape[a] for a in turn), (count, *(shape[a] for a in offset))))
        turn = [int(k) for k in np.argsort([axis, *windows])]
        return settled(l.transpose(*turn, *(table.rank + a for a in turn)), table.shape)

    notes = {DEPENDENT} if kin_of(table.terms) & kin_of(indices.terms) else set[str]()
    if indices.array is not None:
        notes |= of_indices(np.broadcast_to(indices.array, indices.shape))
    return env.made(source, [(table, back)], notes)


def _certain(found: Whole, n: int) -> np.ndarray:
    """The chances of rows, that of all together 1."""
    shares = found.up_to(n)
    return shares / shares.sum() if shares.sum() > 0 else np.full(n, 1 / n)
