"""Pooling: sums and extremes over windows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution
from fixup_init.moments.environment import Environment, Rule
from fixup_init.moments.lattice import Lattice, joined, parted, settled
from fixup_init.moments.neighbours import of_windows
from fixup_init.moments.polynomials import kin_of, likes_of, moments_of
from fixup_init.moments.reductions import POOLED, largest
from fixup_init.moments.values import Source, Value
from fixup_init.moments.windows import Window
from fixup_init.program import Op


def _windows(env: Environment, op: Op, value: Value) -> list[Window]:
    """The windows along each axis."""
    shape, q = env.program.shape(op.outputs[0]), op.params
    return [
        Window.of(value.shape[a], shape[a], q["window_dimensions"][a], q["window_strides"][a], q["padding"][a][0],
                   q["base_dilation"][a], q["window_dilation"][a])
        for a in range(len(shape))
    ]  # fmt: skip


def window_sum(env: Environment, op: Op, args: list[Value]) -> Value:
    """Sums over windows, axis by axis."""
    value = args[0]
    shape = env.program.shape(op.outputs[0])
    rank = len(shape)
    windows = _windows(env, op, value)
    mean, second = moments_of(value)
    used = [a for a, w in enumerate(windows) if w.taps > 1 or w.out != w.size]
    for a in used:
        mean, second = windows[a].counted(mean, a), windows[a].summed(second, a, rank)
    n = math.prod(w.taps for w in windows)
    quantile = None if n >= 8 else distribution(value.terms)
    source = Source(shape, mean, settled(second, shape), quantile, kin_of(value.terms))
    aligned = shape == value.shape
    source.linear_in = likes_of(value.terms) if aligned else source.linear_in

    def back(l: Lattice) -> Lattice:
        for a in used:
            l = windows[a].spread_back(l, a, rank)
        return settled(l, value.shape)

    return env.made(source, [(value, back)], of_windows(value, windows), keeps=n == 1, aligned=aligned)


def window_max(env: Environment, op: Op, args: list[Value]) -> Value:
    """The largest or smallest of windows, which have entries in common."""
    value = args[0]
    shape = env.program.shape(op.outputs[0])
    rank = len(shape)
    windows = _windows(env, op, value)
    mean, second = moments_of(value)
    used = [a for a, w in enumerate(windows) if w.taps > 1 or w.out != w.size]
    flat = tuple(range(rank, 2 * rank))
    one = second.mean(flat, keepdims=True)
    other = one
    for a in used:
        other = np.repeat(np.take(other, [1 if value.shape[a] > 1 else 0], a), 2, a)
    n = float(math.prod(w.counts.mean() for w in windows))
    shared = np.ones((2,) * rank + (1,) * rank)
    for a in range(rank):
        w = windows[a]
        part = np.array([1.0, w.common / max(w.counts.mean(), 1e-12) if a in used else 0.0])
        shared = shared * part.reshape([2 if k == a else 1 for k in range(2 * rank)])
    sign = 1.0 if op.primitive is p.reduce_window_max_p else -1.0
    source = largest(value, shape, np.full((1,) * rank, mean.mean()), one, other, n, sign, shared)

    def back(l: Lattice) -> Lattice:
        for a in used:
            near, far = parted(l, a)
            near, far = near.mean(rank + a, keepdims=True), far.mean(rank + a, keepdims=True)
            uses = float(windows[a].uses.mean())
            l = joined(near, far * uses / max(windows[a].counts.mean(), 1e-12), a)
        return settled(l * math.prod(windows[a].out / windows[a].size for a in used), value.shape)

    return env.made(source, [(value, back)], of_windows(value, windows) | ({POOLED} if n > 1 else set()))


RULES: dict[Any, Rule] = {
    p.reduce_window_sum_p: window_sum,
    p.reduce_window_max_p: window_max,
    p.reduce_window_min_p: window_max,
}
