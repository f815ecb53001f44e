"""Gathered entries of many arrays -> their statistics, several arrays at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from fixup_init.compiled import jitted
from fixup_init.statistics import Gathered, Layout, finish, gather

__all__ = ["Gathering"]

_TOGETHER = 8  # a call on one array takes longer to start than to run


class Gathering:
    """Statistics of the taps of one pass, by value; those of arrays of one shape are finished together."""

    def __init__(self) -> None:
        self._waiting: dict[Any, list[tuple[int, Gathered]]] = {}
        self._finished: list[tuple[list[int], Float[Array, "arrays 12"]]] = []
        self._whole: dict[int, Float[Array, "... 12"]] = {}

    def add(self, value: int, found: Gathered | Float[Array, "... 12"], limits: tuple[float, float] | None) -> None:
        """Takes what a tap saw: statistics, where it stands inside of a scan, a conditional or a shard_map."""
        if not isinstance(found, Gathered):
            self._whole[value] = found
            return
        key = (found.some.shape, found.some.dtype, found.entries, limits)
        waiting = self._waiting.setdefault(key, [])
        waiting.append((value, found))
        if len(waiting) == _TOGETHER:
            self._finish(key)

    def add_array(self, value: int, x: Shaped[Array, "..."], layout: Layout) -> None:
        """Takes an array."""
        run = jitted(("gather", x.shape, x.dtype, layout), lambda: lambda x: gather(x, layout))
        self.add(value, run(x), layout.limits)

    def read(self) -> dict[int, np.ndarray]:
        """All of them, packed as `finish` does."""
        for key in list(self._waiting):
            self._finish(key)
        found: dict[int, np.ndarray] = jax.device_get(self._whole)
        for values, packed in jax.device_get(self._finished):
            found |= dict(zip(values, packed, strict=False))  # the last ones are repeated
        return found

    def _finish(self, key: Any) -> None:
        values, each = zip(*self._waiting.pop(key), strict=True)
        each = each + each[-1:] * (_TOGETHER - len(each))
        limits, of_shape = key[-1], key[:-1]
        joined = jitted(("join", of_shape), lambda: lambda *each: _joined(*each))(*each)
        self._finished.append((list(values), jitted(("finish", key), lambda: _finisher(limits))(joined)))


def _joined(*each: Gathered) -> Gathered:
    """One behind the other, in a function of its own: the compiler would repeat it in each loop of the statistics."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *each)


def _finisher(limits: tuple[float, float] | None) -> Callable[[Gathered], Float[Array, "arrays 12"]]:
    def run(joined: Gathered) -> Array:
        apart = jax.tree.map(lambda a: a.reshape(_TOGETHER, -1, *a.shape[1:]), joined)
        return jax.vmap(lambda one: finish(one, limits))(apart)

    return run
