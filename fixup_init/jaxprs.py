"""Traces a function once and flattens its jaxpr to a `Program`: plain data that every domain evaluates.

A `Program` holds the same trace at two levels, over one numbering of values:

- `ops`, fine: jit, remat and custom derivatives are inlined, a scan body appears once between markers, every arm of
  a conditional appears before a `CHOOSE` marker. The graph, order and moment domains read these.
- `steps`, coarse: what can be bound with arrays. A custom derivative stays one call, because its rule is not the
  derivative of its body (relu at 0); a scan holds the steps of its body, a conditional those of its arms, a shard_map
  those of one device.

The result of an inlined call has the number of the value it returns, so a value found in `ops` can be tapped in
`steps`. This is the only module that touches `jax.extend`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Primitive
from jax.extend.core import primitives as p

__all__ = [
    "Arm", "Arms", "Body", "Inside", "Loop", "Marker", "Op", "Program", "Shards", "UnknownPrimitiveError", "bind",
    "collectives", "devices", "evaluate", "flatten", "is_cast", "is_platform", "is_ragged_dot", "jaxpr_of", "opaque",
    "run_arms", "run_scan", "run_shards",
]  # fmt: skip


class UnknownPrimitiveError(NotImplementedError):
    """A primitive holds a jaxpr and no rule says how to enter it."""


@dataclasses.dataclass(frozen=True)
class Marker:
    """A pseudo-primitive of the fine trace: where values enter and leave a scan body or the arms of a conditional."""

    name: str


# Primitives that jax.lax names and jax.extend does not; where this JAX has none of a name, nothing matches.
BARRIER, SPLIT, STACK, UNSTACK, TILE, LOG2, SCATTER_SUB = (
    getattr(jax.lax, f"{name}_p", Marker(name))
    for name in ("optimization_barrier", "split", "stack", "unstack", "tile", "log2", "scatter_sub")
)

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


@dataclasses.dataclass(frozen=True)
class _Where:
    """Where equations stand: the scopes of the calls around them, the innermost call's name, the scan, the arm."""

    scope: str = ""
    label: str = ""
    loop: Loop | None = None
    arm: Arm | None = None


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

    primitive: Primitive | Marker
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
    """A flattened trace; see the module docstring."""

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
            op = _with_body(op, body)
        kept.append(op)
    return kept


