"""Sources, values as polynomials in them, and the nodes that cotangents are followed through.

A source is a random array known by its mean, its lattice and the distribution of an entry. A value is a sum of terms,
each a coefficient times functions of different sources; its slopes say how it depends on earlier nodes, entry by entry.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fixup_init.moments.lattice import PROFILE, Lattice, Profile, settled
from fixup_init.quadrature import Formula, Quantile, X

numbers = itertools.count()

Use = tuple[int, int]  # the number of a source, and the operation that uses it
Reach = tuple[float, float]  # the smallest and the largest that an entry can be
ANYWHERE: Reach = (-math.inf, math.inf)


@dataclasses.dataclass(eq=False)
class Source:
    """A random array: its mean, its lattice, and the shape of its distribution (None: Gaussian)."""

    shape: tuple[int, ...]
    mean: Profile
    second: Lattice
    quantile: Quantile | None = None
    kin: frozenset[int] = frozenset()  # sources that it is made of, but for random weights in between
    sum_of: tuple[Source, tuple[int, ...], tuple[int, ...]] | None = None  # source, axes summed, where others went
    alike: tuple[Source, Lattice] | None = None  # of a normalized value: what it was, and E of products with it
    linear_in: frozenset[int] = frozenset()  # sources that it is a sum, a scaled or a moved copy of
    uses: frozenset[Use] = frozenset()  # of random weights, which made it
    picks: tuple[Source, Source, int] | None = None  # where it says which is largest: of what, that one, the axis
    truth: bool = False  # whether it is 0 or 1, so that its square is itself
    assumed: bool = False  # whether only moments and a sign of it are known, and the distribution is taken to fit
    counts: tuple[Source, Source] | None = None  # of a cumulative sum: of what, and the sum without the last one
    number: int = dataclasses.field(default_factory=lambda: next(numbers))
    images: dict[Any, Source] = dataclasses.field(default_factory=dict)
    expectations: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def likes(self) -> frozenset[int]:
        """What it is a copy or a sum of, and itself."""
        return self.linear_in | {self.number}

    @property
    def relatives(self) -> frozenset[int]:
        """What it is made of, and itself."""
        return self.kin | {self.number}


class Forward(str):
    """A note that says nothing of gradients."""


class Trait(str):
    """A property that goes with the notes of a value and is not shown, until an operation says what it does to it."""


Factors = dict[Source, Formula]  # a function of each source
Term = tuple[Profile, Factors]  # a coefficient times the product of them


@dataclasses.dataclass(frozen=True)
class Layer:
    """Random weights: how many units they make, along which axes, how many units each reads, by how many weights."""

    units: int
    axes: tuple[int, ...]
    reads: int
    fan: int
    weights: frozenset[int] = frozenset()  # by the numbers of sources


@dataclasses.dataclass(eq=False)
class Node:
    """A value whose cotangent is followed: `inputs` says how it reaches those that it was made of."""

    number: int
    shape: tuple[int, ...]
    inputs: list[Way]
    terms: list[Term] = dataclasses.field(default_factory=list)  # the value, when the node was made
    source: Source | None = None  # that the value became since
    layer: Layer | None = None  # random weights that made it
    copy_of: tuple[Node, Profile] | None = None  # of a normalized value: the node of what it was, and a scale since
    meter: bool = False  # whether it only shows the cotangent that comes to it: what made it gets its own beside

    @property
    def ways(self) -> list[Way]:
        """Those on which cotangents go on."""
        return [way for way in self.inputs if not way.node.meter]

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
    notes: frozenset[str] = frozenset()  # what to know about a cotangent that comes by it
    ends: bool = False  # whether a normalization takes the size of the value away
    aligned: bool = False  # whether an entry's cotangent goes mostly to the same entry
    apart: bool = False  # whether what it has in common with other ways is taken into account
    onward: Callable[[Lattice], Lattice] | None = None  # in place of `pull`, for what random weights behind it meet


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
    reach: Reach = ANYWHERE
    tail: str = ""  # why its moments are not known, though it is a known function of its sources
    imaginary: Value | None = None  # part of a complex value, whose real part this is

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
    """A value of which nothing is known, and the reason."""
    return Value(tuple(shape), unknown=why)


def ones(rank: int) -> Profile:
    """1 at every position."""
    return np.ones((1,) * rank)


def unit(rank: int) -> list[Term]:
    """The polynomial that is 1."""
    return [(ones(rank), {})]


def function_of(source: Source, formula: Formula = X) -> list[Term]:
    """The polynomial that is a source, or a function of it."""
    return [(ones(len(source.shape)), {source: formula})]


def sources_of(terms: Iterable[Term]) -> list[Source]:
    """The sources of a polynomial, in order."""
    return sorted({s for _, factors in terms for s in factors}, key=lambda s: s.number)


def sole_source(terms: Sequence[Term]) -> Source | None:
    """The source that a polynomial is, if it is nothing but one."""
    if len(terms) != 1:
        return None
    ((c, factors),) = terms
    if c.size != 1 or c.ravel()[0] != 1.0 or len(factors) != 1:
        return None
    ((source, formula),) = factors.items()
    return source if formula is X else None


def is_unit(terms: Sequence[Term]) -> bool:
    """Whether a polynomial is 1."""
    return len(terms) == 1 and not terms[0][1] and terms[0][0].size == 1 and terms[0][0].ravel()[0] == 1.0


def known(shape: Sequence[int], array: Any, profile: bool = False) -> Value:
    """A constant; `array` broadcasts to the shape, and is of the same rank."""
    shape = tuple(shape)
    x = np.asarray(array)
    if x.ndim != len(shape):
        x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    if x.dtype == object:
        return unknown(shape, "unknown: a constant that holds no numbers")
    for a in range(x.ndim):
        if x.shape[a] > 1 and (x == np.take(x, [0], a)).all():
            x = np.take(x, [0], a)
    if np.iscomplexobj(x):
        value = known(shape, np.real(x), profile)
        return dataclasses.replace(value, array=x, imaginary=known(shape, np.imag(x), profile))
    value = Value(shape, array=x)
    wide = x.astype(np.float64)
    if x.size == 1:
        value.terms = [(wide, {})] if wide.ravel()[0] != 0 else []
    elif profile and x.size <= PROFILE:
        value.terms = [(wide, {})]
    else:
        value.terms = function_of(fixed(shape, wide))
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
    """The value that is a source."""
    return Value(source.shape, function_of(source))


def padded(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """A shape with axes of size 1 in front, up to a rank."""
    return (1,) * (rank - len(shape)) + tuple(shape)
