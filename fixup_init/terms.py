"""The terms of a sum: what lies between its split and the sum, and how each depends on the split."""

from __future__ import annotations

import dataclasses
import heapq
import math

import numpy as np

from fixup_init import jaxprs
from fixup_init.graph import COPIES, Graph, Split, ancestors
from fixup_init.jaxprs import p
from fixup_init.normalization import Norm
from fixup_init.orders import PRODUCT, Order, has_rule, orders
from fixup_init.program import CARRY_IN, CARRY_OUT, IDENTITY, SHARD_IN, SHARD_OUT, SLICE_IN, STACK_OUT, Op

__all__ = [
    "SCALING", "SUMS", "UNSCALED", "Streams", "Term", "addends", "apart", "carries", "follows", "is_fed", "is_gated",
    "is_linear", "is_repeated", "is_scaled", "is_sum", "ops_of", "reshapes", "term_of", "together", "unscaled",
]  # fmt: skip

SUMS = frozenset({p.add_p, p.sub_p, p.add_jaxvals_p, p.scatter_add_p})
# Operations that combine different positions or channels.
MIXING = frozenset({
    p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_window_sum_p,
    p.reduce_window_max_p, p.reduce_window_min_p, p.reduce_window_p, p.reduce_p, p.cumsum_p, p.cummax_p, p.cummin_p,
    p.cumprod_p, p.cumlogsumexp_p, p.fft_p, p.sort_p, p.reduce_prod_p, p.scatter_add_p,
})  # fmt: skip
_RESHAPING = frozenset({
    p.pad_p, p.concatenate_p, p.slice_p, p.reshape_p, p.transpose_p, p.gather_p, p.dynamic_slice_p, p.rev_p, *MIXING,
})  # fmt: skip
UNSCALED = frozenset({p.stop_gradient_p, p.convert_element_type_p, p.copy_p, IDENTITY})
SCALING = UNSCALED | COPIES | {p.mul_p, p.div_p, p.neg_p}
# Linear functions of their arguments, whatever these are.
_LINEAR = frozenset({
    p.add_p, p.sub_p, p.neg_p, p.reduce_sum_p, p.cumsum_p, p.reduce_window_sum_p, p.convert_element_type_p,
    p.broadcast_in_dim_p, p.reshape_p, p.transpose_p, p.squeeze_p, p.copy_p, p.slice_p, p.rev_p, p.pad_p,
    p.concatenate_p, p.real_p, p.imag_p, p.complex_p, p.conj_p, p.fft_p, p.stop_gradient_p, p.sharding_constraint_p,
    p.name_p, p.psum_p, p.reduce_precision_p, p.device_put_p, jaxprs.SPLIT, jaxprs.STACK, jaxprs.UNSTACK, jaxprs.TILE,
    CARRY_IN, CARRY_OUT, SLICE_IN, STACK_OUT, SHARD_IN, SHARD_OUT,
    IDENTITY,
})  # fmt: skip


class Streams:
    """What is known of a graph's streams while its sums are decided, in trace order."""

    def __init__(self, graph: Graph, norms: tuple[Norm, ...]) -> None:
        self.graph = graph
        self.inside = frozenset().union(*(n.region for n in norms))  # nodes of normalizations
        self.transparent = {n.core: (n.source, n.centred) for n in norms}
        self.normed = {graph.node_of[n.core] for n in norms}
        self.weighted = set(graph.layers)  # nodes with a weight layer at or before them
        for node, above in graph.parents.items():
            if not self.weighted.isdisjoint(above):
                self.weighted.add(node)
        one_of = {op.primitive: op for op in graph.program.ops}
        mixing = {q for q, op in one_of.items() if q in MIXING or not has_rule(op)}
        first = len(graph.inputs)
        # Nodes that combine different positions or channels.
        self.mixing = {first + k for k, op in enumerate(graph.program.ops) if op.primitive in mixing}
        self.working = self.mixing.union(graph.layers)
        # Regions that are not entered and take parameters: how many layers they hold is not known.
        self.closed = {n for n in graph.regions if any(map(graph.is_parameter, graph.program.ops[n - first].inputs))}
        self.alive = ancestors(graph, graph.outputs) or set()  # the rest only goes on to the next pass of a scan
        self.splits: dict[int, int] = {}  # of the residuals found, by the node of the sum


