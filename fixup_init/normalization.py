"""Finds normalizations by what they do, and takes them out.

A normalization is where the order of a region with a reduction, taken in its input, falls from 1 to 0: multiplying the
input by c changes nothing. The region starts at the immediate dominator of the product (or quotient) in which the
orders cancel. So batch, layer, group, instance, RMS and L2 normalization, and home-made ones, are one thing. A softmax
is none: its orders do not cancel, they vanish in the exponential. Inference-form batch norm has no reduction; it is a
product with running statistics.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping

import numpy as np

from fixup_init import axes, jaxprs
from fixup_init.graph import STATE, Graph
from fixup_init.jaxprs import p
from fixup_init.orders import SQUASH, orders
from fixup_init.program import Op, Program

__all__ = ["Norm", "check_bypass", "find", "keep_affine", "remove"]

_REDUCTIONS = frozenset({p.reduce_sum_p, p.reduce_max_p, p.reduce_window_sum_p, p.reduce_p, p.dot_general_p})
_PASSING = frozenset({p.convert_element_type_p, p.reshape_p, p.broadcast_in_dim_p, p.transpose_p, p.copy_p})
_CHOOSING = frozenset({
    p.select_n_p, p.mul_p, p.div_p, p.top_k_p, p.approx_top_k_p, p.gather_p, p.slice_p, p.dynamic_slice_p, p.sort_p,
    p.squeeze_p, jaxprs.SPLIT,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Norm:
    """One normalization, in values of the program: `source` is what it normalizes, `end` its result, affine included.

    `core` is the value in which the orders cancel; `region` holds the nodes from `source` to `end`, neither the source
    itself; `axes` are those of the source that its statistics are taken over, and `batch` says whether examples share
    them; `scale` and `bias` are the leaves of its affine part. `core` is `shifted` times or over `statistic`, and maybe
    times the scale.
    """

    source: int
    core: int
    centred: int  # source minus its mean, where that was found apart; else the source
    end: int
    region: frozenset[int]
    axes: tuple[int, ...]
    batch: bool
    form: str  # "train" or "inference"
    scale: tuple[int, ...]
    bias: tuple[int, ...]
    shifted: int
    statistic: int


def find(graph: Graph) -> tuple[Norm, ...]:
    """All normalizations of activations, in trace order."""
    found: list[Norm] = []
    for k, op in enumerate(graph.program.ops):
        node = k + len(graph.inputs)
        if node not in graph.parents or op.primitive not in (p.mul_p, p.div_p):
            continue
        streams = [v for v in op.inputs if graph.is_activation(v)]
        if len(streams) == 2:
            norm = _statistical(graph, node, op)
        elif op.primitive is p.mul_p:
            norm = _inference(graph, node, op)
        else:
            norm = None
        if norm is not None:
            found.append(norm)
    if not any(norm.form == "train" for norm in found):
        return tuple(found)
    batch = axes.batch_axes(graph)
    return tuple(_with_axes(graph, norm, batch) if norm.form == "train" else norm for norm in found)


def check_bypass(graph: Graph, norms: tuple[Norm, ...]) -> None:
    """Refuses where a run on arrays could not bypass a normalization: inside of an operation that is bound whole.

    Raises:
      NotImplementedError: a normalization lies inside of `jax.lax.platform_dependent`.
    """
    made = set(graph.program.inputs) | graph.program.made()
    for norm in norms:
        if norm.end not in made or norm.source not in made:
            raise NotImplementedError(
                f"The normalization in {graph.scope(graph.node_of[norm.core]) or 'the model'!r} lies inside of a "
                "jax.lax.platform_dependent, which runs as a whole: it cannot be bypassed on arrays. Measure with "
                'normalization="kept", or give the model without it.'
            )


def keep_affine(graph: Graph, norms: tuple[Norm, ...]) -> Program:
    """The program with normalizations bypassed, but their scale and bias left where they are.

    Args:
      graph: the graph in which `norms` were found.
      norms: what to take out.
    """
    program = graph.program
    instead: dict[int, int] = {}
    for norm in norms:
        value = _unscaled(graph, norm.shifted)
        op = graph.op(graph.node_of[value])
        if op is not None and op.primitive is p.sub_p and graph.node_of[value] in norm.region:
            instead[value] = op.inputs[0]  # x - mean(x)
    ones = {norm.statistic: np.ones(program.shape(norm.statistic), program.dtype(norm.statistic)) for norm in norms}
    return program.rewired(instead).fixed(ones)


def remove(graph: Graph, norms: tuple[Norm, ...]) -> Program:
    """The program with normalizations bypassed, their scale and bias included.

    Args:
      graph: the graph in which `norms` were found.
      norms: what to take out.

    Raises:
      NotImplementedError: a normalization changes the shape of its input, or its dtype in no cast.
    """
    program = graph.program
    instead: dict[int, int] = {}
    for norm in norms:
        if program.shape(norm.source) != program.shape(norm.end):
            raise NotImplementedError(
                f"The normalization in {graph.scope(graph.node_of[norm.core])!r} changes the shape of its input, "
                f"{program.shape(norm.source)} to {program.shape(norm.end)}, and cannot be bypassed."
            )
        same = _of_one_dtype(graph, norm)
        if same is None:
            raise NotImplementedError(
                f"The normalization in {graph.scope(graph.node_of[norm.core])!r} changes the dtype of its input, "
                f"{program.dtype(norm.source)} to {program.dtype(norm.end)}, and cannot be bypassed with its scale and "
                'bias. Measure with normalization="affine", which leaves these where they are, or "kept".'
            )
        end, source = same
        instead[end] = source
    resolved = {}
    for end, source in instead.items():  # a normalization of a normalization
        while source in instead:
            source = instead[source]
        resolved[end] = source
    return program.rewired(resolved)


def _of_one_dtype(graph: Graph, norm: Norm) -> tuple[int, int] | None:
    """The end of a normalization and its source, before or after casts of either (float32 in a bfloat16 stream)."""
    dtype = graph.program.dtype
    sources = [norm.source]
    for n in sorted(norm.region):
        op = graph.op(n)
        if op is not None and op.primitive is p.convert_element_type_p and op.inputs[0] in sources:
            sources += op.outputs
    end = norm.end
    while True:
        for source in sources:
            if dtype(source) == dtype(end) and graph.node_of[source] < graph.node_of[end]:
                return end, source
        op = graph.op(graph.node_of[end])
        if op is None or op.primitive is not p.convert_element_type_p:
            return None
        end = op.inputs[0]


def _statistical(graph: Graph, node: int, op: Op) -> Norm | None:
    walk = _region(graph, node)
    if walk is None:
        return None
    start, region = walk
    source = _source(graph, start, region)
    if _squashed(graph, start) and not any(_squares(graph, n) for n in region):
        return None
    reductions = [o for n in region if (o := graph.op(n)) is not None and o.primitive in _REDUCTIONS]
    if not reductions:
        return None
    made = graph.op(start)
    seeds = dict.fromkeys(made.outputs if made else (graph.value(start),), 1.0)
    ops = sorted(n - len(graph.inputs) for n in (*region, node))
    behind = graph.behind(v for k in ops for v in graph.program.ops[k].inputs)
    known = orders(graph, sorted({*ops, *behind}), seeds)
    left, right = (known.get(v, 0.0) for v in op.inputs)
    cancels = known[op.outputs[0]] == 0 and left != 0 and right != 0
    if not cancels and not _divisive(graph, op, sorted({*ops, *behind}), seeds):
        return None
    centred = _centring(graph, start)
    nodes = set(region)
    around = source
    if centred is not None:
        nodes |= {start, *centred[1]}
        source = graph.value(centred[0])
        reductions += [o for n in centred[1] if (o := graph.op(n)) is not None and o.primitive in _REDUCTIONS]
    scale = _leaves_of(graph, [n for n in region if _is(graph, n, p.mul_p)])
    end, tail, scale_after, bias = _affine(graph, node, source)
    shifted, factor = op.inputs[::-1] if op.primitive is p.mul_p and left < right else op.inputs
    return Norm(
        source, op.outputs[0], around, graph.value(end), frozenset(nodes | {node, *tail}), (), False, "train",
        tuple(dict.fromkeys((*scale, *scale_after))), bias, shifted, _unscaled(graph, factor),
    )  # fmt: skip


def _unscaled(graph: Graph, value: int) -> int:
    """A value before casts, reshapes and the parameters that multiply it."""
    while (op := graph.op(graph.node_of.get(value, -1))) is not None:
        streams = [v for v in op.inputs if graph.is_activation(v)]
        if len(streams) != 1 or op.primitive not in _PASSING | {p.mul_p}:
            break
        (value,) = streams
    return value


def _divisive(graph: Graph, op: Op, ops: list[int], seeds: dict[int, float]) -> bool:
    """Whether x is divided by a statistic of x that a constant keeps from zero (local response normalization): the
    orders cancel for large x, where the constant does not count."""
    known = orders(graph, ops, seeds, far=True)
    left, right = (known.get(v, 0.0) for v in op.inputs)
    divided = right > 0 if op.primitive is p.div_p else min(left, right) < 0
    return bool(known[op.outputs[0]] <= 0 and divided)


def _inference(graph: Graph, node: int, op: Op) -> Norm | None:
    """x * f(running variance): the root or quotient is on the side of the parameters."""
    factor = next(v for v in op.inputs if not graph.is_activation(v))
    if not graph.kind[factor] & STATE:
        return None
    primitives = {graph.program.ops[k].primitive for k in graph.behind([factor])}
    if not primitives & {p.rsqrt_p, p.sqrt_p, p.pow_p, p.integer_pow_p}:
        return None
    stream = next(v for v in op.inputs if graph.is_activation(v))
    nodes = {node}
    made = graph.op(graph.node_of[stream])
    if made is not None and made.primitive is p.sub_p and graph.kind[made.inputs[1]] & STATE:
        nodes.add(graph.node_of[stream])
        stream = made.inputs[0]
    scale = tuple(o for o in graph.origins.get(factor, ()) if graph.leaves[o].kind == "param")
    end, tail, scale_after, bias = _affine(graph, node, stream)
    shifted = next(v for v in op.inputs if graph.is_activation(v))
    return Norm(
        stream, op.outputs[0], stream, graph.value(end), frozenset(nodes | set(tail)), (), True, "inference",
        tuple(dict.fromkeys((*scale, *scale_after))), bias, shifted, _root_of_state(graph, factor),
    )  # fmt: skip


def _root_of_state(graph: Graph, factor: int) -> int:
    """The value nearest a factor that is made of state alone."""
    while graph.kind[factor] & ~STATE:
        made = graph.program.ops[graph.maker[factor]]
        factor = next(v for v in made.inputs if graph.kind[v] & STATE)
    return factor


def _region(graph: Graph, node: int) -> tuple[int, list[int]] | None:
    """The immediate dominator of a node and the nodes between, unless a weight layer lies between."""
    heap = [-n for n in graph.parents[node]]
    heapq.heapify(heap)
    seen = set(graph.parents[node])
    region: list[int] = []
    while heap:
        n = -heapq.heappop(heap)
        if not heap:
            return n, region
        if n in graph.layers or not graph.parents[n]:
            return None
        region.append(n)
        for above in graph.parents[n]:
            if above not in seen:
                seen.add(above)
                heapq.heappush(heap, -above)
    return None


def _source(graph: Graph, start: int, region: list[int]) -> int:
    """The value of the dominator that the region reads (a dominator may make several)."""
    made = graph.op(start)
    if made is None or len(made.outputs) == 1:
        return graph.value(start)
    used = {v for n in region if (o := graph.op(n)) is not None for v in o.inputs}
    return next((v for v in made.outputs if v in used), made.outputs[0])


def _squashed(graph: Graph, node: int) -> bool:
    """Whether a node is an exponential (or another function with a constant limit), maybe masked, divided by its sum,
    or with some of its entries chosen: a softmax."""
    for _ in range(12):
        op = graph.op(node)
        if op is None:
            return False
        if op.primitive in SQUASH:
            return True
        if op.primitive not in _CHOOSING and (op.primitive not in _PASSING or len(graph.parents[node]) != 1):
            return False
        chosen = op.inputs[1:] if op.primitive is p.select_n_p else op.inputs[:1]
        chosen = [v for v in chosen if graph.is_activation(v)] or [v for v in op.inputs if graph.is_activation(v)]
        node = graph.node_of[chosen[0]]
    return False


def _squares(graph: Graph, node: int) -> bool:
    op = graph.op(node)
    assert op is not None
    if op.primitive is p.integer_pow_p:
        return op.params["y"] == 2
    if op.primitive in (p.mul_p, p.dot_general_p):
        return op.inputs[0] == op.inputs[1]
    return op.primitive is p.square_p


def _centring(graph: Graph, node: int) -> tuple[int, list[int]] | None:
    """For x - mean(x): the node of x and the nodes between."""
    op = graph.op(node)
    if op is None or op.primitive is not p.sub_p:
        return None
    walk = _region(graph, node)
    if walk is None:
        return None
    start, region = walk
    allowed = _PASSING | _REDUCTIONS | {p.div_p, p.mul_p, p.psum_p, *jaxprs.collectives()}
    if start != graph.node_of.get(op.inputs[0]) or not region or not all(_is(graph, n, *allowed) for n in region):
        return None
    if not any(_is(graph, n, *_REDUCTIONS) for n in region):
        return None
    return start, region


def _affine(graph: Graph, node: int, source: int) -> tuple[int, list[int], tuple[int, ...], tuple[int, ...]]:
    """Follows a normalized value through its scale and bias: (last node, nodes passed, scale leaves, bias leaves)."""
    tail: list[int] = []
    scale: list[int] = []
    bias: list[int] = []
    settled = node  # what only casts or reshapes lie behind is left outside
    passed: list[int] = []
    while len(graph.users[node]) == 1:
        user = graph.users[node][0]
        op = graph.op(user)
        assert op is not None
        if op.primitive in (p.mul_p, p.add_p) and len(graph.parents[user]) == 1:
            other = next((v for v in op.inputs if not graph.is_activation(v)), None)
            if other is None or not graph.is_parameter(other):
                break
            leaves = [o for o in graph.origins[other] if graph.leaves[o].kind == "param"]
            if op.primitive is p.mul_p and bias:
                break  # a multiplier behind the affine part is not the normalization's
            (scale if op.primitive is p.mul_p else bias).extend(leaves)
            passed.append(user)
            tail.extend(passed)
            passed.clear()
            node = settled = user
            if op.primitive is p.add_p:
                break
        elif op.primitive in _PASSING:
            passed.append(user)
            node = user
        else:
            break
    return _restored(graph, settled, source, tail), tail, tuple(scale), tuple(bias)


def _restored(graph: Graph, node: int, source: int, tail: list[int]) -> int:
    """The node behind `node` with the shape and dtype of what was normalized, where casts and reshapes lead there."""
    program = graph.program
    wanted = program.shape(source), program.dtype(source)
    end, passed = node, []
    while (program.shape(graph.value(end)), program.dtype(graph.value(end))) != wanted:
        if len(graph.users[end]) != 1 or not _is(graph, graph.users[end][0], p.convert_element_type_p, p.reshape_p):
            return node
        end = graph.users[end][0]
        passed.append(end)
    tail.extend(passed)
    return end


def _leaves_of(graph: Graph, nodes: list[int]) -> tuple[int, ...]:
    """Parameters that multiply activations at these nodes."""
    leaves: list[int] = []
    for n in nodes:
        op = graph.op(n)
        assert op is not None
        for v in op.inputs:
            if graph.is_parameter(v):
                leaves.extend(o for o in graph.origins[v] if graph.leaves[o].kind == "param")
    return tuple(dict.fromkeys(leaves))


def _with_axes(graph: Graph, norm: Norm, batch: Mapping[int, axes.Pieces]) -> Norm:
    """The axes of the normalized value that its statistics are taken over, and whether the batch is among them."""
    ops = sorted(n - len(graph.inputs) for n in norm.region)
    made = [graph.program.ops[k] for k in ops]
    shape = graph.program.shape(norm.source)
    mixing = [op for op in made if axes.mixes(op)]
    if all(op.primitive is p.reduce_sum_p and graph.program.shape(op.inputs[0]) == shape for op in mixing):
        over = {int(a) for op in mixing for a in op.params["axes"]}
    else:
        over = set()
        for axis, size in enumerate(shape):
            known = axes.follow(graph, ops, {norm.source: (axes.Piece(axis, size),)})
            if any(axes.reduced(graph, op, known) for op in mixing):
                over.add(axis)
    return dataclasses.replace(
        norm, axes=tuple(sorted(over)), batch=any(axes.reduced(graph, op, batch) for op in mixing)
    )


def _is(graph: Graph, node: int, *primitives: object) -> bool:
    op = graph.op(node)
    return op is not None and op.primitive in primitives
