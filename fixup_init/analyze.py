"""`fi.analyze` and `fi.compare`: the measured drift of a model, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fixup_init import blocks, frameworks, schemes, statistics, taps
from fixup_init.frameworks import ModelError
from fixup_init.frameworks.application import path_of
from fixup_init.initialize import draw
from fixup_init.propagation import Comparison, Propagation, Row
from fixup_init.sample import typed_key
from fixup_init.schemes import Scheme
from fixup_init.structure import of_trace
from fixup_init.tracing import Traced, check_normalization, trace, without_normalization

__all__ = ["CASES", "DataError", "analyze", "compare"]

Probe = Literal["auto", "output", "head"]
Progress = Callable[[str, int, int], None]

# (scheme, normalization): normalized; the same with normalization taken out; and with Fixup instead.
CASES: tuple[tuple[str, str], ...] = (("model", "kept"), ("model", "removed"), ("fixup", "removed"))


class DataError(ValueError):
    """Input data that cannot be measured with."""


def analyze(
    model: Any,
    variables: Any,
    *args: Any,
    normalization: str = "kept",
    probe: Probe = "auto",
    key: Any = None,
    label: str | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Propagation:
    """Measures how a signal and its cotangent drift through a model.

    The forward pass runs on the given inputs; the backward pass starts from a standard normal probe instead of a loss,
    because a zero head makes every gradient of a loss zero. Both run block by block (`fixup_init.blocks`).

    Args:
      model: a Flax Linen module, a Flax NNX module or `fi.Function(apply, params)`.
      variables: what `fi.init` or `model.init` returned; for an NNX module or a `Function` None stands for its own.
      *args: the model's own arguments; a `jax.ShapeDtypeStruct` stands for standard normal data (floating) or uniform
        integers of that shape.
      normalization: "kept", or "removed" to bypass every normalization.
      probe: where the backward pass starts: "output", "head" (the input of the head) or "auto" (the input of the head
        where its kernel is zero, else the output).
      key: for data, probe and the model's own noise (dropout); `jax.random.key(0)` by default.
      label: name of the result; the model's name by default.
      progress: called with (what, done, in all) as blocks finish.
      **kwargs: the model's own keyword arguments.

    Returns:
      A `Propagation`.

    Raises:
      ModelError: the model cannot be traced on these inputs, or the variables are not its own.
      DataError: an input holds values that are not finite.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> from fixup_init.models.resnet import cifar_resnet
      >>> model, x = cifar_resnet(20, norm="fixup"), jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
      >>> fi.analyze(model, fi.init(model, jax.random.key(0), x), x).drift("forward").verdict
      'flat'
    """
    check_normalization(normalization)
    traced = trace(model, args, kwargs)
    if normalization == "removed":
        traced = without_normalization(traced, run=True)
    if variables is None:
        n = len(jax.tree.leaves((traced.application.params, traced.application.state)))
        own = traced.application.initial(jax.random.key(0), [True] * n)
        tree = jax.tree.structure((traced.application.params, traced.application.state))
        params, state = jax.tree.unflatten(tree, own)
    else:
        params, state = _separate(traced, variables)
    key = typed_key(0 if key is None else key)
    return measure(traced, params, state, probe, key, label or traced.application.name, progress)


def compare(
    model: Any,
    *args: Any,
    cases: Sequence[tuple[str | Scheme, str]] = CASES,
    key: Any = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Comparison:
    """Measures a model (or several) under several schemes, with normalization kept or removed, side by side.

    Every case draws its parameters from the same key, sees the same data and starts its backward pass at the input of
    the head, so that curves can be laid over each other.

    Args:
      model: a model, or a dictionary of label and model.
      *args: the model's own arguments, as for `fi.analyze`.
      cases: pairs (scheme, "kept" or "removed"); by default the model's own initialization with its normalization, the
        same without, and Fixup without. For a model without normalizations each scheme counts once.
      key: for parameters, data and probe; `jax.random.key(0)` by default.
      progress: called with (what, done, in all).
      **kwargs: the model's own keyword arguments.

    Returns:
      A `Comparison`; its labels are such as "model, kept" or "fixup, removed".

    Raises:
      ModelError, StructureError, DataError, ValueError: as `fi.init` and `fi.analyze`.
    """
    key = typed_key(0 if key is None else key)
    models = model if isinstance(model, Mapping) else {"": model}
    for _, normalization in cases:
        check_normalization(normalization)
    measured = []
    for name, one in models.items():
        kept = trace(one, args, kwargs)
        removed = without_normalization(kept, run=True) if any(n == "removed" for _, n in cases) else kept
        wanted = [(schemes.find(scheme), normalization) for scheme, normalization in cases]
        if not kept.norms:  # nothing to remove: each scheme once
            wanted = list({scheme.name: (scheme, "kept") for scheme, _ in wanted}.values())
        for found, normalization in wanted:
            traced = kept if normalization == "kept" else removed
            params, state = draw(traced, found.plan(of_trace(traced)), key)
            label = ", ".join(s for s in (name, found.name, normalization if kept.norms else "") if s)
            measured.append(measure(traced, params, state, "head", key, label, progress))
    return Comparison(tuple(measured))


def measure(
    traced: Traced, params: Any, state: Any, probe: Probe, key: Any, label: str, progress: Progress | None = None
) -> Propagation:
    """Measures a traced model with concrete parameters."""
    graph = traced.graph
    program = graph.program
    placed = taps.place(traced)
    made = program.made() | set(graph.inputs)
    tapped = [t for t in placed if t.value in made]
    hidden = dict.fromkeys(t.name for t in placed if t.value not in made and t.kind in ("weight", "sum"))
    axes = taps.channels(graph, list(dict.fromkeys(t.value for t in tapped)))
    structure = of_trace(traced)
    starts, probe_name = _probe(traced, set(structure.heads), params, probe)
    values = _values(traced, params, state, key)
    cut = blocks.cut(graph, axes, keep=starts)

    def report(what: str) -> Callable[[int, int], None]:
        return lambda done, of: progress(f"{label}: {what}", done, of) if progress is not None else None

    env, forward = blocks.forward(graph, cut, values, report("forward"))
    cotangents = {
        v: jax.random.normal(jax.random.fold_in(key, k), program.shape(v), program.dtype(v))
        for k, v in enumerate(starts)
    }
    pulled, backward = blocks.backward(graph, cut, env, cotangents, report("backward"))
    for v in graph.inputs:
        if v in axes:
            forward[v] = np.asarray(statistics.measure(env[v], axes[v]))
            if v in pulled:
                backward[v] = np.asarray(statistics.measure(pulled[v], axes[v]))
    rows: list[Row] = []
    sums = 0
    counted: set[tuple[int, tuple[int, ...]]] = set()
    for tap, at in taps.unrolled(tapped):
        if tap.kind == "sum" and (tap.value, at) not in counted:
            counted.add((tap.value, at))
            sums += 1
        rows.append(
            Row(
                tap.kind, tap.name, tap.scope, sums, program.shape(tap.value), str(program.dtype(tap.value)),
                at[-1] if at else None, statistics.read(forward[tap.value][at]),
                statistics.read(backward[tap.value][at]) if tap.value in backward else None,
            )
        )  # fmt: skip
    return Propagation(label, traced.application.name, structure.num_branches, tuple(rows), probe_name, tuple(hidden))


def _probe(traced: Traced, heads: set[str], params: Any, probe: Probe) -> tuple[tuple[int, ...], str]:
    """Values at which the backward pass starts, and what to call them."""
    if probe not in ("auto", "output", "head"):
        raise ValueError(f"probe={probe!r}: expected 'auto', 'output' or 'head'.")
    graph = traced.graph
    program = graph.program
    outputs = tuple(
        v for v in dict.fromkeys(program.outputs)
        if graph.is_activation(v) and jnp.issubdtype(program.dtype(v), jnp.inexact)
    )  # fmt: skip
    nodes = [n for n, layer in graph.layers.items() if layer.path in heads and layer.kind != "embedding"]
    if probe == "output" or not nodes:
        return outputs, "output"
    if probe == "auto":
        leaves = dict(zip(program.inputs, jax.tree.leaves(params), strict=False))
        if any(bool(jnp.any(leaves[v])) for n in nodes for v in graph.layers[n].leaves):
            return outputs, "output"
    before = []
    for n in nodes:
        op = graph.op(n)
        assert op is not None
        before.extend(v for v in op.inputs if graph.is_activation(v))
    return tuple(dict.fromkeys(before)), "input of the head"


def _separate(traced: Traced, variables: Any) -> tuple[Any, Any]:
    """(params, state) of the user's variables, checked against what the model takes on these inputs."""
    application = traced.application
    try:
        params, state = application.separate(variables)
    except Exception as error:
        raise ModelError(
            f"variables={type(variables).__name__} are not those of {application.name}: {error}. Give what "
            "fi.init(model, key, *inputs) or the framework's own init returned."
        ) from error
    used = {v for op in traced.graph.program.ops for v in op.inputs} | set(traced.graph.program.outputs)
    needed = {leaf.path for v, leaf in traced.graph.leaves.items() if leaf.kind == "param" or v in used}
    checked = []
    for what, expected, given in (("parameters", application.params, params), ("state", application.state, state)):
        want, have = _flat(expected), _flat(given)
        odd = sorted(path for path in want if path in needed and path not in have)
        odd += sorted(path for path in have if path not in want and what == "parameters")
        if odd:
            where = "missing from the variables" if odd[0] in want else "in the variables, but not in the model"
            raise ModelError(
                f"The variables' {what} are not those of {application.name} on inputs "
                f"({frameworks.describe(application.inputs.abstract)}): {len(odd)} differ, first `{odd[0]}`, {where}. "
                "Make them with fi.init(model, key, *inputs) on the same model."
            )
        for path, leaf in want.items():
            if path in have and tuple(np.shape(have[path])) != tuple(leaf.shape):
                raise ModelError(
                    f"`{path}` of the variables has shape {tuple(np.shape(have[path]))}; {application.name} on inputs "
                    f"({frameworks.describe(application.inputs.abstract)}) expects {tuple(leaf.shape)}. Give inputs of "
                    "the shape that the variables were made for, or make them anew with fi.init."
                )
        filled = [have[path] if path in have else jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in want.items()]
        checked.append(jax.tree.unflatten(jax.tree.structure(expected), filled))
    return checked[0], checked[1]


