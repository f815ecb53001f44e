"""Array -> numbers: the statistics of one activation or cotangent."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from fixup_init.propagation import Statistics

__all__ = ["SIZE", "measure", "read"]

SIZE = 5


def measure(x: Shaped[Array, "..."], channel: int) -> Float[Array, "5"]:
    """Statistics of an array, scaled so that a signal near the edge of its dtype does not overflow in its square.

    Args:
      x: any floating or complex dtype; computed in float32 or wider.
      channel: axis of the channels.

    Returns:
      [s, mean/s, variance/s^2, mean of squared channel means/s^2, fraction of finite entries], s the largest magnitude.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x, channel = jnp.stack([x.real, x.imag]), channel % max(x.ndim, 1) + 1
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    finite = jnp.isfinite(wide).mean(dtype=wide.dtype)
    largest = jnp.abs(wide).max(initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    unit = wide / scale
    mean = unit.mean()
    variance = jnp.square(unit - mean).mean()
    others = tuple(a for a in range(unit.ndim) if a != channel % unit.ndim) if unit.ndim else ()
    channels = jnp.square(unit.mean(others)).mean()
    return jnp.stack([scale, mean, variance, channels, finite]).astype(jnp.float32)


def read(measured: np.ndarray) -> Statistics:
    """The numbers that `measure` packed, as Python floats (whose range a float32's square cannot leave)."""
    scale, mean, variance, channels, finite = (float(v) for v in measured)
    if finite < 1:
        return Statistics(math.nan, math.nan, math.nan, finite)
    return Statistics(mean * scale, variance * scale**2, channels * scale**2, finite)
