"""Graph -> Residuals: sums, their splits, branches and skips.

At an addition of activations the *split* is the latest node that leads to every term. Between split and sum, terms with
weight layers are *branches*; the term without (or, for a projection shortcut, the one with fewer) is the *skip*. Chains
of additions used once are one n-ary sum. Terms without a common split, and terms with as many weights on each side, are
*parallel*: no residual. A sum inside one elementwise formula has no mixing operation and is none either.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from fixup_init import jaxprs
from fixup_init.graph import COPIES, Graph, Split, latest_common_ancestor, reaches
from fixup_init.jaxprs import Arm, Op, p
from fixup_init.normalization import Norm
from fixup_init.orders import PRODUCT, Order, has_rule, orders

__all__ = ["Branch", "Residual", "Role", "Undecided", "arms_of", "find"]

Skip = Literal["identity", "projection", "reshape"]
Role = Literal["value", "control", "gate"]

# Operations that combine different positions or channels.
MIXING = frozenset({
    p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_window_sum_p,
    p.reduce_window_max_p, p.reduce_window_min_p, p.reduce_window_p, p.reduce_p, p.cumsum_p, p.cummax_p, p.cummin_p,
    p.cumprod_p, p.cumlogsumexp_p, p.fft_p, p.sort_p, p.reduce_prod_p, p.scatter_add_p,
})  # fmt: skip
_RESHAPING = frozenset({
    p.pad_p, p.concatenate_p, p.slice_p, p.reshape_p, p.transpose_p, p.gather_p, p.dynamic_slice_p, p.rev_p, *MIXING,
})  # fmt: skip
_UNSCALED = frozenset({p.stop_gradient_p, p.convert_element_type_p, p.copy_p, jaxprs.IDENTITY})
# Linear functions of their arguments, whatever these are.
_LINEAR = frozenset({
    p.add_p, p.sub_p, p.neg_p, p.reduce_sum_p, p.cumsum_p, p.reduce_window_sum_p, p.convert_element_type_p,
    p.broadcast_in_dim_p, p.reshape_p, p.transpose_p, p.squeeze_p, p.copy_p, p.slice_p, p.rev_p, p.pad_p,
    p.concatenate_p, p.real_p, p.imag_p, p.complex_p, p.conj_p, p.fft_p, p.stop_gradient_p, p.sharding_constraint_p,
    p.name_p, p.psum_p, p.reduce_precision_p, p.device_put_p, jaxprs.SPLIT, jaxprs.STACK, jaxprs.UNSTACK, jaxprs.TILE,
    jaxprs.CARRY_IN, jaxprs.CARRY_OUT, jaxprs.SLICE_IN, jaxprs.STACK_OUT, jaxprs.SHARD_IN, jaxprs.SHARD_OUT,
    jaxprs.IDENTITY,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of a residual sum, in nodes and values of the program.

    `order` is that of its end in all its kernels, normalizations included; `free_order` disregards normalizations.
    `roles` says of each layer whether shrinking it shrinks the branch once normalizations are disregarded ("value"),
    and if not, whether its result multiplies the value path position by position ("gate") or steers it otherwise, such
    as under a softmax ("control"); `last` are the value layers with no other behind. `closing` are the parameters
    nearest the end, kernels apart, that multiply the branch: a normalization's scale, a multiplier.
    """

    end: int  # value: the term as it enters the sum
    nodes: frozenset[int]
    layers: tuple[int, ...]
    depth: int
    order: float
    free_order: float
    roles: dict[int, Role]  # by layer
    last: tuple[int, ...]
    shares: dict[int, float]  # of `order`, by kernel leaf; 0 where a normalization or a control path lies behind
    closing: tuple[int, ...]  # leaves


@dataclasses.dataclass(frozen=True)
class Residual:
    """A residual sum: where it starts, its skip and its branches."""

    split: int  # node
    sum: int  # value
    skip: Skip
    skip_layers: tuple[int, ...]
    branches: tuple[Branch, ...]
    scaled: bool  # whether a parameter multiplies the skip
    doubtful: bool  # a stream that began elsewhere runs through a branch, or skip and branch share no part of the split


