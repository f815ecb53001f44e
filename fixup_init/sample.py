"""Plan -> parameters. Knows nothing of models.

Every leaf has a key of its own, derived from its path, so that adding a layer changes no other layer. Leaves of one
shape, dtype and distribution are drawn together.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped, UInt32

from fixup_init.plan import Entry

__all__ = ["keys_of_paths", "sample"]

# Standard deviation of a standard normal truncated to [-2, 2].
_TRUNCATED = 0.87962566103423978
_BLOCK = 1 << 14  # numbers drawn from one key
_BATCH = 16  # blocks drawn in one call


def sample(entries: Sequence[Entry], key: Key[Array, ""] | UInt32[Array, words]) -> dict[str, Shaped[Array, ...]]:
    """Draws the entries that say how.

    Args:
      entries: of a plan; those with distribution "model" are left out.
      key: a JAX random key, of either kind.

    Returns:
      An array for each path.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    drawn: dict[str, Array] = {}
    groups: dict[tuple[tuple[int, ...], str, str], list[Entry]] = defaultdict(list)
    for e in entries:
        if e.distribution == "constant":
            assert e.value is not None
            drawn[e.path] = jnp.full(e.shape, e.value, e.dtype)
        elif e.distribution != "model":
            groups[e.shape, e.dtype, e.distribution].append(e)
    for (shape, dtype, distribution), group in groups.items():
        keys = keys_of_paths(key, [e.path for e in group])
        compute = _compute_dtype(dtype)
        units = _units(keys, math.prod(shape), compute, distribution)
        stds = np.asarray([e.std for e in group], compute)
        drawn.update((e.path, _scaled(units, np.int32(k), stds[k], shape, dtype)) for k, e in enumerate(group))
    return drawn


def keys_of_paths(key: Key[Array, ""], paths: Sequence[str]) -> Key[Array, paths]:
    """One key for each path: the key folded with 64 bits of the path's hash."""
    digests = [hashlib.sha256(path.encode()).digest()[:8] for path in paths]
    words = np.frombuffer(b"".join(digests), dtype=">u4").astype(np.uint32).reshape(-1, 2)
    return _fold(key, words)


@jax.jit
def _fold(key: Key[Array, ""], words: UInt32[Array, "paths 2"]) -> Key[Array, paths]:
    return jax.vmap(lambda w: jax.random.fold_in(jax.random.fold_in(key, w[0]), w[1]))(words)


def _units(keys: Key[Array, leaves], size: int, dtype: np.dtype, distribution: str) -> Float[Array, "leaves blocks b"]:
    """Draws of mean 0 and variance 1, `size` for each key, in whole blocks.

    Every block has a key of its own and every call draws the same number of blocks, so that one compilation serves all
    shapes: compiling the generator takes longer than drawing with it.
    """
    per_leaf = -(-size // _BLOCK)
    leaves = keys.shape[0]
    blocks = _blocks(keys, np.arange(per_leaf, dtype=np.uint32)).reshape(-1)
    calls = -(-blocks.shape[0] // _BATCH)
    fill = np.minimum(np.arange(calls * _BATCH), blocks.shape[0] - 1)  # the last call repeats the last block
    batches = [_draw(blocks[fill[i : i + _BATCH]], dtype, distribution) for i in range(0, len(fill), _BATCH)]
    drawn = batches[0] if calls == 1 else jnp.concatenate(batches)
    return drawn[: blocks.shape[0]].reshape(leaves, per_leaf, _BLOCK)


@jax.jit
def _blocks(keys: Key[Array, leaves], numbers: UInt32[Array, blocks]) -> Key[Array, "leaves blocks"]:
    return jax.vmap(lambda k: jax.vmap(lambda n: jax.random.fold_in(k, n))(numbers))(keys)


@functools.partial(jax.jit, static_argnames=("dtype", "distribution"))
def _draw(keys: Key[Array, batch], dtype: np.dtype, distribution: str) -> Float[Array, "batch b"]:
    def one(key: Key[Array, ""]) -> Float[Array, b]:
        if distribution == "normal":
            return jax.random.normal(key, (_BLOCK,), dtype)
        if distribution == "truncated_normal":
            return jax.random.truncated_normal(key, -2, 2, (_BLOCK,), dtype) / np.asarray(_TRUNCATED, dtype)
        return jax.random.uniform(key, (_BLOCK,), dtype, -1, 1) * np.asarray(math.sqrt(3), dtype)

    return jax.lax.map(one, keys)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _scaled(
    units: Float[Array, "leaves blocks b"], leaf: Any, std: Any, shape: tuple[int, ...], dtype: str
) -> Shaped[Array, ...]:
    flat = jax.lax.dynamic_index_in_dim(units, leaf, keepdims=False).reshape(-1)
    return (flat[: math.prod(shape)].reshape(shape) * std).astype(dtype)


def _compute_dtype(dtype: str) -> np.dtype:
    """Draws in float32 or wider, and rounds once."""
    real = jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(jnp.float32)
    return jnp.promote_types(real, jnp.float32)
