"""Rules that only move entries: transpose, reshape, broadcast, slice, split and reverse.

Every source of a polynomial is moved for itself and the image is kept, so that values which depend on each other still
do after the same move.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fixup_init import jaxprs
from fixup_init.jaxprs import p
from fixup_init.moments.environment import MOST, Environment, Rule
from fixup_init.moments.lattice import (
    Lattice,
    Profile,
    diluted,
    joined,
    of_pairs,
    parted,
    repeated,
    settled,
    summed,
    total,
)
from fixup_init.moments.neighbours import of_merged
from fixup_init.moments.reshaping import profile_reshaped, reshaped
from fixup_init.moments.values import Node, Source, Value, Way, padded, unit
from fixup_init.program import Op

_PLACED = 256  # entries of an axis along which a cotangent is held position by position, where a block was cut out


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """A rearrangement of entries: what becomes of a lattice, of a profile, and of a cotangent on the way back."""

    key: Any
    shape: tuple[int, ...]
    lattice: Callable[[Lattice], Lattice]
    profile: Callable[[Profile], Profile]
    back: Callable[[Lattice], Lattice]
    where: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None  # for `sum_of`: where axes of the summed went
    beside: Callable[[Lattice, Profile], Lattice] = lambda lattice, mean: lattice  # what the mean says of pairs


def moved(env: Environment, value: Value, move: Move) -> Value:
    """Every source of a polynomial is moved, so that what depends on each other still does."""

    def image(source: Source) -> Source:
        if move.key not in source.images:
            second = settled(move.beside(move.lattice(source.second), source.mean), move.shape)
            new = Source(move.shape, move.profile(source.mean), second, source.quantile, source.relatives)
            new.picks, new.assumed, new.uses = source.picks, source.assumed, source.uses
            if math.prod(move.shape) >= math.prod(source.shape):  # else another part of it may be independent
                new.linear_in = source.likes
            if source.sum_of is not None and move.where is not None:
                whole, axes, where = source.sum_of
                new.sum_of = whole, axes, move.where(where)
            source.images[move.key] = new
        return source.images[move.key]

    terms = [(move.profile(c), {image(s): f for s, f in factors.items()}) for c, factors in value.terms]
    node = env.node(value)
    slopes = {}
    if node is not None:
        made = Node(next(env.nodes), move.shape, [Way(node, move.back, keeps=True)], terms)
        slopes = {made: unit(len(move.shape))}
    return Value(move.shape, terms, slopes, notes=value.notes, rows=value.rows, bits=value.bits)


def transpose(env: Environment, op: Op, args: list[Value]) -> Value:
    order = op.params["permutation"]
    rank = len(order)
    inverse = tuple(int(k) for k in np.argsort(order))

    def turned(by: Sequence[int]) -> Callable[[Lattice], Lattice]:
        return lambda l: l.transpose(*by, *(rank + k for k in by))

    move = Move(
        ("transpose", tuple(order)), tuple(args[0].shape[k] for k in order), turned(order),
        lambda x: x.transpose(order), turned(inverse), lambda where: tuple(where[k] for k in order),
    )  # fmt: skip
    result = moved(env, args[0], move)
    if args[0].visible is not None:
        seen = args[0].visible
        result.visible = np.broadcast_to(seen, padded(seen.shape, rank)).transpose(order)
    return result


def reshape(env: Environment, op: Op, args: list[Value]) -> Value:
    return reshaped_value(env, args[0], env.program.shape(op.outputs[0]))


def reshaped_value(env: Environment, value: Value, shape: tuple[int, ...]) -> Value:
    """A value in another shape."""
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

    move = Move(
        ("reshape", shape), shape, lambda l: reshaped(l, before, shape), lambda x: profile_reshaped(x, before, shape),
        lambda l: reshaped(l, shape, before), where,
    )  # fmt: skip
    result = moved(env, value, move)
    result.notes |= of_merged(value, shape)
    if value.visible is not None:
        seen = value.visible
        seen = seen.reshape(padded(seen.shape, len(before)))
        if seen.size * 4 <= MOST:
            result.visible = np.broadcast_to(seen, before).reshape(shape)
    return result


def broadcast(env: Environment, op: Op, args: list[Value]) -> Value:
    return broadcasted(env, args[0], env.program.shape(op.outputs[0]), tuple(op.params["broadcast_dimensions"]))


def broadcasted(env: Environment, value: Value, shape: tuple[int, ...], dims: tuple[int, ...]) -> Value:
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
            l = repeated(summed(l, a, shape[a], rank), a, rank - 1)
        return settled(total(l, new, [1 if a in longer else n for a, n in enumerate(shape)]), before)

    def where(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axes[dims.index(a)] if a in dims and a not in longer else -1 for a in range(rank))

    result = moved(env, value, Move(("broadcast", shape, dims), shape, forward, profile, back, where))
    if value.visible is not None:
        sizes = [1] * rank
        seen = value.visible.reshape(padded(value.visible.shape, len(before)))
        for k, a in enumerate(dims):
            sizes[a] = seen.shape[k]
        result.visible = seen.reshape(sizes)
    return result


def tile(env: Environment, op: Op, args: list[Value]) -> Value:
    """Copies beside each other: a new axis in front of each that is repeated, merged with it."""
    value, reps = args[0], op.params["reps"]
    env.collapse(value)  # functions of pairs are averaged over which of them are copies, not the reverse
    wide = [n for pair in zip(reps, value.shape, strict=True) for n in pair]
    copies = broadcasted(env, value, tuple(wide), tuple(range(1, 2 * value.rank, 2)))
    return reshaped_value(env, copies, env.program.shape(op.outputs[0]))


def block(value: Value, key: Any, shape: tuple[int, ...], starts: Sequence[int | None]) -> Move:
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
            start, n, held = starts[a], before[a], shape[a]
            if start is None or n > _PLACED:
                l = diluted(l, a, held, n)
                continue
            near, far = parted(l, a)  # the cotangent lies where the block was
            near = np.repeat(near, held, rank + a) if near.shape[rank + a] == 1 else near
            widths = [(start, n - held - start) if k == rank + a else (0, 0) for k in range(2 * rank)]
            far = far.mean(rank + a, keepdims=True) * (held * (held - 1) / (n * max(n - 1, 1)))
            l = joined(np.pad(near, widths), far, a)
        return l

    def beside(l: Lattice, mean: Profile) -> Lattice:
        """Different entries of the block have the product of their own means, not that of all."""
        for a in cut:
            start = starts[a]
            if mean.shape[a] > 1 and start is not None:
                near, far = parted(l, a)
                inside = np.take(mean, range(start, start + shape[a]), a)
                l = joined(near, far + of_pairs(inside, a) - of_pairs(mean, a), a)
        return l

    return Move(key, shape, lambda l: profile(l, rank), profile, back, lambda axes: axes, beside)


def reverse(env: Environment, op: Op, args: list[Value]) -> Value:
    """Figures are those of the other end where an axis holds a profile."""
    axes, rank = op.params["dimensions"], args[0].rank

    def turned(l: np.ndarray, first: int = rank) -> np.ndarray:
        return np.flip(l, tuple(first + a for a in axes))

    move = Move(("rev", tuple(axes)), args[0].shape, turned, lambda x: turned(x, 0), turned, lambda w: w)
    return moved(env, args[0], move)


def slice_(env: Environment, op: Op, args: list[Value]) -> Value:
    shape = env.program.shape(op.outputs[0])
    starts: list[int | None] = [None] * len(shape)
    if op.primitive is p.slice_p and not (op.params["strides"] and max(op.params["strides"]) > 1):
        starts = list(op.params["start_indices"])
    key = ("slice", shape, tuple(starts), str(op.params.get("strides")), op.outputs if None in starts else ())
    return moved(env, args[0], block(args[0], key, shape, starts))


def split(env: Environment, op: Op, args: list[Value]) -> list[Value]:
    axis, at, made = op.params["axis"], 0, []
    for v in op.outputs:
        shape = env.program.shape(v)
        starts: list[int | None] = [0] * len(shape)
        starts[axis] = at
        key = ("slice", shape, tuple(starts), "None", ())
        made.append(moved(env, args[0], block(args[0], key, shape, starts)))
        at += shape[axis]
    return made


RULES: dict[Any, Rule] = {
    p.transpose_p: transpose,
    p.reshape_p: reshape,
    p.squeeze_p: reshape,
    p.broadcast_in_dim_p: broadcast,
    p.slice_p: slice_,
    p.dynamic_slice_p: slice_,
    p.rev_p: reverse,
    jaxprs.SPLIT: split,
    jaxprs.TILE: tile,
}
