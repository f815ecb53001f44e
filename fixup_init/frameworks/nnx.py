"""Flax NNX: a module holds its variables; `Param` is trained, random streams are noise, the rest is state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from fixup_init.frameworks.application import Application, abstract, split_arguments, wanted_leaves

__all__ = ["adapt"]


def adapt(model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Application:
    graphdef, params, noise, state = nnx.split(model, nnx.Param, nnx.RngState, ...)
    arguments = split_arguments(args, kwargs)

    def apply(params: Any, state: Any, noise: Any, arrays: Any) -> Any:
        inner_args, inner_kwargs = arguments.restore(arrays)
        return nnx.merge(graphdef, params, noise, state)(*inner_args, **inner_kwargs)  # pyright: ignore

    def initial(key: Any, wanted: Sequence[bool]) -> list[Any]:
        del key  # a module draws its parameters when it is made
        remedy = f"{type(model).__name__} was made under nnx.eval_shape. Make the module itself"
        return wanted_leaves((params, state), wanted, remedy)

    def combine(new_params: Any, new_state: Any) -> Any:
        nnx.update(model, new_params, new_state)
        return model

    def separate(variables: Any) -> tuple[Any, Any]:
        _, params, _, state = nnx.split(variables, nnx.Param, nnx.RngState, ...)
        return params, state

    return Application(
        name=type(model).__name__,
        apply=apply,
        params=jax.tree.map(abstract, params),
        state=jax.tree.map(abstract, state),
        noise=jax.tree.map(abstract, noise),
        inputs=arguments,
        initial=initial,
        combine=combine,
        separate=separate,
    )
