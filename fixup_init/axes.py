"""Follows one axis of a value through a program: which axes of later values it became, or became part of.

A reshape may put an axis into a longer one or cut it, so what is known of an axis is a *piece*: `size` entries, with
`inner` entries behind each of them inside the axis that holds them. Operations that mix an axis away (a contraction, a
reduction) end it; what is not understood ends it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fixup_init import jaxprs
from fixup_init.graph import Graph
from fixup_init.jaxprs import p
from fixup_init.program import SLICE_IN, STACK_OUT, Op

__all__ = ["Piece", "Pieces", "batch_axes", "follow", "mixes", "reduced"]


class Piece(NamedTuple):
    """`size` entries of a followed axis in `axis`, each with `inner` entries behind it."""

    axis: int
    size: int
    inner: int = 1


Pieces = tuple[Piece, ...]

_REDUCTIONS = frozenset({
    p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p, p.reduce_and_p, p.reduce_or_p, p.argmax_p,
    p.argmin_p, p.reduce_p, p.reduce_xor_p, p.psum_p, p.pmax_p, p.pmin_p,
})  # fmt: skip
_WINDOWS = frozenset({p.reduce_window_sum_p, p.reduce_window_p, p.reduce_window_max_p, p.reduce_window_min_p})
_CUMULATIVE = frozenset({p.cumsum_p, p.cummax_p, p.cummin_p})
_SCATTERS = frozenset({p.scatter_p, p.scatter_add_p, p.scatter_mul_p, p.scatter_min_p, p.scatter_max_p})
# Operations whose result has other axes than their argument.
_MOVING = _REDUCTIONS | _SCATTERS | {
    p.broadcast_in_dim_p, p.reshape_p, p.transpose_p, p.squeeze_p, p.dot_general_p, p.conv_general_dilated_p,
    p.gather_p, SLICE_IN, STACK_OUT, jaxprs.STACK, jaxprs.UNSTACK,
}  # fmt: skip
_MIXING = _REDUCTIONS | _WINDOWS | _CUMULATIVE | {p.dot_general_p}


def batch_axes(graph: Graph) -> dict[int, Pieces]:
    """Where axis 0 of the model's inputs, the batch, is in every activation that it reaches."""
    starts = {
        v: (Piece(0, graph.program.shape(v)[0]),) for v in graph.inputs if graph.program.shape(v)
    }  # fmt: skip
    return follow(graph, range(len(graph.program.ops)), starts)


def follow(graph: Graph, ops: Iterable[int], starts: Mapping[int, Pieces]) -> dict[int, Pieces]:
    """Follows an axis.

    Args:
      graph: the model.
      ops: indices into `graph.program.ops`, in order.
      starts: where the axis is in the values that it starts from.

    Returns:
      Where it is, by value; a value that it does not reach, or that it was mixed away before, is absent.
    """
    known = dict(starts)
    for k in ops:
        op = graph.program.ops[k]
        if not known.keys().isdisjoint(op.inputs):
            moved = _moved(graph, op, known) if op.primitive in _MOVING else None
            for v in op.outputs:
                pieces = _aligned(graph, op, known, v) if moved is None else moved
                if pieces and v not in starts:
                    known[v] = pieces
    return known


def mixes(op: Op) -> bool:
    """Whether an operation may mix an axis away."""
    return op.primitive in _MIXING


def reduced(graph: Graph, op: Op, known: Mapping[int, Pieces]) -> bool:
    """Whether an operation mixes a followed axis away, wholly or in part."""
    if op.primitive in _REDUCTIONS:
        return any(q.axis in _summed(op) for q in known.get(op.inputs[0], ()))
    if op.primitive is p.dot_general_p:
        contract = op.params["dimension_numbers"][0]
        return any(q.axis in contract[s] for s in (0, 1) for q in known.get(op.inputs[s], ()))
    if op.primitive in _WINDOWS:
        window = op.params["window_dimensions"]
        return any(window[q.axis] > 1 for q in known.get(op.inputs[0], ()))
    if op.primitive in _CUMULATIVE:
        return any(q.axis == op.params["axis"] for q in known.get(op.inputs[0], ()))
    return False


def _aligned(graph: Graph, op: Op, known: Mapping[int, Pieces], output: int) -> Pieces:
    """Through an elementwise operation, or one that keeps the number of axes."""
    rank = len(graph.program.shape(output))
    for v in op.inputs:
        if v in known and len(graph.program.shape(v)) == rank:
            return known[v]
    return ()