def jaxpr_of(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Traces a function on abstract arguments; nothing is allocated and nothing runs.

    Args:
      function: a pure function of pytrees of arrays.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The closed jaxpr, for `flatten`, and the result's tree of `jax.ShapeDtypeStruct`.
    """
    return jax.make_jaxpr(function, return_shape=True)(*args)


def flatten(closed: Any) -> Program:
    """The program of a closed jaxpr, without dead code; its inputs follow `jax.tree_util.tree_leaves(args)`."""
    flat = _Flattener()
    jaxpr = closed.jaxpr
    inputs = [flat.new(v.aval) for v in jaxpr.invars]
    steps: list[Op] = []
    outputs = flat.run(jaxpr, closed.consts, inputs, steps, _Where())
    program = Program(flat.avals, flat.constants, tuple(inputs), tuple(outputs), flat.ops, steps)
    return program.returning(outputs)


# Calls that are their body: inlined at both levels.
_PLAIN_CALLS = (p.jit_p, p.remat_p, p.closed_call_p, p.call_p)
# Calls with a derivative of their own: inlined in `ops`, bound in `steps`.
_CUSTOM_CALLS = (p.custom_jvp_call_p, p.custom_vjp_call_p)
# Primitives whose jaxpr is the scalar function that they combine with.
_COMBINERS = frozenset({
    p.reduce_p, p.reduce_window_p, p.scatter_p, p.scatter_add_p, p.scatter_mul_p, p.scatter_min_p, p.scatter_max_p,
    p.select_and_scatter_p,
})  # fmt: skip
# Regions that are named, not entered.
_REGIONS = (p.while_p, p.linear_solve_p)


class _Flattener:
    def __init__(self) -> None:
        self.avals: list[Any] = []
        self.constants: dict[int, Any] = {}
        self.ops: list[Op] = []
        self.switches = 0

    def new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, aval: Any, value: Any) -> int:
        i = self.new(aval)
        self.constants[i] = value
        return i

    def mark(self, marker: Marker, inputs: Iterable[int], aval: Any, source: Any, at: _Where, **params: Any) -> int:
        out = self.new(aval)
        self.ops.append(Op(marker, tuple(inputs), (out,), params, source, at.scope, "", at.loop, None, at.arm))
        return out

    def run(
        self, jaxpr: Any, consts: Iterable[Any], args: Sequence[int], steps: list[Op], at: _Where
    ) -> list[int]:  # fmt: skip
        """Appends the equations of `jaxpr` to `self.ops` and `steps`; returns the numbers of its results."""
        env: dict[Any, int] = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(var.aval, value)

        def read(atoms: Iterable[Any]) -> list[int]:
            return [self.constant(a.aval, a.val) if isinstance(a, Literal) else env[a] for a in atoms]

        entered = _entered()
        for eqn in jaxpr.eqns:
            inputs = read(eqn.invars)
            enter = entered.get(eqn.primitive)
            if enter is not None:
                outputs = enter(self, eqn, inputs, steps, at)
            else:
                if _holds_jaxpr(eqn.params):
                    self._check(eqn, at)
                outputs = [self.new(v.aval) for v in eqn.outvars]
                op = _step(eqn, inputs, outputs, at)
                self.ops.append(op)
                steps.append(op)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return read(jaxpr.outvars)

    def _check(self, eqn: Any, at: _Where) -> None:
        primitive = eqn.primitive
        if primitive in _COMBINERS or opaque(primitive):
            return
        raise UnknownPrimitiveError(
            f"The primitive `{primitive.name}` (in scope {_join(at.scope, eqn) or 'top level'!r}) holds a "
            "jaxpr, and no rule says how to enter it. Write the model without it, or report it with a "
            "small example so that a rule can be added."
        )

    def _enter(self, eqn: Any, inputs: list[int], steps: list[Op] | None, at: _Where) -> list[int]:
        inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if k in eqn.params)
        label = eqn.params.get("name") or at.label
        if steps is None:  # inside a custom derivative: bound whole, so its inner steps are not needed
            steps = []
            label = _function_name(inner) or label
        inside = _Where(_join(at.scope, eqn), str(label), at.loop, at.arm)
        return self.run(_open(inner), _consts(inner), inputs, steps, inside)

    def _custom(self, eqn: Any, inputs: list[int], steps: list[Op], at: _Where) -> list[int]:
        outputs = self._enter(eqn, inputs, None, at)
        for k, (out, var) in enumerate(zip(outputs, eqn.outvars, strict=True)):
            if out in inputs or out in outputs[:k] or out in self.constants:
                outputs[k] = self.mark(IDENTITY, (out,), var.aval, eqn.source_info, at)
        steps.append(_step(eqn, inputs, outputs, at))
        return outputs

    def _barrier(self, eqn: Any, inputs: list[int], steps: list[Op], at: _Where) -> list[int]:
        outputs = [
            self.mark(IDENTITY, (i,), v.aval, eqn.source_info, at) for i, v in zip(inputs, eqn.outvars, strict=True)
        ]
        steps.append(_step(eqn, inputs, outputs, at))
        return outputs

    def _scan(self, eqn: Any, inputs: list[int], steps: list[Op], at: _Where) -> list[int]:
        params, info = eqn.params, eqn.source_info
        inner = params["jaxpr"]
        jaxpr = _open(inner)
        # What is carried has the same shape inside and outside; what is sliced or stacked has one axis less inside.
        n_carry = sum(a.aval.shape == b.aval.shape for a, b in zip(eqn.outvars, jaxpr.outvars, strict=True))
        n_xs = sum(a.aval.shape != b.aval.shape for a, b in zip(eqn.invars, jaxpr.invars, strict=True))
        n_consts = len(eqn.invars) - n_carry - n_xs
        loop = Loop(params["length"], at.loop, params["reverse"])
        outside = dataclasses.replace(at, scope=_join(at.scope, eqn))
        inside = dataclasses.replace(outside, loop=loop)
        consts, init, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
        carry_vars, xs_vars = jaxpr.invars[n_consts : n_consts + n_carry], jaxpr.invars[n_consts + n_carry :]
        carry = [self.mark(CARRY_IN, (i,), v.aval, info, inside) for i, v in zip(init, carry_vars, strict=True)]
        slices = [self.mark(SLICE_IN, (i,), v.aval, info, inside) for i, v in zip(xs, xs_vars, strict=True)]
        passes: list[Op] = []
        first_value = len(self.avals)
        outs = self.run(jaxpr, _consts(inner), [*consts, *carry, *slices], passes, inside)
        loop.carries.extend(zip(carry, outs[:n_carry], strict=True))
        results = [
            self.mark(CARRY_OUT, (out,), var.aval, info, outside)
            if k < n_carry
            else self.mark(STACK_OUT, (out,), var.aval, info, outside, reverse=loop.reverse)
            for k, (out, var) in enumerate(zip(outs, eqn.outvars, strict=True))
        ]
        held = tuple(v for v in self.constants if v >= first_value)
        body = Body(
            parts=(passes,),
            given=(*carry, *slices),
            results=(tuple(outs),),
            constants=held,
            consts=tuple(consts),
            carries=n_carry,
        )
        steps.append(_step(eqn, inputs, results, at, body))
        return results

    def _cond(self, eqn: Any, inputs: list[int], steps: list[Op], at: _Where) -> list[int]:
        index, *args = inputs
        outside = dataclasses.replace(at, scope=_join(at.scope, eqn))
        branches = eqn.params["branches"]
        switch = self.switches
        self.switches += 1
        first_value = len(self.avals)
        parts: tuple[list[Op], ...] = tuple([] for _ in branches)
        arms = [
            self.run(
                _open(arm), _consts(arm), args, part,
                dataclasses.replace(outside, arm=Arm(switch, k, len(branches), at.arm)),
            )
            for k, (arm, part) in enumerate(zip(branches, parts, strict=True))
        ]  # fmt: skip
        held = tuple(v for v in self.constants if v >= first_value)
        results = [
            self.mark(CHOOSE, (*(arm[k] for arm in arms), index), var.aval, eqn.source_info, outside, switch=switch)
            for k, var in enumerate(eqn.outvars)
        ]
        step = _step(eqn, inputs, results, at)
        if eqn.params.get("branches_platforms") is None:  # else not every arm need be one that this platform can run
            step = _with_body(step, Arms(parts, (), tuple(map(tuple, arms)), held))
        steps.append(step)
        return results

    def _shards(self, eqn: Any, inputs: list[int], steps: list[Op], at: _Where) -> list[int]:
        params, info = eqn.params, eqn.source_info
        sizes = dict(params["mesh"].shape)
        jaxpr = _open(params["jaxpr"])
        inside = dataclasses.replace(at, scope=_join(at.scope, eqn))

        def parts(spec: Any, rank: int) -> tuple[int, ...]:
            """Into how many parts each axis is cut."""
            names = [n if isinstance(n, tuple) else (n,) if n is not None else () for n in spec]
            cut = [math.prod(sizes[n] for n in axis) for axis in names]
            return tuple(cut + [1] * (rank - len(cut)))

        args = [
            self.mark(SHARD_IN, (i,), v.aval, info, inside, parts=parts(spec, len(v.aval.shape)))
            for i, v, spec in zip(inputs, jaxpr.invars, params["in_specs"], strict=True)
        ]
        first_value, each = len(self.avals), list[Op]()
        outs = self.run(jaxpr, _consts(params["jaxpr"]), args, each, inside)
        results = [self.mark(SHARD_OUT, (o,), v.aval, info, inside) for o, v in zip(outs, eqn.outvars, strict=True)]
        held = tuple(v for v in self.constants if v >= first_value)
        steps.append(_step(eqn, inputs, results, at, Shards((each,), tuple(args), (tuple(outs),), held)))
        return results


def _step(eqn: Any, inputs: Sequence[int], outputs: Sequence[int], at: _Where, body: Inside | None = None) -> Op:
    return Op(
        eqn.primitive, tuple(inputs), tuple(outputs), eqn.params, eqn.source_info, at.scope, at.label, at.loop, body,
        at.arm,
    )  # fmt: skip


@functools.cache
def _entered() -> dict[Any, Callable[[_Flattener, Any, list[int], list[Op], _Where], list[int]]]:
    """How the primitives are entered that hold a program of their own."""
    return {
        **dict.fromkeys((*_PLAIN_CALLS, *_foreign().plain), _Flattener._enter),
        **dict.fromkeys(_CUSTOM_CALLS, _Flattener._custom),
        **dict.fromkeys(_foreign().shards, _Flattener._shards),
        p.scan_p: _Flattener._scan, p.cond_p: _Flattener._cond, BARRIER: _Flattener._barrier,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Foreign:
    """Primitives that no public module names, by what to do with them."""

    plain: tuple[Any, ...]  # calls that are their body
    shards: tuple[Any, ...]  # shard_map
    casts: tuple[Any, ...]  # inside one: marks a value as different on each device
    sums: tuple[Any, ...]  # inside one: a sum over devices
    ragged: tuple[Any, ...]  # products with one matrix for each group of rows
    platform: tuple[Any, ...]  # the number of the platform that a program is compiled for


@functools.cache
def _foreign() -> _Foreign:
    """Found by tracing the smallest program that holds each; where this JAX has no such thing, nothing matches."""
    one = jax.ShapeDtypeStruct((1,), np.float32)

    def primitives(function: Callable[[], Callable[[Any], Any]]) -> list[Any]:
        try:
            jaxpr = jax.make_jaxpr(function())(one).jaxpr
        except (AttributeError, ImportError, TypeError, ValueError, NotImplementedError):
            return []
        outer = [e.primitive for e in jaxpr.eqns]
        inner = [
            e.primitive for outer_eqn in jaxpr.eqns
            for e in getattr(_open(outer_eqn.params.get("jaxpr", jaxpr)), "eqns", ())
        ]  # fmt: skip
        return [*outer, *inner]

    def sharded(function: Callable[[Any], Any]) -> Callable[[], Callable[[Any], Any]]:
        spec = jax.sharding.PartitionSpec("i")

        def make() -> Callable[[Any], Any]:
            mesh = jax.sharding.AbstractMesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
            return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)

        return make

    def composed() -> Callable[[Any], Any]:
        return jax.lax.composite(lambda x: x * 2.0, name="probe")

    def ragged() -> Callable[[Any], Any]:
        return lambda x: jax.lax.ragged_dot(x[:, None], x[:, None, None], jnp.ones(1, jnp.int32))

    def dependent() -> Callable[[Any], Any]:
        return lambda x: jax.lax.platform_dependent(x, cpu=lambda y: y * 2.0, default=lambda y: y * 3.0)

    known = {p.mul_p, p.convert_element_type_p}
    shard, *casts = primitives(sharded(lambda x: x * 2.0)) or [None]
    sums = primitives(sharded(lambda x: jax.lax.psum(x, "i") * x))[1:]
    casts = [q for q in casts if q not in known]
    return _Foreign(
        plain=tuple(q for q in primitives(composed) if q not in known),
        shards=() if shard is None else (shard,),
        casts=tuple(casts),
        sums=tuple(q for q in sums if q not in known and q not in casts),
        ragged=tuple(primitives(ragged)[-1:]),
        platform=tuple(q for q in primitives(dependent) if q not in {*known, p.cond_p}),
    )


@functools.cache
def _kernels() -> tuple[Any, ...]:
    """Primitives of hand-written kernels, once the module that makes them is loaded."""
    if "jax.experimental.pallas" not in sys.modules:
        return ()
    from jax.experimental import pallas

    def double(x: Any, out: Any) -> None:
        out[...] = x[...] * 2.0

    one = jax.ShapeDtypeStruct((8, 128), np.float32)
    return tuple(e.primitive for e in jax.make_jaxpr(pallas.pallas_call(double, out_shape=one))(one).jaxpr.eqns)


def opaque(primitive: Any) -> bool:
    """Whether a primitive is a region that is named and not entered: a while loop, a solver, a hand-written kernel."""
    if primitive in _REGIONS:
        return True
    if "jax.experimental.pallas" not in sys.modules:
        return False
    return primitive in _kernels()


def collectives() -> tuple[Any, ...]:
    """Collectives inside a shard_map that no public module names; each keeps what it is given, or sums it."""
    return _foreign().casts + _foreign().sums


def is_cast(primitive: Any) -> bool:
    """Whether a primitive only marks a value as different on each device of a shard_map."""
    return primitive in _foreign().casts


def is_ragged_dot(primitive: Any) -> bool:
    """Whether a primitive multiplies each group of rows by a matrix of its own (`jax.lax.ragged_dot`)."""
    return primitive in _foreign().ragged


def is_platform(primitive: Any) -> bool:
    """Whether a primitive tells which arm of `jax.lax.platform_dependent` is taken."""
    return primitive in _foreign().platform


def evaluate(program: Program, args: Sequence[Any]) -> list[Any]:
    """Runs a program on arrays, step by step and uncompiled: for the few steps that make some initial values."""
    env: dict[int, Any] = dict(program.constants)
    env.update(zip(program.inputs, args, strict=True))
    _evaluate(program.steps, env)
    return [env[v] for v in program.outputs]


def _evaluate(steps: Iterable[Op], env: dict[int, Any]) -> None:
    for step in steps:
        args = [env[v] for v in step.inputs]
        if step.body is None:
            outs = bind(step, args)
        elif isinstance(step.body, Arms):
            outs, _ = run_arms(step, env, _evaluate)
        elif isinstance(step.body, Shards):
            outs, _ = run_shards(step, args, env, None, lambda steps, local, _: _evaluate(steps, local))
        else:
            outs, _ = run_scan(step, args, env, None, lambda steps, local, _: _evaluate(steps, local))
        env.update(zip(step.outputs, outs, strict=True))


def run_scan(
    step: Op, args: Sequence[Any], env: dict[int, Any], extra: Any, run: Callable[[list[Op], dict[int, Any], Any], Any]
) -> tuple[list[Any], Any]:
    """Runs a scan whose body is evaluated by `run(steps, local values, extra of this pass)`.

    Args:
      step: a step with a body.
      args: arrays of its inputs.
      env: values around it, for the constants of its body.
      extra: a tree of arrays with a leading axis of the scan's length, or None.
      run: evaluates the body in place; what it returns is stacked.

    Returns:
      The step's results, and what `run` returned, stacked.
    """
    body = step.body
    assert isinstance(body, Body)
    n_consts, n_carry = len(body.consts), len(body.carry)
    held = {v: env[v] for v in (*body.consts, *body.constants) if v in env}

    def one(carry: Any, xs: Any) -> Any:
        slices, at = xs
        local = {**held, **dict(zip(body.given, (*carry, *slices), strict=True))}
        found = run(body.parts[0], local, at)
        return [local[v] for v in body.carry_out], ([local[v] for v in body.ys], found)

    carry, (ys, found) = jax.lax.scan(
        one, list(args[n_consts : n_consts + n_carry]), (list(args[n_consts + n_carry :]), extra),
        length=step.params["length"], reverse=step.params["reverse"],
    )  # fmt: skip
    return [*carry, *ys], found


def run_arms(step: Op, env: dict[int, Any], run: Callable[[list[Op], dict[int, Any]], Any]) -> tuple[list[Any], Any]:
    """Runs a conditional whose arms are evaluated by `run(steps, local values)`.

    Args:
      step: a step with arms.
      env: values around it.
      run: evaluates the steps of an arm in place; what it returns has the same shapes in each arm.

    Returns:
      The step's results, and what `run` returned for the arm that was taken.
    """
    arms = step.body
    assert isinstance(arms, Arms)

    def one(part: list[Op], results: tuple[int, ...]) -> tuple[list[Any], Any]:
        local = dict(env)
        found = run(part, local)
        return [local[v] for v in results], found

    taken = [functools.partial(one, *arm) for arm in zip(arms.parts, arms.results, strict=True)]
    return jax.lax.switch(env[step.inputs[0]], taken)


def run_shards(
    step: Op, args: Sequence[Any], env: dict[int, Any], extra: Any, run: Callable[[list[Op], dict[int, Any], Any], Any]
) -> tuple[list[Any], Any]:
    """Runs a shard_map, on each device by `run(steps, local values, extra of this device)`.

    Args:
      step: a step of shards.
      args: arrays of its inputs.
      env: values around it, for constants.
      extra: a tree of arrays with a leading axis of the number of devices, or None.
      run: evaluates the steps in place; what it returns is stacked by device.

    Returns:
      The step's results, and what `run` returned, stacked.
    """
    shards, params = step.body, step.params
    assert isinstance(shards, Shards)
    axes = _split_axes(step)
    every = jax.sharding.PartitionSpec(axes)
    held = {v: env[v] for v in shards.constants if v in env}

    def one(args: Sequence[Any], held: dict[int, Any], extra: Any) -> Any:
        local = {**held, **dict(zip(shards.given, args, strict=True))}
        for v, over in shards.varying.items():
            local[v] = jax.lax.pcast(held[v], over, to="varying") if over else held[v]
        found = run(shards.parts[0], local, jax.tree.map(lambda a: a[0], extra))
        return [local[v] for v in shards.results[0]], jax.tree.map(lambda a: a[None], found)

    return jax.shard_map(
        one, mesh=params["mesh"], in_specs=(list(params["in_specs"]), jax.sharding.PartitionSpec(), every),
        out_specs=(list(params["out_specs"]), every), axis_names=set(axes),
        check_vma=params["check_vma"],
    )(list(args), held, extra)  # fmt: skip


def devices(step: Op) -> int:
    """How many run a shard_map."""
    return math.prod(dict(step.params["mesh"].shape)[axis] for axis in _split_axes(step))


def _varying(aval: Any) -> tuple[str, ...]:
    """The axes of a mesh over which a value differs from device to device; JAX has named this in two ways."""
    kind = getattr(aval, "manual_axis_type", aval)
    return tuple(sorted(getattr(kind, "varying", getattr(kind, "vma", ()))))


def _split_axes(step: Op) -> tuple[str, ...]:
    """The axes of the mesh that a shard_map is over."""
    chosen = step.params.get("newly_manual_axes", step.params.get("manual_axes"))
    return tuple(a for a in step.params["mesh"].axis_names if chosen is None or a in chosen)


def bind(op: Op, args: Sequence[Any]) -> list[Any]:
    """Runs one step on arrays (or tracers)."""
    primitive = op.primitive
    assert isinstance(primitive, Primitive)
    out = primitive.bind(*args, **primitive.get_bind_params(op.params))
    return list(out) if primitive.multiple_results else [out]


def signature(op: Any) -> Any:
    """Hashable, equal for two steps (or equations) that compute the same function of their inputs."""
    return (op.primitive, tuple(sorted((k, _freeze(v)) for k, v in op.params.items())))


def _freeze(x: Any) -> Any:
    if hasattr(x, "eqns") or hasattr(x, "jaxpr"):  # a jaxpr; for a custom rule also the place of its source
        return (_equations(_open(x)), tuple(np.asarray(c).tobytes() for c in _consts(x)), _function_source(x))
    if isinstance(x, (tuple, list)):
        return tuple(_freeze(v) for v in x)
    if isinstance(x, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in x.items()))
    if isinstance(x, (str, bytes, int, float, complex, bool, type(None))):
        return x
    return repr(x) if not callable(x) else type(x).__name__


def _equations(jaxpr: Any) -> Any:
    """The equations of a jaxpr with variables numbered in the order of their appearance: its text takes ten times as
    long to make."""
    numbers: dict[Any, int] = {}

    def atom(v: Any) -> Any:
        if isinstance(v, Literal):
            return str(v.val), v.aval
        return numbers.setdefault(v, len(numbers)), v.aval

    return (
        tuple(map(atom, (*jaxpr.constvars, *jaxpr.invars))),
        tuple((signature(e), tuple(map(atom, e.invars)), tuple(map(atom, e.outvars))) for e in jaxpr.eqns),
        tuple(map(atom, jaxpr.outvars)),
    )


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
    return _with_body(step, dataclasses.replace(body, parts=parts, results=results))


def _with_body(step: Op, body: Inside) -> Op:
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
            op = _with_body(op, body)
        result.append(op)
    return result


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _consts(jaxpr: Any) -> Any:
    return getattr(jaxpr, "consts", ())


def _debug_info(jaxpr: Any) -> Any:
    return getattr(_open(jaxpr), "debug_info", None)


def _function_name(jaxpr: Any) -> str:
    return _function_source(jaxpr).partition(" at ")[0]


def _function_source(jaxpr: Any) -> str:
    return str(getattr(_debug_info(jaxpr), "func_src_info", ""))


def _holds_jaxpr(params: dict[str, Any]) -> bool:
    for value in params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(x, "eqns") or (hasattr(x, "jaxpr") and hasattr(x.jaxpr, "eqns")):
                return True
    return False


def _join(outer: str, eqn: Any) -> str:
    inner = str(eqn.source_info.name_stack)
    return f"{outer}/{inner}" if outer and inner else outer or inner
