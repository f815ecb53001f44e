"""The backward pass: second moments of cotangents, from the nodes where they are given to all earlier ones.

A cotangent goes back by the transpose of what the rule did to lattices, or times the second moments of a slope. How its
square depends on the value itself is followed too, along ways on which entries are only moved or scaled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fixup_init.moments.distributions import SAMPLES, drawn_at, draws
from fixup_init.moments.lattice import Lattice, same, settled
from fixup_init.moments.polynomials import second_of
from fixup_init.moments.spread import Spread, of_cotangent, of_data, reached
from fixup_init.moments.values import Node, Way, function_of

_BINS = 128  # of the grid on which a factor is held
_AGAIN = 0.1  # of a cotangent: what parts that depend on each other may add to it before that is said
TWICE = "gradient approximate: parts of it that come by several ways are taken as independent"


@dataclasses.dataclass(frozen=True, eq=False)
class Cotangent:
    """Of a node: its lattice, and how its square depends on the node's own value (a factor of mean 1 on a grid).

    Behind a relu on a residual stream the cotangent is zero where the value is negative; the next relu down the stream
    is closed at almost the same entries, so that their slopes must not be averaged apart.
    """

    lattice: Lattice
    grid: np.ndarray | None = None
    factor: np.ndarray | None = None
    notes: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by which share of it they are true of
    origins: frozenset[tuple[int, int]] = frozenset()  # ways since which entries were only scaled or moved
    onward: Lattice | None = None  # in its place, for what random weights that made the value meet
    spread: float = 0.0  # of one seed's second moment: standard deviation of its logarithm, at most


def pull_back(
    starts: Mapping[Node, Lattice], strict: bool = False, spreads: Mapping[Node, Spread] | None = None
) -> dict[Node, Cotangent]:
    """Cotangents of every node from those of some.

    Args:
      starts: second-moment lattices of the cotangents that are given.
      spreads: `spread.of_values` of the nodes.
      strict: whether a rule that fails raises; else the cotangents behind it are NaN.
    """
    nodes = reached(starts)
    arriving: dict[Node, list[Cotangent]] = {
        node: [Cotangent(lattice, spread=of_data(node))] for node, lattice in starts.items()
    }
    found: dict[Node, Cotangent] = {}
    for number in sorted(nodes, reverse=True):
        node = nodes[number]
        if node not in arriving:
            continue
        own = _together(arriving.pop(node), len(node.shape))
        found[node] = own
        if node.meter:  # only what is given to itself goes on
            if node not in starts:
                continue
            own = Cotangent(starts[node], spread=of_data(node))
        for way in node.inputs:
            with np.errstate(all="ignore"):
                try:
                    part = _pulled(node, own, way)
                except (ValueError, IndexError, ArithmeticError):
                    if strict:
                        raise
                    rank = len(way.node.shape)
                    part = Cotangent(np.full((2,) * rank + (1,) * rank, math.nan))
            strays = of_cotangent(node, way, own.spread, spreads or {})
            arriving.setdefault(way.node, []).append(dataclasses.replace(part, spread=strays))
    return found


def _pulled(node: Node, own: Cotangent, way: Way) -> Cotangent:
    if way.pull is None:
        part = _through_slope(node, own, way)
    elif way.keeps:
        part = Cotangent(way.pull(own.lattice), own.grid, own.factor)
    else:
        met = own.onward if node.layer is not None and own.onward is not None else own.lattice
        onward = None if way.onward is None else way.onward(own.lattice)
        part = Cotangent(way.pull(met), onward=onward)
    notes = {**own.notes, **dict.fromkeys(way.notes, 1.0)}
    return dataclasses.replace(part, notes=notes, origins=_origins(node, own, way))


def _origins(node: Node, own: Cotangent, way: Way) -> frozenset[tuple[int, int]]:
    """What is left of a cotangent's origins: all where entries are only scaled or moved, else it is a new one."""
    new = frozenset({(node.number, node.inputs.index(way))})
    if way.apart:
        return new
    if way.pull is None or way.aligned or (way.keeps and math.prod(node.shape) == math.prod(way.node.shape)):
        return own.origins or frozenset({(node.number, -1)})
    if node.layer and node.layer.weights:  # the same weights take the same cotangent to the same
        return frozenset({(hash((node.layer.weights, own.origins or node.number)), -1)})
    return new


