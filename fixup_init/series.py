"""Graph -> Places: which weight layers follow each other, which run beside others, and which are the last ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from fixup_init.graph import Graph, carried_by
from fixup_init.program import CARRY_IN, SLICE_IN, Loop
from fixup_init.propagation import Place
from fixup_init.taps import Tap

__all__ = ["leading", "places"]


def leading(graph: Graph, values: Iterable[int]) -> set[int]:
    """The nodes that lead to some values, their own among them, carries of scans included."""
    out_of = {graph.node_of[i]: graph.node_of[o] for i, o in _carries(graph)}
    nodes = (graph.node_of[v] for v in values if v in graph.node_of)
    return _closure(nodes, lambda n: _with(graph.parents[n], out_of.get(n)))


def places(graph: Graph, taps: Sequence[Tap]) -> Callable[[int, tuple[int, ...]], Place]:
    """Where taps stand.

    Args:
      graph: the model.
      taps: what is measured of it.

    Returns:
      A function of the index of a tap and the numbers of a pass through the scans around it.
    """
    into = {graph.node_of[o]: graph.node_of[i] for i, o in _carries(graph)}
    out_of = {i: o for o, i in into.items()}
    layers = set(graph.layers)
    fed = _closure(layers, lambda n: _with(graph.users[n], into.get(n)))
    before = {a for n in layers for a in _with(graph.parents[n], out_of.get(n))}
    followed = _closure(before, lambda n: _with(graph.parents[n], out_of.get(n)))
    carried = {loop: carried_by(graph, loop) for tap in taps for loop in tap.loops}
    own = _with_own_parameters(graph)
    chain = _longest_chain(graph, carried)
    units: dict[tuple[int, tuple[int, ...]], int] = {}

    def place(index: int, at: tuple[int, ...]) -> Place:
        tap = taps[index]
        which = tuple(k if loop in own else 0 for loop, k in zip(tap.loops, at, strict=True))
        # Passes that no carry joins run beside each other.
        first = all(k == 0 or tap.layer in carried[loop] for loop, k in zip(tap.loops, at, strict=True))
        return Place(
            unit=units.setdefault((index, which), len(units)),
            fed=graph.node_of[tap.value] in fed,
            last=tap.layer is not None and tap.layer not in followed,
            in_series=tap.layer is None or (tap.layer in chain and first),
        )

    return place


def _with(nodes: Iterable[int], other: int | None) -> list[int]:
    return [*nodes] if other is None else [*nodes, other]


def _closure(start: Iterable[int], after: Callable[[int], Iterable[int]]) -> set[int]:
    seen = set(start)
    todo = list(seen)
    while todo:
        for n in after(todo.pop()):
            if n not in seen:
                seen.add(n)
                todo.append(n)
    return seen


def _carries(graph: Graph) -> list[tuple[int, int]]:
    """What scan bodies carry, as the values that they see and return."""
    loops = dict.fromkeys(op.loop for op in graph.program.ops if op.primitive is CARRY_IN and op.loop is not None)
    pairs = [pair for loop in loops for pair in loop.carries]
    return [(i, o) for i, o in pairs if i in graph.node_of and o in graph.node_of]


def _with_own_parameters(graph: Graph) -> set[Loop]:
    """Scans over layers, whose passes have parameters of their own."""
    return {
        op.loop for op in graph.program.ops
        if op.primitive is SLICE_IN and op.loop is not None and graph.is_parameter(op.inputs[0])
    }  # fmt: skip


def _longest_chain(graph: Graph, carried: Mapping[Loop, Set[int]]) -> set[int]:
    """The weight layers on the path to an output that holds most of them, passes through scans counted; of paths with
    as many, the most direct one, which is that of a value and not that of its gate or of attention scores."""
    best: dict[int, tuple[int, int]] = {}  # layers on the way, less operations
    came: dict[int, int | None] = {}
    for node, parents in graph.parents.items():
        behind = came[node] = max(parents, key=lambda n: best[n], default=None)
        layers, operations = (0, 0) if behind is None else best[behind]
        if node in graph.layers:
            layers += math.prod(loop.length for loop, joined in carried.items() if node in joined)
        best[node] = layers, operations - 1
    node = max(dict.fromkeys(graph.outputs), key=lambda n: best[n], default=None)
    chain: set[int] = set()
    while node is not None:
        if node in graph.layers:
            chain.add(node)
        node = came[node]
    return chain
