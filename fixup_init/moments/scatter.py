"""Writing where indices say so: scatter-add, scatter, scatter-max, and dynamic_update_slice.

What is written is summed over the places of each cell (`places`). An overwriting puts b w + (1 - b) x, with b the
indicator of what is reached. The largest that reaches a cell is that of the mean number of those that do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fixup_init import jaxprs
from fixup_init.jaxprs import p
from fixup_init.moments.combining import combined, complement
from fixup_init.moments.distributions import of_signed_sum
from fixup_init.moments.environment import Environment, NoRule, Rule
from fixup_init.moments.lattice import PROFILE, Lattice, joined, parted, same, settled
from fixup_init.moments.places import Places, places_of
from fixup_init.moments.polynomials import kin_of, moments_of, scaled, times
from fixup_init.moments.rearranging import Move, moved, reshaped_value
from fixup_init.moments.reductions import POOLED, largest
from fixup_init.moments.reshaping import reshaped
from fixup_init.moments.values import Source, Term, Value, function_of, unit
from fixup_init.moments.whole_numbers import chosen
from fixup_init.program import Op

LEFT_OUT = "approximate: entries that nothing reaches are infinite, and left out"
NUMBERS = "approximate: the largest of the mean number of values that reach an entry"


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """The updates of a scatter: places in front, then the axes of a window in the order of the operand."""

    places: Places
    cells: tuple[int, ...]  # axes of the operand that indices say something of, one entry at a time
    order: tuple[int, ...]  # axes of the updates: those of places, then the others
    into: tuple[int, ...]  # axes of the operand that the others are
    shape: tuple[int, ...]  # of the operand
    before: tuple[int, ...]  # of the updates

    def inward(self, l: Lattice) -> Lattice:
        """A lattice of updates with one axis of places in front."""
        before = tuple(self.before[a] for a in self.order)
        return reshaped(_turned(l, self.order), before, (self.places.count, *(self.shape[a] for a in self.into)))

    def outward(self, l: Lattice) -> Lattice:
        """The lattice of updates of one with an axis of places in front."""
        after = tuple(self.before[a] for a in self.order)
        l = reshaped(l, (self.places.count, *(self.shape[a] for a in self.into)), after)
        return settled(_turned(l, [self.order.index(a) for a in range(len(self.order))]), self.before)

    def unfolded(self, l: Lattice) -> Lattice:
        """The lattice of the operand of one with an axis of cells in front."""
        order = (*self.cells, *self.into)
        sizes = tuple(self.shape[a] for a in order)
        l = reshaped(l, (len(self.places.shares), *(self.shape[a] for a in self.into)), sizes)
        return settled(_turned(l, [order.index(a) for a in range(len(order))]), self.shape)

    def folded(self, l: Lattice) -> Lattice:
        """A lattice of the operand with one axis of cells in front."""
        order = (*self.cells, *self.into)
        sizes = tuple(self.shape[a] for a in order)
        return reshaped(_turned(l, order), sizes, (len(self.places.shares), *(self.shape[a] for a in self.into)))


def _turned(l: Lattice, order: Sequence[int]) -> Lattice:
    rank = len(order)
    return l.transpose(*order, *(rank + a for a in order))


def _written(env: Environment, op: Op, args: list[Value]) -> Written:
    operand, indices, updates = args
    numbers = op.params["dimension_numbers"]
    batching = tuple(numbers.operand_batching_dims)
    inserted = tuple(numbers.inserted_window_dims)
    windows = [a for a in range(operand.rank) if a not in (*inserted, *batching)]
    through = [a for a in range(updates.rank) if a not in numbers.update_window_dims]  # the indices' axes, in order
    batches = dict(zip(numbers.scatter_indices_batching_dims, batching, strict=True))
    whole = all(updates.shape[u] == operand.shape[a] for u, a in zip(numbers.update_window_dims, windows, strict=True))
    if set(numbers.scatter_dims_to_operand_dims) != set(inserted) or not whole:
        raise NoRule(f"no rule for `{op.name}` of parts of rows")
    by_axis = {a: u for u, a in zip(numbers.update_window_dims, windows, strict=True)}
    by_axis |= {a: through[k] for k, a in batches.items()}
    into = tuple(sorted(by_axis))
    free = [through[k] for k in range(len(through)) if k not in batches]
    cells = tuple(numbers.scatter_dims_to_operand_dims)
    found = places_of(
        indices, tuple(operand.shape[a] for a in cells), {k: into.index(a) for k, a in batches.items()}, len(into)
    )
    if found is None:
        raise NoRule(f"no rule for `{op.name}` at such indices")
    order = (*free, *(by_axis[a] for a in into))
    return Written(found, cells, order, into, operand.shape, updates.shape)


def _mean(written: Written, mean: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A profile of updates, without that of places, times weights of cells, for the operand."""
    n = len(written.order) - len(written.into)
    x = mean.transpose(written.order).mean(tuple(range(n)))
    if np.ptp(weights) <= 1e-12 or weights.size > PROFILE:
        weights = weights.mean(keepdims=True)
    shape = tuple(written.shape[a] for a in written.cells) if weights.size > 1 else (1,) * len(written.cells)
    found = weights.reshape(*shape, *(1,) * x.ndim) * x
    order = (*written.cells, *written.into)
    return found.transpose([order.index(a) for a in range(len(order))])


