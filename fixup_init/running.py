"""A program, or a step of one, on arrays or tracers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from fixup_init.program import Arms, Body, Marker, Op, Program, Shards, split_axes

__all__ = ["bind", "evaluate", "run_arms", "run_scan", "run_shards"]


def evaluate(program: Program, args: Sequence[Any]) -> list[Any]:
    """Runs a program on arrays, step by step and uncompiled: for the few steps that make some initial values."""
    env: dict[int, Any] = dict(program.constants)
    env.update(zip(program.inputs, args, strict=True))
    _evaluate(program.steps, env)
    return [env[v] for v in program.outputs]


def _evaluate(steps: Iterable[Op], env: dict[int, Any]) -> None:
    for step in steps:
        args = [env[v] for v in step.inputs]
        if step.body is None:
            outs = bind(step, args)
        elif isinstance(step.body, Arms):
            outs, _ = run_arms(step, env, _evaluate)
        elif isinstance(step.body, Shards):
            outs, _ = run_shards(step, args, env, None, lambda steps, local, _: _evaluate(steps, local))
        else:
            outs, _ = run_scan(step, args, env, None, lambda steps, local, _: _evaluate(steps, local))
        env.update(zip(step.outputs, outs, strict=True))


def run_scan(
    step: Op, args: Sequence[Any], env: dict[int, Any], extra: Any, run: Callable[[list[Op], dict[int, Any], Any], Any]
) -> tuple[list[Any], Any]:
    """Runs a scan whose body is evaluated by `run(steps, local values, extra of this pass)`.

    Args:
      step: a step with a body.
      args: arrays of its inputs.
      env: values around it, for the constants of its body.
      extra: a tree of arrays with a leading axis of the scan's length, or None.
      run: evaluates the body in place; what it returns is stacked.

    Returns:
      The step's results, and what `run` returned, stacked.
    """
    body = step.body
    assert isinstance(body, Body)
    n_consts, n_carry = len(body.consts), len(body.carry)
    held = {v: env[v] for v in (*body.consts, *body.constants) if v in env}

    def one(carry: Any, xs: Any) -> Any:
        slices, at = xs
        local = {**held, **dict(zip(body.given, (*carry, *slices), strict=True))}
        found = run(body.parts[0], local, at)
        return [local[v] for v in body.carry_out], ([local[v] for v in body.ys], found)

    carry, (ys, found) = jax.lax.scan(
        one, list(args[n_consts : n_consts + n_carry]), (list(args[n_consts + n_carry :]), extra),
        length=step.params["length"], reverse=step.params["reverse"],
    )  # fmt: skip
    return [*carry, *ys], found


def run_arms(step: Op, env: dict[int, Any], run: Callable[[list[Op], dict[int, Any]], Any]) -> tuple[list[Any], Any]:
    """Runs a conditional whose arms are evaluated by `run(steps, local values)`.

    Args:
      step: a step with arms.
      env: values around it.
      run: evaluates the steps of an arm in place; what it returns has the same shapes in each arm.

    Returns:
      The step's results, and what `run` returned for the arm that was taken.
    """
    arms = step.body
    assert isinstance(arms, Arms)

    def one(part: list[Op], results: tuple[int, ...]) -> tuple[list[Any], Any]:
        local = dict(env)
        found = run(part, local)
        return [local[v] for v in results], found

    taken = [functools.partial(one, *arm) for arm in zip(arms.parts, arms.results, strict=True)]
    return jax.lax.switch(env[step.inputs[0]], taken)


def run_shards(
    step: Op, args: Sequence[Any], env: dict[int, Any], extra: Any, run: Callable[[list[Op], dict[int, Any], Any], Any]
) -> tuple[list[Any], Any]:
    """Runs a shard_map, on each device by `run(steps, local values, extra of this device)`.

    Args:
      step: a step of shards.
      args: arrays of its inputs.
      env: values around it, for constants.
      extra: a tree of arrays with a leading axis of the number of devices, or None.
      run: evaluates the steps in place; what it returns is stacked by device.

    Returns:
      The step's results, and what `run` returned, stacked.
    """
    shards, params = step.body, step.params
    assert isinstance(shards, Shards)
    axes = split_axes(step)
    every = jax.sharding.PartitionSpec(axes)
    held = {v: env[v] for v in shards.constants if v in env}

    def one(args: Sequence[Any], held: dict[int, Any], extra: Any) -> Any:
        local = {**held, **dict(zip(shards.given, args, strict=True))}
        for v, over in shards.varying.items():
            local[v] = jax.lax.pcast(held[v], over, to="varying") if over else held[v]
        found = run(shards.parts[0], local, jax.tree.map(lambda a: a[0], extra))
        return [local[v] for v in shards.results[0]], jax.tree.map(lambda a: a[None], found)

    return jax.shard_map(
        one, mesh=params["mesh"], in_specs=(list(params["in_specs"]), jax.sharding.PartitionSpec(), every),
        out_specs=(list(params["out_specs"]), every), axis_names=set(axes),
        check_vma=params["check_vma"],
    )(list(args), held, extra)  # fmt: skip


def bind(op: Op, args: Sequence[Any]) -> list[Any]:
    """Runs one step on arrays (or tracers)."""
    primitive = op.primitive
    assert not isinstance(primitive, Marker)
    out = primitive.bind(*args, **primitive.get_bind_params(op.params))
    return list(out) if primitive.multiple_results else [out]
