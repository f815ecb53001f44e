"""Runs a traced program block by block, forward and backward, with taps; equal blocks compile once.

The trace is cut where exactly one activation is alive. Two blocks with the same steps, shapes and wiring share one
compiled function, so time to the first result is tracing plus a constant, whatever the depth. The backward pass
recomputes one block at a time, so memory is one activation for each cut plus one block.

A tap reads statistics of an activation and of its cotangent. The cotangent's need no stored cotangent: an identity with
a slot as second argument returns them as the slot's own cotangent, so one backward pass gives them all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from fixup_init import jaxprs
from fixup_init.graph import Graph
from fixup_init.jaxprs import Op
from fixup_init.statistics import SIZE, measure

__all__ = ["Block", "backward", "cut", "forward"]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Some steps of a program: `inputs` are activations, `externals` everything else that they read."""

    steps: tuple[Op, ...]
    inputs: tuple[int, ...]
    externals: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[tuple[int, int], ...]  # (value, channel axis), in order of the steps; those in scan bodies included
    signature: Any


def cut(graph: Graph, taps: Mapping[int, int], keep: Iterable[int] = ()) -> tuple[Block, ...]:
    """Cuts a program into blocks.

    Args:
      graph: of the program.
      taps: channel axis by value, for the values to measure.
      keep: values that must be results of a block, such as the one where a backward pass starts.
    """
    program = graph.program
    producer = {v: step for step in program.steps for v in step.outputs}
    main = [s for s in program.steps if any(graph.is_activation(v) for v in s.outputs)]
    last_use: dict[int, int] = {}
    for i, step in enumerate(main):
        for v in step.inputs:
            last_use[v] = i
    kept = set(keep) | set(program.outputs)
    weights = {graph.value(n) for n in graph.layers}
    bounds: list[int] = [0]
    alive: set[int] = set()
    candidate, weighted = 0, False
    for i, step in enumerate(main):
        live = [v for v in alive if last_use[v] >= i]
        alive = set(live)
        if len(live) == 1:
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
            blocks.append(_block(graph, steps, stop, producer, last_use, kept, taps))
    return tuple(blocks)


def _block(
    graph: Graph, steps: list[Op], stop: int, producer: dict[int, Op], last_use: dict[int, int], kept: set[int],
    taps: Mapping[int, int],
) -> Block:  # fmt: skip
    made = {v for s in steps for v in s.outputs}
    outputs = tuple(
        v for s in steps for v in s.outputs if graph.is_activation(v) and (last_use.get(v, -1) >= stop or v in kept)
    )
    aside: dict[int, Op] = {}  # steps on parameters and noise, repeated in each block that needs them
    todo = [v for s in steps for v in s.inputs if v not in made and not graph.is_activation(v)]
    while todo:
        step = producer.get(todo.pop())
        if step is not None and id(step) not in aside:
            aside[id(step)] = step
            todo.extend(step.inputs)
    before = sorted(aside.values(), key=lambda s: s.outputs[0])
    steps = [*before, *steps]
    made |= {v for s in before for v in s.outputs}
    read = dict.fromkeys(v for s in steps for v in _reads(s) if v not in made)
    inputs = tuple(v for v in read if graph.is_activation(v))
    externals = tuple(v for v in read if not graph.is_activation(v) and not _inlined(graph, v))
    inside = tuple((v, taps[v]) for s in steps for v in _makes(s) if v in taps)
    numbers: dict[int, int] = {}
    signature = (
        _canonical(graph, steps, numbers, taps),
        tuple(numbers.setdefault(v, len(numbers)) for v in (*inputs, *externals, *outputs)),
        len(inputs), len(externals),
        tuple(_shape(graph, v) for v in (*inputs, *externals)),
    )  # fmt: skip
    return Block(tuple(steps), inputs, externals, outputs, inside, signature)


def _shape(graph: Graph, value: int) -> tuple[Any, ...]:
    return graph.program.shape(value), str(graph.program.dtype(value))


def _reads(step: Op) -> tuple[int, ...]:
    return (*step.inputs, *(step.body.constants if step.body is not None else ()))


def _makes(step: Op) -> Iterable[int]:
    if step.body is not None:
        for inner in step.body.steps:
            yield from _makes(inner)
    yield from step.outputs


