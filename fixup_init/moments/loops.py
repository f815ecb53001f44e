"""What goes into and out of scans."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fixup_init.moments.distributions import distribution
from fixup_init.moments.environment import Environment, Rule
from fixup_init.moments.lattice import PROFILE, Lattice, joined, parted, profile_size, settled, spread
from fixup_init.moments.polynomials import kin_of, moments_of
from fixup_init.moments.rearranging import Move, moved, reshaped_value
from fixup_init.moments.values import Source, Value, known, numbers, unknown
from fixup_init.program import CARRY_OUT, SLICE_IN, STACK_OUT, Op


def carry_out(env: Environment, op: Op, args: list[Value]) -> Value:
    return args[0]


def slice_in(env: Environment, op: Op, args: list[Value]) -> Value:
    """What one pass reads of an array."""
    value = args[0]
    shape = value.shape[1:]
    rank = value.rank
    n = value.shape[0]
    at = env.at[-1] if env.at else 0
    if op.loop is not None and op.loop.reverse:
        at = n - 1 - at
    if value.array is not None and not value.slopes:
        return known(shape, np.take(value.array, min(at, value.array.shape[0] - 1), 0), value.is_constant)

    def lattice(l: Lattice) -> Lattice:
        one = np.take(l, 0, 0)
        return np.take(one, min(at, one.shape[rank - 1] - 1), rank - 1)

    def back(l: Lattice) -> Lattice:
        l = np.expand_dims(np.expand_dims(l, rank - 1), 0)
        return settled(np.concatenate([l / n, np.zeros_like(l)], 0), value.shape)

    move = Move(("pass", at, next(numbers) if value.slopes else 0), shape, lattice,
                 lambda x: np.take(x, min(at, x.shape[0] - 1), 0), back)  # fmt: skip
    return moved(env, value, move)


def stack_out(env: Environment, op: Op, args: list[Value]) -> Value:
    """Results of the passes of a scan, as one array: the passes as a profile."""
    shape = env.program.shape(op.outputs[0])
    parts = env.stacks.get(op.inputs[0], [args[0]] * shape[0])
    if op.params["reverse"]:
        parts = parts[::-1]
    bad = next((a for a in parts if a.unknown), None)
    if bad is not None:
        return unknown(shape, bad.unknown)
    rank = len(shape)
    rows = [reshaped_value(env, a, (1, *a.shape)) for a in parts]
    found = [moments_of(a) for a in rows]
    n = len(rows)
    profile = n * max(profile_size(m, l, rank) for m, l in found) <= PROFILE
    shapes = np.broadcast_shapes(*(l.shape for _, l in found))
    means = np.broadcast_shapes(*(m.shape for m, _ in found))
    one = np.concatenate([np.broadcast_to(l, shapes)[0:1] for _, l in found], rank)
    mean = np.concatenate([np.broadcast_to(m, means) for m, _ in found], 0)
    _, across = parted(spread(mean), 0)
    if n > 1:  # other passes: the product of means, less what equal ones add to it
        across = across.mean(rank, keepdims=True)
    if not profile:
        one, mean = one.mean(rank, keepdims=True), mean.mean(0, keepdims=True)
    second = joined(one, across, 0)
    source = Source(shape, mean, settled(second, shape), distribution(parts[-1].terms),
                    frozenset().union(*(kin_of(a.terms) for a in rows)))  # fmt: skip

    def back(k: int, l: Lattice) -> Lattice:
        one = np.take(l, [0], 0)
        at = np.take(one, [min(k, one.shape[rank] - 1)], rank)
        return np.repeat(at, 2, 0)

    return env.made(source, [(a, functools.partial(back, k)) for k, a in enumerate(rows)])


RULES: dict[Any, Rule] = {
    CARRY_OUT: carry_out,
    SLICE_IN: slice_in,
    STACK_OUT: stack_out,
}