def addends(graph: Graph, node: int) -> tuple[int, ...]:
    """The activations that a node adds, () where it is no sum of activations."""
    op = graph.op(node)
    if op is None or node not in graph.parents:
        return ()
    if op.primitive not in SUMS:
        return ()
    added = (op.inputs[0], op.inputs[2]) if op.primitive is p.scatter_add_p else op.inputs
    return added if all(graph.is_activation(v) for v in added) else ()


def is_sum(graph: Graph, node: int) -> bool:
    return bool(addends(graph, node))


@dataclasses.dataclass(frozen=True)
class Term:
    values: tuple[int, ...]  # several where a skip is a formula of the split in several terms
    nodes: tuple[int, ...]  # those that descend from the split, in order
    aside: tuple[int, ...]  # nodes of a second source that only this term uses
    layers: tuple[int, ...]  # weight layers among `nodes`
    mixes: bool
    closed: bool  # holds a region that is not entered, with parameters: how many layers there are is not known


def together(terms: list[Term]) -> Term:
    """Several terms without weights that do not mix: one formula of the split."""
    if len(terms) == 1:
        return terms[0]
    return Term(
        tuple(v for t in terms for v in t.values), tuple(sorted({n for t in terms for n in t.nodes})),
        tuple(sorted({n for t in terms for n in t.aside})), (), any(t.mixes for t in terms), False,
    )  # fmt: skip


def term_of(streams: Streams, value: int, color: int, split: Split) -> Term:
    graph = streams.graph
    reached = sorted(n for n, mask in split.colors.items() if mask & color)
    below: set[int] = {split.node}
    for n in reached:
        if not below.isdisjoint(graph.parents[n]):
            below.add(n)
    nodes = tuple(n for n in reached if n in below)
    aside: set[int] = set()  # a second source, as far back as nothing else uses it
    crossing = {n: r for n in nodes if (r := streams.splits.get(n)) is not None and r not in below}
    others = {*streams.splits, *crossing.values()}  # streams of their own
    heap = [-a for n in nodes if n not in crossing for a in graph.parents[n] if a not in below]
    heapq.heapify(heap)
    while heap:
        n = -heapq.heappop(heap)
        used = any(u in streams.alive and u not in below and u not in aside for u in graph.users[n])
        if used or n in aside or n in others or n not in split.colors:
            continue
        aside.add(n)
        for a in graph.parents[n]:
            heapq.heappush(heap, -a)
    layers = tuple(n for n in nodes if n in graph.layers)
    mixes = any(n in streams.mixing and n not in streams.inside for n in nodes)
    if mixes and not layers:
        mixes = not (_is_multiple(graph, value, split.node) or _is_shifted(graph, nodes, split.node))
    return Term((value,), nodes, tuple(sorted(aside)), layers, mixes, not streams.closed.isdisjoint(nodes))


def _is_multiple(graph: Graph, value: int, split: int) -> bool:
    """Whether a term is its split times something, whatever that is made of: x + x g(x) is x (1 + g(x)), which scales x
    and adds nothing that was mixed (global response normalization)."""
    seen: set[int] = set()
    todo = [graph.node_of[value]]
    while todo:
        n = todo.pop()
        op = graph.op(n)
        if n == split:
            return True
        if op is None or n < split or n in seen:
            continue
        seen.add(n)
        if op.primitive in UNSCALED or op.primitive in (p.mul_p, p.neg_p):
            todo.extend(graph.parents[n])
        elif op.primitive is p.div_p and graph.is_activation(op.inputs[0]):
            todo.append(graph.node_of[op.inputs[0]])
    return False


