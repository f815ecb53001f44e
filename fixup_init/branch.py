"""One branch of a residual sum: its layers, their roles, its depth and its order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container
from typing import Literal

import numpy as np

from fixup_init.graph import Graph
from fixup_init.jaxprs import p
from fixup_init.orders import ADDITIVE, Order, orders
from fixup_init.program import CARRY_OUT, STACK_OUT, Arm, Op
from fixup_init.terms import Streams, Term, ops_of

__all__ = ["Branch", "Role", "arms_of", "branch_of"]

Role = Literal["value", "control", "gate"]


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of a residual sum, in nodes and values of the program.

    `order` is that of its end in all its kernels, normalizations included; `free_order` disregards normalizations.
    `roles` says of each layer whether it is a factor of what passes through it, normalizations disregarded ("value"),
    and if not, whether its result multiplies the value path position by position ("gate") or steers it otherwise, such
    as under a softmax ("control"); `last` are the latest value layers that bring the branch to zero. `closing` are the
    parameters nearest the end, kernels apart, that multiply the branch: a normalization's scale, a multiplier.
    """

    end: int  # value: the term as it enters the sum
    nodes: frozenset[int]
    layers: tuple[int, ...]
    depth: int
    order: float
    free_order: float
    roles: dict[int, Role]  # by layer
    last: tuple[int, ...]
    shares: dict[int, float]  # by kernel leaf, the order along its paths; 0 where a norm or a control path lies behind
    in_arms: dict[int, float]  # the order where a kernel leaf runs, in its arms of conditionals
    closing: tuple[int, ...]  # leaves


def branch_of(streams: Streams, term: Term) -> Branch:
    graph = streams.graph
    (end,) = term.values
    nodes = sorted((*term.nodes, *term.aside))
    layers = tuple(n for n in nodes if n in graph.layers)
    ops = ops_of(graph, term)
    # Parameters as the optimizer sees them, and kernels as the equations do: standardization lies between.
    used = {n: graph.layers[n].kernel for n in layers}
    groups = {n: graph.layers[n].kernels for n in layers}
    order, in_arms = _orders(graph, ops, end, groups)
    shares = _paths(graph, ops, end, groups, None)
    if _is_plain(streams, ops, layers):
        free_order, free = order, {used[n]: shares[groups[n][0]] for n in layers}
    else:
        seeds: dict[int, Order] = dict.fromkeys(used.values(), 1.0)
        free_order = float(orders(graph, ops, seeds, streams.transparent).get(end, 0.0))
        free = _paths(graph, ops, end, {n: (v,) for n, v in used.items()}, streams.transparent)
    value = tuple(n for n in layers if free[used[n]] >= 1)
    cut = set(_closing(graph, ops, end, tuple(dict.fromkeys(used[n] for n in value)), streams.transparent))
    last = tuple(n for n in value if used[n] in cut)
    depth = _depth(graph, nodes, frozenset(term.nodes))
    roles: dict[int, Role] = {
        n: "value" if n in value else _steers(graph, n, set(nodes), streams.normed) for n in layers
    }
    kernels = {v for n in layers for v in graph.layers[n].kernels}
    others = [v for v in _meeting(graph, ops) if v not in kernels]
    return Branch(
        end, frozenset(nodes), layers, depth, order, free_order, roles, last, shares, in_arms,
        _closing(graph, ops, end, tuple(others)),
    )  # fmt: skip


def _meeting(graph: Graph, ops: list[int]) -> list[int]:
    """The parameters among some ops that bear on orders, in the order in which they meet activations: casts may stand
    far in front. One that is only added to activations does not count."""
    met: dict[int, bool] = {}
    made: dict[int, dict[int, None]] = {}  # the parameters that a value is computed from alone
    for k in ops:
        op = graph.program.ops[k]
        leaves: dict[int, None] = {}
        for v in op.inputs:
            leaf = graph.leaves.get(v)
            leaves |= {v: None} if leaf is not None and leaf.kind == "param" else made.get(v, {})
        if not leaves:
            continue
        if k + len(graph.inputs) in graph.parents:
            counts = op.primitive not in ADDITIVE
            met.update((v, counts or met.get(v, False)) for v in leaves)
        else:
            made |= dict.fromkeys(op.outputs, leaves)
    return [v for v, counts in met.items() if counts]


