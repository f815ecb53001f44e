"""Flax Linen: variables are a dictionary of collections; `params` is trained, the others are state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from fixup_init import jaxprs
from fixup_init.frameworks.application import Application, abstract, split_arguments

__all__ = ["adapt"]

# Keyword arguments of `Module.init` and `Module.apply` themselves; the rest goes to the model.
_FLAX = ("method", "rngs", "mutable", "capture_intermediates")


def adapt(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Application:
    flax_kwargs = {k: kwargs[k] for k in _FLAX if k in kwargs}
    method = flax_kwargs.get("method")
    arguments = split_arguments(args, {k: v for k, v in kwargs.items() if k not in _FLAX})
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(rng: Any, arrays: Any) -> Any:
        inner_args, inner_kwargs = arguments.restore(arrays)
        return model.init(rng, *inner_args, method=method, **inner_kwargs)

    closed, shapes = jaxprs.jaxpr_of(init, key, arguments.abstract)
    params = shapes.get("params", {})
    state = {k: v for k, v in shapes.items() if k != "params"}

    def apply(params: Any, state: Any, noise: Any, arrays: Any) -> Any:
        inner_args, inner_kwargs = arguments.restore(arrays)
        result = model.apply(
            {"params": params, **state}, *inner_args, mutable=list(state), rngs={"params": noise}, method=method,
            **inner_kwargs,
        )  # fmt: skip
        return result[0]

    def initial(rng: Any, wanted: Sequence[bool]) -> list[Any]:
        """Runs what makes the wanted leaves in the trace of `init`, never the forward pass."""
        traced = closed if rng.dtype == key.dtype else jaxprs.jaxpr_of(init, rng, arguments.abstract)[0]
        program = jaxprs.flatten(traced)
        _, tree = jax.tree.flatten(shapes)
        order = separate(jax.tree.unflatten(tree, program.outputs))
        chosen = [v for v, w in zip(jax.tree.leaves(order), wanted, strict=True) if w]
        drawn = iter(jaxprs.evaluate(program.returning(chosen), [rng, *arguments.arrays]) if chosen else ())
        return [next(drawn) if w else None for w in wanted]

    def combine(params: Any, state: Any) -> Any:
        variables = {**state}
        if "params" in shapes:
            variables["params"] = params
        return {k: variables[k] for k in shapes}

    def separate(variables: Any) -> tuple[Any, Any]:
        return variables.get("params", {}), {k: v for k, v in variables.items() if k != "params"}

    return Application(
        name=type(model).__name__,
        apply=apply,
        params=jax.tree.map(abstract, params),
        state=jax.tree.map(abstract, state),
        noise=key,
        inputs=arguments,
        initial=initial,
        combine=combine,
        separate=separate,
    )
