"""Rules of the moments domain, one operation at a time, against samples of the operation itself, both ways."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fixup_init as fi
from fixup_init.predict import predict

SHAPE, DRAWS = (8, 32), 2000
relu = jax.nn.relu
INDEX = jnp.array([0, 1, 2, 2, 5, 5, 5, 7])


def one_hot(x: Any, n: int = 32) -> Any:
    return jax.nn.one_hot(jnp.argmax(x[..., :n], -1), n)


def total(parts: Any) -> Any:
    return parts / parts.sum(-1, keepdims=True)


def over_edges(x: Any) -> Any:
    most = jax.ops.segment_max(x, INDEX, 10)
    weights = jnp.exp(x - most[INDEX])
    return weights / jax.ops.segment_sum(weights, INDEX, 10)[INDEX]


def moduli(x: Any) -> Any:
    return jnp.abs(x[:, :16] + 1j * x[:, 16:])


def turned(x: Any) -> Any:
    angle = jnp.arange(8.0)[:, None] * jnp.arange(16.0)
    return ((x[:, :16] + 1j * x[:, 16:]) * jnp.exp(1j * angle)).real


def shifted(x: Any) -> Any:
    return ((x + 1j) / (x + 2 + 3j)).real


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "sort": lambda x: jnp.sort(x, -1),
    "sort of rectified": lambda x: jnp.sort(relu(x), -1),
    "sort of columns": lambda x: jnp.sort(x, 0),
    "lower half of sorted": lambda x: jnp.sort(x, -1)[:, :16],
    "mean of sorted rows": lambda x: jnp.sort(x, -1).mean(0),
    "rows in the order of one column": lambda x: x[jnp.argsort(x[:, 0])] * 1.0,
    "top_k": lambda x: lax.top_k(x, 5)[0],
    "sum of top_k": lambda x: lax.top_k(x, 5)[0].sum(-1, keepdims=True),
    "where top_k is": lambda x: jax.nn.one_hot(lax.top_k(x, 5)[1], 32).sum(-2),
    "shares of top_k": lambda x: total(lax.top_k(x + 4, 4)[0]),
    "one-hot of argmax": one_hot,
    "one-hot of argmin, equal rows": lambda x: jax.nn.one_hot(jnp.argmin(0.0 * x + x[:1], -1), 32),
    "largest by its one-hot vector": lambda x: (one_hot(x) * x).sum(-1, keepdims=True),
    "argmax": lambda x: jnp.argmax(x, -1).astype(jnp.float32),
    "any": lambda x: jnp.any(x > 2, -1, keepdims=True) * jnp.ones_like(x),
    "all": lambda x: jnp.all(x > -2, -1, keepdims=True) * jnp.ones_like(x),
    "cumsum": lambda x: jnp.cumsum(relu(x), -1),
    "last of cumsum": lambda x: jnp.cumsum(relu(x), 0)[-1:],
    "reverse cumsum of rows": lambda x: lax.cumsum(relu(x), 0, reverse=True),
    "cumprod": lambda x: jnp.cumprod(jax.nn.sigmoid(x) + 0.5, 0),
    "cummax": lambda x: lax.cummax(x, 1),
    "cummin of columns": lambda x: lax.cummin(x, 0),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(0.5 * x + 1, 1),
    "segment_sum": lambda x: jax.ops.segment_sum(relu(x), INDEX, 10),
    "segment_sum, read": lambda x: jax.ops.segment_sum(relu(x), INDEX, 10)[INDEX],
    "segment_sum by argmax": lambda x: jax.ops.segment_sum(x[:, 5:], jnp.argmax(x[:, :5], -1), 5),
    "segment_max": lambda x: jax.ops.segment_max(x, jnp.array([0, 0, 1, 1, 2, 2, 3, 3]), 4),
    "softmax over segments": over_edges,
    "counts": lambda x: jnp.bincount(jnp.argmax(x[:, :5], -1), length=5).astype(jnp.float32)[None],
    "rows set": lambda x: jnp.zeros((10, 32)).at[INDEX].set(3 * relu(x)),
    "columns set": lambda x: x.at[:, INDEX].set(2.0),
    "block set": lambda x: x.at[2:4, 3:9].set(2.0),
    "rows put in another order": lambda x: jnp.zeros((8, 31)).at[jnp.argsort(x[:, 0])].set(relu(x[:, 1:])),
    "rows read": lambda x: jnp.take(relu(x), INDEX, 0),
    "dynamic_update_slice": lambda x: lax.dynamic_update_slice(jnp.ones((12, 32)), relu(x), (3, 0)),
    "what it wrote": lambda x: lax.dynamic_update_slice(jnp.ones((12, 32)), relu(x), (3, 0))[3:11],
    "logsumexp": lambda x: jax.nn.logsumexp(x, -1, keepdims=True),
    "log softmax": lambda x: jax.nn.log_softmax(x, -1),
    "log softmax over columns": lambda x: jax.nn.log_softmax(2 * x, 0),
    "logsumexp of columns": lambda x: jax.nn.logsumexp(x, 0)[None],
    "deviation of rows": lambda x: jnp.std(x, -1, keepdims=True),
    "norm of rows, rectified": lambda x: jnp.linalg.norm(relu(x), axis=-1, keepdims=True),
    "norm of rows": lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True),
    "product": lambda x: jnp.prod(1 + 0.1 * x, -1, keepdims=True),
    "one of three": lambda x: lax.select_n(jnp.argmax(x[:, :3], -1)[:, None] * jnp.ones((8, 24), int), *[
        k * x[:, 8:] for k in (1.0, 2.0, 3.0)
    ]),
    "diagonal": lambda x: jnp.diagonal(x[:8, :8])[None],
    "tile": lambda x: jnp.tile(relu(x), (2, 3)),
    "pmean over a vmap": lambda x: jax.vmap(lambda r: lax.pmean(relu(r), "b"), axis_name="b")(x),
    "cond": lambda x: lax.cond(x[0, 0] > 0.5, lambda y: 3 * y + 1, lambda y: y, x[1:]),
    "switch": lambda x: lax.switch(
        jnp.argmax(x[0, :3]), [lambda y: 3 * y + 1, lambda y: y, lambda y: y - 2], x[1:] * 1.0
    ),
    "fft, real part": lambda x: jnp.fft.fft(relu(x), axis=-1).real,
    "fft, imaginary part": lambda x: jnp.fft.fft(x, axis=0).imag,
    "fft2": lambda x: jnp.fft.fft2(relu(x)).real,
    "modulus": moduli,
    "rfft and back": lambda x: jnp.fft.irfft(jnp.fft.rfft(relu(x)), 32),
    "low frequencies": lambda x: jnp.fft.irfft(jnp.fft.rfft(x)[:, :8], 32),
    "complex exponential": lambda x: jnp.exp(1j * x).imag,
    "complex rotation": turned,
    "complex quotient": shifted,
}  # fmt: skip
QUICK = (
    "sort", "top_k", "shares of top_k", "one-hot of argmax", "largest by its one-hot vector", "cumsum",
    "log softmax", "segment_sum, read", "softmax over segments", "what it wrote", "cond", "fft, real part",
    "complex quotient",
)  # fmt: skip


@functools.cache
def sampled(name: str) -> tuple[float, float, float, float]:
    """Mean, second moment, that of means over rows, and the mean square of the gradient."""
    f = PROGRAMS[name]

    def one(key: Any) -> Any:
        a, b = jax.random.split(key)
        y, pull = jax.vjp(f, jax.random.normal(a, SHAPE))
        rows = y.reshape(-1, y.shape[-1]).mean(0)
        back = pull(jax.random.normal(b, y.shape, y.dtype))[0]
        return y.mean(), jnp.square(y).mean(), jnp.square(rows).mean(), jnp.square(back).mean()

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), DRAWS))
    return tuple(float(x.mean()) for x in found)  # pyright: ignore


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in PROGRAMS])
def test_rule_against_samples(name: str) -> None:
    mean, second, rows, gradient = sampled(name)
    net = fi.Function(lambda params, x: PROGRAMS[name](x), {})
    found = predict(net, jax.ShapeDtypeStruct(SHAPE, jnp.float32)).rows
    forward, backward = found[-1].forward, found[0].backward
    assert forward is not None and backward is not None
    print(
        f"\n{name}: mean {forward.mean:.4f} / {mean:.4f}, second {forward.second_moment / second:.4f}, rows "
        f"{forward.squared_channel_mean / rows:.4f}, gradient "
        f"{backward.second_moment / gradient if gradient else backward.second_moment:.4f}"
    )
    assert forward.mean == pytest.approx(mean, abs=0.015 * np.sqrt(second))
    assert forward.second_moment == pytest.approx(second, rel=0.03)
    if len(found[-1].shape) == 2:
        assert forward.squared_channel_mean == pytest.approx(rows, rel=0.06)
    assert backward.second_moment == pytest.approx(gradient, rel=0.03, abs=1e-12)