def _moved(graph: Graph, op: Op, known: Mapping[int, Pieces]) -> Pieces:
    primitive: Any = op.primitive
    params = op.params
    first = known.get(op.inputs[0], ())
    shape = graph.program.shape
    out: Pieces
    if primitive is p.broadcast_in_dim_p:
        out = tuple(q._replace(axis=params["broadcast_dimensions"][q.axis]) for q in first)
    elif primitive is p.reshape_p:
        out = _reshaped(first, shape(op.inputs[0]), shape(op.outputs[0]))
    elif primitive is p.transpose_p:
        out = tuple(q._replace(axis=params["permutation"].index(q.axis)) for q in first)
    elif primitive is p.squeeze_p:
        out = _without(first, params["dimensions"])
    elif primitive in _REDUCTIONS:
        out = _without(first, _summed(op))
    elif primitive is SLICE_IN:
        out = _without(first, (0,))
    elif primitive is STACK_OUT:
        out = tuple(q._replace(axis=q.axis + 1) for q in first)
    elif primitive is jaxprs.STACK:
        followed = next((known[v] for v in op.inputs if v in known), ())
        out = tuple(q._replace(axis=q.axis + (q.axis >= params["axis"])) for q in followed)
    elif primitive is jaxprs.UNSTACK:
        out = _without(first, (params["axis"],))
    elif primitive is p.dot_general_p:
        out = _contracted(op, known, [len(shape(v)) for v in op.inputs[:2]])
    elif primitive is p.conv_general_dilated_p:
        numbers = params["dimension_numbers"]
        out = tuple(
            q._replace(axis=numbers.out_spec[numbers.lhs_spec.index(q.axis)])
            for q in first if q.axis != numbers.lhs_spec[1]
        )  # fmt: skip
    elif primitive is p.gather_p:
        out = _gathered(op, known)
    else:
        out = first
    return out


def _summed(op: Op) -> tuple[Any, ...]:
    """Axes that a reduction takes away; a collective under vmap names them by number, others by mesh axes."""
    return tuple(a for a in op.params.get("axes", op.params.get("dimensions", ())) if not isinstance(a, str))


def _without(pieces: Pieces, axes: Iterable[int]) -> Pieces:
    gone = set(axes)
    return tuple(q._replace(axis=q.axis - sum(a < q.axis for a in gone)) for q in pieces if q.axis not in gone)


def _contracted(op: Op, known: Mapping[int, Pieces], ranks: list[int]) -> Pieces:
    contract, batch = op.params["dimension_numbers"]
    found: dict[Piece, None] = {}
    for side in (0, 1):
        free = [a for a in range(ranks[side]) if a not in contract[side] and a not in batch[side]]
        before = len(batch[0]) + (ranks[0] - len(contract[0]) - len(batch[0]) if side else 0)
        for q in known.get(op.inputs[side], ()):
            if q.axis in batch[side]:
                found[q._replace(axis=batch[side].index(q.axis))] = None
            elif q.axis in free:
                found[q._replace(axis=before + free.index(q.axis))] = None
    return tuple(found)


def _gathered(op: Op, known: Mapping[int, Pieces]) -> Pieces:
    """Axes of the indices become the axes that are no window; axes of the operand that are sliced whole stay."""
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    found = []
    rank = len(numbers.offset_dims) + max((q.axis for q in known.get(op.inputs[1], ())), default=-1) + 2
    free = [a for a in range(rank) if a not in numbers.offset_dims]
    for q in known.get(op.inputs[1], ()):
        if q.axis < len(free):
            found.append(q._replace(axis=free[q.axis]))
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    kept = [a for a in range(len(sizes)) if a not in gone]
    for q in known.get(op.inputs[0], ()):
        if q.axis in kept and sizes[q.axis] == q.size * q.inner:
            found.append(q._replace(axis=numbers.offset_dims[kept.index(q.axis)]))
    return tuple(found)


def _reshaped(pieces: Pieces, before: tuple[int, ...], after: tuple[int, ...]) -> Pieces:
    """A piece covers `size` entries at a stride counted from the last axis; the axes with those strides hold it."""
    found = []
    for q in pieces:
        low = math.prod(before[q.axis + 1 :]) * q.inner  # entries behind one step along the piece
        high = low * q.size
        stride = 1
        for axis in range(len(after) - 1, -1, -1):
            bottom, top = stride, stride * after[axis]
            start, stop = max(low, bottom), min(high, top)
            if start < stop or (q.size == after[axis] == 1 and bottom == low and not found):
                found.append(Piece(axis, stop // start, start // bottom))
            stride = top
    return tuple(found)
