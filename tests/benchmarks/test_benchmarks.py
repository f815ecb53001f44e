"""Performance claims: ratios taken in one run. `pytest tests/benchmarks --benchmark-only -m ''` runs them."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import time
from typing import Any

import flax.linen as nn
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


def decoder(layers: int) -> tuple[Any, tuple[Any, ...]]:
    """A pre-norm transformer as a pure function, `layers` of attention and feed-forward together."""

    def shape(*n: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(n, jnp.float32)

    def norm(x: Any, scale: Any) -> Any:
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def apply(p: Any, x: Any) -> Any:
        for b in p["blocks"]:
            y = norm(x, b["n1"])
            q, k, v = (jnp.einsum("btd,dhk->bthk", y, b[c]) for c in "qkv")
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4.0)
            x = x + jnp.einsum("bqhd,hdk->bqk", jnp.einsum("bhqk,bkhd->bqhd", weights, v), b["o"])
            x = x + jax.nn.gelu(norm(x, b["n2"]) @ b["up"]) @ b["down"]
        return x @ p["head"]

    block = {c: shape(64, 4, 16) for c in "qkv"} | {"o": shape(4, 16, 64), "up": shape(64, 256)}
    block |= {"down": shape(256, 64), "n1": shape(64), "n2": shape(64)}
    params = {"blocks": [block] * (layers // 2), "head": shape(64, 10)}
    return fi.Function(apply, params), (shape(2, 8, 64),)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [20, 200, 2000])
@pytest.mark.parametrize("family", ["resnet", "decoder"])
def test_structure_against_tracing(benchmark: Any, family: str, layers: int) -> None:
    """`fi.structure` against `jax.make_jaxpr` of the same model, which it cannot do without; the goal is 1.5 times."""
    if family == "resnet":
        model, inputs = cifar_resnet(layers, norm="batch"), (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        apply = functools.partial(model.apply, mutable=["batch_stats"])
    else:
        model, inputs = decoder(layers)
        params, apply = model.params, model.apply

    def tracing() -> None:
        jax.make_jaxpr(lambda p, x: apply(p, x))(params, *inputs)

    tracing()
    plain, ours = [], []
    for _ in range(3):
        start = time.perf_counter()
        tracing()
        plain.append(time.perf_counter() - start)
        start = time.perf_counter()
        fi.structure(model, *inputs)
        ours.append(time.perf_counter() - start)
    benchmark.pedantic(lambda: fi.structure(model, *inputs), rounds=1)
    ratio = min(ours) / min(plain)
    benchmark.extra_info |= {"make_jaxpr": min(plain), "fi.structure": min(ours), "ratio": ratio}
    print(
        f"\n{family}, {layers} layers: make_jaxpr {min(plain):.3f} s, fi.structure {min(ours):.3f} s, {ratio:.2f} times"
    )


@pytest.mark.slow
def test_a_decoder_of_70_billion_parameters(benchmark: Any) -> None:
    """80 layers of width 8192, traced on abstract values: seconds, and no array is made."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.RMSNorm()(x)
            query, key, value = (nn.DenseGeneral((n, 128), use_bias=False)(y) for n in (64, 8, 8))
            key, value = (jnp.repeat(t, 8, 2) for t in (key, value))
            weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 128**0.5)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
            x = x + nn.DenseGeneral(8192, axis=(-2, -1), use_bias=False)(y)
            y = nn.RMSNorm()(x)
            up, gate = nn.Dense(28672, use_bias=False)(y), nn.silu(nn.Dense(28672, use_bias=False)(y))
            return x + nn.Dense(8192, use_bias=False)(up * gate)

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            x = nn.Embed(32000, 8192)(tokens)
            for _ in range(80):
                x = Block()(x)
            return nn.Dense(32000, use_bias=False)(nn.RMSNorm()(x))

    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    before = len(jax.live_arrays())
    s = benchmark.pedantic(lambda: fi.structure(Decoder(), tokens), rounds=2)
    count = sum(math.prod(q.shape) for q in s.parameters)
    assert s.num_branches == 160 and 68e9 < count < 70e9
    assert len(jax.live_arrays()) <= before + 2  # scalars
    print(f"\n{count / 1e9:.1f} billion parameters: {benchmark.stats.stats.min:.1f} s")
