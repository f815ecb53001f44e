"""Softmax over segments: attention over the edges of each node, by segment sums (Velickovic et al. 2018).

An edge lies in a segment of k edges with the chance p_k. Weights of a segment add up to 1, so that with s_k = E sum a^2
of a softmax over k scores, E a = sum p_k / k and E a^2 = sum p_k s_k / k, and the sum of all weights squared gives the
mean product of two: (H - E sum a^2 + H2) / (E (E - 1)) for E edges, H segments that are not empty and H2 pairs of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
from scipy import special

from fixup_init.jaxprs import p
from fixup_init.moments.environment import Environment, NoRule
from fixup_init.moments.lattice import Lattice, settled
from fixup_init.moments.places import Places, places_of
from fixup_init.moments.polynomials import kin_of, second_of
from fixup_init.moments.softmax import TOKENS, softmax_square, walker
from fixup_init.moments.values import Source, Value, unknown
from fixup_init.program import Op, Program
from fixup_init.quadrature import Quantile

_CAST = frozenset({p.convert_element_type_p, p.copy_p})


@dataclasses.dataclass(frozen=True)
class Segments:
    """exp(s) over its sum within a segment, with or without the largest of the segment taken off first."""

    source: int
    indices: int
    cells: int
    inside: tuple[Op, ...]
    end: Op


def segment_softmaxes(program: Program) -> list[Segments]:
    """Every softmax over segments of the first axis."""
    maker = {v: op for op in program.ops for v in op.outputs}
    back = walker(maker)
    found = []
    for op in program.ops:
        if op.primitive is not p.div_p:
            continue
        above, exponential = back(op.inputs[0], _CAST)
        read = back(op.inputs[1])[1]
        total = back(read.inputs[0])[1] if read is not None and read.primitive is p.gather_p else None
        if total is None or total.primitive is not p.scatter_add_p or exponential is None:
            continue
        if exponential.primitive is not p.exp_p or back(total.inputs[2], _CAST)[0] != above:
            continue
        numbers = total.params["dimension_numbers"]
        if numbers.inserted_window_dims != (0,) or numbers.operand_batching_dims:
            continue
        source, inside = exponential.inputs[0], [exponential, total]
        less = maker.get(source)
        if less is not None and less.primitive is p.sub_p:
            largest = back(less.inputs[1])[1]
            most = back(largest.inputs[0])[1] if largest is not None and largest.primitive is p.gather_p else None
            if most is not None and most.primitive is p.scatter_max_p:
                source = less.inputs[0]
                inside.append(less)
        found.append(Segments(source, total.inputs[1], program.shape(total.outputs[0])[0], tuple(inside), op))
    return found


def _sizes(places: Places) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of segments, and the chance that an edge lies in one of each."""
    if places.exact is not None:
        sizes, counts = np.unique(places.exact[places.exact > 0], return_counts=True)
        return sizes, sizes * counts / (sizes * counts).sum()
    k = np.unique(np.rint(np.geomspace(1, places.count, min(places.count, 64))))
    chance = np.zeros(k.size)
    for share in np.unique(places.shares[places.shares > 0]):
        weight = float(places.shares[places.shares == share].sum())
        log = (
            special.gammaln(places.count) - special.gammaln(k) - special.gammaln(places.count - k + 1)
            + special.xlogy(k - 1, share) + special.xlog1py(places.count - k, -min(share, 1.0))
        )  # fmt: skip
        one = np.exp(log)
        chance += weight * one / max(one.sum(), 1e-300)
    return k, chance / chance.sum()


@functools.lru_cache(4096)
def _slope(variance: float, k: int) -> float:
    """sum_i E a_i^2 (g_i - sum a g)^2 for independent g of variance 1: E sum a^2 - 2 E sum a^3 + E (sum a^2)^2."""
    if k == 1:
        return 0.0
    if k > 64:
        square = softmax_square(variance, k)
        return square * (1 - square)
    z = np.random.default_rng(k).standard_normal((8192, k)) * math.sqrt(variance)
    a = np.exp(z - z.max(1, keepdims=True))
    a /= a.sum(1, keepdims=True)
    two = np.square(a).sum(1)
    return float((two - 2 * (a**3).sum(1) + two**2).mean())


def segment_softmax(env: Environment, found: Segments) -> Value:
    """Weights of edges."""
    value, indices = env.read(found.source), env.read(found.indices)
    bad = next((v for v in (value, indices) if v.unknown), None)
    if bad is not None:
        return unknown(value.shape, bad.unknown)
    rank, edges = value.rank, value.shape[0]
    places = places_of(indices, (found.cells,), {}, rank - 1)
    if places is None or edges < 2:
        raise NoRule("no rule for a softmax over such segments")
    second = second_of(value.terms, rank, value.shape)
    flat = second.mean(tuple(range(rank, 2 * rank)))
    v = max(float(flat[(0,) * rank] - flat[(1,) + (0,) * (rank - 1)]), 0.0)
    k, chance = _sizes(places)
    squares = np.array([softmax_square(round(v, 9), int(n)) for n in k])
    mean, square, least = (float((chance * x).sum()) for x in (1 / k, squares / k, 1 / k**2))
    segments = edges * mean
    hit, both = places.hits
    pairs = both * hit.size * (hit.size - 1)
    made = np.zeros((2,) * rank + (1,) * rank)
    for mask in itertools.product((0, 1), repeat=rank - 1):
        kappa = float(np.clip(flat[(0, *mask)] - flat[(1, *mask)], 0.0, v))
        share = math.expm1(min(kappa, 500)) / math.expm1(min(v, 500)) if v > 0 else 0.0
        one = square if not any(mask) else least + max(square - least, 0.0) * share
        made[(0, *mask)] = one
        made[(1, *mask)] = max(segments - edges * one + pairs, 0.0) / (edges * (edges - 1))
    ratio = math.sqrt(max(square / mean**2 - 1, 0.0))
    source = Source(
        value.shape, np.full((1,) * rank, mean), settled(made, value.shape), Quantile.positive(ratio),
        kin_of(value.terms),
    )  # fmt: skip
    moved = float((chance * [_slope(round(v, 6), int(n)) for n in k] / k).sum()) / square

    def back(l: Lattice) -> Lattice:
        l = l.mean(tuple(range(rank, 2 * rank)), keepdims=True)
        part = np.take(made, [0], 0) * (np.take(l, [0], 0) - np.take(l, [1], 0)) * moved
        return settled(np.concatenate([part, -part / (edges - 1)], 0), value.shape)

    return env.made(source, [(value, back)], {TOKENS})