def _inlined(graph: Graph, value: int) -> bool:
    """Scalars written in the model are part of the compiled function; arrays that it closes over are arguments."""
    return value in graph.program.constants and np.ndim(graph.program.constants[value]) == 0


def _canonical(graph: Graph, steps: Sequence[Op], numbers: dict[int, int], taps: Mapping[int, int]) -> Any:
    """What steps compute, with values numbered in the order of their appearance."""

    def number(v: int) -> Any:
        if _inlined(graph, v):
            return ("literal", str(graph.program.constants[v]), str(graph.program.dtype(v)))
        return numbers.setdefault(v, len(numbers))

    form = []
    for s in steps:
        line: list[Any] = [jaxprs.signature(s) if s.body is None else _scan_signature(s)]
        line.append(tuple(number(v) for v in s.inputs))
        if s.body is not None:
            b = s.body
            line.append(tuple(number(v) for v in (*b.consts, *b.carry, *b.xs)))
            line.append(_canonical(graph, b.steps, numbers, taps))
            line.append(tuple(number(v) for v in (*b.carry_out, *b.ys)))
        line.append(tuple((number(v), taps.get(v)) for v in s.outputs))
        form.append(tuple(line))
    return tuple(form)


def _scan_signature(step: Op) -> Any:
    assert step.body is not None
    return ("scan", step.params["length"], step.params["reverse"], len(step.body.consts), len(step.body.carry))


# --- one block, on arrays -------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tap(x: Shaped[Array, "..."], slot: Float[Array, "5"], channel: int) -> Shaped[Array, "..."]:
    """x; the cotangent of `slot` is the statistics of the cotangent of x."""
    del slot, channel
    return x


_tap.defvjp(lambda x, slot, channel: (x, None), lambda channel, _, ct: (ct, measure(ct, channel)))


def _run(
    steps: Iterable[Op], env: dict[int, Any], taps: Mapping[int, int], slots: Mapping[int, Any] | None
) -> dict[int, Any]:
    """Evaluates steps in `env`; returns the statistics of tapped values, stacked over the passes of a scan."""
    measured: dict[int, Any] = {}
    for step in steps:
        args = [env[v] for v in step.inputs]
        if step.body is None:
            outs: Sequence[Any] = jaxprs.bind(step, args)
        else:
            inside = [v for s in step.body.steps for v in _makes(s) if v in taps]
            inner_slots = {v: slots[v] for v in inside} if slots is not None else None
            outs, inner = jaxprs.run_scan(step, args, env, inner_slots, lambda s, local, at: _run(s, local, taps, at))
            measured.update(inner)
        for v, out in zip(step.outputs, outs, strict=True):
            if v in taps and jnp.issubdtype(out.dtype, jnp.inexact):
                measured[v] = measure(out, taps[v])
                if slots is not None:
                    out = _tap(out, slots[v], taps[v])
            env[v] = out
    return measured


def _function(graph: Graph, block: Block) -> Callable[..., tuple[list[Any], list[Any]]]:
    """(activations, externals, slots or None) -> (results, statistics of the taps in order)."""
    taps = dict(block.taps)
    literals = {
        v: graph.program.constants[v]
        for s in _all_steps(block.steps)
        for v in (*_reads(s), *(s.body.carry_out + s.body.ys if s.body else ()))
        if _inlined(graph, v)
    }

    def run(inputs: Sequence[Any], externals: Sequence[Any], slots: Sequence[Any] | None) -> Any:
        env: dict[int, Any] = dict(literals)
        env.update(zip(block.inputs, inputs, strict=True))
        env.update(zip(block.externals, externals, strict=True))
        at = dict(zip((v for v, _ in block.taps), slots, strict=True)) if slots is not None else None
        measured = _run(block.steps, env, taps, at)
        return [env[v] for v in block.outputs], [measured.get(v) for v, _ in block.taps]

    return run


def _all_steps(steps: Iterable[Op]) -> Iterable[Op]:
    for s in steps:
        yield s
        if s.body is not None:
            yield from _all_steps(s.body.steps)


@dataclasses.dataclass(frozen=True)
class _Compiled:
    forward: Callable[..., Any]
    backward: Callable[..., Any]


_COMPILED: dict[Any, _Compiled] = {}


