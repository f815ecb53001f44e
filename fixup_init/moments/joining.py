"""Rules that put entries beside others: concatenate, stack and pad.

Zeros beside a value are its product with an indicator; of other values an entry is a mixture, whose figures are
averages over which of them it comes from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fixup_init import jaxprs
from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution, mixture
from fixup_init.moments.environment import Environment, NoRule, Rule
from fixup_init.moments.lattice import PROFILE, Lattice, diluted, joined, parted, profile_size, same, settled, spread
from fixup_init.moments.polynomials import is_gaussian, kin_of, moments_of, times
from fixup_init.moments.rearranging import Move, moved, reshaped_value
from fixup_init.moments.values import Source, Value, fixed, function_of, known
from fixup_init.program import Op


def concatenate(env: Environment, op: Op, args: list[Value]) -> Value:
    axis = op.params["dimension"]
    return joined_values(env, env.program.shape(op.outputs[0]), axis, args)


def joined_values(env: Environment, shape: tuple[int, ...], axis: int, args: Sequence[Value]) -> Value:
    """Independent values side by side: averages over which of them an entry comes from."""
    rank, n = len(shape), shape[axis]
    sizes = [a.shape[axis] for a in args]
    moving = [k for k, a in enumerate(args) if not a.is_constant]
    if len(moving) == 1 and all(a.number == 0 for k, a in enumerate(args) if k != moving[0]):
        return extended(env, args[moving[0]], shape, axis, sum(sizes[: moving[0]]))
    found = [moments_of(a) for a in args]
    mean: Any = 0.0
    one: Any = 0.0
    other: Any = 0.0
    for k, (m, l) in enumerate(found):
        m = m.mean(axis, keepdims=True)
        near, far = parted(l.mean(rank + axis, keepdims=True), axis)
        mean = mean + sizes[k] * m / n
        one = one + sizes[k] * near / n
        if n > 1:
            other = other + sizes[k] * (sizes[k] - 1) * far / (n * (n - 1))
            for j in range(k):
                cross = (
                    2 * sizes[k] * sizes[j] * spread(m) * spread(found[j][0].mean(axis, keepdims=True)) / (n * (n - 1))
                )
                other = other + parted(cross, axis)[1]
    if n == 1:
        other = one
    second = settled(joined(one, other, axis), shape)
    quantile = None
    gaussians = all(is_gaussian(a.terms) for a in args)
    spreads = [float((same(l, rank) - m**2).mean()) for m, l in found]
    centres = [float(m.mean()) for m, _ in found]
    if not gaussians or np.ptp(spreads) > 0.02 * max(spreads) or np.ptp(centres) ** 2 > 0.02 * max(spreads):
        quantile = mixture([(a, c, v) for a, c, v in zip(args, centres, spreads, strict=True)], sizes)
    source = Source(shape, mean, second, quantile, frozenset().union(*(kin_of(a.terms) for a in args)))

    def back(k: int, l: Lattice) -> Lattice:
        return settled(l.mean(rank + axis, keepdims=True), args[k].shape)

    ways = [(a, functools.partial(back, k)) for k, a in enumerate(args)]
    return env.made(source, ways, env.shared(args), back_notes=())


def extended(env: Environment, value: Value, shape: tuple[int, ...], axis: int, low: int) -> Value:
    """A value with zeros beside it: what it could be everywhere, times an indicator."""
    rank, n, m = len(shape), value.shape[axis], shape[axis]

    def back(l: Lattice) -> Lattice:
        return settled(diluted(l, axis, m, n), value.shape)

    move = Move(("extend", shape, axis), shape, lambda l: l.mean(rank + axis, keepdims=True),
                 lambda x: x.mean(axis, keepdims=True), back)  # fmt: skip
    result = moved(env, value, move)
    inside = np.zeros(m)
    inside[low : low + n] = 1.0
    indicator = fixed(shape, inside.reshape([-1 if a == axis else 1 for a in range(rank)]))
    one = function_of(indicator)
    result.terms = times(result.terms, one)
    result.slopes = {node: times(terms, one) for node, terms in result.slopes.items()}
    return result


def stack(env: Environment, op: Op, args: list[Value]) -> Value:
    axis = op.params["axis"]
    rows = [reshaped_value(env, a, (*a.shape[:axis], 1, *a.shape[axis:])) for a in args]
    return joined_values(env, env.program.shape(op.outputs[0]), axis, rows)


def pad(env: Environment, op: Op, args: list[Value]) -> Value:
    """A constant around a value: a profile where it is a narrow border, else an average."""
    value, filling = args
    shape, before = env.program.shape(op.outputs[0]), value.shape
    rank = len(shape)
    c = filling.number
    if c is None:
        raise NoRule("no rule for `pad` with anything but a number")
    mean, second = moments_of(value)
    if math.prod(shape) == math.prod(before):
        return value
    changed = [(a, config) for a, config in enumerate(op.params["padding_config"]) if tuple(config) != (0, 0, 0)]
    if len(changed) == 1 and c == 0:
        ((a, (low, high, inner)),) = changed
        if before[a] < 0.75 * shape[a] and inner == 0 and low >= 0 and high >= 0:
            return extended(env, value, shape, a, low)
    inside = 1.0
    quantile = distribution(value.terms)
    for a, (low, high, inner) in changed:
        n, m = before[a], shape[a]
        one, other = parted(second, a)
        _, across = parted(c * spread(mean), a)
        held = n / m
        inside *= held
        if inner == 0 and low >= 0 and high >= 0 and held >= 0.75 and profile_size(mean, second, rank) * m <= PROFILE:
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
        second = joined(one, other, a)
    if inside < 0.75:
        v = float((same(second, rank) - mean**2).mean())
        quantile = mixture([(value, float(mean.mean()) / inside, v / inside), (known(before, c), c, 0.0)],
                            [round(1000 * inside), round(1000 * (1 - inside))])  # fmt: skip
    source = Source(shape, mean, settled(second, shape), quantile, kin_of(value.terms))

    def back(l: Lattice) -> Lattice:
        for a, (low, _, inner) in changed:
            if l.shape[rank + a] > 1 and inner == 0 and low >= 0:
                l = np.take(l, range(low, low + before[a]), rank + a)
            elif l.shape[rank + a] > 1:
                l = l.mean(rank + a, keepdims=True)
        return settled(l, before)

    return env.made(source, [(value, back)])


RULES: dict[Any, Rule] = {
    p.concatenate_p: concatenate,
    jaxprs.STACK: stack,
    p.pad_p: pad,
}