def _is_plain(streams: Streams, ops: list[int], layers: tuple[int, ...]) -> bool:
    """Whether kernels are parameters as they are, each used once, and no normalization follows one: with and without
    normalizations the orders are the same then."""
    graph = streams.graph
    kernels = [graph.layers[n].kernel for n in layers]
    first = layers[0] - len(graph.inputs) if layers else 0
    return (
        len(set(kernels)) == len(kernels)
        and all(v in graph.leaves for v in kernels)
        and not any(k >= first and k + len(graph.inputs) in streams.normed for k in ops)
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


def _orders(
    graph: Graph, ops: list[int], end: int, groups: dict[int, tuple[int, ...]]
) -> tuple[float, dict[int, float]]:
    """The order of a branch's end in all its kernels, and by kernel what it is in the arms where that one runs."""
    seeds: dict[int, Order] = {v: 1.0 for values in groups.values() for v in values}
    arms = {n: found for n in groups if (found := arms_of(graph, n))}
    whole = float(orders(graph, ops, seeds).get(end, 0.0))
    own = dict.fromkeys(seeds, whole)
    if arms:
        runs: dict[int, np.ndarray] = {}
        for k, found in enumerate(arms.values()):
            for switch, arm in found.items():
                runs.setdefault(switch, np.full(len(arms), -1))[k] = arm.index
        each = _entries(orders(graph, ops, seeds, arms=runs).get(end, 0.0), len(arms))
        own |= {v: each[k] for k, n in enumerate(arms) for v in groups[n]}
    return whole, own


def _paths(
    graph: Graph, ops: list[int], end: int, groups: dict[int, tuple[int, ...]],
    transparent: dict[int, tuple[int, ...]] | None,
) -> dict[int, float]:  # fmt: skip
    """By kernel value, the order of a branch's end along the paths that lead through it: 1 for a factor, 0 for what a
    softmax, a sigmoid or a normalization hides. What is joined to one kernel counts together."""
    several = dict.fromkeys(groups.values())
    seeds: dict[int, Order] = {}
    for k, values in enumerate(several):
        for v in values:
            seed = seeds.setdefault(v, np.full(len(several), np.nan))
            seed[k] = 1.0  # pyright: ignore[reportIndexIssue]
    found = _entries(orders(graph, ops, seeds, transparent, inside=True).get(end, math.nan), len(several))
    return {v: x if math.isfinite(x) else 0.0 for values, x in zip(several, found, strict=True) for v in values}


def _entries(order: Order, count: int) -> list[float]:
    """An order as one number for each question that was asked."""
    return order.tolist() if isinstance(order, np.ndarray) else [order] * count


_AT_ONCE = 32


def _closing(
    graph: Graph,
    ops: list[int],
    end: int,
    leaves: tuple[int, ...],
    transparent: dict[int, tuple[int, ...]] | None = None,
) -> tuple[int, ...]:
    """The latest of some values that bring a branch to zero together; () where not even all of them do."""

    def order(seeds: dict[int, Order]) -> Order:
        return orders(graph, ops, seeds, transparent).get(end, 0.0)

    latest = leaves[::-1]
    if not latest or order({latest[0]: 1.0}) >= 1:
        return latest[:1]
    chosen: list[int] = []
    for start in range(0, len(latest) if len(latest) > 1 else 0, _AT_ONCE):
        more = latest[start : start + _AT_ONCE]
        seeds: dict[int, Order] = dict.fromkeys(latest[:start], 1.0)
        for k, leaf in enumerate(more):  # entry k: all leaves up to the k-th
            seeds[leaf] = (np.arange(len(more)) >= k).astype(float)
        enough = [x >= 1 for x in _entries(order(seeds), len(more))]
        if any(enough):
            chosen = list(latest[: start + enough.index(True) + 1])
            break
    for leaf in chosen[::-1] if len(chosen) > 1 else ():
        rest = [v for v in chosen if v != leaf]
        if rest and order(dict.fromkeys(rest, 1.0)) >= 1:
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


_RESULTS = (CARRY_OUT, STACK_OUT)


def _depth(graph: Graph, nodes: list[int], below: frozenset[int]) -> int:
    """Longest chain of weight layers; a scan whose carry comes from the split counts as often as it is long."""
    depth: dict[int, int] = {}
    for n in nodes:
        found = 0
        for a in graph.parents[n]:
            if (above := depth.get(a, 0)) > found:
                found = above
        depth[n] = found + (n in graph.layers)
        op = graph.op(n)
        if op is not None and op.primitive in _RESULTS:
            depth[n] += _again(graph, op, below)
    return max(depth.values(), default=0)


def _again(graph: Graph, end: Op, below: Container[int]) -> int:
    """What the further passes of a scan add to the depth of its result, by the carries that start in `below`."""
    loop = graph.loop(graph.node_of[end.inputs[0]])
    if loop is None:
        return 0
    once = [0]
    for carry, out in loop.carries:
        start, stop = graph.node_of.get(carry), graph.node_of.get(out)
        if start is None or stop is None or start not in below:
            continue
        depth = {start: 0}
        for n in range(start + 1, stop + 1):
            above = [depth[a] for a in graph.parents.get(n, ()) if a in depth]
            if above:
                depth[n] = max(above) + (n in graph.layers)
                op = graph.op(n)
                if op is not None and op.primitive in _RESULTS:
                    depth[n] += _again(graph, op, depth)
        once.append(depth.get(stop, 0))
    return max(once) * (loop.length - 1)