@dataclasses.dataclass(frozen=True)
class Undecided:
    """A sum whose terms could be read in more than one way; `readings` has one for each term as the skip."""

    sum: int  # value
    terms: tuple[tuple[int, ...], ...]  # layers of each term
    why: str
    readings: tuple[Residual, ...]


@dataclasses.dataclass(frozen=True)
class _Term:
    values: tuple[int, ...]  # several where a skip is a formula of the split in several terms
    nodes: tuple[int, ...]  # those that descend from the split, in order
    aside: tuple[int, ...]  # nodes of a second source that only this term uses
    layers: tuple[int, ...]  # weight layers among `nodes`
    mixes: bool
    closed: bool  # holds a region that is not entered, with parameters: how many layers there are is not known


def find(graph: Graph, norms: tuple[Norm, ...]) -> tuple[tuple[Residual, ...], tuple[Undecided, ...]]:
    """All residual sums in trace order, and those that cannot be decided."""
    search = _Search(graph, norms)
    for k in range(len(graph.program.ops)):
        node = k + len(graph.inputs)
        if node in search.inside or not _is_sum(graph, node) or search.absorber(node) is not None:
            continue
        values = search.terms(node)
        split = search.split(values)
        if split is None or search.drop_interpolation(node):
            continue
        verdict = _decide(search, node, values, split)
        if isinstance(verdict, Residual):
            search.accept(node, verdict)
        elif isinstance(verdict, Undecided):
            search.undecided.append(verdict)
    found = [search.residuals[node] for node in sorted(search.residuals)]
    projections: dict[int, list[Residual]] = {}
    for r in found:
        if r.skip == "projection":
            projections.setdefault(r.split, []).append(r)
    conditions = {
        split for split, several in projections.items()
        if any(graph.node_of[r.sum] in b.nodes for r in several for other in several for b in other.branches)
    }  # fmt: skip
    kept = tuple(
        r for r in found
        if not _is_feedthrough(graph, r, found) and not (r.skip == "projection" and r.split in conditions)
    )  # fmt: skip
    return kept, tuple(search.undecided)


def _is_feedthrough(graph: Graph, residual: Residual, residuals: Iterable[Residual]) -> bool:
    """y + D u with a parameter D, inside a branch: the direct term of a state-space layer, not a stream."""
    node = graph.node_of[residual.sum]
    return residual.scaled and any(
        node in b.nodes for r in residuals if r is not residual for b in r.branches
    )  # fmt: skip


def _ancestors(graph: Graph, nodes: Iterable[int]) -> set[int]:
    seen, todo = set(nodes), list(nodes)
    while todo:
        for a in graph.parents[todo.pop()]:
            if a not in seen:
                seen.add(a)
                todo.append(a)
    return seen


def _addends(graph: Graph, node: int) -> tuple[int, ...]:
    """The activations that a node adds, () where it is no sum of activations."""
    op = graph.op(node)
    if op is None or node not in graph.parents:
        return ()
    if op.primitive in (p.add_p, p.sub_p, p.add_jaxvals_p):
        added = op.inputs
    elif op.primitive is p.scatter_add_p:
        added = (op.inputs[0], op.inputs[2])
    else:
        return ()
    return added if all(graph.is_activation(v) for v in added) else ()


def _is_sum(graph: Graph, node: int) -> bool:
    return bool(_addends(graph, node))


