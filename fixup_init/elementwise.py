"""Finds the nonlinearities of a graph: maximal elementwise formulas of one activation that are not linear in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import jax.numpy as jnp

from fixup_init import jaxprs, running
from fixup_init.graph import COPIES, NOISE, Graph
from fixup_init.jaxprs import p
from fixup_init.program import IDENTITY, Op

__all__ = ["Nonlinearity", "find", "limits"]

_LINEAR = frozenset({
    p.add_p, p.sub_p, p.mul_p, p.div_p, p.neg_p, p.convert_element_type_p, p.copy_p, p.select_n_p, p.stop_gradient_p,
    p.name_p, p.reduce_precision_p, IDENTITY,
})  # fmt: skip
_NONLINEAR = frozenset({
    p.max_p, p.min_p, p.clamp_p, p.tanh_p, p.logistic_p, p.exp_p, p.exp2_p, p.expm1_p, p.log_p, p.log1p_p, p.erf_p,
    p.erfc_p, p.erf_inv_p, p.abs_p, p.sign_p, p.square_p, p.sqrt_p, p.rsqrt_p, p.cbrt_p, p.integer_pow_p, p.pow_p,
    p.sin_p, p.cos_p, p.tan_p, p.sinh_p, p.cosh_p, p.asin_p, p.acos_p, p.atan_p, p.asinh_p, p.acosh_p, p.atanh_p,
    p.round_p, p.floor_p, p.ceil_p, p.lgamma_p, p.digamma_p,
    p.gt_p, p.lt_p, p.ge_p, p.le_p, p.eq_p, p.ne_p, p.is_finite_p, p.not_p, p.and_p, p.or_p,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Nonlinearity:
    """A nonlinearity: the node it acts on, the node of its result, and its name where a call gave it one."""

    source: int
    node: int
    name: str


def find(graph: Graph, excluded: frozenset[int]) -> tuple[Nonlinearity, ...]:
    """All nonlinearities in trace order, but for nodes `excluded` (normalizations)."""
    root: dict[int, int] = {}
    bent: dict[int, str] = {}  # nodes that are not linear in their root, with a name
    signal: dict[int, bool] = {}  # whether a formula reads its root as more than whole numbers that are compared
    for node, parents in graph.parents.items():
        op = graph.op(node)
        shared = {root[a] for a in parents}
        root[node] = node
        if op is None or node in excluded or len(shared) != 1 or op.primitive not in _LINEAR | _NONLINEAR:
            continue
        if any(graph.is_parameter(v) or graph.kind[v] & NOISE for v in op.inputs if not graph.is_activation(v)):
            continue
        root[node] = shared.pop()
        signal[node] = any(signal.get(a, False) for a in parents) or any(
            root[graph.node_of[v]] == graph.node_of[v] and _is_signal(graph, op, v)
            for v in op.inputs if graph.is_activation(v)
        )  # fmt: skip
        name = _name(graph, op, [a for a in parents if root[a] != a or len(parents) > 1], bent)
        if name:
            bent[node] = name
    outputs = set(graph.outputs)
    found = []
    for node, name in bent.items():
        leaves_formula = node in outputs or any(root[u] != root[node] for u in graph.users[node])
        if not leaves_formula or not jnp.issubdtype(graph.program.dtype(graph.value(node)), jnp.inexact):
            continue
        if not signal[node]:  # an indicator of whole numbers, as a one-hot vector is
            continue
        if _is_softmax(graph, node) or _is_shifted_log(graph, node):
            continue
        found.append(Nonlinearity(root[node], node, name))
    return tuple(found)


def _is_signal(graph: Graph, op: Op, value: int) -> bool:
    """Whether an operation takes a value for numbers, and not for an index to compare."""
    dtype = graph.program.dtype
    cast = op.primitive is p.convert_element_type_p and jnp.issubdtype(dtype(op.outputs[0]), jnp.inexact)
    return cast or jnp.issubdtype(dtype(value), jnp.inexact)


def limits(graph: Graph, nonlinearity: Nonlinearity) -> tuple[float, float] | None:
    """The least and largest value of a nonlinearity that is constant far out on both sides, such as tanh."""
    formula = _formula(graph, nonlinearity)
    if formula is None:
        return None
    key = _canonical(graph, nonlinearity, formula)
    if key not in _LIMITS:
        _LIMITS[key] = _limits(graph, nonlinearity, formula)
    return _LIMITS[key]


_LIMITS: dict[Any, tuple[float, float] | None] = {}
_FAR = (-6e4, -1e4, 1e4, 6e4)  # numbers of every dtype


def _limits(graph: Graph, nonlinearity: Nonlinearity, formula: list[Op]) -> tuple[float, float] | None:
    source, dtype = graph.value(nonlinearity.source), graph.program.dtype
    if not all(jnp.issubdtype(dtype(v), jnp.floating) for v in (source, graph.value(nonlinearity.node))):
        return None  # whole numbers, or complex ones
    env: dict[int, Any] = {source: jnp.asarray(_FAR, dtype(source))}
    for op in formula:
        args = [env[v] if v in env else jnp.full(len(_FAR), graph.literal(v) or 0.0, dtype(v)) for v in op.inputs]
        env.update(zip(op.outputs, running.bind(op, args), strict=True))
    ends = [float(y) for y in env[graph.value(nonlinearity.node)]]
    flat = all(map(math.isfinite, ends)) and ends[0] == ends[1] and ends[2] == ends[3]
    return (min(ends), max(ends)) if flat and ends[0] != ends[3] else None


def _formula(graph: Graph, nonlinearity: Nonlinearity) -> list[Op] | None:
    """The operations between source and result; None where one takes more than numbers beside the source."""
    needed: set[int] = set()
    todo = [nonlinearity.node]
    while todo:
        node = todo.pop()
        if node == nonlinearity.source or node in needed:
            continue
        op = graph.op(node)
        if op is None or any(not graph.is_activation(v) and graph.literal(v) is None for v in op.inputs):
            return None
        needed.add(node)
        todo.extend(graph.parents[node])
    return [op for node in sorted(needed) if (op := graph.op(node)) is not None]


def _canonical(graph: Graph, nonlinearity: Nonlinearity, formula: list[Op]) -> Any:
    source = graph.value(nonlinearity.source)
    numbers = {source: 0}
    form: list[Any] = [str(graph.program.dtype(source))]
    for op in formula:
        inputs = tuple(numbers[v] if v in numbers else ("literal", graph.literal(v)) for v in op.inputs)
        form.append((jaxprs.signature(op), inputs))
        numbers |= {v: len(numbers) + k for k, v in enumerate(op.outputs)}
    return tuple(form)


def _name(graph: Graph, op: Op, inner: list[int], bent: dict[int, str]) -> str:
    inherited = [bent[a] for a in inner if a in bent]
    streams = [v for v in op.inputs if graph.is_activation(v)]
    is_product = op.primitive in (p.mul_p, p.div_p) and (
        len(streams) > 1 or (op.primitive is p.div_p and graph.is_activation(op.inputs[1]))
    )
    if (op.primitive in _NONLINEAR and not _bounds_nothing(graph, op)) or is_product:
        own = op.label or ("relu" if op.primitive is p.max_p and _against_zero(graph, op) else op.name)
        return op.label or (inherited[-1] if inherited and op.primitive in _LINEAR else own)
    return op.label if inherited and op.label else inherited[-1] if inherited else ""


def _against_zero(graph: Graph, op: Op) -> bool:
    return any(graph.literal(v) == 0 for v in op.inputs if not graph.is_activation(v))


def _bounds_nothing(graph: Graph, op: Op) -> bool:
    """max(x, -inf) and min(x, inf), or whether x is finite: guards of a softmax, which change no finite number."""
    if op.primitive is p.is_finite_p:
        return True
    nothing = -math.inf if op.primitive is p.max_p else math.inf
    return op.primitive in (p.max_p, p.min_p) and any(graph.literal(v) == nothing for v in op.inputs)


_EXP, _MASK = (p.exp_p, p.exp2_p), (p.select_n_p, p.convert_element_type_p)
_PAST = COPIES | {p.stop_gradient_p}


def _is_softmax(graph: Graph, node: int) -> bool:
    """An exponential that is summed, both of them masked or not: part of a softmax or a log-sum-exp, no layer."""

    def done_by(nodes: Iterable[int], primitives: tuple[Any, ...]) -> list[int]:
        return [n for n in nodes if (op := graph.op(n)) is not None and op.primitive in primitives]

    exponential = done_by((node,), _EXP) or (done_by((node,), _MASK) and done_by(graph.parents[node], _EXP))
    users = graph.users[node]
    masked = [u for n in done_by(users, _MASK) for u in graph.users[n]]
    return bool(exponential and done_by((*users, *masked), (p.reduce_sum_p,)))


def _is_shifted_log(graph: Graph, node: int) -> bool:
    """log sum exp(s - m) that is nothing but added to m or taken off s - m: part of a log-sum-exp, no layer."""
    op = graph.op(node)
    if op is None or op.primitive is not p.log_p:
        return False
    sums = _above(graph, (node,), (p.reduce_sum_p,), _PAST | {p.abs_p})
    shifted = _above(graph, _above(graph, sums, _EXP, _PAST), (p.sub_p,), _PAST)
    users = _users(graph, node)
    for one in shifted:
        made = graph.op(one)
        assert made is not None
        shift = _origin(graph, made.inputs[1])
        if users and shift is not None and all(
            (u.primitive is p.sub_p and _origin(graph, u.inputs[0]) == one)
            or (u.primitive is p.add_p and shift in (_origin(graph, v) for v in u.inputs))
            for u in users
        ):  # fmt: skip
            return True
    return False


def _origin(graph: Graph, value: int) -> int | None:
    """The node of an activation before it was cast and brought into shape."""
    node = graph.node_of.get(value)
    while node is not None and (op := graph.op(node)) is not None and op.primitive in _PAST:
        node = graph.node_of.get(op.inputs[0])
    return node


def _users(graph: Graph, node: int) -> list[Op]:
    """The operations that use a node once it is cast and brought into shape."""
    found: list[Op] = []
    todo = list(graph.users[node])
    while todo:
        user = todo.pop()
        if (op := graph.op(user)) is not None and op.primitive in _PAST:
            todo.extend(graph.users[user])
        elif op is not None:
            found.append(op)
    return found


def _above(graph: Graph, nodes: Iterable[int], primitives: Collection[Any], past: Collection[Any]) -> list[int]:
    """The nearest earlier nodes that some primitives made, past others."""
    found: list[int] = []
    todo = [a for n in nodes for a in graph.parents[n]]
    while todo:
        op = graph.op(node := todo.pop())
        if op is not None and op.primitive in primitives:
            found.append(node)
        elif op is not None and op.primitive in past:
            todo.extend(graph.parents[node])
    return found
