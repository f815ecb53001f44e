"""Graph -> Residuals: sums, their splits, branches and skips.

At an addition of activations the *split* is the latest node that leads to every term. Between split and sum, terms with
weight layers are *branches*; the term without (or, for a projection shortcut, the one with fewer) is the *skip*. Chains
of additions used once are one n-ary sum. Terms without a common split, and terms with as many weights on each side, are
*parallel*: no residual. A sum inside one elementwise formula has no mixing operation and is none either.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from fixup_init import jaxprs
from fixup_init.graph import Graph, Split, latest_common_ancestor
from fixup_init.jaxprs import Arm, p
from fixup_init.normalization import Norm
from fixup_init.orders import Order, has_rule, orders

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
    inside = frozenset().union(*(n.region for n in norms)) if norms else frozenset()
    transparent = {n.core: n.source for n in norms}
    reach = _Reach(graph, transparent)
    residuals: list[Residual] = []
    undecided: list[Undecided] = []
    absorbed: set[int] = set()
    for k in range(len(graph.program.ops) - 1, -1, -1):
        node = k + len(graph.inputs)
        if node in absorbed or node in inside or not _is_sum(graph, node):
            continue
        terms = _terms(graph, node, absorbed)
        split = latest_common_ancestor(
            graph, [graph.node_of[v] for v in terms], functools.partial(reach.is_hopeless, terms)
        )
        if split is None:
            continue
        verdict = _decide(graph, node, terms, split, transparent)
        if isinstance(verdict, Residual):
            residuals.append(verdict)
        elif isinstance(verdict, Undecided):
            undecided.append(verdict)
    return tuple(r for r in reversed(residuals) if not _is_feedthrough(graph, r, residuals)), tuple(reversed(undecided))


def _is_feedthrough(graph: Graph, residual: Residual, residuals: Iterable[Residual]) -> bool:
    """y + D u with a parameter D, inside a branch: the direct term of a state-space layer, not a stream."""
    node = graph.node_of[residual.sum]
    return residual.scaled and any(
        node in b.nodes for r in residuals if r is not residual for b in r.branches
    )  # fmt: skip


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


def _terms(graph: Graph, node: int, absorbed: set[int]) -> list[int]:
    """The terms of an n-ary sum, as values; additions used once are part of it."""
    terms: list[int] = []
    for v in _addends(graph, node):
        maker = graph.node_of[v]
        inner = graph.op(maker)
        if inner is not None and inner.primitive is p.add_p and _is_sum(graph, maker) and len(graph.users[maker]) == 1:
            absorbed.add(maker)
            terms.extend(_terms(graph, maker, absorbed))
        else:
            terms.append(v)
    return terms


class _Reach:
    """What can be said of a distant split without walking all that lies between; remembered from sum to sum."""

    def __init__(self, graph: Graph, transparent: dict[int, int]) -> None:
        self._graph, self._transparent = graph, transparent
        self._known: dict[int, tuple[dict[int, Order], set[int], int]] = {}

    def is_hopeless(self, terms: Sequence[int], split: int) -> bool:
        """Whether `_decide` cannot find a residual: a term that does not scale with the split, beside a weighted one
        or used elsewhere too."""
        graph = self._graph
        first = split - len(graph.inputs) + 1
        last = max(graph.node_of[v] for v in terms) - len(graph.inputs) + 1
        known, weighted, done = self._known.get(split, (_seeds(graph, split), set(), first))
        if last > done:
            ops = range(done, last)
            known = orders(graph, ops, known, self._transparent)
            for k in ops:
                node = k + len(graph.inputs)
                if node in graph.parents and any(a in weighted or a == split for a in graph.parents[node]):
                    if node in graph.layers or any(a in weighted for a in graph.parents[node]):
                        weighted.add(node)
            self._known[split] = (known, weighted, last)
        heavy = [graph.node_of[v] in weighted for v in terms]
        strays = [v for v in terms if known.get(v, 0.0) < 1]
        if all(heavy):
            return bool(strays)
        return any(not h or len(graph.users[graph.node_of[v]]) > 1 for v, h in zip(terms, heavy, strict=True) if v in strays)


def _decide(
    graph: Graph, node: int, values: list[int], split: Split, transparent: dict[int, int]
) -> Residual | Undecided | None:
    terms = [_term(graph, v, 1 << t, split) for t, v in enumerate(values)]
    weighted = [t for t in terms if t.layers]
    plain = [t for t in terms if not t.layers]
    smooth = [t for t in plain if not t.mixes]
    if plain and len(plain) < len(terms):
        skips = smooth or plain
        if not smooth and len(plain) > 1:
            return _undecided(graph, node, terms, split, transparent, "several terms without weights could be the skip")
    elif weighted:
        fewest = min(len(t.layers) for t in weighted)
        skips = [t for t in weighted if len(t.layers) == fewest]
        if any(t.closed for t in terms):
            why = "it holds a region that is not entered, so its weight layers cannot be counted"
            return _undecided(graph, node, terms, split, transparent, why)
        if len(skips) > 1:
            return None  # as many weights on each side: parallel
    else:
        skips = smooth
        if not skips or len(skips) == len(plain):
            return None  # one elementwise formula, or a sum of statistics
        op = graph.op(node)
        if op is not None and op.primitive is p.sub_p:
            return None  # x - mean(x)
    return _residual(graph, node, terms, _together(skips), split, transparent)


def _undecided(
    graph: Graph, node: int, terms: list[_Term], split: Split, transparent: dict[int, int], why: str
) -> Undecided:
    readings = [
        _residual(graph, node, terms, skip, split, transparent, certain=True) for skip in terms
    ]  # fmt: skip
    return Undecided(
        graph.value(node), tuple(t.layers for t in terms), why, tuple(r for r in readings if r is not None)
    )


def _residual(
    graph: Graph, node: int, terms: list[_Term], skip: _Term, split: Split, transparent: dict[int, int],
    certain: bool = False,
) -> Residual | None:  # fmt: skip
    """The residual with a given skip, None where its terms do not behave as one (unless `certain`)."""
    rest = [t for t in terms if not set(t.values) <= set(skip.values) and (t.layers or t.mixes or certain)]
    if not certain:
        if not rest or not _carries(graph, skip, split, transparent):
            return None
        strays = [t for t in rest if not _follows(graph, t, split, transparent)]
        if strays and skip.layers:
            return None
        if any(len(graph.users[graph.node_of[v]]) > 1 for t in strays for v in t.values):
            return None  # a stream of its own, which goes on elsewhere, and a condition that it is given
    branches = tuple(_branch(graph, t, transparent) for t in rest)
    kind: Skip = "projection" if skip.layers else "reshape" if _reshapes(graph, skip) else "identity"
    return Residual(split.node, graph.value(node), kind, skip.layers, branches, _is_scaled(graph, skip))


def _together(terms: list[_Term]) -> _Term:
    """Several terms without weights that do not mix: one formula of the split."""
    if len(terms) == 1:
        return terms[0]
    return _Term(
        tuple(v for t in terms for v in t.values), tuple(sorted({n for t in terms for n in t.nodes})),
        tuple(sorted({n for t in terms for n in t.aside})), (), any(t.mixes for t in terms), False,
    )  # fmt: skip


def _term(graph: Graph, value: int, color: int, split: Split) -> _Term:
    reached = sorted(n for n, mask in split.colors.items() if mask & color)
    below: set[int] = {split.node}
    for n in reached:
        if any(a in below for a in graph.parents[n]):
            below.add(n)
    below.discard(split.node)
    nodes = tuple(n for n in reached if n in below)
    aside: set[int] = set()  # a second source, as far back as nothing else uses it
    todo = [a for n in nodes for a in graph.parents[n] if a not in below and a != split.node]
    while todo:
        n = todo.pop()
        if n in aside or n not in split.colors or len(graph.users[n]) > 1:
            continue
        aside.add(n)
        todo.extend(graph.parents[n])
    return _Term(
        (value,), nodes, tuple(sorted(aside)), tuple(n for n in nodes if n in graph.layers),
        any(_mixes(graph, n) for n in nodes), any(_is_closed(graph, n) for n in nodes),
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


def _carries(graph: Graph, skip: _Term, split: Split, transparent: dict[int, int]) -> bool:
    """Whether the skip is linear in the split, and a projection's kernels are factors of it: a gate is no skip."""
    if not _follows(graph, skip, split, transparent):
        return False
    kernels = dict.fromkeys(graph.layers[n].kernel for n in skip.layers)
    seeds: dict[int, Order] = dict(zip(kernels, np.eye(len(kernels)), strict=True))
    known = orders(graph, _ops(graph, skip), seeds, transparent)
    return all(bool(np.all(known.get(v, 0.0) >= 1)) for v in skip.values) if kernels else True


