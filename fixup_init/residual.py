"""Graph -> Residuals: sums, their splits, branches and skips.

At an addition of activations the *split* is the latest node that leads to every term. Between split and sum, terms with
weight layers are *branches*; the term without (or, for a projection shortcut, the one with fewer) is the *skip*. Chains
of additions used once are one n-ary sum. Terms without a common split, and terms with as many weights on each side, are
*parallel*: no residual. A sum inside one elementwise formula has no mixing operation and is none either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Literal

from fixup_init.graph import Graph, Split, latest_common_ancestor
from fixup_init.jaxprs import p
from fixup_init.normalization import Norm
from fixup_init.orders import orders

__all__ = ["Branch", "Residual", "Undecided", "find"]

Skip = Literal["identity", "projection", "reshape"]

# Operations that combine different positions or channels.
MIXING = frozenset({
    p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_window_sum_p,
    p.reduce_window_max_p, p.reduce_window_min_p, p.reduce_window_p, p.reduce_p, p.cumsum_p, p.cummax_p, p.cummin_p,
    p.cumprod_p, p.cumlogsumexp_p, p.fft_p, p.sort_p, p.reduce_prod_p,
})  # fmt: skip
_RESHAPING = frozenset({
    p.pad_p, p.concatenate_p, p.slice_p, p.reshape_p, p.transpose_p, p.gather_p, p.dynamic_slice_p, p.rev_p, *MIXING,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of a residual sum, in nodes and values of the program.

    `order` is that of its end in all its kernels, normalizations included; `free_order` disregards normalizations.
    `value` are the layers whose shrinking shrinks the branch once normalizations are disregarded, the others sit on a
    control path; `last` are those of them with no other behind. `closing` are the parameters nearest the end, kernels
    apart, that multiply the branch: a normalization's scale, a multiplier.
    """

    end: int  # value: the term as it enters the sum
    nodes: frozenset[int]
    layers: tuple[int, ...]
    depth: int
    order: float
    free_order: float
    value: tuple[int, ...]
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


@dataclasses.dataclass(frozen=True)
class Undecided:
    """A sum whose terms could be read in more than one way."""

    sum: int  # value
    terms: tuple[tuple[int, ...], ...]  # layers of each term
    why: str


@dataclasses.dataclass(frozen=True)
class _Term:
    node: int
    value: int
    nodes: tuple[int, ...]  # those that descend from the split, in order
    aside: tuple[int, ...]  # nodes of a second source that only this term uses
    layers: tuple[int, ...]  # weight layers among `nodes`
    mixes: bool


def find(graph: Graph, norms: tuple[Norm, ...]) -> tuple[tuple[Residual, ...], tuple[Undecided, ...]]:
    """All residual sums in trace order, and those that cannot be decided."""
    inside = frozenset().union(*(n.region for n in norms)) if norms else frozenset()
    transparent = {n.core: n.source for n in norms}
    residuals: list[Residual] = []
    undecided: list[Undecided] = []
    absorbed: set[int] = set()
    for k in range(len(graph.program.ops) - 1, -1, -1):
        node = k + len(graph.inputs)
        if node in absorbed or node in inside or not _is_sum(graph, node):
            continue
        terms = _terms(graph, node, absorbed)
        split = latest_common_ancestor(graph, [graph.node_of[v] for v in terms])
        if split is None:
            continue
        verdict = _decide(graph, node, terms, split, transparent)
        if isinstance(verdict, Residual):
            residuals.append(verdict)
        elif isinstance(verdict, Undecided):
            undecided.append(verdict)
    return tuple(reversed(residuals)), tuple(reversed(undecided))


def _is_sum(graph: Graph, node: int) -> bool:
    op = graph.op(node)
    return (
        op is not None
        and op.primitive in (p.add_p, p.sub_p)
        and node in graph.parents
        and all(graph.is_activation(v) for v in op.inputs)
    )


def _terms(graph: Graph, node: int, absorbed: set[int]) -> list[int]:
    """The terms of an n-ary sum, as values; additions used once are part of it."""
    op = graph.op(node)
    assert op is not None
    terms: list[int] = []
    for v in op.inputs:
        maker = graph.node_of[v]
        inner = graph.op(maker)
        if inner is not None and inner.primitive is p.add_p and _is_sum(graph, maker) and len(graph.users[maker]) == 1:
            absorbed.add(maker)
            terms.extend(_terms(graph, maker, absorbed))
        else:
            terms.append(v)
    return terms


