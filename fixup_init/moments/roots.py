"""Lengths: the root of a sum of squares, and its gradient.

Of y = c |x| a cotangent g comes to x as g c x / |x|, where E x_k^2 / |x|^2 is one over the number of entries, whatever
their distribution. Taken operation by operation, x and 1 / |x| would be independent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

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
    total: Op  # the sum
    end: Op
    alone: bool  # whether what lies between is used for nothing else

    def __call__(self, env: Interpreter, op: Op) -> list[Value]:
        x, value = env.read(self.source), env.apply(op)[0]
        node = None if x.unknown or value.unknown else env.node(x)
        if node is None or not self.alone:
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
        _only_shown(env.node(env.read(self.total.inputs[0])))
        straight = Value(x.shape, slopes={direction: unit(x.rank)})
        return [env.made(source, [(straight, back), (value, lambda l: l)], value.notes)]


def _only_shown(squares: Node | None) -> None:
    """Cotangents of squares are shown, but go on to what is squared by another way."""
    while squares is not None and [w.keeps for w in squares.inputs] == [True]:
        squares = squares.inputs[0].node
    if squares is not None:
        squares.inputs = [w if w.node.meter else Way(w.node, np.zeros_like) for w in squares.inputs]


def roots(program: Program) -> list[Root]:
    """Every root of a sum of squares of a program."""
    maker = {v: op for op in program.ops for v in op.outputs}
    back = walker(maker)
    fixed = set(program.constants)
    for op in program.ops:
        if fixed.issuperset(op.inputs):
            fixed.update(op.outputs)
    users: dict[int, list[Op]] = {}
    for op in program.ops:
        for v in op.inputs:
            users.setdefault(v, []).append(op)
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
            source = square.inputs[0]
            found.append(Root(source, axes, total, op, _is_alone(program, maker, users, source, op)))
    return found


def _is_alone(program: Program, maker: Mapping[int, Op], users: Mapping[int, list[Op]], source: int, end: Op) -> bool:
    """Whether all between a value and an operation is made for that alone."""
    between, todo = set[int](), [v for v in end.inputs if v in maker]
    while todo:
        value = todo.pop()
        if value not in between and value != source:
            between.add(value)
            todo += [v for v in maker[value].inputs if v in maker]
    on_way, todo = set[int](), [source]
    while todo:
        for user in users.get(todo.pop(), ()):
            new = [v for v in user.outputs if v in between and v not in on_way]
            on_way.update(new)
            todo += new
    inside = all(u is end or on_way.issuperset(u.outputs) for v in on_way for u in users.get(v, ()))
    return inside and not on_way.intersection(program.outputs)


def _squares(op: Op) -> bool:
    if op.primitive is p.mul_p:
        return op.inputs[0] == op.inputs[1]
    return op.primitive is p.square_p or (op.primitive is p.integer_pow_p and op.params["y"] == 2)
