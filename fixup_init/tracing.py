"""A model and its arguments -> its Graph, its normalizations and its residual sums."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fixup_init import frameworks, graph, jaxprs, normalization, residual
from fixup_init.frameworks import Application, ModelError
from fixup_init.frameworks.application import arrays_in, path_of
from fixup_init.program import Program

__all__ = ["NORMALIZATION", "Traced", "check_normalization", "trace", "uncollected", "without_normalization"]

NORMALIZATION = ("kept", "removed", "affine")


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """One trace of a model and what was found in it; `restore` gives the model's result its arrays."""

    application: Application
    restore: Callable[[Sequence[Any]], Any]
    graph: graph.Graph
    norms: tuple[normalization.Norm, ...]
    residuals: tuple[residual.Residual, ...]
    undecided: tuple[residual.Undecided, ...]


def trace(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], normalization_: str = "kept") -> Traced:
    """Traces a model on abstract values and finds its structure; nothing is allocated.

    Args:
      model: Linen module, NNX module or `Function`.
      args: positional arguments after the key.
      kwargs: keyword arguments.
      normalization_: "kept", "removed" to bypass every normalization that is found, or "affine" to bypass all of it but
        its scale and bias.

    Raises:
      ModelError: the model fails on these inputs, or returns no array.
    """
    check_normalization(normalization_)
    with uncollected():
        traced = _trace(model, args, kwargs)
        return without_normalization(traced, normalization_)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pauses garbage collection: a trace makes millions of objects and drops few, and looking through them again and
    again takes an eighth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _trace(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    application = frameworks.adapt(model, args, kwargs)

    arguments = (application.params, application.state, application.noise, application.inputs.abstract)
    program, result = application.traced or _program(application, arguments, args, kwargs)
    if not program.outputs:
        raise ModelError(
            f"{application.name} returned {_shown(result)}, which holds no array. The structure is that of what "
            "leads to an output: let the model return an array or a tree of arrays (method= picks another method)."
        )
    leaves = [
        graph.Leaf(path_of(path), tuple(leaf.shape), leaf.dtype, kind)
        for kind, tree in zip(("param", "state", "noise"), arguments[:3], strict=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    leaves += [
        graph.Leaf(name, tuple(a.shape), a.dtype, "noise" if _is_key(a) else "input")
        for name, a in zip(application.inputs.names, application.inputs.abstract, strict=True)
    ]
    return _understood(application, _restorer(result), program, leaves)


def _program(application: Application, arguments: Any, args: Any, kwargs: Any) -> tuple[Program, Any]:
    results: list[Any] = []

    def arrays_of(*a: Any) -> Any:
        results.append(application.apply(*a))
        return arrays_in(results[0])

    try:
        closed, _ = jaxprs.jaxpr_of(arrays_of, *arguments)
    except Exception as error:
        raise ModelError(frameworks.failed(application.name, "traced", args, kwargs, error)) from error
    return jaxprs.flatten(closed), results[0]


def check_normalization(value: str) -> None:
    if value not in NORMALIZATION:
        raise ValueError(f"normalization={value!r}: expected one of {', '.join(map(repr, NORMALIZATION))}.")


def without_normalization(traced: Traced, which: str = "removed", run: bool = False) -> Traced:
    """The same trace with every normalization bypassed.

    Args:
      traced: the trace.
      which: "removed", or "affine" to leave its scale and bias; with "kept" nothing is done.
      run: whether it is to run on arrays; refuses where a normalization lies inside of what is bound whole.
    """
    if which == "kept":
        return traced
    if run:
        normalization.check_bypass(traced.graph, traced.norms)
    leaves = [traced.graph.leaves[v] for v in traced.graph.program.inputs]
    bypass = normalization.remove if which == "removed" else normalization.keep_affine
    return _understood(traced.application, traced.restore, bypass(traced.graph, traced.norms), leaves)


def _restorer(result: Any) -> Callable[[Sequence[Any]], Any]:
    leaves, tree = jax.tree.flatten(result)
    where = [k for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    held = [None if k in set(where) else leaf for k, leaf in enumerate(leaves)]  # no tracer outlives its trace

    def restore(arrays: Sequence[Any]) -> Any:
        filled = list(held)
        for k, array in zip(where, arrays, strict=True):
            filled[k] = array
        return jax.tree.unflatten(tree, filled)

    return restore


def _understood(
    application: Application, restore: Callable[[Sequence[Any]], Any], program: Program, leaves: list[graph.Leaf]
) -> Traced:
    found = graph.build(program, leaves)
    norms = normalization.find(found)
    residuals, undecided = residual.find(found, norms)
    return Traced(application, restore, found, norms, residuals, undecided)


def _shown(result: Any) -> str:
    text = repr(result)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))
