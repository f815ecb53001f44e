"""The moments domain: mean and second moment of every value over random weights and data, from shapes alone.

A value is a polynomial in *sources*, each a random array known by its *lattice*: E x_i x_j for entries i, j that differ
in exactly the axes of a set, for every set of axes. Entries that differ in the same axes are taken as exchangeable, so
an array of rank r needs 2^r numbers, whatever its size; along an axis where that is not so (positions near a border
that convolutions pad with zeros) the figures hold a profile. The empty set is the second moment q; the set of the batch
axis alone is the covariance of two examples, the C map of mean-field theory; a sum over an axis of n entries is
n M[same] + n (n-1) M[different], a product with independent weights multiplies lattices, a broadcast copies one: so
pooling, normalization, attention, borders and correlated tokens are cases of one calculus.

Elementwise operations compose symbolically (`quadrature.Formula`), so that gelu is one function however many equations
it has; a nonlinear function of several sources takes their joint distribution as a new source. Backward, a cotangent is
a lattice too, of mean zero, taken as independent of the forward pass; every rule has its transpose.

References: Poole et al. 2016 (arXiv:1606.05340); Schoenholz et al. 2017 (arXiv:1611.01232); Xiao et al. 2018
(arXiv:1806.05393); Yang et al. 2019 (arXiv:1902.08129).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import special

from fixup_init import jaxprs, quadrature
from fixup_init.jaxprs import Op, Program, p
from fixup_init.quadrature import FLAT, Formula, Quantile, X

__all__ = ["Interpreter", "Node", "Source", "Value", "fixed", "gaussian", "known", "pull_back", "unknown"]

Lattice = np.ndarray  # (2,) * rank + profile: entry [s, h] with s the set of axes in which two entries differ
Profile = np.ndarray  # one number for each position along axes where it matters; size 1 along the others

_MOST = 1 << 24  # entries of a constant array that is evaluated
_TERMS = 24  # of a polynomial
_PROFILE = 4096  # entries of a profile


# --- lattices -------------------------------------------------------------------------------------------------------


def spread(profile: Profile) -> Lattice:
    """The lattice whose entry [s] is a profile averaged over the axes of s."""
    rank = profile.ndim
    found = profile
    for a in range(rank):  # a axes of sets are in front by now
        mean = found.mean(2 * a, keepdims=True)
        found = np.stack([found, np.broadcast_to(mean, found.shape)], a)
    return found


def crossed(left: Profile, right: Profile) -> Lattice:
    """The lattice of a product of two profiles, one at each entry of a pair."""
    one, other = spread(left), spread(right)
    return (np.broadcast_to(left, one.shape) * other + one * np.broadcast_to(right, other.shape)) / 2


def same(lattice: Lattice, rank: int) -> Profile:
    """E x_i^2."""
    return lattice[(0,) * rank]


def settled(lattice: Lattice, sizes: Sequence[int]) -> Lattice:
    """A lattice in which entries along an axis of size 1 count as the same, and profiles that are flat have size 1."""
    rank = len(sizes)
    for a in range(rank):
        if sizes[a] == 1:
            lattice = np.repeat(np.take(lattice, [0], a), 2, a)
        if lattice.shape[rank + a] > 1:
            first = np.take(lattice, [0], rank + a)
            if np.allclose(lattice, first, rtol=1e-9, atol=0):
                lattice = first
    return lattice


def summed(lattice: Lattice, axis: int, n: int, rank: int) -> Lattice:
    """Of a sum over one axis; that axis is gone."""
    one = np.take(lattice, 0, axis).mean(rank - 1 + axis)
    other = np.take(lattice, -1, axis).mean(rank - 1 + axis)
    return n * one + n * (n - 1) * other


def total(lattice: Lattice, axes: Iterable[int], sizes: Sequence[int]) -> Lattice:
    """Of a sum over axes, which are gone."""
    rank = len(sizes)
    for a in sorted(axes, reverse=True):
        lattice = summed(lattice, a, sizes[a], rank)
        rank -= 1
    return lattice


def kept(lattice: Lattice, axes: Iterable[int], sizes: Sequence[int]) -> Lattice:
    """E x_i sum_j x_j, j over the axes: the same for equal and for different entries along them."""
    for a in axes:
        both = np.take(lattice, [0], a) + (sizes[a] - 1) * np.take(lattice, [-1], a)
        lattice = np.repeat(both, 2, a)
    return lattice


def projected(lattice: Lattice, axes: Sequence[int], sizes: Sequence[int]) -> Lattice:
    """Of x - mean(x), the mean over some axes: E x_i x_j - E x_i m - E m x_j + E m^2."""
    rank = len(sizes)
    near = kept(lattice, axes, sizes) / math.prod(sizes[a] for a in axes)  # E x_i m
    far = near  # E m x_j, averaged over the j
    for a in axes:
        mean = np.take(far, [1], a).mean(rank + a, keepdims=True)
        shapes = np.broadcast_shapes(np.take(far, [0], a).shape, mean.shape)
        far = np.concatenate([np.broadcast_to(np.take(far, [0], a), shapes), np.broadcast_to(mean, shapes)], a)
    found = lattice - near - far + near.mean(tuple(rank + a for a in axes), keepdims=True)
    found[(0,) * rank] = np.maximum(found[(0,) * rank], 0.0)
    return found


def contracted(
    left: Lattice, left_axes: Sequence[Any], right: Lattice, right_axes: Sequence[Any], out: Sequence[Any],
    sizes: Mapping[Any, int],
) -> Lattice:  # fmt: skip
    """Of a sum of products of independent values, as einsum: axes by name, those that `out` lacks are summed."""
    gone = [a for a in dict.fromkeys((*left_axes, *right_axes)) if a not in out]
    order = [*out, *gone]
    product = _aligned(left, left_axes, order) * _aligned(right, right_axes, order)
    rank = len(order)
    for a in reversed(gone):
        product = summed(product, rank - 1, sizes[a], rank)
        rank -= 1
    for a in range(rank):
        if product.shape[a] == 1:
            product = np.repeat(product, 2, a)
    return product


def _aligned(lattice: Lattice, axes: Sequence[Any], order: Sequence[Any]) -> Lattice:
    rank = len(axes)
    at = [axes.index(a) for a in order if a in axes]
    lattice = lattice.transpose(*at, *(rank + k for k in at))
    shape = iter(lattice.shape[:rank])
    masks = [next(shape) if a in axes else 1 for a in order]
    profile = iter(lattice.shape[rank:])
    return lattice.reshape(*masks, *(next(profile) if a in axes else 1 for a in order))


def _mean_contracted(
    left: Profile, left_axes: Sequence[Any], right: Profile, right_axes: Sequence[Any], out: Sequence[Any],
    sizes: Mapping[Any, int],
) -> Profile:  # fmt: skip
    gone = [a for a in dict.fromkeys((*left_axes, *right_axes)) if a not in out]
    order = [*out, *gone]

    def aligned(x: Profile, axes: Sequence[Any]) -> Profile:
        x = x.transpose([axes.index(a) for a in order if a in axes])
        shape = iter(x.shape)
        return x.reshape([next(shape) if a in axes else 1 for a in order])

    product = aligned(left, left_axes) * aligned(right, right_axes)
    for a in reversed(gone):
        product = sizes[a] * product.mean(-1)
    return product


# --- sources, values, nodes -----------------------------------------------------------------------------------------

_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class Source:
    """A random array: its mean, its lattice, and the shape of its distribution (None: Gaussian)."""

    shape: tuple[int, ...]
    mean: Profile
    second: Lattice
    quantile: Quantile | None = None
    kin: frozenset[int] = frozenset()  # sources that it is made of, but for random weights in between
    sum_of: tuple[Source, tuple[int, ...], tuple[int, ...]] | None = None  # source, axes summed, where others went
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))
    images: dict[Any, Source] = dataclasses.field(default_factory=dict)
    expectations: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def relatives(self) -> frozenset[int]:
        return self.kin | {self.number}


Factors = dict[Source, Formula]
Term = tuple[Profile, Factors]


@dataclasses.dataclass(eq=False)
class Node:
    """A value whose cotangent is followed: `inputs` says how it reaches those that it was made of."""

    number: int
    shape: tuple[int, ...]
    inputs: list[Way]
    terms: list[Term] = dataclasses.field(default_factory=list)  # the value, when the node was made
    source: Source | None = None  # that the value became since

    @property
    def is_elementwise(self) -> bool:
        """Whether the value is an elementwise function of other nodes' values."""
        return any(way.pull is None or way.keeps for way in self.inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """How a cotangent reaches an earlier node: by its lattice, or times a slope, entry by entry."""

    node: Node
    pull: Callable[[Lattice], Lattice] | None = None
    slope: Sequence[Term] = ()
    keeps: bool = False  # whether entries are only moved


@dataclasses.dataclass(eq=False)
class Value:
    """What is known of a value: a polynomial in sources, or why it is not known."""

    shape: tuple[int, ...]
    terms: list[Term] = dataclasses.field(default_factory=list)
    slopes: dict[Node, list[Term]] = dataclasses.field(default_factory=dict)
    array: np.ndarray | None = None  # of a constant, of size 1 along axes where it only repeats
    unknown: str = ""
    notes: frozenset[str] = frozenset()
    visible: np.ndarray | None = None  # truth values that broadcast to it: False where a softmax shall give 0
    rows: int = 0  # of whole numbers below this that are equally likely
    bits: bool = False  # random bits

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_constant(self) -> bool:
        return not self.unknown and all(not f for _, f in self.terms)

    @property
    def number(self) -> float | None:
        """The number that it is everywhere, if it is one."""
        if self.unknown or not self.is_constant or any(c.size != 1 for c, _ in self.terms):
            return None
        return float(sum(c.sum() for c, _ in self.terms))


def unknown(shape: Sequence[int], why: str) -> Value:
    return Value(tuple(shape), unknown=why)


def ones(rank: int) -> Profile:
    return np.ones((1,) * rank)


def known(shape: Sequence[int], array: Any, profile: bool = False) -> Value:
    """A constant; `array` broadcasts to the shape, and is of the same rank."""
    shape = tuple(shape)
    x = np.asarray(array)
    if x.ndim != len(shape):
        x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    if x.dtype == object or np.iscomplexobj(x):
        return unknown(shape, "unknown: complex numbers")
    for a in range(x.ndim):
        if x.shape[a] > 1 and (x == np.take(x, [0], a)).all():
            x = np.take(x, [0], a)
    value = Value(shape, array=x)
    wide = x.astype(np.float64)
    if x.size == 1:
        value.terms = [(wide, {})] if wide.ravel()[0] != 0 else []
    elif profile and x.size <= _PROFILE:
        value.terms = [(wide, {})]
    else:
        value.terms = [(ones(len(shape)), {fixed(shape, wide): X})]
    return value


def fixed(shape: Sequence[int], array: np.ndarray) -> Source:
    """An array that is given, as if its entries were exchangeable along each axis."""
    rank = len(shape)
    clean = np.where(np.isfinite(array), array, 0.0).astype(np.float64)
    largest = np.abs(clean).max(initial=0.0) or 1.0
    second = _measured(clean / largest, shape) * largest**2
    quantile = None
    if clean.size > 1:
        flat = clean.ravel()
        flat = np.repeat(flat, -(-4096 // flat.size)) if flat.size < 4096 else flat[:: max(flat.size >> 15, 1)]
        quantile = Quantile.of_samples(flat)
    return Source(tuple(shape), np.full((1,) * rank, clean.mean()), second, quantile)


def _measured(x: np.ndarray, shape: Sequence[int]) -> Lattice:
    """Averages of x_i x_j over pairs that differ in the axes of each set."""
    rank = x.ndim
    found = np.empty((2,) * rank + (1,) * rank)
    for mask in itertools.product((0, 1), repeat=rank):
        axes = tuple(a for a in range(rank) if mask[a])
        found[mask] = np.square(x.mean(axes, keepdims=True)).mean()  # pairs, equal ones among them
    for a in range(rank):
        n = shape[a]
        one, both = np.take(found, [0], a), np.take(found, [1], a)
        other = (both - one / n) / (1 - 1 / n) if n > 1 else one
        found = np.concatenate([one, other], a)
    return found


def gaussian(shape: Sequence[int], variance: float, mean: float = 0.0, quantile: Quantile | None = None) -> Source:
    """Independent entries."""
    rank = len(shape)
    second = np.full((2,) * rank + (1,) * rank, mean**2)
    second[(0,) * rank] = variance + mean**2
    return Source(tuple(shape), np.full((1,) * rank, mean), settled(second, shape), quantile)


def of_source(source: Source) -> Value:
    return Value(source.shape, [(ones(len(source.shape)), {source: X})])


# --- polynomials ----------------------------------------------------------------------------------------------------


def _key(factors: Factors) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((s.number, f.key) for s, f in factors.items()))


def _merged(terms: Iterable[Term]) -> list[Term]:
    found: dict[Any, Term] = {}
    for c, factors in terms:
        k = _key(factors)
        found[k] = (found[k][0] + c, factors) if k in found else (c, factors)
    return [(c, f) for c, f in found.values() if c.any()]


def _times(left: Sequence[Term], right: Sequence[Term]) -> list[Term]:
    made = []
    for (c, f), (d, g) in itertools.product(left, right):
        both, scale = dict(f), c * d
        for s, h in g.items():
            both[s] = quadrature.product(both[s], h) if s in both else h
        made.append((scale, both))
    return _merged(made)


def _scaled(terms: Iterable[Term], c: float | Profile) -> list[Term]:
    return _merged((d * c, f) for d, f in terms)


def _rows(mean: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = np.stack([mean.ravel(), deviation.ravel()], 1)
    scale = np.maximum(np.abs(both).max(0), 1e-300)
    _, first, inverse = np.unique(np.round(both / scale, 11), axis=0, return_index=True, return_inverse=True)
    return both[first], inverse.reshape(-1)


_FEW = 16


def _expanded(source: Source, functions: Sequence[Formula]) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """(expansion, rows of the two entries of each pair, its correlation), for functions of one source."""
    key = tuple(f.key for f in functions)
    if key not in source.expectations:
        rank = len(source.shape)
        variance = np.maximum(same(source.second, rank) - source.mean**2, 0.0)
        shape = np.broadcast_shapes(source.second.shape, spread(source.mean).shape)
        here = [np.broadcast_to(x, shape) for x in (source.mean, variance)]
        there = [np.broadcast_to(spread(x), shape) for x in (source.mean, variance)]
        deviations = np.sqrt(here[1] * there[1])
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = np.where(deviations > 0, (source.second - here[0] * there[0]) / deviations, 1.0)
        rho = np.clip(np.where(np.isfinite(rho), rho, 1.0), -1.0, 1.0)
        rows, inverse = _rows(np.stack([here[0], there[0]]), np.sqrt(np.stack([here[1], there[1]])))
        if len(rows) > _FEW and np.ptp(rows[:, 0]) == 0 and rows[:, 1].min() > 0:
            expansion = _interpolated(functions, rows[0, 0], rows[:, 1], source.quantile)
        else:
            expansion = quadrature.expand(functions, rows[:, 0], rows[:, 1], source.quantile)
        first, second = inverse.reshape(2, -1)
        source.expectations[key] = expansion, first, second, quadrature.latent(source.quantile, rho).ravel()
    return source.expectations[key]


def _interpolated(
    functions: Sequence[Formula], mean: float, deviation: np.ndarray, quantile: Quantile | None
) -> quadrature.Expansion:
    """At many deviations, from those at the Chebyshev points of their range."""
    logs = np.log(deviation)
    low, high = logs.min(), logs.max()
    n = 12
    angle = (np.arange(n) + 0.5) * math.pi / n
    points = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    few = quadrature.expand(functions, np.full(n, mean), np.exp(points), quantile)
    weights = (-1.0) ** np.arange(n) * np.sin(angle)
    with np.errstate(divide="ignore", invalid="ignore"):
        basis = weights / (logs[:, None] - points)
        basis = np.where(np.isfinite(basis), basis, np.isinf(basis) * 1e300)
    basis = basis / basis.sum(1, keepdims=True)
    return quadrature.Expansion(
        np.einsum("rn,fnk->frk", basis, few.coefficients), np.einsum("rn,fgn->fgr", basis, few.products)
    )


def _pair(source: Source, f: Formula, g: Formula) -> Lattice:
    """E f(x_i) g(x_j) over pairs."""
    if f is X and g is X:
        return source.second
    key = ("pair", *sorted((f.key, g.key)))
    if key not in source.expectations:
        functions = sorted((f, g), key=lambda h: h.key) if f.key != g.key else [f]
        expansion, row, other, rho = _expanded(source, functions)
        last = len(functions) - 1
        shape = np.broadcast_shapes(source.second.shape, spread(source.mean).shape)
        found = quadrature.paired(expansion, 0, last, row, other, rho).reshape(shape)
        rank = len(source.shape)
        products = expansion.products[0, last][row].reshape(shape)
        found[(0,) * rank] = products[(0,) * rank]
        source.expectations[key] = settled(found, source.shape)
    return source.expectations[key]


def _expected(source: Source, f: Formula) -> Profile:
    """E f(x)."""
    if f is X:
        return source.mean
    key = ("mean", f.key)
    if key not in source.expectations:
        expansion, row, _, _ = _expanded(source, [f])
        shape = np.broadcast_shapes(source.second.shape, spread(source.mean).shape)
        rank = len(source.shape)
        source.expectations[key] = expansion.coefficients[0, :, 0][row].reshape(shape)[(0,) * rank]
    return source.expectations[key]


def _cross(a: Source, b: Source) -> Lattice | None:
    """E a_i b_j where b is the sum of a over some axes, in the shape of a."""
    for whole, part in ((a, b), (b, a)):
        link = part.sum_of
        if link is not None and link[0] is whole and whole.shape == part.shape:
            axes, where = link[1], link[2]
            if all(w == k or (w < 0 and k in axes) for k, w in enumerate(where)):
                return kept(whole.second, axes, whole.shape)
    return None


def mean_of(terms: Sequence[Term], rank: int) -> Profile:
    """E of a polynomial."""
    found = np.zeros((1,) * rank)
    for c, factors in terms:
        linked = None
        if len(factors) == 2 and all(f is X for f in factors.values()):
            linked = _cross(*factors)
        if linked is not None:
            found = found + c * same(linked, rank)
            continue
        for s, f in factors.items():
            c = c * _expected(s, f)
        found = found + c
    return found


def second_of(terms: Sequence[Term], rank: int, sizes: Sequence[int]) -> Lattice:
    """E of the product of a polynomial at i and at j."""
    found: Lattice = np.zeros((2,) * rank + (1,) * rank)
    for k, (c, f) in enumerate(terms):
        for d, g in terms[: k + 1]:
            linked = None
            if f is not g and len(f) == len(g) == 1 and all(h is X for h in (*f.values(), *g.values())):
                linked = _cross(*f, *g)
            left, right = c, d
            both = []
            for s in {**f, **g} if linked is None else ():
                if s in f and s in g:
                    both.append(_pair(s, f[s], g[s]))
                elif s in f:
                    left = left * _expected(s, f[s])
                else:
                    right = right * _expected(s, g[s])
            part = crossed(left, right)
            for factor in (*both, *(() if linked is None else (linked,))):
                part = part * factor
            found = found + (part if f is g else 2 * part)
    return settled(found, sizes)


def _is_gaussian(terms: Sequence[Term]) -> bool:
    return all(not f or (len(f) == 1 and all(h is X and s.quantile is None for s, h in f.items())) for _, f in terms)


_SAMPLES = 1 << 13


def _draws(sources: Sequence[Source]) -> dict[Source, np.ndarray]:
    """Values of one entry of each source, at points that fill the cube evenly (Roberts 2018's R-sequence)."""
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (len(sources) + 1))
    drawn = {}
    for k, s in enumerate(sources):
        u = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
        if len(sources) > 1:
            u = (0.5 + np.arange(_SAMPLES) * root ** -(k + 1)) % 1.0
        z = special.ndtri(np.clip(u, 0.25 / _SAMPLES, 1 - 0.25 / _SAMPLES))
        m = float(s.mean.mean())
        v = max(float((same(s.second, len(s.shape)) - s.mean**2).mean()), 0.0)
        drawn[s] = m + math.sqrt(v) * z if s.quantile is None else s.quantile.values(m, math.sqrt(v), z)
    return drawn


def _drawn(terms: Sequence[Term], drawn: Mapping[Source, np.ndarray]) -> np.ndarray:
    """A polynomial at such points."""
    x = np.zeros(_SAMPLES)
    for c, factors in terms:
        part = np.full(_SAMPLES, float(c.mean()))
        for s, f in factors.items():
            part = part * (drawn[s] if f is X else quadrature.evaluate(f, drawn[s]))
        x = x + part
    return x


def _distribution(terms: Sequence[Term]) -> Quantile | None:
    """The distribution of a polynomial, from points that fill the cube of its sources evenly."""
    if _is_gaussian(terms):
        return None
    sources = sorted({s for _, f in terms for s in f}, key=lambda s: s.number)
    if len(terms) == 1 and len(sources) == 1 and terms[0][1][sources[0]] is X:
        sign = float(terms[0][0].mean())
        q = sources[0].quantile
        if q is None or sign > 0:
            return q
    x = _drawn(terms, _draws(sources))
    return Quantile.of_samples(x) if np.isfinite(x).all() else None


def _kin(terms: Iterable[Term]) -> frozenset[int]:
    return frozenset().union(*(s.relatives for _, f in terms for s in f))


DEPENDENT = "approximate: values that depend on each other are taken as independent"


def _dependent(terms: Sequence[Term]) -> bool:
    """Whether sources that share what they are made of meet in a polynomial."""
    sources = list({s for _, f in terms for s in f})
    for k, a in enumerate(sources):
        for b in sources[:k]:
            if a.relatives & b.relatives and _cross(a, b) is None:
                return True
    return False


# --- the interpreter ------------------------------------------------------------------------------------------------


class Interpreter:
    """Evaluates a program in the moments domain.

    Args:
      program: what to evaluate.
      rows: below which whole numbers of data lie.
      taps: values whose nodes are kept.
    """

    def __init__(self, program: Program, rows: int = 2, taps: Iterable[int] = ()) -> None:
        self.program = program
        self.rows = rows
        self.env: dict[int, Value] = {}
        self.taps = frozenset(taps)
        self.tapped: dict[tuple[int, tuple[int, ...]], tuple[Node | None, Value]] = {}
        self.at: tuple[int, ...] = ()
        self.instead: dict[int, Callable[[Op], list[Value]]] = {}  # by op's index: what to do with it
        self.nodes = itertools.count()
        self.is_activation: Callable[[int], bool] = lambda value: False
        self.strict = False  # whether a rule that fails raises
        self.is_weight: Callable[[int], bool] = lambda value: False
        self.stacks: dict[int, list[Value]] = {}
        self.calls = dict(_calls(program.steps))

    # -- values

    def read(self, value: int) -> Value:
        if value not in self.env:
            shape = self.program.shape(value)
            constant = self.program.constants.get(value)
            dtype = self.program.dtype(value)
            if constant is None or not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_):
                self.env[value] = unknown(shape, "unknown: a value that nothing gives")
            elif math.prod(shape) > _MOST:
                self.env[value] = unknown(shape, "unknown: a constant array that is too large to look through")
            else:
                self.env[value] = known(shape, np.asarray(constant))
        return self.env[value]

    def node(self, value: Value) -> Node | None:
        """The node at which the cotangent of a value is known; None where it does not depend on inputs."""
        if not value.slopes:
            return None
        if len(value.slopes) == 1:
            ((node, terms),) = value.slopes.items()
            if len(terms) == 1 and not terms[0][1] and terms[0][0].size == 1 and terms[0][0].ravel()[0] == 1.0:
                return node
        inputs = [Way(node, slope=terms) for node, terms in value.slopes.items()]
        made = Node(next(self.nodes), value.shape, inputs, list(value.terms))
        value.slopes = {made: [(ones(value.rank), {})]}
        return made

    def moments(self, value: Value) -> tuple[Profile, Lattice]:
        return mean_of(value.terms, value.rank), second_of(value.terms, value.rank, value.shape)

    def collapse(self, value: Value) -> Source | None:
        """Makes a value one source, in place; None where it is a constant."""
        if value.is_constant:
            return None
        if len(value.terms) == 1:
            c, factors = value.terms[0]
            if c.size == 1 and c.ravel()[0] == 1.0 and len(factors) == 1 and next(iter(factors.values())) is X:
                return next(iter(factors))
        if _dependent(value.terms):
            value.notes |= {DEPENDENT}
        mean, second = self.moments(value)
        source = Source(value.shape, mean, second, _distribution(value.terms), _kin(value.terms))
        node = self.node(value)
        if node is not None:
            node.source = source
        value.terms = [(ones(value.rank), {source: X})]
        return source

    def made(
        self, source: Source, inputs: Sequence[tuple[Value, Callable[[Lattice], Lattice]]], notes: Iterable[str] = (),
        keeps: bool = False,
    ) -> Value:  # fmt: skip
        """A value that is a source of its own, with the way of cotangents back to what it was made of."""
        value = of_source(source)
        value.notes = frozenset(notes).union(*(v.notes for v, _ in inputs))
        back = [Way(node, pull, keeps=keeps) for v, pull in inputs if (node := self.node(v)) is not None]
        if back:
            node = Node(next(self.nodes), source.shape, back, list(value.terms))
            value.slopes = {node: [(ones(value.rank), {})]}
        if not np.any(source.second):
            value.terms = []
        return value

    def weights(self, op: Op) -> tuple[bool, ...]:
        """Which arguments of an operation are random weights."""
        return tuple(self.is_weight(v) for v in op.inputs)

    # -- running

    def run(self, ops: Sequence[Op], index: Mapping[int, int] | None = None, level: int = 0) -> None:
        """Evaluates operations in order; a scan's body once for each pass."""
        del index
        k = 0
        while k < len(ops):
            op = ops[k]
            loop = _loop_at(op, level)
            if loop is None:
                self.one(op)
                k += 1
                continue
            end = k
            while end < len(ops) and _loop_at(ops[end], level) is loop:
                end += 1
            self.scan(loop, ops[k:end], level)
            k = end

    def scan(self, loop: Any, body: Sequence[Op], level: int) -> None:
        outs: dict[int, list[Value]] = {}
        stacked = [
            op.inputs[0] for op in self.program.ops
            if op.primitive is jaxprs.STACK_OUT and any(op.inputs[0] in b.outputs for b in body)
        ]  # fmt: skip
        starts = {op.outputs[0]: self.read(op.inputs[0]) for op in body if op.primitive is jaxprs.CARRY_IN
                  and op.loop is loop}  # fmt: skip
        rest = [op for op in body if not (op.primitive is jaxprs.CARRY_IN and op.loop is loop)]
        for carry, value in starts.items():
            self.env[carry] = value
        for done in range(loop.length):
            self.at = (*self.at, done)
            for op in body:
                if op.primitive is jaxprs.CARRY_IN and op.loop is loop:
                    self.tap(op)
            self.run(rest, None, level + 1)
            self.at = self.at[:-1]
            for v in stacked:
                outs.setdefault(v, []).append(self.read(v))
            nexts = {carry: self.read(out) for carry, out in loop.carries if carry in starts}
            if done < loop.length - 1:
                self.env.update(nexts)
        for v in stacked:
            self.env[v] = outs[v][-1]
            self.stacks[v] = outs[v]

    def one(self, op: Op) -> None:
        handler = self.instead.get(id(op))
        try:
            with np.errstate(all="ignore"):
                results = handler(op) if handler is not None else self.apply(op)
        except _NoRule as none:
            results = [unknown(self.program.shape(v), f"unknown: {none}") for v in op.outputs]
        except (ValueError, IndexError, TypeError, KeyError, AssertionError, np.linalg.LinAlgError) as error:
            if self.strict:
                raise
            del error  # a form of the operation that its rule does not foresee
            why = f"unknown: no rule for this use of `{op.name}`"
            results = [unknown(self.program.shape(v), why) for v in op.outputs]
        for v, value in zip(op.outputs, results, strict=True):
            self.env[v] = value
        self.tap(op)

    def tap(self, op: Op) -> None:
        for v in op.outputs:
            if v in self.taps:
                value = self.env[v]
                if not value.unknown and not value.slopes and self.is_activation(v):  # behind whole numbers
                    root = Node(next(self.nodes), value.shape, [], list(value.terms))
                    value.slopes = {root: [(ones(value.rank), {})]}
                node = None if value.unknown else self.node(value)
                self.tapped[v, self.at] = (node, dataclasses.replace(value, terms=list(value.terms)))

    def apply(self, op: Op) -> list[Value]:
        args = [self.read(v) for v in op.inputs]
        shapes = [self.program.shape(v) for v in op.outputs]
        primitive: Any = op.primitive
        if primitive in _RANDOM_KEYS:
            return [known(s, np.zeros((1,) * len(s))) for s in shapes]
        if primitive is p.random_bits_p:
            value = of_source(gaussian(shapes[0], 1 / 12, 0.5, Quantile.uniform()))
            value.bits = True
            return [value]
        if args and all(a.array is not None for a in args):
            found = self.constants(op, args, shapes)
            if found is not None:
                return found
        rule = RULES.get(primitive)
        if rule is None and quadrature.is_elementwise(primitive):
            rule = elementwise
        if rule is None and not op.inputs and primitive is p.iota_p:
            return [_iota(op, shapes[0])]
        bad = next((a for a in args if a.unknown), None)
        if bad is not None:
            return [dataclasses.replace(unknown(s, bad.unknown)) for s in shapes]
        if rule is None:
            raise _NoRule(f"no rule for `{op.name}`")
        results = rule(self, op, args)
        return results if isinstance(results, list) else [results]

    def constants(self, op: Op, args: Sequence[Value], shapes: Sequence[tuple[int, ...]]) -> list[Value] | None:
        """The results of an operation on constants."""
        primitive: Any = op.primitive
        profile = any(a.array is not None and a.array.size > 1 and a.is_constant for a in args)
        if quadrature.is_elementwise(primitive):
            rank = len(shapes[0])
            arrays = [a.array for a in args if a.array is not None]
            arrays = np.broadcast_arrays(*(x.reshape((1,) * (rank - x.ndim) + x.shape) for x in arrays))
            shape = arrays[0].shape
        elif primitive is p.broadcast_in_dim_p:
            inner = args[0].array
            assert inner is not None
            shape = [1] * len(shapes[0])
            for a, d in enumerate(op.params["broadcast_dimensions"]):
                shape[d] = inner.shape[a]
            return [known(shapes[0], inner.reshape(shape), profile)]
        elif not isinstance(primitive, jaxprs.Marker) and all(
            math.prod(s) <= _MOST for s in (*shapes, *(a.shape for a in args))
        ):
            if primitive in (p.dot_general_p, p.conv_general_dilated_p) or (primitive in RULES and any(
                a.array is not None and a.array.size < math.prod(a.shape) for a in args
            ) and primitive not in (p.iota_p, p.gather_p, p.slice_p, p.concatenate_p, p.transpose_p, p.reshape_p,
                                    p.squeeze_p)):  # fmt: skip
                return None
            arrays = [np.broadcast_to(a.array, a.shape) for a in args]  # pyright: ignore
            shape = None
        else:
            return None
        try:
            dtypes = [self.program.dtype(v) for v in op.inputs]
            found = jaxprs.bind(op, [jnp.asarray(x, d) for x, d in zip(arrays, dtypes, strict=True)])
        except Exception:
            return None
        return [known(s, np.asarray(x), profile) for s, x in zip(shapes, found, strict=True)]


class _NoRule(Exception):
    pass


def _calls(steps: Iterable[Op]) -> Iterable[tuple[int, Op]]:
    """Results of calls with a derivative of their own."""
    for step in steps:
        if step.body is not None:
            yield from _calls(step.body.steps)
        elif step.primitive is p.custom_jvp_call_p and len(step.outputs) == 1:
            yield step.outputs[0], step


def _loop_at(op: Op, level: int) -> Any:
    loops = []
    loop = op.loop
    while loop is not None:
        loops.append(loop)
        loop = loop.parent
    return loops[-1 - level] if len(loops) > level else None


def _iota(op: Op, shape: tuple[int, ...]) -> Value:
    axis = op.params["dimension"]
    count = np.arange(shape[axis]).astype(op.params["dtype"])
    return known(shape, count.reshape([-1 if a == axis else 1 for a in range(len(shape))]))


# --- elementwise rules ----------------------------------------------------------------------------------------------


def _linear_slopes(parts: Iterable[tuple[Value, list[Term]]]) -> dict[Node, list[Term]]:
    """Slopes of a result whose slope in each argument is a polynomial."""
    found: dict[Node, list[Term]] = {}
    for value, factor in parts:
        for node, terms in value.slopes.items():
            made = _times(terms, factor)
            if made:
                found[node] = _merged([*found.get(node, []), *made])
    return found


def _result(shape: tuple[int, ...], terms: list[Term], args: Sequence[Value], slopes: Any) -> Value:
    return Value(shape, terms, slopes, notes=frozenset().union(*(a.notes for a in args)))


def elementwise(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    """Entry by entry: sums and products of polynomials, functions of one source."""
    primitive: Any = op.primitive
    shape = machine.program.shape(op.outputs[0])
    rank = len(shape)
    one: list[Term] = [(ones(rank), {})]
    args = [_lifted(machine, a, shape) for a in args]
    result: Value | None = None
    if any(a.bits for a in args):
        return _of_bits(op, args)
    if primitive in _SAME or (
        primitive is p.convert_element_type_p and not _cuts(machine.program.dtype(op.inputs[0]), op.params["new_dtype"])
    ):
        a = args[0]
        slopes = {} if primitive is p.stop_gradient_p else a.slopes
        result = dataclasses.replace(a, slopes=dict(slopes), array=None)
    elif primitive in (p.add_p, p.sub_p, p.add_jaxvals_p):
        sign = -1.0 if primitive is p.sub_p else 1.0
        terms = _merged([*args[0].terms, *_scaled(args[1].terms, sign)])
        slopes = _linear_slopes([(args[0], one), (args[1], _scaled(one, sign))])
        result = _result(shape, terms, args, slopes)
    elif primitive is p.neg_p:
        slopes = _linear_slopes([(args[0], _scaled(one, -1.0))])
        result = _result(shape, _scaled(args[0].terms, -1.0), args, slopes)
    elif primitive is p.mul_p:
        result = _product(machine, shape, args)
    elif primitive is p.div_p and (c := args[1]).is_constant and c.terms:
        inverse = 1.0 / sum((k for k, _ in c.terms), np.zeros((1,) * rank))
        slopes = _linear_slopes([(args[0], [(inverse, {})])])
        result = _result(shape, _scaled(args[0].terms, inverse), args, slopes)
    elif primitive in (p.square_p, p.integer_pow_p) and op.params.get("y", 2) == 2 and _common(args) is None:
        result = _product(machine, shape, [args[0], args[0]])
    if result is None:
        result = _function(machine, op, args, shape)
    call = machine.calls.get(op.outputs[0])
    if call is not None and result.slopes:
        _by_rule(machine, call, result)
    if len(result.terms) > _TERMS or any(len(t) > _TERMS for t in result.slopes.values()):
        machine.collapse(result)
    _keep_mask(machine, op, args, result)
    result.rows = max((a.rows for a in args), default=0) if primitive not in FLAT else 0
    return result


def _lifted(machine: Interpreter, value: Value, shape: tuple[int, ...]) -> Value:
    """An argument in the shape of the result: scalars, and axes of size 1, are repeated."""
    if value.shape == shape:
        return value
    rank = len(shape)
    if value.is_constant:
        c = sum((c for c, _ in value.terms), np.zeros((1,) * value.rank))
        c = c.reshape((1,) * (rank - value.rank) + c.shape)
        array = None if value.array is None else value.array.reshape((1,) * (rank - value.rank) + value.array.shape)
        return dataclasses.replace(value, shape=shape, terms=[(c, {})] if c.any() else [], array=array)
    result = broadcasted(machine, value, shape, tuple(range(rank - value.rank, rank)))
    if value.array is not None:
        result.array = value.array.reshape((1,) * (rank - value.array.ndim) + value.array.shape)
    return result


def _keep_mask(machine: Interpreter, op: Op, args: Sequence[Value], result: Value) -> None:
    """Scores that are masked stay so through sums and products."""
    seen = [a.visible for a in args if a.visible is not None]
    if op.primitive in (p.add_p, p.sub_p, p.add_jaxvals_p):
        for a in args:
            if a.array is not None and a.array.size > 1 and a.array.min() < -1e4:
                seen.append(a.array > -1e4)
                result.terms = next(b for b in args if b is not a).terms
    if seen:
        result.visible = functools.reduce(np.logical_and, seen)


def _cuts(old: Any, new: Any) -> bool:
    return not jnp.issubdtype(new, jnp.inexact) and jnp.issubdtype(old, jnp.inexact)


def _of_bits(op: Op, args: list[Value]) -> Value:
    """Random bits on their way to a uniform number in [1, 2), as JAX makes it."""
    a = next(a for a in args if a.bits)
    if op.primitive in (p.shift_right_logical_p, p.or_p, p.and_p, p.xor_p, p.convert_element_type_p):
        return dataclasses.replace(a, array=None)
    raise _NoRule(f"no rule for `{op.name}` of random bits")


def _product(machine: Interpreter, shape: tuple[int, ...], args: Sequence[Value]) -> Value:
    left, right = args
    if len(left.terms) * len(right.terms) > _TERMS:
        machine.collapse(left if len(left.terms) > len(right.terms) else right)
    terms = _times(left.terms, right.terms)
    slopes = _linear_slopes([(left, list(right.terms)), (right, list(left.terms))])
    result = _result(shape, terms, args, slopes)
    if any(len(f) > 1 for _, f in terms) and _dependent(terms):
        result.notes |= {DEPENDENT}
    return result


def _common(args: Sequence[Value]) -> Source | None:
    """The one source of all arguments, where they are functions of it alone."""
    sources = {s for a in args for _, f in a.terms for s in f}
    plain = all(c.size == 1 for a in args for c, _ in a.terms)
    return next(iter(sources)) if len(sources) == 1 and plain else None


def _formula(value: Value) -> Formula:
    coefficients = [float(c.ravel()[0]) for c, _ in value.terms]
    functions = [next(iter(f.values())) if f else quadrature.constant(1.0) for _, f in value.terms]
    return quadrature.weighted(coefficients, functions) if value.terms else quadrature.constant(0.0)


def _function(machine: Interpreter, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value:
    rank = len(shape)
    if all(a.is_constant for a in args):  # with a profile
        arrays = np.broadcast_arrays(*(sum((c for c, _ in a.terms), np.zeros((1,) * rank)) for a in args))
        dtypes = [machine.program.dtype(v) for v in op.inputs]
        found = jaxprs.bind(op, [jnp.asarray(x, d) for x, d in zip(arrays, dtypes, strict=True)])[0]
        return known(shape, np.asarray(found), profile=True)
    common = _common(args)
    if common is None:
        if op.primitive is p.select_n_p:
            return _selected(machine, op, args, shape)
        moving = [a for a in dict.fromkeys(args) if not a.is_constant]
        for a in moving:
            machine.collapse(a)
        common = _common(args)
        if common is None and op.primitive is p.div_p:
            return _quotient(machine, op, args, shape)
        if common is None and len(moving) == 2 and len(args) == 2:
            return _of_two(machine, op, args, shape)
        if common is None:
            raise _NoRule(f"no rule for `{op.name}` of several values at once")
    casts = [machine.program.dtype(v) for v in op.inputs]
    formulas = [_formula(a) for a in args]
    terms: list[Term] = [(ones(rank), {common: quadrature.of_op(op, formulas, casts)})]
    parts = []
    if op.primitive not in FLAT:
        for k, a in enumerate(args):
            if a.slopes and jnp.issubdtype(casts[k], jnp.floating):
                parts.append((a, [(ones(rank), {common: quadrature.slope(op, formulas, casts, k)})]))
    return _result(shape, terms, args, _linear_slopes(parts))


def _by_rule(machine: Interpreter, call: Op, result: Value) -> None:
    """Takes the derivative that a call has of its own, where that differs from its body's: relu at 0."""
    outer = [machine.read(v) for v in call.inputs]
    moving = [k for k, a in enumerate(outer) if a.slopes]
    common = _common(outer)
    if common is None or len(moving) != 1 or len(outer[moving[0]].slopes) != len(result.slopes):
        return
    (k,) = moving
    ((node, before), *more), (_, after) = outer[k].slopes.items(), next(iter(result.slopes.items()))
    one = len(before) == 1 and not before[0][1] and before[0][0].size == 1 and before[0][0].ravel()[0] == 1.0
    if more or not one or any(c.size > 1 for c, _ in after) or any(set(f) - {common} for _, f in after):
        return
    avals = [machine.program.avals[v] for v in call.inputs]
    ruled = quadrature.slope_by_rule(call, [_formula(a) for a in outer], avals, k)
    if ruled is not None:
        result.slopes = {node: [(ones(result.rank), {common: ruled})]}


def _quotient(machine: Interpreter, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value:
    above, below = args
    base = _common([below])
    if base is None:
        raise _NoRule("no rule for `div` by a constant array")
    casts = [machine.program.dtype(v) for v in op.inputs]
    formulas = [quadrature.constant(1.0), _formula(below)]
    rank = len(shape)
    inverse: list[Term] = [(ones(rank), {base: quadrature.of_op(op, formulas, casts)})]
    slope: list[Term] = [(ones(rank), {base: quadrature.slope(op, formulas, casts, 1)})]
    result = _result(
        shape, _times(above.terms, inverse), args,
        _linear_slopes([(above, inverse), (below, _times(above.terms, slope))]),
    )  # fmt: skip
    if _dependent(result.terms):
        result.notes |= {DEPENDENT}
    return result


def _selected(machine: Interpreter, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value:
    """p a + (1 - p) b, for a truth value p of its own."""
    which, *cases = args
    if len(cases) != 2:
        raise _NoRule("no rule for `select_n` among more than two")
    rank = len(shape)
    if which.array is not None and which.array.size > 1:
        for k, case in enumerate(cases):
            other = cases[1 - k]
            if (c := case.number) is not None and c < -1e4:
                result = dataclasses.replace(other, slopes=dict(other.slopes), array=None)
                seen = which.array.astype(bool) if k == 0 else ~which.array.astype(bool)
                result.visible = seen if result.visible is None else result.visible & seen
                return result
    if not which.is_constant and len(which.terms) > 1:
        machine.collapse(which)
    yes = list(which.terms)
    no = _merged([(ones(rank), {}), *_scaled(yes, -1.0)])
    terms = _merged([*_times(cases[0].terms, no), *_times(cases[1].terms, yes)])
    result = _result(shape, terms, args, _linear_slopes([(cases[0], no), (cases[1], yes)]))
    if _dependent(terms):
        result.notes |= {DEPENDENT}
    return result


_GRID = 96


def _of_two(machine: Interpreter, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value:
    """A function of two independent values, by their joint distribution."""
    sources = [_common([a]) for a in args]
    if any(s is None for s in sources):
        raise _NoRule(f"no rule for `{op.name}` with a constant array")
    left, right = (s for s in sources if s is not None)
    rank = len(shape)
    casts = [machine.program.dtype(v) for v in op.inputs]
    z, w = np.polynomial.hermite_e.hermegauss(_GRID)
    w = w / w.sum()
    drawn, correlations = [], []
    for s in (left, right):
        m = float(s.mean.mean())
        v = max(float((same(s.second, rank) - s.mean**2).mean()), 1e-300)
        drawn.append(m + math.sqrt(v) * z if s.quantile is None else s.quantile.values(m, math.sqrt(v), z))
        rho = np.clip((s.second.mean(tuple(range(rank, 2 * rank)), keepdims=True) - m * m) / v, -1, 1)
        correlations.append(quadrature.latent(s.quantile, rho))
    a, b = np.meshgrid(*drawn, indexing="ij")
    flat = [jnp.asarray(x.ravel(), d) for x, d in zip((a, b), casts, strict=True)]
    f = np.asarray(jaxprs.bind(op, flat)[0], np.float64).reshape(a.shape)
    basis = np.polynomial.hermite_e.hermevander(z, 24) / np.sqrt(special.factorial(np.arange(25)))
    c2 = np.square((basis * w[:, None]).T @ f @ (basis * w[:, None]))
    weight = np.outer(w, w)
    mean, q = float((weight * f).sum()), float((weight * f * f).sum())
    powers = [correlation[..., None] ** np.arange(25) for correlation in correlations]
    second = np.einsum("...k,kl,...l->...", powers[0], c2, powers[1]) + 0.0
    second[(0,) * rank] = q
    quantile = Quantile.of_samples(f.ravel(), weight.ravel())
    source = Source(
        shape, np.full((1,) * rank, mean), settled(second, shape), quantile, left.relatives | right.relatives
    )
    parts = []
    if op.primitive not in FLAT:
        import jax

        for k, value in enumerate(args):
            one = [jnp.zeros(f.size, jnp.asarray(x).dtype) for x in flat]
            one[k] = one[k] + 1
            d = np.asarray(jax.jvp(lambda *xs: jaxprs.bind(op, xs)[0], flat, one)[1], np.float64).reshape(f.shape)
            moment = float((weight * d * d).sum())
            parts.append((value, functools.partial(lambda m, n, l: _diagonal(m, n, l), moment, rank)))
    notes = {DEPENDENT} if left.relatives & right.relatives else set()
    return machine.made(source, parts, notes)


def _diagonal(moment: float, rank: int, cotangent: Lattice) -> Lattice:
    return cotangent * moment


_SAME = frozenset({
    p.copy_p, p.stop_gradient_p, p.name_p, jaxprs.IDENTITY, p.reduce_precision_p, p.sharding_constraint_p,
    p.device_put_p,
})  # fmt: skip
_RANDOM_KEYS = frozenset({p.random_seed_p, p.random_split_p, p.random_fold_in_p})
RULES: dict[Any, Callable[[Interpreter, Op, list[Value]], Value | list[Value]]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Cotangent:
    """Of a node: its lattice, and how its square depends on the node's own value (a factor of mean 1 on a grid).

    Behind a relu on a residual stream the cotangent is zero where the value is negative; the next relu down the stream
    is closed at almost the same entries, so that their slopes must not be averaged apart.
    """

    lattice: Lattice
    grid: np.ndarray | None = None
    factor: np.ndarray | None = None


def pull_back(starts: Mapping[Node, Lattice], strict: bool = False) -> dict[Node, Lattice]:
    """Cotangents of every node from those of some.

    Args:
      starts: second-moment lattices of the cotangents that are given.
      strict: whether a rule that fails raises; else the cotangents behind it are NaN.
    """
    nodes: dict[int, Node] = {}
    todo = list(starts)
    while todo:
        node = todo.pop()
        if node.number not in nodes:
            nodes[node.number] = node
            todo.extend(way.node for way in node.inputs)
    arriving: dict[Node, list[Cotangent]] = {node: [Cotangent(lattice)] for node, lattice in starts.items()}
    found: dict[Node, Lattice] = {}
    for number in sorted(nodes, reverse=True):
        node = nodes[number]
        if node not in arriving:
            continue
        own = _together(arriving.pop(node), len(node.shape))
        found[node] = own.lattice
        for way in node.inputs:
            with np.errstate(all="ignore"):
                try:
                    part = _pulled(node, own, way)
                except (ValueError, IndexError):
                    if strict:
                        raise
                    rank = len(way.node.shape)
                    part = Cotangent(np.full((2,) * rank + (1,) * rank, math.nan))
            arriving.setdefault(way.node, []).append(part)
    return found


def _pulled(node: Node, own: Cotangent, way: Way) -> Cotangent:
    if way.pull is None:
        return _through_slope(node, own, way)
    if way.keeps:
        return Cotangent(way.pull(own.lattice), own.grid, own.factor)
    return Cotangent(way.pull(own.lattice))


def _together(parts: Sequence[Cotangent], rank: int) -> Cotangent:
    """The sum of cotangents that are independent."""
    if len(parts) == 1:
        return parts[0]
    lattice = functools.reduce(np.add, (c.lattice for c in parts))
    grids = [c.grid for c in parts if c.grid is not None]
    if not grids:
        return Cotangent(lattice)
    grid = np.unique(np.concatenate(grids))
    weights = [float(same(c.lattice, rank).mean()) for c in parts]
    whole = sum(weights)
    if not whole > 0:
        return Cotangent(lattice)
    factor = np.zeros(grid.size)
    for c, w in zip(parts, weights, strict=True):
        factor += w / whole * (1.0 if c.grid is None or c.factor is None else np.interp(grid, c.grid, c.factor))
    return Cotangent(lattice, grid, factor)


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
        above = [(ones(rank), {way.node.source: X})]
    sources = sorted(used | {s for _, f in above for s in f}, key=lambda s: s.number)
    if not sources:
        return Cotangent(lattice)
    drawn = _draws(sources)
    square = np.square(_drawn(way.slope, drawn))
    weight = np.ones(_SAMPLES)
    if own.grid is not None and own.factor is not None:
        weight = np.interp(_drawn(node.terms, drawn), own.grid, own.factor)
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
    return Cotangent(lattice, *_conditional(_drawn(above, drawn), both / both.mean()))


_BINS = 128


def _conditional(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[y | x] on a grid."""
    scale = np.abs(x).max() or 1.0
    values, inverse, counts = np.unique(np.round(x / scale, 9), return_inverse=True, return_counts=True)
    sums = np.bincount(inverse.reshape(-1), weights=y)
    bins = np.minimum((np.cumsum(counts) - counts / 2) * _BINS / x.size, _BINS - 1).astype(int)
    n = np.bincount(bins, weights=counts, minlength=_BINS)
    centre = np.bincount(bins, weights=values * counts, minlength=_BINS)
    total_ = np.bincount(bins, weights=sums, minlength=_BINS)
    held = n > 0
    return scale * centre[held] / n[held], total_[held] / n[held]


# --- rules: moving entries ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Move:
    """A rearrangement of entries: what becomes of a lattice, of a profile, and of a cotangent on the way back."""

    key: Any
    shape: tuple[int, ...]
    lattice: Callable[[Lattice], Lattice]
    profile: Callable[[Profile], Profile]
    back: Callable[[Lattice], Lattice]
    where: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None  # for `sum_of`: where axes of the summed went


def _moved(machine: Interpreter, value: Value, move: _Move) -> Value:
    """Every source of a polynomial is moved, so that what depends on each other still does."""

    def image(source: Source) -> Source:
        if move.key not in source.images:
            new = Source(move.shape, move.profile(source.mean), settled(move.lattice(source.second), move.shape),
                         source.quantile, source.relatives)  # fmt: skip
            if source.sum_of is not None and move.where is not None:
                whole, axes, where = source.sum_of
                new.sum_of = whole, axes, move.where(where)
            source.images[move.key] = new
        return source.images[move.key]

    terms = [(move.profile(c), {image(s): f for s, f in factors.items()}) for c, factors in value.terms]
    node = machine.node(value)
    slopes = {}
    if node is not None:
        made = Node(next(machine.nodes), move.shape, [Way(node, move.back, keeps=True)], terms)
        slopes = {made: [(ones(len(move.shape)), {})]}
    return Value(move.shape, terms, slopes, notes=value.notes, rows=value.rows, bits=value.bits)


def _flat_profile(x: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis, keepdims=True)


def _rule(*primitives: Any) -> Callable[[Any], Any]:
    def register(rule: Any) -> Any:
        for q in primitives:
            RULES[q] = rule
        return rule

    return register


@_rule(p.transpose_p)
def _transpose(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    order = op.params["permutation"]
    rank = len(order)
    inverse = tuple(int(k) for k in np.argsort(order))

    def turned(by: Sequence[int]) -> Callable[[Lattice], Lattice]:
        return lambda l: l.transpose(*by, *(rank + k for k in by))

    move = _Move(
        ("transpose", tuple(order)), tuple(args[0].shape[k] for k in order), turned(order),
        lambda x: x.transpose(order), turned(inverse), lambda where: tuple(where[k] for k in order),
    )  # fmt: skip
    result = _moved(machine, args[0], move)
    if args[0].visible is not None:
        seen = args[0].visible
        result.visible = np.broadcast_to(seen, _padded(seen.shape, rank)).transpose(order)
    return result


def _padded(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + tuple(shape)


@_rule(p.reshape_p, p.squeeze_p)
def _reshape(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    return _reshaped(machine, args[0], machine.program.shape(op.outputs[0]))


def _reshaped(machine: Interpreter, value: Value, shape: tuple[int, ...]) -> Value:
    before = value.shape
    if before == shape:
        return value

    def where(axes: tuple[int, ...]) -> tuple[int, ...]:
        left = [a for a, n in zip(axes, before, strict=True) if n > 1]
        sizes = [n for n in before if n > 1]
        if [n for n in shape if n > 1] != sizes:
            return tuple(-2 for _ in shape)
        rest = iter(left)
        return tuple(next(rest) if n > 1 else -1 for n in shape)

    move = _Move(
        ("reshape", shape), shape, lambda l: reshaped(l, before, shape), lambda x: _profile_reshaped(x, before, shape),
        lambda l: reshaped(l, shape, before), where,
    )  # fmt: skip
    result = _moved(machine, value, move)
    if value.visible is not None:
        seen = value.visible
        seen = seen.reshape(_padded(seen.shape, len(before)))
        if seen.size * 4 <= _MOST:
            result.visible = np.broadcast_to(seen, before).reshape(shape)
    return result


@functools.lru_cache(4096)
def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int], list[int] | None]]:
    """Axes that are reshaped together: (old axes, new axes, sizes of the pieces that both are made of, if any)."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [], []
        a = b = 1
        while True:
            if a == b and (old or new) and (a > 1 or not (i < len(before) and j < len(after))):
                break
            if a <= b and i < len(before) and (a < b or not (j < len(after)) or before[i] <= after[j] or not old):
                a *= before[i]
                old.append(i)
                i += 1
            elif j < len(after):
                b *= after[j]
                new.append(j)
                j += 1
            else:
                a *= before[i]
                old.append(i)
                i += 1
            if a == b and old and new:
                break
            if i == len(before) and j == len(after):
                break
        cuts = sorted({*_strides([before[k] for k in old]), *_strides([after[k] for k in new])})
        pieces = None
        if all(high % low == 0 for low, high in itertools.pairwise(cuts)):
            pieces = [high // low for low, high in itertools.pairwise(cuts)][::-1]
        groups.append((old, new, pieces))
    return groups


def _strides(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[k:]) for k in range(len(sizes) + 1)]


def reshaped(lattice: Lattice, before: tuple[int, ...], after: tuple[int, ...]) -> Lattice:
    """Axes are split into equal ones and merged: pairs that differ in a merged axis are averaged over how they do."""
    rank = len(before)
    at = 0
    for old, new, pieces in _groups(tuple(before), tuple(after)):
        sizes = [before[k] for k in old]
        if pieces is None:
            lattice, rank = _merged_axes(lattice, at, sizes, rank)
            sizes = [math.prod(sizes)]
            lattice, rank = _split_axis(lattice, at, [after[k] for k in new], rank)
            at += len(new)
            continue
        rest, k = list(pieces), 0
        for n in sizes:
            mine = _taken(rest, n)
            lattice, rank = _split_axis(lattice, at + k, mine, rank)
            k += len(mine)
        rest = list(pieces)
        for k, j in enumerate(new):
            mine = _taken(rest, after[j])
            lattice, rank = _merged_axes(lattice, at + k, mine, rank)
        at += len(new)
    return settled(lattice, after)


def _taken(pieces: list[int], size: int) -> list[int]:
    mine: list[int] = []
    while math.prod(mine) < size:
        mine.append(pieces.pop(0))
    return mine


def _split_axis(lattice: Lattice, axis: int, sizes: Sequence[int], rank: int) -> tuple[Lattice, int]:
    if len(sizes) == 1:
        return lattice, rank
    one, other = np.take(lattice, 0, axis), np.take(lattice, -1, axis)
    n = len(sizes)
    shape = one.shape
    at = rank - 1 + axis
    split = list(sizes) if shape[at] > 1 else [1] * n

    def cut(x: Lattice) -> Lattice:
        return x.reshape(*shape[:at], *split, *shape[at + 1 :])

    parts = np.empty((2,) * n, object)
    for mask in itertools.product((0, 1), repeat=n):
        parts[mask] = cut(one) if not any(mask) else cut(other)
    stacked = np.stack([parts[m] for m in itertools.product((0, 1), repeat=n)], axis)
    full = stacked.reshape(*stacked.shape[:axis], *((2,) * n), *stacked.shape[axis + 1 :])
    return full, rank - 1 + n


def _merged_axes(lattice: Lattice, axis: int, sizes: Sequence[int], rank: int) -> tuple[Lattice, int]:
    """Merges len(sizes) axes from `axis` on into one."""
    n = len(sizes)
    if n == 0:
        lattice = np.repeat(np.expand_dims(np.expand_dims(lattice, rank + axis), axis), 2, axis)
        return lattice, rank + 1
    if n == 1:
        return lattice, rank
    wide = [k for k in range(n) if lattice.shape[rank + axis + k] > 1]
    many = [k for k in range(n) if sizes[k] > 1]
    if wide and many != wide[:1]:  # a profile within a longer axis
        lattice = lattice.mean(tuple(rank + axis + k for k in wide), keepdims=True)
    one = np.zeros(())
    other: Any = 0.0
    count = 0
    for mask in itertools.product((0, 1), repeat=n):
        part = lattice[(slice(None),) * axis + mask]
        pairs = math.prod((s - 1) if m else 1 for s, m in zip(sizes, mask, strict=True))
        if not any(mask):
            one = part
        elif pairs:
            other = other + pairs * part
            count += pairs
    other = other / count if count else one
    made = np.stack([one, np.broadcast_to(other, one.shape)], axis)
    at = rank - n + 1 + axis
    shape = made.shape
    made = made.reshape(*shape[:at], math.prod(shape[at : at + n]), *shape[at + n :])
    return made, rank - n + 1


def _profile_reshaped(x: Profile, before: tuple[int, ...], after: tuple[int, ...]) -> Profile:
    """As the same entries of `reshaped`."""
    shape: list[int] = []
    parts = x
    for old, new, pieces in _groups(tuple(before), tuple(after)):
        wide = [k for k in old if x.shape[k] > 1]
        many_old = [k for k in old if before[k] > 1]
        many_new = [j for j in new if after[j] > 1]
        if wide and len(many_old) == 1 and len(many_new) == 1:
            shape += [after[j] if j == many_new[0] else 1 for j in new]
        elif wide and len(many_old) == 1 and pieces is not None:
            shape += [after[j] for j in new]
        else:
            for k in wide:
                parts = parts.mean(k, keepdims=True)
            shape += [1] * len(new)
    return parts.reshape(shape)


@_rule(p.broadcast_in_dim_p)
def _broadcast(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    return broadcasted(machine, args[0], machine.program.shape(op.outputs[0]), tuple(op.params["broadcast_dimensions"]))


def broadcasted(machine: Interpreter, value: Value, shape: tuple[int, ...], dims: tuple[int, ...]) -> Value:
    """A value repeated along new axes, and along those of size 1 that become longer."""
    before, rank = value.shape, len(shape)
    new = [a for a in range(rank) if a not in dims]
    longer = [a for a in dims if shape[a] != before[dims.index(a)]]

    def forward(l: Lattice) -> Lattice:
        masks, profile = [1] * rank, [1] * rank
        for k, a in enumerate(dims):
            masks[a], profile[a] = 2, l.shape[len(dims) + k]
        l = l.reshape(*masks, *profile)
        for a in new:
            l = np.repeat(l, 2, a)
        for a in longer:
            l = np.repeat(np.take(l, [0], a), 2, a)
        return l

    def profile(x: Profile) -> Profile:
        sizes = [1] * rank
        for k, a in enumerate(dims):
            sizes[a] = x.shape[k]
        return x.reshape(sizes)

    def back(l: Lattice) -> Lattice:
        for a in longer:
            l = np.repeat(np.expand_dims(np.expand_dims(summed(l, a, shape[a], rank), rank - 1 + a), a), 2, a)
        return settled(total(l, new, [1 if a in longer else n for a, n in enumerate(shape)]), before)

    def where(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axes[dims.index(a)] if a in dims and a not in longer else -1 for a in range(rank))

    result = _moved(machine, value, _Move(("broadcast", shape, dims), shape, forward, profile, back, where))
    if value.visible is not None:
        sizes = [1] * rank
        seen = value.visible.reshape(_padded(value.visible.shape, len(before)))
        for k, a in enumerate(dims):
            sizes[a] = seen.shape[k]
        result.visible = seen.reshape(sizes)
    return result


def _part(value: Value, key: Any, shape: tuple[int, ...], starts: Sequence[int | None]) -> _Move:
    """A block of entries, at `starts` where these are known."""
    before, rank = value.shape, len(shape)
    cut = [a for a in range(rank) if shape[a] != before[a]]

    def profile(x: np.ndarray, first: int = 0) -> np.ndarray:
        for a in cut:
            if x.shape[first + a] > 1:
                start = starts[a]
                if start is None:
                    x = x.mean(first + a, keepdims=True)
                else:
                    x = np.take(x, range(start, start + shape[a]), first + a)
        return x

    def back(l: Lattice) -> Lattice:
        for a in cut:
            n, m = before[a], shape[a]
            if l.shape[rank + a] > 1:
                l = l.mean(rank + a, keepdims=True)
            one, other = np.take(l, [0], a), np.take(l, [1], a)
            l = np.concatenate([one * m / n, other * (m * (m - 1)) / (n * max(n - 1, 1))], a)
        return l

    return _Move(key, shape, lambda l: profile(l, rank), profile, back, lambda axes: axes)


@_rule(p.slice_p, p.dynamic_slice_p, p.rev_p)
def _slice(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    shape = machine.program.shape(op.outputs[0])
    if op.primitive is p.rev_p:
        axes = op.params["dimensions"]
        rank = len(shape)

        def turned(l: np.ndarray, first: int = rank) -> np.ndarray:
            return np.flip(l, tuple(first + a for a in axes))

        move = _Move(("rev", tuple(axes)), shape, turned, lambda x: turned(x, 0), turned, lambda w: w)
        return _moved(machine, args[0], move)
    starts: list[int | None] = [None] * len(shape)
    if op.primitive is p.slice_p and not (op.params["strides"] and max(op.params["strides"]) > 1):
        starts = list(op.params["start_indices"])
    key = ("slice", shape, tuple(starts), str(op.params.get("strides")), op.outputs if None in starts else ())
    result = _moved(machine, args[0], _part(args[0], key, shape, starts))
    if args[0].visible is not None:
        result.visible = None
    return result


@_rule(jaxprs.SPLIT)
def _split(machine: Interpreter, op: Op, args: list[Value]) -> list[Value]:
    axis, at, made = op.params["axis"], 0, []
    for v in op.outputs:
        shape = machine.program.shape(v)
        starts: list[int | None] = [0] * len(shape)
        starts[axis] = at
        made.append(
            _moved(machine, args[0], _part(args[0], ("slice", shape, tuple(starts), "None", ()), shape, starts))
        )
        at += shape[axis]
    return made


@_rule(p.concatenate_p)
def _concatenate(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    axis = op.params["dimension"]
    return _joined(machine, machine.program.shape(op.outputs[0]), axis, args)


def _joined(machine: Interpreter, shape: tuple[int, ...], axis: int, args: Sequence[Value]) -> Value:
    rank, n = len(shape), shape[axis]
    sizes = [a.shape[axis] for a in args]
    moving = [k for k, a in enumerate(args) if not a.is_constant]
    if len(moving) == 1 and all(a.number == 0 for k, a in enumerate(args) if k != moving[0]):
        return _extended(machine, args[moving[0]], shape, axis, sum(sizes[: moving[0]]))
    found = [machine.moments(a) for a in args]
    mean: Any = 0.0
    one: Any = 0.0
    other: Any = 0.0
    masked = tuple(slice(None) for _ in range(axis))
    for k, (m, l) in enumerate(found):
        m = m.mean(axis, keepdims=True)
        l = l.mean(rank + axis, keepdims=True)
        mean = mean + sizes[k] * m / n
        one = one + sizes[k] * l[(*masked, slice(0, 1))] / n
        if n > 1:
            other = other + sizes[k] * (sizes[k] - 1) * l[(*masked, slice(1, 2))] / (n * (n - 1))
            for j in range(k):
                cross = (
                    2 * sizes[k] * sizes[j] * spread(m) * spread(found[j][0].mean(axis, keepdims=True)) / (n * (n - 1))
                )
                other = other + cross[(*masked, slice(1, 2))]
    if n == 1:
        other = one
    shapes = np.broadcast_shapes(np.shape(one), np.shape(other))
    second = settled(np.concatenate([np.broadcast_to(one, shapes), np.broadcast_to(other, shapes)], axis), shape)
    quantile = None
    gaussians = all(_is_gaussian(a.terms) for a in args)
    spreads = [float((same(l, rank) - m**2).mean()) for m, l in found]
    centres = [float(m.mean()) for m, _ in found]
    if not gaussians or np.ptp(spreads) > 0.02 * max(spreads) or np.ptp(centres) ** 2 > 0.02 * max(spreads):
        quantile = _mixture([(a, c, v) for a, c, v in zip(args, centres, spreads, strict=True)], sizes)
    source = Source(shape, mean, second, quantile, frozenset().union(*(_kin(a.terms) for a in args)))

    def back(k: int, l: Lattice) -> Lattice:
        return settled(l.mean(rank + axis, keepdims=True), args[k].shape)

    return machine.made(source, [(a, functools.partial(back, k)) for k, a in enumerate(args)])


def _extended(machine: Interpreter, value: Value, shape: tuple[int, ...], axis: int, low: int) -> Value:
    """A value with zeros beside it: what it could be everywhere, times an indicator."""
    rank, n, m = len(shape), value.shape[axis], shape[axis]

    def back(l: Lattice) -> Lattice:
        l = l.mean(rank + axis, keepdims=True)
        one, other = np.take(l, [0], axis), np.take(l, [1], axis)
        return settled(np.concatenate([one * m / n, other * (m * (m - 1)) / (n * max(n - 1, 1))], axis), value.shape)

    move = _Move(("extend", shape, axis), shape, lambda l: l.mean(rank + axis, keepdims=True),
                 lambda x: x.mean(axis, keepdims=True), back)  # fmt: skip
    result = _moved(machine, value, move)
    inside = np.zeros(m)
    inside[low : low + n] = 1.0
    indicator = fixed(shape, inside.reshape([-1 if a == axis else 1 for a in range(rank)]))
    one: list[Term] = [(ones(rank), {indicator: X})]
    result.terms = _times(result.terms, one)
    result.slopes = {node: _times(terms, one) for node, terms in result.slopes.items()}
    return result


def _mixture(parts: Sequence[tuple[Value, float, float]], sizes: Sequence[int]) -> Quantile | None:
    """The distribution of an entry that comes from one of several values."""
    z = special.ndtri((np.arange(1024) + 0.5) / 1024)
    samples, weights = [], []
    for (value, centre, variance), n in zip(parts, sizes, strict=True):
        q = _distribution(value.terms)
        deviation = math.sqrt(max(variance, 0.0))
        samples.append(centre + deviation * z if q is None else q.values(centre, deviation, z))
        weights.append(np.full(z.size, n / z.size))
    return Quantile.of_samples(np.concatenate(samples), np.concatenate(weights))


@_rule(jaxprs.STACK)
def _stack(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    axis = op.params["axis"]
    rows = [_reshaped(machine, a, (*a.shape[:axis], 1, *a.shape[axis:])) for a in args]
    return _joined(machine, machine.program.shape(op.outputs[0]), axis, rows)


@_rule(p.pad_p)
def _pad(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    value, filling = args
    shape, before = machine.program.shape(op.outputs[0]), value.shape
    rank = len(shape)
    c = filling.number
    if c is None:
        raise _NoRule("no rule for `pad` with anything but a number")
    mean, second = machine.moments(value)
    if math.prod(shape) == math.prod(before):
        return value
    changed = [(a, config) for a, config in enumerate(op.params["padding_config"]) if tuple(config) != (0, 0, 0)]
    if len(changed) == 1 and c == 0:
        ((a, (low, high, inner)),) = changed
        if before[a] < 0.75 * shape[a] and inner == 0 and low >= 0 and high >= 0:
            return _extended(machine, value, shape, a, low)
    inside = 1.0
    quantile = _distribution(value.terms)
    for a, (low, high, inner) in changed:
        n, m = before[a], shape[a]
        one, other = np.take(second, [0], a), np.take(second, [1], a)
        across = c * spread(mean)
        across = np.take(across, [1], a)
        held = n / m
        inside *= held
        if inner == 0 and low >= 0 and high >= 0 and held >= 0.75 and _profile_size(mean, second, rank) * m <= _PROFILE:
            widths = [(0, 0)] * (2 * rank)
            if one.shape[rank + a] == 1:
                one, mean = np.repeat(one, n, rank + a), np.repeat(mean, n, a) if mean.shape[a] == 1 else mean
            widths[rank + a] = (low, high)
            one = np.pad(one, widths, constant_values=c * c)
            mean = np.pad(mean, [(low, high) if k == a else (0, 0) for k in range(rank)], constant_values=c)
        else:
            one = held * one.mean(rank + a, keepdims=True) + (1 - held) * c * c
            mean = held * mean.mean(a, keepdims=True) + (1 - held) * c
        if m > 1:
            pairs = m * (m - 1)
            other = other.mean(rank + a, keepdims=True)
            across = across.mean(rank + a, keepdims=True)
            other = (n * (n - 1) * other + 2 * n * (m - n) * across + (m - n) * (m - n - 1) * c * c) / pairs
        shapes = np.broadcast_shapes(one.shape, other.shape)
        second = np.concatenate([np.broadcast_to(one, shapes), np.broadcast_to(other, shapes)], a)
    if inside < 0.75:
        v = float((same(second, rank) - mean**2).mean())
        quantile = _mixture([(value, float(mean.mean()) / inside, v / inside), (known(before, c), c, 0.0)],
                            [round(1000 * inside), round(1000 * (1 - inside))])  # fmt: skip
    source = Source(shape, mean, settled(second, shape), quantile, _kin(value.terms))

    def back(l: Lattice) -> Lattice:
        for a, (low, _, inner) in changed:
            if l.shape[rank + a] > 1 and inner == 0 and low >= 0:
                l = np.take(l, range(low, low + before[a]), rank + a)
            elif l.shape[rank + a] > 1:
                l = l.mean(rank + a, keepdims=True)
        return settled(l, before)

    return machine.made(source, [(value, back)])


def _profile_size(mean: Profile, second: Lattice, rank: int) -> int:
    return max(mean.size, math.prod(second.shape[rank:]))


# --- rules: sums ----------------------------------------------------------------------------------------------------


@_rule(p.reduce_sum_p)
def _reduce_sum(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    value = args[0]
    axes = tuple(sorted(op.params["axes"]))
    before, shape = value.shape, machine.program.shape(op.outputs[0])
    mean, second = machine.moments(value)
    n = math.prod(before[a] for a in axes)
    quantile = None if n >= 8 else _distribution(value.terms)
    source = Source(
        shape, n * mean.mean(axes), settled(total(second, axes, before), shape), quantile, _kin(value.terms)
    )
    if len(value.terms) == 1:
        c, factors = value.terms[0]
        if len(factors) == 1 and c.size == 1 and c.ravel()[0] == 1.0 and next(iter(factors.values())) is X:
            source.sum_of = next(iter(factors)), axes, tuple(a for a in range(len(before)) if a not in axes)

    def back(l: Lattice) -> Lattice:
        rank = len(shape)
        for a in axes:
            l = np.repeat(np.expand_dims(np.expand_dims(l, rank + a), a), 2, a)
            rank += 1
        return settled(l, before)

    return machine.made(source, [(value, back)])


@_rule(p.reduce_max_p, p.reduce_min_p)
def _reduce_max(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    value, axes = args[0], tuple(sorted(op.params["axes"]))
    before, shape = value.shape, machine.program.shape(op.outputs[0])
    sign = 1.0 if op.primitive is p.reduce_max_p else -1.0
    n = math.prod(before[a] for a in axes)
    second = second_of(value.terms, value.rank, before)
    mask = [slice(None)] * value.rank
    for a in axes:
        mask[a] = 1 if before[a] > 1 else 0  # pyright: ignore
    other = second[tuple(mask)].mean(tuple(value.rank - len(axes) + a for a in axes))
    gone = tuple(0 if a in axes else slice(None) for a in range(value.rank))
    one = second[gone].mean(tuple(value.rank - len(axes) + a for a in axes))
    mean = mean_of(value.terms, value.rank).mean(axes)
    source = _largest(machine, value, shape, mean, one, other, n, sign)

    def back(l: Lattice) -> Lattice:
        rank = len(shape)
        for a in axes:
            l = np.repeat(np.expand_dims(np.expand_dims(l, rank + a), a), 2, a)
            l[(slice(None),) * a + (1,)] = 0.0
            rank += 1
        return settled(l / n, before)

    return machine.made(source, [(value, back)], {POOLED} if n > 1 else ())


POOLED = "approximate: the largest of some entries, taken as equally correlated"


def _largest(
    machine: Interpreter, value: Value, shape: tuple[int, ...], mean: Profile, one: Lattice, other: Lattice, n: float,
    sign: float = 1.0, shared: Lattice | None = None,
) -> Source:  # fmt: skip
    """The largest of n entries: one for each entry of `shape`.

    Args:
      machine: the interpreter.
      value: what they are entries of; gives the distribution.
      shape: of the result.
      mean: of the entries.
      one: the lattice of one entry of each group.
      other: that of two different entries of one group (masks: of different groups).
      n: how many.
      sign: -1 for the smallest.
      shared: which part of their entries two groups have in common.
    """
    del machine
    rank = len(shape)
    quantile = _distribution(value.terms)
    m = float(mean.mean())
    q = float(same(one, rank).mean())
    v = max(q - m * m, 0.0)
    if v == 0 or n <= 1:
        return Source(shape, mean, settled(one, shape), quantile, _kin(value.terms))
    flat = tuple(range(rank, 2 * rank))
    inner = float(np.clip((float(same(other, rank).mean()) - m * m) / v, 0.0, 1.0))
    r = float(np.clip(quadrature.latent(quantile, np.array([inner]))[0], 0.0, 1.0))
    z = special.ndtri((np.arange(512) + 0.5) / 512)
    level = (np.arange(512) + 0.5) / 512
    top = special.ndtri(np.clip(level ** (1.0 / n), 1e-15, 1 - 1e-15))
    g = sign * (math.sqrt(r) * z[:, None] + math.sqrt(1 - r) * top)
    samples = (m + math.sqrt(v) * g if quantile is None else quantile.values(m, math.sqrt(v), g)).ravel()
    found = Quantile.of_samples(samples)
    new_mean, new_v = float(samples.mean()), float(samples.var())
    between = float(samples.reshape(512, 512).mean(1).var())  # what the shared part of a group explains
    rho = np.clip((one.mean(flat, keepdims=True) - m * m) / v, -1, 1)  # entries of different groups
    share = between / new_v if new_v > 0 else 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.where(inner > 0, np.minimum(rho / max(inner, 1e-12), 1.0) * share, rho)
    if shared is not None:
        scale = scale + shared * (1 - scale)
    second = new_mean**2 + new_v * scale
    second[(0,) * rank] = new_mean**2 + new_v
    return Source(shape, np.full((1,) * rank, new_mean), settled(second, shape), found, _kin(value.terms))


# --- rules: products with weights -----------------------------------------------------------------------------------


@_rule(p.dot_general_p)
def _dot(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    contract, batch = op.params["dimension_numbers"]
    left, right = args
    shape = machine.program.shape(op.outputs[0])
    names: list[list[Any]] = [[None] * left.rank, [None] * right.rank]
    sizes: dict[Any, int] = {}
    for side, value in enumerate((left, right)):
        for k, a in enumerate(batch[side]):
            names[side][a] = f"b{k}"
        for k, a in enumerate(contract[side]):
            names[side][a] = f"c{k}"
        for a in range(value.rank):
            names[side][a] = names[side][a] or f"{'xy'[side]}{a}"
            sizes[names[side][a]] = value.shape[a]
    out = [f"b{k}" for k in range(len(batch[0]))]
    out += [a for side in (0, 1) for a in names[side] if a[0] == "xy"[side]]
    return _einsum(machine, shape, (left, right), names, out, sizes, machine.weights(op))


def _einsum(
    machine: Interpreter, shape: tuple[int, ...], args: tuple[Value, Value], names: Sequence[Sequence[Any]],
    out: Sequence[Any], sizes: Mapping[Any, int], weight: Sequence[bool],
) -> Value:  # fmt: skip
    moments = [machine.moments(a) for a in args]
    second = contracted(moments[0][1], names[0], moments[1][1], names[1], out, sizes)
    mean = _mean_contracted(moments[0][0], names[0], moments[1][0], names[1], out, sizes)
    gone = [a for a in dict.fromkeys((*names[0], *names[1])) if a not in out]
    n = math.prod(sizes[a] for a in gone)
    notes = set()
    kin = _kin(args[0].terms) | _kin(args[1].terms)
    if any(weight) and not mean.any():
        kin = frozenset()  # a random sign stands between
    if _kin(args[0].terms) & _kin(args[1].terms):
        notes.add(DEPENDENT)
    quantile = None
    if n < 4:
        quantile = _distribution(_times(_scalar(args[0]), _scalar(args[1])))
    source = Source(shape, mean, settled(second, shape), quantile, kin)
    shapes = [tuple(sizes[a] for a in axes) for axes in names]

    def back(side: int, cotangent: Lattice) -> Lattice:
        other = 1 - side
        missing = [a for a in names[side] if a not in out and a not in names[other]]
        inner = [a for a in names[side] if a not in missing]
        found = contracted(cotangent, list(out), moments[other][1], names[other], inner, sizes)
        rank = len(inner)
        for k, a in enumerate(names[side]):
            if a in missing:
                found = np.repeat(np.expand_dims(np.expand_dims(found, rank + k), k), 2, k)
                rank += 1
        return settled(found, shapes[side])

    return machine.made(source, [(args[0], functools.partial(back, 0)), (args[1], functools.partial(back, 1))], notes)


def _scalar(value: Value) -> list[Term]:
    """A polynomial's average over positions, as one of scalars' coefficients."""
    return [(np.full((), float(c.mean())), f) for c, f in value.terms]


@_rule(p.conv_general_dilated_p)
def _conv(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    value, kernel = args
    numbers = op.params["dimension_numbers"]
    shape = machine.program.shape(op.outputs[0])
    if op.params["batch_group_count"] != 1:
        raise _NoRule("no rule for `conv_general_dilated` with groups of the batch")
    x_spec, k_spec, o_spec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    rank = len(shape)
    mean, second = machine.moments(value)
    k_mean, k_second = machine.moments(kernel)
    flat_kernel = k_second.mean(tuple(range(kernel.rank, 2 * kernel.rank)))
    inputs = kernel.shape[k_spec[1]]
    # to (batch, channel, positions)
    turn = [*x_spec]
    lattice = second.transpose(*turn, *(rank + a for a in turn))
    means = mean.transpose(turn)
    windows = [
        _Window.of(value.shape[x_spec[2 + k]], shape[o_spec[2 + k]], kernel.shape[k_spec[2 + k]],
                   op.params["window_strides"][k], op.params["padding"][k][0], op.params["lhs_dilation"][k],
                   op.params["rhs_dilation"][k])
        for k in range(rank - 2)
    ]  # fmt: skip

    def moment(channels: int, taps: int, outputs: int) -> float:
        """E w w' of kernel entries that differ in these."""
        mask = [0] * kernel.rank
        mask[k_spec[0]], mask[k_spec[1]] = outputs, channels
        for a in k_spec[2:]:
            mask[a] = taps if kernel.shape[a] > 1 else 0
        return float(flat_kernel[tuple(mask)])

    def through(x: Lattice, step: Callable[[_Window, Lattice, int, int], Lattice]) -> Lattice:
        for k, window in enumerate(windows):
            x = step(window, x, 2 + k, rank)
        return x

    n = inputs
    near, far = np.take(lattice, 0, 1).mean(rank - 1 + 1), np.take(lattice, 1, 1).mean(rank - 1 + 1)

    def with_channel(x: Lattice, fields: int = 1) -> Lattice:
        return np.expand_dims(np.expand_dims(x, rank - 1 + fields), 1)

    made = []
    for outputs in (0, 1):
        same_tap = n * moment(0, 0, outputs) * near + n * (n - 1) * moment(1, 0, outputs) * far
        found = through(with_channel(same_tap), _Window.aligned)
        if any(w.taps > 1 for w in windows):
            other = n * moment(0, 1, outputs) * near + n * (n - 1) * moment(1, 1, outputs) * far
            scale = abs(moment(0, 0, 0)) * n
            if max(abs(moment(0, 1, outputs)) * n, abs(moment(1, 1, outputs)) * n * n) > 1e-12 * scale:
                everywhere = with_channel(other)[:, :, *(np.s_[1:2] if w.size > 1 else np.s_[0:1] for w in windows)]
                everywhere = everywhere.mean(tuple(rank + 2 + k for k in range(rank - 2)), keepdims=True)
                ones_ = np.ones((1, 1) + (2,) * (rank - 2) + (1,) * rank)
                pairs = through(ones_, _Window.any_taps) - through(ones_, _Window.aligned)
                found = found + everywhere * pairs
        made.append(found)
    shapes = np.broadcast_shapes(*(m.shape for m in made))
    new = np.concatenate([np.broadcast_to(m, shapes) for m in made], 1)
    k_flat = float(k_mean.mean())
    new_mean = means.mean(1, keepdims=True) * n * k_flat
    for k, window in enumerate(windows):
        new_mean = window.counted(new_mean, 2 + k)
    turn_back = [o_spec.index(a) for a in range(rank)]
    new = new.transpose(*turn_back, *(rank + a for a in turn_back))
    new_mean = new_mean.transpose(turn_back)
    weight = machine.weights(op)
    kin = frozenset() if any(weight) and not new_mean.any() else _kin(value.terms) | _kin(kernel.terms)
    quantile = None if n * math.prod(w.taps for w in windows) >= 4 else _distribution(value.terms)
    source = Source(shape, new_mean, settled(new, shape), quantile, kin)
    features = kernel.shape[k_spec[0]] // op.params["feature_group_count"]
    sigma = moment(0, 0, 0)

    def back(cotangent: Lattice) -> Lattice:
        x = cotangent.transpose(*o_spec, *(rank + a for a in o_spec))
        one, two = np.take(x, 0, 1).mean(rank), np.take(x, 1, 1).mean(rank)
        found = with_channel(features * sigma * one + features * (features - 1) * moment(0, 0, 1) * two)
        for k, window in enumerate(windows):
            found = window.transposed(found, 2 + k, rank)
        apart = with_channel(features * moment(1, 0, 0) * one + features * (features - 1) * moment(1, 0, 1) * two)
        for k, window in enumerate(windows):
            apart = window.transposed(apart, 2 + k, rank)
        shapes = np.broadcast_shapes(found.shape, apart.shape)
        both = np.concatenate([np.broadcast_to(found, shapes), np.broadcast_to(apart, shapes)], 1)
        turned = [x_spec.index(a) for a in range(rank)]
        return settled(both.transpose(*turned, *(rank + a for a in turned)), value.shape)

    def to_kernel(cotangent: Lattice) -> Lattice:
        del cotangent
        return np.full((2,) * kernel.rank + (1,) * kernel.rank, math.nan)

    return machine.made(source, [(value, back), (kernel, to_kernel)])


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
    """A window that slides along one axis: `hits[h, k]` is the entry that tap k of window h meets, -1 where none."""

    size: int
    out: int
    taps: int
    hits: np.ndarray

    @staticmethod
    @functools.lru_cache(1024)
    def of(size: int, out: int, taps: int, stride: int, low: int, inner: int, outer: int) -> _Window:
        at = np.arange(out)[:, None] * stride + np.arange(taps) * outer - low
        hits = np.where((at >= 0) & (at % inner == 0) & (at // inner < size), at // inner, -1)
        return _Window(size, out, taps, hits)

    @functools.cached_property
    def valid(self) -> np.ndarray:
        return (self.hits >= 0).astype(np.float64)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How many taps meet something, for each window."""
        return self.valid.sum(1)

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """In which share of the other windows a tap meets something too, for each window and tap that does."""
        return self.valid * (self.valid.sum(0) - 1) / max(self.out - 1, 1)

    @functools.cached_property
    def pairs(self) -> float:
        """How many pairs of taps of two windows meet something."""
        n = self.out
        total = self.counts.sum()
        return float((total**2 - (self.counts**2).sum()) / (n * (n - 1))) if n > 1 else float((self.counts**2).mean())

    @functools.cached_property
    def common(self) -> float:
        """How many entries two windows have in common, on average."""
        n = self.out
        uses = self.uses
        return float((uses**2 - uses).sum() / (n * (n - 1))) if n > 1 else float(self.counts.mean())

    @functools.cached_property
    def uses(self) -> np.ndarray:
        """How many windows meet each entry."""
        return np.bincount(self.hits[self.hits >= 0].ravel(), minlength=self.size).astype(np.float64)

    @functools.cached_property
    def back_shares(self) -> np.ndarray:
        """For each window and tap that meets an entry, by which share of other entries the tap is met."""
        return self.valid * (self.valid.sum(0) - 1) / max(self.size - 1, 1)

    def _weighed(self, weights: np.ndarray, x: np.ndarray, axis: int, back: bool = False) -> np.ndarray:
        """Sums over each window (or over those that meet an entry) of a profile, weighted."""
        rows, columns = (self.size, self.out) if back else (self.out, self.size)
        h, k = np.nonzero(self.hits >= 0)
        pairs = (self.hits[h, k], h) if back else (h, self.hits[h, k])
        matrix = np.zeros((rows, columns))
        np.add.at(matrix, pairs, weights[h, k])
        if x.shape[axis] == 1:
            sums = matrix.sum(1)
            if np.ptp(sums) <= 1e-12 * np.abs(sums).max(initial=0):
                return x * sums[0]
            return x * sums.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)

    def counted(self, x: np.ndarray, axis: int) -> np.ndarray:
        """Sums of a profile along an axis over each window."""
        if x.shape[axis] == 1:
            count = self.counts
            if np.ptp(count) == 0:
                return x * count[0]
            return x * count.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        matrix = np.zeros((self.out, self.size))
        h, k = np.nonzero(self.hits >= 0)
        np.add.at(matrix, (h, self.hits[h, k]), 1.0)
        return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)

    def _split(self, lattice: Lattice, axis: int) -> tuple[Lattice, Lattice]:
        return np.take(lattice, [0], axis), np.take(lattice, [-1], axis)

    def _joined(self, one: Lattice, other: Lattice, axis: int, rank: int) -> Lattice:
        shapes = np.broadcast_shapes(one.shape, other.shape)
        return np.concatenate([np.broadcast_to(one, shapes), np.broadcast_to(other, shapes)], axis)

    def aligned(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """The same tap in both windows, as independent weights have it."""
        one, other = self._split(lattice, axis)
        at = rank + axis
        return self._joined(self.counted(one, at), self._weighed(self.shares, other, at), axis, rank)

    def any_taps(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """Numbers of pairs of taps."""
        one, other = self._split(lattice, axis)
        count = self.counts**2
        if np.ptp(count) == 0:
            scaled = one * count[0]
        else:
            scaled = one * count.reshape([-1 if a == rank + axis else 1 for a in range(one.ndim)])
        return self._joined(scaled, other * self.pairs, axis, rank)

    def summed(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """Of sums over windows."""
        one, other = self._split(lattice, axis)
        at = rank + axis
        near = self.counted(one, at) + self._weighed(self.valid * (self.counts - 1)[:, None], other, at)
        other = other.mean(at, keepdims=True)
        average = one.mean(rank + axis, keepdims=True)
        far = self.common * average + (self.pairs - self.common) * other
        return self._joined(near, far, axis, rank)

    def spread_back(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """The cotangent of what windows summed."""
        one, other = self._split(lattice, axis)
        near = self._weighed(self.valid, one, rank + axis, back=True)
        pairs = self.uses**2 - self.uses
        crossed = other.mean(rank + axis, keepdims=True) * (
            pairs[0] if np.ptp(pairs) == 0 else pairs.reshape([-1 if a == rank + axis else 1 for a in range(one.ndim)])
        )
        other = other.mean(rank + axis, keepdims=True)
        n = self.size
        per_window = (self.counts**2 - self.counts).sum() / (n * (n - 1)) if n > 1 else 0.0
        total_pairs = (self.uses.sum() ** 2 - (self.uses**2).sum()) / (n * (n - 1)) if n > 1 else 0.0
        far = per_window * one.mean(rank + axis, keepdims=True) + max(total_pairs - per_window, 0.0) * other
        return self._joined(near + crossed, far, axis, rank)

    def transposed(self, lattice: Lattice, axis: int, rank: int) -> Lattice:
        """The cotangent of what independent weights made."""
        one, other = self._split(lattice, axis)
        at = rank + axis
        near, far = (self._weighed(w, x, at, back=True) for w, x in ((self.valid, one), (self.back_shares, other)))
        return self._joined(near, far, axis, rank)


def _windows(machine: Interpreter, op: Op, value: Value) -> list[_Window]:
    shape, q = machine.program.shape(op.outputs[0]), op.params
    return [
        _Window.of(value.shape[a], shape[a], q["window_dimensions"][a], q["window_strides"][a], q["padding"][a][0],
                   q["base_dilation"][a], q["window_dilation"][a])
        for a in range(len(shape))
    ]  # fmt: skip


@_rule(p.reduce_window_sum_p)
def _window_sum(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    value = args[0]
    shape = machine.program.shape(op.outputs[0])
    rank = len(shape)
    windows = _windows(machine, op, value)
    mean, second = machine.moments(value)
    used = [a for a, w in enumerate(windows) if w.taps > 1 or w.out != w.size]
    for a in used:
        mean, second = windows[a].counted(mean, a), windows[a].summed(second, a, rank)
    n = math.prod(w.taps for w in windows)
    quantile = None if n >= 8 else _distribution(value.terms)
    source = Source(shape, mean, settled(second, shape), quantile, _kin(value.terms))

    def back(l: Lattice) -> Lattice:
        for a in used:
            l = windows[a].spread_back(l, a, rank)
        return settled(l, value.shape)

    return machine.made(source, [(value, back)], keeps=n == 1)


@_rule(p.reduce_window_max_p, p.reduce_window_min_p)
def _window_max(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    value = args[0]
    shape = machine.program.shape(op.outputs[0])
    rank = len(shape)
    windows = _windows(machine, op, value)
    mean, second = machine.moments(value)
    used = [a for a, w in enumerate(windows) if w.taps > 1 or w.out != w.size]
    flat = tuple(range(rank, 2 * rank))
    one = second.mean(flat, keepdims=True)
    other = one
    for a in used:
        other = np.repeat(np.take(other, [1 if value.shape[a] > 1 else 0], a), 2, a)
    n = float(math.prod(w.counts.mean() for w in windows))
    shared = np.ones((2,) * rank + (1,) * rank)
    for a in range(rank):
        w = windows[a]
        part = np.array([1.0, w.common / max(w.counts.mean(), 1e-12) if a in used else 0.0])
        shared = shared * part.reshape([2 if k == a else 1 for k in range(2 * rank)])
    sign = 1.0 if op.primitive is p.reduce_window_max_p else -1.0
    source = _largest(machine, value, shape, np.full((1,) * rank, mean.mean()), one, other, n, sign, shared)

    def back(l: Lattice) -> Lattice:
        for a in used:
            near, far = np.take(l, [0], a), np.take(l, [1], a)
            near, far = near.mean(rank + a, keepdims=True), far.mean(rank + a, keepdims=True)
            uses = float(windows[a].uses.mean())
            l = np.concatenate([near, far * uses / max(windows[a].counts.mean(), 1e-12)], a)
        return settled(l * math.prod(windows[a].out / windows[a].size for a in used), value.shape)

    return machine.made(source, [(value, back)], {POOLED} if n > 1 else ())


# --- rules: reading rows, loops, conditionals -----------------------------------------------------------------------


@_rule(p.gather_p)
def _gather(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    table, indices = args
    shape = machine.program.shape(op.outputs[0])
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    offset = numbers.offset_dims
    batching = getattr(numbers, "operand_batching_dims", ())
    gone = (*numbers.collapsed_slice_dims, *batching)
    windows = [a for a in range(table.rank) if a not in gone]
    places = [a for a in range(len(shape)) if a not in offset]
    picked = [a for a in numbers.start_index_map if table.shape[a] > 1]
    n = math.prod(table.shape[a] for a in picked)
    if indices.array is not None and math.prod(indices.shape) > 1:
        flat = np.broadcast_to(indices.array, indices.shape).reshape(-1, indices.shape[-1])
        flat = flat if len(flat) < 100_000 else flat[:100_000]
        _, count = np.unique(flat, axis=0, return_counts=True)
        total_ = len(flat)
        again = float((count * (count - 1)).sum() / (total_ * (total_ - 1))) if total_ > 1 else 1.0
    else:
        again = 1.0 / max(min(n, machine.rows) if indices.rows else n, 1)
    mean, second = machine.moments(table)
    for a in range(table.rank):
        if second.shape[table.rank + a] > 1 and (a in gone or sizes[a] != table.shape[a]):
            second = second.mean(table.rank + a, keepdims=True)
            mean = mean.mean(a, keepdims=True)
    rank = len(shape)
    made = np.empty((2,) * rank, object)
    for mask in itertools.product((0, 1), repeat=rank):
        inner = [0] * table.rank
        for k, a in enumerate(offset):
            inner[windows[k]] = mask[a]
        moved = any(mask[a] for a in places)
        same_row = second[tuple(inner)]
        if moved and picked:
            for a in picked:
                inner[a] = 1
            made[mask] = again * same_row + (1 - again) * second[tuple(inner)]
        else:
            if moved:
                for a in batching:
                    inner[a] = 1
            made[mask] = second[tuple(inner)]
    order = [made[m] for m in itertools.product((0, 1), repeat=rank)]
    stacked = np.stack(order).reshape((2,) * rank + order[0].shape)
    profile = [1] * rank
    for k, a in enumerate(offset):
        profile[a] = order[0].shape[windows[k]]
    second = settled(stacked.reshape((2,) * rank + tuple(profile)), shape)
    source = Source(shape, mean.reshape([mean.shape[windows[offset.index(a)]] if a in offset else 1
                                         for a in range(rank)]), second, _distribution(table.terms),
                    _kin(table.terms))  # fmt: skip

    def back(l: Lattice) -> Lattice:
        """Entries that are not read get nothing; of those that are, how often."""
        l = l.mean(tuple(range(rank, 2 * rank)), keepdims=True)
        count = math.prod(shape[a] for a in places)
        share = 1.0 / max(math.prod(table.shape[a] for a in gone), 1)
        for a in windows:
            share *= sizes[a] / table.shape[a]
        found = np.empty((2,) * table.rank + (1,) * table.rank)
        for mask in itertools.product((0, 1), repeat=table.rank):
            inner = [0] * rank
            for k, a in enumerate(offset):
                inner[a] = mask[windows[k]]
            found[mask] = float(l[tuple(inner)].ravel()[0]) * count * share
            if any(mask[a] for a in gone):
                far = list(inner)
                for a in places:
                    far[a] = 1
                found[mask] = float(l[tuple(far)].ravel()[0]) * count * max(count - 1, 0) * share**2
        return settled(found, table.shape)

    return machine.made(source, [(table, back)])


@_rule(jaxprs.CARRY_OUT)
def _carry_out(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    return args[0]


@_rule(jaxprs.SLICE_IN)
def _slice_in(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    value = args[0]
    shape = value.shape[1:]
    rank = value.rank
    at = machine.at[-1] if machine.at else 0
    n = value.shape[0]

    def lattice(l: Lattice) -> Lattice:
        one = np.take(l, 0, 0)
        return np.take(one, min(at, one.shape[rank - 1] - 1), rank - 1)

    def back(l: Lattice) -> Lattice:
        l = np.expand_dims(np.expand_dims(l, rank - 1), 0)
        return settled(np.concatenate([l / n, np.zeros_like(l)], 0), value.shape)

    move = _Move(("pass", at, next(_numbers) if value.slopes else 0), shape, lattice,
                 lambda x: np.take(x, min(at, x.shape[0] - 1), 0), back)  # fmt: skip
    return _moved(machine, value, move)


@_rule(jaxprs.STACK_OUT)
def _stack_out(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    """Results of the passes of a scan, as one array: the passes as a profile."""
    shape = machine.program.shape(op.outputs[0])
    parts = machine.stacks.get(op.inputs[0], [args[0]] * shape[0])
    bad = next((a for a in parts if a.unknown), None)
    if bad is not None:
        return unknown(shape, bad.unknown)
    rank = len(shape)
    rows = [_reshaped(machine, a, (1, *a.shape)) for a in parts]
    found = [machine.moments(a) for a in rows]
    n = len(rows)
    profile = n * max(_profile_size(m, l, rank) for m, l in found) <= _PROFILE
    shapes = np.broadcast_shapes(*(l.shape for _, l in found))
    means = np.broadcast_shapes(*(m.shape for m, _ in found))
    one = np.concatenate([np.broadcast_to(l, shapes)[0:1] for _, l in found], rank)
    mean = np.concatenate([np.broadcast_to(m, means) for m, _ in found], 0)
    across = np.take(spread(mean), [1], 0)
    if n > 1:  # other passes: the product of means, less what equal ones add to it
        across = across.mean(rank, keepdims=True)
    if not profile:
        one, mean = one.mean(rank, keepdims=True), mean.mean(0, keepdims=True)
    size = np.broadcast_shapes(one.shape, across.shape)
    second = np.concatenate([np.broadcast_to(one, size), np.broadcast_to(across, size)], 0)
    source = Source(shape, mean, settled(second, shape), _distribution(parts[-1].terms),
                    frozenset().union(*(_kin(a.terms) for a in rows)))  # fmt: skip

    def back(k: int, l: Lattice) -> Lattice:
        one = np.take(l, [0], 0)
        at = np.take(one, [min(k, one.shape[rank] - 1)], rank)
        return np.repeat(at, 2, 0)

    return machine.made(source, [(a, functools.partial(back, k)) for k, a in enumerate(rows)])


@_rule(jaxprs.CHOOSE)
def _choose(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    *arms, index = args
    if (k := index.number) is not None:
        return arms[min(max(round(k), 0), len(arms) - 1)]
    found = [machine.moments(a) for a in arms]
    first = found[0]
    for m, l in found[1:]:
        if not (np.allclose(m, first[0]) and np.allclose(l, first[1], rtol=1e-3)):
            raise _NoRule("no rule for a conditional (`cond`) whose arms differ")
    return machine.made(
        Source(arms[0].shape, *first, _distribution(arms[0].terms)), [(a, lambda l: l / len(arms)) for a in arms]
    )


@_rule(p.bitcast_convert_type_p)
def _bitcast(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    if not args[0].bits or not jnp.issubdtype(op.params["new_dtype"], jnp.floating):
        raise _NoRule("no rule for `bitcast_convert_type`")
    terms = [*args[0].terms, (ones(args[0].rank), {})]
    return Value(args[0].shape, terms)


@_rule(p.convert_element_type_p)
def _convert(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    return elementwise(machine, op, args)


# --- softmax --------------------------------------------------------------------------------------------------------

INSIDE = "an exponential inside of a softmax"
TOKENS = "approximate: attention weights are taken as independent of the values that they weigh"


@dataclasses.dataclass(frozen=True)
class Softmax:
    """exp(s) / sum exp(s), with or without the largest taken off first."""

    source: int
    axes: tuple[int, ...]
    inside: tuple[Op, ...]
    end: Op


_PASSED = frozenset({
    p.broadcast_in_dim_p, p.reshape_p, p.convert_element_type_p, p.squeeze_p, p.copy_p, p.stop_gradient_p,
    jaxprs.IDENTITY,
})  # fmt: skip


def softmaxes(program: Program) -> list[Softmax]:
    """Every softmax of a program."""
    maker = {v: op for op in program.ops for v in op.outputs}

    def back(value: int, passed: frozenset[Any] = _PASSED) -> tuple[int, Op | None]:
        while (op := maker.get(value)) is not None and op.primitive in passed:
            value = op.inputs[0]
        return value, op

    found = []
    for op in program.ops:
        if op.primitive is not p.div_p:
            continue
        _, divisor = back(op.inputs[1])
        above, exponential = back(op.inputs[0], frozenset({p.convert_element_type_p, p.copy_p}))
        if divisor is None or divisor.primitive is not p.reduce_sum_p or exponential is None:
            continue
        if back(divisor.inputs[0], frozenset({p.convert_element_type_p, p.copy_p}))[0] != above:
            continue
        if exponential.primitive is not p.exp_p:
            continue
        source, inside = exponential.inputs[0], [exponential, divisor]
        less = maker.get(source)
        if less is not None and less.primitive is p.sub_p:
            value, largest = back(less.inputs[1])
            while largest is not None and largest.primitive is p.max_p:
                value, largest = back(next((v for v in largest.inputs if v not in program.constants), value))
            if largest is not None and largest.primitive is p.reduce_max_p:
                source = less.inputs[0]
                inside.append(less)
        found.append(Softmax(source, tuple(divisor.params["axes"]), tuple(inside), op))
    return found


@functools.lru_cache(4096)
def softmax_square(variance: float, n: int) -> float:
    """E sum_k a_k^2 of a softmax over n independent scores of a variance.

    1 / (sum e^s)^2 = int t exp(-t sum e^s) dt makes it n int t E[e^(2s - t e^s)] E[e^(-t e^s)]^(n-1) dt.
    """
    if n <= 1:
        return 1.0
    if variance <= 0:
        return 1.0 / n
    z = np.linspace(-9, 9, 721)
    w = np.exp(-z * z / 2)
    w /= w.sum()
    s = math.sqrt(variance) * z
    top = math.sqrt(2 * variance * math.log(n + 1)) + variance / 2 + math.log(n)
    tau = np.linspace(-top - 25, 12 * math.sqrt(variance) + 8, 1200)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        decay = np.exp(-np.exp(np.clip(tau[:, None] + s, -700, 700)))
        zero = decay @ w
        two = (decay * np.exp(2 * (s + tau[:, None]))) @ w
        integrand = np.where(zero > 0, np.nan_to_num(two) * zero ** (n - 1), 0.0)
    found = n * float(integrand.sum() * (tau[1] - tau[0]))
    return float(np.clip(found, 1.0 / n, 1.0))


def softmax(machine: Interpreter, value: Value, axes: tuple[int, ...]) -> Value:
    """Attention weights: their second moments from the variance of scores along the axes."""
    if value.unknown:
        return unknown(value.shape, value.unknown)
    rank, shape = value.rank, value.shape
    second = second_of(value.terms, rank, shape)
    flat = second.mean(tuple(range(rank, 2 * rank)))
    n = math.prod(shape[a] for a in axes)
    keys = tuple(1 if a in axes and shape[a] > 1 else 0 for a in range(rank))

    def with_keys(mask: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(m, k) for m, k in zip(mask, keys, strict=True))

    v = max(float(flat[(0,) * rank] - flat[keys]), 0.0)
    counts = np.full((1,) * rank, n)
    if value.visible is not None:
        seen = value.visible.reshape(_padded(value.visible.shape, rank))
        for a in axes:
            if seen.shape[a] == 1:
                seen = np.repeat(seen, shape[a], a)
        counts = np.maximum(seen.sum(axes, keepdims=True), 1)
    if counts.size > _PROFILE:
        counts = counts.reshape(-1)[:: counts.size // _PROFILE + 1].reshape(-1, *(1,) * (rank - 1))
    each = {int(c): softmax_square(round(v, 9), int(c)) for c in np.unique(counts)}
    if len(each) > 64:
        chosen = sorted(each)[:: len(each) // 32]
        each = {int(c): float(np.interp(c, chosen, [each[k] for k in chosen])) for c in each}
    squares = np.vectorize(each.__getitem__, otypes=[float])(counts)
    s2 = float(squares.mean())
    inverse = float((1.0 / counts).mean())
    ordered = np.sort(counts.ravel())
    rank_of = np.arange(1, ordered.size + 1)
    largest = float(((2 * rank_of - 1) / ordered.size**2 / ordered).sum())  # E 1 / max of two rows' counts
    made = np.zeros((2,) * rank + (1,) * rank)
    for mask in itertools.product((0, 1), repeat=rank):
        if any(m and k for m, k in zip(mask, keys, strict=True)):
            continue
        if not any(m and shape[a] > 1 for a, m in enumerate(mask)):
            one = s2 / n
        else:
            kappa = float(np.clip(flat[mask] - flat[with_keys(mask)], 0.0, v))
            moved = any(mask[a] and counts.shape[a] > 1 for a in range(rank)) if counts.ndim == rank else True
            low = largest if moved else inverse
            share = math.expm1(min(kappa, 500)) / math.expm1(min(v, 500)) if v > 0 else 0.0
            one = (low + max(s2 - low, 0.0) * share) / n
        made[mask] = one
        made[with_keys(mask)] = (1.0 / n - one) / (n - 1) if n > 1 else one
    for mask in itertools.product((0, 1), repeat=rank):  # several key axes: any of them
        part = tuple(0 if k else m for m, k in zip(mask, keys, strict=True))
        if any(m and k for m, k in zip(mask, keys, strict=True)):
            made[mask] = made[with_keys(part)]
    source = Source(shape, np.full((1,) * rank, 1.0 / n), settled(made, shape), None, _kin(value.terms))

    def back(l: Lattice) -> Lattice:
        l = l.mean(tuple(range(rank, 2 * rank)), keepdims=True)
        found = np.zeros_like(made)
        for mask in itertools.product((0, 1), repeat=rank):
            if any(m and k for m, k in zip(mask, keys, strict=True)):
                continue
            other = with_keys(mask)
            part = (made[mask] - 0.0) * (l[mask] - l[other]) * (1 - s2)
            found[mask] = part
            found[other] = -part / max(n - 1, 1)
        for mask in itertools.product((0, 1), repeat=rank):
            if any(m and k for m, k in zip(mask, keys, strict=True)):
                part = tuple(0 if k else m for m, k in zip(mask, keys, strict=True))
                found[mask] = found[with_keys(part)]
        return settled(found, shape)

    return machine.made(source, [(value, back)], {TOKENS})


# --- normalization --------------------------------------------------------------------------------------------------

_REDUCING = frozenset({
    p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_window_sum_p, p.dot_general_p, p.psum_p,
})  # fmt: skip


class Normalization:
    """Evaluates the region of a normalization: what it divides by is a number, and what it takes off a projection.

    Statistics that are sums of squares are taken at their expectation, which the law of large numbers permits; a mean
    over some axes is a random value, and x - mean(x) has the lattice of x less that of the mean.

    Args:
      source: value that is normalized.
      axes: of the statistics.
      size: shape of the source.
      first: the earliest operation of the region.
    """

    def __init__(self, source: int, axes: tuple[int, ...], size: tuple[int, ...], first: Op) -> None:
        self.source, self.axes, self.size, self.first = source, axes, size, first
        self.alias: Value | None = None
        self.statistics: set[int] = set()
        self.region: set[int] = set()
        self.over: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # shape in which means are taken, and axes

    def __call__(self, machine: Interpreter, op: Op) -> list[Value]:
        if op is self.first or self.alias is None:
            self.alias = self._start(machine)
        if self.alias.unknown:
            return [unknown(machine.program.shape(v), self.alias.unknown) for v in op.outputs]
        own = machine.env[self.source]
        machine.env[self.source] = self.alias
        try:
            inputs = [machine.read(v) for v in op.inputs]
            results = machine.apply(op)
        finally:
            machine.env[self.source] = own
        results = [self._settled(machine, op, inputs, v, r) for v, r in zip(op.outputs, results, strict=True)]
        self.region.update(op.outputs)
        return results

    def _start(self, machine: Interpreter) -> Value:
        value = machine.read(self.source)
        if value.unknown or value.is_constant:
            return dataclasses.replace(value)
        source = machine.collapse(value)
        assert source is not None
        alias = of_source(source)
        alias.notes = value.notes
        node = machine.node(value)
        if node is not None:
            n = math.prod(self.size[a] for a in self.axes)

            def back(l: Lattice) -> Lattice:
                """Less its part along the normalized value itself."""
                inside = l[tuple(0 if a in self.axes else slice(None) for a in range(len(self.size)))]
                l = l.copy()
                l[tuple(0 if a in self.axes else slice(None) for a in range(len(self.size)))] = inside * (1 - 1 / n)
                return l * _inverse_variance(n - (self.over is not None))

            made = Node(next(machine.nodes), self.size, [Way(node, back if n > 1 else lambda l: l)], list(alias.terms))
            alias.slopes = {made: [(ones(len(self.size)), {})]}
        return alias

    def _settled(self, machine: Interpreter, op: Op, inputs: list[Value], output: int, result: Value) -> Value:
        if result.unknown or not any(v == self.source or v in self.region for v in op.inputs):
            return result
        linear = all(len(f) <= 1 and all(h is X for h in f.values()) for _, f in result.terms)
        inside = [v for v in op.inputs if v == self.source or v in self.region]
        reduced = op.primitive in _REDUCING
        if reduced or all(v in self.statistics for v in inside):
            self.statistics.add(output)
            if reduced:
                straight = op.primitive is p.reduce_sum_p and _is_linear(inputs[0].terms)
                if straight:
                    self.over = inputs[0].shape, tuple(op.params["axes"])
                linear = straight or (linear and inside[0] in self.statistics)
            if linear and not result.is_constant:
                return dataclasses.replace(result, slopes={})
            return known(result.shape, mean_of(result.terms, result.rank), profile=True)
        means = [k for k, v in enumerate(op.inputs) if v in self.statistics and not inputs[k].is_constant]
        if op.primitive in (p.sub_p, p.add_p) and len(means) == 1 and self.over is not None:
            return self._centred(machine, inputs[1 - means[0]], inputs[means[0]], result)
        return result

    def _centred(self, machine: Interpreter, value: Value, mean: Value, result: Value) -> Value:
        m, second = machine.moments(value)
        n = mean_of(mean.terms, mean.rank)
        shape = value.shape
        assert self.over is not None
        grouped, axes = self.over
        if math.prod(grouped) != math.prod(shape):
            return result

        def project(l: Lattice) -> Lattice:
            return settled(reshaped(projected(reshaped(l, shape, grouped), axes, grouped), grouped, shape), shape)

        source = Source(shape, m - n if m.any() else m * 0.0, project(second), _distribution(value.terms),
                        _kin(value.terms))  # fmt: skip
        return machine.made(source, [(value, project)])


def _inverse_variance(freedom: int) -> float:
    """E 1/s^2 over 1 / E s^2 of a variance s^2 with so many degrees of freedom; of five where it has fewer."""
    freedom = max(freedom, 5)
    return freedom / (freedom - 2)


def _is_linear(terms: Sequence[Term]) -> bool:
    return bool(terms) and all(len(f) == 1 and all(h is X for h in f.values()) for _, f in terms)


@_rule(p.shift_right_logical_p, p.shift_left_p, p.shift_right_arithmetic_p)
def _shift(machine: Interpreter, op: Op, args: list[Value]) -> Value:
    if not args[0].bits:
        raise _NoRule(f"no rule for `{op.name}`")
    return _of_bits(op, args)
