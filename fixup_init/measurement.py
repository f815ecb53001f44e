"""One measurement: a traced model and its parameters -> rows, forward and backward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fixup_init import blocks, cutting, frameworks, series, statistics, taps
from fixup_init.cutting import Block
from fixup_init.frameworks import ModelError
from fixup_init.gathering import Gathering
from fixup_init.propagation import NOT_RUN, Propagation, Row, Weight
from fixup_init.structure import of_trace
from fixup_init.tracing import Traced

__all__ = [
    "DataError", "Loss", "Probe", "Progress", "Setup", "loss_cotangents", "measure", "prepare", "probe_values", "run",
    "values_of",
]  # fmt: skip

Probe = Literal["auto", "output", "head"]
Progress = Callable[[str, int, int], None]
Loss = Callable[[Any], Any]


_SHARDED = "what one of {} devices holds: means over them"


class DataError(ValueError):
    """Input data that cannot be measured with."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a measurement needs but for the parameters: taps with their axes, and the blocks."""

    traced: Traced
    taps: tuple[taps.Tap, ...]
    hidden: tuple[str, ...]  # names of what runs inside of a region that is run whole
    layouts: dict[int, statistics.Layout]
    blocks: tuple[Block, ...]
    starts: tuple[int, ...]  # where the backward pass starts
    probe: str
    num_branches: int


def prepare(traced: Traced, params: Any, probe: Probe) -> Setup:
    """Cuts a traced model for a measurement; `params` tell where its head is zero."""
    graph = traced.graph
    placed = taps.place(traced)
    made = graph.program.made() | set(graph.inputs)
    tapped = tuple(t for t in placed if t.value in made)
    hidden = dict.fromkeys(t.name for t in placed if t.value not in made and t.kind in ("weight", "sum"))
    layouts = taps.layouts(graph, tapped)
    structure = of_trace(traced)
    starts, name = probe_values(traced, set(structure.heads), params, probe)
    cut = cutting.cut(graph, layouts, keep=starts)
    return Setup(traced, tapped, tuple(hidden), layouts, cut, starts, name, structure.num_branches)


def measure(
    traced: Traced, params: Any, state: Any, probe: Probe, key: Any, label: str, progress: Progress | None = None,
    loss: Loss | None = None,
) -> Propagation:  # fmt: skip
    """Measures a traced model with concrete parameters."""
    setup = prepare(traced, params, "output" if loss is not None else probe)
    return run(setup, params, state, key, label, progress, loss)[0]


def run(
    setup: Setup, params: Any, state: Any, key: Any, label: str, progress: Progress | None = None,
    loss: Loss | None = None, gradients: bool = False,
) -> tuple[Propagation, Any]:  # fmt: skip
    """One measurement, and the gradient in the parameters (a tree of arrays) where it is wanted."""
    traced = setup.traced
    graph, program = traced.graph, traced.graph.program

    def report(what: str) -> Callable[[int, int], None]:
        return lambda done, of: progress(f"{label}: {what}", done, of) if progress is not None else None

    values = values_of(traced, params, state, key)
    env, forward = blocks.forward(graph, setup.blocks, values, report("forward"))
    starting = _cotangents(setup, env, key) if loss is None else loss_cotangents(traced, env, loss)
    leaves = program.inputs[: len(jax.tree.leaves(params))]
    sized = dict.fromkeys(v for t in setup.taps for v in t.leaves)
    pulled = blocks.backward(
        graph, setup.blocks, env, starting, report("backward"), sized, leaves if gradients else ()
    )  # fmt: skip
    backward = dict(pulled.statistics)
    for statistics_of, arrays in ((forward, env), (backward, pulled.cotangents)):
        gathering = Gathering()
        for v in graph.inputs:
            if v in setup.layouts and v in arrays:
                gathering.add_array(v, arrays[v], setup.layouts[v])
        statistics_of |= gathering.read()
    rows: list[Row] = []
    sharded = program.sharded()
    place = series.places(graph, setup.taps)
    leading = series.leading(graph, starting)
    index = {id(tap): k for k, tap in enumerate(setup.taps)}
    sums = 0
    counted: set[tuple[int, tuple[int, ...]]] = set()
    for tap, passes in taps.unrolled(setup.taps):
        at = tuple(l.length - 1 - k if l.reverse else k for l, k in zip(tap.loops, passes, strict=True))
        ran = bool(forward[tap.value][at][0])
        pulls = graph.node_of[tap.value] in leading  # else it lies behind the probe
        if ran and tap.kind == "sum" and (tap.value, at) not in counted:
            counted.add((tap.value, at))
            sums += 1
        rows.append(
            Row(
                tap.kind, tap.name, tap.scope, sums, program.shape(tap.value), str(program.dtype(tap.value)),
                passes[-1] if passes else None, statistics.read(forward[tap.value][at]) if ran else None,
                statistics.read(backward[tap.value][at]) if ran and pulls and tap.value in backward else None,
                _weight([pulled.norms[v] for v in tap.leaves if v in pulled.norms], at) if pulls else None,
                NOT_RUN if not ran else _SHARDED.format(sharded[tap.value]) if sharded.get(tap.value, 1) > 1 else "",
                place(index[id(tap)], passes),
            )
        )  # fmt: skip
    name = "loss" if loss is not None else setup.probe
    made = Propagation(
        label, traced.application.name, setup.num_branches, tuple(rows), name, setup.hidden, notes=_notes(setup)
    )
    if not gradients:
        return made, None
    flat = [
        pulled.gradients[v] if v in pulled.gradients else jnp.zeros_like(x)
        for v, x in zip(leaves, jax.tree.leaves(params), strict=True)
    ]
    return made, jax.tree.unflatten(jax.tree.structure(params), flat)


