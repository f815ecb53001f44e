"""Finds the nonlinearities of a graph: maximal elementwise formulas of one activation that are not linear in it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from fixup_init import jaxprs
from fixup_init.graph import NOISE, Graph
from fixup_init.jaxprs import Op, p

__all__ = ["Nonlinearity", "find"]

_LINEAR = frozenset({
    p.add_p, p.sub_p, p.mul_p, p.div_p, p.neg_p, p.convert_element_type_p, p.copy_p, p.select_n_p, p.stop_gradient_p,
    p.name_p, p.reduce_precision_p, jaxprs.IDENTITY,
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
    for node, parents in graph.parents.items():
        op = graph.op(node)
        shared = {root[a] for a in parents}
        root[node] = node
        if op is None or node in excluded or len(shared) != 1 or op.primitive not in _LINEAR | _NONLINEAR:
            continue
        if any(graph.is_parameter(v) or graph.kind[v] & NOISE for v in op.inputs if not graph.is_activation(v)):
            continue
        root[node] = shared.pop()
        name = _name(graph, op, [a for a in parents if root[a] != a or len(parents) > 1], bent)
        if name:
            bent[node] = name
    outputs = set(graph.outputs)
    found = []
    for node, name in bent.items():
        leaves_formula = node in outputs or any(root[u] != root[node] for u in graph.users[node])
        if not leaves_formula or not jnp.issubdtype(graph.program.dtype(graph.value(node)), jnp.inexact):
            continue
        if _is_softmax(graph, node):
            continue
        found.append(Nonlinearity(root[node], node, name))
    return tuple(found)


def _name(graph: Graph, op: Op, inner: list[int], bent: dict[int, str]) -> str:
    inherited = [bent[a] for a in inner if a in bent]
    streams = [v for v in op.inputs if graph.is_activation(v)]
    is_product = op.primitive in (p.mul_p, p.div_p) and (
        len(streams) > 1 or (op.primitive is p.div_p and graph.is_activation(op.inputs[1]))
    )
    if op.primitive in _NONLINEAR or is_product:
        own = op.label or ("relu" if op.primitive is p.max_p and _against_zero(graph, op) else op.name)
        return op.label or (inherited[-1] if inherited and op.primitive in _LINEAR else own)
    return op.label if inherited and op.label else inherited[-1] if inherited else ""


def _against_zero(graph: Graph, op: Op) -> bool:
    return any(graph.literal(v) == 0 for v in op.inputs if not graph.is_activation(v))


def _is_softmax(graph: Graph, node: int) -> bool:
    """An exponential that is summed: part of a softmax or a log-sum-exp, no layer of its own."""
    op = graph.op(node)
    return (
        op is not None
        and op.primitive in (p.exp_p, p.exp2_p)
        and any((u := graph.op(n)) is not None and u.primitive is p.reduce_sum_p for n in graph.users[node])
    )
