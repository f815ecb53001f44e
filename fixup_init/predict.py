"""`fi.predict`: the drift that theory predicts, from shapes and a plan; no data, no parameters, no arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fixup_init import jaxprs, moments, schemes, series, taps
from fixup_init.branch import arms_of
from fixup_init.frameworks import ModelError
from fixup_init.graph import Graph, Leaf, ancestors
from fixup_init.measurement import Probe, probe_values
from fixup_init.moments import Interpreter, Node, Normalization, Value
from fixup_init.plan import Entry, Plan
from fixup_init.program import Op, Program
from fixup_init.propagation import NOT_RUN, Propagation, Row, Statistics
from fixup_init.quadrature import Quantile
from fixup_init.schemes import Scheme
from fixup_init.structure import of_trace
from fixup_init.tracing import Traced, check_normalization, trace, uncollected, without_normalization

__all__ = ["predict"]


def predict(
    model: Any,
    *args: Any,
    scheme: str | Scheme | Plan = "fixup",
    normalization: str = "kept",
    probe: Probe = "auto",
    label: str | None = None,
    **kwargs: Any,
) -> Propagation:
    """Predicts how a signal and its cotangent drift through a model, in expectation over parameters, data and probe.

    Rows are those of `fi.analyze`, one by one. An operation without a rule is named in the note of every row behind it
    ("unknown: ..."), whose figures are None; what is approximate says so and why. Nothing is allocated but what the
    program holds as a constant.

    Args:
      model: a Flax Linen module, a Flax NNX module or `fi.Function(apply, params)`.
      *args: the model's own arguments; a `jax.ShapeDtypeStruct` stands for standard normal data (floating) or uniform
        integers of that shape; of an array its first two moments are taken.
      scheme: a name, a scheme object or a `Plan`; where the model's own initializers decide, their program is read.
      normalization: "kept", "removed" to bypass every normalization, or "affine" to leave its scale and bias.
      probe: where the backward pass starts, with a standard normal cotangent: "output", "head" (the input of the head)
        or "auto" (the input of the head where its kernel is zero, else the output).
      label: name of the result; the model's name by default.
      **kwargs: the model's own keyword arguments.

    Returns:
      A `Propagation` of kind "predicted". Its variances are over weights, data and entries; `squared_channel_mean` is
      what examples and positions have in common; other figures are NaN.

    Raises:
      ModelError: the model cannot be traced on these inputs.
      StructureError: the scheme depends on something that the graph leaves open.
      ValueError: the scheme is not known, or a given plan does not fit the model.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> from fixup_init.models.resnet import cifar_resnet
      >>> from fixup_init.predict import predict
      >>> x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
      >>> predict(cifar_resnet(20, norm="none"), x, scheme="he").drift("forward").verdict
      'grows'

    References:
      Schoenholz et al. 2017 (arXiv:1611.01232), Xiao et al. 2018 (arXiv:1806.05393), Yang et al. 2019
      (arXiv:1902.08129).
    """
    check_normalization(normalization)
    with uncollected():
        traced = trace(model, args, kwargs)
        traced = without_normalization(traced, normalization)
        planned = scheme if isinstance(scheme, Plan) else schemes.find(scheme).plan(of_trace(traced))
        return of_plan(traced, planned, probe, label or traced.application.name)


def of_plan(traced: Traced, planned: Plan, probe: Probe, label: str) -> Propagation:
    """The prediction for a traced model whose parameters a plan draws."""
    graph = traced.graph
    program = graph.program
    placed = taps.place(traced)
    made = program.made() | set(graph.inputs)
    tapped = [t for t in placed if t.value in made]
    hidden = dict.fromkeys(t.name for t in placed if t.value not in made and t.kind in ("weight", "sum"))
    structure = of_trace(traced)
    parameters = _leaves(traced, planned)
    starts, probe_name = probe_values(traced, set(structure.heads), _nonzero(program, parameters), probe)
    interpreter = Interpreter(program, _rows_of_tables(traced), {t.value for t in tapped} | set(starts))
    interpreter.is_weight = graph.is_parameter
    interpreter.is_activation = graph.is_activation
    interpreter.values.update(parameters)
    interpreter.paths = _paths(graph, parameters)
    interpreter.values.update(_data(traced, interpreter.rows))
    _install(traced, interpreter)
    for v in graph.inputs:
        value = interpreter.values[v]
        node = None
        if not value.unknown and jnp.issubdtype(program.dtype(v), jnp.inexact):
            node = Node(next(interpreter.nodes), value.shape, [])
            value.slopes = {node: [(moments.ones(value.rank), {})]}
        interpreter.tapped[v, ()] = (node, value)
    interpreter.run(program.ops)
    spreads = moments.of_values(node for node, _ in interpreter.tapped.values() if node is not None)
    cotangents = _backward(interpreter, starts, spreads)
    leading = series.leading(graph, starts)
    broken = _broken(traced, interpreter, leading)
    channels = _channels(graph, tapped)
    place = series.places(graph, tapped)
    index = {id(tap): k for k, tap in enumerate(tapped)}
    rows: list[Row] = []
    sums = 0
    counted: set[tuple[int, tuple[int, ...]]] = set()
    for tap, at in taps.unrolled(tapped):
        ran = _runs(graph, interpreter, tap, at)
        if ran and tap.kind == "sum" and (tap.value, at) not in counted:
            counted.add((tap.value, at))
            sums += 1
        node, value = interpreter.tapped.get(
            (tap.value, at), (None, moments.unknown((), "unknown: it was not reached"))
        )
        forward = backward = None
        notes = {note for note in value.notes if not isinstance(note, moments.Trait)}
        if not ran:
            notes = {NOT_RUN}
        elif value.unknown:
            notes = {value.unknown}
        elif value.tail:
            notes = {f"unknown: {value.tail}"}
        else:
            spread = spreads[node].deviation if node in spreads else math.nan
            with np.errstate(all="ignore"):
                forward = dataclasses.replace(_forward(value, channels[tap.value]), spread=spread)
            if not math.isfinite(forward.second_moment):
                forward, notes = None, {"unknown: its moments are not finite"}
            if forward is None:
                pass
            elif graph.node_of[tap.value] in broken:
                notes.add("backward " + broken[graph.node_of[tap.value]])
            elif node is not None and node in cotangents:
                cotangent = cotangents[node]
                backward = _statistics(np.zeros(()), cotangent.lattice, node.shape, channels[tap.value])
                other = next(iter(value.imaginary.slopes), None) if value.imaginary is not None else None
                if other is not None and other in cotangents:
                    part = _statistics(np.zeros(()), cotangents[other].lattice, other.shape, channels[tap.value])
                    backward = _mean(backward, part)
                backward = dataclasses.replace(backward, spread=cotangent.spread)
                notes |= {_of_gradient(note, notes) for note, share in cotangent.notes.items() if share > 0.5}
                if not math.isfinite(backward.variance):
                    backward = None
                    notes.add("backward unknown: a rule was not found on the way")
            elif graph.node_of[tap.value] in leading:  # by ways that are zero
                backward = Statistics(0.0, 0.0, 0.0)
        rows.append(
            Row(
                tap.kind, tap.name, tap.scope, sums, program.shape(tap.value), str(program.dtype(tap.value)),
                at[-1] if at else None, forward, backward, note="; ".join(sorted(notes)),
                place=place(index[id(tap)], at),
            )
        )  # fmt: skip
    return Propagation(
        label, traced.application.name, structure.num_branches, tuple(rows), probe_name, tuple(hidden), "predicted"
    )


def _runs(graph: Graph, interpreter: Interpreter, tap: taps.Tap, at: tuple[int, ...]) -> bool:
    """Whether the arms of conditionals that a tap stands in may run in a pass."""
    return all(
        interpreter.taken.get((arm.switch, at[:n]), arm.index) == arm.index
        for arm in arms_of(graph, graph.node_of[tap.value]).values()
        for n in range(len(at) + 1)
    )


def _backward(
    interpreter: Interpreter, starts: Sequence[int], spreads: Mapping[Node, moments.Spread]
) -> dict[Node, moments.Cotangent]:
    found: dict[Node, np.ndarray] = {}
    for v in starts:
        node, value = interpreter.tapped.get((v, ()), (None, None))
        if node is None or value is None:
            continue
        lattice = np.zeros((2,) * value.rank + (1,) * value.rank)
        lattice[(0,) * value.rank] = 1.0
        lattice = moments.settled(lattice, value.shape)
        found[node] = found[node] + lattice if node in found else lattice
    return moments.pull_back(found, spreads=spreads)


def _broken(traced: Traced, interpreter: Interpreter, leading: set[int]) -> dict[int, str]:
    """Nodes from which a value that is not known leads to where the backward pass starts, and why it is not."""
    graph = traced.graph
    found: dict[int, str] = {}
    for v, node in graph.node_of.items():
        value = interpreter.values.get(v)
        if node in found or node not in leading or value is None:
            continue
        if value.unknown and moments.INSIDE not in value.unknown:
            for above in ancestors(graph, [node]) or ():
                found.setdefault(above, value.unknown)
    return found


def _of_gradient(note: str, forward: Set[str]) -> str:
    """A note on a gradient, which says so where it does not hold for the value too."""
    return note if note in forward or note.startswith("gradient") else f"gradient {note}"


def _forward(value: Value, channel: int) -> Statistics:
    mean, second = moments.moments_of(value)
    found = _statistics(mean, second, value.shape, channel)
    return found if value.imaginary is None else _mean(found, _forward(value.imaginary, channel))


def _mean(one: Statistics, other: Statistics) -> Statistics:
    """Of the real and the imaginary parts side by side."""
    m = (one.mean + other.mean) / 2
    q = (one.second_moment + other.second_moment) / 2
    return Statistics(m, max(q - m * m, 0.0), (one.squared_channel_mean + other.squared_channel_mean) / 2)


def _statistics(mean: np.ndarray, second: np.ndarray, shape: tuple[int, ...], channel: int) -> Statistics:
    rank = len(shape)
    q = float(second[(0,) * rank].mean())
    m = float(np.mean(mean))
    others = [a for a in range(rank) if a != channel % max(rank, 1)]
    n = math.prod(shape[a] for a in others)
    by_channel = float(moments.total(second, others, shape)[0].mean()) / n**2 if rank else q
    return Statistics(m, max(q - m * m, 0.0), min(max(by_channel, 0.0), q))


def _channels(graph: Any, tapped: Sequence[taps.Tap]) -> dict[int, int]:
    """The axis of channels of each tapped value."""
    found = {}
    for v, layout in taps.layouts(graph, tuple(tapped)).items():
        found[v] = layout.channel if layout.channel is not None else len(graph.program.shape(v)) - 1
    return found


def _rows_of_tables(traced: Traced) -> int:
    layers = traced.graph.layers.values()
    tables = [layer.leaves[0] for layer in layers if layer.kind == "embedding"]
    return min((traced.graph.leaves[t].shape[0] for t in tables), default=2)


# --- what parameters, state and data are ----------------------------------------------------------------------------

_DRAWN = 1 << 22  # entries of a leaf that is drawn where the program of its initializer is not understood


def _leaves(traced: Traced, planned: Plan) -> dict[int, Value]:
    """Parameters, running statistics and keys."""
    graph, application = traced.graph, traced.application
    entries = {e.path: e for e in planned.entries}
    leaves = [(v, leaf) for v, leaf in graph.leaves.items() if leaf.kind in ("param", "state")]
    paths = {leaf.path for _, leaf in leaves if leaf.kind == "param"}
    if paths != set(entries):
        odd = sorted(paths ^ set(entries))
        raise ValueError(
            f"The plan does not fit {application.name}: {len(odd)} paths are in one and not in the other, first "
            f"{odd[0]!r}. Make the plan with fi.plan on this model and these inputs."
        )
    used = {v for op in graph.program.ops for v in op.inputs} | set(graph.program.outputs)
    own = [k for k, (v, leaf) in enumerate(leaves)
           if v in used and (leaf.kind == "state" or entries[leaf.path].distribution == "model")]  # fmt: skip
    found: dict[int, Value] = {}
    for k, value in zip(own, _own(traced, [leaf for _, leaf in leaves], own), strict=True):
        found[leaves[k][0]] = value
    for v, leaf in leaves:
        if v not in found:
            found[v] = _planned(leaf, entries[leaf.path]) if leaf.kind == "param" and leaf.path in entries else (
                moments.unknown(leaf.shape, f"unknown: `{leaf.path}`")
            )  # fmt: skip
    for v, leaf in graph.leaves.items():
        if leaf.kind == "noise":
            found[v] = moments.known(leaf.shape, np.zeros((1,) * len(leaf.shape)))
    return found


def _paths(graph: Graph, parameters: Mapping[int, Value]) -> dict[int, str]:
    """Of every source that a parameter is made of, which parameter."""
    found = {}
    for v, value in parameters.items():
        for s in {s for _, factors in value.terms for s in factors}:
            found.setdefault(s.number, graph.leaves[v].path)
    return found


def _planned(leaf: Leaf, entry: Entry) -> Value:
    if entry.distribution == "constant":
        assert entry.value is not None
        return moments.known(leaf.shape, np.full((1,) * len(leaf.shape), entry.value))
    if entry.std is None:
        return moments.unknown(leaf.shape, f"unknown: the plan says nothing of `{entry.path}`")
    quantile = Quantile.uniform() if entry.distribution == "uniform" else None
    return moments.of_source(moments.gaussian(leaf.shape, entry.std**2, quantile=quantile))


def _own(traced: Traced, leaves: Sequence[Leaf], own: Sequence[int]) -> list[Value]:
    """Leaves that the model's own initializers make: their program is evaluated in the moments domain."""
    if not own:
        return []
    application = traced.application
    wanted = [k in set(own) for k in range(len(leaves))]

    def initial(key: Any) -> list[Any]:
        return [x for x in application.initial(key, wanted) if x is not None]

    try:
        closed, _ = jaxprs.jaxpr_of(initial, jax.eval_shape(lambda: jax.random.key(0)))
    except (ModelError, jax.errors.JAXTypeError, TypeError):
        return [moments.unknown(leaves[k].shape, f"unknown: the model's own `{leaves[k].path}`") for k in own]
    program = jaxprs.flatten(closed)
    interpreter = Interpreter(program)
    for v in program.inputs:
        interpreter.values[v] = moments.known(program.shape(v), np.zeros((1,) * len(program.shape(v))))
    interpreter.run(program.ops)
    found = []
    for k, v in zip(own, program.outputs, strict=True):
        value = interpreter.read(v)
        if v in program.constants:
            value = _held(np.asarray(program.constants[v]))
        elif value.unknown and math.prod(leaves[k].shape) <= _DRAWN:
            one = application.initial(jax.random.key(0), [j == k for j in range(len(leaves))])[k]
            value = _held(np.asarray(one))
        found.append(value)
    return found


