"""Products with weights and of values: `dot_general`, as an einsum of lattices."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution
from fixup_init.moments.environment import Environment, Rule
from fixup_init.moments.lattice import Lattice, contracted, mean_contracted, settled, widened
from fixup_init.moments.neighbours import of_matrix
from fixup_init.moments.polynomials import DEPENDENT, kin_of, moments_of, times
from fixup_init.moments.values import Layer, Source, Term, Value
from fixup_init.program import Op


def dot(env: Environment, op: Op, args: list[Value]) -> Value:
    """A general product: axes get names, those of a batch and those that are summed the same on both sides."""
    contract, batch = op.params["dimension_numbers"]
    left, right = args
    shape = env.program.shape(op.outputs[0])
    names: list[list[Any]] = [[None] * left.rank, [None] * right.rank]
    sizes: dict[Any, int] = {}
    for side, value in enumerate((left, right)):
        for k, a in enumerate(batch[side]):
            names[side][a] = f"b{k}"
        for k, a in enumerate(contract[side]):
            names[side][a] = f"c{k}"
        for a in range(value.rank):
            names[side][a] = names[side][a] or f"{'xy'[side]}{a}"
            sizes[names[side][a]] = value.shape[a]
    out = [f"b{k}" for k in range(len(batch[0]))]
    out += [a for side in (0, 1) for a in names[side] if a[0] == "xy"[side]]
    return einsum(env, shape, (left, right), names, out, sizes, env.weights(op), id(op))


def einsum(
    env: Environment, shape: tuple[int, ...], args: tuple[Value, Value], names: Sequence[Sequence[Any]],
    out: Sequence[Any], sizes: Mapping[Any, int], weight: Sequence[bool], use: int = 0,
) -> Value:  # fmt: skip
    """Sums of products of two values, axes by name; `weight` says which of them are random weights, and
    `use` which operation it is."""
    moments = [moments_of(a) for a in args]
    second = contracted(moments[0][1], names[0], moments[1][1], names[1], out, sizes)
    mean = mean_contracted(moments[0][0], names[0], moments[1][0], names[1], out, sizes)
    gone = [a for a in dict.fromkeys((*names[0], *names[1])) if a not in out]
    n = math.prod(sizes[a] for a in gone)
    notes = set[str]()
    kin = kin_of(args[0].terms) | kin_of(args[1].terms)
    if any(weight) and not mean.any():
        kin = frozenset()  # a random sign stands between
    if kin_of(args[0].terms) & kin_of(args[1].terms):
        notes.add(DEPENDENT)
    quantile = None
    if n < 4:
        quantile = distribution(times(_scalar(args[0]), _scalar(args[1])))
    source = Source(shape, mean, settled(second, shape), quantile, kin)
    shapes = [tuple(sizes[a] for a in axes) for axes in names]

    def back(side: int, cotangent: Lattice) -> Lattice:
        other = 1 - side
        missing = [a for a in names[side] if a not in out and a not in names[other]]
        inner = [a for a in names[side] if a not in missing]
        found = contracted(cotangent, list(out), moments[other][1], names[other], inner, sizes)
        new = [k for k, a in enumerate(names[side]) if a in missing]
        return settled(widened(found, new), shapes[side])

    for side, value in enumerate(args):
        if value.array is not None:
            inner = [a for a in names[side] if a not in out]
            rows = [a for a in names[side] if a in out]
            if value.array.ndim == 2 and len(inner) == len(rows) == 1:
                matrix = np.broadcast_to(value.array, value.shape).astype(np.float64)
                notes |= of_matrix(args[1 - side], matrix if names[side][0] == rows[0] else matrix.T)
    layer = None
    if weight[0] != weight[1]:
        axes = tuple(k for k, a in enumerate(out) if a[0] == "xy"[weight[1]])
        parameter = kin_of(args[weight.index(True)].terms)
        layer = Layer(math.prod(shape[k] for k in axes), axes, n, n, parameter)
        source.uses = frozenset((w, use) for w in parameter)
    ways = [(args[0], functools.partial(back, 0)), (args[1], functools.partial(back, 1))]
    return env.made(source, ways, notes, layer=layer)


def _scalar(value: Value) -> list[Term]:
    """A polynomial's average over positions, as one of scalars' coefficients."""
    return [(np.full((), float(c.mean())), f) for c, f in value.terms]


RULES: dict[Any, Rule] = {
    p.dot_general_p: dot,
}