def _again(parts: Sequence[Cotangent], weights: Sequence[float]) -> dict[str, float]:
    """What to know where one cotangent arrives by several ways that no random weights tell apart."""
    whole = sum(weights)
    for k, one in enumerate(parts):
        for other, w in zip(parts[:k], weights, strict=False):
            if one.origins & other.origins and 2 * math.sqrt(max(w * weights[k], 0.0)) > _AGAIN * whole:
                return {TWICE: 1.0}
    return {}


def _together(parts: Sequence[Cotangent], rank: int) -> Cotangent:
    """The sum of cotangents that are independent."""
    if len(parts) == 1:
        return parts[0]
    lattice = functools.reduce(np.add, (c.lattice for c in parts))
    weights = [float(same(c.lattice, rank).mean()) for c in parts]
    whole = sum(weights)
    origins = frozenset[tuple[int, int]]().union(*(c.origins for c in parts))
    if not whole > 0:
        return Cotangent(lattice, origins=origins, spread=max(c.spread for c in parts))
    spread = sum(w / whole * c.spread for c, w in zip(parts, weights, strict=True))
    notes = _again(parts, weights)
    for c, w in zip(parts, weights, strict=True):
        for note, share in c.notes.items():
            notes[note] = min(notes.get(note, 0.0) + share * w / whole, 1.0)
    onward = None
    if any(c.onward is not None for c in parts):
        onward = functools.reduce(np.add, (c.lattice if c.onward is None else c.onward for c in parts))
    found = Cotangent(lattice, notes=notes, origins=origins, onward=onward, spread=spread)
    grids = [c.grid for c in parts if c.grid is not None]
    if not grids:
        return found
    grid = np.unique(np.concatenate(grids))
    factor = np.zeros(grid.size)
    for c, w in zip(parts, weights, strict=True):
        factor += w / whole * (1.0 if c.grid is None or c.factor is None else np.interp(grid, c.grid, c.factor))
    return dataclasses.replace(found, grid=grid, factor=factor)


def _through_slope(node: Node, own: Cotangent, way: Way) -> Cotangent:
    """A cotangent times a slope that may depend on the same value."""
    rank = len(node.shape)
    slopes = second_of(way.slope, rank, node.shape)
    lattice = settled(own.lattice * slopes, node.shape)
    bent = any(f for _, f in way.slope)
    wanted = way.node.is_elementwise
    if own.grid is None and not (bent and wanted):
        return Cotangent(lattice)
    used = {s for _, f in (*way.slope, *node.terms) for s in f}
    above = way.node.terms
    if way.node.source is not None and way.node.source in used:
        above = function_of(way.node.source)
    sources = sorted(used | {s for _, f in above for s in f}, key=lambda s: s.number)
    if not sources:
        return Cotangent(lattice)
    drawn = draws(sources)
    square = np.square(drawn_at(way.slope, drawn))
    weight = np.ones(SAMPLES)
    if own.grid is not None and own.factor is not None:
        weight = np.interp(drawn_at(node.terms, drawn), own.grid, own.factor)
        weight = weight / weight.mean()
    both = weight * square
    if not (both.mean() > 0 and np.isfinite(both).all()):
        return Cotangent(lattice)
    ratio = both.mean() / square.mean()
    if abs(ratio - 1) > 1e-3:
        share = np.clip(slopes / np.maximum(same(slopes, rank).mean(), 1e-300), 0.0, 1.0)
        share[(0,) * rank] = 1.0
        lattice = lattice * (1 + (ratio - 1) * share)
    if not wanted or not used & {s for _, f in above for s in f}:
        return Cotangent(lattice)
    return Cotangent(lattice, *_conditional(drawn_at(above, drawn), both / both.mean()))


def _conditional(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[y | x] on a grid."""
    scale = np.abs(x).max() or 1.0
    values, inverse, counts = np.unique(np.round(x / scale, 9), return_inverse=True, return_counts=True)
    sums = np.bincount(inverse.reshape(-1), weights=y)
    bins = np.minimum((np.cumsum(counts) - counts / 2) * _BINS / x.size, _BINS - 1).astype(int)
    n = np.bincount(bins, weights=counts, minlength=_BINS)
    centre = np.bincount(bins, weights=values * counts, minlength=_BINS)
    whole = np.bincount(bins, weights=sums, minlength=_BINS)
    held = n > 0
    return scale * centre[held] / n[held], whole[held] / n[held]
