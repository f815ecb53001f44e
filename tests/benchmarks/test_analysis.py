"""What an analysis costs: ratios taken in one run. `pytest tests/benchmarks --benchmark-only -m ''` runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fixup_init as fi
from fixup_init import blocks, cutting
from fixup_init.measurement import prepare, values_of
from fixup_init.models.resnet import cifar_resnet
from fixup_init.tracing import trace

COLD = """
import json, resource, time; start = time.perf_counter()
import jax, jax.numpy as jnp
import fixup_init as fi
from fixup_init.models.resnet import cifar_resnet
model, x = cifar_resnet({depth}, norm="batch"), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
variables = fi.init(model, jax.random.key(0), x, scheme="model")
jax.block_until_ready(variables)
begin = time.perf_counter()
{work}
whole = time.perf_counter()
traced = time.perf_counter(); fi.structure(model, x); traced = time.perf_counter() - traced
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps(dict(seconds=whole - begin, tracing=traced, gigabytes=peak)))
"""
BLOCKWISE = "fi.analyze(model, variables, x)"
# Value and gradient with every activation that is tapped as a result: what there is without blocks.
WHOLE = """
from fixup_init import blocks
from fixup_init.measurement import prepare, values_of
from fixup_init.tracing import trace
traced = trace(model, (x,), {})
params, state = traced.application.separate(variables)
setup = prepare(traced, params, "output")
program, values = traced.graph.program, values_of(traced, params, state, jax.random.key(0))
leaves = program.inputs[: len(jax.tree.leaves(params))]
def loss(weights, slots):
    env = {**program.constants, **values, **dict(zip(leaves, weights))}
    blocks._run(program.steps, env, setup.layouts, slots)
    statistics = [blocks.measure(env[v], layout) for v, layout in setup.layouts.items()]
    return jnp.square(env[program.outputs[0]]).sum(), statistics
slots = {v: blocks.slot(traced.graph, v, layout) for v, layout in setup.layouts.items()}
jax.block_until_ready(jax.jit(jax.value_and_grad(loss, has_aux=True))([values[v] for v in leaves], slots))
"""


def cold(depth: int, work: str) -> dict[str, float]:
    """Seconds and peak memory of some work in a process of its own, parameters given."""
    code = COLD.format(depth=depth, work=work)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.slow
def test_cold_analysis_against_the_whole_model(benchmark: Any) -> None:
    """Forward and backward through ResNet-110 with batch norm; at depth 326 the whole took 652 s and 6.5 GB, blocks
    6.2 s and 0.86 GB: too long to be repeated here."""
    whole = cold(110, WHOLE)
    ours = benchmark.pedantic(lambda: cold(110, BLOCKWISE), rounds=1)
    ratio = whole["seconds"] / ours["seconds"]
    benchmark.extra_info |= {"whole": whole, "blocks": ours, "ratio": ratio}
    print(
        f"\nResNet-110, cold: whole model {whole['seconds']:.1f} s and {whole['gigabytes']:.2f} GB, "
        f"blocks {ours['seconds']:.1f} s and {ours['gigabytes']:.2f} GB, ratio {ratio:.1f}"
    )


@pytest.mark.slow
def test_time_beyond_tracing_does_not_grow_with_depth(benchmark: Any) -> None:
    """The goal is 1.3 times from depth 110 to 998."""
    shallow = cold(110, BLOCKWISE)
    deep = benchmark.pedantic(lambda: cold(998, BLOCKWISE), rounds=1)
    beyond = [run["seconds"] - run["tracing"] for run in (shallow, deep)]
    benchmark.extra_info |= {"110": shallow, "998": deep, "ratio": beyond[1] / beyond[0]}
    print(
        f"\nanalyze beyond tracing: depth 110 {beyond[0]:.1f} s, depth 998 {beyond[1]:.1f} s "
        f"(tracing {deep['tracing']:.1f} s, {deep['gigabytes']:.2f} GB), ratio {beyond[1] / beyond[0]:.2f}"
    )


TALL = """
import json, resource, time
import jax, jax.numpy as jnp
import flax.linen as nn
import fixup_init as fi
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64)(x)
        for _ in range({blocks}):
            x = x + nn.Dense(64)(nn.relu(nn.Dense(64)(x)))
        return nn.Dense(10)(x)
model, x = Net(), jax.ShapeDtypeStruct((8, 32), jnp.float32)
start = time.perf_counter(); variables = fi.init(model, jax.random.key(0), x); drawn = time.perf_counter() - start
start = time.perf_counter(); found = fi.analyze(model, variables, x); seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps(dict(init=drawn, seconds=seconds, rows=len(found), growth=found.drift().factor, gigabytes=peak)))
"""


@pytest.mark.slow
def test_ten_thousand_blocks(benchmark: Any) -> None:
    """Residual blocks written out one by one; it finishes, and the signal is flat."""

    def once() -> dict[str, float]:
        run = subprocess.run(
            [sys.executable, "-c", TALL.format(blocks=10_000)], capture_output=True, text=True, check=True
        )
        return json.loads(run.stdout)

    found = benchmark.pedantic(once, rounds=1)
    benchmark.extra_info |= found
    assert found["rows"] > 50_000 and found["growth"] == pytest.approx(1, abs=1e-6)
    print(
        f"\n10,000 blocks: fi.init {found['init']:.0f} s, fi.analyze {found['seconds']:.0f} s, "
        f"{found['rows']} rows, {found['gigabytes']:.2f} GB"
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32, 64, 128])
def test_taps_against_plain_blocks(benchmark: Any, batch: int) -> None:
    """Forward and backward with gradients of all weights, the same blocks with taps and without; the goal is 1.2."""
    model, x = cifar_resnet(20, norm="batch"), jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    traced = trace(model, (x,), {})
    params, state = traced.application.separate(fi.init(model, jax.random.key(0), x, scheme="model"))
    setup = prepare(traced, params, "output")
    plain = cutting.cut(traced.graph, {}, keep=setup.starts)
    values = values_of(traced, params, state, jax.random.key(0))
    leaves = traced.graph.program.inputs[: len(jax.tree.leaves(params))]

    def once(cut: Any, **wanted: Any) -> float:
        start = time.perf_counter()
        env, _ = blocks.forward(traced.graph, cut, values)
        probe = {v: jnp.ones_like(env[v]) for v in setup.starts}
        found = blocks.backward(traced.graph, cut, env, probe, **wanted)
        jax.block_until_ready((found.gradients, found.cotangents))
        return time.perf_counter() - start

    times = [(once(plain, gradients=leaves), once(setup.blocks, norms=leaves)) for _ in range(20)][1:]
    best = [min(column) for column in zip(*times, strict=True)]
    benchmark.pedantic(lambda: once(setup.blocks, norms=leaves), rounds=1)
    benchmark.extra_info |= {"plain": best[0], "taps": best[1], "ratio": best[1] / best[0]}
    plain_ms, taps_ms = (1e3 * seconds for seconds in best)
    print(f"\nResNet-20, batch {batch}: plain {plain_ms:.0f} ms, taps {taps_ms:.0f} ms, {taps_ms / plain_ms:.2f} times")
