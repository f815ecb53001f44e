"""Softmax: where a program has one, and the second moments of its weights.

E sum a_k^2 over n scores follows from their variance by one integral, exact where they are independent, and so does
what their cotangents are multiplied by; those of two rows are between this and 1 / n, as their scores are correlated.
Weights are taken as independent of the values that they weigh.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.environment import Environment
from fixup_init.moments.lattice import PROFILE, WIDE, Lattice, settled
from fixup_init.moments.polynomials import kin_of, second_of
from fixup_init.moments.values import Forward, Source, Value, padded, unknown
from fixup_init.program import IDENTITY, Op, Program
from fixup_init.quadrature import Quantile

INSIDE = "an exponential inside of a softmax"
TOKENS = Forward(
    "approximate: attention weights are taken as independent of the values that they weigh; tokens that are alike get "
    "similar weights, so that more is measured unless features are many more than tokens"
)
PLACES = "approximate: which of so many keys a mask shows to which queries is not told apart, only how many"
SCORES = (
    "gradient approximate: the keys of the scores are taken as not alike, so that more is measured unless features of "
    "a head are many more than tokens"
)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """exp(s) / sum exp(s), with or without the largest taken off first."""

    source: int
    axes: tuple[int, ...]
    inside: tuple[Op, ...]
    end: Op


PASSED = frozenset({
    p.broadcast_in_dim_p, p.reshape_p, p.convert_element_type_p, p.squeeze_p, p.copy_p, p.stop_gradient_p,
    IDENTITY,
})  # fmt: skip


CASTS = frozenset({p.convert_element_type_p, p.copy_p})


Back = Callable[..., tuple[int, Op | None]]


def walker(maker: Mapping[int, Op]) -> Back:
    """A function from a value to what it was before casts, shapes (or what is `passed`), and the operation there."""

    def back(value: int, passed: frozenset[Any] = PASSED) -> tuple[int, Op | None]:
        while (op := maker.get(value)) is not None and op.primitive in passed:
            value = op.inputs[0]
        return value, op

    return back


def is_reduced(shape: Sequence[int], before: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether a shape is another without some axes, or with size 1 there."""
    apart = tuple(n for a, n in enumerate(before) if a not in axes)
    return tuple(shape) in (apart, tuple(1 if a in axes else n for a, n in enumerate(before)))


def softmaxes(program: Program) -> list[Softmax]:
    """Every softmax of a program."""
    maker = {v: op for op in program.ops for v in op.outputs}
    back = walker(maker)
    users: dict[int, list[Op]] = {}
    for op in program.ops:
        for v in op.inputs:
            users.setdefault(v, []).append(op)
    found = []
    for op in program.ops:
        if op.primitive is not p.div_p:
            continue
        _, divisor = back(op.inputs[1])
        above, exponential = back(op.inputs[0], CASTS)
        if divisor is None or divisor.primitive is not p.reduce_sum_p or exponential is None:
            continue
        if back(divisor.inputs[0], CASTS)[0] != above:
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
                if _is_only_for(program, users, largest, less):
                    inside.append(largest)
        found.append(Softmax(source, tuple(divisor.params["axes"]), tuple(inside), op))
    return found


def _is_only_for(program: Program, users: Mapping[int, Sequence[Op]], largest: Op, less: Op) -> bool:
    """Whether the largest score is used for nothing but to be taken off, so that it matters to nothing."""
    todo = [largest.outputs[0]]
    while todo:
        if (value := todo.pop()) in program.outputs:
            return False
        for user in users.get(value, ()):
            if user.primitive in PASSED or user.primitive is p.max_p:
                todo.extend(user.outputs)
            elif user is not less:
                return False
    return True


@functools.lru_cache(256)
def _decays(variance: float, n: int) -> tuple[np.ndarray, ...]:
    """log t, and E e^(-t e^s) t^m e^(m s) for m = 0, 2, 3, 4, for scores s of a variance and sums of up to n."""
    z = np.linspace(-9, 9, 721)
    w = np.exp(-z * z / 2)
    w /= w.sum()
    top = math.sqrt(2 * variance * math.log(n + 1)) + variance / 2 + math.log(n)
    tau = np.linspace(-top - 25, 12 * math.sqrt(variance) + 8, 1200)
    at = np.clip(tau[:, None] + math.sqrt(variance) * z, -700, 700)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        one = np.exp(at)
        decay = np.exp(-one)
        found = [decay]
        for power in (2, 1, 1):
            found.append(np.nan_to_num(found[-1] * one**power))
        return tau, *(x @ w for x in found)


