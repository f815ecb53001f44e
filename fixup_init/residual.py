"""Graph -> Residuals: sums, their splits, branches and skips.

At an addition of activations the *split* is the latest node that leads to every term. Between split and sum, terms with
weight layers are *branches*; the term without (or, for a projection shortcut, the one with fewer) is the *skip*. Chains
of additions used once are one n-ary sum. Terms without a common split, and terms with as many weights on each side, are
*parallel*: no residual. A sum inside one elementwise formula has no mixing operation and is none either.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Literal

from fixup_init.branch import Branch, branch_of
from fixup_init.graph import COPIES, Graph, Split, latest_common_ancestor, reaches
from fixup_init.jaxprs import p
from fixup_init.normalization import Norm
from fixup_init.program import CARRY_IN
from fixup_init.terms import (
    SCALING,
    SUMS,
    UNSCALED,
    Streams,
    Term,
    addends,
    apart,
    carries,
    follows,
    is_fed,
    is_gated,
    is_linear,
    is_repeated,
    is_scaled,
    is_sum,
    reshapes,
    term_of,
    together,
    unscaled,
)

__all__ = ["Residual", "Skip", "Undecided", "find"]

Skip = Literal["identity", "projection", "reshape"]


@dataclasses.dataclass(frozen=True)
class Residual:
    """A residual sum: where it starts, its skip and its branches."""

    split: int  # node
    sum: int  # value
    skip: Skip
    skip_layers: tuple[int, ...]
    branches: tuple[Branch, ...]
    scaled: bool  # whether a parameter multiplies the skip
    fed: bool  # whether a branch has another source than the split
    chained: bool  # whether the branch is a later state of the stream that the skip is a state of
    doubtful: bool  # a stream that began elsewhere runs through a branch, or skip and branch share no part of the split


@dataclasses.dataclass(frozen=True)
class Undecided:
    """A sum whose terms could be read in more than one way; `readings` has one for each term as the skip."""

    sum: int  # value
    terms: tuple[tuple[int, ...], ...]  # layers of each term
    why: str
    readings: tuple[Residual, ...]


def find(graph: Graph, norms: tuple[Norm, ...]) -> tuple[tuple[Residual, ...], tuple[Undecided, ...]]:
    """All residual sums in trace order, and those that cannot be decided."""
    search = _Search(graph, norms)
    for node, op in enumerate(graph.program.ops, len(graph.inputs)):
        if op.primitive not in SUMS or node in search.inside:
            continue
        if not is_sum(graph, node) or search.absorber(node) is not None:
            continue
        values = search.terms(node)
        split = search.split(node, values)
        if split is None or search.drop_interpolation(node):
            continue
        verdict = _decide(search, node, values, split)
        if isinstance(verdict, Residual):
            search.accept(node, verdict)
        elif isinstance(verdict, Undecided):
            search.undecided.append(verdict)
    found = [search.residuals[node] for node in sorted(search.residuals)]
    given = _conditions(graph, found)
    kept = tuple(r for r in found if r.sum not in given and not _is_feedthrough(graph, r, found))
    return kept, tuple(search.undecided)


def _conditions(graph: Graph, found: Sequence[Residual]) -> set[int]:
    """Sums that add something at several depths of one stream: projections of a condition, or an early state of it."""
    by_split: dict[tuple[int, Skip], list[Residual]] = {}
    for r in found:
        if (r.skip == "projection" and r.fed) or r.chained:
            by_split.setdefault((r.split, r.skip), []).append(r)
    return {
        r.sum for several in by_split.values()
        if any(graph.node_of[one.sum] in b.nodes for one in several for other in several for b in other.branches)
        for r in several
    }  # fmt: skip


def _is_feedthrough(graph: Graph, residual: Residual, residuals: Iterable[Residual]) -> bool:
    """y + D u with a parameter D, inside a branch: the direct term of a state-space layer, not a stream."""
    node = graph.node_of[residual.sum]
    return residual.scaled and any(
        node in b.nodes for r in residuals if r is not residual for b in r.branches
    )  # fmt: skip


_MOST = 64  # terms of one n-ary sum; a longer chain of additions is cut there


class _Search(Streams):
    """Sums that are decided so far, in trace order."""

    def __init__(self, graph: Graph, norms: tuple[Norm, ...]) -> None:
        super().__init__(graph, norms)
        self.residuals: dict[int, Residual] = {}  # by the node of the sum
        self.undecided: list[Undecided] = []
        self._doubtful: dict[int, Residual] = {}
        self._absorber: dict[int, int | None] = {}
        self._terms: dict[int, list[int]] = {}
        self.cut: set[int] = set()  # sums that would have gone on
        self._below: dict[int, tuple[set[int], set[int], int]] = {}

    def accept(self, node: int, residual: Residual) -> None:
        """Takes up a residual; a doubtful one only if it is a state of a stream that has another sum."""
        on_stream = residual.split in self.residuals or residual.split in self._doubtful
        if residual.doubtful and not on_stream and not self._is_joined(node):
            self._doubtful[node] = residual
            return
        self._keep(node, residual)
        while residual.split in self._doubtful:
            node = residual.split
            residual = self._doubtful.pop(node)
            self._keep(node, residual)

    def _is_joined(self, node: int) -> bool:
        """Whether a sum is put together again with other parts, unchanged: a coupling of two halves."""
        graph = self.graph
        for user in graph.users[node]:
            op = graph.op(user)
            assert op is not None
            if op.primitive is p.concatenate_p:
                return True
            if op.primitive in COPIES | {p.mul_p, p.div_p} and self._is_joined(user):
                return True
        return False

    def _keep(self, node: int, residual: Residual) -> None:
        self.residuals[node] = residual
        self.splits[node] = residual.split

    def _drop(self, node: int) -> None:
        self.residuals.pop(node, None)
        self.splits.pop(node, None)

    def absorber(self, node: int) -> int | None:
        """The sum that a sum is part of: it is used there alone, and is no residual with a later split."""
        if node not in self._absorber:
            self._absorber[node] = None  # while it is looked for: a sum beside it asks for it too
            self._absorber[node] = self._find_absorber(node)
        return self._absorber[node]

    def _find_absorber(self, node: int) -> int | None:
        graph = self.graph
        op = graph.op(node)
        if op is None or op.primitive not in (p.add_p, p.sub_p) or len(graph.users[node]) != 1:
            return None
        (user,) = graph.users[node]
        around = addends(graph, user)
        if not around or user in self.inside or len(graph.parents[user]) < 2:
            return None
        values = self.terms(node)
        if len(values) > _MOST:
            self.cut.add(node)
            return None
        own = self.split(node, values)
        if own is None or self._interpolated(node) is not None:
            return None
        beside = [t for v in around if graph.node_of[v] != node for t in self._parts(user, v)]
        whole = self.split(user, [graph.value(node), *beside])
        if graph.op(own.node) is None and (whole is None or graph.op(whole.node) is None):  # no input is the latest
            joined = self.split(user, [*values, *beside])
            whole = joined if joined is not None and joined.node == own.node else whole
        if whole is None:
            return None
        terms = [term_of(self, v, 1 << t, own) for t, v in enumerate(values)]
        if not any(t.layers or t.mixes for t in terms):
            return None  # one elementwise formula
        for v in values:
            maker = graph.node_of[v]
            same = reaches(graph, whole.node, maker) or _is_made_of(graph, whole.node, maker)
            if not same and is_repeated(graph, v, node, whole.node):
                return None  # a condition
        later, difference = own.node > whole.node, op.primitive is p.sub_p
        if later or difference:
            residual = isinstance(_decide(self, node, values, own), Residual)
            if later and residual:
                return None  # a residual inside of a branch
            if later and (all(is_gated(self, v) for v in values) or all(is_linear(self, t) for t in terms)):
                return None  # a mixture of experts, or a low-rank addition to a kernel
            if difference and not residual and not all(t.layers for t in terms):
                return None  # x - mean(x)
        return user

    def terms(self, node: int) -> list[int]:
        """The terms of an n-ary sum, as values."""
        graph = self.graph
        if node not in self._terms:
            found: list[int] = []
            for v in addends(graph, node):
                found.extend(self._parts(node, v))
            self._terms[node] = found
        return self._terms[node]

    def _parts(self, node: int, value: int) -> list[int]:
        """What a term brings to the sum at a node: its own terms, where it is a sum that is part of that one."""
        maker = self.graph.node_of[value]
        part = is_sum(self.graph, maker) and maker not in self.inside and self.absorber(maker) == node
        return self.terms(maker) if part else [value]

    def split(self, node: int, values: Sequence[int]) -> Split | None:
        """The split of some terms of the sum at a node."""
        nodes = [self.graph.node_of[v] for v in values]
        return latest_common_ancestor(self.graph, nodes, functools.partial(self._is_hopeless, node, nodes))

    def _is_hopeless(self, at: int, terms: Sequence[int], split: int) -> bool:
        """Whether a distant split cannot be one of a residual, seen without walking what lies between, as
        `_are_branches` would find."""
        graph = self.graph
        below, weighted, done = self._below.get(split, ({split}, set(), split + 1))
        for node in range(done, max(terms) + 1):
            above = graph.parents.get(node, ())
            if any(a in below for a in above):
                below.add(node)
                if node in graph.layers or any(a in weighted for a in above):
                    weighted.add(node)
        self._below[split] = (below, weighted, max(done, max(terms) + 1))
        if any(t in self.residuals and t in weighted and len(graph.users[t]) > 1 for t in terms):
            return True
        if not all(t in weighted for t in terms):
            return False
        for node in reversed(self.residuals):
            if node <= split:
                break
            if node in below and any(reaches(graph, node, t) for t in terms):
                return self.residuals[node].split not in below or graph.users[node][-1] > at
        return False

    def is_state(self, node: int, split: int) -> bool:
        """Whether a node is, scaled maybe, a residual sum with the same split: x + c (x + f(x)) has one branch."""
        graph = self.graph
        while node not in self.residuals:
            op = graph.op(node)
            if op is None or op.primitive not in SCALING or len(graph.parents[node]) != 1:
                return False
            (node,) = graph.parents[node]
        return self.residuals[node].split == split

    def is_chained(self, node: int, start: int) -> bool:
        """Whether residual sums alone lead from one node to another, with activations between them maybe."""
        graph = self.graph
        seen, todo = {node}, [node]
        while todo:
            n = todo.pop()
            if n == start:
                continue
            if n < start or n in graph.layers or (n not in self.splits and n in self.mixing):
                return False
            above = (self.splits[n],) if n in self.splits else graph.parents[n]
            todo.extend(a for a in above if a not in seen)
            seen.update(above)
        return True

    def drop_interpolation(self, node: int) -> bool:
        """Whether a sum is a + s (b - a). With s = 1 (straight-through) it is b, with s an activation a gate: neither
        it nor the difference is a residual then. With a constant or a parameter, the difference is the residual."""
        found = self._interpolated(node)
        if found is not None and found[1]:
            self._drop(found[0])
        return found is not None

    def _interpolated(self, node: int) -> tuple[int, bool] | None:
        """For a + s (b - a): the node of the difference, and whether s is 1 or an activation."""
        graph = self.graph
        op = graph.op(node)
        if op is None or op.primitive is not p.add_p:
            return None
        for base, other in (op.inputs, op.inputs[::-1]):
            found = self._difference(graph.node_of[other], unscaled(graph, base))
            if found is not None:
                return found
        return None

    def _difference(self, node: int, base: int) -> tuple[int, bool] | None:
        graph = self.graph
        scaled = gated = False
        while (op := graph.op(node)) is not None:
            if op.primitive is p.sub_p:
                return (node, gated or not scaled) if unscaled(graph, op.inputs[1]) == base else None
            streams = [v for v in op.inputs if graph.is_activation(v)]
            if op.primitive is p.mul_p and len(streams) == 2:
                gated = True
                streams = [v for v in streams if (o := graph.op(graph.node_of[v])) and o.primitive is p.sub_p]
            elif op.primitive in (p.mul_p, p.div_p):
                scaled = True
            elif op.primitive not in UNSCALED:
                return None
            if len(streams) != 1:
                return None
            node = graph.node_of[streams[0]]
        return None


_NEAR = 96  # nodes


def _is_made_of(graph: Graph, node: int, start: int) -> bool:
    """Whether a node near another has no source beside it."""
    seen, todo = {node}, [node]
    while todo:
        n = todo.pop()
        if n == start:
            continue
        if n < start or len(seen) > _NEAR or not graph.parents[n]:
            return False
        todo.extend(a for a in graph.parents[n] if a not in seen)
        seen.update(graph.parents[n])
    return True


def _end(graph: Graph, term: Term) -> int:
    return graph.node_of[term.values[0]]


def _decide(search: _Search, node: int, values: list[int], split: Split) -> Residual | Undecided | None:
    graph = search.graph
    if not graph.shape(node):
        return None  # one number: a sum of losses
    if search.working.isdisjoint(split.colors):
        return None  # one elementwise formula
    terms = [term_of(search, v, 1 << t, split) for t, v in enumerate(values)]
    weighted = [t for t in terms if t.layers]
    plain = [t for t in terms if not t.layers]
    smooth = [t for t in plain if not t.mixes]
    if plain and len(plain) < len(terms):
        skips = smooth or plain
        if not smooth and len(plain) > 1:
            return _undecided(search, node, terms, split, "several terms without weights could be the skip")
    elif begun_before := [t for t in weighted if _end(graph, t) in search.cut]:
        skips = [dataclasses.replace(t, layers=(), nodes=(), aside=()) for t in begun_before]  # the stream so far
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
    if not any(t.layers for t in terms) and _begins_empty(graph, split.node):
        return None  # a state that starts empty and is not refined by layers: a recurrence over time
    skip = together(skips)
    branches = [t for t in terms if not set(t.values) <= set(skip.values) and (t.layers or t.mixes)]
    state = not skip.layers and _end(graph, skip) in search.cut
    if not branches or not (state or carries(search, node, skip, branches, split)):
        return None
    if not _are_branches(search, node, skip, branches, split):
        return None
    return _residual(search, node, skip, branches, split)


def _begins_empty(graph: Graph, node: int) -> bool:
    """Whether a node is what a scan carries from pass to pass and starts with a constant, or a gate times that."""
    op = graph.op(node)
    if op is None:
        return False
    if op.primitive is CARRY_IN:
        return not graph.parents[node]
    return op.primitive in SCALING and any(_begins_empty(graph, a) for a in graph.parents[node])


def _are_branches(search: _Search, node: int, skip: Term, branches: list[Term], split: Split) -> bool:
    """Whether terms beside a skip are branches, and not streams of their own."""
    graph = search.graph
    for term in branches:
        end = _end(graph, term)
        goes_on = len(graph.users[end]) > 1
        if (skip.layers or goes_on) and not follows(search, term, split):
            return False  # another stream, and a condition that it is given
        if goes_on and end in search.residuals:
            return False  # a stream that goes on elsewhere
        if search.is_state(end, split.node):
            return False
    if skip.layers:
        held = {n for t in (skip, *branches) for n in t.nodes} | {node}
        if any(
            u not in held and not (is_sum(graph, u) and search.absorber(u) is not None)
            for t in branches for n in t.nodes for u in graph.users[n]
        ):  # fmt: skip
            return False  # two outputs of one stream at different depths
        if _is_crossed(search, held, split) or any(apart(search, skip, t, split) for t in branches):
            return False  # another stream, and a projection of a condition
        if all(is_linear(search, t) for t in (skip, *branches)):
            return False  # one linear map in two terms: a low-rank addition to a kernel
    return True


def _is_crossed(search: _Search, nodes: set[int], split: Split) -> bool:
    """Whether a stream that was added to among some nodes began elsewhere."""
    return any(
        s not in nodes and s != split.node for n in nodes if (s := search.splits.get(n)) is not None
    )  # fmt: skip


def _undecided(search: _Search, node: int, terms: list[Term], split: Split, why: str) -> Undecided:
    readings = tuple(_residual(search, node, skip, [t for t in terms if t is not skip], split) for skip in terms)
    return Undecided(search.graph.value(node), tuple(t.layers for t in terms), why, readings)


def _residual(search: _Search, node: int, skip: Term, branches: list[Term], split: Split) -> Residual:
    graph = search.graph
    kind: Skip = "projection" if skip.layers else "reshape" if reshapes(graph, skip) else "identity"
    within = {n for t in branches for n in t.nodes}
    doubtful = _is_crossed(search, within, split) or any(apart(search, skip, t, split) for t in branches)
    chained = any(search.is_chained(_end(graph, t), split.node) for t in branches)
    found = tuple(branch_of(search, t) for t in branches)
    fed = any(is_fed(graph, t, split) for t in branches)
    return Residual(
        split.node, graph.value(node), kind, skip.layers, found, is_scaled(graph, skip), fed, chained,
        doubtful,
    )  # fmt: skip