def scatter_add(env: Environment, op: Op, args: list[Value]) -> Value:
    """x + the sum of what reaches each cell."""
    operand, indices, updates = args
    shape = operand.shape
    written = _written(env, op, args)
    mean, second = moments_of(updates)
    places = written.places
    new = written.unfolded(places.collected(written.inward(second)))
    line = _mean(written, mean, places.count * places.shares)
    source = Source(
        shape, line, new, of_signed_sum(updates.terms, line, same(new, len(shape))),
        kin_of(updates.terms) | kin_of(indices.terms),
    )  # fmt: skip

    def back(l: Lattice) -> Lattice:
        return written.outward(places.looked_up(written.folded(l)))

    total = env.made(source, [(updates, back)], indices.notes)
    sign = -1.0 if op.primitive is jaxprs.SCATTER_SUB else 1.0
    return combined(shape, [(operand, unit(len(shape))), (total, scaled(unit(len(shape)), sign))])


def _reached(written: Written) -> list[Term]:
    """The indicator of cells that are reached."""
    places, rank = written.places, len(written.shape)
    hit, both = places.hits
    wide = np.ptp(hit) > 1e-12 and hit.size <= PROFILE
    hit = hit if wide else hit.mean(keepdims=True)
    windows = len(written.into)
    one = np.expand_dims(places.one, windows)
    line = hit.reshape(-1, *(1,) * windows)
    near = one * line + (1 - one) * line**2
    far = one * both + (1 - one) * float(hit.mean()) ** 2
    l = joined(near[None], far[None], 0)
    for k in range(windows):
        l = np.repeat(l, 2, 1 + k) if l.shape[1 + k] == 1 else l
    ones = np.ones((1,) * len(written.before))
    return function_of(chosen(written.shape, _mean(written, ones, hit), written.unfolded(l))) if rank else unit(0)


def scatter(env: Environment, op: Op, args: list[Value]) -> Value:
    """b w + (1 - b) x, with b the indicator of what is reached and w what reaches it last."""
    operand, indices, updates = args
    numbers = op.params["dimension_numbers"]
    if len(numbers.update_window_dims) == updates.rank and not numbers.operand_batching_dims:
        return _one_window(env, op, args)
    written = _written(env, op, args)
    places, e = written.places, written.places.count
    mean, second = moments_of(updates)
    near, far = parted(written.inward(second), 0)
    windows = len(written.into)
    near, far = (x.mean(windows + 1, keepdims=True) for x in (near, far))
    one = places.one[None].reshape(1, *places.one.shape[:windows], 1, *places.one.shape[windows:])
    near = one * near + (1 - one) * (near + (e - 1) * far) / e
    source = Source(
        operand.shape, _mean(written, mean, np.ones(len(places.shares))), written.unfolded(joined(near, far, 0)), None,
        kin_of(updates.terms),
    )  # fmt: skip
    n = len(places.shares)

    def back(l: Lattice) -> Lattice:
        """Cells that are reached, among the places: the indicator is a slope, and in it already."""
        one, other = (x.mean(windows + 1, keepdims=True) for x in parted(written.folded(l), 0))
        return written.outward(joined(one * n / e, other * n * (n - 1) / max(e * (e - 1), 1), 0))

    value = env.made(source, [(updates, back)], indices.notes)
    reached = _reached(written)
    return combined(operand.shape, [(operand, complement(reached, operand.rank)), (value, reached)])


def _one_window(env: Environment, op: Op, args: list[Value]) -> Value:
    """A block at one place."""
    operand, indices, updates = args
    numbers = op.params["dimension_numbers"]
    inserted = tuple(numbers.inserted_window_dims)
    starts: list[int | None] = [0] * operand.rank
    for k, a in enumerate(numbers.scatter_dims_to_operand_dims):
        known_one = indices.array is not None and indices.array.size in (1, len(numbers.scatter_dims_to_operand_dims))
        starts[a] = int(indices.array.reshape(-1)[k if indices.array.size > 1 else 0]) if known_one else None  # pyright: ignore
    sizes, windows = [1] * operand.rank, iter(numbers.update_window_dims)
    for a in range(operand.rank):
        if a not in inserted:
            sizes[a] = updates.shape[next(windows)]
    return _overwritten(env, operand, reshaped_value(env, updates, tuple(sizes)), starts)