def _decide(
    graph: Graph, node: int, values: list[int], split: Split, transparent: dict[int, int]
) -> Residual | Undecided | None:
    terms = [_term(graph, v, 1 << t, split) for t, v in enumerate(values)]
    weighted = [t for t in terms if t.layers]
    plain = [t for t in terms if not t.layers]
    if weighted and plain:
        skips = plain if len(plain) == 1 else [t for t in plain if not t.mixes]
        if len(skips) != 1:
            return Undecided(
                graph.value(node), tuple(t.layers for t in terms), "several terms without weights could be the skip"
            )
    elif weighted:
        fewest = min(len(t.layers) for t in weighted)
        skips = [t for t in weighted if len(t.layers) == fewest]
        if len(skips) > 1:
            return None  # as many weights on each side: parallel
    else:
        skips = [t for t in plain if not t.mixes]
        if len(skips) != 1 or not any(t.mixes for t in plain):
            return None  # one elementwise formula, or a sum of statistics
        op = graph.op(node)
        if op is not None and op.primitive is p.sub_p:
            return None  # x - mean(x)
    (skip,) = skips
    branches = [t for t in terms if t is not skip and (t.layers or t.mixes)]
    if not branches or not _carries(graph, skip, split, transparent):
        return None
    if skip.layers and not all(_follows(graph, t, split, transparent) for t in branches):
        return None
    kind: Skip = "projection" if skip.layers else "reshape" if _reshapes(graph, skip) else "identity"
    return Residual(
        split.node, graph.value(node), kind, skip.layers,
        tuple(_branch(graph, t, transparent) for t in branches),
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
        graph.node_of[value], value, nodes, tuple(sorted(aside)), tuple(n for n in nodes if n in graph.layers),
        any(_mixes(graph, n) for n in nodes),
    )  # fmt: skip


def _mixes(graph: Graph, node: int) -> bool:
    op = graph.op(node)
    return op is not None and op.primitive in MIXING


def _reshapes(graph: Graph, term: _Term) -> bool:
    return any((op := graph.op(n)) is not None and op.primitive in _RESHAPING for n in term.nodes)


def _split_seeds(graph: Graph, split: Split) -> dict[int, float]:
    op = graph.op(split.node)
    return dict.fromkeys(op.outputs if op is not None else (graph.value(split.node),), 1.0)


def _carries(graph: Graph, skip: _Term, split: Split, transparent: dict[int, int]) -> bool:
    """Whether the skip is linear in the split, and a projection's kernels are factors of it: a gate is no skip."""
    ops = _ops(graph, skip)
    known = orders(graph, ops, _split_seeds(graph, split), transparent)
    if known.get(skip.value, 1.0 if skip.node == split.node else 0.0) < 1:
        return False
    for layer in skip.layers:
        if orders(graph, ops, {graph.layers[layer].kernel: 1.0}, transparent).get(skip.value, 0.0) < 1:
            return False
    return True


def _follows(graph: Graph, term: _Term, split: Split, transparent: dict[int, int]) -> bool:
    """Whether a branch scales with the split; a stream that only began elsewhere does not."""
    return orders(graph, _ops(graph, term), _split_seeds(graph, split), transparent).get(term.value, 0.0) >= 1


def _ops(graph: Graph, term: _Term) -> list[int]:
    """Indices of the ops of a term, those that make its parameters included."""
    ops = {n - len(graph.inputs) for n in (*term.nodes, *term.aside)}
    return sorted(ops.union(graph.behind(v for k in ops for v in graph.program.ops[k].inputs)))


def _branch(graph: Graph, term: _Term, transparent: dict[int, int]) -> Branch:
    nodes = (*term.nodes, *term.aside)
    layers = tuple(sorted(n for n in nodes if n in graph.layers))
    ops = _ops(graph, term)
    # Parameters as the optimizer sees them, and kernels as the equations do: standardization lies between.
    kernel = {n: graph.layers[n].leaves[0] for n in layers}
    used = {n: graph.layers[n].kernel for n in layers}

    def order(leaves: Iterable[int], through: dict[int, int] | None = None) -> float:
        return orders(graph, ops, dict.fromkeys(leaves, 1.0), through).get(term.value, 0.0)

    def shares(leaves: set[int], through: dict[int, int] | None = None) -> tuple[float, dict[int, float]]:
        """The order in all leaves, and how much of it each is: two kernels in parallel have one order between them."""
        whole = order(leaves, through)
        if not math.isfinite(whole):
            return whole, dict.fromkeys(leaves, 0.0)
        return whole, {leaf: whole - order(leaves - {leaf}, through) for leaf in leaves}

    kernels = set(kernel.values())
    found, share = shares(kernels)
    free, free_share = shares(set(used.values()), transparent)
    value = tuple(n for n in layers if free_share[used[n]] >= 1)
    depth, last = _chain(graph, sorted(nodes), layers, value)
    others = dict.fromkeys(
        v for k in ops for v in graph.program.ops[k].inputs
        if v in graph.leaves and graph.leaves[v].kind == "param" and v not in kernels
    )  # fmt: skip
    return Branch(
        term.value, frozenset(nodes), layers, depth, found, free, value, last, share, _closing(tuple(others), order)
    )


def _closing(leaves: tuple[int, ...], order: Callable[[Iterable[int]], float]) -> tuple[int, ...]:
    """The latest parameters, kernels apart, that bring a branch to zero together; () where none do."""
    chosen: list[int] = []
    for leaf in reversed(leaves):
        chosen.append(leaf)
        if order(chosen) >= 1:
            break
    else:
        return ()
    for leaf in tuple(chosen):
        rest = [v for v in chosen if v != leaf]
        if rest and order(rest) >= 1:
            chosen = rest
    return tuple(reversed(chosen))


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
