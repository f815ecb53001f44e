"""A flattened trace as plain data: what every domain reads and evaluates.

A `Program` holds one trace at two levels, over one numbering of values:

- `ops`, fine: jit, remat and custom derivatives are inlined, a scan body appears once between markers, every arm of
  a conditional appears before a `CHOOSE` marker. The graph, order and moment domains read these.
- `steps`, coarse: what can be bound with arrays. A custom derivative stays one call, because its rule is not the
  derivative of its body (relu at 0); a scan holds the steps of its body, a conditional those of its arms, a shard_map
  those of one device.

The result of an inlined call has the number of the value it returns, so a value found in `ops` can be tapped in
`steps`. Programs are made by `jaxprs.flatten` and run by `running`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = [
    "Arm", "Arms", "Body", "Inside", "Loop", "Marker", "Op", "Program", "Shards", "all_steps", "devices", "split_axes",
    "with_body",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Marker:
    """A pseudo-primitive of the fine trace: where values enter and leave a scan body or the arms of a conditional."""

    name: str


CARRY_IN = Marker("carry_in")  # initial carry -> carry seen by the body
CARRY_OUT = Marker("carry_out")  # carry returned by the body -> final carry
SLICE_IN = Marker("slice_in")  # stacked array -> the slice seen by the body
STACK_OUT = Marker("stack_out")  # value returned by the body -> stacked array
CHOOSE = Marker("choose")  # one result of every arm of a conditional -> the conditional's result
IDENTITY = Marker("identity")  # a custom derivative that returns its argument
SHARD_IN = Marker("shard_in")  # an array -> the part of it that one device of a shard_map sees
SHARD_OUT = Marker("shard_out")  # what each device returns -> the whole array


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A scan that ops belong to: its `length`, whether it reads from the end, its carries, and the scan around it."""

    length: int
    parent: Loop | None
    reverse: bool = False
    carries: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (value of CARRY_IN, value carried out)


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """One of the `count` arms of a conditional, of which one runs; `switch` numbers the conditional in its program."""

    switch: int
    index: int
    count: int
    parent: Arm | None


@dataclasses.dataclass(frozen=True, eq=False)
class Inside:
    """What runs inside of a step; what is made around it and is not given it reads by its number.

    Attributes:
      parts: steps, of a conditional those of each arm.
      given: values that take the place of the step's inputs.
      results: of each part.
      constants: of the closed parts, found in Program.constants.
    """

    parts: tuple[list[Op], ...]
    given: tuple[int, ...]
    results: tuple[tuple[int, ...], ...]
    constants: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Body(Inside):
    """Of a scan, given its carries and slices; `consts` are the first of the step's inputs, read by their numbers."""

    consts: tuple[int, ...]
    carries: int  # how many

    @property
    def carry(self) -> tuple[int, ...]:
        return self.given[: self.carries]

    @property
    def xs(self) -> tuple[int, ...]:
        return self.given[self.carries :]

    @property
    def carry_out(self) -> tuple[int, ...]:
        return self.results[0][: self.carries]

    @property
    def ys(self) -> tuple[int, ...]:
        return self.results[0][self.carries :]


