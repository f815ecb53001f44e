"""Pure functions: `fi.Function(apply, params)` serves Haiku, Equinox and plain JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fixup_init.frameworks.application import Application, abstract, split_arguments, wanted_leaves

__all__ = ["Function", "adapt"]


@dataclasses.dataclass(frozen=True)
class Function:
    """A model as a pure function `apply(params, *inputs, **kwargs)`.

    Args:
      apply: the function; it must be pure, and traceable by JAX.
      params: its parameters, any pytree of arrays or `jax.ShapeDtypeStruct`.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> def net(params, x):
      ...     return x + jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jax.ShapeDtypeStruct((8, 32), jnp.float32), "b": jax.ShapeDtypeStruct((32, 8), jnp.float32)}
      >>> fi.structure(fi.Function(net, params), jax.ShapeDtypeStruct((4, 8), jnp.float32)).num_branches
      1
    """

    apply: Callable[..., Any]
    params: Any


def adapt(model: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Application:
    arguments = split_arguments(args, kwargs)

    def apply(params: Any, state: Any, noise: Any, arrays: Any) -> Any:
        del state, noise
        inner_args, inner_kwargs = arguments.restore(arrays)
        return model.apply(params, *inner_args, **inner_kwargs)

    def initial(key: Any, wanted: Sequence[bool]) -> list[Any]:
        del key
        return wanted_leaves(model.params, wanted, "A Function has no initializers of its own. Give it drawn params")

    return Application(
        name=getattr(model.apply, "__name__", type(model.apply).__name__),
        apply=apply,
        params=jax.tree.map(abstract, model.params),
        state=(),
        noise=(),
        inputs=arguments,
        initial=initial,
        combine=lambda params, state: params,
        separate=lambda variables: (variables, ()),
    )