@functools.lru_cache(4096)
def log_sum_moments(variance: float, n: int) -> tuple[float, float]:
    """Mean and variance of log sum_k e^(s_k) over n independent scores of a variance.

    With E exponential of rate 1, T = E / sum e^s has P(T > t) = (E e^(-t e^s))^n, and log T = log E - log sum e^s,
    where log E has mean -gamma and variance pi^2 / 6.
    """
    if variance <= 0:
        return math.log(n), 0.0
    tau, zero, *_ = _decays(variance, n)
    share = -np.diff(zero**n)
    share /= share.sum()
    middle = (tau[1:] + tau[:-1]) / 2
    mean = float(share @ middle)
    return -np.euler_gamma - mean, max(float(share @ np.square(middle - mean)) - math.pi**2 / 6, 0.0)


@functools.lru_cache(4096)
def softmax_powers(variance: float, n: int, most: int = 0) -> tuple[float, float]:
    """E S and E (S - 2 sum_k a_k^3 + S^2), S = sum_k a_k^2, of a softmax over n independent scores of a variance.

    The second is what a cotangent meets: the score k gets a_k (g_k - sum_l a_l g_l), whose squares sum to it times the
    variance of independent g. As 1 / (sum e^s)^m = int t^(m-1) / (m-1)! exp(-t sum e^s) dt, with
    e_m(t) = E exp(m s - t e^s) they are n int t e_2 e_0^(n-1), n int t^2/2 e_3 e_0^(n-1), and for S^2
    n int t^3/6 (e_4 e_0 + (n-1) e_2^2) e_0^(n-2). With `most`, the e_m are those for sums of up to so many.
    """
    if n <= 1:
        return 1.0, 0.0
    if variance <= 0:
        return 1.0 / n, (1 - 1 / n) / n
    tau, zero, two, three, four = _decays(variance, most or n)
    with np.errstate(under="ignore", divide="ignore"):
        rest, less = (np.where(zero > 0, zero ** max(n - m, 0), 0.0) for m in (1, 2))
        square = two * rest
        cube = three * rest / 2
        pairs = (four * rest + (n - 1) * two * two * less) / 6
    step = n * float(tau[1] - tau[0])
    found = float(np.clip(step * square.sum(), 1.0 / n, 1.0))
    return found, float(np.clip(step * (square - 2 * cube + pairs).sum(), 0.0, found))


def softmax_square(variance: float, n: int) -> float:
    """E sum_k a_k^2 of a softmax over n independent scores of a variance."""
    return softmax_powers(variance, n)[0]


