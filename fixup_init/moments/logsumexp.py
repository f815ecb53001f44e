"""log sum exp and log softmax as a whole, whose exponentials and logarithm depend on each other.

With scores s_k = c + z_k of a part c in common and independent z_k, L = log sum_k e^(s_k) is c + Lambda(z), of which
mean and variance are exact. Cov(s_k, L) = sum_l E a_l Cov(s_k, s_l) by Stein's lemma, with the weights a of a softmax,
so that s - L is known too. Backward the slope of L in s_k is a_k, and a cotangent g of s - L comes to s_k as
g_k - a_k sum_l g_l; operation by operation e^(s_k) and 1 / sum_l e^(s_l) would be independent, and their product larger
by far.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.interpreter import Interpreter
from fixup_init.moments.lattice import Lattice, kept, settled, widened
from fixup_init.moments.polynomials import kin_of, moments_of
from fixup_init.moments.softmax import CASTS, INSIDE, PASSED, is_reduced, log_sum_moments, softmax_of, walker
from fixup_init.moments.values import Source, Value, unknown
from fixup_init.program import Op, Program

__all__ = ["LogSum", "log_sums"]


@dataclasses.dataclass(frozen=True)
class LogSum:
    """L = log sum exp(s) over axes of s.

    Attributes:
      scores: the value s.
      axes: of the sum.
      ends: the operations that make L: the logarithm, or the sum with what was taken off s before.
      less: those that make s - L, a log softmax.
      inside: those before, from the exponential on.
    """

    scores: int
    axes: tuple[int, ...]
    ends: tuple[Op, ...]
    less: tuple[Op, ...]
    inside: tuple[Op, ...] = ()

    def within(self, env: Interpreter, op: Op) -> list[Value]:
        """A step on the way to L, which nothing depends on where L is known."""
        found = env.attempt(op)
        if env.read(self.scores).visible is not None:
            return found
        return [unknown(v.shape, f"unknown: {INSIDE}") if v.unknown else v for v in found]

    def logarithm(self, env: Interpreter, op: Op) -> list[Value]:
        """L, of which the slope is the softmax."""
        scores, shape = env.read(self.scores), env.program.shape(op.outputs[0])
        if scores.unknown or scores.is_constant or scores.visible is not None:
            return env.apply(op)
        mean, _, covariance = self._moments(scores)
        dropped = sorted(self.axes) if len(shape) < scores.rank else []
        for a in reversed(dropped):
            covariance = np.take(covariance, 0, a).mean(covariance.ndim // 2 - 1 + a)
        weights = moments_of(softmax_of(env, scores, self.axes))[1]
        second = settled(covariance + mean**2, shape)
        source = Source(shape, np.full((1,) * len(shape), mean), second, None, kin_of(scores.terms))

        def back(l: Lattice) -> Lattice:
            return settled(widened(l, dropped) * weights, scores.shape)

        return [env.made(source, [(scores, back)])]

    def log_softmax(self, env: Interpreter, op: Op) -> list[Value]:
        """s - L."""
        scores = env.read(self.scores)
        if scores.unknown or scores.is_constant or scores.visible is not None:
            return env.apply(op)
        shape, n = scores.shape, math.prod(scores.shape[a] for a in self.axes)
        mean, own, covariance = self._moments(scores)
        weights = moments_of(softmax_of(env, scores, self.axes))[1]
        apart = float(moments_of(scores)[0].mean()) - mean
        second = settled(own + covariance - 2 * kept(own, self.axes, shape) / n + apart**2, shape)
        source = Source(shape, np.full((1,) * len(shape), apart), second, None, kin_of(scores.terms))

        def back(l: Lattice) -> Lattice:
            near = kept(l, self.axes, shape)  # E g_k sum_l g_l
            return settled(l - near * 2 / n + weights * near * n, shape)

        return [env.made(source, [(scores, back)])]

    def _moments(self, scores: Value) -> tuple[float, Lattice, Lattice]:
        """The mean of L, and the covariances of s and of L, this one repeated along the axes."""
        rank, shape = scores.rank, scores.shape
        mean, second = moments_of(scores)
        centre = float(mean.mean())
        own = second.mean(tuple(range(rank, 2 * rank)), keepdims=True) - centre**2
        common = functools.reduce(lambda l, a: np.repeat(np.take(l, [1], a), 2, a), self.axes, own)
        near = functools.reduce(lambda l, a: np.repeat(np.take(l, [0], a), 2, a), self.axes, own)
        apart = np.maximum(near - common, 0.0)  # of z, in the same and in other rows
        variance = float(apart[(0,) * rank].mean())
        shift, strays = log_sum_moments(round(variance, 9), math.prod(shape[a] for a in self.axes))
        share = apart / variance if variance > 0 else apart
        return centre + shift, own, common + strays * np.minimum(share, 1.0)


def log_sums(program: Program) -> list[LogSum]:
    """Every log sum exp of a program, with or without a shift by the largest score."""
    maker = {v: op for op in program.ops for v in op.outputs}
    back = walker(maker)
    found = []
    for op in program.ops:
        if op.primitive is not p.log_p:
            continue
        _, total = back(op.inputs[0], PASSED | {p.abs_p})
        if total is None or total.primitive is not p.reduce_sum_p:
            continue
        _, exponential = back(total.inputs[0], CASTS)
        if exponential is None or exponential.primitive is not p.exp_p:
            continue
        axes, scores = tuple(total.params["axes"]), exponential.inputs[0]
        shape, logarithm = program.shape(scores), op.outputs[0]
        if not is_reduced(program.shape(logarithm), shape, axes):
            continue
        less = [o for o in program.ops if o.primitive is p.sub_p and o.inputs[0] == scores
                and back(o.inputs[1])[0] == logarithm]  # fmt: skip
        ends = [op]
        _, shifted = back(scores, CASTS)
        if shifted is not None and shifted.primitive is p.sub_p:
            shift = back(shifted.inputs[1])[0]
            if is_reduced(program.shape(shift), shape, axes):  # the same for all scores of a sum, which it leaves
                scores = shifted.inputs[0]
                ends = [o for o in program.ops if o.primitive is p.add_p
                        and program.shape(o.outputs[0]) == program.shape(logarithm)
                        and {back(v)[0] for v in o.inputs} == {logarithm, shift}]  # fmt: skip
        if ends or less:
            found.append(LogSum(scores, axes, tuple(ends), tuple(less), (exponential, total, op)))
    return found
