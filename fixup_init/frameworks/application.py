"""A model with its arguments, as a pure function: what every framework is reduced to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fixup_init.program import Program

__all__ = [
    "Application", "Arguments", "ModelError", "arrays_in", "is_array", "path_of", "split_arguments",
    "wanted_leaves",
]  # fmt: skip


class ModelError(ValueError):
    """A model that cannot be traced on the given inputs, or whose result or variables are not what is needed."""


@dataclasses.dataclass(frozen=True)
class Application:
    """`apply(params, state, noise, inputs) -> result`, pure, with the abstract values of its arguments.

    `initial(key, wanted)` gives the leaves of (params, state) as the model's own initializers draw them, None for those
    that are not wanted; `combine(params, state)` gives back the framework's form (variables, module), `separate` takes
    that form apart. `traced` is what tracing `apply` would give, where that came out on the way: the program, its
    inputs the leaves of (params, state, noise, inputs), and the result.
    """

    name: str
    apply: Callable[..., Any]
    params: Any
    state: Any
    noise: Any
    inputs: Arguments
    initial: Callable[[Any, Sequence[bool]], list[Any]]
    combine: Callable[[Any, Any], Any]
    separate: Callable[[Any], tuple[Any, Any]]
    traced: tuple[Program, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of a call, arrays apart from everything else (flags, None, functions)."""

    arrays: tuple[Any, ...]
    names: tuple[str, ...]
    restore: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def abstract(self) -> tuple[Any, ...]:
        return tuple(abstract(a) for a in self.arrays)


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct, np.generic))


def arrays_in(result: Any) -> list[Any]:
    """The arrays among the leaves of a traced result."""
    return [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype) if _numeric(x) else x.dtype)


def _numeric(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Takes the arrays out of a call's arguments; `restore` puts others in their places."""
    flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    where = [k for k, (_, leaf) in enumerate(flat) if is_array(leaf)]
    leaves = [leaf for _, leaf in flat]

    def restore(arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = list(leaves)
        for k, array in zip(where, arrays, strict=True):
            filled[k] = array
        return jax.tree_util.tree_unflatten(tree, filled)

    return Arguments(tuple(leaves[k] for k in where), tuple(f"input/{path_of(flat[k][0][1:])}" for k in where), restore)


def wanted_leaves(tree: Any, wanted: Sequence[bool], remedy: str) -> list[Any]:
    """The wanted leaves of values that the model already holds."""
    leaves = jax.tree.leaves(tree)
    missing = [x for x, w in zip(leaves, wanted, strict=True) if w and isinstance(x, jax.ShapeDtypeStruct)]
    if missing:
        raise ModelError(
            f"{len(missing)} leaves keep the model's own values, but these are abstract (jax.ShapeDtypeStruct, first "
            f"{missing[0]}). {remedy}, or use a scheme that sets every leaf."
        )
    return [x if w else None for x, w in zip(leaves, wanted, strict=True)]


def path_of(entries: Sequence[Any]) -> str:
    """`blocks/3/conv1/kernel` from a key path; boxes around a leaf leave no trace."""
    names = [_entry(e) for e in entries]
    while len(names) > 1 and isinstance(entries[len(names) - 1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        names.pop()
    return "/".join(names)


def _entry(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
