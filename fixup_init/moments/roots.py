"""Lengths: the root of a sum of squares, and its gradient.

Of y = c |x| a cotangent g comes to x as g c x / |x|, where E x_k^2 / |x|^2 is one over the number of entries, whatever
their distribution. Taken operation by operation, x and 1 / |x| would be independent.
"""

from __future__ import annotations

import dataclasses
import math

from fixup_init.jaxprs import p
from fixup_init.moments.interpreter import Interpreter
from fixup_init.moments.lattice import Lattice, same, settled, widened
from fixup_init.moments.polynomials import moments_of
from fixup_init.moments.softmax import CASTS, is_reduced, walker
from fixup_init.moments.values import Node, Value, Way, unit
from fixup_init.program import Op, Program

__all__ = ["Root", "roots"]


@dataclasses.dataclass(frozen=True)
class Root:
    """sqrt(c^2 sum x^2 + epsilon) over axes of x, a norm or a standard deviation."""

    source: int
    axes: tuple[int, ...]
    end: Op

    def __call__(self, env: Interpreter, op: Op) -> list[Value]:
        x, value = env.read(self.source), env.apply(op)[0]
        node = None if x.unknown or value.unknown else env.node(x)
        if node is None:
            return [value]
        length = math.prod(x.shape[a] for a in self.axes) * float(same(moments_of(x)[1], x.rank).mean())  # E |x|^2
        if not length > 0:
            return [value]
        size = math.sqrt(float(same(moments_of(value)[1], value.rank).mean())) / length  # c / sqrt(E |x|^2)
        slope = [(size * k, factors) for k, factors in x.terms]
        direction = Node(next(env.nodes), x.shape, [Way(node, slope=slope)], list(x.terms))

        def back(l: Lattice) -> Lattice:
            return settled(widened(l, self.axes if value.rank < x.rank else ()), x.shape)

        if (source := env.collapse(value)) is None:
            return [value]
        return [env.made(source, [(Value(x.shape, slopes={direction: unit(x.rank)}), back)], value.notes)]


def roots(program: Program) -> list[Root]:
    """Every root of a sum of squares of a program."""
    maker = {v: op for op in program.ops for v in op.outputs}
    back = walker(maker)
    fixed = set(program.constants)
    for op in program.ops:
        if fixed.issuperset(op.inputs):
            fixed.update(op.outputs)
    found = []
    for op in program.ops:
        if op.primitive is not p.sqrt_p:
            continue
        _, total = back(op.inputs[0])
        while total is not None and total.primitive in (p.mul_p, p.div_p, p.add_p, p.max_p, p.select_n_p):
            varied = [v for v in total.inputs if v not in fixed]
            if len(varied) != 1:
                break
            _, total = back(varied[0])
        if total is None or total.primitive is not p.reduce_sum_p:
            continue
        _, square = back(total.inputs[0], CASTS)
        if square is None or not _squares(square):
            continue
        axes, before = tuple(total.params["axes"]), program.shape(square.inputs[0])
        if is_reduced(program.shape(op.outputs[0]), before, axes):
            found.append(Root(square.inputs[0], axes, op))
    return found


def _squares(op: Op) -> bool:
    if op.primitive is p.mul_p:
        return op.inputs[0] == op.inputs[1]
    return op.primitive is p.square_p or (op.primitive is p.integer_pow_p and op.params["y"] == 2)
