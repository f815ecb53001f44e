"""Runs a traced program block by block, forward and backward, with taps; equal blocks compile once.

Two blocks of one signature share one compiled function, so time to the first result is tracing plus a constant,
whatever the depth. The backward pass recomputes one block at a time, so memory is one activation for each cut plus one
block.

A tap looks at an activation, and at its cotangent: an identity with a slot as second argument returns what it saw of
the cotangent as the slot's own, so that one backward pass gives them all. In the block it sums over the array and takes
some entries, which the compiler does beside other work; the rest of the statistics is done for several taps at once.
Inside of scans (where entries would be stacked), conditionals and shard_maps all is done in place.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from fixup_init import running
from fixup_init.compiled import jitted
from fixup_init.cutting import Block, is_inlined, leading_to, reads
from fixup_init.gathering import Gathering
from fixup_init.graph import Graph
from fixup_init.program import Arms, Body, Op, Shards, all_steps, devices
from fixup_init.statistics import SIZE, Layout, combined, gather, measure, norm

__all__ = ["Pulled", "backward", "forward"]

# --- one block, on arrays -------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tap(x: Shaped[Array, "..."], slot: Any, look: Callable[[Array], Any]) -> Shaped[Array, "..."]:
    """x; the cotangent of `slot` is what `look` sees of the cotangent of x."""
    del slot, look
    return x


def _look_back(look: Callable[[Array], Any], slot: Any, ct: Array) -> tuple[Array, Any]:
    return ct, jax.tree.map(jnp.add, look(ct), slot)  # the sum differs from device to device if the slot does


_tap.defvjp(lambda x, slot, look: (x, slot), _look_back)


def _run(
    steps: Iterable[Op], env: dict[int, Any], taps: Mapping[int, Layout], slots: Mapping[int, Any] | None,
    zero: Any = None,
) -> dict[int, Any]:  # fmt: skip
    """Evaluates steps in `env`; returns what the taps saw.

    Inside of scans, conditionals and shard_maps that is the statistics: stacked by pass, zeros in arms that do not run,
    and combined over devices. There `zero` is 0, of a type that is one for each device if statistics are.
    """

    look = gather if zero is None else measure

    inside = jnp.zeros((), jnp.float32) if zero is None else zero

    def within(steps: list[Op], env: dict[int, Any], slots: Any) -> dict[int, Any]:
        return _run(steps, env, taps, slots, inside)

    seen: dict[int, Any] = {}
    for step in steps:
        args = [env[v] for v in step.inputs]
        inner = {v: passes for v, passes in _inner(step) if v in taps}
        inner_slots = {v: slots[v] for v in inner} if slots is not None else None
        found: dict[int, Any] = {}
        outs: Sequence[Any]
        if step.body is None:
            outs = running.bind(step, args)
        elif isinstance(step.body, Body):
            outs, found = running.run_scan(step, args, env, inner_slots, within)
        elif isinstance(step.body, Arms):
            blank = {v: _zeros(passes) + inside for v, passes in inner.items()} if slots is None else {}
            outs, found = running.run_arms(
                step, env, lambda s, local, blank=blank, at=inner_slots: blank | within(s, local, at)
            )
        else:
            n = devices(step)
            each = jax.tree.map(lambda slot, n=n: _spread(slot, n), inner_slots)
            outs, found = running.run_shards(
                step, args, env, (each, jnp.zeros(n, jnp.float32)), lambda s, local, at: _run(s, local, taps, *at)
            )
            found = jax.tree.map(combined, found)
        seen.update(found)
        for v, out in zip(step.outputs, outs, strict=True):
            if v in taps:
                if slots is not None:
                    out = _tap(out, slots[v], functools.partial(look, layout=taps[v]._replace(limits=None)))
                elif zero is None:
                    seen[v] = look(out, taps[v])
                else:
                    seen[v] = look(out, taps[v]) + zero
            env[v] = out
    return seen


def _zeros(passes: tuple[int, ...]) -> Array:
    """What a tap sees inside of a step where that does not run."""
    return jnp.zeros((*passes, SIZE), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(slot: Array, n: int) -> Array:
    """A slot for each of n devices; what they saw is combined."""
    return jnp.broadcast_to(slot, (n, *slot.shape))


_spread.defvjp(lambda slot, n: (_spread(slot, n), None), lambda n, _, seen: (combined(seen),))


def _inner(step: Op) -> Iterable[tuple[int, tuple[int, ...]]]:
    """Values that the parts of a step make, and the lengths of the scans around each, its own included."""
    passes = (step.params["length"],) if isinstance(step.body, Body) else ()
    for inner in (s for part in step.body.parts for s in part) if step.body is not None else ():
        yield from ((v, passes) for v in inner.outputs)
        yield from ((v, (*passes, *more)) for v, more in _inner(inner))


def _function(graph: Graph, block: Block) -> Callable[..., tuple[list[Any], list[Any]]]:
    """(activations, externals, slots or None) -> (results, what the taps see, in order, if there are no slots)."""
    taps = dict(block.taps)
    literals = {
        v: graph.program.constants[v]
        for s in all_steps(block.steps)
        for v in (*reads(s), *itertools.chain(*(s.body.results if s.body is not None else ())))
        if is_inlined(graph, v)
    }

    def run(inputs: Sequence[Any], externals: Sequence[Any], slots: Sequence[Any] | None) -> Any:
        env: dict[int, Any] = dict(literals)
        env.update(zip(block.inputs, inputs, strict=True))
        env.update(zip(block.externals, externals, strict=True))
        at = dict(zip((v for v, _ in block.taps), slots, strict=True)) if slots is not None else None
        seen = _run(block.steps, env, taps, at)
        return [env[v] for v in block.outputs], [seen[v] for v, _ in block.taps] if slots is None else []

    return run


# What is wanted of an external's gradient: nothing, the array, or the norms over all axes but as many leading ones.
_NOTHING, _ARRAY = -2, -1


def compiled(graph: Graph, block: Block) -> Callable[..., Any]:
    """The forward function of a block; equal blocks, of this model or another, share it."""

    def make() -> Callable[..., Any]:
        run = _function(graph, block)
        return lambda inputs, externals: run(inputs, externals, None)

    return jitted(("forward", block.signature), make)


def _pull(graph: Graph, block: Block, wanted: tuple[int, ...]) -> Callable[..., Any]:
    """The backward function of a block: (inputs, externals, cotangents) -> (cotangents of the inputs that are
    differentiable, of the externals what is wanted, what the taps see)."""
    return jitted(("backward", block.signature, wanted), lambda: _pullback(graph, block, wanted))


def _pullback(graph: Graph, block: Block, wanted: tuple[int, ...]) -> Callable[..., Any]:
    run = _function(graph, block)

    def pull(inputs: Sequence[Any], externals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        inside = {v: passes for s in block.steps for v, passes in _inner(s)}
        slots = [slot(graph, v, layout, inside.get(v)) for v, layout in block.taps]
        smooth = [k for k, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
        asked = [k for k, want in enumerate(wanted) if want != _NOTHING]

        def primal(varied: Sequence[Any], weights: Sequence[Any], slots: Sequence[Any]) -> list[Any]:
            full, beside = list(inputs), list(externals)
            for k, x in zip(smooth, varied, strict=True):
                full[k] = x
            for k, x in zip(asked, weights, strict=True):
                beside[k] = x
            outs, _ = run(full, beside, slots)
            return [o for o in outs if jnp.issubdtype(o.dtype, jnp.inexact)]

        _, pullback = jax.vjp(primal, [inputs[k] for k in smooth], [externals[k] for k in asked], slots)
        varied, gradients, seen = pullback(list(cotangents))
        gradients = [
            g if wanted[k] == _ARRAY else _norms(g, externals[k], wanted[k])
            for k, g in zip(asked, gradients, strict=True)
        ]  # fmt: skip
        return varied, gradients, seen

    return pull


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
    measured = Gathering()
    for k, block in enumerate(blocks):
        run = compiled(graph, block)
        outs, found = run([env[v] for v in block.inputs], [env[v] for v in block.externals])
        env.update(zip(block.outputs, outs, strict=True))
        for (v, layout), one in zip(block.taps, found, strict=True):
            measured.add(v, one, layout.limits)
        if progress is not None:
            progress(k + 1, len(blocks))
    _complete(graph, env)
    return env, measured.read()


def _complete(graph: Graph, env: dict[int, Any]) -> None:
    """Results that no activation leads to, such as a temperature that a model returns beside its logits."""
    missing = [v for v in graph.program.outputs if v not in env]
    if missing:
        _run(leading_to(missing, {v: step for step in graph.program.steps for v in step.outputs}), env, {}, None)


@dataclasses.dataclass(frozen=True)
class Pulled:
    """Results of a backward pass, by value.

    Attributes:
      cotangents: of the model's inputs.
      statistics: of the tapped cotangents.
      norms: of the gradients of parameters, and of these, as `statistics.norm` packs them; with a further axis for each
        scan that slices a parameter.
      gradients: of parameters.
    """

    cotangents: dict[int, Any]
    statistics: dict[int, np.ndarray]
    norms: dict[int, np.ndarray]
    gradients: dict[int, Any]


def backward(
    graph: Graph,
    blocks: Sequence[Block],
    env: Mapping[int, Any],
    cotangents: Mapping[int, Any],
    progress: Callable[[int, int], None] | None = None,
    norms: Iterable[int] = (),
    gradients: Iterable[int] = (),
) -> Pulled:
    """Runs blocks in reverse, each recomputed from its inputs.

    Args:
      graph: of the program.
      blocks: of `cut`.
      env: of `forward`.
      cotangents: where the pass starts: arrays by value, each a result of a block or of the program.
      progress: called with (blocks done, blocks in all).
      norms: parameters (values) whose gradient's norm is wanted.
      gradients: parameters whose gradient is wanted.
    """
    pulled: dict[int, Any] = dict(cotangents)
    measured = Gathering()
    sized, summed = dict.fromkeys(norms), dict.fromkeys(gradients)
    sizes: dict[int, Any] = {}
    sums: dict[int, Any] = _pulled_aside(graph, env, cotangents, {*sized, *summed})
    uses = collections.Counter([*sums, *(v for block in blocks for v in block.externals)])

    def want(block: Block, v: int) -> int:
        if not jnp.issubdtype(graph.program.dtype(v), jnp.inexact) or not (v in sized or v in summed):
            return _NOTHING
        return _ARRAY if v in summed or uses[v] > 1 else _sliced(block.steps, v)

    for k, block in enumerate(reversed(blocks)):
        smooth = [v for v in block.outputs if jnp.issubdtype(graph.program.dtype(v), jnp.inexact)]
        if any(v in pulled for v in smooth):
            out = [
                pulled[v] if v in pulled else jnp.zeros(graph.program.shape(v), graph.program.dtype(v)) for v in smooth
            ]
            inputs = [env[v] for v in block.inputs]
            wanted = tuple(want(block, v) for v in block.externals)
            run = _pull(graph, block, wanted)
            varied, found, seen = run(inputs, [env[v] for v in block.externals], out)
            into = [v for v in block.inputs if jnp.issubdtype(graph.program.dtype(v), jnp.inexact)]
            for v, ct in zip(into, varied, strict=True):
                pulled[v] = pulled[v] + ct if v in pulled else ct
            asked = [(v, w) for v, w in zip(block.externals, wanted, strict=True) if w != _NOTHING]
            for (v, w), gradient in zip(asked, found, strict=True):
                if w == _ARRAY:
                    sums[v] = sums[v] + gradient if v in sums else gradient
                else:
                    sizes[v] = gradient
            for (v, _), one in zip(block.taps, seen, strict=True):
                measured.add(v, one, None)
        for v in smooth:
            pulled.pop(v, None)  # complete: what reads it came before
        if progress is not None:
            progress(k + 1, len(blocks))
    sizes |= {v: _NORMS(sums[v], env[v]) for v in sized if v in sums}
    return Pulled(
        {v: pulled[v] for v in graph.inputs if v in pulled}, measured.read(), jax.device_get(sizes),
        {v: sums[v] for v in summed if v in sums},
    )  # fmt: skip


def _pulled_aside(
    graph: Graph, env: Mapping[int, Any], cotangents: Mapping[int, Any], wanted: set[int]
) -> dict[int, Any]:  # fmt: skip
    """Gradients of parameters from results that no activation leads to."""
    ends = [v for v in cotangents if not graph.is_activation(v)]
    if not ends:
        return {}
    steps = leading_to(ends, {v: step for step in graph.program.steps for v in step.outputs})
    read = {*ends, *(v for s in steps for v in reads(s))}
    leaves = [v for v in read & wanted if jnp.issubdtype(graph.program.dtype(v), jnp.inexact)]

    def results(arrays: Sequence[Any]) -> list[Any]:
        local = {**env, **dict(zip(leaves, arrays, strict=True))}
        _run(steps, local, {}, None)
        return [local[v] for v in ends]

    _, pullback = jax.vjp(results, [env[v] for v in leaves])
    return dict(zip(leaves, pullback([cotangents[v] for v in ends])[0], strict=True)) if leaves else {}


def slot(graph: Graph, value: int, layout: Layout, passes: tuple[int, ...] | None = None) -> Any:
    """Zeros of the shapes that a tap returns; `passes` of the scans around it where it stands inside of a step."""
    if passes is not None:
        return _zeros(passes)
    like = jax.ShapeDtypeStruct(graph.program.shape(value), graph.program.dtype(value))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda x: gather(x, layout), like))


def _norms(gradient: Array, parameter: Array, leading: int) -> Array:
    return jnp.stack([norm(gradient, leading), norm(parameter, leading)])


_NORMS = jax.jit(functools.partial(_norms, leading=0))


def _sliced(steps: Iterable[Op], value: int) -> int:
    """How many scans, one in the other, slice a value; 0 where it is also used in another way."""
    readers = [s for s in steps if value in reads(s)]
    if len(readers) != 1 or readers[0].inputs.count(value) != 1:
        return 0
    (step,) = readers
    at = step.inputs.index(value)
    match step.body:
        case Body():
            at -= len(step.body.consts) + len(step.body.carry)
            return 1 + _sliced(step.body.parts[0], step.body.xs[at]) if at >= 0 else 0
        case Arms():
            returned = any(value in arm for arm in step.body.results)
            return 0 if returned else _sliced(itertools.chain(*step.body.parts), value)
        case Shards():
            split = any(axis is not None for axis in step.params["in_specs"][at][:1])  # its slices
            return 0 if split else _sliced(step.body.parts[0], step.body.given[at])
    return 0