def _is_shifted(graph: Graph, nodes: tuple[int, ...], split: int) -> bool:
    """Whether a term reads its split only as what is taken off another value: m + g(x - m) shifts x to where g is safe,
    and back (log-sum-exp), and nothing of m goes through g."""
    same, taken = {split}, False
    for n in nodes:
        op = graph.op(n)
        if op is None or same.isdisjoint(graph.parents[n]):
            continue
        if op.primitive in UNSCALED | COPIES:
            same.add(n)
        elif op.primitive is p.sub_p and graph.node_of.get(op.inputs[0]) not in (*same, *nodes):
            taken = True
        else:
            return False
    return taken


def reshapes(graph: Graph, term: Term) -> bool:
    return any((op := graph.op(n)) is not None and op.primitive in _RESHAPING for n in term.nodes)


def is_scaled(graph: Graph, term: Term) -> bool:
    return any(
        (op := graph.op(n)) is not None and op.primitive is p.mul_p and any(graph.is_parameter(v) for v in op.inputs)
        for n in term.nodes
    )


def _seeds(graph: Graph, node: int) -> dict[int, Order]:
    op = graph.op(node)
    return dict.fromkeys(op.outputs if op is not None else (graph.value(node),), 1.0)


def carries(streams: Streams, node: int, skip: Term, branches: list[Term], split: Split) -> bool:
    """Whether the skip is linear in the split, its coefficients made without other streams, and a projection's kernels
    are factors of it: a gate is no skip, and what is repeated over another stream's positions is a bias."""
    graph = streams.graph
    ops = [n - len(graph.inputs) for n in skip.nodes]
    known = orders(graph, ops, _seeds(graph, split.node), streams.transparent, inside=True)
    if any(known.get(v, 0.0) != 1 for v in skip.values):
        return False
    if any(is_repeated(graph, v, node, split.node) for v in skip.values) and any(
        is_fed(graph, t, split) for t in branches
    ):
        return False
    held = {split.node, *skip.nodes}
    for n in skip.nodes:
        op = graph.op(n)
        assert op is not None
        product = op.primitive in PRODUCT and n not in streams.inside
        if product and any(a not in held and a in streams.weighted for a in graph.parents[n]):
            return False
    kernels = dict.fromkeys(graph.layers[n].kernel for n in skip.layers)
    if not kernels:
        return True
    seeds: dict[int, Order] = dict(zip(kernels, np.eye(len(kernels)), strict=True))
    known = orders(graph, ops_of(graph, skip), seeds, streams.transparent)
    return all(bool(np.all(known.get(v, 0.0) >= 1)) for v in skip.values)


def is_repeated(graph: Graph, value: int, node: int, split: int) -> bool:
    """Whether a term has fewer entries than the sum, and is repeated for it."""
    while (op := graph.op(graph.node_of[value])) is not None:
        if op.primitive not in (p.convert_element_type_p, p.broadcast_in_dim_p) or graph.node_of[value] == split:
            break
        if not graph.is_activation(op.inputs[0]):
            break
        value = op.inputs[0]
    return math.prod(graph.program.shape(value)) < math.prod(graph.shape(node))


def is_fed(graph: Graph, term: Term, split: Split) -> bool:
    """Whether a term has another source than the split."""
    held = {split.node, *term.nodes}
    return any(a not in held for n in term.nodes for a in graph.parents[n])


def follows(streams: Streams, term: Term, split: Split) -> bool:
    """Whether a term scales with the split, what is added to it from elsewhere apart."""
    graph = streams.graph
    ops = [n - len(graph.inputs) for n in term.nodes]
    known = orders(graph, ops, _seeds(graph, split.node), streams.transparent, inside=True)
    return all(1 <= known.get(v, 0.0) < math.inf for v in term.values)


