"""Normalizations, whose statistics depend on all that they normalize."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fixup_init.jaxprs import Op, p
from fixup_init.moments.distributions import distribution
from fixup_init.moments.interpreter import Interpreter
from fixup_init.moments.lattice import Lattice, projected, settled
from fixup_init.moments.polynomials import is_linear, kin_of, mean_of, moments_of
from fixup_init.moments.reshaping import reshaped
from fixup_init.moments.values import Node, Source, Value, Way, known, of_source, unit, unknown
from fixup_init.quadrature import X

_REDUCING = frozenset({
    p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_window_sum_p, p.dot_general_p, p.psum_p,
})  # fmt: skip

_SQUARING = frozenset({
    p.mul_p, p.square_p, p.integer_pow_p, p.pow_p, p.sqrt_p, p.rsqrt_p, p.dot_general_p, p.reduce_max_p,
})  # fmt: skip


def has_squares(ops: Sequence[Op]) -> bool:
    """Whether a normalization divides by a size; one by a plain sum gives shares, which have a rule of their own."""
    return any(op.primitive in _SQUARING for op in ops)


class Normalization:
    """Evaluates the region of a normalization: what it divides by is a number, and what it takes off a projection.

    Statistics that are sums of squares are taken at their expectation, which the law of large numbers permits; a mean
    over some axes is a random value, and x - mean(x) has the lattice of x less that of the mean.

    Args:
      source: value that is normalized.
      axes: of the statistics.
      size: shape of the source.
      first: the earliest operation of the region.
    """

    def __init__(self, source: int, axes: tuple[int, ...], size: tuple[int, ...], first: Op) -> None:
        self.source, self.axes, self.size, self.first = source, axes, size, first
        self.alias: Value | None = None
        self.statistics: set[int] = set()
        self.region: set[int] = set()
        self.over: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # shape in which means are taken, and axes

    def __call__(self, env: Interpreter, op: Op) -> list[Value]:
        if op is self.first or self.alias is None:
            self.alias = self._start(env)
        if self.alias.unknown:
            return [unknown(env.program.shape(v), self.alias.unknown) for v in op.outputs]
        own = env.values[self.source]
        env.values[self.source] = self.alias
        try:
            inputs = [env.read(v) for v in op.inputs]
            results = env.apply(op)
        finally:
            env.values[self.source] = own
        results = [self._taken(env, op, inputs, v, r) for v, r in zip(op.outputs, results, strict=True)]
        self.region.update(op.outputs)
        return results

    def _start(self, env: Interpreter) -> Value:
        """What stands for the source inside of the region: one whose cotangent is that of a normalization."""
        value = env.read(self.source)
        if value.unknown or value.is_constant:
            return dataclasses.replace(value)
        source = env.collapse(value)
        assert source is not None
        alias = of_source(source)
        alias.notes = value.notes
        node = env.node(value)
        if node is not None:
            n = math.prod(self.size[a] for a in self.axes)

            def back(l: Lattice) -> Lattice:
                """Less its part along the normalized value itself."""
                inside = tuple(0 if a in self.axes else slice(None) for a in range(len(self.size)))
                l = l.copy()
                l[inside] = l[inside] * (1 - 1 / n)
                return l * _inverse_variance(n - (self.over is not None))

            made = Node(next(env.nodes), self.size, [Way(node, back if n > 1 else lambda l: l)], list(alias.terms))
            alias.slopes = {made: unit(len(self.size))}
        return alias

    def _taken(self, env: Interpreter, op: Op, inputs: list[Value], output: int, result: Value) -> Value:
        """A result inside of the region: statistics at their expectation, differences from means as projections."""
        if result.unknown or not any(v == self.source or v in self.region for v in op.inputs):
            return result
        linear = all(len(f) <= 1 and all(h is X for h in f.values()) for _, f in result.terms)
        inside = [v for v in op.inputs if v == self.source or v in self.region]
        reduced = op.primitive in _REDUCING
        if reduced or all(v in self.statistics for v in inside):
            self.statistics.add(output)
            if reduced:
                straight = op.primitive is p.reduce_sum_p and is_linear(inputs[0].terms)
                if straight:
                    self.over = inputs[0].shape, tuple(op.params["axes"])
                linear = straight or (linear and inside[0] in self.statistics)
            if linear and not result.is_constant:
                return dataclasses.replace(result, slopes={})
            return known(result.shape, mean_of(result.terms, result.rank), profile=True)
        means = [k for k, v in enumerate(op.inputs) if v in self.statistics and not inputs[k].is_constant]
        if op.primitive in (p.sub_p, p.add_p) and len(means) == 1 and self.over is not None:
            return self._centred(env, inputs[1 - means[0]], inputs[means[0]], result)
        return result

    def _centred(self, env: Interpreter, value: Value, mean: Value, result: Value) -> Value:
        """A value less its mean."""
        m, second = moments_of(value)
        n = mean_of(mean.terms, mean.rank)
        shape = value.shape
        assert self.over is not None
        grouped, axes = self.over
        if math.prod(grouped) != math.prod(shape):
            return result

        def project(l: Lattice) -> Lattice:
            return settled(reshaped(projected(reshaped(l, shape, grouped), axes, grouped), grouped, shape), shape)

        source = Source(shape, m - n if m.any() else m * 0.0, project(second), distribution(value.terms),
                        kin_of(value.terms))  # fmt: skip
        return env.made(source, [(value, project)])


def _inverse_variance(freedom: int) -> float:
    """E 1/s^2 over 1 / E s^2 of a variance s^2 with so many degrees of freedom; of five where it has fewer."""
    freedom = max(freedom, 5)
    return freedom / (freedom - 2)