class _Search:
    """What is known while sums are decided, in trace order."""

    def __init__(self, graph: Graph, norms: tuple[Norm, ...]) -> None:
        self.graph = graph
        self.inside = frozenset().union(*(n.region for n in norms))
        self.transparent = {n.core: n.source for n in norms}
        self.normed = {graph.node_of[n.core] for n in norms}
        self.weighted = set(graph.layers)  # nodes with a weight layer at or before them
        for node, above in graph.parents.items():
            if any(a in self.weighted for a in above):
                self.weighted.add(node)
        self.alive = _ancestors(graph, graph.outputs)  # the rest only goes on to the next pass of a scan
        self.residuals: dict[int, Residual] = {}  # by the node of the sum
        self.undecided: list[Undecided] = []
        self._doubtful: dict[int, Residual] = {}
        self._absorber: dict[int, int | None] = {}
        self._below: dict[int, tuple[set[int], set[int], int]] = {}

    def accept(self, node: int, residual: Residual) -> None:
        """Takes up a residual; a doubtful one only if it is a state of a stream that has another sum."""
        if residual.doubtful and residual.split not in self.residuals and residual.split not in self._doubtful:
            self._doubtful[node] = residual
            return
        self.residuals[node] = residual
        while residual.split in self._doubtful:
            node = residual.split
            residual = self.residuals[node] = self._doubtful.pop(node)

    def absorber(self, node: int) -> int | None:
        """The sum that a sum is part of: it is used there alone, and is no residual with a later split."""
        if node not in self._absorber:
            self._absorber[node] = self._find_absorber(node)
        return self._absorber[node]

    def _find_absorber(self, node: int) -> int | None:
        graph = self.graph
        op = graph.op(node)
        if op is None or op.primitive not in (p.add_p, p.sub_p) or len(graph.users[node]) != 1:
            return None
        (user,) = graph.users[node]
        around = _addends(graph, user)
        if not around or user in self.inside or len(graph.parents[user]) < 2:
            return None
        own = self.split(_addends(graph, node))
        whole = self.split(around) if own is not None else None
        if own is None or whole is None:
            return None
        later, difference = own.node > whole.node, op.primitive is p.sub_p
        if later or difference:
            # x - mean(x) stays one term; so does a residual inside of a branch, and a mixture of experts.
            terms = self.terms(node)
            residual = isinstance(_decide(self, node, terms, own), Residual)
            if residual == later or difference == later or all(self._is_gated(v) for v in terms):
                return None
            if all(_is_linear(self, _term(self, v, 1 << t, own)) for t, v in enumerate(terms)):
                return None  # a low-rank addition to a kernel
        return user

    def _is_gated(self, value: int) -> bool:
        """Whether a term is, in the end, a product of two streams."""
        graph = self.graph
        while (op := graph.op(graph.node_of[value])) is not None and op.primitive in COPIES:
            value = op.inputs[0]
        return (
            op is not None and op.primitive is p.mul_p
            and all(graph.node_of.get(v) in self.weighted for v in op.inputs)
        )  # fmt: skip

    def terms(self, node: int) -> list[int]:
        """The terms of an n-ary sum, as values."""
        graph = self.graph
        found: list[int] = []
        for v in _addends(graph, node):
            maker = graph.node_of[v]
            part = _is_sum(graph, maker) and maker not in self.inside and self.absorber(maker) == node
            found.extend(self.terms(maker) if part else [v])
        return found

    def split(self, values: Sequence[int]) -> Split | None:
        nodes = [self.graph.node_of[v] for v in values]
        return latest_common_ancestor(self.graph, nodes, functools.partial(self._is_hopeless, nodes))

    def _is_hopeless(self, terms: Sequence[int], split: int) -> bool:
        """Whether a distant split cannot be one of a residual, seen without walking what lies between: another stream
        came in from elsewhere, or both terms are weighted and a stream between goes on behind the sum."""
        graph = self.graph
        below, weighted, done = self._below.get(split, ({split}, set(), split + 1))
        for node in range(done, max(terms) + 1):
            above = graph.parents.get(node, ())
            if any(a in below for a in above):
                below.add(node)
                if node in graph.layers or any(a in weighted for a in above):
                    weighted.add(node)
        self._below[split] = (below, weighted, max(done, max(terms) + 1))
        for node in reversed(self.residuals):
            if node not in below or not any(reaches(graph, node, t) for t in terms):
                continue
            if self.residuals[node].split not in below:
                return True
            return graph.users[node][-1] > max(terms) + 1 and all(t in weighted for t in terms)
        return False

    def is_state(self, node: int, split: int) -> bool:
        """Whether a node is, scaled maybe, a residual sum with the same split: x + c (x + f(x)) has one branch."""
        graph = self.graph
        while node not in self.residuals:
            if node in graph.layers or len(graph.parents[node]) != 1 or _mixes(graph, node):
                return False
            (node,) = graph.parents[node]
        return self.residuals[node].split == split

    def drop_interpolation(self, node: int) -> bool:
        """Whether a sum is a + s (b - a). With s = 1 (straight-through) it is b, with s an activation a gate: neither
        it nor the difference is a residual then. With a constant or a parameter, the difference is the residual."""
        graph = self.graph
        op = graph.op(node)
        if op is None or op.primitive is not p.add_p:
            return False
        for base, other in (op.inputs, op.inputs[::-1]):
            found = self._difference(graph.node_of[other], self._unscaled(base))
            if found is not None:
                difference, gated = found
                if gated:
                    self.residuals.pop(difference, None)
                return True
        return False

    def _difference(self, node: int, base: int) -> tuple[int, bool] | None:
        graph = self.graph
        scaled = gated = False
        while (op := graph.op(node)) is not None:
            if op.primitive is p.sub_p:
                return (node, gated or not scaled) if self._unscaled(op.inputs[1]) == base else None
            streams = [v for v in op.inputs if graph.is_activation(v)]
            if op.primitive is p.mul_p and len(streams) == 2:
                gated = True
                streams = [v for v in streams if (o := graph.op(graph.node_of[v])) and o.primitive is p.sub_p]
            elif op.primitive in (p.mul_p, p.div_p):
                scaled = True
            elif op.primitive not in _UNSCALED:
                return None
            if len(streams) != 1:
                return None
            node = graph.node_of[streams[0]]
        return None

    def _unscaled(self, value: int) -> int:
        graph = self.graph
        while (op := graph.op(graph.node_of.get(value, -1))) is not None and op.primitive in _UNSCALED:
            value = op.inputs[0]
        return value