class Arms(Inside):
    """Of a conditional; nothing is given."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shards(Inside):
    """What each device of a shard_map runs, given its part of the inputs."""

    varying: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # constants that differ by device


@dataclasses.dataclass(slots=True, eq=False)
class Op:
    """One operation: values in, values out."""

    primitive: Any  # a primitive of JAX, or a Marker
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]
    source: Any = None  # source_info of the equation
    outer: str = ""  # scope of the calls around it
    label: str = ""  # name of the innermost call inlined around it: "relu", "silu"
    loop: Loop | None = None
    body: Inside | None = None
    arm: Arm | None = None

    @property
    def name(self) -> str:
        return self.primitive.name

    @property
    def scope(self) -> str:
        """Name stack, '' where the framework gives none; for display only."""
        inner = str(self.source.name_stack) if self.source is not None else ""
        return "/".join(s for s in (self.outer, inner) if s)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A flattened trace, without dead code; see the module docstring."""

    avals: list[Any]
    constants: dict[int, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ops: list[Op]
    steps: list[Op]

    def shape(self, value: int) -> tuple[int, ...]:
        return tuple(self.avals[value].shape)

    def dtype(self, value: int) -> Any:
        return self.avals[value].dtype

    def returning(self, outputs: Sequence[int]) -> Program:
        """The same program with other results; what they do not need is dropped."""
        outputs = tuple(outputs)
        return dataclasses.replace(
            self, outputs=outputs, ops=_alive(self.ops, outputs), steps=_alive_steps(self.steps, outputs)
        )

    def reading(self, inputs: Sequence[int]) -> Program | None:
        """The same program with other inputs: values made on the way, which are given instead.

        Returns:
          The program, or None where an input is made by a scan, is a constant or stands for several inputs.
        """
        given = set(inputs)
        if len(given) < len(inputs) or not given.isdisjoint(self.constants):
            return None
        if any(op.loop is not None or op.primitive is STACK_OUT for op in self.ops if not given.isdisjoint(op.outputs)):
            return None
        if any(op.body is not None and not given.isdisjoint(_made(op.body)) for op in self.steps):
            return None

        def rest(ops: list[Op]) -> list[Op]:
            return [op for op in ops if given.isdisjoint(op.outputs)]

        cut = dataclasses.replace(self, inputs=tuple(inputs), ops=rest(self.ops), steps=rest(self.steps))
        cut = cut.returning(self.outputs)
        made = {v for op in cut.steps for v in op.outputs} | given | set(self.constants)
        return cut if all(v in made for op in cut.steps for v in op.inputs) else None

    def made(self) -> set[int]:
        """The values that its steps make, those inside of steps included."""
        found = {v for step in self.steps for v in step.outputs}
        for step in self.steps:
            if step.body is not None:
                found |= _made(step.body)
        return found

    def sharded(self) -> dict[int, int]:
        """The values that each device of a shard_map has a part of, or a value of its own, and how many devices."""
        return _sharded(self.steps)

    def following(self, values: Iterable[int]) -> set[int]:
        """Everything that depends on some values."""
        found = set(values)
        for op in self.ops:
            if not found.isdisjoint(op.inputs):
                found.update(op.outputs)
        return found

    def rewired(self, instead: dict[int, int]) -> Program:
        """The program in which every use of value `a` is a use of `instead[a]`; what this leaves unused is dropped."""
        rewired = dataclasses.replace(self, ops=_rewire(self.ops, instead), steps=_rewire(self.steps, instead))
        return rewired.returning([instead.get(o, o) for o in self.outputs])

    def fixed(self, constants: Mapping[int, Any]) -> Program:
        """The program in which some values are constants."""
        ops = [op for op in self.ops if not any(v in constants for v in op.outputs)]
        fixed = dataclasses.replace(
            self, ops=ops, steps=_fixed(self.steps, constants, self.avals), constants={**self.constants, **constants}
        )
        return fixed.returning(self.outputs)


def all_steps(steps: Iterable[Op]) -> Iterator[Op]:
    """Steps in order, and behind each those inside of it."""
    for step in steps:
        yield step
        for part in step.body.parts if step.body is not None else ():
            yield from all_steps(part)


def devices(step: Op) -> int:
    """How many run a shard_map."""
    return math.prod(dict(step.params["mesh"].shape)[axis] for axis in split_axes(step))


def _varying(aval: Any) -> tuple[str, ...]:
    """The axes of a mesh over which a value differs from device to device; JAX has named this in two ways."""
    kind = getattr(aval, "manual_axis_type", aval)
    return tuple(sorted(getattr(kind, "varying", getattr(kind, "vma", ()))))


def split_axes(step: Op) -> tuple[str, ...]:
    """The axes of the mesh that a shard_map is over."""
    chosen = step.params.get("newly_manual_axes", step.params.get("manual_axes"))
    return tuple(a for a in step.params["mesh"].axis_names if chosen is None or a in chosen)


def _fixed(ops: list[Op], constants: Mapping[int, Any], avals: Sequence[Any]) -> list[Op]:
    """Steps without those that make what is a constant now."""
    kept = []
    for op in ops:
        if any(v in constants for v in op.outputs):
            continue
        if op.body is not None:
            new = tuple(v for v in _made(op.body) if v in constants)
            parts = tuple(_fixed(part, constants, avals) for part in op.body.parts)
            body = dataclasses.replace(op.body, parts=parts, constants=(*op.body.constants, *new))
            if isinstance(body, Shards):
                body = dataclasses.replace(body, varying={**body.varying, **{v: _varying(avals[v]) for v in new}})
            op = with_body(op, body)
        kept.append(op)
    return kept


def _alive(ops: list[Op], outputs: Iterable[int]) -> list[Op]:
    roots, loops = set(outputs), set()
    while True:
        needed, kept = set(roots), []
        for op in reversed(ops):
            if not needed.isdisjoint(op.outputs):
                needed.update(op.inputs)
                kept.append(op)
        found = {op.loop for op in kept if op.loop is not None} - loops
        if not found:
            kept.reverse()
            return kept
        loops |= found  # what a living loop carries around keeps its own producers alive
        roots.update(out for loop in found for _, out in loop.carries)


def _alive_steps(steps: list[Op], outputs: Iterable[int]) -> list[Op]:
    needed = set(outputs)
    kept = []
    for step in reversed(steps):
        if not needed.isdisjoint(step.outputs):
            if isinstance(step.body, Body):
                step = _alive_scan(step, step.body, needed)
            elif step.body is not None:
                step = _alive_inside(step, step.body, needed)
            needed.update(step.inputs)
            kept.append(step)
    kept.reverse()
    return kept


def _alive_scan(step: Op, body: Body, needed: set[int]) -> Op:
    """A scan without the carries and results that nothing needs, and without what only they need."""
    n = len(body.carry)
    carried = {k for k in range(n) if step.outputs[k] in needed}
    stacked = [k for k in range(len(body.ys)) if step.outputs[n + k] in needed]
    while True:
        ends = [body.carry_out[k] for k in carried] + [body.ys[k] for k in stacked]
        steps = _alive_steps(body.parts[0], ends)
        read = {v for s in steps for v in s.inputs} | set(ends)
        more = {k for k in range(n) if body.carry[k] in read} - carried
        if not more:
            break
        carried |= more
    kept = sorted(carried)
    n_consts = len(body.consts)
    consts = [k for k, v in enumerate(body.consts) if v in read]
    xs = [k for k, v in enumerate(body.xs) if v in read]
    inner = Body(
        parts=(steps,), given=(*(body.carry[k] for k in kept), *(body.xs[k] for k in xs)),
        results=((*(body.carry_out[k] for k in kept), *(body.ys[k] for k in stacked)),), constants=body.constants,
        consts=tuple(body.consts[k] for k in consts), carries=len(kept),
    )  # fmt: skip
    chosen = [*consts, *(n_consts + k for k in kept), *(n_consts + n + k for k in xs)]
    return dataclasses.replace(
        step, inputs=tuple(step.inputs[k] for k in chosen), body=inner,
        outputs=tuple(step.outputs[k] for k in [*kept, *(n + k for k in stacked)]),
    )  # fmt: skip


def _alive_inside(step: Op, body: Inside, needed: set[int]) -> Op:
    """A conditional without the results that nothing needs, and without what only they need; of a shard_map, whose
    specs are for all its results, without what none needs."""
    kept = [k for k, v in enumerate(step.outputs) if v in needed or not isinstance(body, Arms)]
    results = tuple(tuple(part[k] for k in kept) for part in body.results)
    parts = tuple(_alive_steps(part, ends) for part, ends in zip(body.parts, results, strict=True))
    step = dataclasses.replace(step, outputs=tuple(step.outputs[k] for k in kept))
    return with_body(step, dataclasses.replace(body, parts=parts, results=results))


def with_body(step: Op, body: Inside) -> Op:
    """A step with another body; the inputs of a conditional are its index and what its arms read."""
    if not isinstance(body, Arms):
        return dataclasses.replace(step, body=body)
    inside = _made(body) | set(body.constants)
    read = [v for part in body.parts for op in part for v in op.inputs]
    read += [v for arm in body.results for v in arm]
    inputs = (step.inputs[0], *dict.fromkeys(v for v in read if v not in inside))
    return dataclasses.replace(step, inputs=inputs, body=body)


def _sharded(steps: Iterable[Op]) -> dict[int, int]:
    found: dict[int, int] = {}
    for step in steps:
        if isinstance(step.body, Shards):
            found |= dict.fromkeys(_made(step.body), devices(step))
        elif step.body is not None:
            for part in step.body.parts:
                found |= _sharded(part)
    return found


def _made(body: Inside) -> set[int]:
    steps = [step for part in body.parts for step in part]
    return set(body.given).union(*(s.outputs for s in steps), *(_made(s.body) for s in steps if s.body is not None))


def _rewire(ops: list[Op], instead: dict[int, int]) -> list[Op]:
    def swap(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(instead.get(v, v) for v in values)

    result = []
    for op in ops:
        if (inputs := swap(op.inputs)) != op.inputs:
            op = dataclasses.replace(op, inputs=inputs)
        if op.body is not None:
            parts = tuple(_rewire(part, instead) for part in op.body.parts)
            body = dataclasses.replace(op.body, parts=parts, results=tuple(map(swap, op.body.results)))
            if isinstance(body, Body):
                body = dataclasses.replace(body, consts=swap(body.consts))
            op = with_body(op, body)
        result.append(op)
    return result