def _held(array: np.ndarray) -> Value:
    """An array that a model holds: independent entries, unless it has a mean or a pattern."""
    if array.dtype == object or array.dtype.kind not in "fiub":
        try:
            array = array.astype(np.float32)
        except (TypeError, ValueError):
            return moments.unknown(array.shape, "unknown: a parameter that holds no real numbers")
    wide = array.astype(np.float64)
    random = wide.ndim >= 2 and wide.size >= 64 and len(np.unique(wide.ravel()[:4096])) > 32
    if random and abs(wide.mean()) < 5 * wide.std() / math.sqrt(wide.size):
        return moments.of_source(moments.gaussian(array.shape, float(np.square(wide).mean())))
    return moments.known(array.shape, array)


def _data(traced: Traced, rows: int) -> dict[int, Value]:
    """The inputs."""
    graph, inputs = traced.graph, traced.application.inputs
    given = dict(zip(inputs.names, inputs.arrays, strict=True))
    found: dict[int, Value] = {}
    for v in graph.inputs:
        array, shape = given[graph.leaves[v].path], graph.program.shape(v)
        if not isinstance(array, jax.ShapeDtypeStruct):
            found[v] = _given(np.asarray(array))
        elif jnp.issubdtype(array.dtype, jnp.complexfloating):
            parts = [moments.of_source(moments.gaussian(shape, 0.5)) for _ in range(2)]
            found[v] = moments.of_parts(*parts)
        elif jnp.issubdtype(array.dtype, jnp.floating):
            found[v] = moments.of_source(moments.gaussian(shape, 1.0))
        elif array.dtype == jnp.bool_:
            found[v] = moments.known(shape, np.ones((1,) * len(shape), bool))
        else:
            found[v] = _indices(shape, rows)
    return found


