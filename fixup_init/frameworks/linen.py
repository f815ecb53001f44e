"""Flax Linen: variables are a dictionary of collections; `params` is trained, the others are state."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from types import CodeType
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import DenyList

from fixup_init import jaxprs, running
from fixup_init.frameworks.application import Application, Arguments, abstract, arrays_in, split_arguments

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

    trace_init = functools.cache(lambda dtype: jaxprs.jaxpr_of(init, _key(dtype), arguments.abstract))
    found = _in_one(model, arguments, method, key)
    shapes, traced = found if found is not None else (trace_init(key.dtype)[1], None)
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
        closed, tree_of = trace_init(rng.dtype)
        program = jaxprs.flatten(closed)
        _, tree = jax.tree.flatten(tree_of)
        order = separate(jax.tree.unflatten(tree, program.outputs))
        chosen = [v for v, w in zip(jax.tree.leaves(order), wanted, strict=True) if w]
        drawn = iter(running.evaluate(program.returning(chosen), [rng, *arguments.arrays]) if chosen else ())
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
        traced=traced,
    )


def _key(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype)


# Collections of which modules do not ask whether they are there before they use them, as they do of a cache.
_ALWAYS_THERE = ("params", "batch_stats")


def _in_one(model: nn.Module, arguments: Arguments, method: Any, key: Any) -> tuple[Any, Any] | None:
    """Shapes of the variables and the program of `apply` from one trace instead of two.

    `apply` without variables makes each parameter where it is used. These values become the program's inputs, and what
    made them is dropped.

    Returns:
      (shapes, (program, result)), or None where that is not what `init` and then `apply` would give: parameters made
      inside a scan or vmap, other collections than running statistics, random streams that are not known by name,
      modules that do otherwise while they are initialized.
    """
    results: list[Any] = []
    kinds: set[type] = set()

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        kinds.add(type(context.module))
        return call(*args, **kwargs)

    def both(make: Any, noise: Any, arrays: Any) -> Any:
        inner_args, inner_kwargs = arguments.restore(arrays)
        result, variables = model.apply(
            {}, *inner_args, rngs={"params": make, "dropout": noise}, mutable=DenyList("intermediates"), method=method,
            **inner_kwargs,
        )  # pyright: ignore[reportGeneralTypeIssues]  # fmt: skip
        results.append(result)
        params = variables.get("params", {})
        return arrays_in(result), params, {k: v for k, v in variables.items() if k != "params"}

    try:
        with nn.intercept_methods(note):
            closed, (outputs, params, state) = jaxprs.jaxpr_of(both, key, key, arguments.abstract)
    except Exception:  # told with its reason by `init`
        return None
    if not set(state) <= set(_ALWAYS_THERE) or any(map(_asks, kinds)):
        return None
    program = jaxprs.flatten(closed)
    make, noise, *inputs = program.inputs
    n = len(outputs)
    variables = program.outputs[n:]
    reads = [*variables, noise, *inputs]
    whole = program.returning(program.outputs[:n])
    cut = whole.reading(reads)
    if cut is None or any(make in op.inputs for op in cut.ops):
        return None
    used = {v for op in cut.ops for v in op.inputs} | set(cut.outputs)
    n = len(jax.tree.leaves(params))
    if not used.issuperset(variables[:n]):
        return None  # unused, or used in another form than the one that is kept
    read = [v for v in variables[n:] if v in used]
    if read and not set(read).isdisjoint(whole.following(inputs)):
        return None  # statistics that are updated and then read
    shapes = {"params": params, **state} if params or not state else state
    return shapes, (cut, results[0])


@functools.cache
def _asks(kind: type) -> bool:
    """Whether a module's own code asks if it is being initialized: what it does then may be another thing. BatchNorm
    asks only whether to keep its statistics."""
    own = (c for c in kind.__mro__ if issubclass(c, nn.Module) and c not in (nn.Module, nn.BatchNorm))
    methods = (inspect.unwrap(f) for c in own for f in vars(c).values() if callable(f))
    return any("is_initializing" in _names(f.__code__) for f in methods if inspect.isfunction(f))


def _names(code: CodeType) -> set[str]:
    """The names that a function and those in it use."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))