def compiled(graph: Graph, block: Block) -> _Compiled:
    """The functions of a block; equal blocks, of this model or another, share them."""
    found = _COMPILED.get(block.signature)
    if found is None:
        run = _function(graph, block)

        def pull(
            inputs: Sequence[Any], externals: Sequence[Any], cotangents: Sequence[Any], slots: Sequence[Any]
        ) -> Any:
            smooth = [k for k, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]

            def primal(varied: Sequence[Any], slots: Sequence[Any]) -> list[Any]:
                full = list(inputs)
                for k, x in zip(smooth, varied, strict=True):
                    full[k] = x
                outs, _ = run(full, externals, slots)
                return [o for o in outs if jnp.issubdtype(o.dtype, jnp.inexact)]

            _, pullback = jax.vjp(primal, [inputs[k] for k in smooth], slots)
            varied, statistics = pullback(list(cotangents))
            return varied, statistics

        found = _Compiled(jax.jit(lambda inputs, externals: run(inputs, externals, None)), jax.jit(pull))
        _COMPILED[block.signature] = found
    return found


# --- all blocks -----------------------------------------------------------------------------------------------------


def forward(
    graph: Graph, blocks: Sequence[Block], values: Mapping[int, Any], progress: Callable[[int, int], None] | None = None
) -> tuple[dict[int, Any], dict[int, np.ndarray]]:
    """Runs blocks in order.

    Args:
      graph: of the program.
      blocks: of `cut`.
      values: arrays of the program's inputs, by value.
      progress: called with (blocks done, blocks in all).

    Returns:
      Activations at the cuts (the model's inputs and results included), and measured statistics, by value.
    """
    env: dict[int, Any] = {**graph.program.constants, **values}
    measured: dict[int, Any] = {}
    for k, block in enumerate(blocks):
        run = compiled(graph, block).forward
        outs, found = run([env[v] for v in block.inputs], [env[v] for v in block.externals])
        env.update(zip(block.outputs, outs, strict=True))
        measured.update((v, f) for (v, _), f in zip(block.taps, found, strict=True) if f is not None)
        if progress is not None:
            progress(k + 1, len(blocks))
    return env, jax.device_get(measured)


def backward(
    graph: Graph,
    blocks: Sequence[Block],
    env: Mapping[int, Any],
    cotangents: Mapping[int, Any],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[int, Any], dict[int, np.ndarray]]:
    """Runs blocks in reverse, each recomputed from its inputs.

    Args:
      graph: of the program.
      blocks: of `cut`.
      env: of `forward`.
      cotangents: where the pass starts: arrays by value, each a block's result.
      progress: called with (blocks done, blocks in all).

    Returns:
      Cotangents of the model's inputs and of values at the cuts, and statistics of the tapped cotangents, by value.
    """
    pulled: dict[int, Any] = dict(cotangents)
    measured: dict[int, Any] = {}
    for k, block in enumerate(reversed(blocks)):
        smooth = [v for v in block.outputs if jnp.issubdtype(graph.program.dtype(v), jnp.inexact)]
        if any(v in pulled for v in smooth):
            out = [
                pulled[v] if v in pulled else jnp.zeros(graph.program.shape(v), graph.program.dtype(v)) for v in smooth
            ]
            slots = [jnp.zeros((*_passes(graph, v), SIZE), jnp.float32) for v, _ in block.taps]
            inputs = [env[v] for v in block.inputs]
            varied, found = compiled(graph, block).backward(inputs, [env[v] for v in block.externals], out, slots)
            into = [v for v in block.inputs if jnp.issubdtype(graph.program.dtype(v), jnp.inexact)]
            for v, ct in zip(into, varied, strict=True):
                pulled[v] = pulled[v] + ct if v in pulled else ct
            measured.update((v, f) for (v, _), f in zip(block.taps, found, strict=True))
        if progress is not None:
            progress(k + 1, len(blocks))
    return pulled, jax.device_get(measured)


def _passes(graph: Graph, value: int) -> tuple[int, ...]:
    """Lengths of the scans around a value, outermost first."""
    maker = graph.op(graph.node_of[value])
    loop = maker.loop if maker is not None else None
    lengths: list[int] = []
    while loop is not None:
        lengths.append(loop.length)
        loop = loop.parent
    return tuple(reversed(lengths))
