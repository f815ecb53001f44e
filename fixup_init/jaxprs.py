"""Traces a function once and flattens its jaxpr to a `Program`.

This is the only module that touches `jax.extend`: it says which primitives are calls, which hold a program to be
entered, and which are regions to be named.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as p

from fixup_init.program import (
    CARRY_IN,
    CARRY_OUT,
    CHOOSE,
    IDENTITY,
    SHARD_IN,
    SHARD_OUT,
    SLICE_IN,
    STACK_OUT,
    Arm,
    Arms,
    Body,
    Inside,
    Loop,
    Marker,
    Op,
    Program,
    Shards,
    with_body,
)

__all__ = [
    "UnknownPrimitiveError", "collectives", "flatten", "is_cast", "is_platform", "is_ragged_dot", "jaxpr_of", "opaque",
    "p", "signature",
]  # fmt: skip


class UnknownPrimitiveError(NotImplementedError):
    """A primitive holds a jaxpr and no rule says how to enter it."""


# Primitives that jax.lax names and jax.extend does not; where this JAX has none of a name, nothing matches.
BARRIER, SPLIT, STACK, UNSTACK, TILE, LOG2, SCATTER_SUB = (
    getattr(jax.lax, f"{name}_p", Marker(name))
    for name in ("optimization_barrier", "split", "stack", "unstack", "tile", "log2", "scatter_sub")
)


@dataclasses.dataclass(frozen=True)
class _Where:
    """Where equations stand: the scopes of the calls around them, the innermost call's name, the scan, the arm."""

    scope: str = ""
    label: str = ""
    loop: Loop | None = None
    arm: Arm | None = None


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
            step = with_body(step, Arms(parts, (), tuple(map(tuple, arms)), held))
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