def _decide(search: _Search, node: int, values: list[int], split: Split) -> Residual | Undecided | None:
    graph = search.graph
    terms = [_term(search, v, 1 << t, split) for t, v in enumerate(values)]
    weighted = [t for t in terms if t.layers]
    plain = [t for t in terms if not t.layers]
    smooth = [t for t in plain if not t.mixes]
    if plain and len(plain) < len(terms):
        skips = smooth or plain
        if not smooth and len(plain) > 1:
            return _undecided(search, node, terms, split, "several terms without weights could be the skip")
    elif weighted:
        fewest = min(len(t.layers) for t in weighted)
        skips = [t for t in weighted if len(t.layers) == fewest]
        if any(t.closed for t in terms):
            why = "it holds a region that is not entered, so its weight layers cannot be counted"
            return _undecided(search, node, terms, split, why)
        if len(skips) > 1:
            return None  # as many weights on each side: parallel
    else:
        skips = smooth
        if not skips or len(skips) == len(plain):
            return None  # one elementwise formula, or a sum of statistics
        op = graph.op(node)
        if op is not None and op.primitive is p.sub_p:
            return None  # x - mean(x)
    if graph.loop(split.node) is not graph.loop(node):
        return None  # a state that a loop is given
    skip = _together(skips)
    branches = [t for t in terms if not set(t.values) <= set(skip.values) and (t.layers or t.mixes)]
    if not branches or not _carries(search, node, skip, split):
        return None
    if not _are_branches(search, node, skip, branches, split):
        return None
    return _residual(search, node, skip, branches, split)


