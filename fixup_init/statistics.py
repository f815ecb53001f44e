"""Array -> numbers: the statistics of one activation or cotangent."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from fixup_init.propagation import Statistics

__all__ = ["SIZE", "Gathered", "Layout", "combined", "finish", "gather", "measure", "norm", "read", "read_norm"]

SIZE = 12
_VECTORS = 64  # for the effective rank
_ENTRIES = 2**14  # for all but mean, variance and channel means
_DIGITS = 1024  # of the second moment over a variance that is found as its difference from the squared mean


class Layout(NamedTuple):
    """What the axes of an array mean; what is neither example nor channel is a position.

    Attributes:
      channel: axis of the channels; None where each entry is an example of its own.
      example: axis that holds the examples; None where they were averaged away.
      examples: how many there are in that axis.
      inner: how many entries of that axis lie behind each (an axis of examples times tokens has them in front).
      limits: of the nonlinearity that made the array, if it has two.
    """

    channel: int | None
    example: int | None = None
    examples: int = 1
    inner: int = 1
    limits: tuple[float, float] | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sums", "squares", "some"], meta_fields=["entries"])
@dataclasses.dataclass(frozen=True)
class Gathered:
    """What one pass over an array leaves for its statistics; a tree, whose leaves may also be shapes or several arrays.

    Attributes:
      sums: of all entries, [channel]; None where `some` holds them all.
      squares: their sums likewise.
      some: entries, [example, position, channel], of a large array at positions spread evenly over it.
      entries: how many there are in all.
    """

    sums: Any
    squares: Any
    some: Any
    entries: int


def measure(x: Shaped[Array, "..."], layout: Layout) -> Float[Array, "12"]:
    """Statistics of an array: `finish` after `gather`."""
    return finish(gather(x, layout), layout.limits)


def gather(x: Shaped[Array, "..."], layout: Layout) -> Gathered:
    """Sums over all entries, and some of them: little enough work to be done where the array is made.

    Args:
      x: any floating or complex dtype; computed in float32 or wider.
      layout: of its axes.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x, layout = jnp.stack([x.real, x.imag]), _shifted(layout)
    if jnp.finfo(x.dtype).bits < 32:  # a compiler might skip a rounding that is undone at once, and with it an overflow
        x = jax.lax.optimization_barrier(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x, example, channel = _split(x, layout)
    some = _some(x, example, channel, _ENTRIES)
    some = jnp.moveaxis(some, (example, channel), (0, -1)).reshape(some.shape[example], -1, some.shape[channel])
    if some.size == x.size:
        return Gathered(None, None, some, x.size)
    others = tuple(a for a in range(x.ndim) if a != channel)
    return Gathered(x.sum(others), jnp.square(x).sum(others), some, x.size)


def finish(gathered: Gathered, limits: tuple[float, float] | None) -> Float[Array, "12"]:
    """The statistics of what `gather` found, scaled so that none leaves the range of its dtype.

    Mean, variance and channel means are those of all entries, but where their squares leave float32's range, or the
    variance is so much smaller than the squared mean that their difference loses digits; there, as everything else,
    they are those of some entries. One entry of all that is not finite is seen.

    Args:
      gathered: of one array.
      limits: of the nonlinearity that made the array, if it has two.

    Returns:
      The scale s, then what `Statistics` has, in its order, mean and moments in units of s and s^2.
    """
    some = gathered.some
    zeros, saturated, scale = (some == 0).mean(), _saturated(some, limits), _scale(jnp.abs(some).max(initial=0))
    finite = 1 - (~jnp.isfinite(some)).mean(dtype=some.dtype)  # a mean of ones may round to less than 1
    x = some / scale
    mid = x.mean()
    moments = (scale, mid, jnp.square(x - mid).mean(), jnp.square(x.mean((0, 1))).mean())
    if gathered.sums is not None:
        means = gathered.sums * (some.shape[2] / gathered.entries)
        second = gathered.squares.sum() / gathered.entries
        variance = second - jnp.square(means.mean())
        trusted = (second > 1e-32) & (second < 1e28) & (variance > second / _DIGITS)
        over_all = (jnp.ones((), x.dtype), means.mean(), variance, jnp.square(means).mean())
        moments = tuple(jnp.where(trusted, a, b) for a, b in zip(over_all, moments, strict=True))
        # Where all are far from the largest number, their sum is finite unless one of them is not.
        elsewhere = (scale < 1e30) & ~jnp.isfinite(means).all()
        finite = jnp.where(elsewhere, jnp.minimum(finite, 1 - 1 / some.size), finite)
    numbers = (*moments, finite, zeros, saturated, _cosine(x), _rank(x), *_shares(x))
    return jnp.stack([jnp.asarray(n, jnp.float32) for n in numbers])


def combined(each: Float[Array, "devices ... 12"]) -> Float[Array, "... 12"]:
    """Of the parts of an array on several devices: its mean and variance, of the rest the means over them.

    Devices on which an arm of a conditional did not run, whose numbers are zeros, do not count.
    """
    scales = each[..., 0]
    devices = jnp.maximum((scales > 0).sum(0), 1)
    unit = scales / _scale(scales.max(0))
    mean, channels = (each[..., 1] * unit).sum(0) / devices, (each[..., 3] * unit**2).sum(0) / devices
    second = ((each[..., 2] + each[..., 1] ** 2) * unit**2).sum(0) / devices
    first = [scales.max(0), mean, second - mean**2, channels]
    return jnp.concatenate([jnp.stack(first, -1), each[..., 4:].sum(0) / devices[..., None]], -1)


def read(measured: np.ndarray) -> Statistics:
    """The numbers that `finish` packed, as Python floats (whose range a float32's square cannot leave)."""
    scale, mean, variance, channels, finite, *rest = (float(v) if v == v else math.nan for v in measured)
    if not scale:  # no array was there, or a cotangent that is zero without one
        return Statistics(0.0, 0.0, 0.0, zeros=1.0)
    if finite < 1:
        return Statistics(math.nan, math.nan, math.nan, finite)
    return Statistics(mean * scale, variance * scale**2, channels * scale**2, finite, *rest)


def norm(x: Shaped[Array, "..."], leading: int) -> Float[Array, "2 ..."]:
    """Euclidean norm over all axes but the `leading` ones, as (s, norm / s)."""
    x = jnp.abs(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(leading, x.ndim))
    largest = x.max(axes, initial=0, keepdims=True)
    scale = _scale(largest)
    return jnp.stack([scale.reshape(x.shape[:leading]), jnp.sqrt(jnp.square(x / scale).sum(axes))])


def read_norm(measured: np.ndarray) -> float:
    """The norm that `norm` packed."""
    return float(measured[0]) * float(measured[1])


def _scale(largest: Array) -> Array:
    """The largest magnitude, but so that its inverse is a normal number: subnormal ones are taken for 0."""
    return jnp.where(largest > 0, jnp.clip(largest, 1e-30, 1e30), 1)


def _shifted(layout: Layout) -> Layout:
    """With an axis in front."""
    return layout._replace(
        channel=None if layout.channel is None else layout.channel + 1,
        example=None if layout.example is None else layout.example + 1,
    )


def _split(x: Array, layout: Layout) -> tuple[Array, int, int]:
    """The array, its axis of examples and its axis of channels; each of length 1 where there is none."""
    channel = layout.channel
    if layout.example is None:
        x, example = x[None], 0
        channel = None if channel is None else channel + 1
    else:
        example, outer = layout.example, x.shape[layout.example] // max(layout.examples * layout.inner, 1)
        parts = [outer, layout.examples, layout.inner]
        if outer == layout.inner == 1:
            parts = [layout.examples]
        x = x.reshape(*x.shape[:example], *parts, *x.shape[example + 1 :])
        if channel is not None and channel > example:
            channel += len(parts) - 1
        elif channel == example:
            channel = None
        example += len(parts) == 3
    return (x[..., None], example, x.ndim) if channel is None else (x, example, channel)


def _saturated(x: Array, limits: tuple[float, float] | None) -> Array | float:
    if limits is None:
        return math.nan
    low, high = limits
    edge = 0.01 * (high - low)
    return ((x <= low + edge) | (x >= high - edge)).mean()


def _cosine(x: Array) -> Array | float:
    """(|sum_i x_i / |x_i||^2 - n) / (n (n - 1)), over the n examples of (example, position, channel) that are not 0."""
    if x.shape[0] < 2:
        return math.nan
    norms = jnp.sqrt(jnp.square(x).sum((1, 2)))
    weights = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    n = (norms > 0).sum()
    total = jnp.square(jnp.matmul(weights, x.reshape(x.shape[0], -1), precision="highest")).sum()
    return jnp.where(n > 1, (total - n) / jnp.maximum(n * (n - 1), 1), jnp.nan)


def _shares(x: Array) -> list[Array]:
    """Variance of the means over all but one axis of (example, channel, position), over the variance of all."""
    mid = x.mean()
    spread = jnp.square(x - mid).mean()
    spread = jnp.where(spread > 0, spread, jnp.nan)
    rows = x.mean(2)
    means = (rows.mean(1), x.mean((0, 1)), rows.mean(0))
    return [jnp.square(one - mid).mean() / spread for one in means]


def _rank(x: Array) -> Array:
    """(trace G)^2 / |G|^2 of the Gram matrix of some channel vectors of (example, position, channel)."""
    rows = _some(x, 0, 2, _VECTORS * x.shape[2]).reshape(-1, x.shape[2])
    gram = jnp.matmul(rows, rows.T, precision="highest")
    squares = jnp.square(gram).sum()
    return jnp.where(squares > 0, jnp.square(jnp.trace(gram)) / jnp.where(squares > 0, squares, 1), jnp.nan)


def _some(x: Array, example: int, channel: int, entries: int) -> Array:
    """At most so many entries, at least a channel vector: all examples if they fit, then positions, spread evenly."""
    left = max(entries // max(x.shape[channel], 1), 1)
    axes = [example, *(a for a in range(x.ndim) if a not in (example, channel))]
    for k, axis in enumerate(axes):
        if x.size <= entries:
            break
        most = left if axis == example else max(int(left ** (1 / (len(axes) - k))), 1)
        stride = -(-x.shape[axis] // most)
        taken = (x.shape[axis] - 1) // stride + 1
        start = (x.shape[axis] - 1 - (taken - 1) * stride) // 2
        x = jax.lax.slice_in_dim(x, start, start + (taken - 1) * stride + 1, stride, axis)
        left = max(left // taken, 1)
    return x
