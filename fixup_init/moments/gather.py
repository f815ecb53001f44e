"""Rows read from a table, as embeddings are.

Two places read the same row with the share that given indices have, or 1 over the number of rows; else their figures
are those of different rows.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution
from fixup_init.moments.environment import Environment, Rule
from fixup_init.moments.lattice import Lattice, settled
from fixup_init.moments.lookup import look_up
from fixup_init.moments.neighbours import of_indices
from fixup_init.moments.polynomials import DEPENDENT, kin_of, moments_of
from fixup_init.moments.values import Source, Value
from fixup_init.program import Op

ANYWHERE = "approximate: entries that differ with their position are read from anywhere"


def gather(env: Environment, op: Op, args: list[Value]) -> Value:
    """Rows of a table; `again` is how often two places read the same."""
    table, indices = args
    if (found := look_up(env, op, table, indices)) is not None:
        return found
    shape = env.program.shape(op.outputs[0])
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    offset = numbers.offset_dims
    batching = getattr(numbers, "operand_batching_dims", ())
    gone = (*numbers.collapsed_slice_dims, *batching)
    windows = [a for a in range(table.rank) if a not in gone]
    places = [a for a in range(len(shape)) if a not in offset]
    picked = [a for a in numbers.start_index_map if table.shape[a] > 1]
    n = math.prod(table.shape[a] for a in picked)
    if indices.array is not None and math.prod(indices.shape) > 1:
        flat = np.broadcast_to(indices.array, indices.shape).reshape(-1, indices.shape[-1])
        flat = flat if len(flat) < 100_000 else flat[:100_000]
        _, count = np.unique(flat, axis=0, return_counts=True)
        again = float((count * (count - 1)).sum() / (len(flat) * (len(flat) - 1))) if len(flat) > 1 else 1.0
    else:
        again = 1.0 / max(min(n, env.rows) if indices.rows else n, 1)
    mean, second = moments_of(table)
    notes = {DEPENDENT} if kin_of(table.terms) & kin_of(indices.terms) else set()
    for a in range(table.rank):
        if second.shape[table.rank + a] > 1 and (a in gone or sizes[a] != table.shape[a]):
            notes.add(ANYWHERE)
            second = second.mean(table.rank + a, keepdims=True)
            mean = mean.mean(a, keepdims=True)
    rank = len(shape)
    made = np.empty((2,) * rank, object)
    for mask in itertools.product((0, 1), repeat=rank):
        inner = [0] * table.rank
        for k, a in enumerate(offset):
            inner[windows[k]] = mask[a]
        moved = any(mask[a] for a in places)
        same_row = second[tuple(inner)]
        if moved and picked:
            for a in picked:
                inner[a] = 1
            made[mask] = again * same_row + (1 - again) * second[tuple(inner)]
        else:
            if moved:
                for a in batching:
                    inner[a] = 1
            made[mask] = second[tuple(inner)]
    order = [made[m] for m in itertools.product((0, 1), repeat=rank)]
    stacked = np.stack(order).reshape((2,) * rank + order[0].shape)
    profile = [1] * rank
    for k, a in enumerate(offset):
        profile[a] = order[0].shape[windows[k]]
    second = settled(stacked.reshape((2,) * rank + tuple(profile)), shape)
    source = Source(shape, mean.reshape([mean.shape[windows[offset.index(a)]] if a in offset else 1
                                         for a in range(rank)]), second, distribution(table.terms),
                    kin_of(table.terms))  # fmt: skip

    def back(l: Lattice) -> Lattice:
        """Entries that are not read get nothing; of those that are, how often."""
        l = l.mean(tuple(range(rank, 2 * rank)), keepdims=True)
        count = math.prod(shape[a] for a in places)
        share = 1.0 / max(math.prod(table.shape[a] for a in gone), 1)
        for a in windows:
            share *= sizes[a] / table.shape[a]
        found = np.empty((2,) * table.rank + (1,) * table.rank)
        for mask in itertools.product((0, 1), repeat=table.rank):
            inner = [0] * rank
            for k, a in enumerate(offset):
                inner[a] = mask[windows[k]]
            found[mask] = float(l[tuple(inner)].ravel()[0]) * count * share
            if any(mask[a] for a in gone):
                far = list(inner)
                for a in places:
                    far[a] = 1
                found[mask] = float(l[tuple(far)].ravel()[0]) * count * max(count - 1, 0) * share**2
        return settled(found, table.shape)

    if indices.array is not None and len(picked) == 1:
        notes |= of_indices(np.broadcast_to(indices.array, indices.shape))
    return env.made(source, [(table, back)], notes)


RULES: dict[Any, Rule] = {
    p.gather_p: gather,
}