def _are_branches(search: _Search, node: int, skip: _Term, branches: list[_Term], split: Split) -> bool:
    """Whether terms beside a skip are branches, and not streams of their own."""
    graph = search.graph
    for term in branches:
        end = graph.node_of[term.values[0]]
        goes_on = len(graph.users[end]) > 1
        if not _follows(search, term, split) and (skip.layers or goes_on):
            return False  # another stream, and a condition that it is given
        if goes_on and end in search.residuals:
            return False  # a stream that goes on elsewhere
        if search.is_state(end, split.node):
            return False
    if skip.layers:
        held = {n for t in (skip, *branches) for n in t.nodes} | {node}
        if any(u not in held for t in branches for n in t.nodes for u in graph.users[n]):
            return False  # two outputs of one stream at different depths
        if all(_is_linear(search, t) for t in (skip, *branches)):
            return False  # one linear map in two terms: a low-rank addition to a kernel
    return True


def _undecided(search: _Search, node: int, terms: list[_Term], split: Split, why: str) -> Undecided:
    readings = tuple(_residual(search, node, skip, [t for t in terms if t is not skip], split) for skip in terms)
    return Undecided(search.graph.value(node), tuple(t.layers for t in terms), why, readings)


def _residual(search: _Search, node: int, skip: _Term, branches: list[_Term], split: Split) -> Residual:
    graph = search.graph
    kind: Skip = "projection" if skip.layers else "reshape" if _reshapes(graph, skip) else "identity"
    # A stream that was added to within a branch, but began outside of it.
    within = {n for t in branches for n in t.nodes}
    doubtful = any(
        r.split not in within and r.split != split.node
        for n in within if (r := search.residuals.get(n)) is not None
    ) or any(_apart(search, skip, t, split) for t in branches)  # fmt: skip
    found = tuple(_branch(search, t) for t in branches)
    return Residual(split.node, graph.value(node), kind, skip.layers, found, _is_scaled(graph, skip), doubtful)


def _together(terms: list[_Term]) -> _Term:
    """Several terms without weights that do not mix: one formula of the split."""
    if len(terms) == 1:
        return terms[0]
    return _Term(
        tuple(v for t in terms for v in t.values), tuple(sorted({n for t in terms for n in t.nodes})),
        tuple(sorted({n for t in terms for n in t.aside})), (), any(t.mixes for t in terms), False,
    )  # fmt: skip


def _term(search: _Search, value: int, color: int, split: Split) -> _Term:
    graph = search.graph
    reached = sorted(n for n, mask in split.colors.items() if mask & color)
    below: set[int] = {split.node}
    for n in reached:
        if any(a in below for a in graph.parents[n]):
            below.add(n)
    nodes = tuple(n for n in reached if n in below)
    aside: set[int] = set()  # a second source, as far back as nothing else uses it
    crossing = {n: r.split for n in nodes if (r := search.residuals.get(n)) is not None and r.split not in below}
    others = {*search.residuals, *crossing.values()}  # streams of their own
    heap = [-a for n in nodes if n not in crossing for a in graph.parents[n] if a not in below]
    heapq.heapify(heap)
    while heap:
        n = -heapq.heappop(heap)
        if n in aside or n in others or n not in split.colors or any(
            u in search.alive and u not in below and u not in aside for u in graph.users[n]
        ):
            continue
        aside.add(n)
        for a in graph.parents[n]:
            heapq.heappush(heap, -a)
    return _Term(
        (value,), nodes, tuple(sorted(aside)), tuple(n for n in nodes if n in graph.layers),
        any(_mixes(graph, n) for n in nodes if n not in search.inside),
        any(_is_closed(graph, n) for n in nodes),
    )  # fmt: skip


def _mixes(graph: Graph, node: int) -> bool:
    op = graph.op(node)
    return op is not None and (op.primitive in MIXING or jaxprs.opaque(op.primitive) or not has_rule(op))


def _is_closed(graph: Graph, node: int) -> bool:
    op = graph.op(node)
    return op is not None and jaxprs.opaque(op.primitive) and any(graph.is_parameter(v) for v in op.inputs)


def _reshapes(graph: Graph, term: _Term) -> bool:
    return any((op := graph.op(n)) is not None and op.primitive in _RESHAPING for n in term.nodes)


def _is_scaled(graph: Graph, term: _Term) -> bool:
    return any(
        (op := graph.op(n)) is not None and op.primitive is p.mul_p and any(graph.is_parameter(v) for v in op.inputs)
        for n in term.nodes
    )


