"""A model and its arguments -> a pure function with abstract parameters."""

from __future__ import annotations

from typing import Any

import jax

from fixup_init.frameworks import function
from fixup_init.frameworks.application import Application, ModelError, is_array
from fixup_init.frameworks.function import Function

__all__ = ["Application", "Function", "ModelError", "adapt", "describe"]


def adapt(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Application:
    """The pure function of a Linen module, an NNX module or a `Function`.

    Raises:
      TypeError: the model is none of these.
      ModelError: it cannot be initialized, even abstractly, on these inputs.
    """
    if isinstance(model, Function):
        _need_arrays(getattr(model.apply, "__name__", "The function"), args, kwargs)
        return function.adapt(model, args, kwargs)
    import flax.linen
    from flax import nnx

    if not isinstance(model, (flax.linen.Module, nnx.Module)):
        hint = " Make an instance: Model(...)." if isinstance(model, type) else ""
        raise TypeError(
            f"model is {model!r} of type {type(model).__name__}; expected a Flax Linen module, a Flax NNX module or "
            f"fixup_init.Function(apply, params).{hint}"
        )
    _need_arrays(type(model).__name__, args, kwargs)
    try:
        if isinstance(model, flax.linen.Module):
            from fixup_init.frameworks import linen

            return linen.adapt(model, args, kwargs)
        from fixup_init.frameworks import nnx as module

        return module.adapt(model, args, kwargs)
    except Exception as error:
        raise ModelError(failed(type(model).__name__, "initialized", args, kwargs, error)) from error


def describe(tree: Any) -> str:
    """`float32[8,32,32,3]` for arrays, `repr` for the rest."""

    def one(x: Any) -> str:
        return f"{x.dtype}[{','.join(map(str, x.shape))}]" if is_array(x) else repr(x)

    return ", ".join(one(x) for x in jax.tree.leaves(tree)) or "no arrays"


def _need_arrays(name: str, args: Any, kwargs: Any) -> None:
    if not any(is_array(x) for x in jax.tree.leaves((args, kwargs))):
        raise ModelError(
            f"{name} got no array to trace with, only ({describe((args, kwargs))}). Give the arguments that the model "
            "takes, as arrays or as jax.ShapeDtypeStruct(shape, dtype)."
        )


def failed(name: str, what: str, args: Any, kwargs: Any, error: Exception) -> str:
    return (
        f"{name} could not be {what} on inputs ({describe((args, kwargs))}): {type(error).__name__}: {error}\n"
        "Give the arguments that the model itself takes after the key (their shapes with the batch axis, dtypes, and "
        "flags such as train=True)."
    )
