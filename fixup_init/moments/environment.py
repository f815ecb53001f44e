"""The values of a program, and how a rule makes new ones: what every rule is given."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution
from fixup_init.moments.lattice import Lattice
from fixup_init.moments.polynomials import DEPENDENT, are_dependent, kin_of, likes_of, moments_of, used_twice, uses_of
from fixup_init.moments.values import (
    Forward,
    Layer,
    Node,
    Source,
    Term,
    Trait,
    Use,
    Value,
    Way,
    function_of,
    is_unit,
    known,
    of_source,
    sole_source,
    unit,
    unknown,
)
from fixup_init.program import Op, Program

INDEPENDENTLY = "by operations whose results are taken as independent"
MOST = 1 << 24  # entries of a constant array that is looked through


class NoRule(Exception):
    """An operation, or a use of it, that no rule covers."""


class Environment:
    """Values of a program by their numbers, in the moments domain.

    Args:
      program: whose values these are.
      rows: below which whole numbers of data lie.
    """

    def __init__(self, program: Program, rows: int = 2) -> None:
        self.program = program
        self.rows = rows
        self.values: dict[int, Value] = {}
        self.at: tuple[int, ...] = ()  # the pass of every scan around the operation
        self.taken: dict[tuple[int, tuple[int, ...]], int] = {}  # by number and pass of a conditional
        self.stacks: dict[int, list[Value]] = {}  # by what a scan's body makes: its values in all passes
        self.nodes = itertools.count()
        self.paths: dict[int, str] = {}  # of parameters, by the numbers of sources
        self.is_weight: Callable[[int], bool] = lambda value: False
        self.calls = dict(_calls(program.steps))

    def read(self, value: int) -> Value:
        """A value by its number; a constant of the program is looked at when it is first read."""
        if value not in self.values:
            shape = self.program.shape(value)
            constant = self.program.constants.get(value)
            dtype = self.program.dtype(value)
            if constant is None or not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_):
                self.values[value] = unknown(shape, "unknown: a value that nothing gives")
            elif math.prod(shape) > MOST:
                self.values[value] = unknown(shape, "unknown: a constant array that is too large to look through")
            else:
                self.values[value] = known(shape, np.asarray(constant))
        return self.values[value]

    def node(self, value: Value) -> Node | None:
        """The node at which the cotangent of a value is known; None where it does not depend on inputs."""
        if not value.slopes:
            return None
        if len(value.slopes) == 1:
            ((node, terms),) = value.slopes.items()
            if is_unit(terms):
                return node
        inputs = _with_copies([
            Way(node, slope=terms, notes=bent_by(value, terms)) for node, terms in value.slopes.items()
        ])  # fmt: skip
        made = Node(next(self.nodes), value.shape, inputs, list(value.terms))
        if len(inputs) == 1 and (copy := inputs[0].node.copy_of) and (c := _factor(inputs[0].slope)) is not None:
            made.copy_of = copy[0], copy[1] * c
        value.slopes = {made: unit(value.rank)}
        return made

    def collapse(self, value: Value) -> Source | None:
        """Makes a value one source, in place; None where it is a constant."""
        if value.is_constant:
            return None
        if value.tail:
            raise NoRule(value.tail)
        if (found := sole_source(value.terms)) is not None:
            return found
        if are_dependent(value.terms):
            value.notes |= {DEPENDENT}
        mean, second = moments_of(value)
        source = Source(value.shape, mean, second, distribution(value.terms), kin_of(value.terms))
        source.uses, source.linear_in = uses_of(value.terms), likes_of(value.terms)
        node = self.node(value)
        if node is not None:
            node.source = source
        value.terms = function_of(source)
        return source

    def made(
        self, source: Source, inputs: Sequence[tuple[Value, Callable[[Lattice], Lattice]]], notes: Iterable[str] = (),
        keeps: bool = False, aligned: bool = False, back_notes: Iterable[str] | None = None, layer: Layer | None = None,
    ) -> Value:  # fmt: skip
        """A value that is a source of its own, with the way of cotangents back to what it was made of.

        Args:
          source: what it is.
          inputs: what it was made of, and how a cotangent goes back to each.
          notes: what to know about the value.
          keeps: whether entries are only moved.
          aligned: whether an entry is mostly the same entry of what it was made of.
          back_notes: what to know about cotangents that come this way; the same if nothing else is said.
          layer: the random weights that made it, if they did.
        """
        if layer is None:
            source.uses |= frozenset[Use]().union(*(uses_of(v.terms) for v, _ in inputs))
        value = of_source(source)
        notes = frozenset(notes)
        value.notes = notes.union(*(v.notes for v, _ in inputs))
        behind = of_gradients(notes if back_notes is None else back_notes)
        nodes = [(self.node(v), pull) for v, pull in inputs]
        back = [Way(n, pull, keeps=keeps, notes=behind, aligned=aligned) for n, pull in nodes if n is not None]
        if back:
            node = Node(next(self.nodes), source.shape, back, list(value.terms), layer=layer)
            value.slopes = {node: unit(value.rank)}
        if not np.any(source.second):
            value.terms = []
        return value

    def shared(self, args: Sequence[Value]) -> frozenset[str]:
        """What to know where values meet that one parameter made in different operations."""
        pairs = itertools.combinations(args, 2)
        weights = frozenset[int]().union(*(used_twice(a.terms, b.terms) for a, b in pairs))
        names = sorted({f"`{self.paths[w]}`" if w in self.paths else "a parameter" for w in weights})
        return frozenset(f"approximate: {name} is used several times, {INDEPENDENTLY}" for name in names)

    def weights(self, op: Op) -> tuple[bool, ...]:
        """Which arguments of an operation are random weights."""
        return tuple(self.is_weight(v) for v in op.inputs)


def _with_copies(ways: list[Way]) -> list[Way]:
    """Where a value and its normalized copy meet in a sum, a cotangent g comes back as (a + b) g, not as independent
    a g and b g: a^2 + 2 a b stands in the place of a^2."""
    factors = {way.node: _factor(way.slope) for way in ways}
    found = []
    for way in ways:
        own = factors[way.node]
        copies = [(factors[w.node], c[1]) for w in ways if (c := w.node.copy_of) and c[0] is way.node]
        if copies and own is not None and all(b is not None and (own * b * s >= 0).all() for b, s in copies):
            cross = sum((2 * own * b * s for b, s in copies if b is not None), own**2)
            way = dataclasses.replace(way, slope=[(np.sqrt(cross), {})], apart=True)
        found.append(way)
    return found


def _factor(slope: Sequence[Term]) -> np.ndarray | None:
    """A slope that does not depend on values."""
    return None if any(f for _, f in slope) else sum((c for c, _ in slope), np.zeros(()))


def of_gradients(notes: Iterable[str]) -> frozenset[str]:
    """Notes but for those that say nothing of gradients."""
    return frozenset(note for note in notes if not isinstance(note, (Forward, Trait)))


def bent_by(value: Value, slope: Sequence[Term]) -> frozenset[str]:
    """What to know about cotangents that a slope multiplies: all about the value, where the slope depends on it."""
    return of_gradients(value.notes) if any(factors for _, factors in slope) else frozenset()


Rule = Callable[[Environment, Op, list[Value]], Value | list[Value]]


def _calls(steps: Iterable[Op]) -> Iterable[tuple[int, Op]]:
    """Results of calls with a derivative of their own."""
    for step in steps:
        if step.body is not None:
            for part in step.body.parts:
                yield from _calls(part)
        elif step.primitive is p.custom_jvp_call_p and len(step.outputs) == 1:
            yield step.outputs[0], step
