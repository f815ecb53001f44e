"""The forward pass: a program's operations in order, by their rules; scans pass by pass.

What no rule covers makes its results unknown, and what is made of these, each with the reason. With `strict` a rule
that fails raises instead. Operations on constants are evaluated as they are, as far as the arrays are small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fixup_init import jaxprs, quadrature, running
from fixup_init.jaxprs import p
from fixup_init.moments import complex_numbers, random_bits
from fixup_init.moments.bounds import Bounds, stacked
from fixup_init.moments.elementwise import elementwise
from fixup_init.moments.environment import MOST, Environment, NoRule, bent_by
from fixup_init.moments.rules import RULES, rule_of
from fixup_init.moments.values import ANYWHERE, Node, Reach, Value, Way, known, unit, unknown
from fixup_init.program import CARRY_IN, CHOOSE, STACK_OUT, Marker, Op, Program

# Operations that say the same of an array as of one that only repeats it.
_PLAIN = frozenset({p.gather_p, p.slice_p, p.concatenate_p, p.transpose_p, p.reshape_p, p.squeeze_p})

_COMPOSED: dict[Any, Program] = {}


class Interpreter(Environment):
    """Evaluates a program in the moments domain.

    Args:
      program: what to evaluate.
      rows: below which whole numbers of data lie.
      taps: values whose nodes are kept.
    """

    def __init__(self, program: Program, rows: int = 2, taps: Iterable[int] = ()) -> None:
        super().__init__(program, rows)
        self.taps = frozenset(taps)
        self.tapped: dict[tuple[int, tuple[int, ...]], tuple[Node | None, Value]] = {}
        self.instead: dict[int, Callable[[Op], list[Value]]] = {}  # by id of an operation: what to do with it
        self.is_activation: Callable[[int], bool] = lambda value: False
        self.bounds = Bounds(program)
        self.strict = False  # whether a rule that fails raises

    def run(self, ops: Sequence[Op], level: int = 0) -> None:
        """Evaluates operations in order; a scan's body once for each pass."""
        k = 0
        while k < len(ops):
            op = ops[k]
            loop = _loop_at(op, level)
            if loop is None:
                self.one(op)
                k += 1
                continue
            end = k
            while end < len(ops) and _loop_at(ops[end], level) is loop:
                end += 1
            self.scan(loop, ops[k:end], level)
            k = end

    def scan(self, loop: Any, body: Sequence[Op], level: int) -> None:
        """Evaluates a scan's body for each of its passes; `level` scans are around it."""
        outs: dict[int, list[Value]] = {}
        stacked = [
            op.inputs[0] for op in self.program.ops
            if op.primitive is STACK_OUT and any(op.inputs[0] in b.outputs for b in body)
        ]  # fmt: skip
        carried = [op for op in body if op.primitive is CARRY_IN and op.loop is loop]
        rest = [op for op in body if not (op.primitive is CARRY_IN and op.loop is loop)]
        starts = {op.outputs[0]: self.read(op.inputs[0]) for op in carried}
        self.values.update(starts)
        for done in range(loop.length):
            self.at = (*self.at, done)
            for op in carried:
                self.tap(op)
            self.run(rest, level + 1)
            self.at = self.at[:-1]
            for v in stacked:
                outs.setdefault(v, []).append(self.read(v))
            nexts = {carry: self.read(out) for carry, out in loop.carries if carry in starts}
            if done < loop.length - 1:
                self.values.update(nexts)
        for v in stacked:
            self.values[v] = outs[v][-1]
            self.stacks[v] = outs[v]

    def one(self, op: Op) -> None:
        """Evaluates an operation, and records why its results are not known where no rule covers it."""
        results = self.attempt(op, self.instead.get(id(op)))
        reach = self.reach(op)
        for v, value in zip(op.outputs, results, strict=True):
            value.reach = reach
            self.values[v] = value
        self.tap(op)

    def attempt(self, op: Op, handler: Callable[[Op], list[Value]] | None = None) -> list[Value]:
        """The results of an operation, unknown where no rule covers it."""
        try:
            with np.errstate(all="ignore"):
                return handler(op) if handler is not None else self.apply(op)
        except NoRule as none:
            return [unknown(self.program.shape(v), f"unknown: {none}") for v in op.outputs]
        except (ValueError, IndexError, TypeError, KeyError, AssertionError, ArithmeticError) as error:
            if self.strict:
                raise
            del error  # a form of the operation that its rule does not foresee
            why = f"unknown: no rule for this use of `{op.name}`"
            return [unknown(self.program.shape(v), why) for v in op.outputs]

    def reach(self, op: Op) -> Reach:
        """What the results of an operation can be."""
        if op.primitive is STACK_OUT:
            return stacked(op, self.stacks.get(op.inputs[0], [self.read(op.inputs[0])]))
        if op.primitive is CHOOSE:
            return ANYWHERE
        return self.bounds.of(op, [self.read(v) for v in op.inputs], self.read)

    def tap(self, op: Op) -> None:
        """Keeps the results that are tapped, with their nodes."""
        for v in op.outputs:
            if v in self.taps:
                value = self.values[v]
                if not value.unknown and not value.slopes and self.is_activation(v):  # behind whole numbers
                    root = Node(next(self.nodes), value.shape, [], list(value.terms))
                    value.slopes = {root: unit(value.rank)}
                node = None if value.unknown else self.meter(value)
                if value.imaginary is not None:
                    self.node(value.imaginary)
                self.tapped[v, self.at] = (node, dataclasses.replace(value, terms=list(value.terms)))

    def meter(self, value: Value) -> Node | None:
        """A node that shows the cotangent of a value, whose slopes stay: functions of it compose with it."""
        straight = all(not factors for terms in value.slopes.values() for _, factors in terms)
        if straight or value.imaginary is not None:
            return self.node(value)
        ways = [Way(node, slope=terms, notes=bent_by(value, terms)) for node, terms in value.slopes.items()]
        made = Node(next(self.nodes), value.shape, ways, list(value.terms), meter=True)
        value.slopes = {**value.slopes, made: unit(value.rank)}
        return made

    def apply(self, op: Op) -> list[Value]:
        """The results of an operation, by its rule."""
        args = [self.read(v) for v in op.inputs]
        shapes = [self.program.shape(v) for v in op.outputs]
        primitive: Any = op.primitive
        if (drawn := random_bits.drawn(op, shapes)) is not None:
            return drawn
        if jaxprs.is_platform(primitive):  # arms that compute the same, each for its own platform
            return [known((), np.zeros((), np.int32))]
        if primitive is p.iota_p and not op.inputs:
            return [_iota(op, shapes[0])]
        if args and all(a.array is not None for a in args):
            found = self.constants(op, args, shapes)
            if found is not None:
                return found
        other = self.bounds.beside(op)
        if other is not None and self.program.shape(other) == args[0].shape and args[0].imaginary is None:
            return self.composed("above", _above, [args[0], self.read(other)])
        if complex_numbers.concerns(self, op, args):
            return complex_numbers.complex_operation(self, op, args, self.by_rule, self.composed)
        return self.by_rule(op, args)

    def composed(self, name: Any, function: Callable[..., Any], args: list[Value]) -> list[Value]:
        """The results of a JAX function of real arrays; `name` says which it is."""
        key = name, tuple(a.shape for a in args)
        if key not in _COMPOSED:
            closed, _ = jaxprs.jaxpr_of(function, *(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in args))
            _COMPOSED[key] = jaxprs.flatten(closed)
        program = _COMPOSED[key]
        inner = Interpreter(program, self.rows)
        inner.nodes, inner.at, inner.strict = self.nodes, self.at, self.strict
        inner.values.update(zip(program.inputs, args, strict=True))
        inner.run(program.ops)
        return [inner.read(v) for v in program.outputs]

    def by_rule(self, op: Op, args: list[Value]) -> list[Value]:
        """The results of an operation on real values."""
        primitive: Any = op.primitive
        shapes = [self.program.shape(v) for v in op.outputs]
        rule = rule_of(primitive)
        if rule is None and quadrature.is_elementwise(primitive):
            rule = elementwise
        bad = next((a for a in args if a.unknown), None) if primitive is not CHOOSE else args[-1]
        if bad is not None and bad.unknown:
            return [unknown(s, bad.unknown) for s in shapes]
        tail = next((a.tail for a in args if a.tail), "") if rule is not elementwise else ""
        if tail:
            raise NoRule(tail)
        if rule is None:
            raise NoRule(f"no rule for `{op.name}`")
        results = rule(self, op, args)
        return results if isinstance(results, list) else [results]

    def constants(self, op: Op, args: Sequence[Value], shapes: Sequence[tuple[int, ...]]) -> list[Value] | None:
        """The results of an operation on constants."""
        primitive: Any = op.primitive
        profile = any(a.array is not None and a.array.size > 1 and a.is_constant for a in args)
        if quadrature.is_elementwise(primitive):
            rank = len(shapes[0])
            arrays = [a.array for a in args if a.array is not None]
            arrays = np.broadcast_arrays(*(x.reshape((1,) * (rank - x.ndim) + x.shape) for x in arrays))
        elif primitive is p.broadcast_in_dim_p:
            inner = args[0].array
            assert inner is not None
            shape = [1] * len(shapes[0])
            for a, d in enumerate(op.params["broadcast_dimensions"]):
                shape[d] = inner.shape[a]
            return [known(shapes[0], inner.reshape(shape), profile)]
        elif not isinstance(primitive, Marker) and all(
            math.prod(s) <= MOST for s in (*shapes, *(a.shape for a in args))
        ):
            if primitive in (p.dot_general_p, p.conv_general_dilated_p):
                return None
            repeats = any(a.array is not None and a.array.size < math.prod(a.shape) for a in args)
            if repeats and primitive in RULES and primitive not in _PLAIN:
                return None
            arrays = [np.broadcast_to(a.array, a.shape) for a in args]  # pyright: ignore
        else:
            return None
        try:
            dtypes = [self.program.dtype(v) for v in op.inputs]
            found = running.bind(op, [jnp.asarray(x, d) for x, d in zip(arrays, dtypes, strict=True)])
        except Exception:
            return None
        return [known(s, np.asarray(x), profile) for s, x in zip(shapes, found, strict=True)]


def _above(x: Any, y: Any) -> Any:
    """x - max(x, y), where x and y do not appear as if they were independent of the larger."""
    return jnp.minimum(x - y, 0.0)


def _loop_at(op: Op, level: int) -> Any:
    """The scan around an operation that has `level` scans around itself; None where there is none."""
    loops = []
    loop = op.loop
    while loop is not None:
        loops.append(loop)
        loop = loop.parent
    return loops[-1 - level] if len(loops) > level else None


def _iota(op: Op, shape: tuple[int, ...]) -> Value:
    """0, 1, 2 and so on, along one axis."""
    axis = op.params["dimension"]
    count = np.arange(shape[axis]).astype(op.params["dtype"])
    return known(shape, count.reshape([-1 if a == axis else 1 for a in range(len(shape))]))