def _seeds(graph: Graph, node: int) -> dict[int, Order]:
    op = graph.op(node)
    return dict.fromkeys(op.outputs if op is not None else (graph.value(node),), 1.0)


def _carries(search: _Search, node: int, skip: _Term, split: Split) -> bool:
    """Whether the skip is linear in the split, its coefficients made without other streams, and a projection's kernels
    are factors of it: a gate is no skip, and what is repeated over positions just before the sum is a bias."""
    graph = search.graph
    ops = [n - len(graph.inputs) for n in skip.nodes]
    known = orders(graph, ops, _seeds(graph, split.node), search.transparent, inside=True)
    size = math.prod(graph.shape(node))
    if any(known.get(v, 0.0) != 1 for v in skip.values) or any(_is_repeated(graph, v, size) for v in skip.values):
        return False
    held = {split.node, *skip.nodes}
    for n in skip.nodes:
        op = graph.op(n)
        assert op is not None
        if op.primitive in PRODUCT and n not in search.inside:
            if any(a not in held and a in search.weighted for a in graph.parents[n]):
                return False
    kernels = dict.fromkeys(graph.layers[n].kernel for n in skip.layers)
    if not kernels:
        return True
    seeds: dict[int, Order] = dict(zip(kernels, np.eye(len(kernels)), strict=True))
    known = orders(graph, _ops(graph, skip), seeds, search.transparent)
    return all(bool(np.all(known.get(v, 0.0) >= 1)) for v in skip.values)


def _is_repeated(graph: Graph, value: int, size: int) -> bool:
    """Whether a term has fewer entries than the sum, and is repeated for it."""
    while (op := graph.op(graph.node_of[value])) is not None:
        if op.primitive not in (p.convert_element_type_p, p.broadcast_in_dim_p):
            break
        if not graph.is_activation(op.inputs[0]):
            break
        value = op.inputs[0]
    return math.prod(graph.program.shape(value)) < size


def _follows(search: _Search, term: _Term, split: Split) -> bool:
    """Whether a term scales with the split, what is added to it from elsewhere apart."""
    graph = search.graph
    ops = [n - len(graph.inputs) for n in term.nodes]
    known = orders(graph, ops, _seeds(graph, split.node), search.transparent, inside=True)
    return all(1 <= known.get(v, 0.0) < math.inf for v in term.values)


def _is_linear(search: _Search, term: _Term) -> bool:
    """Whether a term is a linear function of the split."""
    graph = search.graph
    for n in term.nodes:
        op = graph.op(n)
        assert op is not None
        if op.primitive in _LINEAR:
            continue
        streams = [v for v in op.inputs if graph.is_activation(v)]
        if op.primitive in PRODUCT and len(streams) == 1:
            continue
        if op.primitive is p.div_p and streams == [op.inputs[0]]:
            continue
        if op.primitive is p.select_n_p and not graph.is_activation(op.inputs[0]):
            continue
        return False
    return True


def _pieces(search: _Search, term: _Term, split: Split) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """The parts of the split's results that a term reads: (value, bounds along each axis)."""
    graph = search.graph
    op = graph.op(split.node)
    results = op.outputs if op is not None else (graph.value(split.node),)
    found = []
    for n in term.nodes:
        reader = graph.op(n)
        assert reader is not None
        for v in reader.inputs:
            if v in results:
                found.append((v, _bounds(graph, reader, v)))
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


def _apart(search: _Search, left: _Term, right: _Term, split: Split) -> bool:
    """Whether two terms read disjoint parts of the split: chunks of a projection, the steps of a sequence."""
    ours, theirs = _pieces(search, left, split), _pieces(search, right, split)
    return bool(ours and theirs) and not any(
        a == b and all(max(i[0], j[0]) < min(i[1], j[1]) for i, j in zip(box, other, strict=True))
        for a, box in ours for b, other in theirs
    )  # fmt: skip


