"""Performance claims: ratios taken in one run. `pytest tests/benchmarks --benchmark-only -m ''` runs them."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fixup_init as fi
from fixup_init.models.resnet import cifar_resnet

START = """
import time; start = time.perf_counter()
import jax, jax.numpy as jnp
from fixup_init.models.resnet import cifar_resnet
import fixup_init as fi
model, x = cifar_resnet({depth}, norm="batch"), jnp.zeros((1, 32, 32, 3))
jax.block_until_ready({call})
print(time.perf_counter() - start)
"""


def cold(call: str, depth: int) -> float:
    """Seconds from process start to parameters."""
    run = subprocess.run(
        [sys.executable, "-c", START.format(call=call, depth=depth)], capture_output=True, text=True, check=True
    )
    return float(run.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("depth", [56, 326])
def test_cold_init_against_jitted_model_init(benchmark: Any, depth: int) -> None:
    """`fi.init` and `jax.jit(model.init)`, each in a process of its own, one after the other."""
    theirs = cold("jax.jit(model.init)(jax.random.key(0), x)", depth)
    ours = benchmark.pedantic(lambda: cold("fi.init(model, jax.random.key(0), x)", depth), rounds=2)
    benchmark.extra_info |= {"jit(model.init)": theirs, "fi.init": ours, "ratio": theirs / ours}
    print(f"\nResNet-{depth}: jax.jit(model.init) {theirs:.1f} s, fi.init {ours:.1f} s, ratio {theirs / ours:.1f}")


@pytest.mark.slow
@pytest.mark.parametrize("depth", [20, 110, 326])
def test_structure_against_tracing(benchmark: Any, depth: int) -> None:
    """`fi.structure` against tracing `init` and `apply` of the same model, which it cannot do without."""
    model, x = cifar_resnet(depth, norm="batch"), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def tracing() -> None:
        jax.eval_shape(model.init, jax.random.key(0), x)
        jax.make_jaxpr(lambda v, x: model.apply(v, x, mutable=["batch_stats"])[0])(shapes, x)

    tracing()
    start = time.perf_counter()
    tracing()
    plain = time.perf_counter() - start
    benchmark.pedantic(lambda: fi.structure(model, x), rounds=3)
    benchmark.extra_info |= {"tracing": plain, "ratio": benchmark.stats.stats.min / plain}
    print(f"\nResNet-{depth}: tracing {plain:.2f} s, fi.structure {benchmark.stats.stats.min / plain:.2f} times that")