def _given(array: np.ndarray) -> Value:
    """Data: its first two moments, but for whole numbers and truth values, which are taken as they are."""
    if array.dtype.kind in "iub" or array.size <= 1:
        return moments.known(array.shape, array)
    return moments.of_source(moments.fixed(array.shape, array.astype(np.float64)))


def _indices(shape: tuple[int, ...], rows: int) -> Value:
    variance = (rows * rows - 1) / 12
    value = moments.of_source(moments.gaussian(shape, max(variance, 1e-12), (rows - 1) / 2, Quantile.uniform()))
    value.rows = rows
    return value


# --- where the walk does something of its own -----------------------------------------------------------------------


def _install(traced: Traced, interpreter: Interpreter) -> None:
    graph = traced.graph
    program = graph.program
    first = len(graph.inputs)
    for norm in traced.norms:
        ops = [program.ops[n - first] for n in sorted(norm.region) if n >= first]
        if norm.form != "train" or not ops or not moments.has_squares(ops):
            continue
        region = Normalization(norm.source, norm.axes, program.shape(norm.source), ops, program.shape)
        for op in ops:
            interpreter.instead.setdefault(id(op), functools.partial(region, interpreter))

    def inside(op: Op) -> list[Value]:
        return [moments.unknown(program.shape(v), f"unknown: {moments.INSIDE}") for v in op.outputs]

    for found in moments.softmaxes(program):
        for op in found.inside:
            interpreter.instead.setdefault(id(op), inside)

        def weights(op: Op, found: moments.Softmax = found) -> list[Value]:
            del op
            return [moments.softmax_of(interpreter, interpreter.read(found.source), found.axes)]

        interpreter.instead[id(found.end)] = weights

    for segments in moments.segment_softmaxes(program):
        for op in segments.inside:
            interpreter.instead.setdefault(id(op), inside)

        def edges(op: Op, segments: moments.Segments = segments) -> list[Value]:
            del op
            return [moments.segment_softmax(interpreter, segments)]

        interpreter.instead[id(segments.end)] = edges

    for logs in moments.log_sums(program):
        for op in logs.ends:
            interpreter.instead.setdefault(id(op), functools.partial(logs.logarithm, interpreter))
        for op in logs.less:
            interpreter.instead.setdefault(id(op), functools.partial(logs.log_softmax, interpreter))
        for op in logs.inside:
            interpreter.instead.setdefault(id(op), functools.partial(logs.within, interpreter))
    for root in moments.roots(program):
        interpreter.instead.setdefault(id(root.end), functools.partial(root, interpreter))


def _nonzero(program: Program, parameters: Mapping[int, Value]) -> list[np.ndarray]:
    """In place of each parameter's entries, whether any is not zero: what `analyze.probe_values` asks of them."""
    return [np.array(v not in parameters or bool(parameters[v].unknown or parameters[v].terms)) for v in program.inputs]