def _ops(graph: Graph, term: _Term) -> list[int]:
    """Indices of the ops of a term, those that make its parameters included."""
    ops = {n - len(graph.inputs) for n in (*term.nodes, *term.aside)}
    return sorted(ops.union(graph.behind(v for k in ops for v in graph.program.ops[k].inputs)))


def _branch(search: _Search, term: _Term) -> Branch:
    graph = search.graph
    (end,) = term.values
    nodes = sorted((*term.nodes, *term.aside))
    layers = tuple(n for n in nodes if n in graph.layers)
    ops = _ops(graph, term)
    # Parameters as the optimizer sees them, and kernels as the equations do: standardization lies between.
    used = {n: graph.layers[n].kernel for n in layers}
    question = functools.partial(_shares, graph, ops, end)
    order, shares = question([(graph.layers[n].kernels, arms_of(graph, n)) for n in layers], None)
    if _is_plain(search, ops, layers):
        free_order, free = order, {used[n]: shares[graph.layers[n].kernels[0]] for n in layers}
    else:
        free_order, free = question([((used[n],), arms_of(graph, n)) for n in layers], search.transparent)
    value = tuple(n for n in layers if free[used[n]] >= 1)
    depth, last = _chain(graph, nodes, layers, value)
    roles: dict[int, Role] = {n: "value" if n in value else _steers(graph, n, set(nodes), search.normed) for n in layers}
    kernels = {v for n in layers for v in graph.layers[n].kernels}
    others = dict.fromkeys(
        v for k in ops for v in graph.program.ops[k].inputs
        if v in graph.leaves and graph.leaves[v].kind == "param" and v not in kernels
    )  # fmt: skip
    return Branch(
        end, frozenset(nodes), layers, depth, order, free_order, roles, last, shares,
        _closing(graph, ops, end, tuple(others)),
    )  # fmt: skip


def _is_plain(search: _Search, ops: list[int], layers: tuple[int, ...]) -> bool:
    """Whether kernels are parameters as they are, each used once, and no normalization follows one: with and without
    normalizations the orders are the same then."""
    graph = search.graph
    kernels = [graph.layers[n].kernel for n in layers]
    first = layers[0] - len(graph.inputs) if layers else 0
    return (
        len(set(kernels)) == len(kernels)
        and all(v in graph.leaves for v in kernels)
        and not any(k >= first and k + len(graph.inputs) in search.normed for k in ops)
    )  # fmt: skip


def arms_of(graph: Graph, node: int) -> dict[int, Arm]:
    """The arms of conditionals that a node stands in, by the conditional's number."""
    op = graph.op(node)
    arm = op.arm if op is not None else None
    found: dict[int, Arm] = {}
    while arm is not None:
        found[arm.switch] = arm
        arm = arm.parent
    return found


def _shares(
    graph: Graph, ops: list[int], end: int, kernels: Sequence[tuple[tuple[int, ...], dict[int, Arm]]],
    transparent: dict[int, int] | None,
) -> tuple[float, dict[int, float]]:  # fmt: skip
    """The order of a branch's end in all its kernels, and how much of it each is, by value.

    Two kernels in parallel have one order between them; what is joined to one kernel shrinks together. All questions
    are asked at once: entry 0 is the whole, entry k the rest without kernel k; where there are conditionals, in the
    arms where kernel k is, and then entry n + k is the whole in these arms.
    """
    groups: dict[int, tuple[tuple[int, ...], dict[int, Arm]]] = {}
    for values, arms in kernels:
        groups.setdefault(values[0], (values, arms))
    n = len(groups)
    armed = any(arms for _, arms in groups.values())
    size = 1 + 2 * n if armed else 1 + n
    seeds: dict[int, Order] = {v: np.ones(size) for values, _ in groups.values() for v in values}
    runs: dict[int, np.ndarray] = {}
    for k, (values, arms) in enumerate(groups.values(), 1):
        for v in values:
            seeds[v][k] = 0.0  # pyright: ignore[reportIndexIssue]
        for switch, arm in arms.items():
            runs.setdefault(switch, np.full(size, -1))[[k, k + n]] = arm.index
    found = np.broadcast_to(orders(graph, ops, seeds, transparent, runs or None).get(end, 0.0), (size,))
    if not math.isfinite(found[0]):
        return float(found[0]), dict.fromkeys(seeds, 0.0)
    with np.errstate(invalid="ignore"):
        share = (found[n + 1 :] if armed else found[0]) - found[1 : n + 1]
    return float(found[0]), {
        v: float(s) if math.isfinite(s) else 0.0
        for (values, _), s in zip(groups.values(), share, strict=True) for v in values
    }  # fmt: skip


