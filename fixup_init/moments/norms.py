"""Normalizations, whose statistics depend on all that they normalize."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution
from fixup_init.moments.environment import of_gradients
from fixup_init.moments.interpreter import Interpreter
from fixup_init.moments.lattice import Lattice, projected, same, settled
from fixup_init.moments.polynomials import is_linear, kin_of, mean_of, moments_of
from fixup_init.moments.reshaping import reshaped
from fixup_init.moments.spectrum import Spectrum
from fixup_init.moments.values import Node, Source, Value, Way, known, of_source, sole_source, unit, unknown
from fixup_init.program import Op
from fixup_init.quadrature import X

_REDUCING = frozenset({
    p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_window_sum_p, p.dot_general_p, p.psum_p,
})  # fmt: skip
FEW = "gradient approximate: a variance over few or dependent entries, near zero in groups whose gradients dominate"
EXTREMES = "gradient approximate: what comes by the largest and smallest entries, which divide the others, is left out"
_FREEDOM = 5.0  # degrees of freedom of a variance; below, the mean of 1/s^2 has a variance that is not finite
_SMALL = 1e-3  # of the second moment: a change that is left out, so that a source stays the one it was

_SQUARING = frozenset({
    p.mul_p, p.square_p, p.integer_pow_p, p.pow_p, p.sqrt_p, p.rsqrt_p, p.dot_general_p, p.reduce_max_p,
})  # fmt: skip


def has_squares(ops: Sequence[Op]) -> bool:
    """Whether a normalization divides by a size; one by a plain sum gives shares, which have a rule of their own."""
    return any(op.primitive in _SQUARING for op in ops)


class Normalization:
    """Evaluates the region of a normalization: what it divides by is a number, and what it takes off a projection.

    Inside, x stands for x sqrt(E s^2) / s, whose own standard deviation does not fluctuate any more (`spectrum`), so
    that statistics that are sums of squares are their expectation; a mean over some axes is a random value, and
    x - mean(x) has the lattice of x less that of the mean.

    Args:
      source: value that is normalized.
      axes: of the statistics.
      size: shape of the source.
      ops: the region, in order.
      shape_of: shapes of the program's values.
    """

    def __init__(
        self, source: int, axes: tuple[int, ...], size: tuple[int, ...], ops: Sequence[Op],
        shape_of: Callable[[int], tuple[int, ...]],
    ) -> None:  # fmt: skip
        self.source, self.along, self.size, self.first = source, axes, size, ops[0]
        self.grouped, self.axes, self.centred = _groups(source, axes, size, ops, shape_of)
        self.extremes = any(op.primitive in (p.reduce_max_p, p.reduce_min_p) for op in ops)
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
        n = math.prod(self.grouped[a] for a in self.axes)
        if n <= 1:
            return dataclasses.replace(value)
        lattice = reshaped(source.second, self.size, self.grouped)
        if self.centred:
            lattice = projected(lattice, self.axes, self.grouped)
        node = env.node(value)
        fan = 0
        if node is not None and node.layer is not None:
            apart = math.prod(self.size[a] for a in self.along if a not in node.layer.axes)
            fan = node.layer.fan * max(n // max(apart, 1), 1)  # weights of all units of a group
        wide = Spectrum.of(lattice, self.axes, self.grouped, self.centred)
        spectrum = Spectrum.of(lattice, self.axes, self.grouped, self.centred, fan) if fan else wide
        more = spectrum.normalized(lattice) - lattice
        if np.abs(more).max() > _SMALL * same(lattice, len(self.grouped)).mean():
            second = settled(source.second + reshaped(more, self.grouped, self.size), self.size)
            raw = source
            source = Source(
                self.size, raw.mean, second, raw.quantile, raw.relatives, alike=(raw, (second + raw.second) / 2)
            )
            source.linear_in, source.uses = raw.likes, raw.uses
        alias = of_source(source)
        alias.notes = value.notes
        if node is not None:

            def back(spectrum: Spectrum, l: Lattice) -> Lattice:
                """Less its part along the normalized value itself."""
                pulled = spectrum.pulled(reshaped(l, self.size, self.grouped))
                return settled(reshaped(pulled, self.grouped, self.size), self.size)

            notes = of_gradients(value.notes)
            if spectrum.freedom < _FREEDOM:
                notes |= {FEW}
            if self.extremes:
                notes |= {EXTREMES}
            onward = functools.partial(back, wide) if fan else None
            pull = functools.partial(back, spectrum)
            way = Way(node, pull, notes=notes, ends=True, onward=onward, aligned=True)
            made = Node(next(env.nodes), self.size, [way], list(alias.terms), copy_of=(node, np.ones(())))
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
        whole = sole_source(value.terms)
        if whole is not None:
            source.linear_in, source.uses = whole.likes, whole.uses
            raw = whole.alike[0] if whole.alike is not None else whole
            source.alike = (raw, source.second) if raw.shape == shape else None
        made = env.made(source, [(value, project)], aligned=True)
        for node in made.slopes:
            node.copy_of = node.inputs[0].node.copy_of
        return made


def _groups(
    source: int, axes: tuple[int, ...], size: tuple[int, ...], ops: Sequence[Op],
    shape_of: Callable[[int], tuple[int, ...]],
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:  # fmt: skip
    """The shape in which statistics are taken (group norm splits channels), their axes, and whether a mean goes off."""
    region, statistics = {source}, set[int]()
    grouped: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    centred = False
    for op in ops:
        inside = [v for v in op.inputs if v in region]
        if not inside:
            continue
        if op.primitive is p.reduce_sum_p and math.prod(shape_of(op.inputs[0])) == math.prod(size):
            grouped = grouped or (shape_of(op.inputs[0]), tuple(op.params["axes"]))
        taken_off = {v in statistics for v in inside} == {False, True}
        centred |= taken_off and op.primitive in (p.sub_p, p.add_p)
        region.update(op.outputs)
        if op.primitive in _REDUCING or all(v in statistics for v in inside):
            statistics.update(op.outputs)
    return (*(grouped or (size, axes)), centred)
