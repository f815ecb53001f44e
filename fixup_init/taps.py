"""Graph -> Taps: which values to measure, what they are called, and in which order they are reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from fixup_init import elementwise
from fixup_init.axes import batch_axes
from fixup_init.graph import Graph
from fixup_init.jaxprs import p
from fixup_init.program import Loop
from fixup_init.propagation import RowKind
from fixup_init.statistics import Layout
from fixup_init.tracing import Traced

__all__ = ["Tap", "layouts", "place", "unrolled"]


@dataclasses.dataclass(frozen=True)
class Tap:
    """A value to measure, and the row that it becomes."""

    value: int
    kind: RowKind
    name: str
    scope: str
    loops: tuple[Loop, ...]  # scans around it, outermost first
    leaves: tuple[int, ...] = ()  # of a weight layer's kernel
    layer: int | None = None  # the node of a weight layer, which may add its bias later
    limits: tuple[float, float] | None = None  # of a nonlinearity


def place(traced: Traced) -> tuple[Tap, ...]:
    """Taps on inputs, weight layers, nonlinearities, normalizations, branch ends, sums and outputs, in trace order."""
    graph = traced.graph
    inside = frozenset().union(*(n.region for n in traced.norms))
    found: list[tuple[int, int, Tap]] = []

    def add(rank: int, value: int, kind: RowKind, name: str, **more: Any) -> None:
        if not jnp.issubdtype(graph.program.dtype(value), jnp.inexact) or not graph.program.shape(value):
            return
        node = graph.node_of[value]
        found.append((node, rank, Tap(value, kind, name, graph.scope(node), _loops(graph, node), **more)))

    for v in graph.inputs:
        add(0, v, "input", graph.leaves[v].path)
    for node, layer in graph.layers.items():
        add(1, graph.value(_with_bias(graph, node)), "weight", layer.path, leaves=layer.leaves, layer=node)
    for norm in traced.norms:
        name = next((graph.leaves[v].path for v in norm.scale), "normalization")
        add(2, norm.end, "norm", name)
    for nonlinearity in elementwise.find(graph, inside):
        limits = elementwise.limits(graph, nonlinearity)
        add(3, graph.value(nonlinearity.node), "nonlinearity", nonlinearity.name, limits=limits)
    branch = 0
    for k, residual in enumerate(traced.residuals):
        for b in residual.branches:
            branch += 1
            add(4, b.end, "branch", f"branch {branch}")
        add(5, residual.sum, "sum", f"sum {k + 1}")
    for v in dict.fromkeys(graph.program.outputs):
        if graph.is_activation(v):
            add(6, v, "output", "output")
    return tuple(tap for _, _, tap in sorted(found, key=lambda f: f[:2]))


def unrolled(taps: Sequence[Tap]) -> Iterator[tuple[Tap, tuple[int, ...]]]:
    """Taps in the order in which the network runs: those of a scan body once for each pass, with its numbers."""
    yield from _unroll(taps, 0)


def _unroll(taps: Sequence[Tap], level: int) -> Iterator[tuple[Tap, tuple[int, ...]]]:
    i = 0
    while i < len(taps):
        if len(taps[i].loops) <= level:
            yield taps[i], ()
            i += 1
            continue
        loop = taps[i].loops[level]
        j = i
        while j < len(taps) and len(taps[j].loops) > level and taps[j].loops[level] is loop:
            j += 1
        body = list(_unroll(taps[i:j], level + 1))
        for k in range(loop.length):
            yield from ((tap, (k, *at)) for tap, at in body)
        i = j


def layouts(graph: Graph, taps: Iterable[Tap]) -> dict[int, Layout]:
    """What the axes of each tapped value mean.

    The channels are those of the weight layer before it, as long as the rank stays; else the last axis. The examples
    are where axis 0 of the inputs went.
    """
    batch = batch_axes(graph)
    found: dict[int, Layout] = {}
    for tap in taps:
        layout = found.get(tap.value) or Layout(_channel(graph, tap.value))
        for axis, examples, inner in batch.get(tap.value, ())[:1]:
            if graph.program.shape(tap.value)[axis] % max(examples * inner, 1):
                continue  # a part of the examples, or what was gathered from them into other rows
            layout = layout._replace(example=int(axis), examples=int(examples), inner=int(inner))
        found[tap.value] = layout._replace(limits=tap.limits or layout.limits)
    return found


def _channel(graph: Graph, value: int) -> int:
    rank = len(graph.program.shape(value))
    node = graph.node_of[value]
    for _ in range(64):
        if len(graph.shape(node)) != rank:
            break
        if node in graph.layers:
            return graph.layers[node].channel
        op = graph.op(node)
        if op is None or op.primitive is p.transpose_p or not graph.parents[node]:
            break
        node = graph.parents[node][0]
    return rank - 1


def _loops(graph: Graph, node: int) -> tuple[Loop, ...]:
    op = graph.op(node)
    loop = op.loop if op is not None else None
    loops: list[Loop] = []
    while loop is not None:
        loops.append(loop)
        loop = loop.parent
    return tuple(reversed(loops))


def _with_bias(graph: Graph, node: int) -> int:
    """The node behind a layer that adds its bias, if one does."""
    if len(graph.users[node]) == 1:
        user = graph.users[node][0]
        op = graph.op(user)
        if op is not None and op.primitive is p.add_p and any(graph.is_parameter(v) for v in op.inputs):
            return user
    return node