def is_linear(streams: Streams, term: Term) -> bool:
    """Whether a term is a linear function of the split."""
    graph = streams.graph
    for n in term.nodes:
        op = graph.op(n)
        assert op is not None
        if op.primitive in _LINEAR:
            continue
        sources = [v for v in op.inputs if graph.is_activation(v)]
        if op.primitive in PRODUCT and len(sources) == 1:
            continue
        if op.primitive is p.div_p and sources == [op.inputs[0]]:
            continue
        if op.primitive is p.select_n_p and not graph.is_activation(op.inputs[0]):
            continue
        return False
    return True


def _pieces(streams: Streams, term: Term, split: Split) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """The parts of the split's results that a term reads: (value, bounds along each axis)."""
    graph = streams.graph
    op = graph.op(split.node)
    results = op.outputs if op is not None else (graph.value(split.node),)
    held = set(term.nodes)
    found = []
    for n in graph.users[split.node]:
        reader = graph.op(n)
        if n in held and reader is not None:
            found += [(v, _bounds(graph, reader, v)) for v in reader.inputs if v in results]
    found += [(v, _bounds(graph, None, v)) for v in term.values if v in results]
    return found


def _bounds(graph: Graph, reader: Op | None, value: int) -> tuple[tuple[int, int], ...]:
    shape = graph.program.shape(value)
    if reader is not None and reader.primitive is p.slice_p:
        return tuple(zip(reader.params["start_indices"], reader.params["limit_indices"], strict=True))
    if reader is not None and reader.primitive is p.dynamic_slice_p and reader.inputs[0] == value:
        starts = [graph.literal(v) if not graph.is_activation(v) else None for v in reader.inputs[1:]]
        sizes = reader.params["slice_sizes"]
        if all(s is not None for s in starts):
            return tuple((int(s), int(s) + n) for s, n in zip(starts, sizes, strict=True) if s is not None)
    return tuple((0, n) for n in shape)


def apart(streams: Streams, left: Term, right: Term, split: Split) -> bool:
    """Whether two terms read disjoint parts of the split: chunks of a projection, the steps of a sequence."""
    ours, theirs = _pieces(streams, left, split), _pieces(streams, right, split)
    return bool(ours and theirs) and not any(
        a == b and all(max(i[0], j[0]) < min(i[1], j[1]) for i, j in zip(box, other, strict=True))
        for a, box in ours for b, other in theirs
    )  # fmt: skip


def ops_of(graph: Graph, term: Term) -> list[int]:
    """Indices of the ops of a term, those that make its parameters included."""
    ops = {n - len(graph.inputs) for n in (*term.nodes, *term.aside)}
    return sorted(ops.union(graph.behind(v for k in ops for v in graph.program.ops[k].inputs)))


def unscaled(graph: Graph, value: int) -> int:
    """A value before casts and stopped derivatives."""
    while (op := graph.op(graph.node_of.get(value, -1))) is not None and op.primitive in UNSCALED:
        value = op.inputs[0]
    return value


def is_gated(streams: Streams, value: int) -> bool:
    """Whether a term is, in the end, a product of two streams; x sigmoid(x) is one."""
    graph = streams.graph
    while (op := graph.op(graph.node_of[value])) is not None and op.primitive in COPIES:
        value = op.inputs[0]
    if op is None or op.primitive is not p.mul_p or graph.node_of[value] in streams.normed:
        return False
    nodes = [graph.node_of.get(v) for v in op.inputs]
    return all(n in streams.weighted for n in nodes) and len({_formula(streams, n) for n in nodes if n is not None}) > 1


def _formula(streams: Streams, node: int) -> frozenset[int]:
    """The nodes that an elementwise formula begins at."""
    graph = streams.graph
    begins: set[int] = set()
    seen, todo = {node}, [node]
    while todo:
        n = todo.pop()
        above = graph.parents[n]
        ends = n in graph.layers or not above or n in streams.mixing
        if ends or any(graph.shape(a) != graph.shape(n) for a in above):
            begins.add(n)
        else:
            todo.extend(a for a in above if a not in seen)
            seen.update(above)
    return frozenset(begins)
