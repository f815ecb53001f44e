"""How much the second moments of one seed scatter, where a network is not wide: bounds along the ways of nodes.

Behind n units with random weights the mean square of a vector is a mean of n squares, whose relative variance is 2 / n
for Gaussian units and (E relu^4 / (E relu^2)^2 - 1) / n = 5 / n for those of relu, which adds 3 / n, and backward too
by the units that it closes. Factors of successive layers multiply,
so that the logarithm of the second moment has a variance of at most 5 sum_l 1 / n_l (Hanin & Nica 2018,
arXiv:1812.05994, Thm. 1: log |x_L|^2 ~ N(-s^2 / 2, s^2) with s^2 = 5 sum_l 1 / n_l, forward and backward alike). At a
sum each term counts by its share, in a product each factor fully, and a normalization ends what was before it, but for
the gradient, which it divides. Terms are taken as if they strayed together, and examples and positions as if they were
one, which makes this a bound but for layers that act on what other layers had in common.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from fixup_init.moments.lattice import same
from fixup_init.moments.polynomials import second_of
from fixup_init.moments.values import Node, Term, Way

_WEIGHTS, _BENT = 2.0, 3.0  # relative variance of a square that random weights and that a nonlinearity add


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of a node's value: standard deviation of the logarithm of its second moment, and how many units it has."""

    deviation: float
    units: float = math.inf


def reached(starts: Iterable[Node]) -> dict[int, Node]:
    """Nodes by number, and all that they were made of."""
    nodes: dict[int, Node] = {}
    todo = list(starts)
    while todo:
        node = todo.pop()
        if node.number not in nodes:
            nodes[node.number] = node
            todo.extend(way.node for way in node.inputs)
    return nodes


def of_values(ends: Iterable[Node]) -> dict[Node, Spread]:
    """Of every node that leads to some."""
    nodes = reached(ends)
    found: dict[Node, Spread] = {}
    for number in sorted(nodes):
        node = nodes[number]
        if not node.ways:
            found[node] = Spread(of_data(node))
            continue
        before = sum(_share(node, way) * found[way.node].deviation for way in node.ways)
        units = node.layer.units if node.layer else min(found[way.node].units for way in node.ways)
        own = _WEIGHTS / units if node.layer else 0.0
        if any(_bends(way) for way in node.ways):
            own += _BENT / units
        found[node] = Spread(math.hypot(before, math.sqrt(own)), units)
    return found


def of_data(node: Node) -> float:
    """Of independent Gaussian entries."""
    return math.sqrt(2 / max(math.prod(node.shape), 1))


def of_cotangent(node: Node, way: Way, own: float, values: Mapping[Node, Spread]) -> float:
    """Of what a node's cotangent, whose logarithm strays by `own`, gives to an earlier node."""
    nothing = Spread(0.0)
    if way.ends:  # divided by a standard deviation
        return math.hypot(own, values.get(way.node, nothing).deviation)
    if node.layer:
        return math.hypot(own, math.sqrt(_WEIGHTS / node.layer.reads))
    factors = sum(values.get(other.node, nothing).deviation for other in node.ways if other is not way)
    if way.pull is not None:
        return math.hypot(own, factors)
    if _bends(way):
        return math.hypot(own, factors, math.sqrt(_BENT / values.get(way.node, nothing).units))
    return own


def _bends(way: Way) -> bool:
    """Whether a slope depends on values."""
    return way.pull is None and any(f for _, f in way.slope)


def _share(node: Node, way: Way) -> float:
    """The change of the logarithm of a node's second moment with that of one that it was made of."""
    if way.ends:
        return 0.0
    if way.pull is not None or len(node.ways) == 1:
        return 1.0
    whole = _square(node, node.terms)
    part = _square(node, way.slope) * _square(way.node, way.node.terms)
    return min(part / whole, 1.0) if whole > 0 and math.isfinite(part) else 1.0


def _square(node: Node, terms: Iterable[Term]) -> float:
    rank = len(node.shape)
    return float(same(second_of(list(terms), rank, node.shape), rank).mean())