def dynamic_update_slice(env: Environment, op: Op, args: list[Value]) -> Value:
    operand, update, *at = args
    starts = [None if a.number is None else round(a.number) for a in at]
    return _overwritten(env, operand, update, starts)


def _overwritten(env: Environment, operand: Value, update: Value, starts: Sequence[int | None]) -> Value:
    """A block in place of what was there: b w + (1 - b) x, with b its indicator, one factor for each axis."""
    shape, rank = operand.shape, operand.rank
    inside = unit(rank)
    value = update
    for a in range(rank):
        n, m, start = value.shape[a], shape[a], starts[a]
        if n == m:
            continue
        value = _widened(env, value, a, m, start)
        line = np.full(m, n / m)
        if start is not None and m <= PROFILE:
            at = min(max(start, 0), m - n)
            line[:] = 0.0
            line[at : at + n] = 1.0
        mean = line.reshape([-1 if b == a else 1 for b in range(rank)])
        second = np.broadcast_to(mean, (2,) * rank + mean.shape).copy()
        second[(slice(None),) * a + (1,)] = n * (n - 1) / (m * (m - 1))
        inside = times(inside, function_of(chosen(shape, mean, second)))
    return combined(shape, [(operand, complement(inside, rank)), (value, inside)])


def _widened(env: Environment, value: Value, axis: int, m: int, start: int | None) -> Value:
    """What a value could be along a longer axis; cotangents come from the place where it is."""
    rank, n = value.rank, value.shape[axis]
    shape = (*value.shape[:axis], m, *value.shape[axis + 1 :])
    at = None if start is None else min(max(start, 0), m - n)

    def wide(x: np.ndarray, first: int) -> np.ndarray:
        k = first + axis
        if x.shape[k] == 1 or at is None or m > PROFILE:
            return x.mean(k, keepdims=True)
        mean = x.mean(k, keepdims=True)
        return np.concatenate([np.repeat(mean, at, k), x, np.repeat(mean, m - n - at, k)], k)

    def lattice(l: Lattice) -> Lattice:
        if n == 1:
            l = np.repeat(np.take(l, [0], axis), 2, axis)
        return wide(l, rank)

    def back(l: Lattice) -> Lattice:
        """The indicator is a slope, and in it already: what is there, or its share."""
        near, far = parted(l, axis)
        if at is not None and l.shape[rank + axis] > 1:
            near, far = (np.take(x, range(at, at + n), rank + axis) for x in (near, far))
        else:
            near = near.mean(rank + axis, keepdims=True) * (m / n)
        far = far.mean(rank + axis, keepdims=True) * (m * (m - 1) / max(n * (n - 1), 1))
        return settled(joined(near, far, axis), value.shape)

    move = Move(("widen", shape, axis, at), shape, lattice, lambda x: wide(x, 0), back)
    return moved(env, value, move)


def scatter_max(env: Environment, op: Op, args: list[Value]) -> Value:
    """The largest or smallest of what reaches each cell, over an operand that is beyond all of it."""
    operand, indices, updates = args
    sign = 1.0 if op.primitive is p.scatter_max_p else -1.0
    c = operand.number
    if c is None or c * sign > -1e30:
        raise NoRule(f"no rule for `{op.name}` onto values")
    written = _written(env, op, args)
    places, windows = written.places, len(written.into)
    mean, second = moments_of(updates)
    inner = written.inward(second)
    inner = inner.mean(tuple(range(windows + 1, inner.ndim)), keepdims=True)
    near, far = parted(inner, 0)
    hit, _ = places.hits
    n = places.count * float(places.shares.sum()) / max(float(hit.sum()), 1e-12)
    one, other = (written.unfolded(x) for x in (joined(near, far, 0), joined(far, far, 0)))
    cells = _mean(written, mean, np.ones(len(places.shares)))
    source = largest(updates, operand.shape, cells.mean(keepdims=True), one, other, n, sign)

    def back(l: Lattice) -> Lattice:
        """Each cell's cotangent reaches one of its places."""
        e = places.count
        one, other = (x.mean(windows + 1, keepdims=True) for x in parted(written.folded(l), 0))
        reached = float(hit.sum())
        far = other * reached * max(reached - 1, 0.0) / max(e * (e - 1), 1)
        return written.outward(joined(one * reached / e, far, 0))

    notes = {POOLED, NUMBERS} if n > 1 else set()
    if float(hit.min()) < 1 - 1e-9:
        notes.add(LEFT_OUT)
    return env.made(source, [(updates, back)], notes | indices.notes)


RULES: dict[Any, Rule] = {
    p.scatter_add_p: scatter_add,
    jaxprs.SCATTER_SUB: scatter_add,
    p.scatter_p: scatter,
    p.scatter_max_p: scatter_max,
    p.scatter_min_p: scatter_max,
    p.dynamic_update_slice_p: dynamic_update_slice,
}