def _flat(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _values(traced: Traced, params: Any, state: Any, key: Any) -> dict[int, Any]:
    """Arrays for the program's inputs; data is drawn where an input is abstract."""
    application, graph = traced.application, traced.graph
    noise = jax.tree.map(
        lambda leaf: key if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros(leaf.shape, leaf.dtype),
        application.noise,
    )
    arrays = []
    for k, (name, array) in enumerate(zip(application.inputs.names, application.inputs.arrays, strict=True)):
        if isinstance(array, jax.ShapeDtypeStruct):
            arrays.append(_data(traced, array, jax.random.fold_in(key, 1000 + k)))
            continue
        if jnp.issubdtype(array.dtype, jnp.inexact) and not (finite := np.isfinite(np.asarray(array))).all():
            bad = int(finite.size - finite.sum())
            raise DataError(
                f"`{name}` ({frameworks.describe(array)}) holds {bad} values that are not finite, the first at index "
                f"{tuple(int(i) for i in np.argwhere(~finite)[0])}. Clean the data (np.isfinite finds them), or give a "
                "jax.ShapeDtypeStruct to measure with standard normal data."
            )
        arrays.append(array)
    flat = [*jax.tree.leaves(params), *jax.tree.leaves(state), *jax.tree.leaves(noise), *arrays]
    return {
        v: x if jnp.issubdtype(graph.program.dtype(v), jax.dtypes.prng_key) else jnp.asarray(x, graph.program.dtype(v))
        for v, x in zip(graph.program.inputs, flat, strict=True)
    }


def _data(traced: Traced, spec: jax.ShapeDtypeStruct, key: Any) -> Any:
    if jnp.issubdtype(spec.dtype, jnp.inexact):
        return jax.random.normal(key, spec.shape, spec.dtype)
    if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
        return jax.random.split(key, spec.shape) if spec.shape else key
    if spec.dtype == jnp.bool_:
        return jnp.ones(spec.shape, spec.dtype)
    tables = [layer.leaves[0] for layer in traced.graph.layers.values() if layer.kind == "embedding"]
    rows = [traced.graph.leaves[table].shape[0] for table in tables]
    return jax.random.randint(key, spec.shape, 0, min(rows, default=2), spec.dtype)
