"""Cuts a traced program into blocks, and tells which of them are equal.

The trace is cut where exactly one activation is alive, those apart that many layers pass by: an encoder's output, the
embedding of a time, the outer skips of a U-Net. Two blocks with the same steps, shapes and wiring have one signature.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fixup_init import jaxprs
from fixup_init.graph import Graph
from fixup_init.program import Body, Op
from fixup_init.statistics import Layout

__all__ = ["Block", "cut", "is_inlined", "leading_to", "reads"]

_LONG = 12  # weight layers in the life of a value that is set apart where the trace is cut


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Some steps of a program: `inputs` are activations, `externals` everything else that they read."""

    steps: tuple[Op, ...]
    inputs: tuple[int, ...]
    externals: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[tuple[int, Layout], ...]  # (value, its axes), in order of the steps; those in scan bodies included
    layers: int  # weight layers
    signature: int  # the same for equal blocks


_FORMS: dict[Any, int] = {}  # of a step
_SIGNATURES: dict[Any, int] = {}  # of a block


def cut(graph: Graph, taps: Mapping[int, Layout], keep: Iterable[int] = ()) -> tuple[Block, ...]:
    """Cuts a program into blocks.

    Args:
      graph: of the program.
      taps: the values to measure, and what their axes mean.
      keep: values that must be results of a block, such as the one where a backward pass starts.
    """
    program = graph.program
    producer = {v: step for step in program.steps for v in step.outputs}
    main = [s for s in program.steps if any(graph.is_activation(v) for v in s.outputs)]
    last_use: dict[int, int] = {}
    for i, step in enumerate(main):
        for v in reads(step):
            last_use[v] = i
    passing = _passing(graph, main)
    kept = set(keep) | set(program.outputs)
    weights = {graph.value(n) for n in graph.layers}
    forms: dict[tuple[Any, int], int] = {}
    bounds: list[int] = [0]
    alive: set[int] = set()
    candidate, weighted = 0, False
    for i, step in enumerate(main):
        live = [v for v in alive if last_use[v] >= i]
        alive = set(live)
        if sum(i not in passing.get(v, ()) for v in live) <= 1:
            candidate = i
        if step.body is not None or any(v in weights for v in step.outputs):
            if weighted and candidate > bounds[-1]:
                bounds.append(candidate)
            weighted = True
        alive.update(
            v for v in step.outputs
            if v in last_use and graph.is_activation(v) and jnp.issubdtype(program.dtype(v), jnp.inexact)
        )  # fmt: skip
    bounds.append(len(main))
    blocks = []
    for start, stop in itertools.pairwise(bounds):
        steps = main[start:stop]
        if steps:
            blocks.append(_block(graph, steps, stop, producer, last_use, kept, taps, weights, forms))
    return tuple(blocks)


def _passing(graph: Graph, steps: list[Op]) -> dict[int, range]:
    """Where values are alive that live for many weight layers."""
    weights = {graph.value(n) for n in graph.layers}
    layers = list(itertools.accumulate(any(v in weights for v in _makes(s)) for s in steps))
    born = {v: i for i, s in enumerate(steps) for v in s.outputs}
    uses: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        for v in reads(step):
            if graph.is_activation(v):
                uses.setdefault(v, []).append(i)
    found: dict[int, range] = {}
    for v, at in uses.items():
        first, last = born.get(v, 0), at[-1]
        if layers[last] - layers[first] > _LONG:
            found[v] = range(first + 1, last + 1)
    return found


