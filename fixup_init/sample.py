"""Plan -> parameters. Knows nothing of models.

Every leaf has a key of its own, derived from its path, so that adding a layer changes no other layer. Leaves of one
shape, dtype and distribution are drawn together. Numbers are drawn in blocks of one size, each with a key of its own,
so that one compilation serves all shapes: compiling the generator takes longer than drawing with it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped, UInt32

from fixup_init.plan import Entry

__all__ = ["sample", "typed_key"]

# Standard deviation of a standard normal truncated to [-2, 2].
_TRUNCATED = 0.87962566103423978
_BLOCK = 1 << 14  # numbers drawn from one key
_BATCH = 16  # blocks drawn in one call


def typed_key(key: Any) -> Key[Array, ""]:
    """A typed key from what frameworks take as one: a key of either kind, a seed, `nnx.Rngs`, Flax's dictionary.

    Raises:
      TypeError, ValueError: it is none of these.

    Example:
      >>> bool((jax.random.key_data(typed_key({"params": jax.random.PRNGKey(3)})) == jax.random.PRNGKey(3)).all())
      True
    """
    if hasattr(key, "params") and callable(key.params):  # nnx.Rngs
        key = key.params()
    if isinstance(key, Mapping):
        if not key:
            raise ValueError("key is an empty dictionary; expected {'params': key}.")
        return typed_key(key.get("params", next(iter(key.values()))))
    if isinstance(key, int):
        return jax.random.key(key)
    if not hasattr(key, "dtype"):
        raise TypeError(f"key={key!r}: expected a JAX random key, as from jax.random.key(0).")
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def sample(entries: Sequence[Entry], key: Key[Array, ""]) -> dict[str, Shaped[Array, "..."]]:
    """Draws the entries that say how.

    Args:
      entries: of a plan; those with distribution "model" are left out.
      key: of `typed_key`.

    Returns:
      An array for each path.
    """
    drawn: dict[str, Array] = {}
    groups: dict[tuple[tuple[int, ...], str, str], list[Entry]] = defaultdict(list)
    for e in entries:
        if e.distribution == "constant":
            assert e.value is not None
            drawn[e.path] = jnp.full(e.shape, e.value, e.dtype)
        elif e.distribution != "model":
            groups[e.shape, e.dtype, e.distribution].append(e)
    for (shape, dtype, distribution), group in groups.items():
        compute = _compute_dtype(dtype)
        per_leaf = -(-math.prod(shape) // _BLOCK)
        units = _units(key, [e.path for e in group], per_leaf, compute, distribution)
        for k, e in enumerate(group):
            std = np.asarray(e.std, compute)
            drawn[e.path] = _leaf(units, np.int32(k * per_leaf), std, per_leaf, shape, dtype)
    return drawn


def _units(
    key: Key[Array, ""], paths: Sequence[str], per_leaf: int, dtype: np.dtype, distribution: str
) -> Float[Array, "blocks b"]:
    """Draws of mean 0 and variance 1: `per_leaf` blocks for each path."""
    rows = [(*_words(path), n) for path in paths for n in range(per_leaf)]
    rows += rows[-1:] * (-len(rows) % _BATCH)  # every call draws as many
    words = np.asarray(rows, np.uint32).reshape(-1, _BATCH, 3)
    batches = [_draw(key, batch, dtype, distribution) for batch in words]
    return batches[0] if len(batches) == 1 else jnp.concatenate(batches)


def _words(path: str) -> tuple[int, int]:
    """64 bits of the path's hash."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


@functools.partial(jax.jit, static_argnames=("dtype", "distribution"))
def _draw(
    key: Key[Array, ""], words: UInt32[Any, "batch 3"], dtype: np.dtype, distribution: str
) -> Float[Array, "batch b"]:
    def one(row: UInt32[Array, "3"]) -> Float[Array, "b"]:
        own = functools.reduce(jax.random.fold_in, row, key)
        if distribution == "normal":
            return jax.random.normal(own, (_BLOCK,), dtype)
        if distribution == "truncated_normal":
            return jax.random.truncated_normal(own, -2, 2, (_BLOCK,), dtype) / np.asarray(_TRUNCATED, dtype)
        return jax.random.uniform(own, (_BLOCK,), dtype, -1, 1) * np.asarray(math.sqrt(3), dtype)

    return jax.lax.map(one, words)


@functools.partial(jax.jit, static_argnames=("per_leaf", "shape", "dtype"))
def _leaf(
    units: Float[Array, "blocks b"], first: Any, std: Any, per_leaf: int, shape: tuple[int, ...], dtype: str
) -> Shaped[Array, "..."]:
    flat = jax.lax.dynamic_slice_in_dim(units, first, per_leaf).reshape(-1)
    return (flat[: math.prod(shape)].reshape(shape) * std).astype(dtype)


def _compute_dtype(dtype: str) -> np.dtype:
    """Draws in float32 or wider, and rounds once."""
    real = jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(jnp.float32)
    return jnp.promote_types(real, jnp.float32)