def _seen(value: Value, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which keys each row of scores sees, and how many, both of size 1 along axes where that is the same."""
    if value.visible is None:
        return np.ones((1,) * value.rank), np.full((1,) * value.rank, math.prod(value.shape[a] for a in axes))
    seen = value.visible.reshape(padded(value.visible.shape, value.rank))
    for a in axes:
        if seen.shape[a] == 1:
            seen = np.repeat(seen, value.shape[a], a)
    seen = seen | ~seen.any(tuple(axes), keepdims=True)  # where all is masked all is seen: the scores are equal
    return seen, seen.sum(tuple(axes), keepdims=True)


def _figures(counts: np.ndarray, variance: float, by_row: bool) -> np.ndarray:
    """Of one row of scores, and of two with other keys: what `softmax_powers` has, and one over the number of keys.

    Returns:
      (2, 3, *shape of `counts`), averages over rows if they are not told apart.
    """
    sizes, at, times = np.unique(counts, return_inverse=True, return_counts=True)
    few = sizes if len(sizes) <= 64 else sizes[np.linspace(0, len(sizes) - 1, 33).round().astype(int)]
    powers = zip(*(softmax_powers(round(variance, 9), int(c), int(few[-1])) for c in few), strict=True)
    one = [*(np.interp(sizes, few, x) for x in powers), 1.0 / sizes]
    figures = np.array([one, [_of_larger(x, times) for x in one]])
    if not by_row:
        return np.average(figures, 2, times).reshape(2, 3, *(1,) * counts.ndim)
    return figures[..., at.ravel()].reshape(2, 3, *counts.shape)


def _of_larger(figures: np.ndarray, times: np.ndarray) -> np.ndarray:
    """For rows of each size, in order, the mean over the other rows of the figure of the larger of the two."""
    rows = int(times.sum())
    if rows == 1:
        return figures
    beyond = np.cumsum((times * figures)[::-1])[::-1] - times * figures
    return ((np.cumsum(times) - 1) * figures + beyond) / (rows - 1)


def _places(seen: np.ndarray, counts: np.ndarray, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean weights under a mask, and how the products of two of a column, in one row and in two, lie along the keys."""
    means = seen / counts
    rows = tuple(a for a in range(seen.ndim) if a not in axes)
    pairs = means * (means.sum(rows, keepdims=True) - means)
    middle = pairs.mean(tuple(axes), keepdims=True)
    near = means / means.mean(tuple(axes), keepdims=True)
    return means, near, np.where(middle > 0, pairs / np.where(middle > 0, middle, 1.0), near)


def softmax_of(env: Environment, value: Value, axes: tuple[int, ...]) -> Value:
    """Attention weights: their second moments from the variance of scores along the axes."""
    if value.unknown:
        return unknown(value.shape, value.unknown)
    rank, shape = value.rank, value.shape
    second = second_of(value.terms, rank, shape)
    flat = second.mean(tuple(range(rank, 2 * rank)))
    n = math.prod(shape[a] for a in axes)
    keys = tuple(1 if a in axes and shape[a] > 1 else 0 for a in range(rank))

    def with_keys(mask: Sequence[int]) -> tuple[int, ...]:
        """The set of axes with all of those of the keys."""
        return tuple(max(m, k) for m, k in zip(mask, keys, strict=True))

    def beyond(mask: Sequence[int]) -> bool:
        """Whether two weights differ in their keys."""
        return any(m and k for m, k in zip(mask, keys, strict=True))

    v = max(float(flat[(0,) * rank] - flat[keys]), 0.0)
    seen, counts = _seen(value, axes)
    by_row = counts.size <= PROFILE  # else where a row lies is no matter
    figures = _figures(counts, v, by_row)
    means, *places = _places(seen, counts, axes) if 1 < seen.size <= WIDE else (1.0 / n, np.ones(()), np.ones(()))
    notes = {TOKENS} if seen.size <= WIDE else {TOKENS, PLACES}
    made, slopes = (np.zeros((2,) * rank + np.broadcast_shapes(figures.shape[2:], np.shape(means))) for _ in range(2))
    for mask in itertools.product((0, 1), repeat=rank):
        if beyond(mask):
            continue
        if not any(m and shape[a] > 1 for a, m in enumerate(mask)):
            moved, (one, through) = False, figures[0, :2] / n
        else:
            kappa = float(np.clip(flat[mask] - flat[with_keys(mask)], 0.0, v))
            moved = not by_row or any(mask[a] and counts.shape[a] > 1 for a in range(rank))
            s2, pulled, low = figures[int(moved)]  # low: where the rows' scores are independent
            share = math.expm1(min(kappa, 500)) / math.expm1(min(v, 500)) if v > 0 else 0.0
            one = (low + np.maximum(s2 - low, 0.0) * share) / n
            # Independent rows a, b: E sum a b (1 - a - b + (a, b)), of the same means.
            apart = low * (1 - s2) ** 2 + (low * (1 - s2)) ** 2 / np.maximum(1 - low, low)
            through = (apart + (pulled - apart) * share) / n
        one, through = one * places[moved], through * places[moved]
        made[mask], slopes[mask] = one, through
        made[with_keys(mask)] = (means - one) / (n - 1) if n > 1 else one
    for mask in itertools.product((0, 1), repeat=rank):  # several key axes: any of them
        if beyond(mask):
            made[mask] = made[with_keys(mask)]
    power = float(figures[0, 0].mean())
    quantile = Quantile.positive(math.sqrt(max(n * power - 1, 0.0)))  # weights are not negative
    source = Source(shape, means * np.ones((1,) * rank), settled(made, shape), quantile, kin_of(value.terms))

    def back(l: Lattice) -> Lattice:
        l = l.mean(tuple(rank + a for a in range(rank) if made.shape[rank + a] == 1), keepdims=True)
        found = np.zeros(np.broadcast_shapes(made.shape, l.shape))
        for mask in itertools.product((0, 1), repeat=rank):
            if beyond(mask):
                continue
            other = with_keys(mask)
            part = slopes[mask] * (l[mask] - l[other])
            found[mask] = part
            found[other] = -part / max(n - 1, 1)
        for mask in itertools.product((0, 1), repeat=rank):
            if beyond(mask):
                found[mask] = found[with_keys(mask)]
        return settled(found, shape)

    return env.made(source, [(value, back)], notes, back_notes={SCORES})
