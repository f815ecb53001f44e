"""Normalizations bypassed: with their scale and bias, or all but these, in every framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fixup_init as fi

KEY = jax.random.key(1)
X = jax.random.normal(KEY, (4, 6, 6, 8)) * 3 + 1
SCALE, BIAS = jnp.linspace(0.5, 2.0, 8), jnp.linspace(-1.0, 1.0, 8)


def rms(p: Any, x: Any) -> Any:
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def standard(p: Any, x: Any) -> Any:
    return p["scale"] * (x - x.mean((1, 2), keepdims=True)) / (x.std((1, 2), keepdims=True) + 1e-5) + p["bias"]


def half_precision(p: Any, x: Any) -> Any:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * p["scale"]).astype(x.dtype)


class Linen(nn.Module):
    norm: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return self.norm()(x) ** 2


def linen(norm: Any) -> Any:
    model = Linen(norm)
    variables = model.init(KEY, X)
    params = {
        name: jax.tree_util.tree_map_with_path(lambda path, a: BIAS if path[-1].key == "bias" else SCALE, part)
        for name, part in variables["params"].items()
    }
    stats = jax.tree.map(lambda a: a + 0.7, {k: v for k, v in variables.items() if k != "params"})
    return model, {"params": params, **stats}


def batch_norm_nnx(train: bool) -> Any:
    norm = nnx.BatchNorm(8, use_running_average=not train, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = SCALE, BIAS

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.norm = norm

        def __call__(self, x: Any) -> Any:
            return self.norm(x) ** 2

    return Net(), None


def haiku() -> Any:
    f = hk.without_apply_rng(hk.transform(lambda x: hk.LayerNorm(-1, True, True)(x) ** 2))
    params = {"layer_norm": {"scale": SCALE, "offset": BIAS}}
    return fi.Function(f.apply, params), params


def equinox() -> Any:
    norm = eqx.nn.LayerNorm(8)
    norm = eqx.tree_at(lambda n: (n.weight, n.bias), norm, (SCALE, BIAS))
    params, static = eqx.partition(norm, eqx.is_inexact_array)

    def apply(p: Any, x: Any) -> Any:
        return jax.vmap(jax.vmap(jax.vmap(eqx.combine(p, static))))(x) ** 2

    return fi.Function(apply, params), params


def function(f: Any, **params: Any) -> Any:
    return fi.Function(lambda p, x: f(p, x) ** 2, params), params


CASES: dict[str, tuple[Callable[[], Any], bool]] = {  # and whether it has a bias
    "batch": (lambda: linen(lambda: nn.BatchNorm(use_running_average=False)), True),
    "batch-inference": (lambda: linen(lambda: nn.BatchNorm(use_running_average=True)), True),
    "batch-slow": (lambda: linen(lambda: nn.BatchNorm(use_running_average=False, use_fast_variance=False)), True),
    "batch-without-scale": (lambda: linen(lambda: nn.BatchNorm(use_running_average=False, use_scale=False)), True),
    "layer": (lambda: linen(nn.LayerNorm), True),
    "group": (lambda: linen(lambda: nn.GroupNorm(2)), True),
    "rms": (lambda: linen(nn.RMSNorm), False),
    "nnx": (lambda: batch_norm_nnx(True), True),
    "nnx-inference": (lambda: batch_norm_nnx(False), True),
    "haiku": (haiku, True),
    "equinox": (equinox, True),
    "rms-by-hand": (lambda: function(rms, scale=SCALE), False),
    "instance-by-hand": (lambda: function(standard, scale=SCALE, bias=BIAS), True),
    "half": (lambda: function(half_precision, scale=SCALE), False),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("normalization", ["removed", "affine"])
def test_what_is_left(name: str, normalization: str) -> None:
    build, biased = CASES[name]
    model, variables = build()
    x = X.astype(jnp.bfloat16) if name == "half" else X
    scale = 1.0 if name == "batch-without-scale" else SCALE
    left = X if normalization == "removed" else X * scale + (BIAS if biased else 0.0)
    expected = np.asarray(left, np.float64) ** 2
    (row,) = fi.analyze(model, variables, x, normalization=normalization).select("output")
    assert row.forward is not None
    tolerance = 2e-2 if name == "half" else 1e-4
    assert row.forward.mean == pytest.approx(expected.mean(), rel=tolerance)
    assert row.forward.variance == pytest.approx(expected.var(), rel=tolerance)
    assert row.forward.squared_channel_mean == pytest.approx((expected.mean((0, 1, 2)) ** 2).mean(), rel=tolerance)
    structure = fi.structure(model, x, normalization=normalization)
    assert not structure.norms and len(fi.structure(model, x).norms) == 1


def test_in_a_scan() -> None:
    """Each pass has a scale of its own."""
    params = {"w": jnp.eye(8)[None].repeat(3, 0), "scale": jnp.asarray([0.5, 1.0, 2.0])[:, None] * jnp.ones((3, 8))}

    def apply(p: Any, x: Any) -> Any:
        def body(x: Any, layer: Any) -> Any:
            normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * layer["scale"]
            return x + normed @ layer["w"], None

        return jax.lax.scan(body, x, p)[0]

    x = jax.random.normal(KEY, (4, 8))
    row = fi.analyze(fi.Function(apply, params), params, x, normalization="affine").select("output")[0]
    assert row.forward is not None
    assert row.forward.variance == pytest.approx(float((x * 1.5 * 2 * 3).var()), rel=1e-4)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="normalization='scale': expected one of 'kept', 'removed', 'affine'"):
        fi.structure(*linen(nn.LayerNorm)[:1], X, normalization="scale")


@pytest.mark.parametrize("normalization", ["removed", "affine"])
def test_a_normalization_that_a_scan_reads(normalization: Any) -> None:
    """Its result is the same in all passes, as an encoder's is for a scanned decoder."""
    keys = jax.random.split(KEY, 3)
    p = {
        "norm": {"scale": SCALE}, "in": jax.random.normal(keys[0], (8, 8)), "w": jax.random.normal(keys[1], (3, 8, 8)),
    }  # fmt: skip

    def apply(p: Any, x: Any, normalize: Any) -> Any:
        encoded = normalize(p["norm"], x @ p["in"])
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(encoded @ w), None), x, p["w"])[0]

    def instead(p: Any, x: Any) -> Any:
        return x * p["scale"] if normalization == "affine" else x

    bypassed = fi.analyze(fi.Function(lambda p, x: apply(p, x, rms), p), p, X, normalization=normalization)
    without = fi.analyze(fi.Function(lambda p, x: apply(p, x, instead), p), p, X)
    for kind in ("weight", "nonlinearity", "output"):
        found, expected = (
            [r.forward.second_moment for r in m.select(kind) if r.forward is not None] for m in (bypassed, without)
        )
        assert found == pytest.approx(expected, rel=1e-5) and found, kind