_AT_ONCE = 32


def _closing(graph: Graph, ops: list[int], end: int, leaves: tuple[int, ...]) -> tuple[int, ...]:
    """The latest parameters, kernels apart, that bring a branch to zero together; () where none do."""
    latest = leaves[::-1]
    chosen: list[int] = []
    for start in range(0, len(latest), _AT_ONCE):
        more = latest[start : start + _AT_ONCE]
        seeds: dict[int, Order] = dict.fromkeys(latest[:start], 1.0)
        for k, leaf in enumerate(more):  # entry k: all leaves up to the k-th
            seeds[leaf] = (np.arange(len(more)) >= k).astype(float)
        enough = np.broadcast_to(orders(graph, ops, seeds).get(end, 0.0), (len(more),)) >= 1
        if enough.any():
            chosen = list(latest[: start + int(enough.argmax()) + 1])
            break
    for leaf in tuple(chosen) if len(chosen) > 1 else ():
        rest = [v for v in chosen if v != leaf]
        if rest and orders(graph, ops, dict.fromkeys(rest, 1.0)).get(end, 0.0) >= 1:
            chosen = rest
    return tuple(reversed(chosen))


def _steers(graph: Graph, layer: int, nodes: set[int], normed: set[int]) -> Role:
    """How a layer that is no factor of a branch acts on it: by the first product of its result with another stream."""
    seen, todo = {layer}, [layer]
    while todo:
        n = todo.pop(0)
        for u in graph.users[n]:
            op = graph.op(u)
            if u in seen or u not in nodes or op is None:
                continue
            seen.add(u)
            others = [a for a in graph.parents[u] if a not in seen]
            if others and u not in normed and op.primitive is p.mul_p:
                return "gate"
            if others and op.primitive in (p.dot_general_p, p.conv_general_dilated_p):
                return "control"
            todo.append(u)
    return "control"


def _chain(
    graph: Graph, nodes: list[int], layers: tuple[int, ...], value: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Longest chain of weight layers, and the value layers with no other value layer behind.

    A scan whose carry comes from before it counts as often as it is long.
    """
    depth: dict[int, int] = {}
    above: dict[int, frozenset[int]] = {}  # the nearest value layers that lead to a node
    last: set[int] = set()
    for n in nodes:
        parents = [a for a in graph.parents[n] if a in depth]
        depth[n] = max((depth[a] for a in parents), default=0) + (n in layers)
        op = graph.op(n)
        if op is not None and op.primitive in (jaxprs.CARRY_OUT, jaxprs.STACK_OUT):
            depth[n] += _again(graph, op, depth)
        nearest = frozenset().union(*(above[a] for a in parents))
        if n in value:
            last -= nearest
            last.add(n)
            nearest = frozenset({n})
        above[n] = nearest
    return max(depth.values(), default=0), tuple(sorted(last))


def _again(graph: Graph, end: Op, depth: dict[int, int]) -> int:
    """What the further passes of a scan add to the depth of its result."""
    loop = graph.loop(graph.node_of[end.inputs[0]])
    if loop is None:
        return 0
    once = [
        depth[graph.node_of[out]] - depth[start]
        for carry, out in loop.carries
        if (start := graph.node_of.get(carry)) in depth and graph.node_of.get(out) in depth
        and any(a in depth for a in graph.parents[start])
    ]  # fmt: skip
    return max([0, *once]) * (loop.length - 1)
