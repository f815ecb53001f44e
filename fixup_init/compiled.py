"""Key -> compiled function: the latest few hundred are kept.

A compiled block takes some forty memory mappings, of which a process may hold 65,530 on Linux: one that measured a
model after the other without letting go of any would die in the compiler.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any

import jax

__all__ = ["LIMIT", "held", "jitted"]

LIMIT = 512  # functions, about 20,000 mappings

_HELD: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()


def jitted(key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The compiled function of a key, made at its first use; the one that was not used for longest is let go of.

    Args:
      key: the same for functions that are equal; made anew, an equal function is compiled again.
      make: returns the function to compile.
    """
    found = _HELD.get(key)
    if found is None:
        found = _HELD[key] = jax.jit(make())
        if len(_HELD) > LIMIT:
            _HELD.popitem(last=False)
    _HELD.move_to_end(key)
    return found


def held() -> int:
    """How many functions are kept now."""
    return len(_HELD)