class Mixed(nn.Module):
    """A stream in one dtype and its normalizations in another, as mixed precision is usually written."""

    stream: Any
    inner: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8, dtype=self.stream)(x.astype(self.stream))
        if self.norm is not None:
            x = self.norm(dtype=self.inner)(x)
        return nn.Dense(3, dtype=self.stream)(nn.relu(x))


@pytest.mark.parametrize("normalization", ["removed", "affine"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(
    ("stream", "inner"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_normalizations_in_another_dtype_than_the_stream(
    stream: str, inner: str, norm: Any, normalization: Any
) -> None:
    model = Mixed(stream, inner, norm)
    variables = model.init(KEY, X)
    bare = {k: v for k, v in variables["params"].items() if k.startswith("Dense")}
    expected = fi.analyze(Mixed(stream, inner, None), {"params": bare}, X)
    found = fi.analyze(model, variables, X, normalization=normalization)
    assert not found.select("norm")
    for kind in ("weight", "nonlinearity", "output"):
        for mine, other in zip(found.select(kind), expected.select(kind), strict=True):
            assert mine.forward.second_moment == pytest.approx(other.forward.second_moment, rel=0.02)
    fi.predict(model, X, scheme="model", normalization=normalization)
    assert len(fi.compare(model, X).propagations) > 1