def _block(
    graph: Graph, steps: list[Op], stop: int, producer: dict[int, Op], last_use: dict[int, int], kept: set[int],
    taps: Mapping[int, Layout], weights: set[int], forms: dict[tuple[Any, int], int],
) -> Block:  # fmt: skip
    made = {v for s in steps for v in s.outputs}
    outputs = tuple(
        v for s in steps for v in s.outputs if graph.is_activation(v) and (last_use.get(v, -1) >= stop or v in kept)
    )
    # Steps on parameters and noise are repeated in each block that needs them.
    before = leading_to([v for s in steps for v in s.inputs if v not in made and not graph.is_activation(v)], producer)
    steps = [*before, *steps]
    made |= {v for s in before for v in s.outputs}
    read = dict.fromkeys(v for s in steps for v in reads(s) if v not in made)
    inputs = tuple(v for v in read if graph.is_activation(v))
    externals = tuple(v for v in read if not graph.is_activation(v) and not is_inlined(graph, v))
    inside = tuple((v, taps[v]) for s in steps for v in _makes(s) if v in taps)
    numbers: dict[int, int] = {}
    form = (
        _canonical(graph, steps, numbers, taps, forms),
        tuple(numbers.setdefault(v, len(numbers)) for v in (*inputs, *externals, *outputs)),
        len(inputs), len(externals),
        tuple(_shape(graph, v) for v in (*inputs, *externals)),
    )  # fmt: skip
    layers = sum(v in weights for s in steps for v in _makes(s))
    signature = _SIGNATURES.setdefault(form, len(_SIGNATURES))
    return Block(tuple(steps), inputs, externals, outputs, inside, layers, signature)


def leading_to(values: list[int], producer: Mapping[int, Op]) -> list[Op]:
    """The steps that make some values, in order."""
    found: dict[int, Op] = {}
    todo = list(values)
    while todo:
        step = producer.get(todo.pop())
        if step is not None and id(step) not in found:
            found[id(step)] = step
            todo.extend(step.inputs)
    return sorted(found.values(), key=lambda s: s.outputs[0])


def _shape(graph: Graph, value: int) -> tuple[Any, ...]:
    return graph.program.shape(value), graph.program.dtype(value)


def reads(step: Op) -> tuple[int, ...]:
    """The values that a step needs, the constants of what runs inside of it included."""
    return (*step.inputs, *(step.body.constants if step.body is not None else ()))


def _makes(step: Op) -> Iterable[int]:
    for part in step.body.parts if step.body is not None else ():
        for inner in part:
            yield from _makes(inner)
    yield from step.outputs


def is_inlined(graph: Graph, value: int) -> bool:
    """Scalars written in the model are part of the compiled function; arrays that it closes over are arguments."""
    return value in graph.program.constants and np.ndim(graph.program.constants[value]) == 0


def _canonical(
    graph: Graph, steps: Sequence[Op], numbers: dict[int, int], taps: Mapping[int, Layout],
    forms: dict[tuple[Any, int], int],
) -> Any:  # fmt: skip
    """What steps compute, with values numbered in the order of their appearance."""

    def number(v: int) -> Any:
        if is_inlined(graph, v):
            return ("literal", str(graph.program.constants[v]), graph.program.dtype(v))
        return numbers.setdefault(v, len(numbers))

    form = []
    for s in steps:
        b = s.body
        line: list[Any] = [_scan_signature(s, b) if isinstance(b, Body) else _form(s, forms)]
        line.append(tuple(number(v) for v in s.inputs))
        if b is not None:
            line.append(tuple(number(v) for v in b.given))
            for part, results in zip(b.parts, b.results, strict=True):
                line.append((_canonical(graph, part, numbers, taps, forms), tuple(number(v) for v in results)))
        line.append(tuple((number(v), taps.get(v)) for v in s.outputs))
        form.append(tuple(line))
    return tuple(form)


def _form(step: Op, forms: dict[tuple[Any, int], int]) -> int:
    """A number for what a step computes; the calls of one function share their parameters, which are read once."""
    key = step.primitive, id(step.params)
    if key not in forms:
        forms[key] = _FORMS.setdefault(jaxprs.signature(step), len(_FORMS))
    return forms[key]


def _scan_signature(step: Op, body: Body) -> Any:
    return ("scan", step.params["length"], step.params["reverse"], len(body.consts), len(body.carry))