def _weight(norms: list[np.ndarray], at: tuple[int, ...]) -> Weight | None:
    """Of a layer's leaves together, in one pass of the scans around it."""
    if not norms:
        return None
    each = [packed[(..., *at[: packed.ndim - 2])] for packed in norms]  # (gradient or parameter, packed)
    gradient, parameter = (math.hypot(*(statistics.read_norm(e[k]) for e in each)) for k in (0, 1))
    return Weight(parameter, gradient)


_WHOLE = 32  # weight layers


def _notes(setup: Setup) -> tuple[str, ...]:
    largest = max((b.layers for b in setup.blocks), default=0)
    if largest <= _WHOLE:
        return ()
    return (
        f"{largest} of {len(setup.traced.graph.layers)} weight layers were compiled as one block: several activations "
        "are alive everywhere between them (dense skips), or one conditional or shard_map holds them, so that compile "
        "time and memory grow with them.",
    )


def _cotangents(setup: Setup, env: Mapping[int, Any], key: Any) -> dict[int, Any]:
    """Standard normal, but 1 for a single number, such as a loss."""
    found: dict[int, Any] = {}
    for k, v in enumerate(setup.starts):
        x = env[v]
        found[v] = jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype) if x.ndim else jnp.ones_like(x)
    return found


def loss_cotangents(traced: Traced, env: Mapping[int, Any], loss: Loss) -> dict[int, Any]:
    """The gradient of a loss in the model's results."""
    program = traced.graph.program
    arrays = [env[v] for v in program.outputs]
    smooth = [k for k, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.inexact)]

    def total(varied: list[Any]) -> Any:
        filled = list(arrays)
        for k, a in zip(smooth, varied, strict=True):
            filled[k] = a
        return loss(traced.restore(filled))

    try:
        value, pull = jax.vjp(total, [arrays[k] for k in smooth])
    except Exception as error:
        raise ModelError(
            f"loss= failed on the result of {traced.application.name}, {frameworks.describe(arrays)}: {error}. Give a "
            "function of what the model returns, to one number."
        ) from error
    if jnp.shape(value) or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ModelError(
            f"loss= returned {frameworks.describe(value)}: expected one floating number. Take its mean or sum."
        )
    found: dict[int, Any] = {}
    for k, ct in zip(smooth, pull(jnp.ones_like(value))[0], strict=True):
        v = program.outputs[k]
        found[v] = found[v] + ct if v in found else ct
    return found


def probe_values(traced: Traced, heads: set[str], params: Any, probe: Probe) -> tuple[tuple[int, ...], str]:
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


def values_of(traced: Traced, params: Any, state: Any, key: Any) -> dict[int, Any]:
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