def _follows(graph: Graph, term: _Term, split: Split, transparent: dict[int, int]) -> bool:
    """Whether a term scales with the split; a stream that only began elsewhere does not."""
    known = orders(graph, _ops(graph, term), _seeds(graph, split.node), transparent)
    return all(bool(known.get(v, 0.0) >= 1) for v in term.values)


def _ops(graph: Graph, term: _Term) -> list[int]:
    """Indices of the ops of a term, those that make its parameters included."""
    ops = {n - len(graph.inputs) for n in (*term.nodes, *term.aside)}
    return sorted(ops.union(graph.behind(v for k in ops for v in graph.program.ops[k].inputs)))


def _branch(graph: Graph, term: _Term, transparent: dict[int, int]) -> Branch:
    (end,) = term.values
    nodes = sorted((*term.nodes, *term.aside))
    layers = tuple(n for n in nodes if n in graph.layers)
    ops = _ops(graph, term)
    # Parameters as the optimizer sees them, and kernels as the equations do: standardization lies between.
    kernel = {n: graph.layers[n].leaves[0] for n in layers}
    used = {n: graph.layers[n].kernel for n in layers}
    question = functools.partial(_shares, graph, ops, end)
    order, shares = question([(kernel[n], arms_of(graph, n)) for n in layers], None)
    free_order, free = question([(used[n], arms_of(graph, n)) for n in layers], transparent)
    value = tuple(n for n in layers if free[used[n]] >= 1)
    depth, last = _chain(graph, nodes, layers, value)
    normed = {k + len(graph.inputs) for v in transparent if (k := graph.maker.get(v)) is not None}
    roles: dict[int, Role] = {n: "value" if n in value else _steers(graph, n, set(nodes), normed) for n in layers}
    kernels = set(kernel.values())
    others = dict.fromkeys(
        v for k in ops for v in graph.program.ops[k].inputs
        if v in graph.leaves and graph.leaves[v].kind == "param" and v not in kernels
    )  # fmt: skip
    return Branch(
        end, frozenset(nodes), layers, depth, order, free_order, roles, last, shares,
        _closing(graph, ops, end, tuple(others)),
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
    graph: Graph, ops: list[int], end: int, kernels: Sequence[tuple[int, dict[int, Arm]]],
    transparent: dict[int, int] | None,
) -> tuple[float, dict[int, float]]:  # fmt: skip
    """The order of a branch's end in all its kernels, and how much of it each is.

    Two kernels in parallel have one order between them. All questions are asked at once: entry 0 is the whole; then
    come the whole and the rest without kernel k, each in the arms of conditionals where kernel k is.
    """
    values = list(dict.fromkeys(v for v, _ in kernels))
    n = len(values)
    seeds: dict[int, Order] = {v: np.ones(1 + 2 * n) for v in values}
    arms: dict[int, np.ndarray] = {}
    for k, v in enumerate(values):
        seeds[v][2 + 2 * k] = 0.0  # pyright: ignore[reportIndexIssue]
        for switch, arm in next(found for w, found in kernels if w == v).items():
            arms.setdefault(switch, np.full(1 + 2 * n, -1))[1 + 2 * k : 3 + 2 * k] = arm.index
    found = np.broadcast_to(orders(graph, ops, seeds, transparent, arms or None).get(end, 0.0), (1 + 2 * n,))
    if not math.isfinite(found[0]):
        return float(found[0]), dict.fromkeys(values, 0.0)
    with np.errstate(invalid="ignore"):
        share = found[1::2] - found[2::2]
    return float(found[0]), {v: float(s) if math.isfinite(s) else 0.0 for v, s in zip(values, share, strict=True)}


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
    for leaf in tuple(chosen):
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
    """Longest chain of weight layers, and the value layers with no other value layer behind."""
    depth: dict[int, int] = {}
    above: dict[int, frozenset[int]] = {}  # the nearest value layers that lead to a node
    last: set[int] = set()
    for n in nodes:
        parents = [a for a in graph.parents[n] if a in depth]
        depth[n] = max((depth[a] for a in parents), default=0) + (n in layers)
        nearest = frozenset().union(*(above[a] for a in parents))
        if n in value:
            last -= nearest
            last.add(n)
            nearest = frozenset({n})
        above[n] = nearest
    return max(depth.values(), default=0), tuple(sorted(last))
